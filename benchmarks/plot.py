"""The curves of the demonstration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.cost import Cost
from benchmarks.methods import DEFAULT, METHODS, USUAL
from benchmarks.models import MODELS
from benchmarks.nets import DTYPES
from benchmarks.training import History

# Colours of Okabe and Ito, which all eyes can tell from each other; the defaults are thick.
STYLES: dict[str, dict[str, Any]] = {
    "SGD": {"color": "#999999", "ls": ":"},
    "AdamW": {"color": "#000000", "ls": ":"},
    "KFAC": {"color": "#E69F00", "ls": "--"},
    "IKFAC": {"color": "#CC79A7", "ls": "--"},
    "INGD": {"color": "#D55E00", "ls": "--"},
    "SINGD diagonal": {"color": "#F0E442"},
    "SINGD block-diagonal": {"color": "#56B4E9"},
    "SINGD hierarchical": {"color": "#0072B2"},
    "SINGD Toeplitz": {"color": "#009E73"},
    USUAL: {"color": "#000000", "lw": 2.5},
    DEFAULT: {"color": "#D55E00", "lw": 2.5},
}
SMOOTHING = 15  # steps


def curves(path: Path, costs: Mapping[Any, Cost], runs: Mapping[Any, Sequence[History]]) -> None:
    """Loss and accuracy against steps, accuracy against time; a row per model and precision."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        rows = [(model, precision) for model in MODELS for precision in DTYPES]
        figure = Figure(figsize=(12, 2.7 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 3, squeeze=False)
        for row, (model, precision) in zip(axes, rows, strict=True):
            for name in METHODS:
                if (cell := (model, precision, name)) in runs:
                    draw(row, name, runs[cell], costs[cell])
            label(row, f"{model}, {precision}")
        for ax, text in zip(axes[-1], ("step", "step", "seconds (one core)"), strict=True):
            ax.set_xlabel(text)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=90)


def draw(row: Sequence[Any], name: str, histories: Sequence[History], cost: Cost) -> None:
    """One method: means over seeds."""
    losses = np.mean([h.losses for h in histories], 0)
    window = min(SMOOTHING, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    steps, accuracies = histories[0].steps, np.mean([h.accuracies for h in histories], 0)
    seconds = np.array(steps) * cost.milliseconds / 1e3
    style = {"lw": 1.3, **STYLES[name], "label": name}
    row[0].plot(np.arange(window, len(losses) + 1), smooth, **style)
    row[1].plot(steps, accuracies, **style)
    row[2].plot(seconds, accuracies, **style)


def label(row: Sequence[Any], title: str) -> None:
    row[0].set(ylabel=f"{title}\n\ntraining loss", yscale="log")
    for ax in row[1:]:
        ax.set(ylabel="test accuracy")
        best = max((max(line.get_ydata()) for line in ax.lines), default=1.0)
        worst = np.median([line.get_ydata()[0] for line in ax.lines])
        ax.set_ylim(max(0.0, worst - 0.1), min(1.0, best + 0.02))
    for ax in row:
        ax.grid(alpha=0.25)
