"""SINGD with structures chosen during its first steps, from the curvature that it meets there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from singd.capture.statistics import Columns, Side, Statistic
from singd.capture.warning import warn_user
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Averages, Options, Products, Sent, Stack
from singd.methods.budget import check_budget, choose, limits_of
from singd.methods.covariances import CountedCovariances, inverse_diagonal, projected
from singd.methods.inverse_free import InverseFree
from singd.methods.options import by_name
from singd.methods.structure_choice import CANDIDATES
from structured import Structure, StructuredMatrix, parse

AUTO = "auto"
UPDATES = 3
"""Number of batches whose curvature is averaged before structures are chosen."""

MEASURED = 2048
"""Size of the largest side whose whole curvature is looked at; larger sides are diagonal."""


class Automatic(InverseFree):
    """Averages the whole curvature, then goes on as SINGD with the structures that lose the least.

    Until then directions are those of diagonal factors, and every step is one of averaging.
    """

    identity = tuple(name for name in InverseFree.identity if name != "structures")
    revises = True
    members_of: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # averages are of whole sides

    def check(self, options: Options) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        given = options["structures"]
        if isinstance(given, str) and given != AUTO:
            raise ValueError(f"structures: expected a pair, a mapping or 'auto', got {given!r}")
        super().check({**options, "structures": None} if measures(options) else options)
        check_budget(options["budget"])

    # Which of the two a call is about -----------------------------------------------------------

    def structures(
        self, name: str, shape: Sequence[int], input_structure: str | None, options: Options
    ) -> tuple[Structure, ...]:
        """Those of the averages at first, dense unless a side is wide; then those chosen."""
        if not measures(options):
            return super().structures(name, shape, input_structure, options)
        limit = by_name(options["max_dim"], name)
        limit = MEASURED if limit is None else min(limit, MEASURED)
        *_, d_out, d_in = shape
        whole = (d_in <= limit and input_structure is None, d_out <= limit)
        return tuple(parse("dense" if each else "diagonal") for each in whole)

    def layout(self, options: Options) -> tuple[Any, ...]:
        """The options that structures, data types and momenta depend on."""
        return measures(options), *super().layout(options)

    def init(
        self, shape: Sequence[int], structures: Sequence[Structure], options: Options, **like: Any
    ) -> Any:
        """Averages of nothing at first."""
        if not measures(options):
            return super().init(shape, structures, options, **like)
        return CountedCovariances.zeros(shape, structures, **like)

    def summarize(self, factors: Any, side: Side, columns: Columns, options: Options) -> Statistic:
        """The whole ``S`` at first."""
        if not isinstance(factors, CountedCovariances):
            return super().summarize(factors, side, columns, options)
        return factors.summarize(side, columns)

    def needs_factors(self, factors: Any, options: Options) -> bool:
        """Averages are kept on every rank: all choose together."""
        return isinstance(factors, CountedCovariances) or super().needs_factors(factors, options)

    def update(self, factors: Any, statistics: Averages, options: Options, step: int) -> Any:
        """The average over one batch more, or an update of the factors."""
        if not isinstance(factors, CountedCovariances):
            return super().update(factors, statistics, options, step)
        dtype = factors.S_K.dtype
        S_K, S_C = (U.value.to(dtype) for U in (statistics.input, statistics.grad))
        return factors.with_batch(S_K, S_C, statistics.rows)

    def update_all(self, stacks: Any, options: Options, step: int) -> Any:
        """:meth:`update` of all stacks; factors are updated together."""
        if not measures(options):
            yield from super().update_all(stacks, options, step)
            return
        for stack in stacks:
            yield self.update(stack.factors, stack.statistics, options, step)

    def residuals(self, factors: Any, averages: Any, options: Options) -> dict[str, Tensor]:
        """Distances from rest, of factors."""
        if isinstance(factors, CountedCovariances):
            return {}
        return super().residuals(factors, averages, options)

    def products(self, factors: Any, options: Options) -> Products:
        """The inverses of the diagonals at first."""
        if not isinstance(factors, CountedCovariances):
            return super().products(factors, options)
        return {"KK": inverse_diagonal(factors.S_K), "CC": inverse_diagonal(factors.S_C)}

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        """``diag(S_C)^-1 G diag(S_K)^-1`` at first, a little damped."""
        if not isinstance(factors, CountedCovariances):
            return super().precondition(factors, G, products)
        return self.apply_grad(factors, self.apply_input(factors, G, products), products)

    def apply_input(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        """The half of it that is about the input side."""
        if not isinstance(factors, CountedCovariances):
            return super().apply_input(factors, G, products)
        return (G * products["KK"].d[..., None, :]).to(G.dtype)

    def apply_grad(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        """The half of it that is about the output side."""
        if not isinstance(factors, CountedCovariances):
            return super().apply_grad(factors, G, products)
        return (G * products["CC"].d[..., None]).to(G.dtype)

    def mixed_rows(self, factors: Any) -> int | None:
        """As many as C mixes; unknown at first."""
        return None if isinstance(factors, CountedCovariances) else super().mixed_rows(factors)

    def is_apart(self, factors: Any, products: Products) -> bool:
        """As with K and C, once they are there."""
        return not isinstance(factors, CountedCovariances) and super().is_apart(factors, products)

    def apply_apart(
        self, factors: Any, G: Tensor, g: Tensor, products: Products
    ) -> tuple[Tensor, Tensor]:
        """That of K and C."""
        return super().apply_apart(factors, G, g, products)

    def roots(self, factors: Any) -> tuple[StructuredMatrix, StructuredMatrix] | None:
        """K and C; none before structures are chosen."""
        return None if isinstance(factors, CountedCovariances) else super().roots(factors)

    # The choice ---------------------------------------------------------------------------------

    def revise(
        self,
        groups: Sequence[tuple[dict[str, Any], Mapping[WeightMatrix, Any]]],
        agree: Callable[[Sequence[float]], Sequence[float]],
        sent: Sent,
    ) -> dict[WeightMatrix, Any]:
        """Choose structures once the curvature of enough batches was averaged.

        Until then every step updates the averages: steps that were skipped, or had no gradients,
        do not count. A weight that nothing was seen of is diagonal, with a warning.
        """
        ready: dict[Any, list[tuple[dict[str, Any], Mapping[WeightMatrix, Any]]]] = {}
        for options, factors in groups:
            if not factors or not measures(options):
                continue
            if max(both.batches() for both in factors.values()) < UPDATES:
                options["burn_in"] = max(options["burn_in"], options["step"] + 1)
            else:
                key = tuple(sorted(limits_of(options["budget"]).items()))
                ready.setdefault(key, []).append((options, factors))
        found: dict[WeightMatrix, Any] = {}
        for some in ready.values():
            averages = {m: both for _, factors in some for m, both in factors.items()}
            unseen = [
                m.name for m, S in averages.items() if m.weight.grad is None and not S.batches()
            ]
            if unseen:
                warn_user(
                    f"{', '.join(dict.fromkeys(unseen))}: without gradients when structures were "
                    "chosen, so factors are diagonal"
                )
            choice = choose(some, CANDIDATES, agree, sent)
            for options, factors in some:
                names = [*dict.fromkeys(matrix.name for matrix in factors)]
                options["structures"] = {name: choice[name] for name in names}
                options["nats_lost"] = {name: choice.nats_of(name) for name in names}
                found |= {m: self._first(m, both, options) for m, both in factors.items()}
        return found

    def _first(self, matrix: WeightMatrix, both: CountedCovariances, options: Options) -> Any:
        """Factors after one update from the identity, by the averages.

        So does SINGD begin. Roots of the inverse of the averages train worse: they trust all of an
        early curvature.
        """
        shape, fixed = matrix.layer.shape(matrix.module), matrix.layer.input_structure
        structures = super().structures(matrix.name, shape, fixed, options)
        like: dict[str, Any] = {"dtype": matrix.weight.dtype, "device": matrix.weight.device}
        one = super().init(matrix.shape, structures, options, batch_shape=(1,), **like)
        averages = Averages(projected(one.K, both.S_K), projected(one.C, both.S_C))
        (new,) = super().update_all([Stack(one, averages, {})], options, 0)
        return new.map(lambda t: t[0])


def measures(options: Options) -> bool:
    """Whether structures are yet to be chosen."""
    given = options.get("structures")
    return isinstance(given, str) and given == AUTO
