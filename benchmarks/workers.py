"""Benchmarks that run themselves again, method by method: PyPI ``singd`` has the name of ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The C library keeps what is freed, as other allocators do. By default it returns large pieces to
# the system, or not, by what was freed before: page faults of the model, a tenth of a step, would
# come and go with the method. And every thread stays on a core: two on one wait for each other.
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "OMP_PROC_BIND": "true",
}


def command(module: str, *arguments: str) -> list[str]:
    """Run a module of the benchmarks as a worker."""
    python = [sys.executable, "-P", "-W", "ignore"]
    return [*python, "-m", f"benchmarks.{module}", "--worker", *arguments]


def restart(module: str) -> None:
    """Run a module of the benchmarks anew from the start under :data:`SETTINGS`."""
    if not SETTINGS.keys() <= os.environ.keys():
        arguments = [sys.executable, "-m", f"benchmarks.{module}", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **SETTINGS})


def environment(peer: Path | None, **variables: str) -> dict[str, str]:
    """:data:`SETTINGS`, and where a worker finds ``singd``: in ``peer``, if given, else ours."""
    places = [] if peer is None else [str(peer.resolve())]
    places += [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **SETTINGS, "PYTHONPATH": os.pathsep.join(places), **variables}
