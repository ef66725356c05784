"""The roster: how each named optimizer of a study is made, and the settings it has on each problem.

Learning rates on the digits were tuned over the grid 1, 3 (times powers of ten) until the best value was interior, on
seeds 100 and 101, which no study reports; all other settings are each optimizer's defaults, but for those that are given,
of which a few values were tried as well (damping, clips, Sophia's rho, gamma and betas, Lion's betas, SINGD's rate). On the
MNIST autoencoder Adam, SGD and MBF as published have the settings of the MBF authors' experiments; KFAC's step size and clip
were tuned on seed 100 for 10 epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import curvlib
from curvlib.optimizers.mbf import PUBLISHED

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
        colour: in figures, unless another method of the report has it; the palettes of Okabe & Ito and of Tol are safe for
            the colour-blind.
        dash: line style, so that figures can be read without colour.
        settings: problem -> settings there.
        everywhere: settings that do not depend on the problem; ``warm_start`` asks for the MBF authors' pass over the data.
        space: where a search looks for settings.
    """

    name: str
    title: str
    build: Callable[..., torch.optim.Optimizer]
    colour: str = ""
    dash: str = "-"
    settings: Mapping[str, Settings] = field(default_factory=dict)
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
        except Exception as error:  # other packages' optimizers may raise anything
            raise MethodError(f"{self.name} refuses the settings {given}: {error}") from error


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
            {"digits-autoencoder": {"lr": 0.3, "damping": 1.0}, "digits-cnn": {"lr": 0.3, "damping": 0.1}},
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
                "digits-autoencoder": {"lr": 3e-2},
                "digits-cnn": {"lr": 1e-1},
                "mnist-autoencoder": {"lr": 3e-3},
            },
            {"momentum": 0.9},
        ),
    )
}
