"""SINGD, KFAC and every other method do what PyTorch expects of any optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from singd import KFAC, SINGD, SOAP, KLShampoo
from singd.testing.conformance import ROWS, check_optimizer
from tests.singd.broken import BROKEN, PLAIN, SHARES

METHODS: dict[str, Any] = {
    "SINGD": SINGD,
    "SINGD every step": partial(SINGD, T=1),
    "SINGD that chooses its structures": partial(SINGD, structures="auto", T=1),
    "KFAC": KFAC,
    "KLShampoo": KLShampoo,
    "SOAP": SOAP,
}


COMPLEX = {
    "complex_parameters": "preconditions real matrices alone: AdamW trains complex ones, and pairs "
    "of real and imaginary parts are matrices"
}
EXCEPTED = {"KLShampoo": COMPLEX, "SOAP": COMPLEX}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_every_row(method: str, row: str) -> None:
    excepted = {k: v for k, v in EXCEPTED.get(method, {}).items() if k == row}
    check_optimizer(METHODS[method], rows=[row], excepted=excepted)


@pytest.mark.parametrize("plain", PLAIN, ids=lambda c: c.__name__)
def test_so_do_optimizers_of_pytorch(plain: Any) -> None:
    check_optimizer(plain, excepted=SHARES)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_fault_fails_its_rows_and_no_other(broken: Any) -> None:
    failed = set()
    for row in ROWS:
        try:
            check_optimizer(broken, rows=[row])
        except AssertionError:
            failed.add(row)
    assert failed - SHARES.keys() == BROKEN[broken]


def test_every_row_can_fail() -> None:
    assert set().union(*BROKEN.values()) == ROWS.keys() - SHARES.keys()


def test_an_exception_that_is_none_and_an_unknown_row_are_errors() -> None:
    with pytest.raises(AssertionError, match="holds, but is excepted"):
        check_optimizer(PLAIN[0], rows=["printing"], excepted={"printing": "it prints nothing"})
    for excepted in ({"printing": ""}, {"no such row": "unknown"}):
        with pytest.raises(ValueError, match="expected one of the rows"):
            check_optimizer(PLAIN[0], rows=["printing"], excepted=excepted)
