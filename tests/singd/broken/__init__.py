"""AdamW with one fault each, beside the rows of conformance that it fails: every row has one."""

from tests.singd.broken import constructors, states, steps
from tests.singd.broken.plain import BROKEN, PLAIN, SHARES

__all__ = ["BROKEN", "PLAIN", "SHARES", "constructors", "states", "steps"]
