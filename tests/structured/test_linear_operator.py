"""Members in linear_operator, checked by the test bases that linear_operator ships."""

import itertools
import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import (
    LinearOperatorTestCase,
    RectangularLinearOperatorTestCase,
)

from structured import parse
from structured.interop import to_linear_operator, to_root_linear_operator

SPECS = [
    "dense",
    "diagonal",
    "block_diagonal(2)",
    "lower_toeplitz",
    "upper_toeplitz",
    "lower_triangular",
    "upper_triangular",
    "scaled_identity",
    "circulant",
    "block_circulant(2)",
    "hierarchical(2, 1)",
    "low_rank_upper(2)",
    "low_rank_lower(-2)",
    "direct_sum(dense, circulant, 2)",
    "tied(2, lower_triangular)",
    "strided(3, dense)",
    "rotated(diagonal, cosine)",
    "rotated(lower_triangular, hadamard)",
    "transposed(lower_triangular)",
]


def draw(structure, batch_shape=()):
    """A well-conditioned member of size 6, not symmetric unless the structure is."""
    zero = parse(structure)(6, batch_shape=batch_shape)
    generator = torch.Generator().manual_seed(0)
    noise = zero.map(lambda t: torch.randn(t.shape, generator=generator).to(t))
    return (0.3 * noise).add_scaled_identity(1.5)


# K K^T asks nothing new of a structure, and its base takes the longest.
ROOTS = ["dense", "upper_triangular", "hierarchical(2, 1)", "rotated(diagonal, cosine)"]
ROOTS += ["circulant", "tied(2, lower_triangular)"]

# K K^T has repeated eigenvalues, whatever the numbers.
REPEATED = {"circulant", "tied(2, lower_triangular)"}


@pytest.fixture(autouse=True)
def explicit_sparse_checks():
    """linear_operator makes sparse tensors; torch warns unless told whether to check them."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        yield


class Rectangular(RectangularLinearOperatorTestCase):
    """The base for what need not be symmetric, for a member."""

    def create_linear_op(self):
        return to_linear_operator(draw(self.spec, self.batch))

    def evaluate_linear_op(self, linear_op):
        return linear_op.member.to_dense()


class PositiveDefinite(LinearOperatorTestCase):
    """The base for symmetric positive definite operators, for ``K K^T``."""

    # These ask which of linear_operator's own iterations ran: none, we solve directly.
    should_call_cg = False
    should_call_lanczos = False
    should_call_lanczos_diagonalization = False
    should_test_sample = True

    def create_linear_op(self):
        return to_root_linear_operator(draw(self.spec, self.batch))

    def evaluate_linear_op(self, linear_op):
        K = linear_op.root.member.to_dense()
        dense = K @ K.mT
        if self.spec in REPEATED and "sqrt_inv_matmul" in self._testMethodName:
            # The oracle differentiates eigenvectors: NaN where eigenvalues repeat. Its values and
            # the gradients by both sides are compared, those by the tensors of K are left out.
            return dense.detach().requires_grad_()
        return dense


def _cases():
    for base, specs in ((Rectangular, SPECS), (PositiveDefinite, ROOTS)):
        for spec, batch in itertools.product(specs, [(), (2, 3)]):
            name = f"{base.__name__}[{spec}-{batch}]"
            yield name, type(name, (base, unittest.TestCase), {"spec": spec, "batch": batch})


globals().update(_cases())
