"""Negative powers of matrices, and roots by them, within transforms."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from structured import inverse_root
from structured._roots.power import inverse_power

GENERATOR = torch.Generator().manual_seed(0)
ROOTS = torch.randn(3, 8, 8, dtype=torch.float64, generator=GENERATOR)
EYE = torch.eye(8, dtype=torch.float64)
S = ROOTS @ ROOTS.mT + EYE


def symmetric(M):
    return (M + M.mH) / 2


@pytest.mark.parametrize("p", [0.5, 0.25])
@pytest.mark.parametrize("make", [lambda M: M, lambda M: torch.complex(M, (M - M.mT) / 9)])
def test_derivatives_forwards_backwards_and_of_stacks(make, p):
    M = make(S[:2, :4, :4]).clone()
    M = (M + M.mH).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda M: torch.view_as_real(inverse_power(symmetric(M), p) + 0j),
        M,
        check_forward_ad=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("p", [0.5, 0.25])
def test_jacobians_agree_where_eigenvalues_repeat(p):
    def power(M):
        return inverse_power(symmetric(M), p)

    for M in (EYE, S[0]):
        torch.testing.assert_close(jacfwd(power)(M), jacrev(power)(M))
    torch.testing.assert_close(jvp(power, (4 * EYE,), (EYE,))[1], -p * 4.0 ** (-p - 1) * EYE)


@pytest.mark.parametrize("spec", ["dense", "circulant", "block_circulant(2)", "quaternions"])
def test_roots_of_a_stack_by_vmap(spec):
    stacked = vmap(lambda M: inverse_root(spec, M).to_dense())(S)
    torch.testing.assert_close(stacked, inverse_root(spec, S).to_dense())
    slopes = vmap(grad(lambda M: inverse_root(spec, symmetric(M)).trace()))(S)
    M = S.clone().requires_grad_()
    inverse_root(spec, symmetric(M)).trace().sum().backward()
    torch.testing.assert_close(slopes, M.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by the compiler
def test_compiled_with_gradients():
    torch._dynamo.reset()
    compiled = torch.compile(lambda M: inverse_power(M, 0.25), fullgraph=True, backend="aot_eager")
    ours, theirs = (S.clone().requires_grad_() for _ in range(2))
    compiled(ours).square().sum().backward()
    inverse_power(theirs, 0.25).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


SECOND = {
    "hessian": hessian,
    "forward twice": lambda f: jacfwd(jacfwd(f)),
    "backward twice": lambda f: grad(lambda M: grad(f)(M).sum()),
}


@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives_are_refused(transform):
    """Not zeros."""
    with pytest.raises(NotImplementedError, match="expected first derivatives"):
        SECOND[transform](lambda M: inverse_power(symmetric(M), 0.5).square().sum())(S[0])


def test_what_is_iterated_asks_for_batch_dimensions():
    spec = "hierarchical(2, 3)"
    with pytest.raises(NotImplementedError, match="expected S with batch dimensions"):
        vmap(lambda M: inverse_root(f"transposed({spec})", M).to_dense())(S)
