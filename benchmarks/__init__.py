"""Benchmarks: the demonstration (:mod:`benchmarks.demo`) and the sweep that chose its settings."""
