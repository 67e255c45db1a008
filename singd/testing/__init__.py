"""Checks for classes of your own: layers, and optimizers."""

from singd.testing.conformance import ROWS, check_optimizer
from singd.testing.layers import check_layer

__all__ = ["ROWS", "check_layer", "check_optimizer"]
