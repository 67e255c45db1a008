"""Placements: which ranks hold what. Nothing else in the package knows of ranks."""

from singd.placement.base import Placement
from singd.placement.replicated import DataParallel, OneProcess, find_placement

__all__ = ["DataParallel", "OneProcess", "Placement", "find_placement"]
