"""What the README and the documentation show is what happens."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from docs import snippets

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(
    ROOT / "docs" / "singd" / "sharded.md"
)  # which needs ranks: tests/sharded/test_recipes.py
PAGES = [page for page in PAGES if "```python" in page.read_text() and "_build" not in page.parts]
RANKS = ROOT / "docs" / "singd" / "frameworks.md"  # a process group, in a process of its own
PAGES.remove(RANKS)
FOREIGN = (  # warnings of the frameworks themselves
    r".*torch\.jit\.script",
    r".*treespec",
    r".*is_gradient_checkpointing",
    r"The \.grad attribute of a Tensor that is not a leaf",
)
LIMIT = 300  # seconds


@pytest.fixture(autouse=True)
def few_examples() -> Iterator[None]:
    """Readers run ``check`` as it is; here a few cases for each law will do."""
    before = settings()
    settings.register_profile("before", before)
    settings.register_profile("snippets", before, max_examples=3)
    settings.load_profile("snippets")
    yield
    settings.load_profile("before")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a page is one process
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_snippet_of_a_page_runs(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        snippets.run(page)


def test_every_snippet_of_the_frameworks_runs(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=run_alone, args=(RANKS, tmp_path))
    child.start()
    child.join(LIMIT + 30)
    child.kill()
    assert child.exitcode == 0  # it printed why


def run_alone(page: Path, folder: Path) -> None:
    """Ends the process; in the middle, with a traceback, if the page takes too long."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        with warnings.catch_warnings(action="error"):
            for message in FOREIGN:
                warnings.filterwarnings("ignore", message)
            warnings.filterwarnings("ignore", module="lightning")
            snippets.run(page)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # process groups do not always end by themselves
