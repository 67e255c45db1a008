"""The section on GPUs of the page on performance, from ``benchmarks/results/<gpu>/``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TITLES = {
    "machine": "Ceilings",
    "sync": "Waits and graphs",
    "kernels": "Kernels against plain PyTorch",
    "dense": "The dense path",
    "vgg16": "VGG-16, batch 128",
    "vit-b16": "ViT-B/16, batch 64",
    "gpt2": "GPT-2 small, 8 x 1024 tokens",
    "gpt2-medium": "GPT-2 medium, 4 x 1024 tokens",
}
NONE = """\
No: so far nothing of this library has run on a GPU, neither a kernel nor a step in plain PyTorch,
and nothing was timed there. Without one,

- every kernel is compared with its reference under Triton's interpreter, in float32, bfloat16 and
  float16, and whole training steps are taken with them;
- every kernel is compiled for Hopper (sm_90), and its assembly has the instructions it should;
- steps of all structures run on PyTorch's fake tensors as on CUDA: none mixes devices or waits;
- steps are recorded and replayed by an imitation of a CUDA graph.

That shows neither races nor speed, nor what a compiler or a driver does otherwise. `make gpu` runs
the tests on a GPU and measures it, in nine minutes.
"""


def section(results: Path = RESULTS) -> str:
    """A table for each part that was measured, for each GPU; what was not is said."""
    reports = sorted(results.glob("*/report.json"))
    return "\n".join(one_gpu(report) for report in reports) if reports else NONE


def name(report: Path) -> str:
    """The name of the GPU of a report."""
    found: str = json.loads(report.read_text())["machine"].get("gpu", report.parent.name)
    return found


def one_gpu(report: Path) -> str:
    """Markdown for one directory of results."""
    found = json.loads(report.read_text())
    machine = found["machine"]
    lines = [f"### {name(report)}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in machine.items() if k != "gpu") + ".", ""]
    for part, title in TITLES.items():
        status = found["parts"].get(part, {"status": "not run"})["status"]
        table = report.with_name(f"{part}.csv")
        lines += [f"**{title}**" + ("" if status == "done" else f": {status}"), ""]
        if status == "done" and table.exists():
            with table.open(newline="") as file:
                lines += [*rows(list(csv.reader(file))), ""]
    return "\n".join(lines) + "\n"


def rows(cells: list[list[str]]) -> list[str]:
    """A Markdown table."""
    head, *body = (["\\|".join(cell.split("|")) for cell in row] for row in cells)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
