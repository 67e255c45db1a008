"""What holds for the passes before a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Passes:
    """Held by an optimizer as one object, since proxies of an optimizer share no more than that.

    A count of terms may come before the pass that it is for, and ``zero_grad`` between the two.
    """

    paused: bool = False
    sampled: bool = False  # the statistics are those of curvature()
    seen: float | Tensor = 0  # terms of the passes so far
    ahead: float | Tensor = 0  # terms of the pass to come
    was_reset: bool = False  # since these were counted

    @property
    def terms(self) -> float | Tensor:
        """What was counted for the coming step; 0 if nothing."""
        return self.seen + self.ahead

    def count(self, terms: float | Tensor) -> None:
        """Count terms of the pass to come."""
        if self.was_reset:
            self.ahead, self.was_reset = 0, False  # their pass never came
        self.ahead = self.ahead + terms

    def came(self) -> None:
        """The pass that was counted for is here."""
        self.seen, self.ahead, self.was_reset = self.terms, 0, False

    def reset(self) -> None:
        """Forget the passes so far, but not the one to come."""
        self.seen, self.was_reset = 0, True

    def end(self, terms: float | Tensor = 0) -> None:
        """Begin again, or agree on the terms of all passes."""
        self.seen, self.ahead, self.was_reset = terms, 0, False
