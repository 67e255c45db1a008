"""Rows about kinds of numbers: data types, devices, memory, complex, scaled and sparse ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from singd.testing.conformance.training import (
    Make,
    assert_falls,
    assert_near,
    assert_same,
    backward,
    batches,
    initialized,
    net,
    train,
    weights,
)


class _Mixed(nn.Module):
    """One layer of every data type."""

    def __init__(self) -> None:
        super().__init__()
        dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float16
        with torch.random.fork_rng(devices=[]):
            self.layers = nn.ModuleList(nn.Linear(4, 4).to(dtype) for dtype in dtypes)
            self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 3).double()
        initialized(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(next(layer.parameters()).dtype)).tanh()
        return self.last(self.norm(x.float()).double())


def mixed_dtypes(make: Make) -> None:
    """Layers of several data types in one group are trained, each in its own."""
    model = _Mixed()
    dtypes = [p.dtype for p in model.parameters()]
    losses = train(model, make(model), batches(40))
    assert [p.dtype for p in model.parameters()] == dtypes, "a parameter changed its data type"
    assert_falls(losses, "layers of several data types")


def defaults_of_torch(make: Make) -> None:
    """Neither the default data type of torch nor its default device matters."""
    runs = []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        models = net(torch.float32), net(torch.bfloat16)
        data = [batches(4, m[0].weight.dtype) for m in models]
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                for model, some in zip(models, data, strict=True):
                    train(model, make(model), some)
        finally:
            torch.set_default_dtype(before)
        runs.append([t for model in models for t in weights(model)])
    assert_same(runs[1], runs[0], "training under another default data type")
    assert_same(runs[2], runs[0], "training under another default device")


def memory_formats(make: Make) -> None:
    """How parameters and gradients lie in memory does not matter."""

    def transposed(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], -1)[..., 0]

    runs = []
    for which in ("contiguous", "parameters", "gradients", "both"):
        model = net()
        if which in ("parameters", "both"):
            for p in model.parameters():
                p.data = transposed(p.data)
        optimizer = make(model, weight_decay=1e-3)
        for batch in batches(4):
            model.zero_grad()
            backward(model, batch)
            for p in model.parameters() if which in ("gradients", "both") else ():
                if p.grad is not None:
                    p.grad = transposed(p.grad)
            optimizer.step()
        runs.append((which, weights(model)))
    for which, got in runs[1:]:
        assert_near(got, runs[0][1], f"{which} not contiguous")


class _Complex(nn.Module):
    """A complex parameter, or the same as real and imaginary parts."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        z = torch.complex(torch.linspace(-0.6, 0.6, 6), torch.linspace(0.9, 0, 6)).view(2, 3)
        self.z = nn.Parameter(torch.view_as_real(z).clone() if real else z)
        self.real = real

    def forward(self) -> Tensor:
        z = torch.view_as_complex(self.z) if self.real else self.z
        return (z * z - 1).abs().square().sum()


def complex_parameters(make: Make) -> None:
    """Complex parameters are trained like their real and imaginary parts, without a warning."""
    runs = []
    for real in (True, False):
        model = _Complex(real)
        with warnings.catch_warnings(action="error"):
            optimizer = make(model)
            for _ in range(5):
                optimizer.zero_grad()
                model().backward()
                optimizer.step()
        runs.append([t if real else torch.view_as_real(t) for t in weights(model)])
    assert_near(runs[1], runs[0], "complex parameters")
    with warnings.catch_warnings(action="error"):
        layers = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64), nn.Tanh())
        optimizer = make(layers)
        before = weights(layers)
        layers(torch.ones(2, 4, dtype=torch.complex64)).abs().sum().backward()
        optimizer.step()
    assert not torch.equal(weights(layers)[0], before[0]), "a complex layer did not move"


def scaled_gradients(make: Make) -> None:
    """Under a GradScaler training is the same, and a step with infinities is skipped."""
    runs = []
    for scaled in (False, True):
        model = net(torch.float32)
        optimizer = make(model)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for X, y in batches(4, torch.float32):
            optimizer.zero_grad()
            scaler.scale((model(X) - y).square().sum() / len(y)).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(weights(model))
    assert_near(runs[1], runs[0], "training under a GradScaler")
    backward(model, batches(1, torch.float32)[0])
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.step(optimizer)
    assert_same(weights(model), runs[1], "a step with infinite gradients")


def sparse_gradients(make: Make) -> None:
    """A sparse gradient is an error that says so, or trained."""
    model: Any = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    optimizer = make(model)
    model(torch.tensor([0, 1, 1])).square().sum().backward()
    before = weights(model)[0]
    try:
        optimizer.step()
    except RuntimeError as error:
        if "sparse" not in str(error):
            raise
    else:
        assert not torch.equal(weights(model)[0], before), "a sparse gradient moved nothing"


ROWS = (
    *(mixed_dtypes, defaults_of_torch, memory_formats, complex_parameters, scaled_gradients),
    sparse_gradients,
)
