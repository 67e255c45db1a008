"""The tables of methods and of structures at equal bytes."""

from __future__ import annotations

from pathlib import Path

from docs import rivals

BEFORE = "burn_in=0,damping=0.001"
HEAD = "task,part,method,options,seed,steps,batch,test loss,seconds,state bytes"


def written(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join([HEAD, *rows]) + "\n")
    return path


def test_methods_at_the_best_of_their_rates(tmp_path: Path) -> None:
    rows = [
        *("A,held out,adamw,lr=1,0,9,1,4.0,1,200", "A,held out,adamw,lr=2,0,9,1,2.0,1,200"),
        "B,held out,adamw,lr=1,0,9,1,1.0,1,100",
        *("A,held out,soap,lr=3e-3,0,9,1,nan,1,600", "A,held out,soap,lr=1e-2,0,9,1,1.0,1,600"),
        *("B,held out,soap,lr=3e-3,0,9,1,3.0,1,100", "C,development,soap,lr=3e-3,0,9,1,9,1,1"),
        "A,held out,singd,\"lr=3e-3,structures=(1,'scaled_identity')\",0,9,1,4.0,1,400",
        'A,held out,soap,"lr=1e-2,rank=16",0,9,1,5.0,1,100',
    ]
    table = rivals.methods(written(tmp_path / "methods.csv", rows)).splitlines()[2:]
    assert table == [
        "| `SOAP` | best of 2 | 1 | 1 of 2 | 1.750 | 3.00 (B) | 2.00 |",
        "| | 3e-3 | 1 | 0 of 2 | inf | inf (A) | |",
        '| `SINGD(structures=("dense", "scaled_identity"), burn_in=0, damping=0.001)` | best of 1 '
        "| 1 | 0 of 1 | 2.000 | 2.00 (A) | 2.00 |",
        "| | 3e-3 | 1 | 0 of 1 | 2.000 | 2.00 (A) | |",
        "| `SOAP(rank=16)` | best of 1 | 1 | 0 of 1 | 2.500 | 2.50 (A) | 0.50 |",
    ]


def test_the_standard_error_is_that_over_the_seeds_of_all_runs(tmp_path: Path) -> None:
    rows = [
        f"{task},held out,{method},lr=3e-3,{seed},9,1,{loss},1,100"
        for task, method, losses in (
            *(("A", "adamw", (2.0, 2.0, 2.0)), ("A", "muon", (1.0, 3.0))),
            *(("B", "adamw", (1.0, 3.0, 9.0)), ("B", "muon", (2.0, 3.0, 1.0))),
        )
        for seed, loss in enumerate(losses)
    ]
    table = rivals.methods(written(tmp_path / "methods.csv", rows)).splitlines()[2:]
    # of seeds A has 0.5 and 1.5, B has 2 and 1: medians are 1.25 and 1.25
    said = "1 of 2 | 1.125 ± 0.000 | 1.25 ± 0.50 (B)"
    expected = [
        f"| Muon (PyTorch's) | best of 1 | 2 | {said} | 1.00 |",
        f"| | 3e-3 | 2 | {said} | |",
    ]
    assert table == expected


def test_structures_beside_those_chosen_within_their_bytes(tmp_path: Path) -> None:
    rows = [
        "A,held out,adamw,lr=1,0,9,1,2.0,1,200",
        f'A,held out,singd,"{BEFORE}",0,9,1,1.0,1,300',
        f"A,held out,singd,\"structures='auto',{BEFORE}\",0,9,1,1.5,1,310",
        f"A,held out,singd,\"structures=('diagonal','diagonal'),{BEFORE}\",0,9,1,4.0,1,100",
        f"A,held out,automatic,\"like='diagonal',{BEFORE}\",0,9,1,3.0,1,90",
    ]
    table = rivals.equal_bytes(written(tmp_path / "equal_bytes.csv", rows)).splitlines()[2:]
    assert table == [
        "| `diagonal` on both sides | 0 of 1 | 2.000 | 2.00 (A) | 0.50 |",
        "| chosen | 0 of 1 | 1.500 | 1.50 (A) | 0.45 |",
        "| the default's | 1 of 1 | 0.500 | 0.50 (A) | 1.50 |",
        "| chosen, `budget=1.5` | 1 of 1 | 0.750 | 0.75 (A) | 1.55 |",
    ]
