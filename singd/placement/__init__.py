"""Placements: which ranks hold what. Nothing else in the package knows of ranks."""

from singd.placement.base import Holding, Placement, Slot
from singd.placement.find import find_placement, unwrapped
from singd.placement.replicated import DataParallel, OneProcess

__all__ = [
    "DataParallel",
    "Holding",
    "OneProcess",
    "Placement",
    "Slot",
    "find_placement",
    "unwrapped",
]
