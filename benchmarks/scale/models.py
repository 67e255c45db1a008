"""Models by their shapes, and machines by their speeds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """One weight on a rank, or its part of a weight that tensor parallelism splits.

    Attributes:
        name: Name of the weight; equal in all layers but for their number.
        rows: Outputs.
        columns: Inputs.
        count: Number of such weights in the model.
    """

    name: str
    rows: int
    columns: int
    count: int

    @property
    def numbers(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Model:
    """A transformer of the Llama kind.

    Attributes:
        width: Width of the residual stream.
        hidden: Width of the feed-forward layers.
        layers: Number of blocks.
        keys: Width of keys and of values, fewer heads than queries have.
        vocabulary: Number of tokens.
        is_tied: Whether the head is the embedding.
    """

    width: int
    hidden: int
    layers: int
    keys: int
    vocabulary: int
    is_tied: bool = False

    def matrices(self, tensor: int = 1) -> list[Matrix]:
        """The weights of linear layers, as one of ``tensor`` ranks has them."""
        d, h, k = self.width, self.hidden, self.keys
        split = [
            Matrix("q", d // tensor, d, self.layers),
            Matrix("k", k // tensor, d, self.layers),
            Matrix("v", k // tensor, d, self.layers),
            Matrix("o", d, d // tensor, self.layers),
            Matrix("gate", h // tensor, d, self.layers),
            Matrix("up", h // tensor, d, self.layers),
            Matrix("down", d, h // tensor, self.layers),
        ]
        return split if self.is_tied else [*split, Matrix("head", self.vocabulary // tensor, d, 1)]

    def others(self, tensor: int = 1) -> int:
        """Numbers in embeddings and normalizations, which AdamW trains."""
        return self.vocabulary * self.width // tensor + (2 * self.layers + 1) * self.width

    @property
    def parameters(self) -> int:
        return self.others() + sum(m.count * m.numbers for m in self.matrices())


MODELS = {
    "1B": Model(2048, 8192, 16, 512, 128256, is_tied=True),
    "8B": Model(4096, 14336, 32, 1024, 128256),
    "70B": Model(8192, 28672, 80, 1024, 128256),
    "405B": Model(16384, 53248, 126, 1024, 128256),
}
"""Shapes of Llama 3.1 and 3.2 (Grattafiori et al., arXiv 2407.21783, Table 3)."""


@dataclass(frozen=True)
class Assumptions:
    """What costs are calculated by. Nothing is overlapped with anything.

    Attributes:
        tokens: Tokens that a GPU trains on in a step.
        peak: Floating-point operations a second of a GPU.
        utilization: Share of ``peak`` that forward and backward passes reach.
        speed: Floating-point operations a second of the optimizer's products.
        bandwidth: Bytes a second that a GPU sends to others.
        memory: Bytes a second that a GPU reads or writes.
        latency: Seconds that a collective takes at least.
        interval: Steps between two updates of factors, roots or bases.
        sample: One token in so many counts in statistics.
        itemsize: Bytes of a number in factors.
        root: Multiply-adds, in n^3, of an inverse root of a matrix of size n.
        basis: Those of a new orthogonal basis, by one product and one QR decomposition.
        largest: Size beyond which Shampoo splits a side, and SOAP leaves it alone.
    """

    tokens: int = 8192
    peak: float = 989e12
    utilization: float = 0.4
    speed: float = 200e12
    bandwidth: float = 50e9
    memory: float = 3.35e12
    latency: float = 2e-5
    interval: int = 10
    sample: int = 1
    itemsize: int = 4
    root: float = 25.0
    basis: float = 5.0
    largest: int = 8192
