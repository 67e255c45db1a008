"""The optimizer as a whole: the paper's step end to end, and a good citizen of torch.optim."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import singd
from structured import Diagonal, parse
from tests.singd import dense
from tests.singd.dense import relative
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, batches, distance, factors, mean_loss, mlp, snapshot, train


def test_the_poster_runs_as_it_stands() -> None:
    model, loss_func = mlp(torch.float32), nn.MSELoss()
    (X, y), *_ = batches(1, dtype=torch.float32)
    before = loss_func(model(X), y).item()

    optim = SINGD(model, kfac_like=False, structures=("dense", "diagonal"))
    optim.zero_grad()
    loss_func(model(X), y).backward()
    optim.step()

    assert loss_func(model(X), y).item() < before


# The paper's step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("of_K", "of_C"), [("dense", "dense"), ("hierarchical(1, 2)", "lower_toeplitz")]
)
def test_singd_step_by_step(kfac_like: bool, normalize: bool, of_K: str, of_C: str) -> None:
    """One layer, seven steps, factors updated at every second."""
    d_in, d_out, N = 5, 3, 8
    layer = nn.Linear(d_in - 1, d_out, dtype=F64)
    pi_K, pi_C = dense.projection(of_K, d_in), dense.projection(of_C, d_out)
    W = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    K, C = torch.eye(d_in, dtype=F64), torch.eye(d_out, dtype=F64)
    m_K, m_C, velocity = 0 * K, 0 * C, 0 * W
    alpha1 = 0.0 if kfac_like else 0.4
    optimizer = SINGD(
        layer,
        lr=0.1,
        momentum=0.7,
        damping=0.05,
        alpha1=0.4,
        weight_decay=0.02,
        T=2,
        lr_cov=lambda step: 0.1 / (1 + step),
        structures=(of_K, of_C),
        kfac_like=kfac_like,
        normalize_lr_cov=normalize,
        kl_clip=None,
    )
    for step, (X, y) in enumerate(batches(7, N, d_in - 1)):
        optimizer.zero_grad()
        mean_loss(layer(X), y).backward()
        optimizer.step()

        A = torch.cat([X, torch.ones(N, 1, dtype=F64)], 1).T
        B = (W @ A - y.T) / N
        if step % 2 == 0:
            S_K, S_C = A @ A.T / N, N * B @ B.T
            if kfac_like:
                new_K, new_C = dense.ikfac(K, S_K, 0.05, pi_K), dense.ikfac(C, S_C, 0.05, pi_C)
            else:
                new_K, new_C = dense.singd(K, C, S_K, S_C, 0.05, pi_K, pi_C)
            share = 1 - alpha1 if normalize else 1.0
            m_K, m_C = alpha1 * m_K + share * new_K, alpha1 * m_C + share * new_C
            b1 = 0.1 / (1 + step)
            b_K, b_C = (
                b1 / max(1.0, float(m.abs().max())) if normalize else b1 for m in (m_K, m_C)
            )
            K, C = K - b_K * K @ m_K, C - b_C * C @ m_C
        velocity = 0.7 * velocity + C @ C.T @ (B @ A.T) @ K @ K.T + 0.02 * W
        W = W - 0.1 * velocity

    got = torch.cat([layer.weight, layer.bias[:, None]], 1)
    assert relative(got, W) < 1e-12
    state = optimizer.state[layer.weight]
    for name, n, expected in (
        ("K", d_in, K),
        ("C", d_out, C),
        ("m_K", d_in, m_K),
        ("m_C", d_out, m_C),
    ):
        if name in state:
            zero = parse(of_K if name[-1] == "K" else of_C)(n, dtype=F64)
            assert relative(zero.with_tensors(state[name]).to_dense(), expected) < 1e-12
    assert ("m_K" in state) == (not kfac_like)


def test_kfac_step_by_step() -> None:
    layer, N = nn.Linear(4, 3, bias=False, dtype=F64), 8
    W, velocity = layer.weight.detach().clone(), torch.zeros(3, 4, dtype=F64)
    S_K, S_C = torch.eye(4, dtype=F64), torch.eye(3, dtype=F64)
    optimizer = KFAC(
        layer, lr=0.1, momentum=0.7, damping=0.05, weight_decay=0.02, T=2, lr_cov=0.3, kl_clip=None
    )
    for step, (X, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        mean_loss(layer(X), y).backward()
        optimizer.step()
        A, B = X.T, (W @ X.T - y.T) / N
        if step % 2 == 0:
            S_K, S_C = 0.7 * S_K + 0.3 * A @ A.T / N, 0.7 * S_C + 0.3 * N * B @ B.T
        direction = dense.kfac(S_C, 0.05) @ B @ A.T @ dense.kfac(S_K, 0.05)
        velocity = 0.7 * velocity + direction + 0.02 * W
        W = W - 0.1 * velocity
    assert relative(layer.weight, W) < 1e-12


def test_theorem_1_for_the_optimizers() -> None:
    """From ``S = I`` and without damping, one step of IKFAC and of KFAC differ by order two."""

    def weights(optimizer_class: Any, b1: float, **options: Any) -> Tensor:
        model = mlp()
        options |= {"lr": 1.0, "momentum": 0.0, "damping": 0.0, "kl_clip": None, "T": 1}
        train(model, optimizer_class(model, lr_cov=b1, **options), batches(1))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    steps = torch.logspace(-2, -4, 5, dtype=F64)
    errors = [
        (weights(SINGD, b1, kfac_like=True) - weights(KFAC, b1)).norm() for b1 in steps.tolist()
    ]
    x, y = steps.log(), torch.stack(errors).log()
    x, y = x - x.mean(), y - y.mean()
    assert float((x @ y) / (x @ x)) >= 1.9


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-4, 0.5),
    momentum=st.floats(0, 0.95),
    weight_decay=st.sampled_from([0.0, 0.01]),
    optimizer_class=st.sampled_from([SINGD, KFAC]),
)
def test_with_factors_at_the_identity_it_is_sgd(
    lr: float, momentum: float, weight_decay: float, optimizer_class: Any
) -> None:
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    frozen = {"lr_cov": 0.0, "kl_clip": None, "damping": 0.0}
    model, bare = mlp(), mlp()
    train(model, optimizer_class(model, **options, **frozen), batches(4))
    train(bare, torch.optim.SGD(bare.parameters(), **options), batches(4))
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# Groups and rules ---------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Supported layers among others; output ``[N, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embedding(x).mean(1))
        return self.head(self.frozen((self.scale * self.linear(h)).tanh()))


ADAMW = {"lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}


def test_all_other_parameters_are_trained_by_adamw() -> None:
    model = Mixed()
    optimizer = SINGD(model, T=1, adamw=ADAMW)
    ours = {id(p) for m in (model.linear, model.head) for p in m.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    assert len(others) == 4
    shadows = [nn.Parameter(p.detach().clone()) for p in others]
    adamw = torch.optim.AdamW(shadows, **ADAMW, fused=True)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randint(7, (8, 5))).square().sum(-1).mean().backward()
        for p, shadow in zip(others, shadows, strict=True):
            shadow.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
        for p, shadow in zip(others, shadows, strict=True):
            assert torch.equal(p, shadow)


@pytest.mark.parametrize("optimizer_class", [SINGD, KFAC])
def test_the_default_rate_of_adamw(optimizer_class: Any) -> None:
    """A ratio of the group's rate."""

    def rate(**options: Any) -> float:
        model = Mixed()
        (group,) = optimizer_class(model, **options).param_groups
        return float(group["adamw"]["lr_ratio"] * group["lr"])

    assert rate() == pytest.approx(3e-3)
    assert rate(lr=0.5, adamw={"weight_decay": 0.1}) == pytest.approx(0.015)
    assert rate(lr=0.5, adamw={"lr": 0.25}) == 0.25


@pytest.mark.parametrize("optimizer_class", [SINGD, KFAC])
def test_nothing_is_left_out_and_nothing_is_trained_twice(optimizer_class: Any) -> None:
    model = Mixed()
    optimizer = optimizer_class(model, T=1)
    given_ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(given_ids) == len(set(given_ids))
    assert set(given_ids) == trainable
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(7)[:, None]).square().sum(-1).mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("frozen"), name
    rules = {row.parameter: row.rule for row in optimizer.plan().rows}
    assert rules["linear.weight"] == rules["head.bias"] == optimizer_class.__name__
    assert rules["embedding.weight"] == rules["scale"] == "AdamW"
    assert rules["frozen.weight"] == "frozen"


def test_groups_have_their_own_options() -> None:
    model, first, last = mlp(), mlp(), mlp()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1, "structures": ("diagonal", "dense")},
        {"params": model[2].parameters(), "lr_cov": 0.3, "T": 2},
    ]
    options = {"T": 1, "lr": 0.02, "kl_clip": None}
    train(model, SINGD(model, groups, **options), batches(1))
    train(
        first,
        SINGD(first, **options | {"lr": 0.1, "structures": ("diagonal", "dense")}),
        batches(1),
    )
    train(last, SINGD(last, **options | {"lr_cov": 0.3, "T": 2}), batches(1))
    assert torch.equal(model[0].weight, first[0].weight)
    assert torch.equal(model[2].weight, last[2].weight)


def test_a_bias_in_another_group_belongs_to_its_layer_and_moves_at_its_own_rate() -> None:
    together, separate = mlp(), mlp()
    options = {"T": 1, "momentum": 0.0, "kl_clip": None, "lr": 0.1}
    start = [p.detach().clone() for p in together.parameters()]
    groups = [
        {"params": [separate[0].weight, separate[2].weight]},
        {"params": [separate[0].bias, separate[2].bias], "lr": 0.05},
    ]
    one, two = SINGD(together, **options), SINGD(separate, groups, **options)
    train(together, one, batches(1))
    train(separate, two, batches(1))
    for i, (p, q) in enumerate(zip(together.parameters(), separate.parameters(), strict=True)):
        rate = 0.5 if i % 2 else 1.0
        torch.testing.assert_close(q - start[i], rate * (p - start[i]), rtol=1e-12, atol=1e-14)
    assert torch.equal(factors(one, together[0].weight)["K"], factors(two, separate[0].weight)["K"])


def test_a_bias_that_is_not_given_stays() -> None:
    model = mlp()
    bias = model[0].bias.detach().clone()
    optimizer = SINGD(model, [model[0].weight], T=1)
    train(model, optimizer, batches(2))
    assert torch.equal(model[0].bias, bias)
    assert factors(optimizer, model[0].weight)["K"].shape == (4, 4)


def test_a_layer_without_a_gradient_is_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    before = model["unused"].weight.detach().clone()
    optimizer = SINGD(model, T=1, weight_decay=0.1)
    model["used"](torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model["unused"].weight, before)


def test_equal_layers_are_trained_as_if_alone() -> None:
    """Layers of one shape share one product; the numbers are those of each by itself."""
    layers = [nn.Linear(4, 4, dtype=F64) for _ in range(3)]
    together = nn.ModuleList(layers)
    alone = [nn.Linear(4, 4, dtype=F64) for _ in range(3)]
    for a, b in zip(layers, alone, strict=True):
        a.load_state_dict(b.state_dict())
    options = {"T": 1, "lr": 0.1, "kl_clip": None, "normalize_lr_cov": True}
    optimizer = SINGD(together, **options)
    singles = [SINGD(layer, **options) for layer in alone]
    for step, (X, _) in enumerate(batches(4)):
        used = [i for i in range(3) if (step + i) % 3 != 1]  # not every layer in every step
        for model, methods in ((layers, [optimizer]), (alone, [singles[i] for i in used])):
            for method in methods:
                method.zero_grad()
            sum(model[i](X * (i + 1)).square().sum() for i in used).div(8).backward()
            for method in methods:
                method.step()
    for a, b in zip(layers, alone, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-12, atol=1e-14)


# Options ------------------------------------------------------------------------------------------

PEER = {  # the signature of PyPI singd 0.0.5
    "params": None,
    "lr": 0.001,
    "momentum": 0.9,
    "damping": 0.001,
    "alpha1": 0.5,
    "weight_decay": 0.0,
    "T": 10,
    "loss_average": "batch",
    "lr_cov": 1e-2,
    "structures": ("dense", "dense"),
    "kfac_approx": "expand",
    "warn_unsupported": True,
    "kfac_like": False,
    "preconditioner_dtype": (None, None),
    "init_grad_scale": 1.0,
    "normalize_lr_cov": False,
}


def test_the_signature_begins_with_that_of_the_reference() -> None:
    parameters = list(inspect.signature(singd.SINGD).parameters.values())
    assert parameters[0].name == "model"
    by_position = [p.name for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == list(PEER)[: len(by_position)]
    assert by_position[-1] == "kfac_approx"
    without_effect = {p.name for p in parameters[-2:]}
    assert without_effect == {"warn_unsupported", "init_grad_scale"}
    used = PEER.keys() - without_effect
    changed = {p.name for p in parameters[1:] if p.name in used and p.default != PEER[p.name]}
    assert changed == {"lr", "damping", "alpha1", "lr_cov", "structures"}


def test_options_by_position_and_by_keyword_are_the_same() -> None:
    given_options = PEER | {
        "lr": 0.02,
        "damping": 0.1,
        "alpha1": 0.3,
        "T": 2,
        "kfac_approx": "reduce",
    }
    by_position, by_keyword = mlp(), mlp()
    first = list(PEER).index("kfac_approx") + 1
    a = train(
        by_position, singd.SINGD(by_position, *list(given_options.values())[:first]), batches(3)
    )
    with pytest.warns(DeprecationWarning, match="has no effect: leave it out"):
        optimizer = singd.SINGD(by_keyword, **given_options)
    b = train(by_keyword, optimizer, batches(3))
    assert distance(a, b) == 0.0


BAD: list[tuple[str, Any, str]] = [
    ("lr", -1.0, r"lr: expected a number in \[0, inf\), got -1.0"),
    ("lr", "fast", r"lr: expected a number in \[0, inf\), got 'fast'"),
    ("momentum", 1.0, r"momentum: expected a number in \[0, 1\), got 1.0"),
    ("damping", float("nan"), r"damping: expected a number in \[0, inf\), got nan"),
    ("weight_decay", -0.1, r"weight_decay: expected .* got -0.1"),
    ("T", 0, r"T: expected an integer >= 1, got 0"),
    ("T", 2.5, r"T: expected an integer >= 1, got 2.5"),
    ("sample", "first", r"sample: expected an integer >= 1 or 'last', got 'first'"),
    ("sample", 0, r"sample: expected an integer >= 1, got 0"),
    ("loss_average", "mean", r"loss_average: expected one of None, 'batch', .* got 'mean'"),
    ("kfac_approx", "both", r"kfac_approx: expected one of 'expand', 'reduce', got 'both'"),
    ("kl_clip", -1e-3, r"kl_clip: expected .* got -0.001"),
    ("lr_cov", -0.5, r"lr_cov: expected .* got -0.5"),
]
BAD_SINGD: list[tuple[str, Any, str]] = [
    ("alpha1", 1.5, r"alpha1: expected a number in \[0, 1\), got 1.5"),
    ("structures", ("dense",), r"structures.*: expected a pair.*got \('dense',\)"),
    ("structures", ("dense", "dens"), r"'dens'.*did you mean 'dense'"),
    ("preconditioner_dtype", torch.bfloat16, r"preconditioner_dtype.*: expected a pair"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD + BAD_SINGD)
def test_options_out_of_range_say_what_was_expected(name: str, value: Any, message: str) -> None:
    for optimizer_class in (SINGD, KFAC) if (name, value, message) in BAD else (SINGD,):
        with pytest.raises(ValueError, match=message):
            optimizer_class(mlp(), **{name: value})
        model = mlp()
        optimizer = optimizer_class(model, [model[0].weight])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [model[2].weight], name: value})
        assert sum(len(g["params"]) for g in optimizer.param_groups) == 1


def test_a_structure_may_be_a_spec_a_class_or_a_function() -> None:
    def mine(n: int, **options: Any) -> Diagonal:
        return Diagonal.zeros(n, **options)

    seen = []
    for structure in ("diagonal", Diagonal, parse("diagonal"), mine):
        model = mlp()
        seen.append(train(model, SINGD(model, T=1, structures=(structure, structure)), batches(3)))
    assert all(distance(other, seen[0]) == 0.0 for other in seen[1:])


def test_a_model_is_expected() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        SINGD([nn.Linear(1, 1)])  # type: ignore[arg-type]


def test_a_rate_in_the_place_of_the_parameters_is_told_of() -> None:
    with pytest.raises(TypeError, match=r"params: expected an iterable .* got float .* by name"):
        SINGD(mlp(), 1e-3)  # type: ignore[arg-type]


def test_the_other_parameters_do_not_go_uphill_alone() -> None:
    with pytest.raises(ValueError, match=r"adamw: expected maximize=False, got True"):
        SINGD(mlp(), adamw={"maximize": True})


# The bound of the step ----------------------------------------------------------------------------


@pytest.mark.parametrize("kl_clip", [1e-6, 1e-3, 1e6])
def test_kl_clip_bounds_the_step(kl_clip: float) -> None:
    """``sum lr^2 <direction, gradient>`` over all groups is at most ``kl_clip``."""
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}]
    optimizer = SINGD(model, groups, lr=0.1, T=1, momentum=0.0, lr_cov=0.1, kl_clip=kl_clip)
    for X, y in batches(3):
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        before = [torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in (model[0], model[2])]
        grads = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in (model[0], model[2])]
        optimizer.step()
        quadratic, moves = 0.0, []
        for m, W, G, lr in zip((model[0], model[2]), before, grads, (0.3, 0.1), strict=True):
            own = factors(optimizer, m.weight)
            direction = own["C"] @ own["C"].T @ G @ own["K"] @ own["K"].T
            quadratic += lr**2 * float((direction * G).sum())
            moves.append((torch.cat([m.weight, m.bias[:, None]], 1) - W, -lr * direction))
        nu = min(1.0, (kl_clip / quadratic) ** 0.5)
        for move, bare in moves:
            assert relative(move, nu * bare) < 1e-10


def test_schedules_act_on_bounded_steps() -> None:
    """A lower rate shortens a bounded step in proportion; a higher one does not lengthen it."""
    moves = []
    for factor in (1.0, 0.25, 4.0):
        model = mlp()
        optimizer = SINGD(model, lr=0.1, T=1, momentum=0.0, kl_clip=1e-6)
        train(model, optimizer, batches(1))
        optimizer.param_groups[0]["lr"] *= factor
        X, y = batches(2)[1]
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        moves.append(model[0].weight.detach() - before)
    assert relative(moves[1], 0.25 * moves[0]) < 1e-10
    assert relative(moves[2], moves[0]) < 1e-10


def test_the_highest_rate_is_remembered() -> None:
    """A rate that rises and falls by hand is measured by its peak, in a resumed run too."""
    model, rates = mlp(), (0.1, 0.4, 0.2)
    optimizer = SINGD(model, lr=rates[0], T=1, momentum=0.0, kl_clip=1e-6)
    for step, lr in enumerate(rates):
        if step == len(rates) - 1:
            saved, optimizer = optimizer.state_dict(), SINGD(model, T=1, momentum=0.0, kl_clip=1e-6)
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = lr
        X, y = batches(1)[0]
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    inner = sum(
        float(((p.detach() - before[name]) * grads[name]).sum())
        for name, p in model.named_parameters()
    )
    bare = 0.0
    for m, name in ((model[0], "0"), (model[2], "2")):
        G = torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"][:, None]], 1)
        own = factors(optimizer, m.weight)
        bare += float((own["C"] @ own["C"].T @ G @ own["K"] @ own["K"].T * G).sum())
    nu = (1e-6 / (max(rates) ** 2 * bare)) ** 0.5
    assert nu < 1
    assert inner == pytest.approx(-rates[-1] * nu * bare, rel=1e-9)


class NoSync(TorchDispatchMode):
    """Fails where a number is read off a tensor: on a device, that waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the step waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"normalize_lr_cov": True}, {"kfac_like": True}])
def test_a_step_reads_no_number_off_a_tensor(options: dict[str, Any]) -> None:
    model = mlp(torch.float32)
    optimizer = SINGD(model, T=1, max_skipped=None, **options)
    for X, y in batches(3, dtype=torch.float32):
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        with NoSync():
            optimizer.step()
    with pytest.raises(AssertionError, match="waits"), NoSync():
        torch.ones(1).item()


# Gradient scaling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [SINGD, KFAC])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_changes_nothing(optimizer_class: Any, unscale: bool) -> None:
    scaled, plain = mlp(), mlp()
    optimizer = optimizer_class(scaled, T=1, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2)
    for X, y in batches(5):
        optimizer.zero_grad()
        scaler.scale(mean_loss(scaled(X), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    expected = train(plain, optimizer_class(plain, T=1, lr=0.05), batches(5))
    assert distance(snapshot(scaled, optimizer), expected) < 1e-12


def test_a_step_with_infinities_is_skipped_whole() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    train(model, optimizer, batches(2))
    before = snapshot(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    (X, y), *_ = batches(1)
    X[0, 0] = float("inf")
    optimizer.zero_grad()
    scaler.scale(mean_loss(model(X), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert distance(snapshot(model, optimizer), before) == 0.0
    assert train(model, optimizer, batches(1)) is not None  # what was seen is forgotten
    assert all(t.isfinite().all() for t in snapshot(model, optimizer).values())


def test_steps_that_are_not_finite_are_skipped_counted_and_limited() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, max_skipped=2)
    before = train(model, optimizer, batches(2))
    (X, y), *_ = batches(1)
    X[0, 0] = float("nan")
    optimizer.zero_grad()
    mean_loss(model(X), y).backward()
    optimizer.step()
    assert optimizer.skipped == 1
    assert distance(snapshot(model, optimizer), before) == 0.0
    optimizer.zero_grad()
    mean_loss(model(X), y).backward()
    with pytest.raises(FloatingPointError, match=r"0.weight.* 2 steps in a row"):
        optimizer.step()


def test_schedulers_move_every_group() -> None:
    model = Mixed()
    optimizer = SINGD(model, lr=0.1, adamw={"lr": 0.01})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()
    (group,) = optimizer.param_groups
    assert (group["lr"], group["adamw"]["lr_ratio"]) == (0.05, pytest.approx(0.1))
