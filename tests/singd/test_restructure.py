"""A checkpoint goes on in other structures."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from singd import KFAC, SINGD
from singd.convert import from_tensors, to_structures, to_tensors
from structured import Dense, parse

F64 = torch.float64
X = torch.randn(40, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(40) % 4
OPTIONS = {"lr": 0.01, "T": 2, "alpha1": 0.5, "burn_in": 0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.images = nn.Conv1d(1, 4, 2, groups=1, dtype=F64)
        self.norm, self.out = nn.LayerNorm(16, dtype=F64), nn.Linear(16, 4, dtype=F64)

    def forward(self, x):
        return self.out(self.norm(self.images(x[:, None]).flatten(1).tanh()))


def trained(structures, steps=5, **options):
    torch.manual_seed(0)
    model = Net()
    optimizer = SINGD(model, structures=structures, **OPTIONS, **options)
    return model, optimizer, train(model, optimizer, steps)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(X), TARGETS)
        loss.backward()
        optimizer.step()
    return loss.item()


def factors(optimizer, p, structures, sizes):
    entry = optimizer.state[p]
    return {
        key: parse(structures[key.endswith("C")])(sizes[key.endswith("C")], dtype=F64)
        .with_tensors(entry[key])
        .to_dense()
        for key in ("K", "C", "m_K", "m_C")
    }


def restructured(model, optimizer, structures, **options):
    other = copy.deepcopy(model)
    new = SINGD(other, structures=structures, **OPTIONS, **options)
    saved = from_tensors(*to_tensors(optimizer.state_dict()))
    new.load_state_dict(to_structures(new, saved))
    return other, new


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (("diagonal", "block_diagonal(2)"), ("dense", "dense")),
        (("block_diagonal(4)", "diagonal"), ("block_diagonal(8)", "lower_triangular")),
        (("upper_toeplitz", "scaled_identity"), ("upper_triangular", "circulant")),
    ],
)
def test_in_larger_structures_factors_are_the_same_matrices(small, large):
    model, optimizer, loss = trained(small)
    other, new = restructured(model, optimizer, large)
    for p, q, sizes in (
        (model.out.weight, other.out.weight, (17, 4)),
        (model.images.weight, other.images.weight, (3, 4)),
    ):
        before, after = factors(optimizer, p, small, sizes), factors(new, q, large, sizes)
        for key in before:
            torch.testing.assert_close(after[key], before[key])
    train(model, optimizer, 1)  # the fifth step updates no factors: both take the same
    train(other, new, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert train(other, new, 20) < loss - 0.02


def test_in_smaller_structures_they_are_the_nearest():
    large, small = ("dense", "dense"), ("hierarchical(2, 2)", "diagonal")
    model, optimizer, loss = trained(large)
    other, new = restructured(model, optimizer, small)
    sizes = (17, 4)
    before = factors(optimizer, model.out.weight, large, sizes)
    after = factors(new, other.out.weight, small, sizes)
    for key in before:
        nearest = Dense(before[key]).to_structure(small[key.endswith("C")]).to_dense()
        torch.testing.assert_close(after[key], nearest)
    assert train(other, new, 20) < loss - 0.02


def test_patterns_and_wide_sides():
    model, optimizer, _ = trained(("dense", "dense"))
    K = "up_to(15, block_diagonal(4), diagonal)"
    structures = {"out.*": (K, "dense"), "*": ("dense", "diagonal")}
    other, new = restructured(model, optimizer, structures)
    K = new.state[other.out.weight]["K"]  # of 16 inputs and a bias: diagonal, as wide sides are
    expected = optimizer.state[model.out.weight]["K"][0].diagonal()
    torch.testing.assert_close(K[0], expected)


def test_what_cannot_go_on_is_refused():
    _, optimizer, _ = trained(("dense", "dense"))
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="expected structures that are chosen, got 'auto'"):
        to_structures(SINGD(Net(), structures="auto"), saved)
    with pytest.raises(ValueError, match="expected groups of as many parameters"):
        to_structures(SINGD(Net().out), saved)
    saved["state"][0]["K"] = {0: torch.eye(3, dtype=F64).roll(1, 0)}  # nothing on the diagonal
    with pytest.raises(ValueError, match=r"nearest member to K of images.weight is singular"):
        to_structures(SINGD(Net(), structures=("diagonal", "dense"), **OPTIONS), saved)


def test_methods_without_structures_are_left_alone():
    model = Net()
    optimizer = KFAC(model)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    KFAC(Net()).load_state_dict(to_structures(KFAC(Net()), saved))
