"""What a member does beside the laws: torch functions, NumPy, odd arguments, Kronecker products."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peak import PeakBytes
from structured import (
    Dense,
    Diagonal,
    Kronecker,
    LowerTriangular,
    Rotated,
    StructuredMatrix,
    Tied,
    parse,
    static,
)
from structured._products.in_place import add_product_
from structured.testing.operations import OPERATIONS, dense_of
from structured.testing.strategies import Operands
from tests.structured.specs import SPECS

A = Dense(torch.tensor([[1.0, 2.0, 0.0], [-1.0, 3.0, 1.0], [2.0, 0.0, -2.0]]))
X = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0], [2.0, 2.0, 1.0]])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: torch.matmul(A, X), A.M @ X),
        (lambda: torch.matmul(X, A), X @ A.M),
        (lambda: X.matmul(A), X @ A.M),
        (lambda: torch.matmul(A, A), A.M @ A.M),
        (lambda: torch.mul(torch.tensor(2.0), A), 2 * A.M),
        (lambda: torch.add(A, A), 2 * A.M),
        (lambda: torch.sub(3 * A, A), 2 * A.M),
        (lambda: torch.div(A, torch.tensor(2.0)), A.M / 2),
        (lambda: np.float64(2) * A, 2 * A.M),
        (lambda: np.int64(2) * A, 2 * A.M),
        (lambda: torch.nn.Parameter(X) @ A, X @ A.M),
        (lambda: X.__rmatmul__(A), A.M @ X),
        (lambda: torch.tensor(2.0).__rdiv__(A), A.M / 2),
    ],
)
def test_torch_and_numpy_find_our_operators(function, expected):
    found = function()
    assert torch.equal(found.to_dense() if isinstance(found, Dense) else found, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda: X + A,
        lambda: A + X,
        lambda: A - 1,
        lambda: 1 / A,
        lambda: X / A,
        lambda: A * "2",
        lambda: 1j * A,
        lambda: A @ None,
        lambda: A @ X.numpy(),
        lambda: X.numpy() @ A,
        lambda: torch.trace(A),
        lambda: torch.add(A, A, alpha=2),
        lambda: Dense([[1.0]]),
    ],
)
def test_no_meaning_is_a_type_error(function):
    with pytest.raises(TypeError):
        function()


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda: A @ X.double(), "Dense.apply: expected torch.float32 on cpu, got torch.float64"),
        (lambda: A.project(X.double()), "Dense.project: expected torch.float32 on cpu, got"),
        (lambda: A.matmul(A.to(torch.float64)), "Dense.matmul: expected torch.float32 on cpu, got"),
        (lambda: A.matmul(X), "Dense.matmul: expected a member of the same structure, got Tensor"),
        (lambda: A + LowerTriangular.identity(3), r"^\+: .* got Dense.* and LowerTriangular"),
        (lambda: A - LowerTriangular.identity(3), "^-: .* got Dense.* and LowerTriangular"),
        (lambda: A * torch.ones(3), r"^Dense \*: expected a scalar or shape \[\], got \[3\]"),
        (lambda: A / torch.ones(3), r"^Dense /: expected a scalar or shape \[\], got \[3\]"),
    ],
)
def test_errors_say_which_operation_and_whose_argument(function, error):
    with pytest.raises((TypeError, ValueError), match=error):
        function()


def test_a_scalar_on_the_cpu_goes_with_any_device():
    assert (torch.tensor(2.0) * A.to("meta")).device.type == "meta"


def test_the_identity_of_a_class():
    assert torch.equal(Tied.identity(4, 2, "dense").to_dense(), torch.eye(4))


def test_at_sign_does_not_compile_to_another_product():
    """PyTorch traces ``A @ X`` and ``X @ A`` alike: refused, unless the graph may break."""
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(lambda A, X: A @ X, fullgraph=True, backend="eager")(A, X)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(lambda A, X: A @ X, backend="eager")(A, X), A.M @ X)
    assert torch.equal(torch.compile(lambda A, X: X @ A, backend="eager")(A, X), X @ A.M)


@pytest.mark.parametrize("spec", ["dense", "low_rank_lower(1)", "transposed(low_rank_lower(1))"])
def test_a_matrix_is_no_stack_of_vectors(spec):
    """``torch.linalg.solve`` takes X [2, 2] for two vectors where A is [2, 2, 2]."""
    K = parse(spec).identity(2, batch_shape=(2,)) * torch.tensor([1.0, 2.0])
    X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(K.solve(X), torch.stack([X, X / 2]))


def test_arrays():
    np.testing.assert_array_equal(np.asarray(A.to(torch.bfloat16)), A.M.numpy())
    np.testing.assert_array_equal(np.asarray(A.map(Tensor.requires_grad_)), A.M.detach().numpy())
    assert np.asarray(A, dtype=np.float16).dtype == np.float16
    with pytest.raises(ValueError, match="must be written out"):
        np.asarray(A, copy=False)


@pytest.mark.parametrize("spec", SPECS)
def test_expanded_tensors(spec):
    """One number in memory for all of a tensor: strides of 0, where views and writes would show."""
    zero = parse(spec)(6, batch_shape=(2,), dtype=torch.float64)
    numbers = iter(range(1, 99))

    def expanded(t):
        return torch.tensor(float(next(numbers)), dtype=t.dtype).expand(t.shape)

    S = expanded(torch.empty(2, 6, 6, dtype=torch.float64))
    A, B = zero.map(expanded), zero.map(expanded)
    K = A.map(lambda t: t / 64).add_scaled_identity(32.0)
    operands = Operands(A, B, K, S[..., :3], S)
    alike = operands.map(lambda t: t.clone(memory_format=torch.contiguous_format))
    for name, operation in OPERATIONS.items():
        found, expected = dense_of(operation.compute(operands)), dense_of(operation.compute(alike))
        torch.testing.assert_close(found, expected, msg=name)


def test_numbers_are_real():
    with pytest.raises(ValueError, match=r"Dense: expected real floating-point numbers, got torch"):
        Dense(torch.eye(3, dtype=torch.int64))


def test_a_class_takes_no_keywords():
    with pytest.raises(TypeError, match="takes no keyword arguments"):

        class Odd(Diagonal, k=3):
            pass


def test_members_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        A.M = X


def test_members_are_told_apart_by_identity():
    assert A.clone() != A
    assert len({A, A.clone()}) == 2


def test_fields_agree():
    with pytest.raises(ValueError, match=r"expected last in torch.float32 .* got torch.float64"):
        type(parse("block_diagonal(2)")(3))(torch.zeros(1, 2, 2), torch.zeros(1, 1).double())


def test_nested_static_tensors_are_converted():
    class Basis(StructuredMatrix):
        d: Tensor
        Q: Tensor = static()

        @classmethod
        def zeros(cls, n, *, batch_shape=(), **opts):
            return cls(torch.zeros(*batch_shape, n, **opts), torch.eye(n, **opts))

        def to_dense(self):
            return self.Q @ torch.diag_embed(self.d) @ self.Q.mT

    nested = parse("block_upper(dense, basis, 1)").identity(3).to(torch.float64)
    assert nested.C.Q.dtype == torch.float64
    assert torch.equal(nested.to_dense(), torch.eye(3, dtype=torch.float64))


def test_conversion_to_what_it_is_copies_nothing_unless_told_to():
    member = Dense(torch.eye(3))
    assert member.to(torch.float32) is member
    copied = member.to(torch.float32, copy=True)
    assert copied.M.data_ptr() != member.M.data_ptr()
    rotated = parse("rotated(diagonal, cosine)").identity(3)
    assert rotated.to(torch.float32) is rotated


def test_conversion_reaches_a_basis_of_another_dtype():
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    member = Rotated(Diagonal(torch.ones(3)), Q)
    assert member.to(torch.float32).Q.dtype == torch.float32


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_class_with_two_methods_is_solved_transposed(batch):
    class Upper(StructuredMatrix):
        U: Tensor

        @classmethod
        def zeros(cls, n, *, batch_shape=(), **opts):
            return cls(torch.zeros(*batch_shape, n, n, **opts))

        def to_dense(self):
            return self.U.triu()

    member = Upper(torch.randn(*batch, 3, 3, dtype=torch.float64) + 4 * torch.eye(3))
    right = torch.randn(*batch, 3, 2, dtype=torch.float64)
    expected = torch.linalg.solve(member.to_dense().mT, right)
    torch.testing.assert_close(member.mT.solve(right), expected)


def test_gradients_reach_the_stored_numbers():
    member = LowerTriangular.identity(4).map(Tensor.requires_grad_)
    (member.matmul(member).gram() + 2.0 * member).trace().backward()
    assert all(t.grad is not None for t in member.tensors())


def test_repr_reads_as_mathematics():
    member = parse("block_upper(dense, diagonal, 2)")(5, batch_shape=(3,), dtype=torch.bfloat16)
    assert repr(member) == (
        "BlockUpper(5; A = Dense(2; M: 2 x 2), B: 2 x 3, C = Diagonal(3; d: 3)) "
        "[bfloat16, batch (3,)]"
    )
    assert repr(Tied.zeros(4, 2, "dense")) == "Tied(4; A = Dense(2; M: 2 x 2), k = 2) [float32]"


@pytest.mark.parametrize("argument", ["3", 3.0, None, A])
def test_what_is_no_tensor_is_named(argument):
    name = type(argument).__name__
    with pytest.raises(TypeError, match=rf"^Dense\.apply: expected a tensor, got {name}$"):
        A.apply(argument)
    with pytest.raises(TypeError, match=rf"^Dense\.project: expected a tensor, got {name}$"):
        A.project(argument)


def test_sums_of_products_broadcast():
    """Along any batch dimension of either factor; no temporary where only the last is not 1."""
    for batches in itertools.product(itertools.product((1, 3), repeat=2), repeat=2):
        A, B = (torch.ones(*batch, 2, 2) for batch in batches)
        shape = torch.broadcast_shapes(*batches)
        for beta in (0.0, 1.0):
            out = torch.full((*shape, 2, 2), 5.0)
            with PeakBytes() as count:
                count.add([out, A, B])
                add_product_(out, A, B, beta=beta)
            assert torch.equal(out, torch.full_like(out, 2 + 5 * beta))
            assert count.largest == 0 or shape[0] == 3 or batches[0] != batches[1]


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("dense", lambda t: None),
        ("block_upper(dense, diagonal, 1)", lambda t: t.numpy()),
        ("block_upper(dense, diagonal, 1)", lambda t: t.double() if t.ndim < 2 else t),
        ("block_lower(diagonal, block_diagonal(2), 1)", lambda t: t.double() if len(t) else t),
    ],
)
def test_what_a_function_makes_is_checked(spec, wrong):
    member = parse(spec)(3)
    with pytest.raises((TypeError, ValueError), match="expected"):
        member.map(wrong)
    with pytest.raises((TypeError, ValueError), match="expected"):
        member.with_tensors([wrong(t) for t in member.tensors()])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("n", "m"), [(7, 5), (64, 520), (130, 2100)])
def test_block_diagonal_by_panels(batch, n, m):
    """Small products at once, large ones in pieces; either way the memory is the argument's."""
    A = parse("block_diagonal(3)")(n, batch_shape=batch, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    A = A.map(lambda t: torch.randn(t.shape, generator=generator).to(t))
    X = torch.randn(*batch, n, m, generator=generator, dtype=torch.float64)
    expected = A.to_dense() @ X
    torch.testing.assert_close(A.apply(X), expected)
    torch.testing.assert_close(A.apply(X.mT.contiguous().mT), expected)
    result = A.apply_overwriting(X)
    torch.testing.assert_close(result, expected)
    assert result.data_ptr() == X.data_ptr()


def symmetric_pair(spec, batch, *sizes):
    """``A A^T`` for random members of a structure, and a generator."""
    generator = torch.Generator().manual_seed(0)

    def product(n):
        A = parse(spec)(n, batch_shape=batch, dtype=torch.float64)
        return A.map(lambda t: torch.randn(t.shape, generator=generator).to(t)).outer()

    return *map(product, sizes), generator


IN_PARTS = ["diagonal", "hierarchical(1, 1)", "hierarchical(1, 2)", "dense", "block_diagonal(2)"]
IN_PARTS += ["block_diagonal(3)"]


@pytest.mark.parametrize("spec", [*IN_PARTS, "circulant"])
@pytest.mark.parametrize("batch", [(), (2,), (1, 3)])
@pytest.mark.parametrize("first", [0, 1, 3, 4, 5])
def test_kronecker_products_of_columns_in_two_parts(spec, batch, first):
    CC, KK, generator = symmetric_pair(spec, batch, 3, 5)
    for shape in ((3, 5), (*batch, 3, 5), (4, *batch, 3, 5)):
        G = torch.randn(shape, generator=generator, dtype=torch.float64)
        leaf, before = G.clone().requires_grad_(), G.clone()
        expected = CC.to_dense() @ G @ KK.to_dense()
        for whole in (G, leaf):
            Y, y = KK.apply_rows(whole[..., :first].mT, whole[..., first:].mT)
            parts = CC.apply_overwriting(Y.mT), CC.apply_overwriting(y.mT)
            torch.testing.assert_close(torch.cat(parts, -1), expected)
        assert torch.equal(G, before)
        torch.cat(parts, -1).sum().backward()
        ones = CC.to_dense() @ torch.ones_like(expected) @ KK.to_dense()
        torch.testing.assert_close(leaf.grad, ones.sum_to_size(shape))


@pytest.mark.parametrize("spec", ["dense", "diagonal", "block_diagonal(3)", "lower_triangular"])
@pytest.mark.parametrize("first", [0, 1, 3, 4, 5])
def test_products_of_rows_in_two_parts(spec, first):
    generator = torch.Generator().manual_seed(0)
    A = parse(spec)(5, dtype=torch.float64)
    A = A.map(lambda t: torch.randn(t.shape, generator=generator).to(t))
    X = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    Y, y = A.apply_rows(X[:first], X[first:])
    torch.testing.assert_close(Y, (A.to_dense() @ X)[:first])
    torch.testing.assert_close(y, (A.to_dense() @ X)[first:])


@pytest.mark.parametrize(
    ("spec", "closed"),
    [
        *[(spec, True) for spec in ("dense", "diagonal", "block_diagonal(2)", "circulant")],
        *[(spec, True) for spec in ("hierarchical(1, 1)", "tied(2, dense)", "scaled_identity")],
        *[(spec, False) for spec in ("lower_toeplitz", "upper_triangular", "low_rank_lower(1)")],
        ("transposed(hierarchical(1, 1))", False),
    ],
)
def test_of_which_structures_statistics_need_no_factor(spec, closed):
    assert parse(spec)(4).closed_under_congruence is closed


def test_a_congruence_is_of_members_of_one_structure():
    with pytest.raises(TypeError, match=r"^Dense\.congruence: expected a member"):
        A.congruence(A.M)
    with pytest.raises(ValueError, match=r"^congruence: expected two members of one structure"):
        A.congruence(Diagonal.zeros(3))


@pytest.mark.parametrize("spec", IN_PARTS)
@pytest.mark.parametrize("batch", [(), (2,), (1, 3)])
def test_kronecker_products_in_one_memory(spec, batch):
    """The second product overwrites the first, but never ``G``, and not where gradients are."""
    CC, KK, generator = symmetric_pair(spec, batch, 4, 3)
    for shape in ((4, 3), (*batch, 4, 3), (5, *batch, 4, 3)):
        G = torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = CC.to_dense() @ G @ KK.to_dense()
        before = G.clone()
        torch.testing.assert_close(Kronecker(CC, KK).apply_matrix(G), expected)
        assert torch.equal(G, before)
        leaf = G.clone().requires_grad_()
        Kronecker(CC, KK).apply_matrix(leaf).sum().backward()
        ones = torch.ones_like(expected)
        torch.testing.assert_close(
            leaf.grad, (CC.to_dense() @ ones @ KK.to_dense()).sum_to_size(shape)
        )


@pytest.mark.parametrize("spec", ["diagonal", "hierarchical(1, 1)"])
def test_the_second_product_takes_no_memory(spec):
    C, K = (parse(spec).identity(n).outer() for n in (40, 30))
    G = torch.ones(40, 30)
    with PeakBytes() as count:
        before = count.add([G, *(t for A in (C, K) for t in vars(A).values())])
        Kronecker(C, K).apply_matrix(G)
    narrow = 4 * 4 * 40  # rows and ends of a hierarchical factor
    assert count.peak - before <= G.nbytes + (narrow if spec != "diagonal" else 0)


@pytest.mark.parametrize("spec", ["diagonal", "hierarchical(1, 1)", "block_diagonal(2)"])
@pytest.mark.parametrize("trained", ["C", "K", "G", "C K G"])
def test_gradients_of_kronecker_products(spec, trained):
    generator = torch.Generator().manual_seed(0)
    parts = [parse(spec)(n, dtype=torch.float64) for n in (4, 3)]
    tensors = [t for A in parts for t in A.tensors()]
    values = [
        torch.randn(t.shape, generator=generator).double() for t in (*tensors, torch.zeros(4, 3))
    ]
    names = [name for name, A in zip("CK", parts, strict=True) for _ in A.tensors()] + ["G"]
    for value, name in zip(values, names, strict=True):
        value.requires_grad_(name in trained)

    def product(*values):
        count = len(parts[0].tensors())
        C, K = parts[0].with_tensors(values[:count]), parts[1].with_tensors(values[count:-1])
        return Kronecker(C.outer(), K.outer()).apply_matrix(values[-1])

    assert torch.autograd.gradcheck(product, values)
