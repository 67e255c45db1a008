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
    PartlyMirrored,
    PartlyShared,
    Redundant,
    Series,
    Skewed,
)


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("law", LAWS)
def test_law(law, algebra):
    check(algebra, laws=[law], sizes=ALGEBRAS[algebra])


@pytest.mark.parametrize("law", ["project", "project_gram", "gram", "orthogonal_project"])
@pytest.mark.parametrize(("space", "n"), [(PartlyMirrored, 3), (PartlyShared, 3), (Large, 4)])
def test_projections_onto_any_space(space, n, law):
    check(space, laws=[law], sizes=[n])


@pytest.mark.parametrize(
    ("algebra", "ndim"), [(Complex, 1), (Cyclic, 1), (Series, 1), (Redundant, 2), (Skewed, 2)]
)
def test_closed_form_where_it_holds(algebra, ndim):
    """Vectors of weights where every number owns its places, matrices where they overlap."""
    weights = defaults._weights(defaults._key(algebra.zeros(6), 0))
    assert weights.orthogonal.ndim == ndim
    assert weights.symmetric.ndim == ndim


@pytest.mark.parametrize("algebra", [Cyclic, Skewed, InBasis])
def test_weights_are_found_while_compiling(algebra):
    defaults._WEIGHTS.clear()
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
