"""The defaults through ``to_dense``, on algebras that write nothing else."""

import pytest
import torch

from structured._core import defaults
from structured.testing import LAWS, check, definition
from tests.structured.algebras import (
    ALGEBRAS,
    Complex,
    Cyclic,
    InBasis,
    Large,
    OffTheScale,
    Overfull,
    PartlyMirrored,
    PartlyShared,
    Permuted,
    Redundant,
    Series,
    Skewed,
    TwoDense,
    Wasteful,
)
from tests.structured.specs import COMPILING, cases


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("law", [law for law in LAWS if law not in COMPILING])
def test_law(law, algebra):
    check(algebra, laws=[law], sizes=ALGEBRAS[algebra], examples=cases(law))


@pytest.mark.parametrize("law", [law for law in LAWS if law not in COMPILING])
@pytest.mark.parametrize("spec", ["block_upper(in_basis, wasteful, 3)", "rotated(cyclic, cosine)"])
def test_law_of_compositions(law, spec):
    """Which say ``dimensions``, where their parts say nothing of shapes."""
    check(spec, laws=[law], sizes=range(7), examples=4)


@pytest.mark.parametrize("algebra", [Complex, Skewed, InBasis])  # without, with groups; with Q
@pytest.mark.parametrize("law", COMPILING)
def test_law_of_compiling(law, algebra):
    check(algebra, laws=[law], sizes=ALGEBRAS[algebra])


@pytest.mark.parametrize("law", ["project", "project_gram", "gram", "orthogonal_project"])
@pytest.mark.parametrize(("space", "n"), [(PartlyMirrored, 3), (PartlyShared, 3), (Large, 4)])
def test_projections_onto_any_space(space, n, law):
    check(space, laws=[law], sizes=[n])


def groups(algebra, n):
    """How many groups of numbers share places, by their size."""
    zero = algebra.zeros(n)
    found = defaults._weights(zero.key(0), *zero.static_tensors())
    return {group.numbers.shape[1]: group.numbers.shape[0] for group in found.groups}


@pytest.mark.parametrize(
    ("algebra", "expected"),
    [
        (Complex, {}),
        (Cyclic, {}),
        (Series, {}),
        (Wasteful, {}),
        (Permuted, {}),
        (Redundant, {2: 6}),
        (Overfull, {2: 6}),
        (TwoDense, {2: 6, 4: 15}),
        (Skewed, {21: 1}),
    ],
)
def test_only_numbers_that_share_places_have_matrices(algebra, expected):
    assert groups(algebra, 6) == expected


@pytest.mark.parametrize("algebra", [Wasteful, Overfull, TwoDense, Permuted])
def test_dense_fields_under_a_mask_at_a_size_where_a_matrix_of_all_would_not_fit(algebra):
    n = 40 if algebra is TwoDense else 64  # n^2 numbers: their G has 10^7 entries
    M = torch.arange(float(n * n)).reshape(n, n)
    A = algebra.zeros(n)
    P, Pi = A.orthogonal_project(M).to_dense(), A.project(M + M.mT).to_dense()
    place = A.map(torch.ones_like).to_dense() != 0
    twice = torch.where(place & place.mT, 1, 2)
    torch.testing.assert_close(P, torch.where(place, M, 0))
    torch.testing.assert_close(Pi, torch.where(place, twice * (M + M.mT), 0))


@pytest.mark.parametrize("law", ["orthogonal_project", "project", "gram", "product", "copies"])
@pytest.mark.parametrize("algebra", [Overfull, TwoDense, Permuted, OffTheScale])
def test_projections_whatever_way_a_member_is_written(algebra, law):
    check(algebra, laws=[law], sizes=range(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_indices_are_no_numbers(dtype):
    """From 258 on bfloat16 rounds them to other places."""
    A = Permuted.zeros(300).map(lambda t: torch.arange(9e4).reshape(300, 300) / 9e4)
    low = A.to(dtype)
    assert (low.order.dtype, low.mask.dtype) == (torch.int64, torch.bool)
    assert torch.equal(low.to_dense(), A.to_dense().to(dtype))
    assert torch.equal((2 * low + low).order, A.order)
    assert low.layout == Permuted.zeros(300, dtype=dtype).layout


@pytest.mark.parametrize("algebra", [Cyclic, Skewed, InBasis])
def test_what_is_known_of_a_structure_is_found_while_compiling(algebra):
    defaults.forget()
    torch._dynamo.reset()
    A = algebra.zeros(6).map(lambda t: torch.arange(float(t.numel())).reshape(t.shape))
    X = torch.arange(12.0).reshape(6, 2)
    function = torch.compile(
        lambda A, X: A.matmul(A) + A.project_gram(X), fullgraph=True, backend="aot_eager"
    )
    found = function(A, X)
    torch.testing.assert_close(found.to_dense(), (A.matmul(A) + A.project_gram(X)).to_dense())


def test_static_tensors_may_change():
    """Weights belong to the numbers of a static tensor, not to its place in memory."""
    S = torch.diag(torch.arange(1.0, 4.0))
    for scale in (1.0, 2.0, 3.0):
        A = InBasis(torch.zeros(3), scale * torch.eye(3))  # freed, and its place taken by the next
        torch.testing.assert_close(A.project(S).to_dense(), S)


def test_the_rank_of_the_definition_is_relative():
    class Small(Redundant):
        def to_dense(self):
            return torch.diag_embed(1e-6 * self.d + 2e-6 * self.e)

    A = Small.zeros(7, dtype=torch.float64)
    assert len(definition.orthonormal_basis(A)) == 7


def test_layouts_are_hashable():
    assert len({InBasis.zeros(3).layout, InBasis.zeros(3).layout, InBasis.zeros(4).layout}) == 2


def test_static_tensors_agree_by_their_numbers():
    A = InBasis.zeros(4, dtype=torch.float64)
    low = A.to(torch.bfloat16)
    assert low.Q.dtype == torch.bfloat16
    assert (low + A.to(torch.bfloat16)).layout == low.layout
    with pytest.raises(ValueError, match="two members of one structure"):
        A + InBasis(A.d, -A.Q)
