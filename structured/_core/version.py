"""The version of the distribution; it is written down in ``pyproject.toml`` alone."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "structured-singd"


def version() -> str:
    """That of the checkout this file lies in, or of the installed distribution.

    A checkout comes first: another version may be installed beside it.
    """
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        content = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if content.get("name") == DISTRIBUTION:
            return str(content["version"])
    return metadata.version(DISTRIBUTION)
