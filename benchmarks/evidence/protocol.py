"""The protocol of the comparison. It was written down before the runs.

**Tasks.** Those of :data:`TASKS` and :data:`LONG`; no default was chosen on any of them but the
burn-in and the damping of SINGD: by looking at that of :data:`LONG`, and at short runs of the
autoencoder. Steps, batch and schedule are fixed: a warm-up, then a cosine to zero. A half of what a
task holds out is for choosing (``validation``), the other half for reporting (``test``).

**Trials.** Every method has six numbers: rate, weight decay, warm-up, averaging, momentum, damping.
On every task it tries its one setting and :attr:`Size.points` Sobol points of the ranges below,
judged on validation data with one seed. The lowest loss there is its *tuned* setting. Where the
tuned rate of any method is the lowest or the highest that it tried, every method tries as many
points again, from ranges whose rates are wider by the next factor of :attr:`Size.wider`.

**Finals.** The tuned setting, and the *one setting*, which is the same on all tasks and searched
nowhere, run with :attr:`Size.seeds` seeds and are judged on test data. Seeds are paired: one
seed gives all methods the same weights and batches. Differences are to the tuned AdamW.

**Measures.** Test loss; steps and seconds to the target, which is the mean loss that the tuned
AdamW ends with; bytes of the state and at the peak; share of failed trials. A trial failed if its
loss is not finite or no lower than before training. Seconds are those of the processor, on one
thread, in the training steps: other programs on the machine do not count, though they disturb.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from scipy.stats import qmc

from benchmarks.evidence.methods import CONSTANT, METHODS, STRUCTURES

Setting = dict[str, float]

TASKS = (
    "deep autoencoder",
    "PINN, heat equation",
    "graph attention",
    "CNN with batch norm",
    "vision transformer",
    "character GPT",
)
LONG = ("GPT, 3 million",)  # in the full size alone

BASELINE = "AdamW"
CHECKS = 10  # test losses along a final run
SEARCH_SEED, FIRST_SEED = 0, 100
COUNTED_STEPS = 11  # in which bytes are counted: two updates of the factors


@dataclass(frozen=True)
class Size:
    """How much of the protocol is run.

    Attributes:
        stretch: Steps of a run, in those of the task.
        points: Sobol points in a round of the search.
        seeds: Seeds of the finals.
        wider: Of every round of the search, the factor by which the range of rates is wider.
        tasks: What is trained.
        searched: Steps of the trials of the search, in those of the task; ``None`` for as many as
            the finals have.
    """

    stretch: float
    points: int
    seeds: int
    wider: tuple[float, ...]
    tasks: tuple[str, ...]
    searched: float | None = None


SIZES = {
    "tiny": Size(0.02, 1, 2, (1.0,), TASKS[:2]),  # for the tests: seconds
    "small": Size(0.25, 2, 2, (1.0,), TASKS),  # minutes
    "part": Size(1.0, 8, 10, (1.0, 3.0, 9.0), TASKS),  # an hour of two cores
    "long": Size(20.0, 8, 3, (1.0, 3.0, 9.0), TASKS + LONG, 1.0),  # searched as in part
    "full": Size(20.0, 16, 10, (1.0, 3.0, 9.0), TASKS + LONG),  # a minute or more for a run
}


# The ranges --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """A number, even over its values or, by default, over their logarithms."""

    low: float
    high: float
    linear: bool = False

    def at(self, u: float) -> float:
        """The value at ``u`` in [0, 1]."""
        if self.linear:
            return self.low + u * (self.high - self.low)
        return math.exp(math.log(self.low) + u * math.log(self.high / self.low))

    def wider(self, factor: float) -> Range:
        return Range(self.low / factor, self.high * factor, self.linear)


RATE = Range(3e-4, 3e-2)  # all but SGD take steps of about AdamW's length
DECAY = Range(1e-3, 0.3)  # decoupled
WARMUP = Range(0.0, 0.2, linear=True)  # share of the steps
SECOND_MOMENT = Range(1e-3, 0.2)  # 1 - beta_2
FACTORS = Range(0.03, 0.45)  # lr_cov; published ones are 0.11 to 0.44 (arXiv 2402.03496)
MOMENTUM = Range(0.8, 0.98, linear=True)  # of the weights
FACTOR_MOMENTUM = Range(0.0, 0.7, linear=True)  # alpha_1; published ones are 0.55 to 0.65
EPS = Range(1e-10, 1e-4)
DAMPING = Range(1e-5, 1e-2)  # published ones are 3e-5 to 4e-4

FIRST_ORDER = {
    "rate": RATE,
    "decay": DECAY,
    "warmup": WARMUP,
    "averaging": SECOND_MOMENT,
    "momentum": MOMENTUM,
    "damping": EPS,
}
SECOND_ORDER = FIRST_ORDER | {"averaging": FACTORS, "damping": DAMPING}
INVERSE_FREE = SECOND_ORDER | {"momentum": FACTOR_MOMENTUM}  # that of the weights is 0.9

OTHERS: dict[str, dict[str, Range]] = {
    # SGD has neither a second moment nor a damping; its decay is coupled, as it always was
    "SGD": FIRST_ORDER | {"rate": Range(3e-3, 1.0), "decay": Range(1e-6, 1e-2)},
    "AdamW": FIRST_ORDER,
    "Muon": FIRST_ORDER,
    "SOAP": FIRST_ORDER,
    "KL-Shampoo": SECOND_ORDER,
    "KFAC": SECOND_ORDER | {"damping": Range(1e-6, 1e-1)},  # in units of the curvature
    "IKFAC": SECOND_ORDER,
}
RANGES = {name: OTHERS.get(name.removesuffix(CONSTANT), INVERSE_FREE) for name in METHODS}

# The settings with nothing searched: one rate for all but SGD, otherwise each one's own defaults.
COMMON = {"rate": 3e-3, "decay": 0.01, "warmup": 0.05}
OWN: dict[str, Setting] = {
    "SGD": {"rate": 0.1, "decay": 5e-4, "averaging": 0.0, "momentum": 0.9, "damping": 0.0},
    "AdamW": {"averaging": 1e-3, "momentum": 0.9, "damping": 1e-8},
    "Muon": {"averaging": 1e-3, "momentum": 0.95, "damping": 1e-8},
    "SOAP": {"averaging": 0.05, "momentum": 0.95, "damping": 1e-8},
    "KL-Shampoo": {"averaging": 0.3, "momentum": 0.9, "damping": 1e-4},
    "KFAC": {"averaging": 0.3, "momentum": 0.9, "damping": 1e-3},
    "IKFAC": {"averaging": 0.3, "momentum": 0.9, "damping": 1e-3},
}
DEFAULTS = {"averaging": 0.3, "momentum": 0.0, "damping": 1e-3}  # of INGD and others
OWN |= {name: DEFAULTS | {"damping": 1e-2} for name in STRUCTURES}  # with a burn-in
FIXED = {name: COMMON | OWN.get(name.removesuffix(CONSTANT), DEFAULTS) for name in METHODS}


@cache
def points(method: str, count: int, wider: float = 1.0) -> tuple[Setting, ...]:
    """Settings at the first ``count`` points of one scrambled Sobol sequence, three digits each."""
    ranges = RANGES[method] | {"rate": RANGES[method]["rate"].wider(wider)}
    sequence = qmc.Sobol(len(ranges), scramble=True, seed=0)
    drawn = sequence.random_base2(max(count - 1, 0).bit_length())[:count]
    return tuple(
        {name: float(f"{r.at(u):.3g}") for u, (name, r) in zip(point, ranges.items(), strict=True)}
        for point in drawn.tolist()
    )


def factor(step: int, steps: int, warmup: float) -> float:
    """The rate of step 0, 1, ... in units of the highest: a warm-up, then a cosine to zero."""
    rising = max(round(warmup * steps), 1)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising)))
