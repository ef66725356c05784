"""Three checks for other people's tests: of a block class, of a partition, of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from ..blocks import Block, EigenBlock, StandardBlock
from ..partition import Partition
from ..recipe import Damping, Moment, Recipe, Root
from . import blocks, recipes, trainings, trials
from . import partitions as partitions_of
from .properties import hold


def check_block(
    block: type[Block],
    *,
    recipe: Recipe | None = None,
    partitions: Sequence[str | Partition] = ("| ...",),
    examples: int = 50,
) -> None:
    """Test a block structure on drawn shapes, numbers of operands, dampings and gradients.

    Args:
        block: the class.
        recipe: what else decides it; by default exponent 1 and an absolute damping. Its damping's value is drawn.
        partitions: which the structure is put on; one that reads only shapes needs no other.
        examples: for each property.

    Raises:
        PropertyFailed: naming the property, in words, and the smallest example found.
        TypeError: for what is no block class.
    """
    if not (isinstance(block, type) and issubclass(block, Block)):
        raise TypeError(f"check_block takes a subclass of curvlib.blocks.Block, got {block!r}")
    given = [one if isinstance(one, Partition) else Partition(one) for one in partitions]
    if not given:
        raise ValueError("partitions must name at least one partition")
    recipe = recipe or Recipe(given[0], Moment(), Root(1, Damping(1.0)))
    drawn = trials.trials(block, recipe, given)
    # A standard block that is damped factor by factor is what its layout says, factor by factor.
    defined = issubclass(block, StandardBlock) and block.damps == "factors"
    hold(block.__name__, [*blocks.PROPERTIES, *(partitions_of.FACTORS if defined else ())], drawn, examples)


def check_partition(partition: str | Partition, *, examples: int = 25) -> None:
    """Test a partition: what it covers, its curvature against the definition in plain loops, and both standard structures.

    Args:
        partition: or its text.
        examples: for each property.

    Raises:
        PropertyFailed: naming the property, in words, and the smallest example found.
        PartitionError: where the text is none.
    """
    partition = partition if isinstance(partition, Partition) else Partition(partition)
    pairs: Sequence[tuple[type[Block], str]] = (
        (StandardBlock, "independent"),
        (StandardBlock, "trace"),
        (EigenBlock, "trace"),
    )
    for structure, composition in pairs:
        moment = Moment(composition=composition)  # type: ignore[arg-type]
        recipe = Recipe(partition, moment, Root(1, Damping(1.0)))
        drawn = trials.trials(structure, recipe, [partition])
        what = f"the partition {str(partition)!r} under {structure.__name__}, {composition},"
        own = partitions_of.PROPERTIES if composition == "independent" else partitions_of.FACTORS
        hold(what, [*(own if structure.damps == "factors" else ()), *blocks.PROPERTIES], drawn, examples)


def check_recipe(recipe: trainings.Target, *, model: trainings.Build | None = None, examples: int = 8) -> None:
    """Test a recipe, a routing table, or what makes an optimizer, by training small networks with it.

    Args:
        recipe: a :class:`curvlib.Recipe`, a route, several, or a function from a model to an optimizer, such as
            ``curvlib.KFAC``. What a single recipe does not fit, such as a bias, gets the diagonal.
        model: makes a fresh network of ``[n, 6]`` inputs and 3 outputs, to train instead of the kit's own: for recipes that
            name axes of their own.
        examples: for each property; each trains networks for a few steps.

    Raises:
        PropertyFailed: naming the property, in words, and the smallest example found.
        TypeError, ValueError: where there is nothing to test, or the recipe fits no network.
    """
    make = trainings.builder(recipe)
    drawn = trainings.trials(make, trainings.networks(make, model))
    hold(trainings.name_of(recipe), recipes.PROPERTIES, drawn, examples)
