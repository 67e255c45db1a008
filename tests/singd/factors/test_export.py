"""Factors are exported as they are, and files give them back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import KFAC, SINGD, SOAP, KLShampoo, export
from singd.factors import KroneckerFactors, calibrate
from structured import Diagonal, parse
from tests.singd.factors.networks import convolutions, data, network, trained


def stepped(optimizer: Any, model: nn.Module) -> Any:
    x, y = data(4)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


def test_factors_are_copies_of_the_optimizers() -> None:
    model = network()
    optimizer = stepped(SINGD(model, structures=("block_diagonal(2)", "dense")), model)
    factors = export(optimizer)
    assert list(factors) == ["0.weight", "2.weight"]
    one = factors["2.weight"]
    assert (one.shape, one.bias, one.steps) == ((3, 6), "2.bias", 1)
    assert list(map(str, one.structures)) == ["block_diagonal(2)", "dense"]
    stored = optimizer.state[model[2].weight]["K"]
    assert all(torch.equal(a, b) for a, b in zip(one.K.tensors(), stored, strict=True))
    stored[0].add_(1.0)
    assert not torch.equal(one.K.tensors()[0], stored[0])
    Z = torch.randn(3, 6, dtype=torch.float64)
    CZK = one.C.to_dense() @ Z @ one.K.to_dense().mT
    torch.testing.assert_close(one.root.apply(Z.reshape(-1, 1)).reshape(3, 6), CZK)


def test_kfac_has_roots_of_its_inverses() -> None:
    model = network()
    optimizer = stepped(KFAC(model, T=1, damping=0.1), model)
    for name, one in export(optimizer).items():
        (inverse,) = optimizer.state[model.get_parameter(name)]["inverse_K"]
        torch.testing.assert_close(one.K.outer().to_dense(), inverse)
        (inverse,) = optimizer.state[model.get_parameter(name)]["inverse_C"]
        torch.testing.assert_close(one.C.outer().to_dense(), inverse)


def test_what_cannot_be_exported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    with pytest.raises(ValueError, match="has taken a step, got a new one"):
        export(SINGD(model))
    with pytest.raises(
        ValueError, match=r"roots of the inverse curvature.* got Modes of KLShampoo"
    ):
        export(stepped(KLShampoo(model, T=1), model))
    with pytest.raises(ValueError, match=r"roots of the inverse curvature.* got .* of SOAP"):
        export(stepped(SOAP(model, T=1), model))
    with pytest.raises(ValueError, match=r"that has chosen its structures, .* take more steps"):
        export(stepped(SINGD(model, structures="auto"), model))
    optimizer = stepped(SINGD(model), model)
    monkeypatch.setattr(type(optimizer._parts.placement), "holds", lambda *_: False)
    with pytest.raises(ValueError, match=r"0\.weight: expected its factors in this process"):
        export(optimizer)
    with pytest.raises(TypeError, match="expected one of singd, got AdamW"):
        export(torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]  # on purpose


def same(a: KroneckerFactors, b: KroneckerFactors) -> None:
    assert (list(a), a.samples, str(a)) == (list(b), b.samples, str(b))
    for one, other in zip(a.values(), b.values(), strict=True):
        names = ("structures", "bias", "approximation", "steps", "shape")
        assert all(getattr(one, name) == getattr(other, name) for name in names)
        pairs: list[tuple[Tensor, Tensor]] = []
        for x, y in ((one.K, other.K), (one.C, other.C)):
            assert type(x) is type(y)
            pairs += zip(x.tensors(), y.tensors(), strict=True)
        assert (one.calibration is None) == (other.calibration is None)
        if one.calibration and other.calibration:
            for key, pair in vars(one.calibration).items():
                pairs += zip(pair, getattr(other.calibration, key), strict=True)
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@pytest.mark.parametrize(
    "structure", ["dense", "hierarchical(1, 1)", "block_upper(dense, diagonal, 1)"]
)
def test_files_give_back_what_was_saved(tmp_path: Path, structure: str) -> None:
    pytest.importorskip("safetensors")
    model, loader, path = convolutions(), data(2, 3, 3), tmp_path / "factors.safetensors"
    factors = trained(model, loader, structures=(structure, structure), layers="all")
    factors.save(path)
    same(KroneckerFactors.load(path), factors)
    calibrated = calibrate(factors, model, loader, refit=0.1)
    calibrated.save(path)
    same(KroneckerFactors.load(path), calibrated)
    calibrate(KroneckerFactors.load(path), model, loader)


def mine(n: int, **options: Any) -> Diagonal:
    return Diagonal.zeros(n, **options)


def test_files_that_cannot_be_written_or_read_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, loader, path = network(), data(4), tmp_path / "factors.safetensors"
    with pytest.raises(ValueError, match=r"structures that have a spec, got .*mine"):
        trained(model, loader, structures=(mine, mine)).save(path)
    safetensors.save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"a file that KroneckerFactors.save wrote, got another"):
        KroneckerFactors.load(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        trained(model, loader).save(path)


def test_structures_of_functions_are_exported() -> None:
    factors = trained(network(), data(4), structures=(mine, "dense"))
    assert factors["0.weight"].structures == (parse(mine), parse("dense"))
