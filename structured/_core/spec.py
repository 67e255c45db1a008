"""Specs: a structure is written as the call that makes it.

``parse("hierarchical(15, 15)")`` gives a :class:`Structure`, a callable ``n -> zero member``.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from structured._core.composite import Composite
from structured._core.matrix import StructuredMatrix
from structured._core.statics import Shared
from structured._core.stored import Stored

StructureLike: TypeAlias = "str | type[StructuredMatrix] | Structure | Callable[..., Any]"

_COMPOSITIONS: dict[str, Callable[..., Structure]] = {}
_WORDS: set[str] = set()

# Names used by the PyPI package `singd`.
_ALIASES = (
    (re.compile(r"block(\d+)diagonal"), r"block_diagonal(\1)"),
    (re.compile(r"hierarchical(\d+)_(\d+)"), r"hierarchical(\1, \2)"),
    (re.compile(r"triltoeplitz"), "lower_toeplitz"),
    (re.compile(r"triutoeplitz"), "upper_toeplitz"),
)


@dataclass(frozen=True)
class Structure:
    """A structure: called with a size it gives the zero member of that size.

    Args:
        factory: A subclass of :class:`StructuredMatrix`, or any callable
            ``(n, *options, batch_shape, dtype, device) -> zero member``.
        options: What follows ``n`` in the call, such as a block size or further structures.
        label: The spec to print, where it is shorter than the composition it stands for.

    >>> structure = parse("block_diagonal(30)")
    >>> structure(100, batch_shape=(24,)).shape
    torch.Size([24, 100, 100])
    """

    factory: Callable[..., Any]
    options: tuple[Any, ...] = ()
    label: str | None = field(default=None, compare=False)

    def __call__(
        self,
        n: int,
        *,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StructuredMatrix:
        """The zero member of size ``n``.

        Raises:
            ValueError: If ``n`` is not a non-negative integer, or ``batch_shape`` not several.
            TypeError: If the factory returns anything but a structured matrix.
        """
        if not is_size(n):
            raise ValueError(f"{self}: expected a size n >= 0, got {n!r}")
        if not isinstance(batch_shape, Sequence) or not all(map(is_size, batch_shape)):
            raise ValueError(f"{self}: expected a batch shape such as (2, 3), got {batch_shape!r}")
        make = getattr(self.factory, "zeros", self.factory)
        dtype = dtype or torch.get_default_dtype()
        member = make(n, *self.options, batch_shape=batch_shape, dtype=dtype, device=device)
        if not isinstance(member, StructuredMatrix):
            raise TypeError(f"{self}: expected a StructuredMatrix, got {type(member).__name__}")
        return member

    def _key(self) -> tuple[Any, ...]:
        numbers = Tensor | Stored | Composite
        return (self.factory, *(Shared(o) if isinstance(o, numbers) else o for o in self.options))

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Structure) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def at(self, n: int) -> Structure:
        """The structure of members of size ``n``: itself, unless that depends on the size."""
        choose = getattr(self.factory, "choose", None)
        return choose(n, *self.options) if choose is not None else self

    def identity(self, n: int, **kwargs: Any) -> StructuredMatrix:
        """The identity of size ``n``; keywords as for the call."""
        return self(n, **kwargs).add_scaled_identity(1.0)

    def randn(
        self, n: int, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> StructuredMatrix:
        """A member of size ``n`` with standard normal stored numbers; keywords as for the call."""
        return self(n, **kwargs).randn_like(generator=generator)

    def from_dense(self, M: Tensor) -> StructuredMatrix:
        """The member nearest to ``M [..., n, n]``: ``M`` itself, where it is a member."""
        return self(M.shape[-1], dtype=M.dtype, device=M.device).orthogonal_project(M)

    def __str__(self) -> str:
        if self.label is not None:
            return self.label
        name = getattr(self.factory, "__name__", type(self.factory).__name__)
        options = f"({', '.join(map(str, self.options))})" if self.options else ""
        return snake_case(name) + options


def is_size(n: Any) -> bool:
    """Whether ``n`` is a non-negative integer; truth values are none."""
    return isinstance(n, int | torch.SymInt) and not isinstance(n, bool) and n >= 0


def parse(spec: StructureLike) -> Structure:
    """The structure that ``spec`` names.

    Args:
        spec: The call you would write (``"diagonal"``, ``"block_diagonal(30)"``,
            ``"block_upper(dense, block_lower(diagonal, dense, -15), 15)"``), a class, a
            :class:`Structure`, or a callable ``n -> zero member``. The names of the PyPI package
            ``singd`` (``"block30diagonal"``, ``"hierarchical15_15"``, ...) are understood.

    Returns:
        A :class:`Structure` with ``parse(str(structure)) == structure``.

    Raises:
        ValueError: If the spec names no known structure, or its options make no sense.
        TypeError: If ``spec`` is none of the above.
    """
    if isinstance(spec, Structure):
        return spec
    if isinstance(spec, str):
        return _parse_text(spec)
    if inspect.isclass(spec) and not issubclass(spec, StructuredMatrix):
        raise TypeError(f"structure: expected a subclass of StructuredMatrix, got {spec.__name__}")
    if callable(spec):
        return Structure(spec)
    raise TypeError(
        f"structure: expected a spec, a class or a callable, got {type(spec).__name__} {spec!r}"
    )


def composition(function: Callable[..., Structure]) -> Callable[..., Structure]:
    """Give a function that composes structures its name in specs."""
    _COMPOSITIONS[function.__name__] = function
    return function


def words(*names: str) -> None:
    """Let options be given as bare words in specs: ``rotated(diagonal, hadamard)``."""
    _WORDS.update(names)


def snake_case(name: str) -> str:
    """``LowerToeplitz`` as ``lower_toeplitz``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def known() -> dict[str, Callable[..., Structure]]:
    """Every name that a spec may use, with what it makes of its options.

    Classes are found through their base, the newest first; a built-in name always means the
    built-in structure.
    """

    def ours(cls: type) -> bool:
        return getattr(sys.modules["structured"], cls.__name__, None) is cls

    def make(cls: type[StructuredMatrix]) -> Callable[..., Structure]:
        return lambda *options: Structure(cls, options)

    words: dict[str, Callable[..., Structure]] = {}
    for cls in sorted(_descendants(StructuredMatrix), key=ours):
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            words[snake_case(cls.__name__)] = make(cls)
    return words | _COMPOSITIONS


def _descendants(cls: type[Any]) -> Iterator[type[StructuredMatrix]]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


def _parse_text(text: str) -> Structure:
    source = text.strip()
    for pattern, replacement in _ALIASES:
        if pattern.fullmatch(source):
            source = pattern.sub(replacement, source)
    try:
        tree = ast.parse(source, mode="eval").body
    except SyntaxError:
        raise ValueError(
            f"structure {text!r}: expected a call such as 'hierarchical(15, 15)'"
        ) from None
    structure = _evaluate(tree, text)
    if not isinstance(structure, Structure):
        raise ValueError(f"structure {text!r}: expected the name of a structure, got {structure!r}")
    try:
        structure(0, device="meta")  # every structure has a member of size 0
    except (TypeError, AttributeError) as error:
        raise ValueError(f"structure {text!r}: {error}") from error
    return structure


def _evaluate(node: ast.expr, text: str) -> Any:
    """The value of one node of the spec: a structure, a number or a word."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=word) if word in _WORDS:
            return word
        case ast.Name(id=word):
            return _make(word, (), text)
        case ast.Call(func=ast.Name(id=word), args=args, keywords=[]):
            return _make(word, tuple(_evaluate(arg, text) for arg in args), text)
    raise ValueError(
        f"structure {text!r}: expected names, numbers and calls, got {ast.unparse(node)!r}"
    )


def _make(word: str, options: tuple[Any, ...], text: str) -> Structure:
    makers = known()
    if word not in makers:
        names = sorted(makers.keys() | _WORDS)
        near = difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"structure {text!r}: unknown name {word!r}, did you mean {near!r}? "
            f"Known: {', '.join(names)}"
        )
    try:
        return makers[word](*options)
    except TypeError as error:
        raise ValueError(f"structure {text!r}: {error}") from error
