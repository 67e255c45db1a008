"""Benchmarks: the demonstration (:mod:`benchmarks.demo`), and measurements."""
