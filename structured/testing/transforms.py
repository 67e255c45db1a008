"""The laws of transforms: an operation may be transformed in one operand, the others as they are.

Written as in ``laws.py``, for one set of seeded numbers, for every operation in each operand alone.
Memory that is made for one operand holds neither the derivatives of another nor its hidden
dimension: such faults only show where a single operand is differentiated or mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from structured._core import defaults
from structured._core.spec import Structure
from structured.testing.laws import assert_close
from structured.testing.operations import OPERATIONS, dense_of, tensors_of
from structured.testing.strategies import Operands

WIDE = 1 << 18  # numbers of X: 2 MB, more than a panel in a cache

Function = Callable[[Operands, Tensor], Any]

# What the operations leave out: numbers that are tensors.
OF_SCALARS: dict[str, Function] = {
    "A + c I": lambda o, c: o.A.add_scaled_identity(c),
    "c * A": lambda o, c: c * o.A,
    "A / c": lambda o, c: o.A / c,
}


class Case(NamedTuple):
    """An operation and one of its operands, the tensors at ``places`` among all."""

    name: str
    function: Callable[[Sequence[Tensor]], list[Tensor]]
    places: slice

    def of(self, tensors: Sequence[Tensor], some: Sequence[Tensor]) -> list[Tensor]:
        """The result with the tensors of the operand replaced."""
        given = list(tensors)
        given[self.places] = some
        return self.function(given)


def backward(structure: Structure, sizes: Sequence[int]) -> None:
    """Derivatives in one operand are the same if only that one is differentiated."""
    tensors, cases = _cases(structure, sizes)
    for case in cases:
        if case.name.startswith("max_abs"):
            continue  # no derivative where two entries tie
        everything = [t.detach().requires_grad_() for t in tensors]
        expected = _gradients(case, everything, everything[case.places])
        for t, mine in zip(
            expected, _gradients(case, tensors, everything[case.places]), strict=True
        ):
            assert_close(mine, t, f"derivative of {case.name} alone", 1e-9)


def forward(structure: Structure, sizes: Sequence[int]) -> None:
    """Forward and backward derivatives agree, in each operand alone."""
    tensors, cases = _cases(structure, sizes)
    for case in cases:
        if case.name.startswith("max_abs"):
            continue
        some = tensors[case.places]
        tangents = [torch.ones_like(t) for t in some]
        everything = [t.detach().requires_grad_() for t in tensors]
        gradients = _gradients(case, everything, everything[case.places])
        expected = sum((g.sum() for g in gradients), torch.zeros((), dtype=some[0].dtype))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(some, tangents, strict=True)]
            found = torch.zeros_like(expected)
            for part in case.of(tensors, duals):
                tangent = forward_ad.unpack_dual(_weighted(part)).tangent
                found = found if tangent is None else found + tangent
            found = found.clone()
        assert_close(found, expected, f"forward derivative of {case.name} alone", 1e-9)


def mapped(structure: Structure, sizes: Sequence[int]) -> None:
    """``vmap`` over one operand is the stack of results, the other operands shared."""
    tensors, cases = _cases(structure, sizes)
    for case in cases:
        stacks = [torch.stack([t, 2 * t]) for t in tensors[case.places]]
        found = torch.func.vmap(lambda *some, case=case: case.of(tensors, some))(*stacks)
        for index in range(2):
            one = case.of(tensors, [t[index] for t in stacks])
            for all_, each in zip(found, one, strict=True):
                assert_close(all_[index], each, f"vmap of {case.name} alone", 1e-9)


def autocast(structure: Structure, sizes: Sequence[int]) -> None:
    """Autocast changes nothing: members keep one dtype, and their precision."""
    tensors, cases = _cases(structure, sizes, dtype=torch.float32)
    for case in cases:
        expected = case.function(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = case.function(tensors)
        for mine, t in zip(found, expected, strict=True):
            assert_close(mine, t, f"{case.name} under autocast", 1e-6)


def large(structure: Structure, sizes: Sequence[int]) -> None:
    """Products with many columns, and their derivatives, are those of the dense matrix."""
    n = max(size for size in (*sizes, 24 if 24 % max(sizes) == 0 else 0) if size <= 24)
    if not n:
        return
    operands, _ = _seeded(structure, n, ())
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, WIDE // n + 1, dtype=torch.float64, generator=generator)
    for name in ("apply", "apply_transpose"):
        results = []
        for dense in (False, True):
            leaves = [t.detach().requires_grad_() for t in (*operands.A.tensors(), X)]
            A, Y = operands.A.with_tensors(leaves[:-1]), leaves[-1]
            M = A.to_dense()
            product = (M if name == "apply" else M.mT) @ Y if dense else getattr(A, name)(Y)
            gradients = torch.autograd.grad(product.sum(), leaves)
            plain = getattr(operands.A, name)(X)
            results.append([product.detach(), *gradients, plain])
        for mine, t in zip(*results, strict=True):
            assert_close(mine, t, f"{name} with {X.shape[-1]} columns", 1e-9)
    expected = operands.A.project(X @ X.mT).to_dense()
    assert_close(
        operands.A.project_gram(X), expected, f"project_gram of {X.shape[-1]} columns", 1e-9
    )


def first_use(structure: Structure, sizes: Sequence[int]) -> None:
    """What is found at the first use is the same within any transform or mode, and stays usable."""
    operands, _ = _seeded(structure, _size(sizes), ())
    S, A = operands.S, operands.A

    def use(S: Tensor) -> list[Tensor]:
        members = (A.project(S), A.orthogonal_project(S), A.matmul(A))
        return [t for member in members for t in member.tensors()]

    def faked(S: Tensor) -> None:
        with FakeTensorMode() as mode:
            fake = A.map(mode.from_tensor).map_static(mode.from_tensor)
            fake.project(mode.from_tensor(S))

    def inferred(S: Tensor) -> None:
        with torch.inference_mode():
            use(S)

    ways: dict[str, Callable[[Tensor], Any]] = {
        "inference mode": inferred,
        "vmap": lambda S: torch.func.vmap(use)(torch.stack([S, S])),
        "jacfwd": torch.func.jacfwd(use),
        "hessian": torch.func.hessian(lambda S: A.project(S).frobenius_norm()),
        "fake tensors": faked,
    }
    expected: list[Tensor] = []
    for name, way in ways.items():
        defaults.forget()
        way(S)
        leaf = S.detach().requires_grad_()
        again = use(leaf)
        sum((t.sum() for t in again), torch.zeros(())).backward()
        expected = expected or [t.detach() for t in again]
        for mine, t in zip(again, expected, strict=True):
            assert_close(mine.detach(), t, f"after a first use within {name}")


def dynamic(structure: Structure, sizes: Sequence[int]) -> None:
    """What is compiled for some columns serves others, without a graph break."""
    names = ("apply", "apply_transpose", "project_gram", "solve", "outer")

    def some(A: Any, K: Any, X: Tensor) -> dict[str, Any]:
        operands = Operands(A, A, K, X, X)
        return {name: OPERATIONS[name].compute(operands) for name in names}

    torch._dynamo.reset()
    function = torch.compile(some, fullgraph=True, backend="aot_eager")
    operands, _ = _seeded(structure, _size(sizes), ())
    for columns in (3, 5, 9):
        X = torch.randn(operands.A.n, columns, dtype=torch.float64)
        try:
            found = function(operands.A, operands.K, X)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise AssertionError(f"torch.compile, {columns} columns: {error}") from error
        for name, expected in some(operands.A, operands.K, X).items():
            assert_close(dense_of(found[name]), dense_of(expected), f"compiled {name}")


def _cases(
    structure: Structure, sizes: Sequence[int], dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Iterator[Case]]:
    """Seeded operands as a list of tensors, and every operation with each of its operands."""
    operands, c = _seeded(structure, _size(sizes), (2,))
    tensors = [t.to(dtype) for t in (*operands.tensors(), c)]
    operands = operands.to(dtype)

    def cases() -> Iterator[Case]:
        stop, places = 0, {}
        for letter in "ABK":
            start, stop = stop, stop + len(getattr(operands, letter).tensors())
            places[letter] = slice(start, stop)
        places |= {letter: slice(stop + i, stop + i + 1) for i, letter in enumerate("XSc")}
        for name in (*OPERATIONS, *OF_SCALARS):

            def function(given: Sequence[Tensor], name: str = name) -> list[Tensor]:
                some, c = operands.with_tensors(given[:-1]), given[-1]
                of_c = OF_SCALARS.get(name)
                return tensors_of(of_c(some, c) if of_c else OPERATIONS[name].compute(some))

            for letter, where in places.items():
                yield Case(f"{name} in {letter}", function, where)

    return tensors, cases()


def _size(sizes: Sequence[int]) -> int:
    return 6 if 6 in sizes else max(sizes)


def _seeded(structure: Structure, n: int, batch: tuple[int, ...]) -> tuple[Operands, Tensor]:
    """Random operands, and a positive number."""
    generator = torch.Generator().manual_seed(0)

    def random(t: Tensor) -> Tensor:
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    zero = structure(n, batch_shape=batch, dtype=torch.float64)
    K = zero.map(random).add_scaled_identity(32.0)
    X, M = (random(torch.empty(*batch, n, m, dtype=torch.float64)) for m in (3, n))
    operands = Operands(zero.map(random), zero.map(random), K, X, M + M.mT)
    return operands, torch.tensor(1.5, dtype=torch.float64)


def _weighted(t: Tensor) -> Tensor:
    """A sum whose derivative differs from entry to entry."""
    weights = torch.arange(t.numel(), dtype=t.dtype).reshape(t.shape).cos()
    return (weights * t).sum()


def _gradients(case: Case, tensors: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the weighted sum of the results in ``leaves``, zeros where it does not depend on them."""
    parts = [_weighted(t) for t in case.of(tensors, leaves)]
    total = sum(parts, torch.zeros((), dtype=leaves[0].dtype))
    if not total.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


TRANSFORMS = (backward, forward, mapped, autocast, large, first_use, dynamic)
