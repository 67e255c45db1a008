"""A kernel is checked before it serves, and none that fails stops a training step.

The first use on a device and data types compiles the kernel and compares it with its reference, on
small inputs whose results are exact. A kernel that raises, then or at any use, or that gives other
numbers falls back to its reference for good, with one warning. The environment variable
``STRUCTURED_KERNELS=0`` turns all kernels off.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SWITCH = "STRUCTURED_KERNELS"
"""Environment variable that turns all kernels off if it is ``0`` when they are first used."""

DEVICES = {"cuda"}
"""Types of devices on which kernels may serve; tests add that of Triton's interpreter."""

Key = tuple[torch.device, tuple[torch.dtype, ...]]
"""Device and data types of a call."""

_LOCK = threading.Lock()
_DIFFERS = "its numbers are not those of its reference"


@dataclass(frozen=True)
class KernelStatus:
    """Whether a kernel runs on a device and data types.

    Attributes:
        kernel: Name of the operator.
        device: Device; ``None`` before any use.
        dtypes: Data types of the arguments, in order, each once.
        reason: Why its reference runs instead; ``""`` where the kernel does.
    """

    kernel: str
    device: torch.device | None
    dtypes: tuple[torch.dtype, ...]
    reason: str

    @property
    def serves(self) -> bool:
        """Whether the kernel runs, and not its reference."""
        return not self.reason

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        where = "" if self.device is None else f" on {self.device} ({dtypes})"
        return f"{self.kernel}{where}: {self.reason or 'serves'}"


class Guarded:
    """A kernel with its reference, called like either.

    Args:
        name: Name of the operator.
        kernel: Function that compiles and launches; it changes nothing before it can raise.
        reference: The same in plain PyTorch; it does not wait for the device.
        samples: ``samples(device, dtypes)`` gives arguments for the check, new ones at each call,
            whose results are exact. ``dtypes`` are those of a call in order, each once.
    """

    def __init__(
        self,
        name: str,
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        samples: Callable[[torch.device, tuple[torch.dtype, ...]], Iterable[tuple[Any, ...]]],
    ) -> None:
        self.name, self.kernel, self.reference, self.samples = name, kernel, reference, samples
        self.found: dict[Key, KernelStatus] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the kernel if it serves, its reference otherwise."""
        key = device, _ = _key(args)
        if device.type in DEVICES:
            status = self.found.get(key)
            if status.serves if status is not None else self._check(key):
                try:
                    with _on(device):
                        return self.kernel(*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self._fall_back(key, _in_one_line(error))
        return self.reference(*args)

    def status(self) -> list[KernelStatus]:
        """What was found out so far."""
        return list(self.found.values()) or [KernelStatus(self.name, None, (), "not used yet")]

    def _check(self, key: Key) -> bool:
        """Whether the kernel serves, found out now unless there is an obstacle for the moment."""
        if key[0].type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # a CUDA graph cannot compare: warm up before
        with _LOCK:
            if key in self.found:
                return self.found[key].serves
            reason = ""
            if os.environ.get(SWITCH) == "0":
                reason = f"turned off by {SWITCH}=0"
            elif not triton_is_installed():
                reason = "Triton is not installed"
            if reason:
                self.found[key] = KernelStatus(self.name, *key, reason)
                return False
            try:
                reason = _DIFFERS if self._differs(*key) else ""
            except torch.OutOfMemoryError:
                return False
            except Exception as error:
                reason = _in_one_line(error)
            if not reason:
                self.found[key] = KernelStatus(self.name, *key, "")
        if reason:
            self._fall_back(key, reason)
        return not reason

    @torch.no_grad()
    def _differs(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
        """Whether results, or what is written in place, are not those of the reference."""
        cases = (self.samples(device, dtypes) for _ in range(2))
        with torch.autocast(device.type, enabled=False), _on(device):
            for mine, theirs in zip(*cases, strict=True):
                found = tree_leaves((self.kernel(*mine), mine))
                expected = tree_leaves((self.reference(*theirs), theirs))
                for a, b in zip(found, expected, strict=True):
                    if isinstance(a, Tensor) and not (a.dtype == b.dtype and torch.equal(a, b)):
                        return True
        return False

    def _fall_back(self, key: Key, reason: str) -> None:
        """Leave a device and data types to the reference, with one warning."""
        with _LOCK:
            if key in self.found and not self.found[key].serves:
                return
            self.found[key] = KernelStatus(self.name, *key, f"falls back to PyTorch: {reason}")
        warnings.warn(str(self.found[key]), RuntimeWarning, stacklevel=3)


def integers(*shape: int, bound: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers from ``-bound`` to ``bound``, always the same; no generator is asked for them."""
    i = torch.arange(math.prod(shape), device=device)
    return ((i * i + 5 * i) % 1009 % (2 * bound + 1) - bound).view(shape).to(dtype)


@functools.cache
def triton_is_installed() -> bool:
    """Whether there is a package of that name; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def _key(args: tuple[Any, ...]) -> Key:
    """Device and data types of the arguments; lists count by their first item."""
    firsts = [a[0] if isinstance(a, list) and a else a for a in args]
    tensors = [a for a in firsts if isinstance(a, Tensor)]
    dtypes = [a.dtype for a in tensors if a.is_floating_point()]
    dtypes += [a for a in firsts if isinstance(a, torch.dtype)]
    return tensors[0].device, tuple(dict.fromkeys(dtypes))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever that of the tensors is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
