"""What PyTorch expects of any optimizer, row by row: :func:`check_optimizer`.

The rows are those of PyTorch's own generic tests, for optimizers that take a model. With pytest,
one test for each row::

    @pytest.mark.parametrize("row", ROWS)
    def test_row(row):
        check_optimizer(MyOptimizer, rows=[row])

No row is about the flags ``foreach``, ``fused``, ``capturable``, ``differentiable`` and
``maximize``: they choose between implementations of one formula in PyTorch. Nor about sums over
several GPUs, which need some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from singd.testing.conformance import arguments, groups, hooks, numbers, state, steps
from singd.testing.conformance.training import Make

__all__ = ["ROWS", "check_optimizer"]

ROWS = MappingProxyType(
    {
        row.__name__: row
        for module in (arguments, groups, steps, numbers, state, hooks)
        for row in module.ROWS
    }
)
"""The rows by name."""


def check_optimizer(
    optimizer: Make,
    *,
    rows: Iterable[str] = ROWS,
    excepted: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise unless an optimizer class does what PyTorch expects of any.

    Args:
        optimizer: Class, or function, called as ``optimizer(model, params=None, **options)``; its
            options are ``lr`` and ``weight_decay`` at least.
        rows: Names from :data:`ROWS`; all of them by default.
        excepted: Rows that cannot hold, each with its reason.

    Raises:
        AssertionError: Names the row; also if a row holds that is ``excepted``.
        ValueError: If a row is unknown, or excepted without a reason.
    """
    for name in (*rows, *excepted):
        if name not in ROWS or not excepted.get(name, "a reason"):
            raise ValueError(
                f"expected one of the rows {', '.join(ROWS)} with a reason, got {name!r}"
            )
    for name in rows:
        try:
            ROWS[name](optimizer)
        except Exception as error:
            if name in excepted:
                continue
            says = (ROWS[name].__doc__ or "").splitlines()[0]
            raise AssertionError(
                f"row {name!r} fails: {type(error).__name__}: {error}\n  the row: {says}"
            ) from error
        if name in excepted:
            raise AssertionError(f"row {name!r} holds, but is excepted: {excepted[name]}")
