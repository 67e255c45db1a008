"""Operations of a step: those of the formulas, and of a method whatever it does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import KFAC, SINGD, SOAP, KLShampoo
from singd.methods.flops import flops_of
from singd.methods.inverse_free import InverseFree
from singd.methods.shampoo import GradientCovariance
from singd.methods.soap import TrackedBasis
from structured import cost_of, parse

SPECS = ("dense", "diagonal", "block_diagonal(4)", "hierarchical(3, 2)", "lower_toeplitz")


def options_of(optimizer: Any) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return dict(group)


def of_singd(shape: tuple[int, ...], K: str, C: str, **options: Any) -> Any:
    group = options_of(SINGD(nn.Linear(2, 2), **options))
    return flops_of(InverseFree(), shape, (parse(K), parse(C)), group, torch.float32)


@pytest.mark.parametrize(("d_out", "d_in"), [(200, 300), (300, 200)])
def test_they_are_those_of_the_products(d_out: int, d_in: int) -> None:
    """Dense: ``C C^T G K K^T``; ``P S``, its product with K and the new ``K K^T`` of each side."""
    found = of_singd((d_out, d_in), "dense", "dense", T=7)
    expected = 2 * d_out * d_in * (d_in + d_out)
    assert found.direction == pytest.approx(expected, rel=0.02)
    assert found.update == pytest.approx(2 * 3 * (d_out**3 + d_in**3), rel=0.05)
    assert found.in_step(0.25) == 0.25 * found.direction + found.update / 7
    of_diagonals = of_singd((d_out, d_in), "diagonal", "diagonal")
    assert of_diagonals.direction <= 4 * d_out * d_in


@given(
    K=st.sampled_from(SPECS),
    C=st.sampled_from(SPECS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_those_of_both_sides_bound_those_of_a_weight(
    K: str, C: str, shape: tuple[int, int]
) -> None:
    """Each side beside a scaled identity; what is counted twice is that identity."""
    whole = of_singd(shape, K, C).in_step()
    sides = of_singd(shape, K, "scaled_identity"), of_singd(shape, "scaled_identity", C)
    bound = sum(side.in_step() for side in sides)
    twice = of_singd(shape, "scaled_identity", "scaled_identity").in_step()
    assert bound - 2 * twice - 100 <= whole <= bound


@given(T=st.integers(1, 6), every=st.integers(1, 6))
def test_turns_of_a_basis_count_as_often_as_they_come(T: int, every: int) -> None:
    model = nn.Linear(5, 3, bias=False)
    group = options_of(SOAP(model, T=T, basis_interval=every))
    method, like = TrackedBasis(), {"dtype": torch.float32, "device": "meta"}
    structures = (parse("dense"), parse("dense"))
    factors = method.init((3, 5), structures, group, batch_shape=(1,), **like)
    G = torch.empty(1, 3, 5, device="meta")

    def update(step: int) -> None:
        method.products(method.update(factors, G, group, step), group)

    steps = range(every * T, 2 * every * T, T)  # a period after the first steps
    counted = [cost_of(lambda step=step: update(step)).multiply_adds for step in steps]
    found = flops_of(method, (3, 5), structures, group, torch.float32)
    assert found.update == pytest.approx(2 * sum(counted) / len(counted))


@pytest.mark.parametrize("make", [SINGD, KFAC, SOAP, KLShampoo])
def test_the_plan_has_them_on_weights_that_are_preconditioned(make: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6))
    plan = make(model, T=1).plan()
    rows = {row.parameter: row for row in plan.rows}
    for name, row in rows.items():
        assert (row.flops > 0) == (name.endswith("weight") and row.rule != "AdamW"), name
    assert rows["0.weight"].flops == rows["3.weight"].flops
    assert plan.flops == sum(row.flops for row in plan.rows)
    assert f"factors and directions: {plan.flops:,.0f} flops a step" in str(plan)
    assert make(model, T=10).plan().flops < plan.flops


def test_a_method_that_asks_for_the_numbers_is_not_counted() -> None:
    class Asking(GradientCovariance):
        def precondition(self, factors: Any, G: Tensor, products: Any) -> Tensor:
            return G if float(G.sum()) > 0 else -G

    group = options_of(KLShampoo(nn.Linear(2, 2)))
    found = flops_of(Asking(), (3, 5), (parse("dense"),) * 2, group, torch.float32)
    assert math.isnan(found.in_step())
