"""A structured matrix with trainable entries, as a module."""

import copy
import io

import pytest
import torch

from structured import Rotated, StructuredParameter, parse

SPECS = (
    "dense",
    "hierarchical(2, 2)",
    "lower_toeplitz",
    "rotated(diagonal, hadamard)",
    "tied(2, dense)",
)


def member(spec):
    torch.manual_seed(0)
    return parse(spec)(10, dtype=torch.float64).map(torch.randn_like)


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_the_member_and_trains(spec):
    A, X = member(spec), torch.randn(10, 3, dtype=torch.float64)
    K = StructuredParameter(A)
    assert torch.equal(K(X), A @ X)
    target = torch.randn(10, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(K.parameters(), lr=1e-4)
    before = (K(X) - target).square().sum()
    before.backward()
    optimizer.step()
    assert (K(X) - target).square().sum() < before
    assert torch.equal(A @ X, member(spec) @ X)  # the member it started from is left alone


@pytest.mark.parametrize("spec", SPECS)
def test_it_saves_loads_and_copies(spec):
    K, X = StructuredParameter(member(spec)), torch.randn(10, 3, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(K.state_dict(), file)
    file.seek(0)
    other = StructuredParameter(parse(spec).identity(10, dtype=torch.float64))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(X), K(X))
    assert torch.equal(copy.deepcopy(K)(X), K(X))


def test_static_tensors_move_along():
    Q = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    A = Rotated.zeros(10, "diagonal", Q, dtype=torch.float64)
    K = StructuredParameter(A).float()
    assert K.matrix.dtype == torch.float32
    assert K(torch.ones(10)).dtype == torch.float32
    assert (K.matrix + A.to(torch.float32)).dtype == torch.float32


def test_it_prints_the_member():
    K = StructuredParameter(member("tied(2, dense)"))
    assert repr(K.matrix) in repr(K)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="expected a member, got Tensor"):
        StructuredParameter(torch.eye(3))
