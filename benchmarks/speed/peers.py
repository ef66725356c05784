"""Other libraries: found where they are installed, or in a folder; and their settings.

A folder given by ``--peers`` is added to the end of the import path: it holds what ``pip install --target DIR`` puts there,
or packages and modules as they are (``distributed_shampoo/``, ``soap.py``).
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .timing import Setting

NEVER = 10**9
"""A period that no run reaches."""

_PACKAGES = {
    "distributed_shampoo.distributed_shampoo": "distributed_shampoo",
    "heavyball": "heavyball",
    "kfac.preconditioner": "kfac-pytorch",
    "pytorch_optimizer": "pytorch_optimizer",
    "soap": "soap",
}


class Missing(ImportError):
    """A peer is not there; says which, and how it is installed."""


def _import(module: str, package: str, setting: Setting) -> Any:
    folder = None if setting.peers is None else str(setting.peers)
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and module.partition(".")[0] == error.name.partition(".")[0]:
            raise Missing(f"{package} is not installed") from None
        raise Missing(f"{package} cannot be imported: {error}") from None


def versions() -> dict[str, str]:
    """The versions of the peers that were imported; of those without one, a hash of the file that was."""
    found = {}
    for module, package in _PACKAGES.items():
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None:
            continue
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = f"sha256 of {Path(file).name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}"
    return found


def distributed_shampoo(setting: Setting, epsilon: float, refresh: int) -> Callable[[list[nn.Parameter]], Any]:
    """Meta's Distributed Shampoo: averages with 0.9 and 0.99, no grafting; roots by eigh, from the first step on."""
    module = _import("distributed_shampoo", "Distributed Shampoo (github.com/facebookresearch/optimizers)", setting)
    logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)

    def build(parameters: list[nn.Parameter]) -> Any:
        optimizer = module.DistributedShampoo(
            parameters,
            lr=1e-2,
            betas=(0.9, 0.99),
            epsilon=epsilon,
            max_preconditioner_dim=1024,
            precondition_frequency=1,
            start_preconditioning_step=1,
            use_bias_correction=True,
            grafting_config=None,
            distributed_config=module.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        )
        for group in optimizer.param_groups:  # a first root at a period that is longer is refused by its constructor
            group["precondition_frequency"] = refresh
        return optimizer

    return build


def dash(setting: Setting, epsilon: float, refresh: int) -> Callable[[list[nn.Parameter]], Any]:
    """pytorch_optimizer's DASH, with eigh, which on a CPU is the faster of its solvers, and Adam's grafting."""
    module = _import("pytorch_optimizer", "pytorch_optimizer", setting)
    if not hasattr(module, "DASH"):
        raise Missing("pytorch_optimizer with DASH is not installed")
    solver = "eigh" if setting.device.type == "cpu" else "newton_db"
    return lambda parameters: module.DASH(
        parameters,
        lr=1e-2,
        betas=(0.9, 0.99),
        block_size=1024,
        precondition_frequency=refresh,
        inverse_root_method=solver,
        matrix_eps=epsilon,
    )


def official_soap(setting: Setting, refresh: int) -> Callable[[list[nn.Parameter]], Any]:
    """The authors' SOAP, without weight decay."""
    module = _import("soap", "SOAP (github.com/nikhilvyas/SOAP)", setting)
    return lambda parameters: module.SOAP(
        parameters, lr=1e-2, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=refresh
    )


def heavyball_soap(setting: Setting, refresh: int) -> Callable[[list[nn.Parameter]], Any]:
    """SOAP of heavyball, without weight decay; it compiles itself, in its first steps."""
    module = _import("heavyball", "heavyball", setting)
    if setting.quick:
        module.utils.compile_mode = None
    return lambda parameters: module.SOAP(
        parameters,
        lr=1e-2,
        betas=(0.95, 0.95),
        shampoo_beta=0.95,
        weight_decay=0.0,
        precondition_frequency=refresh,
        merge_dims=False,
        max_precond_dim=4096,
    )


class KfacPytorch:
    """kfac-pytorch with the SGD that follows it, as one optimizer.

    Args:
        model: whose layers it listens to.
        setting: of the run.
        method: ``"inverse"`` or ``"eigen"``.
        decay: of the factors' average.
        clip: of the directions.
        lr: of SGD.
        momentum: of SGD.
    """

    def __init__(
        self, model: nn.Module, setting: Setting, method: str, decay: float, clip: float, lr: float, momentum: float
    ) -> None:
        module = _import("kfac.preconditioner", "kfac-pytorch", setting)
        warnings.filterwarnings(
            "ignore", "Full backward hook is firing"
        )  # the first layer's, whose inputs need no gradient
        self._sgd = torch.optim.SGD(model.parameters(), lr, momentum)
        self._kfac = module.KFACPreconditioner(
            model, damping=1e-2, factor_decay=decay, kl_clip=clip, lr=lr, compute_method=method
        )

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._sgd.zero_grad()

    def step(self) -> None:
        """Precondition, and step."""
        self._kfac.step()
        self._sgd.step()
