"""Trained factors as a product: roots of the inverse curvature, for what comes after training.

:func:`singd.export` takes them from an optimizer, :func:`calibrate` finds what they are of the
curvature.
"""

from singd.factors.calibration import calibrate
from singd.factors.export import export
from singd.factors.posterior import Posterior, Predictive, posterior
from singd.factors.records import Calibration, KroneckerFactors, WeightFactors

__all__ = [
    "Calibration",
    "KroneckerFactors",
    "Posterior",
    "Predictive",
    "WeightFactors",
    "calibrate",
    "export",
    "posterior",
]
