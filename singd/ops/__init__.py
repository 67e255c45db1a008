"""Numerical operations of a step, each with its reference implementation."""
