"""The library on CUDA against itself on the CPU. Kernels against references: ``tests/kernels``."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from singd import diagnostics
from structured import StructuredMatrix, add_symmetric_product_, parse
from structured.testing.operations import OPERATIONS
from structured.testing.strategies import Operands
from tests.singd import test_cuda_graph
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import snapshot
from tests.structured.specs import SPECS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _dense(result: Any) -> torch.Tensor:
    return result.to_dense() if isinstance(result, StructuredMatrix) else result


def operands(spec: str, n: int, m: int, dtype: torch.dtype) -> Operands:
    torch.manual_seed(0)
    zero = parse(spec)(n, batch_shape=(2,), dtype=torch.float64)
    A, B = (zero.map(torch.randn_like) for _ in range(2))
    K = (0.1 / n * zero.map(torch.randn_like)).add_scaled_identity(1.0)
    X, M = torch.randn(2, n, m).double(), torch.randn(2, n, n).double()
    return Operands(A=A, B=B, K=K, X=X, S=M + M.mT).map(lambda t: t.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", SPECS)
def test_operations(spec: str, dtype: torch.dtype) -> None:
    """The error is that of the precision, not of the device."""
    for n, m in ((6, 3), (12, 5), (72, 200)):
        on_cpu = operands(spec, n, m, dtype)
        exact, on_gpu = on_cpu.to(torch.float64), on_cpu.to("cuda")
        for name, operation in OPERATIONS.items():
            expected = _dense(operation.compute(exact))
            found = _dense(operation.compute(on_gpu)).cpu().double()
            scale = float(expected.abs().max()) + n
            wide = torch.promote_types(dtype, torch.float32)
            bound = 8 * torch.finfo(dtype).eps + 64 * n * torch.finfo(wide).eps
            error = float((found - expected).abs().max())
            assert error <= bound * scale, f"{name} of {spec}({n}): off by {error:.3g}"


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 20)]
    return nn.Sequential(*layers, nn.LayerNorm(20), nn.Linear(20, 20), nn.Linear(20, 20))


METHODS: dict[str, Any] = {
    "dense": lambda model: SINGD(model, T=2),
    "IKFAC": lambda model: SINGD(model, T=2, kfac_like=True),
    "diagonal": lambda model: SINGD(model, T=2, structures=("diagonal", "diagonal")),
    "blocks": lambda model: SINGD(model, T=2, structures=("block_diagonal(7)", "dense")),
    "hierarchical": lambda model: SINGD(model, T=2, structures=("hierarchical(3, 3)",) * 2),
    "toeplitz": lambda model: SINGD(model, T=2, structures=("lower_toeplitz",) * 2),
    "momentum": lambda model: SINGD(model, T=1, alpha1=0.5, weight_decay=0.01, kl_clip=None),
    "KFAC": lambda model: KFAC(model, T=2),
}


@pytest.mark.parametrize("method", test_cuda_graph.METHODS)
def test_steps_in_a_cuda_graph(method: str) -> None:
    """Replays in turn, one graph for each kind of step, equal steps taken by Python."""
    kind, options = test_cuda_graph.METHODS[method]
    model = test_cuda_graph.network().to("cuda")
    reference = copy.deepcopy(model)
    plain, recorded = (
        kind(m, T=2, max_skipped=None, momentum=0.9, **options) for m in (reference, model)
    )
    inputs = torch.randn(10, 5, 2, 4, 4, device="cuda")
    for x in inputs:
        test_cuda_graph.iterate(reference, plain, x)
    x, graphs = inputs[0].clone(), [torch.cuda.CUDAGraph() for _ in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for data in inputs[:2]:
            test_cuda_graph.iterate(model, recorded, x.copy_(data))
    torch.cuda.current_stream().wait_stream(stream)
    for graph in graphs:
        with torch.cuda.graph(graph):
            test_cuda_graph.iterate(model, recorded, x)
    for number, data in enumerate(inputs[2:]):
        x.copy_(data)
        graphs[number % 2].replay()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def train(model: nn.Module, method: str, device: str, steps: int = 4) -> list[torch.Tensor]:
    model = copy.deepcopy(model).to(device)
    optimizer = METHODS[method](model)
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 3, 6, 6, generator=generator).to(device, dtype)
        y = torch.randint(20, (8,), generator=generator).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_steps(method: str) -> None:
    model = network()
    for found, expected in zip(
        train(model, method, "cuda"), train(model, method, "cpu"), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "KFAC"])
def test_steps_in_bfloat16(method: str) -> None:
    """Close to float32, and the same from run to run."""
    model = network().bfloat16()
    found, again = (train(model, method, "cuda") for _ in range(2))
    for p, q, r in zip(found, again, train(model.float(), method, "cpu"), strict=True):
        assert torch.equal(p, q)
        assert torch.linalg.vector_norm(p.float() - r) <= 0.1 * torch.linalg.vector_norm(r) + 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_passes_its_check(dtype: torch.dtype) -> None:
    """None falls back to PyTorch, in a step or alone."""
    train(network().to(dtype), "dense", "cuda")
    X = torch.randn(9, 30, device="cuda", dtype=dtype)
    for spec in ("diagonal", "dense"):
        parse(spec)(9, device="cuda", dtype=dtype).project_gram(X)
    add_symmetric_product_(torch.zeros(9, 9, device="cuda"), X)
    rows = [row for row in diagnostics.kernels() if dtype in row.dtypes]
    assert all(row.serves for row in rows), rows
    names = {row.kernel.partition("::")[2] for row in rows}
    low = {"stochastic_round", "inner_product"} if dtype == torch.bfloat16 else set()
    products = {"sums_of_squares", "symmetric_product", "add_symmetric_product_"}
    assert names >= products | {"momentum_step_"} | low


@pytest.mark.parametrize("limit", [None, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "structure",
    ["dense", "diagonal", "block_diagonal(7)", "lower_toeplitz", "rotated(dense, hadamard)"],
)
def test_a_step_does_not_wait_for_the_device(
    structure: str, dtype: torch.dtype, limit: int | None
) -> None:
    model = network().to("cuda", dtype)
    optimizer = SINGD(model, T=2, structures=(structure, structure), max_skipped=limit)
    x = torch.randn(8, 3, 6, 6, device="cuda", dtype=dtype)
    for step in range(4):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graft", [None, "adamw"])
def test_a_state_that_was_loaded_to_the_host_goes_on(graft: str | None) -> None:
    (model, optimizer), (other, again) = (
        (m, SINGD(m, graft=graft)) for m in (network().to("cuda") for _ in range(2))
    )
    x = torch.randn(8, 3, 6, 6, device="cuda")
    for _ in range(2):
        test_cuda_graph.iterate(model, optimizer, x)
    other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, map_location="cpu"))
    for each in ((model, optimizer), (other, again)):
        test_cuda_graph.iterate(*each, x)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("graft", [None, "adamw"])
def test_a_bad_batch_changes_nothing(graft: str | None, dtype: torch.dtype) -> None:
    """In the first step too, which makes the state; the host learns of it at the next step."""
    model = network().to("cuda", dtype)
    optimizer = SINGD(model, T=1, graft=graft, max_skipped=2)
    x = torch.randn(8, 3, 6, 6, device="cuda", dtype=dtype)
    bad = torch.full_like(x, torch.nan)
    first = copy.deepcopy(model.state_dict())
    test_cuda_graph.iterate(model, optimizer, bad)
    assert optimizer._parts.skipping.total == 0
    torch.testing.assert_close(model.state_dict(), first, rtol=0, atol=0)
    for _ in range(3):
        test_cuda_graph.iterate(model, optimizer, x)
    before = snapshot(model, optimizer)
    assert not torch.equal(before["0.weight"], first["0.weight"])
    test_cuda_graph.iterate(model, optimizer, bad)
    assert optimizer._parts.skipping.total == 1
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)
    assert optimizer.skipped == 2
    with pytest.raises(FloatingPointError, match=r"0\.weight: .* in 2 steps in a row"):
        test_cuda_graph.iterate(model, optimizer, bad)
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)
