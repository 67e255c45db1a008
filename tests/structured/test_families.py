"""The further families: each fast method against the default through ``to_dense``, and SciPy."""

import itertools
import math

import pytest
import scipy.fft
import scipy.linalg
import torch

from structured import Dense, Rotated, StructuredMatrix, Tied, parse
from structured.testing import check
from structured.toeplitz import fft_length

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def rotation(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q


def in_random_basis(n, **kwargs):
    """A structure given as a callable: a rotated one whose Q is a tensor."""
    return Rotated.zeros(n, "lower_triangular", QS[n], **kwargs)


QS = {n: rotation(n) for n in range(13)}

SPECS = [
    "lower_triangular",
    "upper_triangular",
    "scaled_identity",
    "circulant",
    "block_circulant(2)",
    "block_circulant(3)",
    "direct_sum(dense, lower_toeplitz, 2)",
    "direct_sum(diagonal, circulant, -3)",
    "tied(2, dense)",
    "tied(3, lower_triangular)",
    "strided(2, dense)",
    "strided(3, upper_toeplitz)",
    "strided(2, scaled_identity)",
    "rotated(diagonal, hadamard)",
    "rotated(lower_triangular, cosine)",
    "rotated(block_diagonal(2), cosine)",
    "transposed(rotated(lower_toeplitz, hadamard))",
    "block_upper(dense, block_lower(block_upper(diagonal, dense, -2), lower_toeplitz, 5), 3)",
    "direct_sum(tied(2, strided(2, dense)), rotated(diagonal, cosine), 4)",
    "tied(2, direct_sum(dense, rotated(lower_triangular, hadamard), 1))",
    "strided(2, tied(2, block_upper(dense, scaled_identity, 1)))",
    "rotated(strided(2, direct_sum(upper_triangular, circulant, 2)), hadamard)",
    "block_lower(strided(3, lower_triangular), tied(2, upper_triangular), -6)",
    in_random_basis,
]
SIZES = [0, 1, 2, 3, 4, 6, 7, 8, 12]
BATCHES = [(), (2, 3)]


def exists(structure, n):
    """Whether the counts of ``structure`` divide ``n``."""
    try:
        parse(structure)(n)
    except ValueError:
        return False
    return True


def draw(structure, n, batch_shape=(), seed=0, dtype=torch.float64):
    """A member with small integers."""
    zero = parse(structure)(n, batch_shape=batch_shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return zero.map(lambda t: torch.randint(-4, 5, t.shape, generator=generator).to(t))


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def invertible(structure, n, batch_shape=()):
    """A member far from singular: the identity and a little more."""
    A = draw(structure, n, batch_shape)
    return (A / (8 * max(n, 1))).add_scaled_identity(1.0)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def same_member(actual, expected):
    assert actual.layout == expected.layout
    same(actual.to_dense(), expected.to_dense())


by_structure = pytest.mark.parametrize("structure", SPECS, ids=lambda s: getattr(s, "__name__", s))


def everywhere(law):
    """Check a law for every structure, at every size that it has, with every batch shape."""

    def test(structure):
        for n, batch in itertools.product(SIZES, BATCHES):
            if exists(structure, n):
                law(structure, n, batch)

    return by_structure(test)


@everywhere
def test_shape_and_transpose(structure, n, batch):
    A = draw(structure, n, batch)
    dense = A.to_dense()
    assert A.shape == dense.shape == (*batch, n, n)
    same(A.mT.to_dense(), dense.mT)
    same(A.mT.mT.to_dense(), dense)


@everywhere
def test_products(structure, n, batch):
    A, B = draw(structure, n, batch), draw(structure, n, batch, seed=1)
    same((A @ B).to_dense(), A.to_dense() @ B.to_dense())
    X = integers(n, 2)
    same(A @ X, A.to_dense() @ X)
    same(A.apply_transpose(X), A.to_dense().mT @ X)
    X = integers(*batch, n, 0)
    assert (A @ X).shape == A.apply_transpose(X).shape == X.shape
    A, X = draw(structure, n), integers(*batch, n, 3)
    same(A @ X, A.to_dense() @ X)
    same(A.apply_transpose(X), A.to_dense().mT @ X)


@everywhere
def test_projections(structure, n, batch):
    A, X = draw(structure, n), integers(*batch, n, 4)
    S, M = X + X.mT if n == 4 else X @ X.mT, integers(*batch, n, n, seed=1)
    same_member(A.project(S), StructuredMatrix.project(A, S))
    same_member(A.project_gram(X), StructuredMatrix.project(A, X @ X.mT))
    same_member(A.orthogonal_project(M), StructuredMatrix.orthogonal_project(A, M))
    X = integers(*batch, n, 0)
    same_member(A.project_gram(X), StructuredMatrix.project(A, X @ X.mT))


@everywhere
def test_gram(structure, n, batch):
    A = draw(structure, n, batch)
    same_member(A.gram(), StructuredMatrix.project(A, A.to_dense().mT @ A.to_dense()))


@everywhere
def test_scalars(structure, n, batch):
    A = draw(structure, n, batch)
    for method in ("trace", "max_abs", "frobenius_norm"):
        same(getattr(A, method)(), getattr(StructuredMatrix, method)(A))


@everywhere
def test_identity(structure, n, batch):
    A = draw(structure, n, batch)
    eye = torch.eye(n, dtype=torch.float64)
    same(A.add_scaled_identity(2.0).to_dense(), A.to_dense() + 2 * eye)
    alpha = integers(*batch)
    same(A.add_scaled_identity(alpha).to_dense(), A.to_dense() + alpha[..., None, None] * eye)


@everywhere
def test_solve_and_logdet(structure, n, batch):
    A = invertible(structure, n, batch)
    for X in (integers(n, 2), integers(*batch, n, 2)):
        same(A.solve(X), torch.linalg.solve(A.to_dense(), X))
    same(A.logdet(), torch.linalg.slogdet(A.to_dense()).logabsdet)
    A, X = invertible(structure, n), integers(*batch, n, 2)
    same(A.solve(X), torch.linalg.solve(A.to_dense(), X))


@everywhere
def test_closed_under_transpose_is_the_truth(structure, n, batch):
    A = draw(structure, n, batch)
    transposed = A.to_dense().mT
    near = torch.allclose(A.orthogonal_project(transposed).to_dense(), transposed)
    assert near or not A.closed_under_transpose
    if n == 12 and not batch:
        assert A.closed_under_transpose == near


@by_structure
def test_gradients(structure):
    A = draw(structure, 12)
    X, S = integers(12, 2), integers(12, 12)

    def everything(*tensors):
        B = invertible(structure, 12).with_tensors(tensors)
        parts = [B @ X, B.apply_transpose(X), B.solve(X), B.to_dense()]
        members = [B @ B, B.gram(), B.add_scaled_identity(B.trace()), B.project_gram(B @ X)]
        parts += [C.to_dense() for C in members] + [B.logdet(), B.frobenius_norm()]
        return torch.cat([part.flatten() for part in parts])

    tensors = [t.clone().requires_grad_() for t in invertible(structure, 12).tensors()]
    assert torch.autograd.gradcheck(everything, tensors, fast_mode=True)
    X.requires_grad_()
    assert torch.autograd.gradcheck(lambda X: A.project_gram(X).to_dense(), X, fast_mode=True)
    S = (S + S.mT).requires_grad_()
    assert torch.autograd.gradcheck(lambda S: A.project(S).to_dense(), S, fast_mode=True)


@by_structure
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(structure, dtype):
    A = draw(structure, 12, (2,), dtype=dtype)
    B = draw(structure, 12, (2,), seed=1, dtype=dtype)
    unit = torch.finfo(dtype).eps
    X = integers(2, 12, 3).to(dtype)

    def close(low, high):
        assert low.dtype == dtype
        scale = high.abs().amax().clamp(min=1)
        assert ((low.double() - high).abs() <= 16 * unit * scale).all()

    wide = [C.to(torch.float64) for C in (A, B)]
    Y = X.double()
    close((A @ B).to_dense(), (wide[0] @ wide[1]).to_dense())
    close(A @ X, wide[0] @ Y)
    close(A.apply_transpose(X), wide[0].apply_transpose(Y))
    close(A.gram().to_dense(), wide[0].gram().to_dense())
    close(A.project_gram(X).to_dense(), wide[0].project_gram(Y).to_dense())
    close(A.trace(), wide[0].trace())
    I8 = (A / 128).add_scaled_identity(1.0)
    close(I8.solve(X), I8.to(torch.float64).solve(Y))
    close(I8.logdet(), I8.to(torch.float64).logdet())


@pytest.mark.parametrize("spec", [s for s in SPECS if isinstance(s, str)])
def test_specs_round_trip(spec):
    assert str(parse(spec)) == spec
    assert parse(str(parse(spec))) == parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "block_upper(dense, transposed(transposed(dense)), 2)",
        "transposed(direct_sum(transposed(lower_triangular), diagonal, 2))",
    ],
)
def test_transposes_of_transposes_stay_what_they_are(spec):
    check(spec, laws=["gram"])


# Against SciPy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_triangular_against_scipy(n):
    L = integers(n, n).tril() + 9 * torch.eye(n).double()
    X = integers(n, 2)
    A = draw("lower_triangular", n).orthogonal_project(L)
    assert sum(t.numel() for t in A.tensors()) == n * (n + 1) // 2
    same(A.to_dense(), L)
    same(A.solve(X), torch.from_numpy(scipy.linalg.solve_triangular(L, X, lower=True)))
    U = draw("upper_triangular", n).orthogonal_project(L.mT)
    same(U.to_dense(), L.mT)
    same(U.solve(X), torch.from_numpy(scipy.linalg.solve_triangular(L.mT, X)))


@pytest.mark.parametrize("n", SIZES[1:])
def test_circulant_against_scipy(n):
    A = invertible("circulant", n)
    X = integers(n, 2)
    same(A.to_dense(), torch.from_numpy(scipy.linalg.circulant(A.c)))
    same(A.solve(X), torch.from_numpy(scipy.linalg.solve_circulant(A.c, X)))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_block_circulant_is_a_sum_of_kronecker_products(p):
    A = draw("block_circulant(2)", 2 * p)
    expected = sum(
        torch.kron(torch.from_numpy(scipy.linalg.circulant(torch.eye(p).double()[i])), A.blocks[i])
        for i in range(p)
    )
    same(A.to_dense(), expected)


@pytest.mark.parametrize("n", SIZES)
def test_toeplitz_against_scipy(n):
    A = invertible("lower_toeplitz", n)
    X = integers(n, 2)
    row = torch.zeros(n)
    if n:
        row[0] = A.t[0]
        same(A @ X, torch.from_numpy(scipy.linalg.matmul_toeplitz((A.t, row), X)))
        same(A.solve(X), torch.from_numpy(scipy.linalg.solve_toeplitz((A.t, row), X)))
        same(A.to_dense(), torch.from_numpy(scipy.linalg.toeplitz(A.t, row)))


def test_sums_and_ties_against_scipy():
    A = draw("direct_sum(dense, lower_triangular, 3)", 7)
    same(A.to_dense(), torch.from_numpy(scipy.linalg.block_diag(A.A.to_dense(), A.C.to_dense())))
    A = draw("tied(3, dense)", 12)
    same(A.to_dense(), torch.from_numpy(scipy.linalg.block_diag(*[A.A.to_dense()] * 3)))
    A = draw("strided(3, dense)", 12)
    for i in range(12):
        for j in range(12):
            entry = A.A.M[i % 3, i // 3, j // 3] if i % 3 == j % 3 else torch.tensor(0.0).double()
            same(A.to_dense()[i, j], entry)


@pytest.mark.parametrize("n", SIZES[1:])
def test_fast_bases_against_scipy(n):
    I = torch.eye(n, dtype=torch.float64)
    C = Rotated(Dense(I), "cosine")
    dct = torch.from_numpy(scipy.fft.dct(I.numpy(), norm="ortho", axis=0))
    same(C.unrotate(I), dct)
    same(C._rotate(I), dct.mT)
    sizes = [2**i for i in range(4) if n >> i & 1][::-1]
    blocks = [scipy.linalg.hadamard(size) / math.sqrt(size) for size in sizes]
    H = torch.from_numpy(scipy.linalg.block_diag(*blocks))
    same(Rotated(Dense(I), "hadamard")._rotate(I), H)


# Particular to one structure --------------------------------------------------------------------


def test_an_fft_has_the_least_smooth_length():
    smooth = {2**a * 3**b * 5**c for a in range(8) for b in range(6) for c in range(5)}
    for n in range(64):
        assert fft_length(n) == min(k for k in smooth if k >= 2 * n - 1)


def test_circulants_commute():
    A, B = draw("circulant", 12), draw("circulant", 12, seed=1)
    same((A @ B).c, (B @ A).c)


def test_a_basis_may_differ_along_the_batch():
    Q = torch.stack([rotation(4, seed) for seed in (1, 2)])
    A = draw("lower_triangular", 4, (2,))
    B = Rotated(A, Q)
    X = integers(4, 3)
    for i in range(2):
        one = Rotated(A.map(lambda t, i=i: t[i]), Q[i])
        same(one.to_dense(), Q[i] @ one.A.to_dense() @ Q[i].mT)
        same(B.to_dense()[i], one.to_dense())
        same((B @ X)[i], one @ X)
        same(B.project_gram(X).to_dense()[i], one.project_gram(X).to_dense())
        same((B @ B).to_dense()[i], (one @ one).to_dense())


def test_the_size_is_part_of_a_scaled_identity():
    with pytest.raises(ValueError, match="two members of one structure"):
        draw("scaled_identity", 3) + draw("scaled_identity", 4)


def test_bases_are_part_of_the_structure():
    A = draw("diagonal", 4)
    with pytest.raises(ValueError, match="two members of one structure"):
        Rotated(A, "cosine") + Rotated(A, "hadamard")
    with pytest.raises(ValueError, match="two members of one structure"):
        Rotated(A, rotation(4)) @ Rotated(A, -rotation(4))
    with pytest.raises(ValueError, match="two members of one structure"):
        Rotated(A, rotation(4)) + Rotated(A, "cosine")
    moved = Rotated(A, rotation(4)).to(torch.float32)
    same_member(moved + Rotated(A, rotation(4)).to(torch.float32), 2 * moved)


@pytest.mark.parametrize("word", ["tied", "strided"])
def test_a_count_must_divide_the_size(word):
    with pytest.raises(
        ValueError, match=rf"divisible by 3, got 7; direct_sum\({word}\(3, A\), C, 6"
    ):
        parse(f"{word}(3, dense)")(7)
    for k in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="expected an integer k >= 1"):
            Tied.zeros(6, k, "dense")
    assert parse(f"direct_sum({word}(3, dense), dense, 6)")(7).n == 7


def test_unknown_bases():
    A = draw("diagonal", 4)
    with pytest.raises(ValueError, match="did you mean 'hadamard'"):
        parse("rotated(diagonal, hadamad)")
    with pytest.raises(ValueError, match="expected one of"):
        Rotated(A, "fourier")
    with pytest.raises(ValueError, match=r"expected Q \[..., 4, 4\], got \[3, 3\]"):
        Rotated(A, rotation(3))
    with pytest.raises(TypeError, match="expected a tensor or a structured matrix, got int"):
        Rotated(4, "cosine")
    with pytest.raises(TypeError, match="expected a name, a tensor or an operator, got int"):
        Rotated(A, 3)
    with pytest.raises(ValueError, match="got 'cosine'"):
        parse("cosine")


@pytest.mark.parametrize(
    "spec",
    [
        "scaled_identity",
        "circulant",
        "direct_sum(diagonal, circulant, 5)",
        "tied(4, circulant)",
        "strided(4, diagonal)",
        "rotated(diagonal, cosine)",
        "rotated(diagonal, hadamard)",
    ],
)
def test_no_square_intermediate(spec):
    """Everything at a size whose square would take 8 TB."""
    A = parse(spec).identity(1 << 20)
    X = torch.ones(A.n, 1)
    torch.testing.assert_close((A @ A + A.gram()).apply(X), 2 * X)
    torch.testing.assert_close(A.solve(A.mT @ X), X)
    torch.testing.assert_close(A.project_gram(X).trace(), torch.tensor(float(A.n)))
    torch.testing.assert_close(A.logdet() / A.n, torch.tensor(0.0))
    torch.testing.assert_close(A.frobenius_norm(), torch.tensor(1024.0))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", SIZES)
def test_hierarchical_is_a_composition(n, batch):
    """The same space, numbers and operations as of the nested block-triangular structures."""
    A, B = (draw("hierarchical(2, 3)", n, batch, seed) for seed in (0, 1))
    nested = parse("block_upper(dense, block_lower(diagonal, dense, -3), 2)")(n, batch_shape=batch)
    a, b = (nested.to(A.dtype).orthogonal_project(M.to_dense()) for M in (A, B))
    X, S = integers(*batch, n, 3), integers(*batch, n, n)
    assert sum(t.numel() for t in A.tensors()) == sum(t.numel() for t in a.tensors())
    for ours, theirs in (
        (A, a),
        (A.matmul(B), a.matmul(b)),
        (A.project(S + S.mT), a.project(S + S.mT)),
        (A.project_gram(X), a.project_gram(X)),
        (A.gram(), a.gram()),
        (A.mT.gram().mT, a.mT.gram().mT),
    ):
        same(ours.to_dense(), theirs.to_dense())
    same(A.apply(X), a.apply(X))
    same(A.apply_transpose(X), a.apply_transpose(X))
