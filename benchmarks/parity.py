"""Compare with the reference implementation, PyPI ``singd`` 0.0.5.

::

    make parity

The reference is also called ``singd``, so it runs in a process of its own (this same file), from
the folder ``--peer``. Both sides read one file of initial weights and batches and train on them.

Two tables are printed. The first shows the largest relative error (Frobenius norm, tensor by
tensor) between the two in float32, and that of each to our own float64 run: what rounding alone
costs. The second lists where the reference is wrong: the reference (float32) and ours (float64)
against the paper's formulas written out with dense matrices in float64.

Exits with status 1 if an agreement is worse than 1e-5, or ours is off the dense matrices by 1e-10.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

STEPS, TOLERANCE = 20, 1e-5
STRUCTURES = ("dense", "diagonal", "hierarchical15_15", "triltoeplitz", "triutoeplitz")
NAMES = {"hierarchical15_15": "hierarchical", "triltoeplitz": "lower Toeplitz"}
NAMES |= {"triutoeplitz": "upper Toeplitz", "block30diagonal": "block-diagonal"}
QUANTITIES = ("K", "C", "m_K", "m_C", "weights")
PAPER = {  # our options for the bare rule of the paper
    **{"structures": ("dense", "dense"), "graft": None, "factor_clip": None},
    **dict.fromkeys(("relative_damping", "scale_init", "decoupled_weight_decay"), False),
    "burn_in": 0,
    "damping": 1e-3,
}

Case = dict[str, Any]
Result = dict[str, list[Tensor]]  # every quantity, layer by layer


# The problems, as both sides see them ------------------------------------------------------------


def network(name: str) -> nn.Sequential:
    if name == "linear":
        return nn.Sequential(nn.Linear(40, 36), nn.Tanh(), nn.Linear(36, 33, bias=False))
    if name == "conv":
        first = nn.Conv2d(4, 34, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.Tanh(), nn.Conv2d(34, 33, 2, dilation=2, bias=False))
    if name == "one layer":
        return nn.Sequential(nn.Linear(40, 36, bias=False))
    groups = int(name.removesuffix(" groups"))
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups, bias=False))


def loss(output: Tensor, target: Tensor, average: str | None) -> Tensor:
    """Half the squared error: its sum, or its mean over samples or over samples and positions."""
    if output.ndim == 4:
        output = output.mean((2, 3))
    elif average == "batch" and output.ndim == 3:
        output = output.mean(1)
    errors = 0.5 * (output - target).square().sum(-1)
    return errors.sum() if average is None else errors.mean()


def train(optimizer_class: Any, case: Case) -> tuple[nn.Module, Any]:
    """Train on the batches of a case, each split into micro-batches of the sizes ``split``."""
    model = network(case["net"]).to(case["dtype"])
    model.load_state_dict(case["init"])
    model.to(case["dtype"])
    optimizer = optimizer_class(model, **case["options"])
    for X, y in case["batches"]:
        sizes = case.get("split") or [len(X)]
        optimizer.zero_grad()
        for x, t in zip(X.split(sizes), y.split(sizes), strict=True):
            average = case["options"]["loss_average"]
            share = 1.0 if average is None else len(x) / len(X)
            output = model(x.to(case["dtype"]))
            (share * loss(output, t.to(case["dtype"]), average)).backward()
        optimizer.step()
    return model, optimizer


def read_peer(model: nn.Module, optimizer: Any) -> Result:
    out: Result = {"weights": [p.detach() for p in model.parameters()]}
    for name in ("K", "C", "m_K", "m_C"):
        out[name] = [member.to_dense() for member in getattr(optimizer, f"{name}s").values()]
    return out


def read_ours(model: nn.Module, optimizer: Any) -> Result:
    from structured import parse

    out: Result = {"weights": [p.detach() for p in model.parameters()]}
    out |= {name: [] for name in ("K", "C", "m_K", "m_C")}
    for layer in filter(lambda module: hasattr(module, "weight"), model):
        groups = getattr(layer, "groups", 1)
        sizes = {
            "K": layer.weight[0].numel() + (layer.bias is not None),
            "C": len(layer.weight) // groups,
        }
        for name in out.keys() & optimizer.state[layer.weight].keys():
            structure = parse(optimizer.defaults["structures"]["KC".index(name[-1])])
            zero = structure(sizes[name[-1]], batch_shape=() if groups == 1 else (groups,))
            out[name].append(zero.with_tensors(optimizer.state[layer.weight][name]).to_dense())
    return out


def options(rule: str, average: str | None, **more: Any) -> dict[str, Any]:
    smaller = 0.1 if average is None else 1.0  # a sum of losses has larger gradients than a mean
    return {
        "lr": smaller * 1e-2,
        "momentum": 0.9,
        "damping": 1e-2,
        "alpha1": 0.0 if rule == "IKFAC" else 0.5,
        "weight_decay": 1e-2,
        "T": 1,
        "loss_average": average,
        "lr_cov": smaller * 0.05,
        "kfac_like": rule == "IKFAC",
        **more,
    }


def make_case(net: str, options: dict[str, Any], steps: int = STEPS, **more: Any) -> Case:
    """Fixed random weights and batches for a network."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"linear": (8, 5, 40), "conv": (8, 4, 9, 9), "one layer": (8, 40)}.get(
        net, (8, 8, 5, 5)
    )
    model = network(net)
    init = {
        k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()
    }
    batches = []
    for _ in range(steps):
        X = torch.randn(inputs, generator=generator)
        target = model(X)
        positions = target.ndim == 3 and options["loss_average"] == "batch+sequence"
        shape = target.shape[:-1] if positions else target.shape[:1]
        width = target.shape[1] if target.ndim == 4 else target.shape[-1]
        batches.append((X, torch.randn(*shape, width, generator=generator)))
    return {
        "net": net,
        "options": options,
        "init": init,
        "batches": batches,
        "dtype": torch.float32,
        **more,
    }


# Agreement ---------------------------------------------------------------------------------------


def agreement_cases(steps: int) -> list[Case]:
    """Every net, rule, approximation and structure; all three loss averages occur."""
    averages = {
        ("linear", "expand"): "batch+sequence",
        ("linear", "reduce"): "batch",
        ("conv", "expand"): "batch",
        ("conv", "reduce"): None,
    }
    return [
        make_case(
            net,
            options(rule, average, kfac_approx=approximation, structures=(structure, structure)),
            steps,
            title=(net, rule, approximation, NAMES.get(structure, structure)),
        )
        for (net, approximation), average in averages.items()
        for rule in ("INGD", "IKFAC")
        for structure in STRUCTURES
    ]


def error(got: list[Tensor], expected: list[Tensor]) -> float | None:
    """Largest relative error in the Frobenius norm, tensor by tensor; None if there is nothing."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    if not pairs:
        return None
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())  # nan stays


def worst(got: Result, expected: Result) -> float:
    errors = [e for q in QUANTITIES if (e := error(got[q], expected[q])) is not None]
    return float(torch.tensor(errors, dtype=torch.float64).max())


def compare(case: Case, theirs: Result) -> tuple[list[str], bool]:
    """One row of the first table, and whether all of it is within the tolerance."""
    ours = run_ours(case)
    exact = run_ours({**case, "dtype": torch.float64})
    errors = [error(ours[q], theirs[q]) for q in QUANTITIES]
    row = [*case["title"], *map(show, errors), show(worst(ours, exact)), show(worst(theirs, exact))]
    return row, all(e is None or e <= TOLERANCE for e in errors)


# Where the reference is wrong ---------------------------------------------------------------------


def fault_cases(steps: int) -> list[Case]:
    def block(rule: str) -> Case:
        blocks = ("block30diagonal", "block30diagonal")
        return make_case("one layer", options(rule, "batch", structures=blocks), steps)

    def split(rule: str, sizes: list[int]) -> Case:
        return make_case("one layer", options(rule, "batch"), steps, split=sizes)

    def grouped(groups: int) -> Case:
        first_order = options("IKFAC", None, damping=0.0) | {"lr_cov": 1.0}
        return make_case(f"{groups} groups", first_order, 1)

    titles = {
        ("block-diagonal K and C", "INGD"): block("INGD"),
        ("block-diagonal K and C", "IKFAC"): block("IKFAC"),
        ("2 micro-batches of 8", "IKFAC"): split("IKFAC", [4, 4]),
        ("4 micro-batches of 8", "IKFAC"): split("IKFAC", [2, 2, 2, 2]),
        ("uneven micro-batches, 5 + 3", "INGD"): split("INGD", [5, 3]),
        ("convolution in 2 groups", "S_K"): grouped(2),
        ("convolution in 4 groups", "S_K"): grouped(4),
    }
    return [{**case, "title": title, "dtype": torch.float64} for title, case in titles.items()]


def dense_rule(case: Case) -> Result:
    """A linear layer, its full batches and the paper's formulas, all with dense matrices."""
    rule = case["options"]
    lr, momentum, damping = rule["lr"], rule["momentum"], rule["damping"]
    W = case["init"]["0.weight"].double()
    size = 30 if rule.get("structures", "")[:1] == ("block30diagonal",) else max(W.shape)

    def start(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block = torch.arange(n) // size
        I = torch.eye(n, dtype=torch.float64)
        return I, I.clone(), 0 * I, (block[:, None] == block).double()

    I_K, K, m_K, mask_K = start(W.shape[1])
    I_C, C, m_C, mask_C = start(W.shape[0])
    velocity = torch.zeros_like(W)
    for X, y in case["batches"]:
        A, N = X.double().T, len(X)
        B = (W @ A - y.double().T) / N
        H_K = mask_K * (K.T @ (A @ A.T / N) @ K)
        H_C = mask_C * (C.T @ (N * B @ B.T) @ C)
        KK, CC = mask_K * (K.T @ K), mask_C * (C.T @ C)
        t_K, t_C, s_K, s_C = H_C.trace(), H_K.trace(), CC.trace(), KK.trace()
        if rule["kfac_like"]:
            t_K, t_C, s_K, s_C = len(C), len(K), len(C), len(K)
        new_K = 0.5 * (t_K / len(C) * H_K + damping * s_K / len(C) * KK - I_K)
        new_C = 0.5 * (t_C / len(K) * H_C + damping * s_C / len(K) * CC - I_C)
        m_K, m_C = rule["alpha1"] * m_K + new_K, rule["alpha1"] * m_C + new_C
        K, C = K - rule["lr_cov"] * K @ m_K, C - rule["lr_cov"] * C @ m_C
        direction = C @ C.T @ (B @ A.T) @ K @ K.T + rule["weight_decay"] * W
        velocity = momentum * velocity + direction
        W = W - lr * velocity
    momenta = {} if rule["kfac_like"] else {"m_K": [m_K], "m_C": [m_C]}
    return {"weights": [W], "K": [K], "C": [C], "m_K": [], "m_C": []} | momenta


def dense_patches(case: Case) -> Tensor:
    """``S_K [groups, d_in, d_in]`` of a grouped convolution: its patches, group by group."""
    X = case["batches"][0][0].double()
    groups = int(case["net"].removesuffix(" groups"))
    patches = nn.functional.unfold(X, 3)
    A = patches.unflatten(1, (groups, -1)).movedim(1, 0).transpose(1, 2).flatten(2)
    return A @ A.mT / A.shape[-1]


def second_moment(K: Tensor) -> Tensor:
    """``S_K`` of one undamped IKFAC step from the identity with ``beta_1 = 1``."""
    return 3 * torch.eye(K.shape[-1], dtype=K.dtype) - 2 * K


def judge(case: Case, theirs: Result) -> tuple[list[str], bool]:
    """One row of the second table, and whether ours is right."""
    ours = run_ours(case)
    if case["title"][1] == "S_K":  # the reference keeps one factor for all groups
        S = dense_patches(case)
        wrong = error([second_moment(theirs["K"][0])], [S.mean(0)])
        right = error([second_moment(ours["K"][0])], [S])
    else:
        exact = dense_rule(case)
        wrong, right = worst(theirs, exact), worst(ours, exact)
    return [*case["title"], show(wrong), show(right)], right < 1e-10


# Running both sides -------------------------------------------------------------------------------


def run_ours(case: Case) -> Result:
    from singd import SINGD

    return read_ours(*train(SINGD, {**case, "options": PAPER | case["options"]}))


def run_peer(cases: list[Case], peer: Path) -> list[Result]:
    """Train the reference in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(cases, Path(folder, "cases.pt"))
        command = [sys.executable, "-W", "ignore", __file__, "--worker", folder]
        environment = os.environ | {"PYTHONPATH": str(peer.resolve())}
        subprocess.run(command, check=True, env=environment)
        results: list[Result] = torch.load(Path(folder, "results.pt"))
    return results


def worker(folder: Path) -> None:
    """What the process of the reference does."""
    from singd.optim import optimizer

    if Path(os.environ["PYTHONPATH"]) not in Path(optimizer.__file__).parents:
        raise SystemExit(f"expected the reference in --peer, got {optimizer.__file__}")
    cases = torch.load(folder / "cases.pt")
    cases = [{**case, "dtype": torch.float32} for case in cases]  # it knows no float64 everywhere
    results = [read_peer(*train(optimizer.SINGD, case)) for case in tqdm(cases, "reference")]
    torch.save(results, folder / "results.pt")


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with PyPI singd 0.0.5.")
    parser.add_argument("--peer", type=Path, default=Path(".peer"), help="where it is installed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    if arguments.worker:
        return worker(arguments.worker)
    agreements, faults = agreement_cases(arguments.steps), fault_cases(arguments.steps)
    theirs = run_peer(agreements + faults, arguments.peer)
    bar = tqdm(total=len(theirs), desc="ours")
    rows: dict[str, list[tuple[list[str], bool]]] = {"agree": [], "wrong": []}
    for index, (case, result) in enumerate(zip(agreements + faults, theirs, strict=True)):
        kind, check = ("agree", compare) if index < len(agreements) else ("wrong", judge)
        rows[kind].append(check(case, result))
        bar.update()
    bar.close()
    head = ["net", "rule", "approximation", "structure", *QUANTITIES, "ours-f64", "reference-f64"]
    print(f"\nOurs against the reference, float32, {arguments.steps} steps\n")
    print(table(head, [row for row, _ in rows["agree"]]))
    print("\nWhere the reference is wrong: both against dense matrices\n")
    print(table(["case", "of", "reference (f32)", "ours (f64)"], [row for row, _ in rows["wrong"]]))
    failed = [row for kind in rows.values() for row, good in kind if not good]
    if failed:
        lines = "\n".join(map("  ".join, failed))
        raise SystemExit(f"\n{len(failed)} rows out of tolerance ({TOLERANCE:g}):\n{lines}")
    print(f"\nAll within {TOLERANCE:g}.")


if __name__ == "__main__":
    main()
