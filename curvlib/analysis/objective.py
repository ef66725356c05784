"""The objective: the mean loss of a model over examples, as a function of some of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import check_choice, check_number
from ..labels import LIKELIHOODS, Likelihood

Of = nn.Module | Tensor | str
Loss = Callable[[Tensor, Tensor], Tensor]

_MIXES = (nn.modules.batchnorm._BatchNorm,)
_DRAWS = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)


def _draws(module: nn.Module) -> bool:
    """Whether it draws random numbers in training mode."""
    rate = getattr(module, "dropout", getattr(module, "p", 0.0))
    return isinstance(module, nn.RReLU) or (isinstance(module, _DRAWS) and rate > 0)


@dataclass(frozen=True, eq=False)
class Objective:
    """h(θ) = 1/N Σ_n loss(model(x_n), y_n).

    An example's loss is ``loss`` of a batch of one, so that mean and sum reductions mean the same.

    Args:
        model: in evaluation mode where it has dropout or batch normalisation. It is never changed.
        loss: (outputs ``[1, ...]``, targets ``[1, ...]``) -> 0-d; a torch loss, or any function.
        inputs: ``[N, ...]``.
        targets: ``[N, ...]``.
        likelihood: of which the loss is a negative log-likelihood times ``scale``: ``"categorical"`` (over the last
            dimension of the outputs), ``"bernoulli"``, ``"gaussian"``. Torch's cross entropies and squared error know theirs.
        scale: see :meth:`curvlib.CurvatureOptimizer.observe`; 1 by default.
        dtype: compute in this dtype, such as ``torch.float64``, instead of the model's.

    Raises:
        ValueError: for a layer in training mode that mixes examples or draws, or numbers of examples that differ.
    """

    model: nn.Module
    loss: Loss
    inputs: Tensor
    targets: Tensor
    likelihood: Likelihood | None = None
    scale: float | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise ValueError(
                f"inputs and targets must be of the same examples, got {len(self.inputs)} and {len(self.targets)}"
            )
        if self.likelihood is not None:
            check_choice("likelihood", self.likelihood, LIKELIHOODS)
        if self.scale is not None:
            check_number("scale", self.scale, strict=True)
        ignored = getattr(self.loss, "ignore_index", -100 if self.loss is F.cross_entropy else None)
        if ignored is not None and self.targets.ndim == 1 and bool((self.targets == ignored).any()):
            raise ValueError(f"targets hold the ignored class {ignored}, which has no loss: leave such examples out")
        for name, module in self.model.named_modules():
            label = name or type(module).__name__
            if isinstance(module, _MIXES) and module.running_mean is None:
                raise ValueError(
                    f"{label} mixes examples in any mode, so that no example has a loss of its own: it needs running "
                    "statistics (track_running_stats=True)"
                )
            if module.training and (isinstance(module, _MIXES) or _draws(module)):
                what = "mixes examples" if isinstance(module, _MIXES) else "draws random numbers"
                raise ValueError(
                    f"{label} {what} in training mode, so that no example has a loss of its own: call model.eval() first"
                )

    def __len__(self) -> int:
        return len(self.inputs)

    # -- parameters -------------------------------------------------------------------------------------------------

    def names(self, of: Of | Sequence[Of] | None = None) -> list[str]:
        """The trainable parameters of a selection, in the model's order.

        Args:
            of: a module, a parameter, the name of either, or several of these; ``None`` for the whole network.

        Raises:
            ValueError: where there are none.
        """
        known = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if of is None:
            chosen = set(known)
        else:
            parts = [of] if isinstance(of, (nn.Module, Tensor, str)) else list(of)
            chosen = {name for part in parts for name in self._of(part, known)}
        if not chosen:
            raise ValueError(f"{type(self.model).__name__} has no trainable parameters there")
        return [name for name in known if name in chosen]

    def _of(self, part: Of, known: Mapping[str, Tensor]) -> list[str]:
        label = part if isinstance(part, str) else type(part).__name__
        modules = dict(self.model.named_modules())
        if isinstance(part, str) and part in modules:
            part = modules[part]
        if isinstance(part, nn.Module):
            mine = set(part.parameters())
            found = [name for name, parameter in known.items() if parameter in mine]
        else:
            aliases = dict(self.model.named_parameters(remove_duplicate=False))  # a tied weight has several names
            wanted = aliases.get(part) if isinstance(part, str) else part
            found = [name for name, parameter in known.items() if parameter is wanted]
        if not found:
            raise ValueError(
                f"no trainable parameter of {type(self.model).__name__} belongs to {label!r}; it has {', '.join(known)}"
            )
        return found

    @property
    def layers(self) -> list[str]:
        """The names of the modules that hold trainable parameters themselves."""
        return [
            name
            for name, module in self.model.named_modules()
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        ]

    def values(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Detached parameters in the dtype of the objective."""
        held = dict(self.model.named_parameters())
        return {name: self._cast(held[name].detach()) for name in names}

    def numel(self, names: Sequence[str]) -> int:
        """D, the number of entries."""
        held = dict(self.model.named_parameters())
        return sum(held[name].numel() for name in names)

    @property
    def precision(self) -> torch.dtype:
        """What is computed in."""
        return self.dtype or next(self.model.parameters()).dtype

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value

    # -- the function -----------------------------------------------------------------------------------------------

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """The model at some parameters; those that are not given stay as they are."""
        held = (*self.model.named_parameters(), *self.model.named_buffers())
        rest = {name: self._cast(value.detach()) for name, value in held if name not in parameters}
        result: Tensor = functional_call(self.model, {**rest, **parameters}, (self._cast(inputs.detach()),))
        return result

    def example_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of one example, without its batch dimension."""
        value = self.loss(output[None], self._cast(target)[None])
        if value.numel() != 1:
            raise ValueError(
                f"the loss of an example must be one number, got shape {list(value.shape)}: reduce it to a mean or a sum"
            )
        return value.reshape(())

    def gradient(self, of: Of | Sequence[Of] | None = None) -> Tensor:
        """∇h, ``[D]``: of every parameter in row-major order, one after the other."""
        names = self.names(of)

        def mean(parameters: dict[str, Tensor]) -> Tensor:
            outputs = self.outputs(parameters, self.inputs)
            return torch.vmap(self.example_loss)(outputs, self.targets).mean()

        with double_differentiable():
            found = torch.func.grad(mean)(self.values(names))
        return flat(found, names)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, so many examples at once."""
        yield from zip(self.inputs.split(size), self.targets.split(size), strict=True)

    # -- the loss as a function of the outputs ----------------------------------------------------------------------

    def known(self, what: str) -> tuple[Likelihood, float]:
        """(likelihood, scale) of the loss.

        Args:
            what: asks for them, for the error.

        Raises:
            ValueError: where the Hessian of the loss with respect to the outputs is not known.
        """
        if self.likelihood is not None:
            return self.likelihood, 1.0 if self.scale is None else self.scale
        found = _LOSSES.get(self.loss) or _of_module(self.loss)
        if found is None:
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise ValueError(
                f"{what} needs the Hessian of the loss with respect to the outputs, which is not known for {name}: give "
                "likelihood= (and scale=) where the loss is a negative log-likelihood, or use labels='data' or hessian()"
            )
        likelihood, reduction, factor = found
        with torch.no_grad():
            one = self.outputs({}, self.inputs[:1])
        if likelihood == "categorical":
            if one.ndim != 2:
                raise ValueError(
                    f"{what} of a cross entropy of outputs {list(one.shape[1:])} at several positions: give a function that "
                    "folds positions into the batch as the loss, likelihood='categorical', and scale=1 / positions for a mean"
                )
            return likelihood, factor
        return likelihood, factor / one.numel() if reduction == "mean" else factor


_LOSSES: Mapping[Loss, tuple[Likelihood, str, float]] = {
    F.cross_entropy: ("categorical", "mean", 1.0),
    F.binary_cross_entropy_with_logits: ("bernoulli", "mean", 1.0),
    F.mse_loss: ("gaussian", "mean", 2.0),
}


def _of_module(loss: Loss) -> tuple[Likelihood, str, float] | None:
    weighted = getattr(loss, "weight", None) is not None or getattr(loss, "pos_weight", None) is not None
    reduction = getattr(loss, "reduction", "none")
    if weighted or reduction == "none":
        return None
    for kind, likelihood, factor in _MODULES:
        if isinstance(loss, kind) and type(loss).forward is kind.forward:  # a subclass may compute something else
            return likelihood, reduction, factor
    return None


_MODULES: Sequence[tuple[type[nn.Module], Likelihood, float]] = (
    (nn.CrossEntropyLoss, "categorical", 1.0),
    (nn.BCEWithLogitsLoss, "bernoulli", 1.0),
    (nn.MSELoss, "gaussian", 2.0),
)


def flat(tensors: Mapping[str, Tensor], names: Sequence[str], batch: int = 0) -> Tensor:
    """``[*batch, D]`` from a tensor ``[*batch, *shape]`` for each name."""
    return torch.cat([tensors[name].flatten(batch) for name in names], batch)


def unflat(vector: Tensor, like: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """A tensor for each name from ``[D]``."""
    parts = vector.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


@contextmanager
def _plain_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def double_differentiable() -> AbstractContextManager[None]:
    """Attention by matrix products: fused kernels have neither second derivatives nor batching rules."""
    return _plain_attention()


def pullback(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(value, u -> Jᵀu) of a function at a point."""
    value, pull = torch.func.vjp(function, point)[:2]
    return value, lambda u: pull(u)[0]
