"""A structured matrix with trainable entries, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from structured._core.matrix import StructuredMatrix


class StructuredParameter(nn.Module):
    """A member whose stored tensors are parameters: it trains, moves and saves like any module.

    >>> import torch
    >>> from structured import StructuredParameter, parse
    >>> K = StructuredParameter(parse("hierarchical(2, 2)").identity(10))
    >>> K(torch.ones(10, 3)).shape
    torch.Size([10, 3])
    >>> sorted(K.state_dict())
    ['0', '1', '2']

    Args:
        member: Where to start; its tensors are copied.

    Raises:
        TypeError: If ``member`` is not a structured matrix.
    """

    def __init__(self, member: StructuredMatrix) -> None:
        super().__init__()
        if not isinstance(member, StructuredMatrix):
            raise TypeError(f"StructuredParameter: expected a member, got {type(member).__name__}")
        for index, tensor in enumerate(member.detach().clone().tensors()):
            self.register_parameter(str(index), nn.Parameter(tensor))
        self._like = member.detach().map(lambda t: t.new_zeros(()).expand(t.shape))

    @property
    def matrix(self) -> StructuredMatrix:
        """The member, on the parameters: gradients flow to them."""
        tensors = list(self.parameters())
        first, like = tensors[0], self._like
        if (first.dtype, first.device) != (like.dtype, like.device):  # the module was moved
            self._like = like.to(first.device, first.dtype)
        return self._like.with_tensors(tensors)

    def forward(self, X: Tensor) -> Tensor:
        """``K X`` for ``X [..., n, m]`` or ``[n]``."""
        product: Tensor = self.matrix @ X
        return product

    def extra_repr(self) -> str:
        """The member, in words."""
        return repr(self.matrix)
