"""How many terms the loss is a mean over, where the user says so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LossCount:
    """How many terms the loss is a mean over, where the user says so.

    A count may come before the pass that it is for, and ``zero_grad`` between the two.
    """

    past: float | Tensor = 0  # of passes so far
    ahead: float | Tensor = 0  # of the pass to come
    was_reset: bool = False  # since these were counted

    @property
    def terms(self) -> float | Tensor:
        """What was counted for the coming step; 0 if nothing."""
        return self.past + self.ahead

    def add(self, terms: float | Tensor) -> None:
        """Count terms of the pass to come."""
        if self.was_reset:
            self.ahead, self.was_reset = 0, False  # there was no pass for them
        self.ahead = self.ahead + terms

    def begin_pass(self) -> None:
        """A pass is under way: it is the one that was counted for."""
        self.past, self.ahead, self.was_reset = self.terms, 0, False

    def reset(self) -> None:
        """Forget the passes so far, but not the one to come."""
        self.past, self.was_reset = 0, True

    def end_step(self, terms: float | Tensor = 0) -> None:
        """Begin again, or agree on the terms of all passes."""
        self.past, self.ahead, self.was_reset = terms, 0, False
