"""Tables of costs on many GPUs, from results of ``benchmarks.scale`` and ``benchmarks.sample``."""

from __future__ import annotations

import csv
from pathlib import Path

from docs.steps import table

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
Row = dict[str, str]


def read(name: str) -> list[Row]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def size(megabytes: str) -> str:
    """``1.9 GB``."""
    number = float(megabytes)
    if number < 1000:
        return f"{number:.3g} MB"
    return f"{number / 1e3:.3g} GB" if number < 1e6 else f"{number / 1e6:.3g} TB"


def percent(text: str) -> str:
    """``0.32 %``."""
    number = float(text.rstrip("%"))
    return f"{number:.2g} %" if number < 100 else f"{number:.0f} %"


def calculated() -> str:
    """State, buffers and time by method and setting."""
    cells: dict[str, dict[str, str]] = {}
    for row in read("scale.csv"):
        case = f"{row['model']} on {row['gpus']}"
        state, buffers = size(row["state MB"]), size(row["buffers MB"])
        held = f"{state} + {buffers}" if float(row["buffers MB"]) else state
        cells.setdefault(row["method"], {})[case] = f"{held}, {percent(row['of a step'])}"
    return table("method", cells, next(iter(cells.values())))


def traffic() -> str:
    """Bytes sent over FSDP2's own, and the places."""
    cells: dict[str, dict[str, str]] = {}
    for row in read("scale.csv"):
        if row["method"].startswith("SINGD") or row["method"] == "Muon":
            case = f"{row['model']} on {row['gpus']}"
            share = percent(row["sent, of FSDP2's"])
            place = row["places"].split(" ")[0] or "owned"
            cells.setdefault(row["method"], {})[case] = f"{share}, {place}"
    return table("method", cells, next(iter(cells.values())))


def checked() -> str:
    """Measured over predicted."""
    cells = {}
    for row in read("scale_check.csv"):
        name = row["K"] if not row["C"] else f"{row['K']}, {row['C']}; {row['place']}"
        cells[name] = {
            kind: row[f"{kind}, over predicted"]
            for kind in ("state", "buffers", "sent", "products")
        }
    return table("method; place", cells, next(iter(cells.values())))


def sampled() -> str:
    """Test losses and times with statistics of a share of the rows."""
    rows = read("sample.csv")
    cells = {row["sample"]: {k: v for k, v in row.items() if k != "sample"} for row in rows}
    return table("sample", cells, next(iter(cells.values())))


def pages() -> dict[str, str]:
    """Every table by the name of its file."""
    makers = (calculated, traffic, checked, sampled)
    return {f"scale_{make.__name__}": make() for make in makers}
