"""Placements: which ranks hold what. Nothing else in the package knows of ranks."""

from singd.placement.base import Placement, Statistics, Work
from singd.placement.find import find_placement, unwrapped
from singd.placement.holding import Holding, Kept, Slot
from singd.placement.places import Demand
from singd.placement.replicated import DataParallel, OneProcess

__all__ = [
    "DataParallel",
    "Demand",
    "Holding",
    "Kept",
    "OneProcess",
    "Placement",
    "Slot",
    "Statistics",
    "Work",
    "find_placement",
    "unwrapped",
]
