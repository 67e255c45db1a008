"""Benchmarks that run themselves again, method by method: PyPI ``singd`` has the name of ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The C library keeps what is freed, as other allocators do. By default it returns large pieces to
# the system, or not, by what was freed before: page faults of the model, a tenth of a step, would
# come and go with the method.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def command(module: str, *arguments: str) -> list[str]:
    """Run a module of the benchmarks as a worker."""
    python = [sys.executable, "-P", "-W", "ignore"]
    return [*python, "-m", f"benchmarks.{module}", "--worker", *arguments]


def keep_memory(module: str) -> None:
    """Run a module of the benchmarks anew from the start such that freed memory is kept."""
    if not KEEPING.keys() <= os.environ.keys():
        arguments = [sys.executable, "-m", f"benchmarks.{module}", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **KEEPING})


def environment(peer: Path | None, **variables: str) -> dict[str, str]:
    """Where it finds its packages: ``singd`` in ``peer``, if that is given, else ours.

    Freed memory is kept for reuse, and every thread stays on a core of its own: two on one core
    wait for each other.
    """
    places = [] if peer is None else [str(peer.resolve())]
    places += [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **KEEPING,
        "OMP_PROC_BIND": "true",
        "PYTHONPATH": os.pathsep.join(places),
        **variables,
    }
