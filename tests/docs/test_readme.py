"""The picture and the table of the README are those of the code: ``python -m docs._generate``."""

from __future__ import annotations

from docs import _generate, pictures


def test_the_picture_shows_every_structure() -> None:
    assert _generate.OVERVIEW.read_text() == pictures.overview()


def test_the_table_of_costs_is_what_is_counted() -> None:
    assert _generate.README.read_text() == _generate.readme()
