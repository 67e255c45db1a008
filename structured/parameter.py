"""A structured matrix with trainable entries, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structured._core.matrix import StructuredMatrix


class StructuredParameter(nn.Module):
    """A member whose stored tensors are parameters: it trains, moves and saves like any module.

    Static tensors of the structure, such as a basis or a permutation, are buffers: they move and
    are saved with the parameters, and do not train.

    >>> import torch
    >>> from structured import StructuredParameter, parse
    >>> K = StructuredParameter(parse("hierarchical(2, 2)").identity(10))
    >>> K(torch.ones(10, 3)).shape
    torch.Size([10, 3])
    >>> sorted(K.state_dict())
    ['0', '1', '2']

    Args:
        member: The first member; its tensors are copied. It may be on the meta device: then
            ``to_empty`` and a state dict or :meth:`reset_parameters` give it numbers.

    Raises:
        TypeError: If ``member`` is not a structured matrix.
    """

    def __init__(self, member: StructuredMatrix) -> None:
        super().__init__()
        if not isinstance(member, StructuredMatrix):
            raise TypeError(f"StructuredParameter: expected a member, got {type(member).__name__}")
        for index, tensor in enumerate(member.detach().clone().tensors()):
            self.register_parameter(str(index), nn.Parameter(tensor))
        statics: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            statics.append(t.detach().clone())
            return t.to("meta")

        self._like = member.detach().map(lambda t: t.to("meta")).map_static(note)
        for index, tensor in enumerate(statics):
            self.register_buffer(f"static{index}", tensor)

    @property
    def matrix(self) -> StructuredMatrix:
        """The member, on the parameters: gradients flow to them."""
        statics = list(self.buffers())
        like = self._like.map_static(lambda _: statics.pop(0)) if statics else self._like
        return like.with_tensors(list(self.parameters()))

    def reset_parameters(self) -> None:
        """Make it the identity.

        Raises:
            RuntimeError: If that needs static tensors that have no numbers yet, as after
                ``to_empty``: they come with the state dict alone.
        """
        with torch.no_grad():
            identity = self.matrix.zeros_like().add_scaled_identity(1.0)
            dense = identity.to_dense()
            eye = torch.eye(identity.n, dtype=dense.dtype, device=dense.device)
            if not dense.is_meta and not torch.allclose(dense, eye.expand_as(dense), atol=0.1):
                raise RuntimeError(
                    "StructuredParameter.reset_parameters: expected static tensors that give an "
                    f"identity, got those of {identity!r}; load a state dict"
                )
            for parameter, tensor in zip(self.parameters(), identity.tensors(), strict=True):
                parameter.copy_(tensor)

    def forward(self, X: Tensor) -> Tensor:
        """``K X`` for ``X [..., n, m]`` or ``[n]``; under autocast in its dtype, as nn.Linear."""
        K, device = self.matrix, X.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            if torch.float64 not in (K.dtype, X.dtype):  # which autocast leaves alone
                K, X = K.to(dtype), X.to(dtype)
        return K.apply(X[:, None])[..., 0] if X.ndim == 1 else K.apply(X)

    def extra_repr(self) -> str:
        """The member, in words."""
        return repr(self.matrix)
