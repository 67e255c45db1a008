"""Structured inverse-free natural gradient descent for PyTorch.

:class:`SINGD` trains any model; :class:`KFAC` is the baseline it improves on. The update rules as
pure functions are in :mod:`singd.update`, the supported layers in :mod:`singd.layers`.
"""

from singd._layer import Layer
from singd.kfac import KFAC
from singd.layers import register_layer
from singd.optimizer import SINGD

__all__ = ["KFAC", "SINGD", "Layer", "register_layer"]
