"""A pytest plugin that registers the subject with timm, as the optimizer ``subject``."""

from __future__ import annotations

from subject import subject
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

default_registry.register(OptimInfo(name="subject", opt_class=subject(), has_eps=False, has_betas=False))
