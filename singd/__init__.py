"""Structured inverse-free natural gradient descent for PyTorch.

:class:`SINGD` trains any model; :class:`KFAC` is the baseline it improves on, and
:class:`KLShampoo` and :class:`SOAP` need gradients alone. A second-order method of your own is a
:class:`Method` in a :class:`KroneckerOptimizer`, a type of layer a :class:`Layer`.
The paper's step as pure functions is in :mod:`singd.update`.
"""

from importlib.metadata import version

from singd.choice import choose_structures
from singd.factors import export
from singd.kfac import KFAC
from singd.layers import Layer, register_layer
from singd.methods import Averages, Factors, Method
from singd.optimizer import KroneckerOptimizer
from singd.shampoo import KLShampoo
from singd.singd import SINGD
from singd.soap import SOAP

__version__ = version("structured-singd")

__all__ = [
    "KFAC",
    "SINGD",
    "SOAP",
    "Averages",
    "Factors",
    "KLShampoo",
    "KroneckerOptimizer",
    "Layer",
    "Method",
    "__version__",
    "choose_structures",
    "export",
    "register_layer",
]
