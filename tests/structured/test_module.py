"""A structured matrix with trainable entries, as a module."""

import copy
import io

import pytest
import torch

from structured import Rotated, StructuredParameter, Tied, parse

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_under_autocast_it_is_as_a_linear_layer(dtype):
    K = StructuredParameter(parse("hierarchical(2, 2)").identity(8, dtype=dtype))
    linear, X = torch.nn.Linear(8, 8, dtype=dtype), torch.ones(8, 3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = K(X)
        assert product.dtype == linear(X.mT).dtype
    product.sum().backward()
    assert all(p.grad.dtype == dtype for p in K.parameters())


def test_it_prints_the_member():
    K = StructuredParameter(member("tied(2, dense)"))
    assert repr(K.matrix) in repr(K)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="expected a member, got Tensor"):
        StructuredParameter(torch.eye(3))


def basis():
    return torch.linalg.qr(torch.cos(torch.arange(100.0, dtype=torch.float64)).reshape(10, 10)).Q


def with_statics():
    """A static tensor within a part, and members that are its multiples."""
    A = Rotated.zeros(10, "diagonal", basis(), dtype=torch.float64)
    return Tied(A.map(torch.ones_like), 2)


def test_static_tensors_are_saved_and_loaded():
    K, X = StructuredParameter(with_statics()), torch.ones(20, 2, dtype=torch.float64)
    other = Tied(Rotated.zeros(10, "diagonal", torch.eye(10), dtype=torch.float64), 2)
    L = StructuredParameter(other).double()
    assert sorted(L.state_dict()) == ["0", "static0"]
    L.load_state_dict(K.state_dict())
    assert torch.equal(L(X), K(X))
    assert torch.equal(other.A.Q, torch.eye(10))  # what it was made from is left alone


@pytest.mark.parametrize("make", [with_statics, lambda: member("hierarchical(2, 2)")])
def test_from_the_meta_device(make):
    K = StructuredParameter(make())
    L = StructuredParameter(make().to("meta")).to_empty(device="cpu")
    L.load_state_dict(K.state_dict())
    assert torch.equal(L.matrix.to_dense(), K.matrix.to_dense())
    M = StructuredParameter(make().to("meta"))
    M.load_state_dict(K.state_dict(), assign=True)
    assert torch.equal(M.matrix.to_dense(), K.matrix.to_dense())


@pytest.mark.parametrize("spec", SPECS)
def test_reset_makes_it_the_identity(spec):
    K = StructuredParameter(parse(spec)(10, device="meta")).to_empty(device="cpu")
    K.reset_parameters()
    torch.testing.assert_close(K.matrix.to_dense(), torch.eye(10))
    assert all(p.requires_grad for p in K.parameters())


def test_reset_without_static_tensors_is_an_error():
    K = StructuredParameter(with_statics().to("meta")).to_empty(device="cpu")
    with torch.no_grad():
        K.static0.zero_()
    with pytest.raises(RuntimeError, match="load a state dict"):
        K.reset_parameters()


@pytest.mark.parametrize("make", [with_statics, lambda: member("hierarchical(2, 2)")])
def test_it_compiles_whole(make):
    torch.compiler.reset()
    K = StructuredParameter(make())
    compiled = torch.compile(K, fullgraph=True, backend="aot_eager")
    n = K.matrix.n
    for X in (torch.ones(n, 2, dtype=torch.float64), torch.ones(n, dtype=torch.float64)):
        torch.testing.assert_close(compiled(X), K(X))
    compiled(torch.ones(n, 2, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in K.parameters())
