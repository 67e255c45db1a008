"""The laws that every structure keeps, and :func:`check`, which finds where one does not.

    >>> import structured
    >>> from structured.testing import check
    >>> check(structured.Diagonal, examples=5)

With pytest, one test for each law::

    @pytest.mark.parametrize("law", LAWS)
    def test_law(law):
        check(MyStructure, laws=[law])

A law asserts something for all members and operands of the structure, drawn by Hypothesis (which
only this module needs): small integers, never symmetric but by chance, in every memory layout,
sizes 0 to 12 and batch shapes ``()``, ``(2,)``, ``(1, 3)`` and ``(0,)``; where rounding has no say
or a bound, in float64, float32, bfloat16 and float16.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from structured._core.spec import Structure, StructureLike, parse
from structured.testing.conduct import CONDUCT
from structured.testing.constructors import constructors
from structured.testing.laws import ALGEBRA, assert_close
from structured.testing.members import MEMBERS
from structured.testing.products import PRODUCTS
from structured.testing.solves import SOLVES
from structured.testing.strategies import SIZES, cases, structures
from structured.testing.transforms import TRANSFORMS

__all__ = ["LAWS", "assert_close", "check", "structures"]

Law = Callable[..., None]

LAWS: Mapping[str, Law] = MappingProxyType(
    {
        law.__name__: law
        for law in (*ALGEBRA, *PRODUCTS, *SOLVES, *MEMBERS, *CONDUCT, constructors, *TRANSFORMS)
    }
)


def check(
    structure: StructureLike | SearchStrategy[Structure],
    *,
    laws: Iterable[str] = LAWS,
    sizes: Sequence[int] = SIZES,
    examples: int | None = None,
    shrink: bool = True,
) -> None:
    """Raise unless ``structure`` keeps the laws.

    Args:
        structure: Anything :func:`structured.parse` takes, or a strategy such as
            :func:`structures`, for random nestings.
        laws: Names from :data:`LAWS`; all of them by default.
        sizes: The sizes ``n`` to draw, where a structure has not all.
        examples: Cases for each law; as many as the Hypothesis profile says by default.
        shrink: Whether to look for a small counterexample.

    Raises:
        AssertionError: Names the law, the structure and a counterexample.
        ValueError: If a law is unknown, or ``examples`` is below 1.
    """
    if examples is not None and (not isinstance(examples, int) or examples < 1):
        raise ValueError(
            f"examples: expected a number of cases from 1 on, or None, got {examples!r}"
        )
    drawn = isinstance(structure, SearchStrategy)
    choices = structure if isinstance(structure, SearchStrategy) else st.just(parse(structure))
    for name in laws:
        if name not in LAWS:
            raise ValueError(f"expected one of the laws {', '.join(LAWS)}, got {name!r}")
        letters = tuple(inspect.signature(LAWS[name]).parameters)
        once = {*letters} <= {"structure", "sizes"} and not drawn  # nothing to draw
        _check(LAWS[name], letters, choices, sizes, 1 if once else examples, shrink)


def _check(
    law: Law,
    letters: Sequence[str],
    choices: SearchStrategy[Structure],
    sizes: Sequence[int],
    examples: int | None,
    shrink: bool,
) -> None:
    last: dict[str, Any] = {}

    @settings(
        deadline=None,
        database=None,
        print_blob=False,
        max_examples=examples or _profile().max_examples,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, *((Phase.shrink,) if shrink else ())),
    )
    @given(cases(choices, letters, sizes))
    def run(case: dict[str, Any]) -> None:
        last.clear()
        last.update(case)
        law(**{letter: case[letter] for letter in letters})

    try:
        with warnings.catch_warnings():  # which the laws themselves say at length
            warnings.filterwarnings("ignore", ".* is no algebra")
            run()
    except Exception as error:
        raise AssertionError(_report(law, last, error)) from error


def _profile() -> settings:
    """The settings that Hypothesis's profile gives by default."""
    return settings()


def _report(law: Law, case: Mapping[str, Any], error: Exception) -> str:
    lines = [
        f"law {law.__name__!r} fails for {case.get('structure', 'this structure')}: "
        f"{type(error).__name__}: {error}",
        f"  the law: {(inspect.getdoc(law) or '').splitlines()[0]}",
    ]
    for letter, value in case.items():
        if letter == "structure":
            continue
        lines.append(f"  {letter} = {value!r}")
        if hasattr(value, "to_dense"):
            lines.append(f"      {value.to_dense()}")
    return "\n".join(lines)
