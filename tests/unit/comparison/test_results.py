"""From records to results, with records whose numbers can be worked out by hand; the statistics, against scipy."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from soka_serve.comparison.claims import judge
from soka_serve.comparison.page import loss_chart, render_html, strips
from soka_serve.comparison.plan import Cell, RunInputs, list_cells
from soka_serve.comparison.read import parse_suite
from soka_serve.comparison.records import Records
from soka_serve.comparison.results import measures, summarise
from soka_serve.comparison.stats import (
    holm,
    interval,
    noise,
    pareto_front,
    running_mean,
    sign_flip,
    steps_to,
)
from soka_serve.comparison.suite import Suite
from soka_serve.comparison.tables import percent, render_markdown
from soka_serve.errors import DataError

SUITE = """
schema = 1
name = "s"
[base]
builtin = "tiny"
[train]
steps = 4
warmup_frac = 0.25
[protocol]
seeds = [0, 1, 2, 3, 4]
sweep_seeds = [100]
loss_window = 2
[[dataset]]
name = "math"
data = { builtin = "math" }
loss_targets = [2.0, 5.5]
[[other]]
name = "code"
data = { builtin = "code" }
[[method]]
name = "new"
method = "soka"
grid = { learning_rate = [1.0] }
[[method]]
name = "old"
method = "lora"
grid = { learning_rate = [2.0] }
[[claim]]
candidate = "new"
reference = "old"
primary = true
[[claim]]
candidate = "new"
reference = "old"
pairs = "examples"
[[claim]]
candidate = "new"
reference = "old"
metric = "accuracy"
dataset = "math"
[[claim]]
candidate = "old"
reference = "new"
metric = "forgetting"
relation = "no worse"
margin = 0.5
"""
LOSSES = {"new": [8.0, 3.0, 1.0, 1.0], "old": [8.0, 4.0, 2.0, 2.0]}
RIGHT = {"new": [60, 70, 80, 70, 70], "old": [50, 62, 70, 71, 60]}
INPUTS = RunInputs("b", "p", {"math": "m"}, {"code": "c"}, {}, "cpu")
ANSWERS = {"new": [0.1, 0.4], "old": [0.3, 0.4]}  # loss of two test answers, plus a hundredth of the seed


def made(suite: Suite, name: str, seed: int, **others: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "error": None,
        "method": name,
        "dataset": "math",
        "seed": seed,
        "correct": RIGHT[name][seed],
        "answered": 100,
        "answer_loss": [loss + seed / 100 for loss in ANSWERS[name]],
        "other": {"code": {"before": [1.0, 2.0], "after": [1.1, 2.3] if name == "new" else [1.3, 2.5]}},
        "loss": LOSSES[name],
        "grad_norm": [9.0, 1.0, 2.0, 1.0],
        "trainable_parameters": 100 if name == "new" else 200,
        "adapter_bytes": 400,
        "step_cpu_s": 0.1,
        "step_wall_s": 0.2,
        "training_peak_bytes": 1000,
        "batches_sha256": "same",
        "claims_sha256": suite.claims_sha256,
    } | others


def test_what_never_comes_is_not_shown_to_come_no_later() -> None:
    claim = 'metric = "steps_to_loss"\nrelation = "no worse"\nmargin = 20\n'
    suite = parse_suite(SUITE.replace('metric = "forgetting"\nrelation = "no worse"\nmargin = 0.5\n', claim), "s.toml")
    found = {
        (name, "math"): {seed: made(suite, name, seed, loss=[8.0] * 4) for seed in range(5)} for name in ("new", "old")
    }
    runs = {
        (cell.contender.name, "math"): {s: measures(cell, (), r) for s, r in found[cell.contender.name, "math"].items()}
        for cell in list_cells(suite, INPUTS)
    }
    (row,) = [row for row in judge(suite, found, runs) if row["metric"] == "steps_to_loss"]
    assert row["holds"] is None
    assert "5 runs of old on math never reach the loss" in row["undecided"]


def test_noise_begins_behind_the_warm_up_of_the_setting() -> None:
    grid = 'learning_rate = [1.0], "train.warmup_frac" = [0.25, 0.75]'
    text = SUITE.replace("learning_rate = [1.0]", grid).replace("learning_rate = [2.0]", "learning_rate = [2.0, 3.0]")
    suite = parse_suite(text, "s.toml")
    for axes, norms in (({}, [1.0, 2.0, 1.0]), ({"train.warmup_frac": 0.75}, [1.0])):
        setting = (("learning_rate", 1.0), *axes.items())
        # Of another suite, which called the method something else and searched other axes.
        shared = made(suite, "new", 0, method="theirs", setting={"learning_rate": 1.0})
        for record in (made(suite, "new", 0, setting=dict(setting)), shared):
            found = measures(list_cells(suite, INPUTS)[0], setting, record)
            assert found["grad_norm"] == pytest.approx(sum(norms) / len(norms))


@pytest.fixture
def suite() -> Suite:
    return parse_suite(SUITE, "s.toml")


@pytest.fixture
def cells(suite: Suite) -> list[Cell]:
    return list_cells(suite, INPUTS)


@pytest.fixture
def records(suite: Suite, cells: list[Cell]) -> dict[str, dict[str, Any]]:
    found = {}
    for cell in cells:
        name, values = cell.contender.name, cell.contender.grid["learning_rate"]
        setting = (("learning_rate", values[0]),)
        found[cell.spec("sweep", setting, 100).key] = made(suite, name, 0)
        for run in cell.finals(setting):
            found[run.key] = made(suite, name, run.seed)
    return found


def complete(suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": "soka-serve compare s.toml",
        "suite": {"name": "s", "description": "<b>&"},
        "versions": {"torch": "1"},
        "progress": {"done": 12, "left": 0, "failed": 0},
        "protocol": suite.protocol.model_dump(mode="json"),
        **summarise(suite, cells, records),
    }


def final_keys(cell: Cell) -> list[str]:
    return [run.key for run in cell.finals((("learning_rate", cell.contender.grid["learning_rate"][0]),))]


def test_losses_accuracy_steps_forgetting_and_gradients(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]
) -> None:
    found = summarise(suite, cells, records)
    new, old = found["table"]
    assert new["answer_loss"]["mean"] == pytest.approx(0.25 + 0.02)
    assert new["answer_loss"]["values"] == pytest.approx({str(seed): 0.25 + seed / 100 for seed in range(5)})
    assert (new["accuracy"]["mean"], new["accuracy"]["median"]) == (0.7, 0.7)
    # The mean of two losses is 5.5 after two steps, and (3 + 1) / 2 after three; the other one has 6, 3, 2.
    assert found["cells"][0]["median_steps_to"] == {"2": 3, "5.5": 2}
    assert (new["steps_to_loss"]["mean"], old["steps_to_loss"]["mean"]) == (3, 4)
    assert (new["forgetting"]["mean"], old["forgetting"]["mean"]) == pytest.approx((0.2, 0.4))
    # The first step is warm-up: 1, 2, 1 are left.
    assert new["grad_norm"] == pytest.approx(4 / 3, abs=1e-5)
    assert new["grad_noise"]["mean"] == pytest.approx(math.log(2) / math.sqrt(2), abs=1e-5)
    assert (new["pareto"], old["pareto"]) == (True, False)
    assert (found["data_order_equal"], found["effort_equal"], found["claims_changed_after"]) == (True, True, 0)
    assert found["cells"][0]["loss_curve"] == [[2, 5.5], [3, 2.0], [4, 1.0]]


def test_what_is_forgotten_is_one_pair_for_each_example_whatever_was_trained_on() -> None:
    dataset = '[[dataset]]\nname = "code"\ndata = { builtin = "code" }\nloss_targets = [2.0]\n[[other]]'
    claim = '[[claim]]\ncandidate = "new"\nreference = "old"\npairs = "examples"\nmetric = "forgetting"\n'
    suite = parse_suite(SUITE.replace("[[other]]", dataset) + claim, "s.toml")
    cells = list_cells(suite, RunInputs("b", "p", {"math": "m", "code": "c"}, {"code": "c"}, {}, "cpu"))
    found = {}
    for cell in cells:
        ((axis, (value,)),) = cell.contender.grid.items()
        for run in (cell.spec("sweep", ((axis, value),), 100), *cell.finals(((axis, value),))):
            found[run.key] = made(suite, cell.contender.name, run.seed % 100)
    _, answers, *_, forgets = summarise(suite, cells, found)["claims"]
    assert answers["n"] == 4  # two test problems of each dataset
    assert forgets["n"] == 2
    assert forgets["median"] == pytest.approx(-0.2)
    assert forgets["p"] == 0.25


def test_records_of_another_suite_keep_their_names_of_methods(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]
) -> None:
    """Keys leave names out, so that suites share what they ran alike."""
    theirs = {key: record | {"method": f"their-{record['method']}"} for key, record in records.items()}
    assert summarise(suite, cells, theirs)["table"] == summarise(suite, cells, records)["table"]


def test_claims_are_true_or_false_by_the_sign_flip_test(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]
) -> None:
    primary, examples, accuracy, forgets = summarise(suite, cells, records)["claims"]
    # Five pairs that all differ by -0.1: one of 32 patterns.
    assert primary["difference"]["mean"] == pytest.approx(-0.1)
    assert (primary["n"], primary["better_in"], primary["p"], primary["holds"]) == (5, 5, 1 / 32, True)
    # Two examples differ by -0.2 and 0: that is no evidence about further examples.
    assert (examples["n"], examples["p"], examples["holds"]) == (2, 0.5, False)
    assert accuracy["difference"]["mean"] == pytest.approx((0.10 + 0.08 + 0.10 - 0.01 + 0.10) / 5)
    assert (accuracy["better_in"], accuracy["p"]) == (4, 2 / 32)
    # Worse by 0.2, which is less than the margin of 0.5; one of three secondary claims.
    assert (forgets["p"], forgets["p_corrected"], forgets["holds"]) == (1 / 32, 3 / 32, False)


@pytest.mark.parametrize("status", ["diverged", "failed", "missing"])
def test_a_claim_is_undecided_while_a_run_is_not_there(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]], status: str
) -> None:
    key = final_keys(cells[0])[0]
    if status == "missing":
        del records[key]
    elif status == "failed":
        records[key] = {"status": "failed", "error": "out of <memory>"}
    else:
        records[key] = made(suite, "new", 0, status="diverged", answer_loss=None)
    found = complete(suite, cells, records)
    assert found["claims"][0]["holds"] is None
    assert f"new on math {'are missing' if status == 'missing' else status}" in render_markdown(found)
    new = found["table"][0]
    assert new["answer_loss"]["n"] == 4
    assert new["accuracy"]["n"] == (5 if status == "diverged" else 4)
    assert (new["diverged"], new["complete"]) == ((1, True) if status == "diverged" else (0, False))
    if status == "failed":
        assert "new on math: out of <memory>" in render_markdown(found)
        assert "out of &lt;memory&gt;" in render_html(found)


def test_what_makes_a_comparison_unfair_is_told(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]
) -> None:
    first = records[final_keys(cells[0])[0]]
    first.update(batches_sha256="other", claims_sha256="of before")
    found = complete(suite, cells, records)
    assert found["data_order_equal"] is False
    text = render_markdown(found | {"effort_equal": False})
    for said in ("did not see the same batches", "not those of 1 of 10 results", "was tried with as many settings"):
        assert said in text


def test_records_of_another_suite_do_not_say_that_claims_were_changed(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]
) -> None:
    first, second, third, *_ = final_keys(cells[0])
    records[first].update(claims_sha256="theirs", suite="<before>")
    records[second].update(claims_sha256="of before", suite="s")
    records[third].update(suite="same claims")
    found = complete(suite, cells, records)
    assert (found["claims_changed_after"], found["made_for"]) == (1, {"<before>": 1})
    text = render_markdown(found)
    assert "not those of 1 of 10 results: they were changed" in text
    assert "1 of 10 results were made for another suite, with other claims: <before>" in text
    assert "&lt;before&gt;" in render_html(found)
    assert "another suite" not in render_markdown({key: value for key, value in found.items() if key != "made_for"})


@pytest.mark.parametrize("kept", [0, 1, 2, 7])
def test_an_unfinished_comparison_can_be_reported(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]], kept: int
) -> None:
    found = complete(suite, cells, dict(list(records.items())[:kept]))
    assert "unfinished" in render_markdown(found)
    assert "<table>" in render_html(found)


def test_the_page_is_whole_and_escaped(suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]) -> None:
    found = complete(suite, cells, records)
    page = render_html(found)
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert page.count("<svg") == 4  # loss and parameters; every seed; loss and gradient norm of one dataset
    assert "http" not in page.split("</style>")[1]  # nothing is fetched
    (strip,) = strips(found, ["new"])
    assert strip.svg is not None
    assert sum("seed" in (t.text or "") for t in ElementTree.fromstring(strip.svg).iter("title")) == 10
    for svg in (loss_chart(found, ["new"]), strip.svg):
        assert svg is not None
        assert sorted(t.text or "" for t in ElementTree.fromstring(svg).iter("text") if t.get("class") == "label") == [
            "new",
            "old",
        ]


def test_percentages_stay_between_0_and_100() -> None:
    assert percent({"mean": 0.8, "low": 0.5, "high": 1.1}) == "80.0 [50.0, 100.0]"
    assert percent({"mean": 0.1, "low": -0.2, "high": 0.4}) == "10.0 [0.0, 40.0]"
    assert percent({"mean": 0.1, "low": None, "high": None}) == "10.0"
    assert percent(None) == "–"


@pytest.mark.parametrize(
    "line", ['{"key": "mine", "note": "precious"}', '{"key": "0123456789abcdef"}', '{"key": 5, "status": "done"}']
)
def test_records_of_somebody_else_s_are_not_taken_for_ours(tmp_path: Path, line: str) -> None:
    """They would be overwritten by the results."""
    file = tmp_path / "res.records.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=r"res\.records.jsonl:1: expected a record of a run"):
        Records(tmp_path / "work").take_over(file, [])


# --- statistics, against scipy and values worked out by hand ----------------------------------------------------------


def test_the_interval_is_students_t() -> None:
    values = [0.61, 0.70, 0.66, 0.72, 0.64]
    found = interval(values)
    assert found is not None
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert interval([]) is None


def test_the_sign_flip_test_counts_patterns() -> None:
    values = [-0.3, 0.1, -0.2, -0.25, 0.05, -0.4]
    sums = [sum(s * v for s, v in zip(signs, values, strict=True)) for signs in itertools.product((1, -1), repeat=6)]
    assert sign_flip(values) == sum(s <= sum(values) + 1e-12 for s in sums) / 64
    many = [*values, *values, *values]  # too many to count: scipy draws patterns too
    drawn = stats.permutation_test(
        (many,), np.sum, permutation_type="samples", alternative="less", n_resamples=20_000, rng=1
    )
    assert sign_flip(many) == pytest.approx(drawn.pvalue, abs=2e-3)
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([]) is None


def test_holm_on_a_worked_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # One that is undecided yet may come first or last: what is said now holds then, too.
    assert holm([0.02, None, 0.01]) == pytest.approx([0.04, None, 0.03])
    assert holm([]) == []


def test_the_pareto_front_keeps_equals_and_drops_what_is_beaten() -> None:
    points = [(10, 0.5), (10, 0.5), (20, 0.5), (20, 0.6), (5, 0.1)]
    assert pareto_front(points) == [True, True, False, True, True]


def test_steps_to_a_loss_of_the_running_mean() -> None:
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 1.0]
    assert running_mean(losses, 3) == pytest.approx([10 / 3, 8 / 3, 3.0, 2.0])
    assert steps_to(losses, 2.7, 3) == 4
    assert steps_to(losses, 2.0, 3) == 6
    assert steps_to(losses, 1.9, 3) is None
    assert steps_to(losses, 9.9, 7) is None


def test_noise_is_what_is_left_without_the_trend() -> None:
    drawn = np.random.default_rng(0).normal(0.0, 0.3, 4000)
    trend = np.linspace(5.0, -5.0, 4000)
    assert noise(list(np.exp(drawn + trend))) == pytest.approx(0.3, rel=0.05)
    assert noise([2.0, 2.0]) == 0.0
    assert noise([2.0]) is None
    assert noise([1.0, 0.0]) is None
