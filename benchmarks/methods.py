"""Methods: how each optimizer of a study is made, and the settings it has on each problem.

Learning rates on the digits were tuned over the grid 1, 3 (times powers of ten) until the best value was interior, on
seeds 100 and 101, which no study reports; all other settings are each optimizer's defaults, but for those that are given,
of which a few values were tried as well (damping, clips, Sophia's rho, gamma and betas, Lion's betas, SINGD's rate). On the
MNIST autoencoder Adam, SGD and MBF as published have the settings of the MBF authors' experiments; KFAC's step size and clip
were tuned on seed 100 for 10 epochs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import curvlib
from curvlib.optimizers.mbf import PUBLISHED

from .naming import UnknownName, imported, nearest
from .space import OUTSIDE, SPACES, Space

Settings = Mapping[str, Any]


class MethodError(ValueError):
    """What is no method, or settings that it cannot have."""


@dataclass(frozen=True)
class Method:
    """One optimizer of a study.

    Args:
        name: how it is called on the command line.
        title: for tables and figures.
        build: from a model and settings to an optimizer.
        colour: in every figure; the palette of Okabe & Ito is safe for the colour-blind.
        dash: line style, so that figures can be read without colour.
        settings: problem -> settings there.
        everywhere: settings that do not depend on the problem; ``warm_start`` asks for the MBF authors' pass over the data.
        space: where a search looks for settings.
    """

    name: str
    title: str
    build: Callable[..., torch.optim.Optimizer]
    colour: str
    dash: str
    settings: Mapping[str, Settings]
    everywhere: Settings = field(default_factory=dict)
    space: Space = field(default_factory=lambda: OUTSIDE)

    def settings_for(self, problem: str) -> dict[str, Any]:
        """The settings on a problem."""
        return {**self.everywhere, **self.settings.get(problem, {})}

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        """The optimizer of a model; lists become tuples, as optimizers want them.

        Raises:
            MethodError: naming the setting that is refused.
        """
        given = {name: tuple(one) if isinstance(one, list) else one for name, one in settings.items()}
        try:
            return self.build(model, **given)
        except (TypeError, ValueError) as error:
            raise MethodError(f"{self.name} refuses the settings {given}: {error}") from error


_COLOURS = ("#332288", "#117733", "#AA4499", "#882255", "#44AA99", "#999933", "#661100", "#6699CC")
_DASHES = ("-", "--", "-.", ":")


def label(name: str) -> str:
    """What a method is called in a study: what stands before ``=`` in its name, or all of it."""
    return name.partition("=")[0]


def title_of(name: str) -> str:
    """What a method is called in tables and figures, also where it is not installed here."""
    return METHODS[name].title if name in METHODS else label(name)


def method(name: str) -> Method:
    """A method by its name.

    Args:
        name: one of :data:`METHODS`; ``module:Name`` of a torch optimizer, of a function from a model and settings to one, or
            of a :class:`Method`; or ``Label=`` and one of these, to have it several times under several settings.

    Raises:
        UnknownName, MethodError: where there is none.
    """
    if name in METHODS:
        return METHODS[name]
    known = label(name)
    if "=" in name:
        colour, dash = _look(known)
        return replace(method(name.partition("=")[2]), name=name, title=known, settings={}, colour=colour, dash=dash)
    if ":" not in name:
        raise UnknownName(
            f"unknown method {name!r}{nearest(name, METHODS)} there are {', '.join(METHODS)}; others are given as "
            "module:Class, such as torch.optim:AdamW"
        )
    found = imported(name)
    if isinstance(found, Method):
        return replace(found, name=name)
    if inspect.isclass(found) and not issubclass(found, curvlib.CurvatureOptimizer):
        if not issubclass(found, torch.optim.Optimizer):
            raise MethodError(f"{name} is no torch.optim.Optimizer, but a {found.__mro__[1].__name__}")
        takes_parameters: Callable[..., torch.optim.Optimizer] = found

        def build(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
            """Other packages' optimizers take parameters."""
            return takes_parameters(model.parameters(), **settings)
    elif callable(found):
        build = found
    else:
        raise MethodError(f"{name} is no optimizer, function or Method, but {type(found).__name__}")
    return Method(name, name, build, *_look(name), settings={})


def _look(name: str) -> tuple[str, str]:
    """A colour and a dash that are always the same for a name."""
    number = sum(name.encode())
    return _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]


def module_of(name: str) -> str:
    """The module that a method comes from, or nothing for the named ones."""
    outside = name.partition("=")[2] or name
    return outside.partition(":")[0] if ":" in outside else ""


_PER_INPUT = {"linear_blocks": "input-averaged"}
_PUBLISHED = {**PUBLISHED, "warm_start": True}

METHODS: dict[str, Method] = {
    one.name: replace(one, space=SPACES[one.name])
    for one in (
        Method(
            "mbf",
            "MBF",
            curvlib.MBF,
            "#D55E00",
            "-",
            {"digits-autoencoder": {"lr": 1e-2}, "digits-cnn": {"lr": 3e-2}},
        ),
        Method(
            "mbf-samples",
            "MBF per sample",
            curvlib.MBF,
            "#E69F00",
            "--",
            {"digits-autoencoder": {"lr": 1e-2}, "digits-cnn": {"lr": 3e-2}},
            {"of": "samples"},
        ),
        Method(
            "kfac",
            "KFAC",
            curvlib.KFAC,
            "#000000",
            "-",
            {
                "digits-autoencoder": {"lr": 3e-2},
                "digits-cnn": {"lr": 1e-2},
                "mnist-autoencoder": {"lr": 1e-2, "kl_clip": 0.1, "refresh_every": 20},
            },
        ),
        Method("mbf-input", "MBF per input", curvlib.MBF, "#E69F00", ":", {}, _PER_INPUT),
        Method("mbf-published", "MBF as published", curvlib.MBF, "#56B4E9", "--", {}, _PUBLISHED),
        Method(
            "shampoo",
            "Shampoo",
            curvlib.Shampoo,
            "#0072B2",
            "--",
            {"digits-autoencoder": {"lr": 1e-2}, "digits-cnn": {"lr": 3e-2}},
        ),
        Method(
            "tnt",
            "TNT",
            curvlib.TNT,
            "#332288",
            "-",
            {"digits-autoencoder": {"lr": 1e-3}, "digits-cnn": {"lr": 1e-3}},
        ),
        Method(
            "tkfac",
            "TKFAC",
            curvlib.TKFAC,
            "#DDAA33",
            "--",
            {"digits-autoencoder": {"lr": 1e-1, "damping": 1.0}, "digits-cnn": {"lr": 1e-2}},
        ),
        Method(
            "ngd",
            "NGD, chunks of 256",
            curvlib.NGD,
            "#661100",
            "-.",
            {"digits-autoencoder": {"lr": 1e-3}, "digits-cnn": {"lr": 3e-3}},
            {"block_size": 256, "refresh_every": 10, "momentum": 0.9},
        ),
        Method(
            "foof",
            "FOOF",
            curvlib.FOOF,
            "#999933",
            "-.",
            {"digits-autoencoder": {"lr": 3e-2}, "digits-cnn": {"lr": 1e-1}},
            {"damping": 0.1},
        ),
        Method(
            "one-sided",
            "One-sided Shampoo",
            curvlib.OneSidedShampoo,
            "#88CCEE",
            "--",
            {"digits-autoencoder": {"lr": 1e-2}, "digits-cnn": {"lr": 3e-2}},
        ),
        Method(
            "eva",
            "Eva",
            curvlib.Eva,
            "#117733",
            "-",
            {"digits-autoencoder": {"lr": 1e-2, "damping": 0.1, "kl_clip": 1e-2}, "digits-cnn": {"lr": 3e-3}},
        ),
        Method(
            "muon",
            "Muon",
            curvlib.Muon,
            "#AA4499",
            "-",
            {"digits-autoencoder": {"lr": 1e-2}, "digits-cnn": {"lr": 1e-2}},
        ),
        Method(
            "lion",
            "Lion",
            curvlib.Lion,
            "#882255",
            ":",
            {"digits-autoencoder": {"lr": 3e-3, "betas": (0.95, 0.98)}, "digits-cnn": {"lr": 5e-3}},
        ),
        Method(
            "sophia",
            "Sophia-G",
            curvlib.SophiaG,
            "#DDCC77",
            ":",
            {
                "digits-autoencoder": {"lr": 3e-3, "rho": 0.1, "betas": (0.8, 0.95)},
                "digits-cnn": {"lr": 3e-3, "rho": 0.01},
            },
            {"weight_decay": 0.0},
        ),
        Method(
            "adafactor",
            "AdaFactor",
            curvlib.Adafactor,
            "#44AA99",
            "--",
            {"digits-autoencoder": {"lr": 7e-2}, "digits-cnn": {"lr": 3e-1}},
        ),
        Method(
            "mbf-window",
            "MBF, window of 32",
            curvlib.MBF,
            "#D55E00",
            ":",
            {"digits-autoencoder": {"lr": 1e-2}, "digits-cnn": {"lr": 3e-2}},
            {"linear_blocks": "output", "window": 32},
        ),
        Method(
            "ekfac",
            "EKFAC",
            curvlib.EKFAC,
            "#000000",
            "--",
            {
                "digits-autoencoder": {"lr": 1e-2, "damping": 1e-2, "kl_clip": 1e-2},
                "digits-cnn": {"lr": 1e-2, "damping": 1e-2, "kl_clip": 0.1},
            },
        ),
        Method(
            "soap",
            "SOAP",
            curvlib.SOAP,
            "#0072B2",
            "-",
            {"digits-autoencoder": {"lr": 1e-2}, "digits-cnn": {"lr": 1e-2}},
        ),
        Method(
            "kl-shampoo",
            "KL-Shampoo",
            curvlib.KLShampoo,
            "#0072B2",
            ":",
            {"digits-autoencoder": {"lr": 1e-2, "damping": 1e-3}, "digits-cnn": {"lr": 1e-2, "damping": 1e-4}},
        ),
        Method(
            "kbfgs",
            "K-BFGS",
            curvlib.KBFGS,
            "#CC3311",
            "-",
            {"digits-autoencoder": {"lr": 0.3}, "digits-cnn": {"lr": 0.3}},
            {"damping": 0.03},
        ),
        Method(
            "kbfgs-l",
            "K-BFGS(L)",
            curvlib.KBFGS,
            "#CC3311",
            "--",
            {"digits-autoencoder": {"lr": 0.3}, "digits-cnn": {"lr": 0.3}},
            {"damping": 0.1, "memory": 100},
        ),
        Method(
            "singd",
            "SINGD",
            curvlib.SINGD,
            "#EE7733",
            "-",
            {"digits-autoencoder": {"lr": 1e-3}, "digits-cnn": {"lr": 3e-2}},
            {"rate": 0.1, "normalize": True},
        ),
        Method(
            "psgd",
            "PSGD-Kron",
            curvlib.PSGDKron,
            "#EE3377",
            "-",
            {"digits-autoencoder": {"lr": 3e-3}, "digits-cnn": {"lr": 3e-3}},
        ),
        Method(
            "adahessian",
            "AdaHessian",
            curvlib.AdaHessian,
            "#009E73",
            "--",
            {
                "digits-autoencoder": {"lr": 0.1, "eps": 1e-2, "betas": (0.8, 0.999)},
                "digits-cnn": {"lr": 0.2, "betas": (0.8, 0.99), "power": 0.8},
            },
        ),
        Method(
            "sophia-h",
            "Sophia-H",
            curvlib.SophiaH,
            "#DDCC77",
            "-",
            {
                "digits-autoencoder": {"lr": 3e-3, "gamma": 0.1, "betas": (0.8, 0.95)},
                "digits-cnn": {"lr": 3e-3, "gamma": 0.01},
            },
            {"weight_decay": 0.0},
        ),
        Method(
            "layerwise-sgd",
            "SGD-m, steps by layer",
            curvlib.LayerwiseSGD,
            "#CC79A7",
            "-",
            {
                "digits-autoencoder": {"largest": 0.2, "every": 1, "beta": 0.0, "momentum": 0.7, "damping": 1e-2},
                "digits-cnn": {"largest": 1.0},
            },
        ),
        Method(
            "layerwise-adamw",
            "AdamW, steps by layer",
            curvlib.LayerwiseAdamW,
            "#009E73",
            ":",
            {
                "digits-autoencoder": {"largest": 3e-3, "damping": 1e-3},
                "digits-cnn": {"largest": 0.03, "damping": 0.1},
            },
        ),
        Method(
            "rmsprop",
            "RMSprop",
            curvlib.RMSprop,
            "#661100",
            ":",
            {"digits-autoencoder": {"lr": 1e-3}, "digits-cnn": {"lr": 1e-3}},
            {"momentum": 0.9, "alpha": 0.9},
        ),
        Method(
            "adagrad",
            "Adagrad",
            curvlib.Adagrad,
            "#332288",
            ":",
            {
                "digits-autoencoder": {"lr": 3e-2, "initial_accumulator_value": 1e-3},
                "digits-cnn": {"lr": 3e-2},
            },
        ),
        Method(
            "full-adagrad",
            "Full-matrix AdaGrad, chunks of 256",
            curvlib.FullAdagrad,
            "#332288",
            "--",
            {"digits-autoencoder": {"lr": 3e-2}, "digits-cnn": {"lr": 3e-2}},
            {"block_size": 256, "refresh_every": 10},
        ),
        Method(
            "adam",
            "Adam",
            curvlib.Adam,
            "#009E73",
            "-.",
            {
                "digits-autoencoder": {"lr": 1e-2},
                "digits-cnn": {"lr": 1e-2},
                "mnist-autoencoder": {"lr": 3e-4, "eps": 1e-4},
            },
        ),
        Method(
            "sgd",
            "SGD-m",
            curvlib.SGD,
            "#CC79A7",
            ":",
            {
                "digits-autoencoder": {"lr": 1e-2},
                "digits-cnn": {"lr": 1e-1},
                "mnist-autoencoder": {"lr": 3e-3},
            },
            {"momentum": 0.9},
        ),
    )
}


def memory(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state: what it says, or the tensors of ``state``."""
    if isinstance(optimizer, curvlib.CurvatureOptimizer):
        return sum(optimizer.memory().values())
    tensors = (value for record in optimizer.state.values() for value in record.values())
    return sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))
