"""Benchmarks that run themselves again, method by method: PyPI ``singd`` has the name of ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def command(module: str, *arguments: str) -> list[str]:
    """Run a module of the benchmarks as a worker."""
    python = [sys.executable, "-P", "-W", "ignore"]
    return [*python, "-m", f"benchmarks.{module}", "--worker", *arguments]


def environment(peer: Path | None, **variables: str) -> dict[str, str]:
    """Where it finds its packages: ``singd`` in ``peer``, if that is given, else ours."""
    places = [] if peer is None else [str(peer.resolve())]
    places += [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), **variables}
