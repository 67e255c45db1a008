"""How many faults in ``structured/`` the tests see: ``python -m tests.mutants --sample 20``.

A mutant is the package with one small fault; it is killed if a test fails or takes too long. The
tests are those of ``tests/structured``, with fewer examples for each law, and those of its kernels,
which Triton interprets. They first run once without a fault, which says how long each takes and
which lines it reaches. A mutant then runs, in a fork of a process that has PyTorch imported, the
tests that reach its statement, the quickest of each kind first, until one fails. What only a GPU
runs survives, and is listed. Not mutated: annotations, docstrings, messages of errors,
``__repr__``, decorators, and the kit that states the laws (``tests/structured/test_broken`` is what
watches the watchmen).

Results go to ``build/mutants.csv``; killed mutants are not run again while their module is the
same. ``tests/mutants_survivors.csv`` lists the harmless ones, each with its reason, and
``tests/mutants_results.csv`` is the record of a whole run. The exit status is 1 if fewer than 90 %
of the others are killed, one survives that is not listed, or one is listed that does not survive.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

from tests.mutants.faults import PACKAGE, Mutant, module_of, mutants, path_of
from tests.mutants.selection import FILES, TESTS, Line, Test, choose, failing, warm, watch

ROOT = PACKAGE.parent
RESULTS = ROOT / "build" / "mutants.csv"
REACH = ROOT / "build" / "mutants_reach.pickle"
HARMLESS = ROOT / "tests" / "mutants_survivors.csv"
KIT = "testing"  # the laws themselves
RECORD = ROOT / "tests" / "mutants_results.csv"
COLUMNS = ("killed", "harmless", "survived")
ENOUGH = 0.9
FORK = multiprocessing.get_context("fork")

Key = tuple[str, ...]


class Results:
    """Outcomes by mutant, kept in a file as they come."""

    def __init__(self) -> None:
        RESULTS.parent.mkdir(exist_ok=True)
        self.before = {tuple(row[:5]): row[5] for row in read(RESULTS)}
        self.file = RESULTS.open("a", newline="")
        self.harmless = {tuple(row[:4]) for row in read(HARMLESS)[1:]}
        self.outcome: dict[Key, str] = {}

    def known(self, key: Key, source: str) -> bool:
        """Whether the mutant was killed before, with its module as it is."""
        result = self.before.get((*key, source), "")
        if result in ("killed", "timeout") or (result and key in self.harmless):
            self.outcome[key] = result
        return key in self.outcome

    def add(self, key: Key, source: str, result: str, seconds: float, by: str) -> None:
        self.outcome[key] = result
        csv.writer(self.file).writerow([*key, source, result, f"{seconds:.1f}", by])
        self.file.flush()


class Pool:
    """At most ``jobs`` mutants at a time, each in a process of its own."""

    def __init__(self, jobs: int, results: Results, tests: dict[str, Test], bar: Any) -> None:
        self.jobs, self.results, self.tests, self.bar = jobs, results, tests, bar
        self.running: list[tuple[Any, Any, Key, str, float]] = []

    def run(self, mutant: Mutant, chosen: list[str], source: str) -> None:
        self.wait(self.jobs - 1)
        there, here = FORK.Pipe()
        arguments = (there, failing, mutant, chosen, self.tests)
        process = FORK.Process(target=_child, args=arguments)
        process.start()
        there.close()
        self.running.append((process, here, mutant.key, source, time.monotonic()))

    def wait(self, most: int) -> None:
        """Until at most so many run."""
        while len(self.running) > most:
            for entry in list(self.running):
                process, pipe, key, source, start = entry
                if process.is_alive():
                    continue
                process.join()
                by = pipe.recv() if pipe.poll() and not process.exitcode else "crash"
                result = "killed" if by else "survived"
                if process.exitcode == -signal.SIGPROF:
                    result, by = "timeout", ""
                self.results.add(key, source, result, time.monotonic() - start, by)
                self.running.remove(entry)
                self.bar.update()
            time.sleep(0.01)


def _child(pipe: Any, function: Any, *arguments: Any) -> None:
    """Send what the function returns, its output silenced."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pipe.send(function(*arguments))
    os._exit(0)


def reach() -> tuple[dict[str, Test], frozenset[Line]]:
    """What each test reaches, and what an import does; unless known, found in another process.

    Raises:
        SystemExit: If a test fails without a fault, or none runs.
    """
    sources = [*sorted(PACKAGE.rglob("*.py")), *sorted(TESTS.glob("structured/*.py")), *FILES]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    if REACH.exists():
        stored = pickle.loads(REACH.read_bytes())
        if stored[0] == digest:
            return stored[1:]
    there, here = FORK.Pipe()
    process = FORK.Process(target=_child, args=(there, _watched))
    process.start()
    there.close()
    tests, on_import, failed = here.recv()
    process.join()
    if not tests:
        raise SystemExit("no test ran: the tests could not be collected")
    if failed:
        raise SystemExit(f"tests fail without a fault: {', '.join(failed)}")
    REACH.write_bytes(pickle.dumps((digest, tests, on_import)))
    return tests, on_import


def _watched() -> tuple[dict[str, Test], frozenset[Line], list[str]]:
    watching = watch()
    return watching.tests, watching.on_import, watching.failed


def source_of(module: str) -> str:
    return hashlib.sha256(path_of(module).read_bytes()).hexdigest()[:12]


def read(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open())) if path.exists() else []


def main() -> int:
    from tqdm import tqdm

    found = sorted(map(module_of, PACKAGE.rglob("*.py")))
    mutated = [name for name in found if name and name.partition(".")[0] != KIT]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=_positive, help="mutants of each module; all by default")
    parser.add_argument("--modules", nargs="+", choices=mutated, default=mutated, metavar="MODULE")
    parser.add_argument("--jobs", type=_positive, default=2)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    options = parser.parse_args()
    whole = options.sample is None and set(options.modules) == set(mutated)
    if options.record and not whole:
        parser.error("--record: expected a run of all mutants, got a selection")

    results = Results()
    warm()
    tests, on_import = reach()
    sample: dict[str, set[int]] = {}
    for module in options.modules:
        total = sum(1 for _ in mutants(module))
        count = min(options.sample or total, total)
        sample[module] = set(random.Random(module).sample(range(total), count))
    bar = tqdm(total=sum(map(len, sample.values())), unit="mutant", smoothing=0.05)
    pool = Pool(options.jobs, results, tests, bar)
    for module in options.modules:
        source = source_of(module)
        for number, mutant in enumerate(mutants(module)):
            if number not in sample[module]:
                continue
            chosen = choose(mutant, tests, on_import)
            if results.known(mutant.key, source):
                bar.update()
            elif chosen:
                pool.run(mutant, chosen, source)
            else:
                results.add(mutant.key, source, "survived", 0.0, "nothing reaches it")
                bar.update()
    pool.wait(0)
    bar.close()
    stale = [key for key in results.harmless if results.outcome.get(key, "killed") != "survived"]
    for key in stale if whole else ():
        print("listed as harmless, but killed or gone:", *key)
    return report(results.outcome, results.harmless, options.record) or int(whole and bool(stale))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def tally(outcome: dict[Key, str], harmless: set[Key]) -> dict[str, collections.Counter[str]]:
    """For each module how many mutants were killed, are harmless, and survived."""
    by_module: dict[str, collections.Counter[str]] = {}
    for key, result in outcome.items():
        counts = by_module.setdefault(key[0], collections.Counter())
        if result in ("killed", "timeout"):
            counts["killed"] += 1
        else:
            counts["harmless" if key in harmless else "survived"] += 1
    return by_module


def report(outcome: dict[Key, str], harmless: set[Key], record: bool) -> int:
    """Print what became of the mutants; the exit status."""
    by_module = tally(outcome, harmless)
    total = sum(by_module.values(), collections.Counter())
    rows = [
        [name, counts.total(), *(counts[column] for column in COLUMNS)]
        for name, counts in [*by_module.items(), ("all", total)]
    ]
    for row in [["module", "mutants", *COLUMNS], *rows]:
        print("{:26}{:>9}{:>9}{:>10}{:>10}".format(*row))
    for key, result in outcome.items():
        if result == "survived" and key not in harmless:
            print("survived:", *key)
    share = total["killed"] / max(1, total["killed"] + total["survived"])
    print(f"{share:.1%} of those that are not harmless are killed")
    if record:
        with RECORD.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [["module", "mutants", *COLUMNS], *rows]
            )
    return int(bool(total["survived"]) or share < ENOUGH)


if __name__ == "__main__":
    raise SystemExit(main())
