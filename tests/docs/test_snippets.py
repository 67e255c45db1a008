"""What the README and the documentation show is what happens."""

from __future__ import annotations

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
WARNINGS = {  # of the frameworks themselves
    "frameworks.md": [
        "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
        "ignore:.*treespec.*:FutureWarning",
        "ignore:.*is_gradient_checkpointing:FutureWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
    ]
}


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
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[*map(pytest.mark.filterwarnings, WARNINGS.get(p.name, []))])
        for p in PAGES
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_snippet_of_a_page_runs(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        snippets.run(page)
