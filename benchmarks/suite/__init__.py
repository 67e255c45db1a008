"""Nineteen small training scripts of the kinds that people have, on data that ships in packages.

Half of them are for choosing defaults, the others for reporting alone: ``Task.part`` says which.
"""

from __future__ import annotations

from benchmarks.suite import autoencoders, language, science, vision
from benchmarks.suite.task import Task, train

TASKS: dict[str, Task] = {
    **language.TASKS,
    **vision.TASKS,
    **autoencoders.TASKS,
    **science.TASKS,
}

__all__ = ["TASKS", "Task", "train"]
