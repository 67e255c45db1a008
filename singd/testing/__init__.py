"""Checks for classes of your own: layers, methods, and optimizers."""

from singd.testing.conformance import ROWS, check_optimizer
from singd.testing.layers import check_layer
from singd.testing.methods import LAWS, check_method
from singd.testing.sharded import SHARDED_ROWS, check_sharded

__all__ = [
    "LAWS",
    "ROWS",
    "SHARDED_ROWS",
    "check_layer",
    "check_method",
    "check_optimizer",
    "check_sharded",
]
