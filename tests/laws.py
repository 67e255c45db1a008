"""The laws on many random cases: ``python -m tests.laws --examples 100000``.

Draws afresh on every run, unlike the tests. Failures are printed as they come; the exit status
is their number, at most 1.
"""

from __future__ import annotations

import argparse
import time

import torch
from hypothesis import settings

from structured.testing import LAWS, check
from tests.structured.specs import NESTINGS, SPECS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="cases for each structure")
    parser.add_argument("--structure", nargs="*", default=[*SPECS, "nestings"])
    parser.add_argument("--law", nargs="*", default=list(LAWS), choices=LAWS)
    options = parser.parse_args()
    settings.register_profile("afresh", derandomize=False, database=None, deadline=None)
    settings.load_profile("afresh")
    torch.set_num_threads(1)

    each = max(1, options.examples // len(options.law))
    failures = total = 0
    start = time.monotonic()
    for number, name in enumerate(options.structure, 1):
        structure, sizes = (NESTINGS, range(13)) if name == "nestings" else (name, SPECS[name])
        for law in options.law:
            examples = min(each, 3) if law == "compiled" else each
            total += examples
            try:
                check(structure, laws=[law], sizes=sizes, examples=examples)
            except AssertionError as error:
                failures += 1
                print(error, flush=True)
        elapsed = time.monotonic() - start
        print(f"[{number}/{len(options.structure)}] {name}: {elapsed:.0f} s", flush=True)
    print(
        f"{len(options.law)} laws, {len(options.structure)} structures, about {total} cases: "
        f"{failures} failed"
    )
    return min(failures, 1)


if __name__ == "__main__":
    raise SystemExit(main())
