"""The section on GPUs shows what was measured, and says what was not."""

from __future__ import annotations

import json
from pathlib import Path

from docs import gpu


def test_without_results(tmp_path: Path) -> None:
    assert gpu.section(tmp_path) == gpu.NONE


def test_with_results(tmp_path: Path) -> None:
    out = tmp_path / "some-gpu"
    out.mkdir()
    parts = {"dense": {"status": "done"}, "gpt2": {"status": "left out: 3 s left"}}
    report = {"machine": {"gpu": "Some GPU", "torch": "2.11"}, "parts": parts}
    (out / "report.json").write_text(json.dumps(report))
    (out / "dense.csv").write_text("operation,us\nA | B,7\n")
    text = gpu.section(tmp_path)
    assert text.startswith("### Some GPU\n\ntorch 2.11.\n")
    assert "**The dense path**\n\n| operation | us |\n| --- | --- |\n| A \\| B | 7 |\n" in text
    assert "tokens**: left out: 3 s left" in text
    assert "**VGG-16, batch 128**: not run" in text
