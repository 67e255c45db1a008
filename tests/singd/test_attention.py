"""Attention is trained as the same model written with linear layers."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, distance, snapshot

E, HEADS, N, L, S = 6, 2, 3, 4, 5


class Written(nn.Module):
    """Attention with four linear layers, ``[N, L, d]``, as in the paper it is from."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        bias, sizes = attention.in_proj_bias is not None, (E, attention.kdim, attention.vdim)
        self.q, self.k, self.v = (nn.Linear(d, E, bias, dtype=F64) for d in sizes)
        self.out = nn.Linear(E, E, bias, dtype=F64)
        self.bias_k, self.bias_v = copy.deepcopy((attention.bias_k, attention.bias_v))
        self.zero = attention.add_zero_attn
        self.out.load_state_dict(attention.out_proj.state_dict())
        weights: Any = [getattr(attention, f"{n}_proj_weight") for n in "qkv"]
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        for i, (layer, weight) in enumerate(zip((self.q, self.k, self.v), weights, strict=True)):
            layer.weight.data.copy_(weight)
            if bias:
                layer.bias.data.copy_(attention.in_proj_bias.chunk(3)[i])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.q(q), self.k(k), self.v(v)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, E)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, E)], 1)
        if self.zero:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(E // HEADS)
        if mask is not None:
            scores = scores.masked_fill(F.pad(mask, (0, scores.shape[-1] - mask.shape[-1])), -1e300)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias of keys": {"add_bias_kv": True},
    "zeros attended to": {"add_zero_attn": True},
    "sizes": {"kdim": 3, "vdim": 7, "bias": False},
}


def inputs(attention: Any, kind: str, seed: int) -> list[Tensor]:
    """Query, key and value, ``[N, L, d]``; another length at every seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, d: int) -> Tensor:
        return torch.randn(N, length + seed, d, generator=generator, dtype=F64)

    if kind == "self":
        return [draw(L, E)] * 3
    if kind == "cross":
        return [draw(L, E), *[draw(S, E)] * 2]
    return [draw(L, E), draw(S, attention.kdim), draw(S, attention.vdim)]


@pytest.mark.parametrize("method", [SINGD, KFAC])
@pytest.mark.parametrize(
    ("case", "kind"),
    [(c, k) for c in CASES for k in ("self", "cross", "all") if c != "sizes" or k == "all"],
)
@pytest.mark.parametrize("variant", ["weights", "fused"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_four_linear_layers(
    method: Any, case: str, kind: str, variant: str, masked: bool
) -> None:
    batch_first = variant == "fused"
    attention = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, dtype=F64, **CASES[case])
    for p in attention.parameters():
        nn.init.normal_(p, std=0.5)
    written, bare = Written(attention), copy.deepcopy(attention)
    optimizers = [
        method(model, T=1, lr=0.05, kl_clip=None, loss_average="batch+sequence")
        for model in (attention, written)
    ]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(2):
            q, k, v = inputs(attention, kind, 2 * step + micro)
            mask = torch.rand(N, k.shape[1]) < 0.3 if masked else None
            if mask is not None:
                mask[:, 0] = False
            given = [t if batch_first else t.transpose(0, 1) for t in (q, k, v)]
            if kind == "self":
                given = [given[0]] * 3
            elif kind == "cross":
                given[2] = given[1]
            arguments = {"key_padding_mask": mask, "need_weights": variant == "weights"}
            got, weights = attention(*given, **arguments)
            bare.load_state_dict(attention.state_dict())
            expected = bare(*given, **arguments)
            # Not bit for bit: a BLAS may multiply a contiguous copy in another order.
            torch.testing.assert_close(got, expected[0], rtol=1e-13, atol=1e-13)
            assert type(got) is Tensor
            if weights is not None:
                torch.testing.assert_close(weights, expected[1], rtol=1e-13, atol=1e-13)
            (got if batch_first else got.transpose(0, 1)).exp().mean((0, 1)).sum().backward()
            wide = None if mask is None else mask[:, None, None]
            written(q, k, v, wide).exp().mean((0, 1)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(
        attention.out_proj.weight, written.out.weight, rtol=1e-12, atol=1e-12
    )
    kept = [optimizers[0].state[p] for p in attention.parameters() if p.ndim == 2]
    layers = [written.q, written.k, written.v, written.out]
    for side in ("K", "C") if method is SINGD else ("S_K", "S_C"):
        packed, *rest = kept
        first = (
            [packed[f"{name}.{side}"] for name in "qkv"]
            if f"q.{side}" in packed
            else [packed[side]]
        )
        got = [factors[0] for factors in (*first, *(s[side] for s in rest))]
        for ours, layer in zip(got, layers, strict=True):
            theirs = optimizers[1].state[layer.weight][side][0]
            rounding = 1e-12 if method is SINGD else 1e-11  # that of the gradients, inverted
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


class Block(nn.Module):
    """An encoder and a decoder layer, on one sequence."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        options |= {"dropout": dropout, "dtype": F64}
        self.encode = nn.TransformerEncoderLayer(E, HEADS, 8, **options)
        self.decode = nn.TransformerDecoderLayer(E, HEADS, 8, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        memory = self.encode(x, src_key_padding_mask=mask)
        return self.decode(x, memory, memory_key_padding_mask=mask)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_compute_as_without_and_every_weight_is_trained(
    batch_first: bool, bias: bool, norm_first: bool
) -> None:
    block = Block(0.1, batch_first=batch_first, bias=bias, norm_first=norm_first)
    bare, x = copy.deepcopy(block), torch.randn(N, L, E, dtype=F64)
    optimizer = SINGD(block, T=1)
    outputs = []
    for model in (block, bare):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().div(N).backward()
    assert torch.equal(*outputs)
    for p, q in zip(block.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    optimizer.step()
    rules = {row.parameter: row.rule for row in optimizer.plan().rows}
    assert all((rule == "AdamW") == (".norm" in name) for name, rule in rules.items()), rules
    identity = torch.eye(E, dtype=F64)
    for p in block.parameters():
        if "C" in optimizer.state[p]:
            C = optimizer.state[p]["C"][0]
            assert not any(torch.equal(c, identity) for c in C.view(-1, *C.shape[-2:]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_the_fused_passes_of_evaluation_leave_no_trace() -> None:
    """A whole encoder goes through nested tensors there, where padding is masked."""
    layer = nn.TransformerEncoderLayer(E, HEADS, 8, batch_first=True, dtype=F64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    bare, x = copy.deepcopy(model), torch.randn(N, L, E, dtype=F64)
    optimizer = SINGD(model, T=1)
    mask = torch.arange(L) >= torch.tensor([[4], [2], [3]])
    for grad in (torch.no_grad, torch.inference_mode):
        for net in (model, bare):
            net.eval()
        with grad():
            for given in ({}, {"src_key_padding_mask": mask}):
                torch.testing.assert_close(model(x, **given), bare(x, **given))
            attention = [net.layers[0].self_attn for net in (model, bare)]
            assert torch.equal(*[a(x, x, x, need_weights=False)[0] for a in attention])
    optimizer.step()
    for state in optimizer.state.values():
        for K in (v[0] for k, v in state.items() if k.rpartition(".")[2] in ("K", "C")):
            assert torch.equal(K, torch.eye(K.shape[-1], dtype=F64).expand_as(K))


def test_evaluation_with_gradients_counts_as_any_pass() -> None:
    runs = []
    for train in (True, False):
        torch.manual_seed(0)
        block = Block(batch_first=True).train(train)
        optimizer, x = SINGD(block, T=1), torch.randn(N, L, E, dtype=F64)
        block(x).square().sum().div(N).backward()
        optimizer.step()
        runs.append(snapshot(block, optimizer))
    assert distance(*runs) == 0.0


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_under_activation_checkpointing(reentrant: bool) -> None:
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        block = Block(batch_first=True)
        optimizer, x = SINGD(block, T=1), torch.randn(N, L, E, dtype=F64, requires_grad=True)
        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        y.square().sum().div(N).backward()
        optimizer.step()
        runs.append(snapshot(block, optimizer))
    assert distance(*runs) == 0.0


def test_an_attention_module_of_your_own_gets_plain_tensors_back() -> None:
    class Residual(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
            return x + super().forward(query=x, key=x, value=x)[0], [x]

    model = Residual(E, HEADS, dtype=F64)
    optimizer = SINGD(model, T=1)
    output, (kept,) = model(x=torch.randn(L, N, E, dtype=F64))
    assert type(output) is type(kept) is Tensor
    output.sum().backward()
    optimizer.step()
    assert {row.rule for row in optimizer.plan().rows} == {"SINGD"}


def test_attention_that_projects_in_its_own_way_is_noticed() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(F.linear(x, self.in_proj_weight, self.in_proj_bias)[..., :E])

    model = Own(E, HEADS, dtype=F64)
    optimizer = SINGD(model, T=1)
    model(torch.randn(N, L, E, dtype=F64)).square().sum().backward()
    with pytest.warns(UserWarning, match="in_proj_weight"):
        optimizer.step()
    rules = {row.parameter: row.rule for row in optimizer.plan().rows}
    assert rules["in_proj_weight"] == rules["in_proj_bias"] == "AdamW"
    assert rules["out_proj.weight"] == "SINGD"


def test_two_optimizers_hear_one_attention_module_and_leave_nothing_on_it() -> None:
    model, x = Block(batch_first=True), torch.randn(N, L, E, dtype=F64)
    alone = copy.deepcopy(model)
    optimizers = [SINGD(net, T=1, lr=0.0, adamw={"lr": 0.0}) for net in (model, model, alone)]
    for net in (model, alone):
        net(x).square().sum().div(N).backward()
    for optimizer in optimizers:
        optimizer.step()
    *optimizers, expected = optimizers
    for optimizer in optimizers:
        assert distance(snapshot(model, optimizer), snapshot(alone, expected)) == 0.0
        optimizer.close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_group_of_half_an_attention_module() -> None:
    """Output projection first; the rest is added later."""
    model, whole = nn.MultiheadAttention(E, HEADS, dtype=F64), None
    whole, x = copy.deepcopy(model), torch.randn(L, N, E, dtype=F64)
    optimizer, expected = SINGD(model, model.out_proj.parameters(), T=1), SINGD(whole, T=1)
    optimizer.add_param_group({"params": [model.in_proj_weight, model.in_proj_bias]})
    for net, method in ((model, optimizer), (whole, expected)):
        net(x, x, x)[0].square().sum().div(N).backward()
        method.step()
    assert distance(snapshot(model, optimizer), snapshot(whole, expected)) == 0.0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_attention_goes_on_like_the_original(how: Any) -> None:
    model, x = Block(batch_first=True), torch.randn(N, L, E, dtype=F64)
    optimizer = SINGD(model, T=1)
    snapshots = []
    for net, method in ((model, optimizer), how((model, optimizer))):
        net(x).square().sum().div(N).backward()
        method.step()
        snapshots.append(snapshot(net, method))
    assert distance(*snapshots) == 0.0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_compiled_attention(backend: str, batch_first: bool) -> None:
    torch._dynamo.reset()
    model, x = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, dtype=F64), None
    x, plain = torch.randn(N, L, E, dtype=F64), copy.deepcopy(model)
    for net, call in ((model, torch.compile(model, backend=backend)), (plain, plain)):
        optimizer = SINGD(net, T=1)
        for _ in range(2):
            optimizer.zero_grad()
            call(x, x, x)[0].square().sum().div(N).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, L, E), (N, 0, E)])
def test_outputs_of_no_rows_are_those_without_an_optimizer(shape: tuple[int, ...]) -> None:
    model, x = nn.MultiheadAttention(E, HEADS, batch_first=True), torch.zeros(shape)
    with SINGD(model) as optimizer:
        model(x, x, x)[0].sum().backward()
        optimizer.step()
    assert model(x, x, x)[0].shape == shape
    assert optimizer.skipped == 0
