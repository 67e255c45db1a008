"""From one use of a module to statistics, or to its counts alone."""

from __future__ import annotations

from torch import Tensor, nn

from singd.capture.accumulator import Use, summed
from singd.capture.observer import Request
from singd.capture.samples import Call
from singd.capture.share import take
from singd.capture.statistics import Columns, KroneckerStatistics, Side, UnreadableError, read
from singd.capture.weight_matrix import WeightMatrix
from singd.layers import Layer
from singd.layers.base import piece_size
from singd.ops.dtensor import columns_of, whole
from singd.ops.parts import Part


def seen(t: Tensor, part: Part | None, side: Side) -> Tensor:
    """What this rank sums up of an input or an output gradient, which may be a DTensor."""
    if part is None or part.side != side:
        return whole(t)
    return columns_of(t, part.group, slice(part.rows.start, min(part.rows.stop, t.shape[-1])))


def seen_shape(part: Part | None, matrix: WeightMatrix) -> tuple[int, ...]:
    """The shape of a matrix, as far as this rank sums up inputs and output gradients."""
    *batch, d_out, d_in = matrix.shape
    if part is None:
        return matrix.shape
    return (*batch, part.size, d_in) if part.side == "grad" else (*batch, d_out, part.size)


def statistics_of(
    request: Request, matrix: WeightMatrix, module: nn.Module, x: Tensor, g: Tensor, call: Call
) -> tuple[KroneckerStatistics, Use]:
    """The statistics of one use of a module with input ``x``, and its counts.

    Raises:
        UnreadableError: If the layer cannot read them.
    """
    layer, flat = matrix.layer, x.ndim == 2
    samples = call.samples
    x = read(layer, layer.samples_first, module, x, samples)
    g = read(layer, layer.samples_first, module, g, samples)
    whole, share = x.shape[:1].numel(), None
    if request.every > 1:
        share = take(layer, request.approximation, x, g, request.every, request.phase)
    if share is not None:
        x, g = share.x, share.g
    pieces = [(x, g)]
    size = None if type(layer).pieces is Layer.pieces else request.piece_bytes()
    if size is not None:
        largest = max(size, piece_size(x.device))
        pieces = list(read(layer, layer.pieces, module, x, g, largest))
    total, use = None, Use(call, 0, 0, flat)
    for piece in pieces:
        total = summed(total, _sum(request, matrix, module, *piece, use))
    if total is None:
        raise UnreadableError("it was called with nothing")
    if share is not None:
        share.complete(total)
        use.samples, use.rows = whole, share.count(use.rows)
    return total, use


def use_of(
    request: Request, matrix: WeightMatrix, module: nn.Module, x: Tensor, g: Tensor, call: Call
) -> Use:
    """The counts of one use; no product is made."""
    layer, (*batch, d_out, _) = matrix.layer, seen_shape(request.part, matrix)
    first = read(layer, layer.samples_first, module, g, call.samples)
    columns = Columns(layer, module, "grad", first, "expand", False, (*batch, d_out))
    samples, positions = columns.counts
    return Use(call, samples, samples * positions, x.ndim == 2)


def _sum(
    request: Request, matrix: WeightMatrix, module: nn.Module, x: Tensor, g: Tensor, use: Use
) -> KroneckerStatistics:
    layer, approximation = matrix.layer, request.approximation
    ones, (*batch, d_out, d_in) = matrix.bias is not None, seen_shape(request.part, matrix)
    inputs = Columns(layer, module, "input", x, approximation, ones, (*batch, d_in))
    grads = Columns(layer, module, "grad", g, approximation, False, (*batch, d_out))
    of_inputs = request.summarize("input", inputs)
    of_grads = request.summarize("grad", grads)
    samples, positions = grads.counts
    use.samples += samples
    use.rows += samples * positions
    return KroneckerStatistics(of_inputs, of_grads, inputs.rows)
