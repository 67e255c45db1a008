"""Looking at training: what a step did, and which kernels serve."""

from __future__ import annotations

from typing import Any

from singd.ops.dispatch import load_kernels
from singd.step.pipeline import Report


def describe(report: Report, skipped: int) -> dict[str, Any]:
    """What a step did, as numbers; tensors stay on their device.

    Args:
        report: Report of the step.
        skipped: Number of steps that were skipped so far, as far as that is known.

    Returns:
        ``skipped``; ``trust_region``, the factor of ``kl_clip``, if there is one; and by the name
        of every preconditioned weight ``gradient_norm``, ``direction_norm``, and at an update
        ``residual_K`` and ``residual_C``, how far the factors were from where they rest.
    """
    found: dict[str, Any] = {"skipped": skipped}
    found |= {name: dict(norms) for name, norms in report.norms.items()}
    for matrix, residuals in report.residuals.items():
        entry = found.setdefault(matrix.key, {})
        entry |= {f"residual_{name}": value for name, value in residuals.items()}
    scales = [d.scale for d in report.directions if d.scale is not None]
    return found | ({"trust_region": scales[-1]} if scales else {})


def kernels() -> list[Any]:
    """Which Triton kernels serve, on which device and data types; which fell back, and why.

    A kernel is listed once for each device and data types that it was used with, and as not used
    yet before. Each row prints as a line, and has the attributes of
    :class:`structured.kernels.KernelStatus`: ``kernel``, ``device``, ``dtypes``, ``serves`` and
    ``reason``. The list is empty where the folders of the kernels are not there.
    """
    ours = load_kernels()
    if ours is None:
        return []
    from structured.kernels import status

    return [*ours.status(), *status()]
