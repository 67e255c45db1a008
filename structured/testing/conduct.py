"""The laws of good conduct: how members live with autograd, dtypes, batches, pytrees and errors.

Written as in ``_laws.py``. Most hold for every operation, and go through :data:`OPERATIONS`.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structured._core.matrix import StructuredMatrix
from structured._core.spec import Structure, parse
from structured.testing.laws import assert_close
from structured.testing.mistakes import errors
from structured.testing.operations import KINKED, OPERATIONS, dense_of, tensors_of
from structured.testing.strategies import Operands


def fresh(operands: Operands, dtype: torch.dtype) -> None:
    """Results share no memory with operands, and operands are left as they were."""
    operands = operands.to(dtype)
    before = [t._version for t in operands.tensors()]
    taken = {t.untyped_storage().data_ptr() for t in operands.tensors() if t.numel()}
    for name, operation in OPERATIONS.items():
        for t in tensors_of(operation.compute(operands)):
            shared = t.numel() and t.untyped_storage().data_ptr() in taken
            assert not shared, f"{name}: the result shares memory with an operand"
        after = [t._version for t in operands.tensors()]
        assert before == after, f"{name}: an operand was written to"


def batches(operands: Operands) -> None:
    """A batched operation is the stack of unbatched ones."""
    results = {name: operation.compute(operands) for name, operation in OPERATIONS.items()}
    for index in np.ndindex(*operands.A.batch_shape):
        one = operands.map(lambda t, index=index: t[index])  # type: ignore[misc]  # bound now
        for name, operation in OPERATIONS.items():
            expected = dense_of(operation.compute(one))
            assert_close(
                dense_of(results[name])[index], expected, f"{name} at {index} of the batch"
            )


def precision(operands: Operands) -> None:
    """Results keep the dtype, and are off by a few roundings to it and a float32 product.

    With ``u`` half the machine epsilon and the magnitude ``|op|(|A|, |X|)``, an entry may be off by
    ``8 u`` times the largest magnitude: a result and the partial results of three levels of nesting
    are each rounded once, two to a level. Sums and FFTs run in float32 or wider: they add
    ``8 log2(2n) u_32 n`` times the largest operands, the normwise bound of an FFT (Higham 2002,
    section 24.1), which no sum in bfloat16 would meet.
    """
    third = operands.map(lambda t: t / 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = third.to(dtype)
        exact = low.to(torch.float64)
        dense = _Magnitudes(exact)
        u, u32 = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        for name, operation in OPERATIONS.items():
            result = dense_of(operation.compute(low))
            assert result.dtype == dtype, f"{name}: expected {dtype}, got {result.dtype}"
            if not result.numel():
                continue
            expected = dense_of(operation.compute(exact))
            n = operands.A.n
            magnitude = operation.magnitude(dense)
            largest = float(magnitude.max()) if magnitude.numel() else 0.0
            wide = 8 * math.log2(2 * n + 2) * u32 * n * max(1.0, dense.largest) ** 2
            error = float((result.double() - expected).abs().max())
            bound = 8 * u * largest + wide
            assert error <= bound, f"{name} in {dtype}: off by {error:.3g}, bound {bound:.3g}"


class _Magnitudes:
    """The operands in absolute value, members as dense matrices."""

    def __init__(self, operands: Operands) -> None:
        self.A, self.B, self.K = (
            member.to_dense().abs() for member in (operands.A, operands.B, operands.K)
        )
        self.X, self.S = operands.X.abs(), operands.S.abs()

    @property
    def largest(self) -> float:
        parts = (self.A, self.B, self.X, self.S)
        return max(float(part.max()) if part.numel() else 0.0 for part in parts)


def gradients(operands: Operands) -> None:
    """Every operation is differentiable in every operand, by ``torch.autograd.gradcheck``.

    What has a kink is left out.
    """
    flat = torch.cat([t.flatten() for t in operands.tensors()]).requires_grad_()
    shapes = [t.shape for t in operands.tensors()]
    names = [name for name in OPERATIONS if name not in KINKED]

    def function(flat: Tensor, names: list[str] = names) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        rebuilt = operands.with_tensors([p.reshape(s) for p, s in zip(parts, shapes, strict=True)])
        results = (t for name in names for t in tensors_of(OPERATIONS[name].compute(rebuilt)))
        return torch.cat([t.flatten() for t in results]) + 0 * flat.sum()

    def differentiable(names: list[str]) -> bool:
        passes: bool = torch.autograd.gradcheck(
            lambda flat: function(flat, names), flat, fast_mode=True, raise_exception=False
        )
        return passes

    if not differentiable(names):  # all at once is fast, and one by one names the culprit
        culprits = [name for name in names if not differentiable([name])]
        raise AssertionError(f"gradients of {', '.join(culprits) or names} differ from numerical")


def trees(A: StructuredMatrix) -> None:
    """A member is a pytree whose leaves are its tensors."""
    leaves, spec = pytree.tree_flatten(A)
    assert len(leaves) == len(A.tensors()), f"tree_flatten: leaves {leaves}, expected tensors"
    for leaf, t in zip(leaves, A.tensors(), strict=True):
        assert leaf is t, f"tree_flatten: leaf {leaf!r}, expected {t!r}"
    assert_close(pytree.tree_unflatten(leaves, spec), A.to_dense(), "tree_unflatten")
    doubled = pytree.tree_map(lambda t: 2 * t, A)
    assert doubled.layout == A.layout, f"tree_map: {doubled!r}, expected one like {A!r}"
    assert_close(doubled, 2 * A.to_dense(), "tree_map")


def copies(A: StructuredMatrix, dtype: torch.dtype) -> None:
    """``copy``, ``deepcopy``, ``clone``, ``detach``, ``to`` and ``pickle`` keep the member.

    A conversion of the dtype leaves static indices and masks alone.
    """
    ways = {
        "copy": copy.copy(A),
        "deepcopy": copy.deepcopy(A),
        "clone": A.clone(),
        "detach": A.detach(),
        "to": A.to(A.device),
    }
    low, u = A.to(dtype), torch.finfo(dtype).eps / 2
    for name in ("double", "float", "half", "bfloat16"):
        converted = getattr(A, name)()
        expected = A.to(getattr(torch, name)).to_dense()
        assert_close(converted, expected, f"{name}()")
    assert_close(low, A.to_dense().to(dtype), f"to({dtype})", tolerance=16 * u)
    for mine, theirs in zip(A.static_tensors(), low.static_tensors(), strict=True):
        if not (mine.is_floating_point() or mine.is_complex()):
            assert theirs.dtype == mine.dtype, f"to({dtype}): {mine.dtype} became {theirs.dtype}"
            assert torch.equal(theirs, mine), f"to({dtype}): {mine} became {theirs}"
    twice = f"A.to({dtype}) + A.to({dtype})"
    assert_close(low + A.to(dtype), 2 * low.to_dense(), twice, tolerance=2 * u)  # rounded once each
    if "<locals>" not in type(A).__qualname__:  # such classes cannot be pickled
        ways["pickle"] = pickle.loads(pickle.dumps(A))
    for way, again in ways.items():
        assert type(again) is type(A), f"{way}: expected {type(A)}, got {type(again)}"
        assert_close(again, A.to_dense(), way)
    for mine, theirs in zip(A.tensors(), A.clone().tensors(), strict=True):
        assert not mine.numel() or mine.data_ptr() != theirs.data_ptr(), "clone shares memory"


def views(A: StructuredMatrix) -> None:
    """NumPy sees the dense matrix; ``repr`` names the class, the size and the dtype."""
    np.testing.assert_array_equal(np.asarray(A), A.to_dense().numpy())
    for part in (type(A).__name__, str(A.n), str(A.dtype).removeprefix("torch.")):
        assert part in repr(A), f"repr: expected {part!r} in {A!r}"


def meta(structure: Structure, operands: Operands, dtype: torch.dtype) -> None:
    """Every operation finds its shapes and dtypes on the meta device, without numbers."""
    operands = operands.to(dtype)
    A = operands.A
    zero = structure(A.n, batch_shape=A.batch_shape, dtype=A.dtype, device="meta")
    assert zero.device.type == "meta", f"zeros: expected a member on meta, got {zero.device}"
    like = zero.to(A.dtype)
    X, S = operands.X.to("meta"), operands.S.to("meta")
    shadow = Operands(like, like, like, X, S)
    for name, operation in OPERATIONS.items():
        real, found = dense_of(operation.compute(operands)), dense_of(operation.compute(shadow))
        assert found.device.type == "meta", f"{name}: expected a result on meta, got {found.device}"
        assert found.shape == real.shape, f"{name}: expected {real.shape}, got {found.shape}"
        assert found.dtype == real.dtype, f"{name}: expected {real.dtype}, got {found.dtype}"


def deterministic(operands: Operands, dtype: torch.dtype) -> None:
    """Every operation gives the same bits twice, under ``use_deterministic_algorithms``."""
    operands = operands.to(dtype)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for name, operation in OPERATIONS.items():
            first, second = operation.compute(operands), operation.compute(operands)
            for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
                assert torch.equal(a, b), f"{name}: {a}, then {b}"
    finally:
        torch.use_deterministic_algorithms(before)


def spec(structure: Structure, A: StructuredMatrix) -> None:
    """A structure is what its printed name says, so name and tensors are all there is to save."""
    try:
        again = parse(str(structure))
    except ValueError as error:
        raise AssertionError(f"str(structure): {error}") from error
    assert again == structure, f"{str(structure)!r} names another structure"
    file = io.BytesIO()
    torch.save([t.clone() for t in A.tensors()], file)
    file.seek(0)
    zero = again(A.n, batch_shape=A.batch_shape, dtype=A.dtype)
    loaded = zero.with_tensors(torch.load(file, weights_only=True))
    assert loaded.layout == A.layout, f"torch.load: {loaded!r}, expected one like {A!r}"
    assert_close(loaded, A.to_dense(), "torch.load")


def compiled(structure: Structure, sizes: Sequence[int]) -> None:
    """Every operation compiles without a graph break; members go in, through and out.

    One size and seeded numbers, as compiling takes seconds.
    """
    generator = torch.Generator().manual_seed(0)

    def random(t: Tensor) -> Tensor:
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    n = 6 if 6 in sizes else max(sizes)
    zero = structure(n, batch_shape=(2,), dtype=torch.float64)
    A, B = zero.map(random), zero.map(random)
    K = zero.map(random).add_scaled_identity(32.0)
    M = random(torch.empty(2, n, n, dtype=torch.float64))
    X = random(torch.empty(2, n, 3, dtype=torch.float64))
    given = Operands(A, B, K, X, M + M.mT)

    def everything(A: Any, B: Any, K: Any, X: Tensor, S: Tensor) -> dict[str, Any]:
        operands = Operands(A, B, K, X, S)
        return {name: operation.compute(operands) for name, operation in OPERATIONS.items()}

    torch._dynamo.reset()
    function = torch.compile(everything, fullgraph=True, backend="aot_eager")
    try:
        found = function(given.A, given.B, given.K, given.X, given.S)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError(f"torch.compile: {error}") from error
    for name, expected in everything(given.A, given.B, given.K, given.X, given.S).items():
        assert type(found[name]) is type(expected), f"{name}: compiled to {type(found[name])}"
        assert_close(dense_of(found[name]), dense_of(expected), f"compiled {name}")


CONDUCT = (
    fresh,
    batches,
    precision,
    gradients,
    trees,
    copies,
    views,
    meta,
    deterministic,
    errors,
    spec,
    compiled,
)
