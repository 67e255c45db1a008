"""The pictures, tables and numbers of the README and of the page on evidence are up to date.

``python -m docs._generate`` writes them.
"""

from __future__ import annotations

import re

from docs import _generate, pictures
from docs import readme as face


def test_the_picture_shows_every_structure() -> None:
    assert _generate.OVERVIEW.read_text() == pictures.overview()


def test_the_small_pictures_are_those_of_the_structures() -> None:
    for path, image in face.images().items():
        assert path.read_text() == image


def test_numbers_are_those_of_the_results() -> None:
    for page, text in _generate.pages().items():
        assert page.read_text() == text, page


def test_it_can_be_read_at_once() -> None:
    numbers = re.findall(r"\d+(?:[.,]\d+)*", _generate.README.read_text())
    assert len(numbers) <= 80, f"{len(numbers)} numbers"
