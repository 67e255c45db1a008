"""The comparison with equal trials, on a budget of a few steps."""

import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("networkx")
pytest.importorskip("pytorch_optimizer")

from benchmarks.evidence import __main__, outcome, protocol, report, search, trial
from benchmarks.evidence.protocol import SIZES, Range, Size
from benchmarks.evidence.runs import Runs
from benchmarks.evidence.tasks import TASKS, halves
from benchmarks.evidence.trial import Trial
from benchmarks.suite import TASKS as SUITE

METHODS = ("AdamW", "SOAP", "SINGD")


@pytest.fixture(autouse=True)
def few_methods(monkeypatch):
    monkeypatch.setattr(protocol, "METHODS", dict.fromkeys(METHODS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one run of the smallest size left its files."""
    out = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "METHODS", dict.fromkeys(METHODS))
        __main__.main(["--size", "tiny", "--out", str(out)])
    return out


def test_every_method_has_equal_trials_and_paired_seeds(folder):
    runs, size = Runs(folder / "runs.jsonl"), SIZES["tiny"]
    for task in size.tasks:
        for method in METHODS:
            own = [t for t, _ in runs if (t.task, t.method) == (task, method)]
            assert sum(t.stage == "search" for t in own) == 1 + size.points
            seeds = [t.seed for t in own if t.stage == "final" and t.setting == own[0].setting]
            assert sorted(seeds) == [100, 101]
            assert all(t.steps <= protocol.COUNTED_STEPS for t in own)


def test_tables_and_the_figure_have_every_method(folder):
    names = ("tuned", "one_setting", "target_tuned", "target_one_setting", "costs")
    for name in names:
        text = (folder / "tiny" / f"{name}.md").read_text()
        assert all(f"\n| {method} |" in text for method in METHODS)
    assert "<svg" in (folder / "tiny" / "profile.svg").read_text()
    assert json.loads((folder / "tiny" / "summary.json").read_text())["tasks"] == 2


def test_what_is_there_is_not_run_again_unless_asked_for(folder, monkeypatch):
    monkeypatch.setattr(__main__, "run", lambda trial: pytest.fail("a run is repeated"))
    before = (folder / "runs.jsonl").read_text()
    __main__.main(["--size", "tiny", "--out", str(folder)])
    assert (folder / "runs.jsonl").read_text() == before
    with pytest.raises(pytest.fail.Exception, match="repeated"):
        __main__.main(["--size", "tiny", "--rerun", "--methods", "SOAP", "--out", str(folder)])


def test_finals_may_be_longer_than_the_trials_that_chose_their_settings(folder, monkeypatch):
    size = SIZES["tiny"]
    longer = replace(size, stretch=2 * size.stretch, searched=size.stretch)
    runs = Runs(folder / "runs.jsonl")
    for task in size.tasks:
        new = list(search.missing(runs, task, METHODS, longer))
        finals = [t for t in new if t.stage == "final"]
        assert {t.stage for t in new} <= {"final", "bytes"}  # nothing is searched again
        assert {t.steps for t in finals} == {search.steps(task, longer)}
        for method in METHODS:
            known = [t for t, _ in runs if (t.task, t.method, t.stage) == (task, method, "final")]
            own = [t.setting for t in finals if t.method == method]
            assert all(t.setting in own for t in known)


def test_hours_are_those_of_two_cores(tmp_path, capsys):
    runs, size = Runs(tmp_path / "runs.jsonl"), SIZES["full"]
    for known in search.searched("deep autoencoder", "AdamW", SIZES["part"], 1):
        runs.add(known, {"seconds": [1.0, 3.0], "failed": False, "losses": [1.0, 1.0]})
    __main__.main(["--size", "full", "--hours", "--methods", "AdamW", "--out", str(tmp_path)])
    trials = 1 + len(size.wider) * size.points + 2 * size.seeds
    hours = trials * 3.0 * size.stretch / 3600 / 2
    said = capsys.readouterr().out
    assert said.startswith(f"{hours:.1f} hours of two cores at most, and runs without")


def test_a_rerun_gives_the_same_losses(folder):
    runs = Runs(folder / "runs.jsonl")
    known = [t for t, row in runs if t.stage == "final" and not row["failed"]]
    assert trial.run(known[0])["losses"] == runs[known[0]]["losses"]


def test_tasks_are_none_on_which_defaults_were_chosen():
    names = {id(task): task.part for task in SUITE.values()}
    assert all(names.get(id(task), "held out") == "held out" for task in TASKS.values())
    assert len(protocol.TASKS) >= 6


def test_what_chooses_does_not_report():
    for task in TASKS.values():
        batches = list(task.held_out())
        chosen, told = halves(batches, "validation"), halves(batches, "test")
        for whole, a, b in zip(batches, chosen, told, strict=True):
            assert len(a[0]) + len(b[0]) == len(whole[0])
            assert abs(len(a[0]) - len(b[0])) <= 1
            rows = {tuple(row.flatten().tolist()) for row in a[0]}
            same = sum(tuple(row.flatten().tolist()) in rows for row in b[0])
            assert same <= 0.01 * len(rows) or task is TASKS["graph attention"]


@pytest.mark.parametrize("method", protocol.RANGES)
def test_points_lie_in_the_ranges_and_a_longer_search_begins_like_a_shorter_one(method):
    few, many = protocol.points(method, 5), protocol.points(method, 16)
    assert many[:5] == few
    assert len({p["rate"] for p in many}) == 16
    for point in many:
        for name, r in protocol.RANGES[method].items():
            assert r.low * 0.99 <= point[name] <= r.high * 1.01
    assert protocol.RANGES[method].keys() == protocol.FIXED[method].keys()


def test_published_settings_are_in_the_ranges():
    ranges = protocol.RANGES["INGD"]
    published = {"averaging": (0.11, 0.44), "momentum": (0.55, 0.65), "damping": (3e-5, 4e-4)}
    for name, (low, high) in published.items():
        assert ranges[name].low <= low < high <= ranges[name].high


def test_the_schedule_warms_up_and_ends_at_zero():
    rates = [protocol.factor(step, 100, 0.2) for step in range(100)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[19] == 1.0 == max(rates)
    assert rates[19:] == sorted(rates[19:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert protocol.factor(100, 100, 0.2) == pytest.approx(0, abs=1e-9)
    assert Range(1.0, 100.0).at(0.5) == pytest.approx(10.0)


def rows(best, method="AdamW", task="deep autoencoder", size=None):
    """A search whose trial number ``best`` was the best one."""
    trials = search.searched(task, method, size, 1)
    order = sorted(range(len(trials)), key=lambda i: trials[i].setting["rate"])
    for i, t in enumerate(trials):
        loss = 0.1 if i == order[best] else 1.0
        yield t, {"failed": False, "losses": [2.0, loss]}


def test_a_best_rate_at_an_end_widens_the_range_for_all(tmp_path):
    size, task = Size(1.0, 4, 2, (1.0, 3.0), ("deep autoencoder",)), "deep autoencoder"
    runs = Runs(tmp_path / "runs.jsonl")
    for method, best in (("AdamW", 1), ("SOAP", 2), ("SINGD", 1)):
        for t, row in rows(best, method, size=size):
            runs.add(t, row)
    assert search.rounds(runs, task, size) == 1
    assert {t.stage for t in search.missing(runs, task, METHODS, size)} == {"bytes", "final"}
    for t, row in rows(-1, "SOAP", size=size):
        runs.add(t, row)
    assert search.at_border(runs, task, "SOAP", size, 1) == "highest"
    assert search.rounds(runs, task, size) == 2
    more = search.missing(runs, task, METHODS, size)
    further = [next(more) for _ in range(3 * size.points)]
    assert [m for m in METHODS for _ in range(size.points)] == [t.method for t in further]
    assert max(t.setting["rate"] for t in further) > protocol.RATE.high


def test_differences_are_paired(tmp_path):
    size, task = Size(1.0, 1, 3, (1.0,), ("deep autoencoder",)), "deep autoencoder"
    runs = Runs(tmp_path / "runs.jsonl")
    ends = {"AdamW": [1.0, 2.0, 3.0], "SOAP": [0.9, 2.1, 2.7], "SINGD": [0.5, None, 1.0]}
    for method, losses in ends.items():
        for t, row in rows(0, method, size=size):
            runs.add(t, row)
        for setting in (protocol.FIXED[method], protocol.points(method, 1)[0]):
            runs.add(search.counted(task, method, setting), {"failed": False, "peak": 10})
            for t, loss in zip(search.finals(task, method, size, setting), losses, strict=True):
                steps = [0, t.steps // 2, t.steps]
                row = {"losses": [5.0, 2.05, loss], "checks": steps, "seconds": [1.0, 2.0]}
                runs.add(t, row | {"state": 8, "failed": loss is None})
    found = outcome.Results(runs, size)
    assert found.tasks == [task]
    assert found.methods == list(METHODS)
    mean, error = found.difference("tuned", task, "SOAP")
    assert mean == pytest.approx((-0.1 + 0.1 - 0.3) / 3 / 2.0)
    assert error == pytest.approx(0.2 / 3**0.5 / 2.0)
    assert found.difference("tuned", task, "SINGD")[0] == math.inf
    assert report.standing(found, "tuned") == {"worse": [task], "level": [], "better": []}
    assert report.standing(found, "tuned", "SOAP")["level"] == [task]
    assert found.reached("tuned", task, "SINGD") == (math.inf, math.inf)
    assert found.reached("tuned", task, "SOAP") == (1.0, 1.0)
    assert found.reached("tuned", task, "AdamW") == (1.0, 1.0)
    assert found.ahead("tuned", task, "SOAP", "SINGD")
    assert not found.ahead("tuned", task, "SINGD", "SOAP")
    assert not found.ahead("tuned", task, "SOAP", "AdamW")
    assert report.ratios(found, "tuned", "AdamW") == [pytest.approx(2.0 / 1.9)]


def test_what_was_not_run_is_left_empty(folder):
    runs = Runs(folder / "runs.jsonl")
    left = {k: v for k, v in runs.found.items() if k[:2] != ("deep autoencoder", "SOAP")}
    runs.found = left
    results = outcome.Results(runs, SIZES["tiny"])
    assert results.tasks == list(SIZES["tiny"].tasks)
    assert results.methods == ["AdamW", "SINGD"]
    (row,) = [r for r in report.differences(results, "tuned").splitlines() if "SOAP" in r]
    assert row.startswith("| SOAP |  | ")
    assert "and 5 of 21 pairs" in report.share(results)
    runs.found = {k: v for k, v in left.items() if k[1] != "AdamW"}
    assert outcome.Results(runs, SIZES["tiny"]).tasks == []


def test_a_run_that_gives_up_has_failed():
    setting = protocol.FIXED["AdamW"] | {"rate": 1e30}
    row = trial.run(Trial("deep autoencoder", "AdamW", "search", setting, 0, 5))
    assert row["failed"]
    assert row["losses"][-1] is None


def test_of_equal_trials_the_last_one_counts(tmp_path):
    path, t = tmp_path / "runs.jsonl", Trial("VAE", "SOAP", "search", {"rate": 1.0}, 0, 5)
    Runs(path).add(t, {"failed": True})
    Runs(path).add(t, {"failed": False})
    assert len(path.read_text().splitlines()) == 2
    assert Runs(path)[t] == {"failed": False}
