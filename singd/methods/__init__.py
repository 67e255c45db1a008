"""Methods: from statistics to factors, and from factors to a direction."""

from singd.methods.base import Averages, Factors, Method

__all__ = ["Averages", "Factors", "Method"]
