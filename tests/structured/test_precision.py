"""Sums of many numbers in low precision: accumulated in float32 at least."""

import pytest
import torch

from structured import Kronecker, Outer, Product, Sum, parse

SPECS = [
    "dense",
    "diagonal",
    "scaled_identity",
    "block_diagonal(30)",
    "lower_triangular",
    "upper_triangular",
    "lower_toeplitz",
    "upper_toeplitz",
    "circulant",
    "block_circulant(3)",
    "hierarchical(15, 15)",
    "low_rank_upper(-15)",
    "direct_sum(dense, lower_toeplitz, 500)",
    "transposed(low_rank_lower(15))",
    "tied(2, diagonal)",
    "strided(2, lower_triangular)",
    "rotated(lower_triangular, hadamard)",
]
N = 600  # a sum of ones in bfloat16 stops at 256

OPERATIONS = {
    "apply": lambda A, X, S: A.apply(X),
    "apply_transpose": lambda A, X, S: A.apply_transpose(X),
    "matmul": lambda A, X, S: A.matmul(A),
    "project": lambda A, X, S: A.project(S),
    "orthogonal_project": lambda A, X, S: A.orthogonal_project(S),
    "project_gram": lambda A, X, S: A.project_gram(X),
    "orthogonal_project_gram": lambda A, X, S: A.orthogonal_project_gram(X),
    "gram": lambda A, X, S: A.gram(),
    "trace": lambda A, X, S: A.trace(),
    "frobenius_norm": lambda A, X, S: A.frobenius_norm(),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sums(dtype, operation, spec):
    """Off by a few roundings of the largest number, however many are added."""
    n = N
    generator = torch.Generator().manual_seed(0)

    def positive(t):
        return torch.rand(t.shape, generator=generator, dtype=torch.float64).add(0.5).to(dtype)

    A = parse(spec)(n, dtype=torch.float64).map(positive)
    X = positive(torch.empty(n, 600)) / 16  # float16 ends at 65504
    S = positive(torch.empty(n, n))
    S = torch.maximum(S, S.mT)
    compute = OPERATIONS[operation]
    low = compute(A, X, S)
    exact = compute(A.to(torch.float64), X.double(), S.double())
    for ours, theirs in zip(tensors(low), tensors(exact), strict=True):
        assert ours.dtype == dtype
        if ours.numel():
            scale = theirs.abs().max()
            error = (ours.double() - theirs).abs().max() / scale
            assert error <= 8 * torch.finfo(dtype).eps / 2


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else result.tensors()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_sums_of_squares_of_long_rows(dtype, gradient):
    """By another way where rows are contiguous and many, but not where a gradient is wanted."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(8, 50_000, generator=generator, dtype=torch.float64).to(dtype)
    X.requires_grad_(gradient)
    found = parse("diagonal")(8, dtype=dtype).project_gram(X).d
    assert found.dtype == dtype
    expected = X.detach().double().square().sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)
    assert found.requires_grad == gradient


def thirds(spec, dtype, n=N):
    """Nearly of determinant 1, where the structure has a diagonal of its own."""
    d = torch.tensor([3.0, 1 / 3], dtype=torch.float64).repeat_interleave(n // 2)
    return parse(spec).from_dense(torch.diag(d)).to(dtype)


COMBINED = {
    "sum": lambda dtype: Sum(thirds("diagonal", dtype), 0.5 * thirds("block_diagonal(6)", dtype)),
    "product": lambda dtype: Product(*[thirds("diagonal", dtype)] * 5),
    "outer": lambda dtype: thirds("lower_triangular", dtype).outer(),
    "arrow": lambda dtype: thirds("hierarchical(2, 2)", dtype).outer(),
    "kronecker": lambda dtype: Kronecker(*[thirds("diagonal", dtype, 40)] * 2),
    "nested": lambda dtype: Product(*[Outer(Sum(thirds("diagonal", dtype)))] * 3),
    **{spec: lambda dtype, spec=spec: thirds(spec, dtype) for spec in SPECS},
    **{
        spec: lambda dtype, spec=spec: thirds(spec, dtype)
        for spec in (
            *("incidence(divisors)", "quaternions", "group_algebra(2)", "centrosymmetric"),
            *("kron(diagonal, dense, 2)", "block_lower(diagonal, strided(2, diagonal), 300)"),
        )
    },
}


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logarithms_are_rounded_once(name, dtype):
    A = COMBINED[name](dtype)
    found, exact = A.logdet(), A.to(torch.float64).logdet()
    assert found.dtype == dtype
    rtol = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=2e-3)
