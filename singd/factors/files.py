"""Named tensors and text in safetensors files, whose package is asked for when one is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and text."""
    _safetensors().torch.save_file(dict(tensors), path, dict(metadata))


def read(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the text of a file."""
    with _safetensors().safe_open(path, "pt", device=str(device)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "files of factors: expected the package safetensors, got none: pip install safetensors"
        ) from None
    return safetensors
