"""The step of one factor, by the functions of :mod:`singd.update`."""

from __future__ import annotations

from functools import partial

from singd import update
from singd.methods.base import Options
from singd.methods.options import lr_cov
from singd.ops import parts
from singd.ops.parts import Part
from structured import StructuredMatrix


def stepped(
    name: str,
    K: StructuredMatrix,
    m_K: StructuredMatrix,
    old: StructuredMatrix | None,
    part: Part | None,
    options: Options,
    step: int,
) -> dict[str, StructuredMatrix]:
    """A factor and its momentum after the step, from the new term of the momentum."""
    new: dict[str, StructuredMatrix] = {}
    alpha1 = 0.0 if old is None else options["alpha1"]
    if options["normalize_lr_cov"]:
        m_K = (1 - alpha1) * m_K  # else the largest entry could only grow
    if old is not None:
        m_K = new[f"m_{name}"] = alpha1 * old.to(m_K.dtype) + m_K
    beta_1 = lr_cov(options, step)
    if options["normalize_lr_cov"]:
        beta_1 = update.normalize_lr_cov(beta_1, m_K, partial(parts.max_abs, part=part))
    if options["factor_clip"] is not None:
        mean, norm = (partial(number, part=part) for number in (parts.mean, parts.norm))
        beta_1 = update.clip_lr_cov(beta_1, m_K, options["factor_clip"], mean, norm)
    return new | {name: update.factor_step(K, m_K, beta_1)}
