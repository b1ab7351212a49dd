"""From records to results, with records whose numbers can be worked out by hand; the statistics, against scipy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from soka_serve.comparison.page import accuracy_chart, render_html
from soka_serve.comparison.plan import Cell, RunInputs, list_cells
from soka_serve.comparison.records import Records
from soka_serve.comparison.results import summarise
from soka_serve.comparison.stats import (
    coefficient_of_variation,
    holm,
    interval,
    paired_test,
    pareto_front,
    running_mean,
    steps_to,
)
from soka_serve.comparison.suite import Suite, parse_suite
from soka_serve.comparison.tables import percent, render_markdown, verdict
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
seeds = [0, 1, 2]
loss_window = 2
[[dataset]]
name = "math"
data = { builtin = "math" }
[[method]]
name = "new"
method = "soka"
rates = [1.0]
[[method]]
name = "old"
method = "lora"
rates = [2.0]
[[claim]]
candidate = "new"
references = ["old"]
"""
LOSSES = {"new": [8.0, 3.0, 1.0, 1.0], "old": [8.0, 4.0, 2.0, 2.0]}
RIGHT = {"new": [60, 70, 80], "old": [50, 62, 70]}
PARAMETERS = {"new": 100, "old": 200}


def made(name: str, correct: int, **others: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "error": None,
        "method": name,
        "dataset": "math",
        "correct": correct,
        "best_correct": correct + 1,
        "problems": 100,
        "loss": LOSSES[name],
        "grad_norm": [9.0, 1.0, 2.0, 3.0],
        "trainable_parameters": PARAMETERS[name],
        "adapter_bytes": 400,
        "step_cpu_s": 0.1,
        "step_wall_s": 0.2,
        "peak_bytes": 1000,
        "batches_sha256": "same",
    } | others


@pytest.fixture
def suite() -> Suite:
    return parse_suite(SUITE, "s.toml")


@pytest.fixture
def cells(suite: Suite) -> list[Cell]:
    return list_cells(suite, RunInputs("b", {"math": "m"}, {}, "cpu"))


@pytest.fixture
def records(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    found = {}
    for cell in cells:
        name, rate = cell.contender.name, cell.contender.rates[0]
        found[cell.spec("sweep", rate, 100).key] = made(name, 50)
        for seed, right in enumerate(RIGHT[name]):
            found[cell.spec("final", rate, seed).key] = made(name, right, seed=seed)
    return found


def complete(suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": "soka-serve compare s.toml",
        "suite": {"name": "s", "description": "<b>&"},
        "versions": {"torch": "1"},
        "progress": {"done": 8, "left": 0, "failed": 0},
        "protocol": suite.protocol.model_dump(mode="json"),
        "loss_reference": suite.loss_reference,
        **summarise(suite, cells, records),
    }


def test_accuracy_steps_and_gradients(suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]) -> None:
    found = summarise(suite, cells, records)
    new, old = found["table"]
    assert new["accuracy"]["mean"] == pytest.approx(0.7)
    assert (new["accuracy"]["low"], new["accuracy"]["high"]) == pytest.approx((0.7 - 0.248414, 0.7 + 0.248414))
    assert new["best_accuracy"]["mean"] == pytest.approx(0.71)
    # The reference ends at a mean loss of 2, which the new method has after three steps: (3 + 1) / 2.
    assert found["loss_targets"] == {"math": 2.0}
    assert (new["steps_to_loss"]["mean"], old["steps_to_loss"]["mean"]) == (3, 4)
    # The first step is warm-up: 1, 2, 3 are left.
    assert (new["grad_norm"], new["grad_norm_cv"]["mean"]) == (2.0, 0.5)
    assert (new["pareto"], old["pareto"]) == (True, False)
    assert found["data_order_equal"] is True
    assert found["cells"][0]["loss_curve"] == [[2, 5.5], [3, 2.0], [4, 1.0]]


def test_paired_tests(suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]) -> None:
    claims = {(c["metric"], c["dataset"]): c for c in summarise(suite, cells, records)["claims"]}
    accuracy = claims["accuracy", "math"]
    assert accuracy["difference"]["mean"] == pytest.approx((0.10 + 0.08 + 0.10) / 3, abs=1e-5)
    assert (accuracy["wins"], accuracy["losses"], accuracy["pairs"]) == (3, 0, 3)
    assert accuracy["p"] == pytest.approx(0.0051, abs=1e-4)
    assert verdict(accuracy) == "better"
    assert verdict(claims["steps_to_loss", "all"]) == "better"  # fewer
    assert verdict(claims["grad_norm_cv", "math"]) == "no difference shown"


def test_diverged_counts_as_zero_and_failed_is_named(
    suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]
) -> None:
    keys = [run.key for run in cells[0].finals(1.0)]
    records[keys[0]] = made("new", 60, status="diverged", error="the loss is nan")
    records[keys[1]] = {"status": "failed", "error": "out of <memory>", "method": "new", "dataset": "math"}
    found = complete(suite, cells, records)
    new = found["table"][0]
    assert new["accuracy"]["mean"] == pytest.approx((0 + 0.8) / 2)
    assert (new["diverged"], new["errors"], new["complete"]) == (1, ["out of <memory>"], False)
    assert new["reached"] == 0.5
    assert "new on math: out of <memory>" in render_markdown(found)
    assert "out of &lt;memory&gt;" in render_html(found)


def test_other_batches_are_told(suite: Suite, cells: list[Cell], records: dict[str, dict[str, Any]]) -> None:
    records[cells[0].finals(1.0)[0].key]["batches_sha256"] = "other"
    found = complete(suite, cells, records)
    assert found["data_order_equal"] is False
    assert "did not see the same batches" in render_markdown(found)


@pytest.mark.parametrize("kept", [0, 1, 2, 5])
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
    assert page.count("<svg") == 3  # accuracy; loss and gradient norm of one dataset
    assert "http" not in page.split("</style>")[1]  # nothing is fetched
    svg = accuracy_chart(found, ["new"])
    assert svg is not None
    labels = [t.text for t in ElementTree.fromstring(svg).iter("text") if t.get("class") == "label"]
    assert labels == ["new", "old"]


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


def test_the_paired_test_is_scipys() -> None:
    a, b = [0.8, 0.7, 0.9, 0.75, 0.85], [0.7, 0.72, 0.8, 0.7, 0.7]
    found = paired_test(a, b)
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (found.pairs, found.wins, found.losses) == (5, 4, 1)
    assert found.difference.mean == pytest.approx(0.076)


def test_paired_values_without_spread() -> None:
    same = paired_test([0.5, 0.6], [0.5, 0.6])
    shifted = paired_test([0.5, 0.75], [0.25, 0.5])
    single = paired_test([0.5], [0.4])
    assert same is not None
    assert (same.p, same.wins, same.losses) == (1.0, 0, 0)
    assert shifted is not None
    assert shifted.p == 0.0
    assert single is not None
    assert single.p is None
    assert paired_test([], []) is None


def test_holm_on_a_worked_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, None, 0.8]) == [1.0, None, 1.0]
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


def test_coefficient_of_variation() -> None:
    assert coefficient_of_variation([1.0, 3.0]) == pytest.approx(math.sqrt(2) / 2)
    assert coefficient_of_variation([2.0]) is None
    assert coefficient_of_variation([0.0, 0.0]) is None
