"""Members in linear_operator, checked by the test bases that linear_operator ships."""

import itertools
import unittest

import linear_operator
import pytest
import torch
from linear_operator.test.linear_operator_test_case import (
    LinearOperatorTestCase,
    RectangularLinearOperatorTestCase,
)

from structured import parse
from structured.interop import to_linear_operator, to_root_linear_operator
from tests.structured.specs import SPECS


def draw(structure, batch_shape=(), dtype=torch.float32):
    """A well-conditioned member of size 6, not symmetric unless the structure is."""
    zero = parse(structure)(6, batch_shape=batch_shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    noise = zero.map(lambda t: torch.randn(t.shape, generator=generator).to(t))
    return (0.3 * noise).add_scaled_identity(1.5)


# K K^T has repeated eigenvalues, whatever the numbers.
REPEATED = ("scaled_identity", "circulant", "block_circulant(2)", "tied(3, lower_triangular)")


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
            # the gradients by both sides are compared; those by the tensors of K are below.
            return dense.detach().requires_grad_()
        return dense


# What a structure does differently without a batch, a few show.
UNBATCHED = (
    "dense",
    "diagonal",
    "lower_toeplitz",
    "hierarchical(2, 3)",
    "rotated(diagonal, cosine)",
)
DRAWN = [(spec, (2, 3)) for spec in SPECS] + [(spec, ()) for spec in UNBATCHED]


def _cases():
    for base, (spec, batch) in itertools.product((Rectangular, PositiveDefinite), DRAWN):
        name = f"{base.__name__}[{spec}-{batch}]"
        given = {"spec": spec, "batch": batch, "seed": 0}  # of the operands that the base draws
        yield name, type(name, (base, unittest.TestCase), given)


globals().update(_cases())


@pytest.mark.parametrize("spec", REPEATED)
def test_square_roots_are_differentiable_where_eigenvalues_repeat(spec):
    K = draw(spec, dtype=torch.float64)
    left, right = torch.eye(2, 6, dtype=torch.float64), torch.eye(6, 3, dtype=torch.float64)

    def root(*tensors):
        operator = to_root_linear_operator(K.with_tensors(tensors))
        return linear_operator.sqrt_inv_matmul(operator, right, left)

    tensors = [t.requires_grad_() for t in K.tensors()]
    assert torch.autograd.gradcheck(root, tensors, fast_mode=True)
