"""A CUDA graph's stand-in on any device: operations are recorded once, and replayed without Python.

As in a CUDA graph, tensors keep their places, random numbers are new at every replay, and nothing
may be read off a tensor or copied from the host while recording. Unlike there, what is recorded
also happens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

READS = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "lift_fresh",
    "_linalg_check_errors",
)


class Graph(TorchDispatchMode):
    """What happens within this context is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in READS, f"{name}: the host waits, or is waited for"
        kwargs = kwargs or {}
        generators = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
        assert not generators, f"{name}: a generator that the graph does not know"
        places = tree_map(_place, (args, kwargs))  # their shape may change
        result = func(*args, **kwargs)
        self.calls.append((func, *places, [_place(leaf) for leaf in tree_leaves(result)]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again, at the same places."""
        for func, args, kwargs, results in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for kept, new in zip(results, again, strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def _place(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
