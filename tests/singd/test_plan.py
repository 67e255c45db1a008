"""The plan says what is true: every parameter once, and the bytes that training really stores."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from singd import Layer, register_layer
from singd.layers import LAYERS, OPTIONAL
from singd.methods.inverse_free import InverseFree
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, batches, mean_loss, mlp, stored, train


class Net(nn.Module):
    """Every kind of rule: layers, a custom parameter, a frozen one, a tied one, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).mT
        h = self.norm(self.up(self.conv(h)).mT)
        return self.frozen(self.second(self.first(h).tanh())) * self.scale


METHODS: dict[str, Any] = {
    "SINGD": lambda m: SINGD(m, T=1),
    "IKFAC": lambda m: SINGD(m, T=1, kfac_like=True, structures=("diagonal", "lower_toeplitz")),
    "no momentum": lambda m: SINGD(m, T=1, momentum=0.0, alpha1=0.0),
    "bfloat16": lambda m: SINGD(m, T=1, preconditioner_dtype=(torch.bfloat16, torch.float64)),
    "all layers": lambda m: SINGD(m, T=1, layers=tuple(OPTIONAL)),
    "narrow": lambda m: SINGD(m, T=1, structures=("up_to(5, dense, diagonal)",) * 2),
    "amsgrad": lambda m: SINGD(m, T=1, adamw={"amsgrad": True}),
    "KFAC": lambda m: KFAC(m, T=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_holds_after_training_and_on_the_meta_device(method: str) -> None:
    with torch.device("meta"):
        early = METHODS[method](Net()).plan()
    model = Net()
    optimizer = METHODS[method](model)
    before = optimizer.plan()
    assert not optimizer.state
    assert str(before) == str(early)
    for x in torch.randint(7, (3, 4, 5)):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    after = optimizer.plan()
    assert str(after) == str(before)
    assert after.state_bytes == stored(optimizer)
    assert [row.parameter for row in after.rows] == [name for name, _ in model.named_parameters()]
    trained = {row.parameter for row in after.rows if row.rule not in ("frozen", "not given")}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_bytes_it_is_compared_with_are_those_of_adamw(amsgrad: bool) -> None:
    model, bare = Net(), Net()
    plan = SINGD(model, adamw={"amsgrad": amsgrad}).plan()
    adamw = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad], amsgrad=amsgrad)
    bare(torch.randint(7, (4, 5))).square().sum().backward()
    adamw.step()
    assert plan.adamw_bytes == stored(adamw)
    assert f"of AdamW's {stored(adamw):,}" in str(plan)


def rules(optimizer: Any) -> dict[str, str]:
    return {row.parameter: row.rule for row in optimizer.plan().rows}


def structures(optimizer: Any) -> dict[str, str]:
    return {row.parameter: row.structures for row in optimizer.plan().rows if row.structures}


def test_a_tied_weight_is_one_row_and_a_frozen_or_withheld_one_says_so() -> None:
    model = Net()
    optimizer = SINGD(model, [p for p in model.parameters() if p is not model.up.weight])
    plan = rules(optimizer)
    assert "second.weight" not in plan
    assert plan["first.weight"] == "SINGD"
    assert plan["second.bias"] == "AdamW"
    assert plan["up.weight"] == "not given"
    assert rules(SINGD(model))["frozen.weight"] == "frozen"


def test_a_weight_tied_to_an_embedding_is_trained_by_adamw() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert rules(SINGD(model)) == {"embed.weight": "AdamW"}
    assert rules(SINGD(model, layers=(nn.Embedding,))) == {"embed.weight": "AdamW"}


class Penalized(nn.Module):
    """``fc`` is used as a layer, and its weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x).tanh()) + self.fc.weight.exp().sum()


def test_a_use_that_hooks_do_not_see_is_noticed_with_one_warning() -> None:
    model = Penalized()
    optimizer = SINGD(model, T=1)
    assert rules(optimizer)["fc.weight"] == "SINGD"
    with warnings.catch_warnings(record=True, action="always") as caught:
        train(model, optimizer, batches(4))
    assert len(caught) == 1
    assert str(caught[0].message).startswith("fc.weight: ")
    assert rules(optimizer) == {
        "fc.weight": "AdamW",
        "fc.bias": "AdamW",
        "head.weight": "SINGD",
        "head.bias": "SINGD",
    }
    assert optimizer.plan().state_bytes == stored(optimizer)


class Bypassed(nn.Module):
    """Two layers that are, or are not, used by calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(4, d, dtype=F64) for d in (4, 4, 3))
        self.how = "called"

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            if self.how == "called":
                x = layer(x)
            elif self.how == "forward":
                x = layer.forward(x)
            elif self.how == "functional":
                x = nn.functional.linear(x, layer.weight, layer.bias)
            else:
                x = layer(x) + layer.weight.square().sum()
            x = x.tanh()
        return self.head(x)


@pytest.mark.parametrize("how", ["forward", "functional", "both"])
@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("T", [1, 3])
def test_a_use_that_begins_later_is_noticed_too_with_one_warning(
    how: str, start: int, T: int
) -> None:
    model = Bypassed()
    optimizer = SINGD(model, T=T, lr=0.01)
    with warnings.catch_warnings(record=True, action="always") as caught:
        train(model, optimizer, batches(start))
        model.how = how
        train(model, optimizer, batches(20 * T))
    assert [str(w.message).split(":")[0] for w in caught] == ["a.weight, b.weight"]
    assert caught[0].filename.endswith("runs.py")  # that calls the step
    assert rules(optimizer) == {
        f"{name}.{kind}": "SINGD" if name == "head" else "AdamW"
        for name in ("a", "b", "head")
        for kind in ("weight", "bias")
    }


def test_what_is_common_raises_no_false_alarm() -> None:
    """Gradients that cancel, accumulate in bfloat16, or belong to a graph of the step before."""
    model = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    optimizer = SINGD(model, T=1)  # the first gradient is zero but for rounding
    for X, y in batches(9, 8, 1, dtype=torch.float32):
        train(model, optimizer, [(X, y)])
    for dtype in (torch.bfloat16, torch.float32):
        summed = mlp(dtype)
        optimizer = SINGD(summed, T=1, lr=0.0)
        for X, y in batches(64, dtype=dtype):  # the last are lost in the sum
            mean_loss(summed(X), y).backward()
            optimizer.step()
    model = mlp()
    optimizer, loss = SINGD(model, T=2), mean_loss(model(X.double()), y.double())
    for X, y in batches(8):
        optimizer.zero_grad()  # after the forward pass
        loss.backward()
        optimizer.step()
        loss = mean_loss(model(X), y)
    assert set(rules(optimizer).values()) == {"SINGD"}


@pytest.mark.parametrize("first", ["empty", "zero", "infinite"])
def test_a_pass_that_tells_nothing_does_not_settle_it(first: str) -> None:
    model = Penalized()
    optimizer = SINGD(model, T=1)
    (X, y), *rest = batches(4)
    if first == "empty":
        model(X[:0]).sum().backward()
    else:
        (mean_loss(model(X), y) * (0.0 if first == "zero" else float("inf"))).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"fc\.weight"):
        train(model, optimizer, rest)


# Which structure ----------------------------------------------------------------------------------


LIMITED = "up_to({}, dense, diagonal)"


@pytest.mark.parametrize(("limit", "wide"), [(0, "KC"), (3, "KC"), (5, "K"), (6, ""), (None, "")])
def test_a_factor_wider_than_the_limit_is_diagonal(limit: int | None, wide: str) -> None:
    model = nn.Linear(6, 4)
    expected = ", ".join("diagonal" if side in wide else "dense" for side in "KC")
    given = ("dense" if limit is None else LIMITED.format(limit),) * 2
    assert structures(SINGD(model, structures=given))["weight"] == expected
    with pytest.warns(
        DeprecationWarning, match=r"max_dim.*: write .*'up_to\(.*, dense, diagonal\)"
    ):
        optimizer = SINGD(
            model, structures=("dense", "dense"), max_dim=99 if limit is None else limit
        )
    assert structures(optimizer)["weight"] == expected


@given(st.lists(st.integers(1, 40), max_size=1), *[st.integers(1, 40) | st.integers(1, 10_000)] * 2)
def test_by_default_factors_are_within_a_budget(batch: list[int], d_out: int, d_in: int) -> None:
    group = SINGD(nn.Linear(2, 2), structures=None).param_groups[0]
    chosen = InverseFree().structures("weight", (*batch, d_out, d_in), None, group)
    members = [s(n, device="meta") for s, n in zip(chosen, (d_in, d_out), strict=True)]
    stored = sum(member.numel() for member in members)
    smaller, larger = sorted((d_out, d_in))
    share = 2.0 if smaller >= 16 else 2.5
    assert stored <= (17 * larger if batch and smaller < 16 else share * smaller * larger)
    if larger <= 16 and (batch or smaller >= 8):
        assert stored == d_in**2 + d_out**2


@pytest.mark.filterwarnings("ignore:max_dim:DeprecationWarning")
def test_limits_by_pattern_the_first_match_counts() -> None:
    limits = {"0.*": 4, "2.weight": None, "*": 0}
    got = structures(SINGD(mlp(), max_dim=limits))
    assert got["0.weight"] == "dense, diagonal"
    assert got["2.weight"] == "dense, dense"
    model = mlp()
    optimizer = SINGD(model, T=1, max_dim={"2.*": 6})  # 8192 for the rest
    assert structures(optimizer)["0.weight"] == "dense, dense"
    assert structures(optimizer)["2.weight"] == "dense, dense"
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["max_dim"]["2.*"] = 2  # changed in place
    train(model, optimizer, batches(1))
    assert structures(optimizer)["2.weight"] == "diagonal, diagonal"
    with pytest.raises(ValueError, match=r"max_dim: expected an integer >= 0, got -1"):
        SINGD(mlp(), max_dim={"*": -1})


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.itemsize)
        return result


@pytest.mark.parametrize("layers", [(), "all"])
def test_a_head_as_wide_as_the_vocabulary_never_has_its_square(layers: Any) -> None:
    vocabulary, width = 20_000, 4
    with Largest() as largest:
        model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary))
        optimizer = SINGD(model, T=1, structures=None, loss_average="batch+sequence", layers=layers)
        for _ in range(2):
            x, y = torch.randint(vocabulary, (2, 3, 5))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
    assert rules(optimizer)["1.weight"] == "SINGD"
    assert structures(optimizer)["1.weight"] == "dense, diagonal"
    assert largest.numel <= 8 * vocabulary * (width + 1)  # never mind the logits, [15, vocabulary]


def test_the_structure_of_wide_factors_is_a_choice() -> None:
    spec = "up_to(5, dense, block_diagonal(2))"
    got = structures(SINGD(nn.Linear(6, 4), structures=(spec, spec)))
    assert got["weight"] == "block_diagonal(2), dense"
    with pytest.warns(DeprecationWarning, match=r"'up_to\(5, dense, block_diagonal\(2\)\)'"):
        limits = SINGD(nn.Linear(6, 4), max_dim=5, wide_structure="block_diagonal(2)")
    assert structures(limits) == got


def test_structures_by_pattern_the_first_match_counts() -> None:
    given = {"0.*": ("diagonal", "dense"), "*.weight": ("dense", "diagonal"), "2.*": ("dense",) * 2}
    got = structures(SINGD(mlp(), structures=given))
    assert got["0.weight"] == "diagonal, dense"
    assert got["2.weight"] == "dense, diagonal"
    other = {"x*": ("diagonal",) * 2}
    assert structures(SINGD(mlp(), structures=other))["0.weight"] == "dense, dense"
    got = structures(SINGD(nn.Linear(80, 20), structures=other))
    assert got["weight"] == "block_diagonal(20), dense"


@pytest.mark.parametrize("layer", OPTIONAL)
def test_optional_types_are_preconditioned_where_named(layer: Any) -> None:
    model = layer(*{nn.Embedding: (5, 4), nn.GroupNorm: (2, 4)}.get(layer, (4,)))
    assert rules(SINGD(model))["weight"] == "AdamW"
    for named in ((layer,), "all"):
        assert rules(SINGD(model, layers=named))["weight"] == "SINGD"


def test_only_optional_types_may_be_named() -> None:
    with pytest.raises(ValueError, match=r"layers: expected one of .*Embedding"):
        SINGD(mlp(), layers=(nn.Linear,))


# Everything is trained by something ---------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen layer and a low-rank correction held as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.ones(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.mT @ self.B.mT


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class First(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x)[0]
        return output


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer: nn.Module = nn.utils.weight_norm(nn.Linear(4, 4))
    return layer


EXOTIC: dict[str, Any] = {
    "attention": lambda: Attention(4, 2, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "recurrent": lambda: Recurrent(4, 4, batch_first=True),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "old weight norm": old_weight_norm,
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "gru": lambda: First(nn.GRU(4, 4, batch_first=True)),
    "rnn": lambda: First(nn.RNN(4, 4, batch_first=True)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "lora": LoRA,
}


@pytest.mark.parametrize("name", EXOTIC)
def test_every_parameter_is_trained(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), EXOTIC[name](), nn.Linear(4, 3))
    optimizer = SINGD(model, T=1, lr=0.1, kl_clip=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 5, 4)).exp().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (p.grad is not None and bool(p.grad.any())), name
        assert p.grad is not None or not p.requires_grad, name


@pytest.mark.parametrize("name", ["weight norm", "old weight norm", "spectral norm", "gru"])
def test_what_a_weight_is_computed_from_is_trained_by_adamw(name: str) -> None:
    assert set(rules(SINGD(EXOTIC[name]())).values()) == {"AdamW"}


def test_layers_of_other_packages_are_found_by_name() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 4)
    geometric = pytest.importorskip("torch_geometric.nn")
    x, edges = torch.randn(5, 4), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
    gcn = geometric.GCNConv(4, 4)
    models = {
        "conv1d": (conv1d, (x,)),
        "linear": (geometric.Linear(4, 4), (x,)),
        "gcn": (gcn, (x, edges)),
        "gat": (geometric.GATConv(4, 4), (x, edges)),
    }
    for name, (model, inputs) in models.items():
        optimizer = SINGD(model, T=1)
        model(*inputs).exp().sum().backward()
        optimizer.step()
        found = rules(optimizer)
        assert found["lin.weight" if name in ("gcn", "gat") else "weight"] == "SINGD", name
        assert not any("K" in optimizer.state[p] for n, p in model.named_parameters() if "att" in n)


def test_adapters_are_preconditioned_and_what_they_adapt_is_frozen() -> None:
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False), mlp().float()
    )
    optimizer = SINGD(model, T=1)
    train(model, optimizer, batches(2, dtype=torch.float32))
    for name, rule in rules(optimizer).items():
        assert rule == ("SINGD" if "lora_" in name else "frozen"), name


def test_layers_initialised_lazily_need_one_forward_pass_first() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3)).to(F64)
    with pytest.raises(ValueError, match=r"0.weight is not initialised yet: run one forward"):
        SINGD(model)
    model(batches(1)[0][0])
    optimizer = SINGD(model, T=1)
    train(model, optimizer, batches(2))
    assert set(rules(optimizer).values()) == {"SINGD"}


def test_a_layer_of_your_own_takes_a_dozen_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("singd.layers.LAYERS", dict(LAYERS))

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.mT / 2

    class HalvedLayer(Layer):
        def grads(self, module: Any, g: Tensor) -> Tensor:
            return super().grads(module, g) / 2

    model = nn.Sequential(Halved())
    assert rules(SINGD(model)) == {"0.weight": "AdamW"}
    register_layer(Halved, HalvedLayer())
    optimizer = SINGD(model, T=1)
    train(model, optimizer, batches(2))
    assert rules(optimizer) == {"0.weight": "SINGD"}


class Residual(nn.Module):
    """Branches that begin as zero, or are dropped: inner layers have no gradient at first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.count = kind, 0
        self.first = nn.Linear(4, 6, dtype=F64)
        self.inner = nn.ModuleList(nn.Linear(6, 6, dtype=F64) for _ in range(3))
        self.outer = nn.ModuleList(nn.Linear(6, 6, dtype=F64) for _ in range(3))
        self.head = nn.Linear(6, 3, dtype=F64)
        if kind == "zero":
            for layer in self.outer:
                nn.init.zeros_(layer.weight)
        if kind == "thaw":
            self.inner.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x, self.count = self.first(x), self.count + 1
        for i, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            if self.kind != "dropped" or (self.count + i) % 3 == 0:
                x = x + outer(torch.tanh(inner(x)))
        return self.head(x)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("kind", ["zero", "thaw", "dropped"])
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_gradient_that_comes_late_raises_no_false_alarm(
    method: Any, kind: str, between: bool
) -> None:
    """Also where ``zero_grad`` is between forward and backward pass, as in many training loops."""
    model = Residual(kind)
    optimizer = method(model, T=10, lr=0.05, params=list(model.parameters()))
    for step, (X, y) in enumerate(batches(12)):
        if step == 3:
            model.inner.requires_grad_(True)
        if not between:
            optimizer.zero_grad()
        loss = mean_loss(model(X), y)
        if between:
            optimizer.zero_grad()
        with warnings.catch_warnings(action="error"):
            loss.backward()
            optimizer.step()
    assert optimizer.param_groups[0]["handed_over"] == ()


def test_gradients_of_zeros_raise_no_false_alarm() -> None:
    """A sum of all parameters times zero, and values of attention that the loss does not see."""
    experts = nn.ModuleList(nn.Linear(4, 4, dtype=F64) for _ in range(3))
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=F64)
    models = experts, attention
    optimizers = [SINGD(model, T=1, lr=0.05) for model in models]
    for step, (X, _) in enumerate(batches(6)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        zero = 0.0 * sum(p.sum() for p in experts.parameters())
        (experts[step // 2](X).square().mean() + zero).backward()
        attention(X[None], X[None], X[None])[1].square().sum().backward()
        with warnings.catch_warnings(action="error"):
            for optimizer in optimizers:
                optimizer.step()
    assert all(optimizer.param_groups[0]["handed_over"] == () for optimizer in optimizers)


@pytest.mark.parametrize(("weights", "biases"), [("adamw", "running"), ("running", "adamw")])
def test_a_bias_in_another_group_has_the_length_of_its_weight(weights: str, biases: str) -> None:
    model = mlp()
    groups = [
        {"params": [model[0].weight, model[2].weight], "graft": weights},
        {"params": [model[0].bias, model[2].bias], "graft": biases},
    ]
    optimizer = SINGD(model, groups, T=1, lr=0.05)
    train(model, optimizer, batches(2))
    for row in optimizer.plan().rows:
        state = optimizer.state[model.get_parameter(row.parameter)].values()
        tensors = [t for v in state for t in (v if isinstance(v, list) else [v])]
        assert row.state_bytes == sum(t.nbytes for t in tensors)
