"""Why a weight may get a gradient though its module was not seen to be called."""

from __future__ import annotations

import sys


def unseen_reason() -> str:
    """What to say of such a weight, for hooks that are registered now.

    What ``torch.compile`` made before runs on without them.
    """
    otherwise = "the weight is used without its module being called"
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None or not dynamo.counters["frames"].get("ok", 0):
        return otherwise
    return (
        "the model was compiled and called before the optimizer was made, and runs without its "
        "hooks (make the optimizer first, or call torch.compiler.reset() before that), or "
        f"{otherwise}"
    )
