"""The laws on many random cases: ``python -m tests.laws --examples 100000``.

Draws afresh on every run, unlike the tests: every built-in structure, those known by ``to_dense``
alone and random nestings of all. Failures are printed as they come; the exit status is their
number, at most 1. What was drawn is counted, and printed at the end.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import torch
from hypothesis import settings

from structured.testing import LAWS, check
from tests.structured.algebras import ALGEBRAS
from tests.structured.specs import FURTHER, NESTINGS, SPECS
from tests.structured.test_families import SPECS as DEEP

STRUCTURES: dict[str, tuple[Any, Any]] = {
    **{spec: (spec, sizes) for spec, sizes in (SPECS | FURTHER).items()},
    **{
        f"{algebra.__name__} (to_dense alone)": (algebra, ALGEBRAS[algebra]) for algebra in ALGEBRAS
    },
    **{spec: (spec, (0, 12)) for spec in DEEP if isinstance(spec, str) and spec not in SPECS},
    "random nestings": (NESTINGS, range(13)),
}
SHARE = 10  # random nestings get as many cases as ten structures
FEW = {
    "compiled": 3,
    "dynamic": 3,
    "spec": 100,
}  # cases at most: one takes seconds, one asks for a name


class Census:
    """What was drawn."""

    def __init__(self) -> None:
        self.laws: collections.Counter[str] = collections.Counter()
        self.batch_shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
        self.dtypes: collections.Counter[torch.dtype] = collections.Counter()
        self.drawn: set[str] = set()

    def counted(self, law: Callable[..., None]) -> Callable[..., None]:
        """The law, counting each case that it is asked about."""

        @functools.wraps(law)
        def wrapper(**case: Any) -> None:
            self.laws[law.__name__] += 1
            for name in ("A", "K", "operands"):
                if name in case:
                    member = case[name].A if name == "operands" else case[name]
                    self.batch_shapes[tuple(member.batch_shape)] += 1
                    break
            if "dtype" in case:
                self.dtypes[case["dtype"]] += 1
            elif law.__name__ == "precision":
                self.dtypes.update((torch.float32, torch.bfloat16, torch.float16))
            elif "structure" not in case or len(case) > 1:
                self.dtypes[torch.float64] += 1
            if "structure" in case:
                self.drawn.add(str(case["structure"]))
            law(**case)

        return wrapper


def run(names: list[str], laws: list[str], examples: int, census: Census) -> int:
    """Check the laws on at least so many cases in all; the number of failures."""
    shares = {name: SHARE if name == "random nestings" else 1 for name in names}
    drawn = [law for law in laws if law not in FEW]
    each = examples / sum(shares.values()) / max(1, len(drawn))
    failures, start = 0, time.monotonic()
    with mock.patch("structured.testing.LAWS", {k: census.counted(LAWS[k]) for k in laws}):
        for number, name in enumerate(names, 1):
            structure, sizes = STRUCTURES[name]
            count = math.ceil(shares[name] * each)
            for law in laws:
                most = min(count, FEW.get(law, count))
                try:
                    check(structure, laws=[law], sizes=sizes, examples=most)
                except AssertionError as error:
                    failures += 1
                    print(error, flush=True)
            elapsed = time.monotonic() - start
            print(f"[{number}/{len(names)}] {name}: {elapsed:.0f} s", flush=True)
    return failures


def summary(names: list[str], census: Census, failures: int, seconds: float) -> str:
    def listed(counts: collections.Counter[Any]) -> str:
        return ", ".join(f"{key} {count:,}" for key, count in counts.most_common())

    total = sum(census.laws.values())
    lines = [
        f"{total:,} cases of {len(census.laws)} laws, {failures} failed, {seconds:.0f} s",
        f"structures: {len(names)}; distinct nestings among the cases: {len(census.drawn):,}",
        f"batch shapes: {listed(census.batch_shapes)}",
        f"dtypes: {listed(census.dtypes)}".replace("torch.", ""),
        f"laws: {listed(census.laws)}",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Hypothesis {hypothesis.__version__}",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000, help="cases in all, at least")
    parser.add_argument("--structure", nargs="+", default=[*STRUCTURES], choices=STRUCTURES)
    parser.add_argument("--law", nargs="+", default=[*LAWS], choices=LAWS)
    parser.add_argument("--record", type=Path, help="a file for the summary")
    options = parser.parse_args()
    settings.register_profile("afresh", derandomize=False, database=None, deadline=None)
    settings.load_profile("afresh")
    torch.set_num_threads(1)

    census, start = Census(), time.monotonic()
    failures = run(options.structure, options.law, options.examples, census)
    text = summary(options.structure, census, failures, time.monotonic() - start)
    print(text)
    if options.record:
        options.record.write_text(text + "\n")
    return min(failures, 1)


if __name__ == "__main__":
    raise SystemExit(main())
