"""Numbers that go wrong, numbers that are watched, and curvature that is not that of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.singd.dense import relative
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, batches, distance, factors, mean_loss, mlp, snapshot, train

BAD = [float("nan"), float("inf"), -float("inf")]


# Not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_run_with_bad_batches_is_the_run_without_them(method: Any, value: float) -> None:
    runs = []
    for bad in (True, False):
        model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
        optimizer = method(model, T=2, lr=0.05)
        for index, (X, y) in enumerate(batches(4)):
            if bad and index in (0, 3):  # T times each, so that the same updates are due
                broken = X.clone()
                broken[1, 2] = value
                train(model, optimizer, [(broken, y)] * 2)
            train(model, optimizer, [(X, y)])
        assert optimizer.skipped == (4 if bad else 0)
        runs.append(snapshot(model, optimizer))
    assert distance(*runs) == 0.0


def test_statistics_alone_can_be_bad() -> None:
    """Inputs whose squares overflow, with finite gradients."""
    model = nn.Linear(4, 3)
    optimizer = SINGD(model, T=1)
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.full((2, 4), 1e30)) * 1e-30).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def overflowing(limit: int | None, **options: Any) -> tuple[nn.ModuleList, SINGD, Any]:
    """Two layers in one bucket; gradients and statistics of the first are finite, and no more."""
    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])
    optimizer = SINGD(model, T=1, max_skipped=limit, loss_average=None, **options)

    def step() -> None:
        optimizer.zero_grad()
        x = torch.randn(2, 4)
        (1e3 * model[0](1e17 * x).sum() + model[1](x).square().mean()).backward()
        optimizer.step()

    return model, optimizer, step


def test_factors_that_overflow_skip_the_step_and_raise_in_the_end() -> None:
    model, optimizer, step = overflowing(3)
    before = None
    for count in (1, 2):
        step()
        assert optimizer.skipped == count
        after = snapshot(model, optimizer)
        assert before is None or all(torch.equal(after[name], before[name]) for name in before)
        before = after
    with pytest.raises(FloatingPointError, match=r"0\.weight: .* in 3 steps in a row"):
        step()
    assert torch.equal(optimizer.state[model[1].weight]["K"][0], torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_direction_that_overflows_is_not_taken(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = SINGD(model, T=100, preconditioner_dtype=(torch.float32, dtype))
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    before = model.weight.detach().clone()
    large = 1e25 if dtype == torch.float32 else 6e4
    for name in ("K", "C"):
        optimizer.state[model.weight][name][0].copy_(large * torch.eye(4))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["momentum"] = 0.0
    model.weight.grad = torch.full((4, 4), 1e30)
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert optimizer.skipped == 1


@pytest.mark.parametrize("structure", ["dense", "hierarchical(1, 1)"])
@pytest.mark.parametrize("kfac_like", [False, True])
def test_inputs_a_thousand_times_too_large_train(structure: str, kfac_like: bool) -> None:
    model = mlp(torch.float32)
    optimizer = SINGD(model, T=2, structures=(structure, structure), kfac_like=kfac_like)
    X = torch.randn(64, 4)
    y = X @ torch.randn(4, 3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = mean_loss(model(1e3 * X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.8 * losses[0]
    assert optimizer.skipped == 0


@pytest.mark.parametrize("limit", [1, 3, 0, None])
def test_the_limit_of_skipped_steps_is_of_steps_in_a_row(limit: int | None) -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, max_skipped=limit, kl_clip=None)
    (X, y), *_ = batches(1)
    bad = [(X * float("nan"), y)]
    if limit is None:  # then nobody looks
        train(model, optimizer, bad)
        assert optimizer.skipped == 0
        assert model[0].weight.isnan().any()
        return
    for _ in range(2):
        for _ in range(limit - 1 if limit else 20):
            train(model, optimizer, bad)
        train(model, optimizer, [(X, y)])
    if limit:
        for _ in range(limit - 1):
            train(model, optimizer, bad)
        with pytest.raises(FloatingPointError, match=rf"0\.weight: .* in {limit} steps in a row"):
            train(model, optimizer, bad)


# Telemetry ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_telemetry_tells_what_happened(kl_clip: float | None) -> None:
    reports: list[dict[str, Any]] = []
    model, silent = mlp(), mlp()
    options = {"T": 2, "lr": 0.05, "momentum": 0.0, "kl_clip": kl_clip, "damping": 0.1}
    optimizer = SINGD(model, telemetry=reports.append, **options)
    X, y = batches(1)[0]
    for step in range(3):
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        W = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
        G = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
        optimizer.step()
        own, report = factors(optimizer, model[0].weight), reports[-1]
        assert report["skipped"] == 0
        assert ("residual_K" in report["0.weight"]) == (step % 2 == 0)
        direction = own["C"] @ own["C"].T @ G @ own["K"] @ own["K"].T
        nu = report.get("trust_region", 1.0)
        assert ("trust_region" in report) == (kl_clip is not None)
        moved = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach() - W
        assert relative(moved, -0.05 * nu * direction) < 1e-10
        torch.testing.assert_close(report["0.weight"]["gradient_norm"], G.norm())
        torch.testing.assert_close(report["0.weight"]["direction_norm"], direction.norm())
        if step == 0:  # from the identity: || S_K + damping I - I ||
            A = torch.cat([X, torch.ones(len(X), 1, dtype=F64)], 1)
            expected = (A.T @ A / len(X) + (0.1 - 1) * torch.eye(5, dtype=F64)).norm()
            torch.testing.assert_close(report["0.weight"]["residual_K"], expected)
    train(silent, other := SINGD(silent, **options), [(X, y)] * 3)
    assert distance(snapshot(model, optimizer), snapshot(silent, other)) == 0.0
    train(model, optimizer, [(X * float("nan"), y)])
    assert reports[-1]["skipped"] == 1


# Scale --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "lower_toeplitz", "hierarchical(1, 1)"])
def test_factors_stay_invertible_whatever_the_scale(
    scale: float, kfac_like: bool, structure: str
) -> None:
    model = mlp()
    optimizer = SINGD(
        model, T=1, lr=0.01, lr_cov=0.5, kfac_like=kfac_like, structures=(structure, structure)
    )
    for X, y in batches(20):
        train(model, optimizer, [(scale * X, y)])
    assert optimizer.skipped == 0
    for matrix in optimizer._parts.parameters.matrices:
        for member in optimizer._parts.store.factors(matrix).members().values():
            values = torch.linalg.svdvals(member.to_dense())
            assert bool(values.isfinite().all())
            assert float(values.min()) > 0.0
    assert all(p.isfinite().all() for p in model.parameters())


def test_without_the_bound_large_inputs_ruin_the_factors() -> None:
    """Else the test above could not fail."""
    model = mlp()
    optimizer = SINGD(model, T=1, lr_cov=0.5, factor_clip=None, max_skipped=None)
    for X, y in batches(20):
        train(model, optimizer, [(1e3 * X, y)])
    K = factors(optimizer, model[0].weight)["K"]
    assert not K.isfinite().all() or K.abs().max() > 1e6


@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_the_bound_holds_for_every_update_of_a_factor(bound: float) -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.0, lr_cov=1.0, factor_clip=bound, structures=("dense",) * 2)
    K = torch.eye(5, dtype=F64)
    moves = []
    for X, y in batches(6):
        train(model, optimizer, [(30 * X, y)])
        new = factors(optimizer, model[0].weight)["K"].clone()
        move, eye = torch.linalg.inv(K) @ new - torch.eye(5, dtype=F64), torch.eye(5, dtype=F64)
        t = move.trace() / 5
        moves.append(float(t.abs() + (move - t * eye).norm()))
        assert float(torch.linalg.matrix_norm(move, 2)) <= bound
        K = new
    assert max(moves) == pytest.approx(bound, rel=1e-10)


# The true Fisher ----------------------------------------------------------------------------------


def test_curvature_of_every_label_is_the_fisher_matrix() -> None:
    """Labels are not sampled but enumerated, each with its probability; one input, one layer.

    A term of probability p enters as ``sqrt(p)`` times its loss: squares are what is summed.
    """
    model = nn.Sequential(nn.Linear(3, 4, dtype=F64))
    x = torch.randn(1, 3, dtype=F64)
    optimizer = KFAC(model, T=1, lr=0.0, lr_cov=1.0, damping=1.0, loss_average=None)
    logp = model(x).log_softmax(-1).detach()[0]
    with optimizer.curvature():
        for label in range(4):
            loss = nn.functional.cross_entropy(model(x), torch.tensor([label]))
            (logp[label].exp().sqrt() * loss).backward()
    optimizer.step()
    state = factors(optimizer, model[0].weight)
    W, b = model[0].weight.detach(), model[0].bias.detach()

    def log_probabilities(flat: Tensor) -> Tensor:
        W, b = flat.view(4, 4).split([3, 1], 1)
        return functional_call(model, {"0.weight": W, "0.bias": b[:, 0]}, (x,)).log_softmax(-1)[0]

    J = jacrev(log_probabilities)(torch.cat([W, b[:, None]], 1).flatten())
    fisher = J.T @ (logp.exp()[:, None] * J)
    assert relative(torch.kron(state["S_C"], state["S_K"]), fisher) < 1e-12


def test_sampled_labels_give_the_fisher_matrix_on_average() -> None:
    """Within five standard errors."""
    model = nn.Sequential(nn.Linear(3, 4, dtype=F64))
    X, count = torch.randn(1, 3, dtype=F64).expand(20_000, 3), 20_000
    optimizer = KFAC(model, T=1, lr=0.0, lr_cov=1.0, damping=1.0)
    p = model(X[:1]).softmax(-1).detach()[0]
    with optimizer.curvature():
        labels = torch.distributions.Categorical(logits=model(X).detach()).sample()
        nn.functional.cross_entropy(model(X), labels).backward()
    optimizer.step()
    S_C = factors(optimizer, model[0].weight)["S_C"]
    g = torch.eye(4, dtype=F64) - p  # gradients of the loss, by label, up to the sign
    squares = torch.einsum("ki,kj->kij", g, g)
    mean = torch.einsum("k,kij->ij", p, squares)
    error = (torch.einsum("k,kij->ij", p, squares.square()) - mean.square()).clamp(min=0).sqrt()
    assert bool(((S_C - mean).abs() <= 5 * error / count**0.5 + 1e-12).all())
    assert relative(mean, torch.diag(p) - torch.outer(p, p)) < 1e-12


@pytest.mark.parametrize("order", ["before", "after"])
def test_curvature_leaves_gradients_and_replaces_statistics(order: str) -> None:
    X, y = batches(1)[0]

    def run(sampled: bool, observed: Tensor) -> Any:
        model = mlp()
        optimizer = SINGD(model, T=1, lr=0.0)

        def sample() -> None:
            if sampled:
                with optimizer.curvature():
                    mean_loss(model(X), 2 * y).backward()

        optimizer.zero_grad()
        if order == "before":
            sample()
            optimizer.zero_grad()
        mean_loss(model(X), observed).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        if order == "after":
            sample()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        optimizer.step()
        return factors(optimizer, model[0].weight)

    got, expected = run(True, y), run(False, 2 * y)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not torch.equal(got["C"], run(False, y)["C"])


# A preconditioner for others ----------------------------------------------------------------------


@pytest.mark.parametrize("method", [SINGD, KFAC])
@pytest.mark.parametrize("kl_clip", [None, 1e-4])
def test_preconditioning_sgd_is_the_optimizer_without_momentum(method: Any, kl_clip: Any) -> None:
    model, other = mlp(), mlp()
    optimizer = method(model, lr=0.05, momentum=0.0, T=2, kl_clip=kl_clip)
    preconditioner = method(other, lr=0.05, momentum=0.0, T=2, kl_clip=kl_clip)
    sgd = torch.optim.SGD(other.parameters(), lr=0.05)
    expected = train(model, optimizer, batches(5))
    for X, y in batches(5):
        preconditioner.zero_grad()
        mean_loss(other(X), y).backward()
        preconditioner.precondition()
        sgd.step()
    assert distance(snapshot(other, preconditioner), expected) == 0.0


OTHERS: dict[str, Any] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("how", ["closure", "scaler", "schedule"])
def test_any_optimizer_may_follow(other: str, how: str) -> None:
    """In a closure, with a GradScaler, under a scheduler: as with gradients of the product."""
    model, plain = mlp(torch.float32), mlp(torch.float32)
    optimizer, expected = OTHERS[other](model.parameters()), OTHERS[other](plain.parameters())
    preconditioner, reference = (SINGD(m, T=2, kl_clip=None) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, enabled=how == "scaler")
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(o, 0.5 if how == "schedule" else 1.0)
        for o in (optimizer, expected)
    ]
    for X, y in batches(4, dtype=torch.float32):

        def closure(X: Tensor = X, y: Tensor = y) -> Tensor:
            preconditioner.zero_grad()
            loss = mean_loss(model(X), y)
            scaler.scale(loss).backward()
            if how == "scaler":
                scaler.unscale_(optimizer)
            preconditioner.precondition(scale=scaler.get_scale() if how == "scaler" else None)
            return loss

        if how == "closure":
            optimizer.step(closure)
        else:
            closure()
            scaler.step(optimizer)
            scaler.update()
        reference.zero_grad()
        mean_loss(plain(X), y).backward()
        gradients = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in plain[::2]]
        reference.precondition()
        for layer, G in zip(plain[::2], gradients, strict=True):
            own = factors(reference, layer.weight)
            direction = own["C"] @ own["C"].T @ G @ own["K"] @ own["K"].T
            layer.weight.grad.copy_(direction[:, :-1])
            layer.bias.grad.copy_(direction[:, -1])
        expected.step()
        for schedule in schedules:
            schedule.step()
    got, wanted = snapshot(model, preconditioner), snapshot(plain, reference)
    assert distance(got, wanted) < 1e-5


def test_preconditioning_leaves_all_other_gradients() -> None:
    model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
    preconditioner = SINGD(model, T=1)
    mean_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.precondition()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name]) == name.startswith("3."), name


# Terms of the loss and gradient scaling -----------------------------------------------------------


def test_terms_that_are_counted_replace_those_of_the_batch() -> None:
    """A mean over some of the tokens; padding has no gradient."""
    X, y = batches(1, 4, 5, 4)[0]
    mask = torch.rand(4, 5) < 0.6
    runs = []
    for counted in (True, False):
        model = mlp()
        optimizer = KFAC(model, T=1, lr=0.0, lr_cov=1.0, damping=1.0, loss_average=None)
        losses = 0.5 * (model(X) - y).square().sum(-1)
        if counted:
            (losses * mask).sum().div(mask.sum()).backward()
            optimizer.count_terms(mask.sum() - 3)
            optimizer.count_terms(3)
        else:  # one factor of sqrt(terms) in the gradient is one of terms in the curvature
            (losses * mask).sum().div(mask.sum().double().sqrt()).backward()
        optimizer.step()
        runs.append(factors(optimizer, model[0].weight))
    assert relative(runs[0]["S_C"], runs[1]["S_C"]) < 1e-13


def test_a_count_is_for_one_step() -> None:
    model, plain = mlp(), mlp()
    optimizer = SINGD(model, T=1, lr=0.0)
    optimizer.count_terms(1e6)
    optimizer.step()
    expected = train(plain, SINGD(plain, T=1, lr=0.0), batches(2))
    got = train(model, optimizer, batches(2))
    assert torch.equal(got["0.weight C[0]"], expected["0.weight C[0]"])


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_gradient_scaler_changes_no_bit(method: Any, dtype: torch.dtype, unscale: bool) -> None:
    """Its scales are powers of two."""
    scaled, plain = mlp(dtype), mlp(dtype)
    optimizer, data = method(scaled, T=2, lr=0.05), batches(6, dtype=dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=2)
    for X, y in data:
        optimizer.zero_grad()
        scaler.scale(mean_loss(scaled(X), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**10
    expected = train(plain, method(plain, T=2, lr=0.05), data)
    assert distance(snapshot(scaled, optimizer), expected) == 0.0


@pytest.mark.parametrize("method", [SINGD, KFAC])
@pytest.mark.parametrize("how", ["norm", "value"])
def test_clipping_the_gradient_changes_the_step_and_not_the_factors(method: Any, how: str) -> None:
    clipped, plain = mlp(), mlp()
    options = {"T": 1, "lr": 0.05, "momentum": 0.0, "kl_clip": None}
    (X, y), *_ = batches(1)
    seen = []
    for model in (clipped, plain):
        optimizer = method(model, **options)
        mean_loss(model(X), y).backward()
        scale = 1.0
        if model is clipped and how == "norm":
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
            assert norm > 1e-3
            scale = 1e-3 / (norm + 1e-6)
        elif model is clipped:
            torch.nn.utils.clip_grad_value_(model.parameters(), 1e-30)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        moves = [(p.detach() - b) / scale for p, b in zip(model.parameters(), before, strict=True)]
        seen.append((factors(optimizer, model[0].weight), moves))
    (ours, ours_moved), (theirs, theirs_moved) = seen
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for a, b in zip(ours_moved, theirs_moved, strict=True):
        if how == "norm":
            assert relative(a, b) < 1e-9
        else:
            assert float(a.abs().max()) < 1e-25
