"""Times and memory of whole steps as tables: a line for each method, a column for each case."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

NOISE = 0.05  # of a step of SGD; what is less is not told from nothing

Row = dict[str, str]
Cells = Mapping[str, Mapping[str, str]]  # by method and case


def read(name: str, dtype: str = "fp32") -> list[Row]:
    """The rows of a file of results."""
    with (RESULTS / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["dtype"] == dtype]


def table(head: str, cells: Cells, cases: Iterable[str]) -> str:
    """Markdown."""
    cases = list(cases)
    lines = [[head, *cases], ["---", *["--:"] * len(cases)]]
    lines += [[f"`{name}`", *(own.get(case, "") for case in cases)] for name, own in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_processor(write: Callable[[list[Row]], str], name: str, dtype: str = "fp32") -> str:
    """What is written of the rows of each processor, below its name."""
    found: dict[str, list[Row]] = {}
    for row in read(name, dtype):
        found.setdefault(row["processor"], []).append(row)
    parts = [f"*{processor}*\n\n{write(rows)}" for processor, rows in found.items()]
    return "\n\n".join(parts)


def times(rows: list[Row]) -> str:
    """Times over SGD's; in brackets the overhead over PyPI's, where that is more than noise."""
    over = {(row["model"], row["T"], row["method"]): float(row["over SGD"]) for row in rows}
    cells: dict[str, dict[str, str]] = {}
    cases: dict[str, None] = {}
    for row in rows:
        case = f"{row['model'].upper()}, T = {row['T']}"
        cases[case] = None
        peers = over.get((row["model"], row["T"], f"PyPI {row['method']}"), 1.0) - 1.0
        ratio = f" ({float(row['ratio']):.2f})" if row["ratio"] and peers >= NOISE else ""
        cells.setdefault(row["method"], {})[case] = f"{float(row['over SGD']):.2f}{ratio}"
    models = list(dict.fromkeys(case.split(",")[0] for case in cases))
    return table("method", cells, sorted(cases, key=lambda case: models.index(case.split(",")[0])))


def states() -> str:
    """Bytes of the state over AdamW's."""
    rows = read("memory.csv")
    adamw = {row["model"]: int(row["state"]) for row in rows if row["method"] == "adamw"}
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        share = int(row["state"]) / adamw[row["model"]]
        cells.setdefault(row["method"], {})[row["model"].upper()] = f"{share:.3f}"
    return table("method", cells, [model.upper() for model in adamw])


def peaks() -> str:
    """Extra peak memory in MB; in brackets what is promised."""
    cells: dict[str, dict[str, str]] = {}
    cases: dict[str, None] = {}
    for row in read("memory.csv"):
        case = row["model"].upper()
        limit = f" ({int(row['limit']) / 1e6:.1f})" if row["limit"] else ""
        if row["method"] == "sgd":
            peak = max(int(row["backward"]), int(row["step"]))
            cases[case] = None
            cells.setdefault("sgd: its peak", {})[case] = f"{peak / 1e6:.1f}"
        else:
            cells.setdefault(row["method"], {})[case] = f"{int(row['extra']) / 1e6:.1f}{limit}"
    return table("method", cells, cases)


def parts(rows: list[Row], T: int) -> str:
    """Milliseconds of a step, part by part."""
    return by_part(rows, f"T = {T}, ms", T, lambda row: f"{float(row['ms']):.2f}")


def predictions(rows: list[Row], T: int = 1) -> str:
    """Measured time over predicted time, part by part; parts below 0.1 ms are left out."""

    def cell(row: Row) -> str:
        if float(row["ms"]) < 0.1:
            return ""
        ratio = float(row["ms"]) / float(row["predicted ms"])
        return f"{ratio:.1f} ({float(row['flops']) / 1e6:.0f}, {float(row['bytes']) / 1e6:.0f})"

    return by_part(rows, f"T = {T}", T, cell)


def by_part(rows: list[Row], head: str, T: int, cell: Callable[[Row], str]) -> str:
    """A line for each model and method, a column for each part of a step."""
    cells: dict[str, dict[str, str]] = {}
    parts: dict[str, None] = {}
    for row in rows:
        parts[row["part"]] = None
        if row["T"] == str(T):
            name = f"{row['model'].upper()}, {row['method'].removeprefix('singd:')}"
            cells.setdefault(name, {})[row["part"]] = cell(row)
    return table(head, cells, parts)


def launches() -> str:
    """Operators of statistics, of a step with an update, and of one without."""
    cells: dict[str, dict[str, str]] = {}
    cases: dict[str, None] = {}
    for row in read("launches.csv", "bf16"):
        case = row["model"].upper()
        cases[case] = None
        numbers = (row[name] for name in ("statistics", "step with update", "plain step"))
        cells.setdefault(row["method"], {})[case] = ", ".join(numbers)
    return table("method", cells, cases)


def pages() -> dict[str, str]:
    """What the pages include, by name."""
    return {
        "step": by_processor(times, "step.csv"),
        "launches": launches(),
        "step_bf16": by_processor(times, "step.csv", "bf16"),
        "memory_state": states(),
        "memory_peak": peaks(),
        "breakdown_10": by_processor(lambda rows: parts(rows, 10), "breakdown.csv"),
        "breakdown_1": by_processor(lambda rows: parts(rows, 1), "breakdown.csv"),
        "cost_model": by_processor(predictions, "breakdown.csv"),
    }
