"""Trained factors as a product: roots of the inverse curvature, for what comes after training.

:func:`singd.export` takes them from an optimizer, :func:`calibrate` finds what they are of the
curvature. Then they are a :func:`posterior` over weights, say which weights and samples matter, and
what other tasks must leave as it is.
"""

from singd.factors.calibration import calibrate
from singd.factors.export import export
from singd.factors.influence import influence
from singd.factors.merging import ewc, merge
from singd.factors.posterior import Posterior, Predictive, posterior
from singd.factors.pruning import keep, prune, row_scores, weight_scores
from singd.factors.records import Calibration, KroneckerFactors, WeightFactors

__all__ = [
    "Calibration",
    "KroneckerFactors",
    "Posterior",
    "Predictive",
    "WeightFactors",
    "calibrate",
    "ewc",
    "export",
    "influence",
    "keep",
    "merge",
    "posterior",
    "prune",
    "row_scores",
    "weight_scores",
]
