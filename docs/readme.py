"""What the README takes from results and code: its numbers, its table and its small pictures.

They are written by ``python -m docs._generate``, and a test keeps them up to date.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

from docs import gpu, pictures, steps, suite
from structured import parse

SMALL = Path(__file__).parent / "_static" / "small"
MODEL, EVERY = "gpt", "10"  # the model that is timed, and the steps between two updates

# The structure, what is drawn of it, its name in the results, and when to take it.
ROWS = {
    "dense": ("dense", "singd:dense", "small layers; nothing of the curvature is left out"),
    "diagonal": ("diagonal", "singd:diagonal", "memory is short, layers are wide"),
    "block_diagonal(30)": (
        "block_diagonal(3)",
        "singd:block30diagonal",
        "neighbouring units act together, such as those of a head",
    ),
    "hierarchical(15, 15)": (
        "hierarchical(2, 3)",
        "singd:hierarchical15_15",
        "a few units act together with all others",
    ),
    "lower_toeplitz": ("lower_toeplitz", "singd:triltoeplitz", "inputs are signals or sequences"),
    "block_upper(dense, diagonal, 30)": (
        "block_upper(dense, diagonal, 3)",
        "",
        "you know what acts together: nest structures, or write your own",
    ),
}


def picture(spec: str, n: int = 12, cell: float = 5) -> str:
    """One structure, small."""
    body = [pictures.cells(parse(spec), n, 0, 0, cell)]
    return pictures.document(n * cell - 1, n * cell - 1, body, spec)


def images() -> dict[Path, str]:
    """The small pictures by their files."""
    drawn = (row[0] for row in ROWS.values())
    return {SMALL / f"{spec.split('(')[0]}.svg": picture(spec) for spec in drawn}


def memory(method: str) -> float:
    """Bytes of the state over those of AdamW."""
    state = {row["method"]: int(row["state"]) for row in results("memory.csv")}
    return state[method] / state["adamw"]


def step_time(method: str) -> float:
    """Time of a step over that of SGD."""
    times = [row for row in results("step.csv") if row["T"] == EVERY]
    return next(float(row["over SGD"]) for row in times if row["method"] == method)


def results(name: str) -> list[steps.Row]:
    """The rows of a file of results about the model that is shown, in float32."""
    return [row for row in steps.read(name) if row["model"] == MODEL]


def table() -> str:
    """Structure, picture, memory, step time, and when to take it."""
    lines = [
        "| structure | n = 12 | memory | step | take it when |",
        "| --- | --- | --: | --: | --- |",
    ]
    for spec, (drawn, method, when) in ROWS.items():
        image = f"![](docs/_static/small/{drawn.split('(')[0]}.svg)"
        cells = (f"{memory(method):.1f}", f"{step_time(method):.2f}") if method else ("", "")
        lines.append(f"| `{spec}` | {image} | {cells[0]} | {cells[1]} | {when} |")
    return "\n".join(lines)


def why(results: list[suite.Result]) -> str:
    """Three reasons with a number each, from the committed results."""
    with (steps.RESULTS / "demo.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "SINGD(model)"]
    low, full = (
        mean(
            float(row["accuracy"])
            for row in rows
            if row["model"] == "CNN" and row["precision"] == precision
        )
        for precision in ("bf16", "fp32")
    )
    tuned = (
        "- **Nothing to tune.** With nothing set, the test loss is at most that of AdamW at the "
        f"best of five rates on {suite.wins(results)} tasks of a few hundred steps.\n"
    )
    return (tuned if results else "") + (
        "- **No matrix is inverted.** So it trains in bfloat16, where a small CNN comes within "
        f"{abs(full - low):.3f} of its accuracy in float32.\n"
        "- **Structures are yours to choose, and to define.** Diagonal factors take "
        f"{memory('singd:diagonal'):.1f} times AdamW's bytes; a class with two methods is a new "
        "structure, and every optimizer here takes it."
    )


def gpus() -> str:
    """Which GPUs the kernels have run on."""
    found = sorted(gpu.RESULTS.glob("*/report.json"))
    if not found:
        return (
            "Nothing has run on a GPU yet, neither kernels nor steps: they are tested under "
            "Triton's interpreter and on\nfake tensors. There every kernel is checked at its first "
            "use, and PyTorch takes the place of one that fails\n"
            "([more](docs/performance.md#has-it-run-on-a-gpu))."
        )
    names = ", ".join(gpu.name(report) for report in found)
    return f"The kernels were tested and timed on: {names}."
