"""Group algebras, incidence algebras, hypercomplex numbers, centrosymmetric matrices, kron."""

import itertools
import math

import pytest
import torch

from structured import (
    BlockCirculant,
    Circulant,
    GroupAlgebra,
    Hypercomplex,
    Incidence,
    Kron,
    Kronecker,
    group_algebra,
    incidence,
    parse,
)
from structured.testing import LAWS, assert_close, check
from tests.structured.specs import COMPILING, FURTHER, SPECS
from tests.structured.test_costs import LINEAR, LOGARITHMIC, OPERATIONS, measure

EXAMPLES = 3
ORDERS = ("divisors", "subsets", "ancestors")
DTYPE = {"dtype": torch.float64}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **DTYPE)


@pytest.mark.parametrize("spec", FURTHER)
@pytest.mark.parametrize("law", [law for law in LAWS if law not in COMPILING])
def test_law(law, spec):
    check(spec, laws=[law], sizes=FURTHER[spec], examples=EXAMPLES)


@pytest.mark.parametrize("spec", ["quaternions", "incidence(divisors)", "kron(dense, diagonal, 2)"])
def test_they_compile(spec):
    check(spec, laws=["compiled"], sizes=[4])


# The ways of large sizes and sparse orders, at small ones.
WAYS = [
    ("group_algebra(2, 2)", group_algebra, "_DENSE", 0),
    ("incidence(divisors)", incidence, "_SPARSE", 0),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0])
@pytest.mark.parametrize("law", [law for law in LAWS if law not in COMPILING])
def test_law_of_large_sizes(law, way, monkeypatch):
    spec, *decision = way
    monkeypatch.setattr(*decision)
    check(spec, laws=[law], sizes=range(0, 13, 4), examples=EXAMPLES)


EXPONENTS = {
    "complex_numbers": LINEAR,
    "quaternions": LINEAR,
    "group_algebra(4)": LOGARITHMIC,
    "kron(circulant, dense, 4)": LOGARITHMIC,
    "kron(hierarchical(1, 1), dense, 2)": LINEAR,
}
WRITTEN_OUT = {  # what kron has no fast way for
    *("solve", "solve_member", "inverse", "project_gram", "logdet", "spectral_norm"),
    *("gram", "outer, its numbers", "outer, solved", "orthogonal_project_gram"),
}


GROWING = [
    (operation, spec)
    for operation, spec in itertools.product(OPERATIONS, EXPONENTS)
    if operation != "project" and not ("kron" in spec and operation in WRITTEN_OUT)
]


@pytest.mark.parametrize(("operation", "spec"), GROWING)
def test_growth(operation, spec):
    once, twice = (measure(spec, operation, n) for n in (4096, 8192))
    for before, after in ((once.work, twice.work), (once.largest, twice.largest)):
        assert math.log2(max(after, 1) / max(before, 1)) <= EXPONENTS[spec]


@pytest.mark.parametrize("operation", ["apply", "apply_transpose", "matmul", "project_gram", "exp"])
def test_sparse_orders_grow_like_their_chains(operation):
    """Those of the ancestors in a tree are n log^2 n."""
    once, twice = (measure("incidence(ancestors)", operation, n) for n in (1024, 2048))
    assert math.log2(twice.work / once.work) <= 1.3


# Against what else is known of them ------------------------------------------------------------


def test_a_torus_is_the_two_dimensional_circulant():
    p, q = 9, 10  # large enough for FFTs
    A = parse(f"group_algebra({q})").randn(p * q, **DTYPE)
    image, c = normal(p, q, seed=1), A.c.reshape(p, q)
    expected = torch.zeros(p, q, **DTYPE)
    for i, j in itertools.product(range(p), range(q)):
        expected += c[i, j] * image.roll((i, j), (0, 1))
    assert_close(A @ image.flatten(), expected.flatten(), "convolution")
    twice = Kron.product(parse("circulant").randn(p, **DTYPE), parse("circulant").randn(q, **DTYPE))
    again = GroupAlgebra.from_dense(twice.to_dense(), q)
    assert_close(again, twice.to_dense(), "kron(circulant, circulant)")


def test_one_cycle_is_circulant():
    c = normal(7)
    assert_close(parse("group_algebra")(7, **DTYPE).with_tensors([c]), Circulant(c).to_dense(), "C")


def permutations(k):
    """The products of all permutations of k things, the identity first."""
    elements = list(itertools.permutations(range(k)))
    number = {element: i for i, element in enumerate(elements)}
    rows = [[number[tuple(a[b[i]] for i in range(k))] for b in elements] for a in elements]
    return torch.tensor(rows)


def test_the_group_of_permutations_by_its_table():
    table = permutations(4)

    def structure(n, **opts):
        return GroupAlgebra.zeros(n, table, **opts)

    for law in ("product", "apply", "transpose", "orthogonal_project", "inverse", "exponential"):
        check(structure, laws=[law], sizes=[24], examples=2)
    A, B = (structure(24, **DTYPE).randn_like() for _ in range(2))
    assert not torch.allclose((A @ B).c, (B @ A).c)


def test_dihedral_symmetries_move_the_corners_of_a_polygon():
    """Products in the table are those of the permutations of 5 corners."""
    corners = torch.arange(5)
    moves = [(corners + a) % 5 for a in range(5)] + [(a - corners) % 5 for a in range(5)]
    table = GroupAlgebra.zeros(10, "dihedral")._products()
    for i, j in itertools.product(range(10), range(10)):
        assert torch.equal(moves[i][moves[j]], moves[table[i, j]])


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ((3,), "sizes of cycles whose product divides 8"),
        (("dihedra",), "expected 'dihedral'"),
        ((torch.zeros(8, 8),), r"expected integers \[8, 8\]"),
        ((torch.zeros(8, 8, dtype=torch.int64),), "expected products of a group"),
        (((torch.arange(8)[:, None] - torch.arange(8)) % 8,), "expected products of a group"),
    ],
)
def test_what_is_no_group(group, error):
    with pytest.raises(ValueError, match=error):
        GroupAlgebra.zeros(8, *group)
    with pytest.raises(ValueError, match="expected an even size, got 7"):
        GroupAlgebra.zeros(7, "dihedral")


def test_a_loop_that_is_not_associative_is_no_group():
    """A Latin square with a neutral element: the smallest such has five."""
    loop = [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]]
    with pytest.raises(ValueError, match="expected associative products"):
        GroupAlgebra.zeros(5, torch.tensor(loop))


def test_the_inverse_of_ones_is_the_moebius_function():
    n = 30
    zeta = parse("incidence(divisors)")(n, **DTYPE).map(torch.ones_like)
    expected = [
        1,
        -1,
        -1,
        0,
        -1,
        1,
        -1,
        0,
        0,
        1,
        -1,
        0,
        -1,
        1,
        1,
        0,
        -1,
        0,
        -1,
        0,
        1,
        1,
        -1,
        0,
        0,
        1,
        0,
        0,
        -1,
        -1,
    ]
    assert_close(zeta.inverse()[..., 0, :], torch.tensor(expected, **DTYPE), "mu")


@pytest.mark.parametrize(
    ("order", "related"),
    [
        ("divisors", lambda i, j: (j + 1) % (i + 1) == 0),
        ("subsets", lambda i, j: set_bits(i) <= set_bits(j)),
        ("ancestors", lambda i, j: i in path_to_root(j)),
    ],
)
def test_orders(order, related):
    n = 40
    A = parse(f"incidence({order})")(n).map(torch.ones_like).to_dense()
    expected = torch.tensor([[float(related(i, j)) for j in range(n)] for i in range(n)])
    assert torch.equal(A, expected)


def set_bits(i):
    return {bit for bit in range(8) if i >> bit & 1}


def path_to_root(j):
    return {j} | (path_to_root((j - 1) // 2) if j else set())


def test_any_order_and_preorder():
    """Chains give triangular matrices, an equivalence block-diagonal ones."""
    chain = torch.ones(5, 5).triu().bool()
    blocks = torch.arange(5)[:, None] // 2 == torch.arange(5) // 2
    for mask, spec in ((chain, "upper_triangular"), (blocks, "block_diagonal(2)")):
        S = normal(5, 5)
        A, B = Incidence.zeros(5, mask, **DTYPE), parse(spec)(5, **DTYPE)
        assert_close(A.project(S + S.mT), B.project(S + S.mT).to_dense(), spec)


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("divisor", "expected one of"),
        (torch.eye(3), "expected a boolean tensor"),
        (torch.zeros(3, 3).bool(), "expected a reflexive and transitive relation"),
        (torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool(), "expected a reflexive and"),
    ],
)
def test_what_is_no_order(order, error):
    with pytest.raises(ValueError, match=error):
        Incidence.zeros(3, order)


def test_hypercomplex_products():
    one, i, j, k = (Hypercomplex(row[None]) for row in torch.eye(4, **DTYPE))
    for found, expected in ((i @ j, k), (j @ k, i), (k @ i, j), (i @ i, -one), (j @ i, -k)):
        assert torch.equal(found.q, expected.q)
    z, w = normal(5, 2), normal(5, 2, seed=1)
    product = torch.view_as_real(torch.view_as_complex(z) * torch.view_as_complex(w))
    assert_close((Hypercomplex(z) @ Hypercomplex(w)).q, product, "complex product")
    exponential = torch.view_as_real(torch.view_as_complex(z).exp())
    assert_close(Hypercomplex(z).exp().q, exponential, "complex exponential")


def test_hypercomplex_sizes():
    for wrong in (lambda: Hypercomplex(torch.ones(2, 3)), lambda: Hypercomplex.zeros(6, 3)):
        with pytest.raises(ValueError, match="expected d = 2 or 4, got 3"):
            wrong()
    with pytest.raises(ValueError, match="expected a size divisible by 4, got 6"):
        parse("quaternions")(6)


@pytest.mark.parametrize("n", [0, 1, 6, 7])
def test_centrosymmetric_matrices_commute_with_the_reversal(n):
    A = parse("centrosymmetric").randn(n, **DTYPE).to_dense()
    assert_close(A.flip(-2, -1), A, "J A J")
    assert parse("centrosymmetric")(n).numel() == (n * n + n % 2) // 2
    M = normal(n, n)
    nearest = parse("centrosymmetric").from_dense(M)
    assert_close(nearest, (M + M.flip(-2, -1)) / 2, "mean")


def test_kron_of_members():
    A, C = parse("lower_triangular").randn(4, **DTYPE), parse("circulant").randn(3, **DTYPE)
    P = Kron.product(A, C)
    assert P.layout == parse("kron(lower_triangular, circulant, 3)")(12, **DTYPE).layout
    assert_close(P, Kronecker(A, C).to_dense(), "A (x) C")
    assert_close(P.inverse(), Kronecker(A, C).inverse().to_dense(), "inverse")
    assert "LowerTriangular(4; R: 5 x 2) (x) Circulant(3; c: 3)" in repr(P)


@pytest.mark.parametrize(
    ("spec", "same", "n"),
    [
        ("kron(scaled_identity, lower_triangular, 3)", "tied(4, lower_triangular)", 12),
        ("kron(diagonal, dense, 3)", "block_diagonal(3)", 12),
        ("kron(circulant, dense, 2)", "block_circulant(2)", 12),
        ("kron(dense, diagonal, 4)", "strided(4, dense)", 12),
        ("kron(scaled_identity, complex_numbers, 12)", "complex_numbers", 12),
    ],
)
def test_kron_holds_other_compositions(spec, same, n):
    M = normal(n, n)
    for name in ("project", "orthogonal_project"):
        found, expected = (getattr(parse(s)(n, **DTYPE), name)(M + M.mT) for s in (spec, same))
        assert found.numel() == expected.numel()
        assert_close(found, expected.to_dense(), name)


def test_kron_takes_no_static_tensors():
    with pytest.raises(ValueError, match="expected structures without static tensors"):
        parse("kron(dense, incidence(divisors), 3)")(6)


def test_structures_change_into_each_other():
    A = parse("block_circulant(2)").randn(6, **DTYPE)
    again = A.to_structure("dense").to_structure("block_circulant(2)")
    assert isinstance(again, BlockCirculant)
    assert_close(again, A.to_dense(), "there and back")
    P = Kronecker(parse("dense").randn(2), parse("diagonal").randn(3))
    assert_close(P.to_structure("strided(3, dense)"), P.to_dense(), "a product in a space")


@pytest.mark.parametrize("spec", [*SPECS, *FURTHER, *(f"incidence({o})" for o in ORDERS)])
def test_the_default_device_is_that_of_members_alone(spec):
    """Tables that are made beside them are where they are, on any device."""
    n, X = 240, normal(240, 2)
    with torch.device("meta"):
        assert parse(spec)(n).device.type == "meta"
        A = parse(spec)(n, device="cpu", dtype=torch.float64).add_scaled_identity(2.0)
        found = (A.apply(X), A.mT.apply(X), A.solve(X), A.project_gram(X).apply(X))
    A = parse(spec).identity(n, dtype=torch.float64) * 2
    for mine, theirs in zip(found, (2 * X, 2 * X, X / 2, A.project_gram(X).apply(X)), strict=True):
        assert_close(mine, theirs, spec)
