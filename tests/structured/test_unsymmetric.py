"""What linear_operator makes of a member that is not symmetric: right numbers, or an error."""

import linear_operator
import pytest
import torch
from linear_operator.operators import (
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    RootLinearOperator,
)

from structured import Kronecker
from structured.interop import to_linear_operator
from tests.structured.test_linear_operator import draw

N = 6
GENERATOR = torch.Generator().manual_seed(0)
P = torch.randn(N, N, dtype=torch.float64, generator=GENERATOR) / 4
ROOT, EYE = P[:, :2], torch.eye(N, dtype=torch.float64)
RAMP = torch.arange(1.0, N + 1, dtype=torch.float64)

# What is made of the operator A, and the same of its dense matrix D.
MADE = {
    "add_jitter": (lambda A: A.add_jitter(0.3), lambda D: D + 0.3 * EYE),
    "add_diagonal": (lambda A: A.add_diagonal(RAMP), lambda D: D + torch.diag(RAMP)),
    "one number on the diagonal": (lambda A: A.add_diagonal(RAMP[1:2]), lambda D: D + 2 * EYE),
    "a diagonal": (lambda A: A + DiagLinearOperator(RAMP), lambda D: D + torch.diag(RAMP)),
    "a tensor": (lambda A: A + P, lambda D: D + P),
    "to a tensor": (lambda A: P + A, lambda D: P + D),
    "less a tensor": (lambda A: A - P, lambda D: D - P),
    "from a tensor": (lambda A: P - A, lambda D: P - D),
    "an operator": (lambda A: A + DenseLinearOperator(P), lambda D: D + P),
    "a root": (lambda A: A + RootLinearOperator(ROOT), lambda D: D + ROOT @ ROOT.mT),
    "itself": (lambda A: A + A.mT + A, lambda D: D + D.mT + D),
    "a sum with jitter": (lambda A: (A + P).add_jitter(0.1), lambda D: D + P + 0.1 * EYE),
    "a product": (lambda A: A @ A, lambda D: D @ D),
    "a product of three": (lambda A: A @ DenseLinearOperator(P + EYE) @ A, None),
    "twice a sum": (lambda A: 2 * (A + P), lambda D: 2 * (D + P)),
    "a sum, transposed": (lambda A: (A + P).mT, lambda D: (D + P).mT),
    "entry by entry": (lambda A: A * (P + 1), lambda D: D * (P + 1)),
    "a slice": (lambda A: A[..., :4, :4], lambda D: D[..., :4, :4]),
    "a slice of a sum": (lambda A: (A + P)[..., 1:5, 1:5], lambda D: (D + P)[..., 1:5, 1:5]),
    "repeated": (lambda A: A.repeat(2, 1, 1), lambda D: D.repeat(2, 1, 1)),
    "expanded": (lambda A: (A + P).expand(3, N, N), lambda D: (D + P).expand(3, N, N)),
    "one dimension more": (lambda A: (A + P).unsqueeze(0), lambda D: (D + P).unsqueeze(0)),
    "a copy": (lambda A: (A + P).clone().detach(), lambda D: D + P),
    "scaled": (lambda A: A * 2 / 3, lambda D: D * 2 / 3),
    "a Kronecker product": (
        lambda A: KroneckerProductLinearOperator(A, DiagLinearOperator(RAMP[:2])),
        lambda D: torch.kron(D.contiguous(), torch.diag(RAMP[:2])),
    ),
}
ANSWERS = {
    "matmul": (lambda A, X: A @ X, lambda D, X: D @ X),
    "transposed": (lambda A, X: A.mT @ X, lambda D, X: D.mT @ X),
    "solve": (lambda A, X: A.solve(X), torch.linalg.solve),
    "torch.linalg.solve": (torch.linalg.solve, torch.linalg.solve),
    "logdet": (lambda A, X: A.logdet(), lambda D, X: torch.linalg.slogdet(D).logabsdet),
    "inv_quad": (
        lambda A, X: A.inv_quad(X),
        lambda D, X: (X * torch.linalg.solve(D, X)).sum((-2, -1)),
    ),
    "inv_quad_logdet": (
        lambda A, X: A.inv_quad_logdet(X, logdet=True)[1],
        lambda D, X: torch.linalg.slogdet(D).logabsdet,
    ),
    "eigh": (lambda A, X: A.eigh()[0], None),
    "cholesky": (lambda A, X: A.cholesky().to_dense(), None),
    "roots": (lambda A, X: A.root_decomposition().to_dense(), None),
}


def member(name):
    if name == "kronecker":
        return Kronecker(draw("dense", dtype=torch.float64), draw("diagonal", dtype=torch.float64))
    return draw(name, dtype=torch.float64)


@pytest.fixture(autouse=True)
def explicit_sparse_checks():
    """linear_operator slices by sparse tensors; torch warns unless told whether to check them."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        yield


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.filterwarnings("ignore:torch.sparse.SparseTensor")
@pytest.mark.filterwarnings("ignore:Runtime Error when computing Cholesky")
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("spec", ["dense", "hierarchical(2, 3)", "upper_toeplitz", "circulant"])
@pytest.mark.parametrize("largest", [800, 1], ids=["by Cholesky", "by iteration"])
def test_right_numbers_or_an_error(largest, spec, made):
    make, dense = MADE[made]
    A, D = to_linear_operator(member(spec)), member(spec).to_dense()
    expected = dense(D) if dense else D @ (P + EYE) @ D
    torch.testing.assert_close(make(A).to_dense(), expected)
    X = torch.randn(*expected.shape[:-1], 2, dtype=torch.float64, generator=GENERATOR)
    with linear_operator.settings.max_cholesky_size(largest):
        for name, (answer, right) in ANSWERS.items():
            try:
                found = answer(make(A), X)
            except NotImplementedError as error:
                assert "symmetric" in str(error), name  # noqa: PT017
                continue
            assert right is not None, name
            torch.testing.assert_close(found, right(expected, X), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:torch.sparse.SparseTensor")
@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("made", ["add_jitter", "a tensor", "a product", "a slice"])
def test_solves_of_what_is_made_are_differentiable(made):
    make, dense = MADE[made]
    A = draw("block_upper(dense, diagonal, 2)", dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in A.tensors()]
    n = dense(A.to_dense()).shape[-1]

    def solve(*tensors):
        return make(to_linear_operator(A.with_tensors(tensors))).solve(EYE[:n, :2])

    assert torch.autograd.gradcheck(solve, leaves, fast_mode=True)


def test_a_shift_stays_a_member():
    A = draw("circulant", (2,), torch.float64)
    shifted = to_linear_operator(A).add_jitter(0.5)
    torch.testing.assert_close(shifted.member.to_dense(), A.add_scaled_identity(0.5).to_dense())
