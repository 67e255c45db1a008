"""Structures for every weight, chosen from the curvature of a few batches within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singd.capture.statistics import Columns, Side, Statistic
from singd.methods.base import Averages, Factors, Method, Options, Products
from singd.methods.inverse_free import MAX_DIM
from singd.optimizer import KroneckerOptimizer
from structured import Diagonal, Structure, StructuredMatrix, divergence, inverse_root, parse

CANDIDATES = (
    *("diagonal", "block_diagonal(4)", "block_diagonal(16)", "block_diagonal(64)"),
    *("hierarchical(4, 4)", "hierarchical(16, 16)", "dense"),
)
"""The structures that are compared by default."""


@dataclass(frozen=True)
class Covariances(Factors):
    """Means of ``S_K`` and ``S_C`` over all passes so far."""

    S_K: StructuredMatrix
    S_C: StructuredMatrix


class _Curvature(Method):
    """Averages Kronecker factors of the curvature, and leaves gradients as they are."""

    def init(
        self,
        shape: Sequence[int],
        structures: Sequence[Structure],
        options: Options,
        *,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Covariances:
        *inner, d_out, d_in = shape
        like: dict[str, Any] = {
            "device": device,
            "dtype": torch.promote_types(dtype, torch.float32),
        }
        S_K, S_C = (
            parse("dense" if n <= options["max_dim"] else "diagonal")(
                n, batch_shape=(*batch_shape, *inner), **like
            )
            for n in (d_in, d_out)
        )
        return Covariances(S_K, S_C)

    def summarize(
        self, factors: Covariances, side: Side, columns: Columns, options: Options
    ) -> Statistic:
        S = factors.S_K if side == "input" else factors.S_C
        if isinstance(S, Diagonal):
            return Statistic(Diagonal(columns.squares()))
        return Statistic(S.project_gram(columns.tensor().to(S.dtype)))

    def update(
        self, factors: Covariances, statistics: Averages, options: Options, step: int
    ) -> Covariances:
        weight = 1 / (step + 1)
        pairs = ((factors.S_K, statistics.input.value), (factors.S_C, statistics.grad.value))
        return Covariances(*((1 - weight) * S + weight * new for S, new in pairs))

    def precondition(self, factors: Covariances, G: Tensor, products: Products) -> Tensor:
        return G.clone()


@dataclass(frozen=True)
class Option:
    """One structure of one side of one weight.

    Attributes:
        spec: The structure.
        numbers: How many numbers it stores, the products of the factors included.
        nats: ``KL`` of the Gaussian with the factor to that with the whole curvature of this side.
    """

    spec: str
    numbers: int
    nats: float


@dataclass(frozen=True)
class StructureChoice(Mapping[str, tuple[str, str]]):
    """Structures of K and C by the name of each weight; give it to ``SINGD(structures=...)``.

    Attributes:
        sides: What was chosen for K and C of each weight.
        budget: Numbers that might be stored.
    """

    sides: Mapping[str, tuple[Option, Option]]
    budget: int

    def __getitem__(self, name: str) -> tuple[str, str]:
        K, C = self.sides[name]
        return K.spec, C.spec

    def __iter__(self) -> Iterator[str]:
        return iter(self.sides)

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def numbers(self) -> int:
        """How many numbers all factors store."""
        return sum(option.numbers for both in self.sides.values() for option in both)

    @property
    def nats(self) -> float:
        """Nats lost by all structures together."""
        return sum(option.nats for both in self.sides.values() for option in both)

    def __str__(self) -> str:
        width = max(map(len, self.sides), default=0)
        rows = [
            f"{name:{width}}  {K.spec:22} {C.spec:22} {K.numbers + C.numbers:12,} "
            f"{K.nats + C.nats:12.4g}"
            for name, (K, C) in self.sides.items()
        ]
        head = f"{'weight':{width}}  {'K':22} {'C':22} {'numbers':>12} {'nats lost':>12}"
        total = f"{self.numbers:,} of {self.budget:,} numbers, {self.nats:.4g} nats lost"
        return "\n".join([head, "-" * len(head), *rows, total])


def choose_structures(
    model: nn.Module,
    losses: Iterable[Tensor],
    *,
    budget: float = 1.0,
    candidates: Sequence[str] = CANDIDATES,
    damping: float = 1e-3,
    layers: Collection[type[nn.Module]] | str = (),
    loss_average: str | None = "batch",
    max_dim: int = MAX_DIM,
) -> StructureChoice:
    """The structures that lose the fewest nats for the numbers that they store.

    >>> losses = (loss_func(model(X), y) for X, y in batches)
    >>> optimizer = SINGD(model, structures=choose_structures(model, losses, budget=1.0))

    A backward pass of every loss averages ``S_K`` and ``S_C`` of every weight. Each candidate K of
    a side has a :func:`structured.divergence` from ``S + damping mean(S) I``, which counts as often
    as the other side is long: so many times the factor occurs in the Kronecker product. Beginning
    with the cheapest structures everywhere, that exchange is made again and again that saves the
    most nats for a number, until the budget is spent. The weights are not changed, and gradients
    are reset.

    Args:
        model: Model; its weights are not changed.
        losses: Losses of a few batches, made one after the other.
        budget: Numbers that factors may store, as a multiple of those of the weights: with the
            weights' momentum, ``budget=1`` is the state of AdamW.
        candidates: Specs that are compared on every side; the cheapest are taken in any case.
        damping: Damping in units of the mean eigenvalue of ``S``.
        layers: Further types to precondition, as in :class:`singd.SINGD`.
        loss_average: What the losses are means over, as in :class:`singd.SINGD`.
        max_dim: Size beyond which a side is diagonal.

    Raises:
        ValueError: If there is no loss, none was made after the call (give a generator), or not
            even the cheapest structures fit the budget.
    """
    options = {"T": 1, "max_dim": max_dim, "loss_average": loss_average}
    optimizer = KroneckerOptimizer(model, _Curvature(), None, options, layers=layers)
    count = 0
    with optimizer:
        for count, loss in enumerate(losses, 1):  # noqa: B007  # counted
            optimizer.zero_grad()
            loss.backward()
            optimizer.precondition()
        optimizer.zero_grad()
    if not count:
        raise ValueError("losses: expected at least one, got none")
    sides: dict[tuple[str, int], list[Option]] = {}
    numbers = 0
    for name, p in model.named_parameters():
        entry = optimizer.state.get(p, {})
        if "S_K" not in entry:
            continue
        S_K, S_C = entry["S_K"][0], entry["S_C"][0]
        numbers += p.numel()
        others = (S_C.shape[-1], S_K.shape[-1])
        for side, (S, other) in enumerate(zip((S_K, S_C), others, strict=True)):
            sides[name, side] = _options(S, S.ndim > 1, other, candidates, damping)
    if not sides:
        raise ValueError(
            "losses: expected passes through supported layers, made one after the other (a "
            "generator), got none that reached a weight"
        )
    limit = int(budget * numbers)
    chosen = cheapest_nats(sides, limit)
    names = {name for name, _ in sides}
    ordered = [name for name, _ in model.named_parameters() if name in names]
    return StructureChoice({n: (chosen[n, 0], chosen[n, 1]) for n in ordered}, limit)


def _options(
    S: Tensor, is_dense: bool, other: int, candidates: Sequence[str], damping: float
) -> list[Option]:
    """The candidates for one side that no other beats, by numbers, each with fewer nats.

    Args:
        S: ``[..., n, n]``, or the diagonal ``[n]`` of a wide side.
        is_dense: Whether it is whole.
        other: Length of the other side.
        candidates: Specs.
        damping: Damping in units of the mean eigenvalue.
    """
    n = S.shape[-1]
    if not is_dense:
        return [Option("diagonal", n, 0.0)]
    S = S.double()
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = damping * mean + torch.finfo(torch.float32).tiny
    found = []
    for spec in candidates:
        K = inverse_root(spec, S, added)
        stored = sum(t.numel() for t in K.tensors())
        lost = float(divergence(K, S, added).clamp(min=0.0).sum()) * other
        found.append(Option(spec, stored, lost))
    found.sort(key=lambda option: (option.numbers, option.nats))
    best: list[Option] = []
    for option in found:
        if not best or option.nats < best[-1].nats * (1 - 1e-9):
            best.append(option)
    return best


def cheapest_nats(
    sides: Mapping[tuple[str, int], Sequence[Option]], budget: int
) -> dict[tuple[str, int], Option]:
    """The option of each side, by exchanges that save the most nats for a number."""
    chosen = dict.fromkeys(sides, 0)
    spent = sum(options[0].numbers for options in sides.values())
    if spent > budget:
        raise ValueError(f"budget: expected at least {spent:,} numbers, got {budget:,}")
    waiting: list[tuple[float, tuple[str, int], int, int]] = []

    def offer(side: tuple[str, int]) -> None:
        """The best exchange of this side, by nats saved for a number."""
        options, now = sides[side], chosen[side]
        rates = [
            ((options[now].nats - o.nats) / (o.numbers - options[now].numbers), i)
            for i, o in enumerate(options[now + 1 :], now + 1)
            if spent - options[now].numbers + o.numbers <= budget
        ]
        if rates:
            rate, target = max(rates)
            heapq.heappush(waiting, (-rate, side, now, target))

    for side in sides:
        offer(side)
    while waiting:
        _, side, before, target = heapq.heappop(waiting)
        if before != chosen[side]:
            continue
        more = sides[side][target].numbers - sides[side][before].numbers
        if spent + more <= budget:
            spent, chosen[side] = spent + more, target
        offer(side)
    return {side: sides[side][i] for side, i in chosen.items()}
