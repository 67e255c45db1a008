"""What measures the paper's claims: the variants are what they are called, and scripts run."""

import math

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("networkx")

from benchmarks.claims import common, half_precision, ikfac_follows, memory, structures, trace_terms
from benchmarks.claims.common import BARE
from singd import SINGD, update
from structured import Dense

AUTOENCODER = "deep autoencoder"


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("none (IKFAC)", {"kfac_like": True}),
        ("both (INGD)", {}),
        ("both, momentum 0.6", {"alpha1": 0.6}),
    ],
)
@pytest.mark.parametrize("form", [BARE, {"structures": ("dense", "dense")}])
def test_with_its_terms_the_rule_is_that_of_the_library(variant, options, form):
    given = form | {"lr": 1e-3, "lr_cov": 0.1, "damping": 1e-3, "T": 2, "burn_in": 0}

    def train(make):
        return common.train(AUTOENCODER, make, steps=5).last

    terms = trace_terms.VARIANTS[variant]
    ours = train(lambda model: trace_terms.make(terms, model, **given))
    assert ours == pytest.approx(train(lambda model: SINGD(model, **(given | options))), rel=1e-5)
    other = trace_terms.Variant(not terms.curvature, terms.damping)
    assert ours != train(lambda model: trace_terms.make(other, model, **given))


@pytest.mark.parametrize("alpha1", [0.0, 0.6])
@pytest.mark.parametrize(("rule", "limit"), [("ikfac", 2.0), ("singd", 1.0)])
def test_one_number_settles_below_the_step_size_of_the_analysis(rule, limit, alpha1):
    s_K, s_C, damping = 3.0, 0.2, 0.01

    def settles(beta):
        k, c = (Dense(torch.tensor([[x]], dtype=torch.float64)) for x in (0.57, 2.2))
        m_K, m_C = 0.0 * k, 0.0 * c
        for _ in range(600):
            H_K, H_C = (Dense(s * K.to_dense() ** 2) for K, s in ((k, s_K), (c, s_C)))
            if rule == "ikfac":
                new = update.ikfac(k, H_K, damping), update.ikfac(c, H_C, damping)
            else:
                new = update.singd(k, c, H_K, H_C, damping)
            m_K, m_C = alpha1 * m_K + new[0], alpha1 * m_C + new[1]
            k, c = update.factor_step(k, m_K, beta), update.factor_step(c, m_C, beta)
        return max(float(m.max_abs()) for m in new) < 1e-6

    assert settles(0.95 * limit * (1 + alpha1))
    assert not settles(1.05 * limit * (1 + alpha1))


@pytest.mark.parametrize(("y", "grows"), [(0.95, False), (1.05, True)])
def test_a_number_beyond_the_bound_of_the_analysis_grows_without_end(y, grows):
    beta = 0.1
    k, S = (
        Dense(torch.ones(1, 1, dtype=torch.float64)),
        Dense(torch.full((1, 1), y * (1 + 4 / beta))),
    )
    for _ in range(5):
        k = update.factor_step(k, update.ikfac(k, k.congruence(S.to(torch.float64)), 0.0), beta)
    assert (float(k.max_abs()) > 10) == grows


def test_inversion_is_exact_in_float64_and_rounded_in_bfloat16():
    X = torch.randn(2, 12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S = X @ X.mT / 30
    exact = torch.linalg.inv(S + 0.01 * torch.eye(12))
    assert torch.allclose(half_precision.inverted_there(S, 0.01), exact, rtol=1e-9)
    low = half_precision.inverted_there(S.bfloat16(), 0.01)
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() / exact.norm() > 1e-4


def test_a_condition_number_is_that_of_the_inputs():
    X = half_precision.inputs(1e4, torch.float64)
    values = torch.linalg.eigvalsh(X.T @ X / len(X))
    assert values[-1] / values[0] == pytest.approx(1e4)
    assert half_precision.of_layer("KFAC", 100.0, torch.float32) == "1 to 1"


def test_ikfac_is_nearer_to_kfac_with_smaller_steps_of_the_factors():
    coarse, fine = (
        float(ikfac_follows.follow("PINN, heat equation", beta, 40)["factors"])
        for beta in (0.08, 0.02)
    )
    assert fine < 0.5 * coarse


def test_nats_are_none_for_a_triangle_and_fall_with_the_size_of_blocks():
    spectrum = structures.Spectrum(AUTOENCODER, 8)
    lost = [spectrum.nats(f"block_diagonal({n})", "both") for n in (4, 8, 16)]
    assert lost == sorted(lost, reverse=True)
    assert spectrum.nats("lower_triangular", "both") < 1e-6 < lost[-1]
    parts = spectrum.nats("diagonal", "K") + spectrum.nats("diagonal", "C")
    assert parts == pytest.approx(spectrum.nats("diagonal", "both"))
    assert 0 < spectrum.ranks("K") <= 1
    assert 0 < spectrum.inside(8) < spectrum.inside(64) <= 1


def test_a_run_that_is_not_finite_is_told_from_one_that_diverged():
    def sgd(lr, up=False):
        return lambda model: torch.optim.SGD(model.parameters(), lr=lr, maximize=up)

    makers = sgd(1.0), sgd(1.0, up=True), sgd(1e30)
    ends = [common.train(AUTOENCODER, make, steps=3) for make in makers]
    assert [end.how for end in ends] == ["good", "diverged", "nan"]
    assert ends[0].last < ends[0].first < ends[1].last
    assert math.isnan(ends[2].last)


@pytest.mark.parametrize(
    ("script", "names", "more"),
    [
        (trace_terms, {"RATES": (1e-3,), "LR_COV": (0.1,), "SCALES": (1.0, 10.0)}, ()),
        (half_precision, {"RATES": (1e-2,), "CONDITIONS": (10.0,)}, ()),
        (ikfac_follows, {"BETAS": (0.02,)}, ()),
        (structures, {"SPECS": ("diagonal",), "PAIRS": ()}, ()),
        (memory, {}, ("--model", "mlp", "--T", "2", "--turns", "1")),
    ],
)
def test_every_script_writes_its_table_and_repeats_nothing(
    script, names, more, tmp_path, monkeypatch
):
    for name, value in names.items():
        monkeypatch.setattr(script, name, value)
    arguments = ["--out", str(tmp_path), *(more or ("--steps", "2"))]
    if script is structures:
        arguments += ["--tasks", AUTOENCODER, "--seeds", "0"]
    script.main(arguments)
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert text.count("\n| --- |") >= 1
    monkeypatch.setattr(common, "keep", lambda *_: pytest.fail("a run is repeated"))
    script.main(arguments)
    assert page.read_text() == text
