"""A kit that tests anybody's block structure, partition or recipe, in one line of their own tests."""

try:
    import hypothesis  # noqa: F401
except ImportError:
    raise ImportError("the kit draws its examples with hypothesis: pip install 'curvlib[test]'") from None

from .kit import check_block, check_partition, check_recipe
from .properties import PropertyFailed

__all__ = ["PropertyFailed", "check_block", "check_partition", "check_recipe"]
