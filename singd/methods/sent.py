"""Structures that send few bytes.

Bytes sent are no sum over sides: structures decide where factors are worked on, and so whether
gradients move. So they are limited afterwards. If what was chosen sends too much, a side costs what
it sends beside a scaled identity, and the choice is made again, within less and less, until it
sends as few bytes as it may.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from singd.capture.warning import warn_user
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Options, Sent
from singd.methods.covariances import CountedCovariances
from singd.methods.structure_choice import Chosen, Option, Sides, cheapest, fewest_nats, needed
from structured import Diagonal

Groups = Sequence[tuple[Options, Mapping[WeightMatrix, CountedCovariances]]]


class Asked:
    """Bytes that a rank sends in a step, on average over ranks, if weights had structures.

    Arguments are those of :func:`singd.methods.budget.choose`.
    """

    def __init__(
        self,
        groups: Groups,
        agree: Callable[[Sequence[float]], Sequence[float]],
        sent: Sent,
    ) -> None:
        self._weights = [(m, both, options) for options, some in groups for m, both in some.items()]
        self._agree, self._sent = agree, sent
        self._beside = functools.cache(self._beside_identities)

    def whole(self, chosen: Chosen) -> float:
        """Those of all weights."""
        pairs = {m: (chosen[m.name, 0].spec, chosen[m.name, 1].spec) for m, _, _ in self._weights}
        (found,) = self._agree([sum(self._of(pairs).values())])
        return found

    def priced(self, side: tuple[str, int], options: Sequence[Option]) -> list[Option]:
        """The options of a side with the bytes that each sends beside a scaled identity.

        Those for two scaled identities count for the output side.
        """
        name, of = side
        least = 0.0 if of else self._beside(0, "scaled_identity")[name]
        found = [max(self._beside(of, option.spec)[name] - least, 0.0) for option in options]
        return [replace(o, sent=sent) for o, sent in zip(options, found, strict=True)]

    def _beside_identities(self, of: int, spec: str) -> dict[str, float]:
        """Those of every weight by name, if all have this structure on a side that is not wide."""
        pairs = {}
        for matrix, both, _ in self._weights:
            pair = ["scaled_identity"] * 2
            pair[of] = "diagonal" if isinstance((both.S_K, both.S_C)[of], Diagonal) else spec
            pairs[matrix] = pair[0], pair[1]
        found: dict[str, float] = {}
        for matrix, sent in self._of(pairs).items():
            found[matrix.name] = found.get(matrix.name, 0.0) + sent
        return dict(zip(found, self._agree([*found.values()]), strict=True))

    def _of(self, pairs: Mapping[WeightMatrix, tuple[str, str]]) -> Mapping[WeightMatrix, float]:
        return self._sent({m: {**o, "structures": pairs[m]} for m, _, o in self._weights})


def sending(
    chosen: Chosen,
    asked: Asked,
    most: float,
    sides: Sides,
    limits: Mapping[str, float],
    *,
    strict: bool,
) -> Chosen:
    """Structures that send at most so many bytes, and lose few nats of those that do.

    Args:
        chosen: What was chosen without that limit, and stays if it sends no more.
        asked: Says what is sent.
        most: Bytes that a rank may send in a step, on average over ranks.
        sides: The options of every side.
        limits: What may be used of other costs.
        strict: Raise where all send more, otherwise warn.
    """
    sends = asked.whole(chosen)
    if sends <= most:
        return chosen
    sides = {side: asked.priced(side, options) for side, options in sides.items()}
    first = cheapest(sides, {**limits, "sent": most})
    least = needed(first, ["sent"])["sent"] * (1 + 1e-9)  # for rounding
    within, is_last = max(most, least), False
    while sends > most and not is_last:
        is_last = within <= least
        try:
            chosen = fewest_nats(sides, {**limits, "sent": within})
        except ValueError:  # none that send so little are within the other limits
            break
        sends = asked.whole(chosen)
        within = max(min(within * most / max(sends, most), 0.9 * within), least)
    if sends > most:
        short = f"budget: expected at least {sends:,.0f} bytes sent in a step, got {most:,.0f}"
        if strict:
            raise ValueError(short)
        warn_user(f"{short}: all take structures that send the least")
    return chosen
