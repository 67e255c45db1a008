"""How types of modules are read as matrix products."""

from singd.layers.base import Layer
from singd.layers.registry import LAYERS, OPTIONAL, find_layer, find_products, register_layer

__all__ = ["LAYERS", "OPTIONAL", "Layer", "find_layer", "find_products", "register_layer"]
