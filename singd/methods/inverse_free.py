"""IKFAC, INGD and SINGD: factors that are learned without matrix inversion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from singd import update
from singd.capture.statistics import Columns, Side, Statistic, are_few
from singd.methods import batched, directions, scale
from singd.methods.base import Averages, Factors, Method, Options, Products, Stack
from singd.methods.options import (
    by_name,
    choice,
    default_structures,
    forms_of,
    in_range,
    integer,
    lr_cov,
    stored_as,
    structure_pairs,
    within_limit,
    working_dtype,
)
from singd.methods.single import stepped
from singd.ops import parts
from singd.ops.parts import mixed_rows, within
from singd.ops.precision import is_whitened
from structured import (
    Dense,
    Diagonal,
    ScaledIdentity,
    Structure,
    StructuredMatrix,
    add_symmetric_product_,
    parse,
)


@dataclass(frozen=True)
class InverseFreeFactors(Factors):
    """``K K^T ~ S_K^-1`` and ``C C^T ~ S_C^-1``, and their momenta if there are any."""

    K: StructuredMatrix
    C: StructuredMatrix
    m_K: StructuredMatrix | None = None
    m_C: StructuredMatrix | None = None


class InverseFree(Method):
    """IKFAC (``kfac_like``), INGD (dense) and SINGD (structured); formulas in :mod:`singd.update`.

    Source: Lin et al., arXiv 2312.05705, Figure 3.
    """

    is_split = True
    members_of: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input": ("K", "m_K"),
        "grad": ("C", "m_C"),
    }
    identity: tuple[str, ...] = ("structures", "kfac_like", "max_dim", "wide_structure")

    def check(self, options: Options) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        in_range("alpha1", options["alpha1"], 0.0, 1.0, open_end=True)
        if options["lr_cov"] is not None and not callable(options["lr_cov"]):
            in_range("lr_cov", options["lr_cov"], 0.0, float("inf"))
        if options["factor_clip"] is not None:
            in_range("factor_clip", options["factor_clip"], 1e-6, 1.0)
        limits = options["max_dim"]
        for limit in limits.values() if isinstance(limits, Mapping) else [limits]:
            if limit is not None:
                integer("max_dim", limit, 0)
        flags = ("kfac_like", "normalize_lr_cov", "keep_products", "relative_damping", "scale_init")
        for name in flags:
            choice(name, options[name], (False, True))
        stored_as("preconditioner_dtype", options["preconditioner_dtype"])
        given = options["structures"]
        if given == "auto":
            raise ValueError(
                "structures: expected a pair or a mapping in a group of an optimizer "
                "that was not made with structures='auto', got 'auto'"
            )
        pairs = structure_pairs(given)
        for spec in (options["wide_structure"], *(spec for each in pairs for spec in each)):
            if spec is not None:
                parse(spec)

    # What is stored -----------------------------------------------------------------------------

    def structures(
        self, name: str, shape: Sequence[int], input_structure: str | None, options: Options
    ) -> tuple[Structure, ...]:
        """The structures of K and C, as ``options`` or the defaults say for these sizes."""
        given = by_name(options["structures"], name)
        given = default_structures(shape) if given is None else given
        *_, d_out, d_in = shape
        sides = [(d_in, input_structure or given[0]), (d_out, given[1])]
        return tuple(within_limit(spec, n, name, options) for n, spec in sides)

    def layout(self, options: Options) -> tuple[Any, ...]:
        """The options that structures, data types and momenta depend on."""
        given = [options[name] for name in ("structures", "max_dim")]
        return (
            *(dict(g) if isinstance(g, Mapping) else g for g in given),
            *(options[k] for k in ("wide_structure", "kfac_like", "preconditioner_dtype")),
            options["alpha1"] == 0,
            options["keep_products"],
        )

    def init(
        self, shape: Sequence[int], structures: Sequence[Structure], options: Options, **like: Any
    ) -> InverseFreeFactors:
        """Identities, and momenta of zero where there are momenta."""
        *inner, d_out, d_in = shape
        batch_shape = (*like.pop("batch_shape", ()), *inner)
        dtypes = [working_dtype(given, like["dtype"]) for given in options["preconditioner_dtype"]]
        zeros = [
            structure(n, batch_shape=batch_shape, dtype=dtype, device=like["device"])
            for structure, n, dtype in zip(structures, (d_in, d_out), dtypes, strict=True)
        ]
        K, C = (zero.add_scaled_identity(1.0) for zero in zeros)
        has_momenta = options["alpha1"] and not options["kfac_like"]
        return InverseFreeFactors(K, C, *(zeros if has_momenta else ()))

    def storage(self, factors: Any, options: Options) -> Mapping[str, str]:
        """As ``preconditioner_dtype`` says, where that is the name of a form."""
        is_learned = isinstance(factors, InverseFreeFactors)  # averages are not
        return forms_of(options["preconditioner_dtype"], factors.members()) if is_learned else {}

    # Statistics ---------------------------------------------------------------------------------

    def summarize(
        self, factors: InverseFreeFactors, side: Side, columns: Columns, options: Options
    ) -> Statistic:
        """``Pi(S)``, or ``Pi(K^T S K)`` where that is needed, in float32 at least."""
        K = factors.K if side == "input" else factors.C
        if isinstance(K, Diagonal):
            return Statistic(Diagonal(columns.squares()))
        X = columns.tensor()
        dtype = torch.promote_types(K.dtype, X.dtype)
        dtype = torch.float32 if dtype == torch.float16 else dtype
        wide = torch.promote_types(dtype, torch.float32)
        if is_whitened(K):
            trace = scale.square_sum(X, wide) if scale.needs_trace(options) else None
            return Statistic(update.whitened(K.to(dtype), X.to(dtype)).to(wide), "whitened", trace)
        if isinstance(K, Dense) and X.dtype == torch.bfloat16:  # exact sums of its products
            S = X.new_empty(*X.shape[:-1], K.n, dtype=wide)
            add_symmetric_product_(S, X, beta=0.0)
            return Statistic(Dense(S))
        if isinstance(K, Dense) and are_few(X):
            return Statistic(X.to(wide, copy=True))
        return Statistic(update.statistic(K.to(wide), X.to(wide)))

    def needs_factors(self, factors: InverseFreeFactors, options: Options) -> bool:
        """Whether a factor is applied to the columns."""
        return is_whitened(factors.K) or is_whitened(factors.C)

    def separable(
        self, factors: InverseFreeFactors, side: Side, options: Options, *, whole: bool
    ) -> int | None:
        """As many as the factor mixes, unless all of it is one number."""
        if side not in self.members_of:
            return None
        K = factors.K if side == "input" else factors.C
        is_whole = isinstance(K, ScaledIdentity) or (whole and is_whitened(K))
        return None if is_whole else mixed_rows(K)

    # Updates ------------------------------------------------------------------------------------

    def update(
        self, factors: InverseFreeFactors, statistics: Averages, options: Options, step: int
    ) -> InverseFreeFactors:
        """One update of K and C, and of their momenta, by the functions of :mod:`singd.update`."""
        if options["scale_init"]:
            stack = scale.begun(Stack(factors, statistics, {}))
            factors, statistics = stack.factors, stack.statistics
        sides = ((factors.K, statistics.input), (factors.C, statistics.grad))
        (K, H_K), (C, H_C) = (scale.curvature_of(F, U) for F, U in sides)
        damping = scale.dampings(statistics, options)
        if options["kfac_like"]:
            pairs = zip(damping, sides, strict=True)
            c_K, c_C = (scale.resolved_damping(c, 1.0, U) for c, (_, U) in pairs)
            m_K, m_C = update.ikfac(K, H_K, c_K), update.ikfac(C, H_C, c_C)
        else:
            means = [partial(parts.mean, part=U.part) for _, U in sides]
            m_K, m_C = update.singd(K, C, H_K, H_C, damping[0], (means[0], means[1]))
        measured, new = scale.measured(statistics, options), factors
        for name, F, m, (_, U), s in zip("KC", (K, C), (m_K, m_C), sides, measured, strict=True):
            old = getattr(factors, f"m_{name}")
            new = replace(new, **stepped(name, F, s * m, old, U.part, options, step))
        return new

    def update_all(
        self, stacks: Iterable[Stack], options: Options, step: int
    ) -> Iterator[InverseFreeFactors]:
        """The updates of all stacks, fused where the momenta themselves are not needed."""
        if options["scale_init"]:
            stacks = (scale.begun(stack) for stack in stacks)
        if options["normalize_lr_cov"] or (options["alpha1"] and not options["kfac_like"]):
            yield from super().update_all(stacks, {**options, "scale_init": False}, step)
            return
        rule = batched.Rule(
            options["kfac_like"],
            options["damping"],
            options["relative_damping"],
            lr_cov(options, step),
            options["factor_clip"],
        )
        for K, C in batched.steps(stacks, rule):
            yield InverseFreeFactors(K, C)

    def residuals(
        self, factors: InverseFreeFactors, averages: Averages, options: Options
    ) -> dict[str, Tensor]:
        """``||Pi(K^T (S_K + lambda I) K) - I||_F`` of K, and of C: zero at the best factor."""
        if options["scale_init"]:
            stack = scale.begun(Stack(factors, averages, {}))
            factors, averages = stack.factors, stack.statistics
        found = {}
        both = scale.dampings(averages, {**options, "kfac_like": True})
        sides = zip("KC", (averages.input, averages.grad), both, strict=True)
        for name, U, c in sides:
            K, H = scale.curvature_of(getattr(factors, name), U)
            found[name] = parts.norm((H + c * K.gram()).add_scaled_identity(-1.0), U.part)
        return found

    def roots(self, factors: Any) -> tuple[StructuredMatrix, StructuredMatrix] | None:
        """``K`` and ``C``."""
        return factors.K, factors.C

    # Directions ---------------------------------------------------------------------------------

    def products(self, factors: InverseFreeFactors, options: Options) -> Products:
        """``K K^T`` and ``C C^T``, where their structure holds them: half the work of a step."""
        if not options["keep_products"]:
            return {}
        kept = factors.members().keys() - self.storage(factors, options)  # else larger than they
        found = {
            2 * name: directions.product_of(getattr(factors, name)) for name in "KC" if name in kept
        }
        return {name: product for name, product in found.items() if product is not None}

    def precondition(self, factors: InverseFreeFactors, G: Tensor, products: Products) -> Tensor:
        """``C C^T G K K^T``, in the wider of both data types."""
        K, C = factors.K, factors.C
        wide = torch.promote_types(K.dtype, C.dtype)
        X = G.to(wide)
        KK, CC = (products[k].to(wide) if k in products else None for k in ("KK", "CC"))
        if KK is not None and CC is not None:
            return directions.precondition_by_products(KK, CC, X).to(G.dtype)
        return directions.apply_outer(C, CC, directions.apply_outer(K, KK, X.mT).mT).to(G.dtype)

    def apply_input(self, factors: InverseFreeFactors, G: Tensor, products: Products) -> Tensor:
        """``G K K^T``."""
        wide = torch.promote_types(factors.K.dtype, factors.C.dtype)
        return directions.apply_outer(factors.K, products.get("KK"), G.to(wide).mT).mT

    def apply_grad(self, factors: InverseFreeFactors, G: Tensor, products: Products) -> Tensor:
        """``C C^T G``."""
        return directions.apply_outer(factors.C, products.get("CC"), G)

    def mixed_rows(self, factors: InverseFreeFactors) -> int | None:
        """As many as C mixes."""
        return mixed_rows(factors.C)

    def apply_rows(
        self, factors: InverseFreeFactors, G: Tensor, products: Products, rows: slice
    ) -> Tensor:
        """``C C^T G K K^T`` with the part of C that is of these rows."""
        part = replace(factors, C=within(factors.C, rows))
        kept = products | ({"CC": within(products["CC"], rows)} if "CC" in products else {})
        return self.apply_grad(part, self.apply_input(part, G, kept), kept)

    def is_apart(self, factors: InverseFreeFactors, products: Products) -> bool:
        """As :func:`singd.methods.directions.takes_apart` says of the products."""
        return directions.takes_apart(products.get("KK"), products.get("CC"))

    def apply_apart(
        self, factors: InverseFreeFactors, G: Tensor, g: Tensor, products: Products
    ) -> tuple[Tensor, Tensor]:
        """``C C^T [G g] K K^T``."""
        wide = torch.promote_types(factors.K.dtype, factors.C.dtype)
        return directions.precondition_apart(products["KK"].to(wide), products["CC"].to(wide), G, g)
