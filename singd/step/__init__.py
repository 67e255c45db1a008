"""A step: from statistics and gradients to factors and parameters, whole or not at all."""
