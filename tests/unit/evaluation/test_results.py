"""Scores out of lm-eval's results, tables, thresholds; what `soka-serve eval` refuses before anything runs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from soka_serve.cli import main
from soka_serve.errors import EvalError
from soka_serve.evaluation import backends
from soka_serve.evaluation.results import Score, Threshold, check_thresholds, collect, missed, table


def _part(scores: dict[str, dict[str, Any]], problems: dict[str, int]) -> dict[str, Any]:
    return {"results": scores, "problems": problems}


@pytest.fixture
def parts() -> dict[tuple[str, str], dict[str, Any]]:
    def group(algebra: float, geometry: float) -> dict[str, Any]:
        scores = {
            "maths": {
                "exact_match,none": (3 * algebra + geometry) / 4,
                "exact_match_stderr,none": 0.1,
                "alias": "maths",
            },
            "algebra": {"exact_match,none": algebra, "exact_match_stderr,none": "N/A", "sample_len": 30},
            "geometry": {"exact_match,none": geometry, "sample_len": 10},
        }
        return _part(dict(reversed(scores.items())), {"algebra": 30, "geometry": 10})

    single = {"sums": {"strict,first": 0.25, "strict_stderr,first": 0.05, "loose,first": 0.5, "alias": "sums"}}
    better = {"sums": {"strict,first": 0.75, "strict_stderr,first": 0.04, "loose,first": 0.5, "alias": "sums"}}
    return {
        ("base", "maths"): group(0.0, 0.2),
        ("result", "maths"): group(0.4, 0.8),
        ("base", "sums"): _part(single, {"sums": 80}),
        ("result", "sums"): _part(better, {"sums": 80}),
    }


def test_scores_name_the_task_asked_for_first_and_count_problems(parts: dict[tuple[str, str], Any]) -> None:
    scores = collect(parts, ["maths", "sums"])
    assert [(s.task, s.metric, s.problems) for s in scores] == [
        ("maths", "exact_match,none", 40),
        ("geometry", "exact_match,none", 10),
        ("algebra", "exact_match,none", 30),
        ("sums", "strict,first", 80),
        ("sums", "loose,first", 80),
    ]
    assert (scores[0].base, scores[0].result) == pytest.approx((0.05, 0.5))
    assert scores[3] == Score("sums", "strict,first", 80, 0.25, 0.75, 0.05, 0.04)
    assert scores[2].result_stderr is None


def test_the_table_has_both_models_and_their_difference(parts: dict[tuple[str, str], Any]) -> None:
    lines = table(collect(parts, ["sums"]), "mine").splitlines()
    assert lines[0] == "| task | metric | problems | base | mine | difference |"
    assert lines[2] == "| sums | strict,first | 80 | 0.2500 ± 0.0500 | 0.7500 ± 0.0400 | +0.5000 |"
    assert lines[3] == "| sums | loose,first | 80 | 0.5000 | 0.5000 | +0.0000 |"


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        (["0.5"], []),
        (["0.51"], ["maths"]),
        (["sums=0.75"], []),
        (["sums=0.7501"], ["sums"]),
        (["0.9"], ["maths", "sums"]),
        (["maths=0.6", "sums=0.1"], ["maths"]),
    ],
)
def test_thresholds_are_held_against_the_first_metric(
    parts: dict[tuple[str, str], Any], given: list[str], tasks: list[str]
) -> None:
    lines = missed(collect(parts, ["maths", "sums"]), ["maths", "sums"], [Threshold.parse(text) for text in given])
    assert [line.split(":")[0] for line in lines] == tasks


def test_a_score_that_is_no_number_reaches_nothing() -> None:
    score = Score("sums", "strict,first", 1, 0.0, math.nan, None, None)
    assert len(missed([score], ["sums"], [Threshold(None, 0.0)])) == 1


@pytest.mark.parametrize("text", ["", "half", "sums=", "=0.5", "sums=half"])
def test_a_threshold_must_be_a_number(text: str) -> None:
    with pytest.raises(EvalError, match="--fail-under"):
        Threshold.parse(text)


def test_a_threshold_must_be_of_a_task_that_is_run() -> None:
    check_thresholds([Threshold("sums", 1), Threshold(None, 1)], ["sums"])
    with pytest.raises(EvalError, match="soms"):
        check_thresholds([Threshold("soms", 1)], ["sums"])


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port", "http://127.0.0.1:99999", "http://[::1", "ftp://x", "", "http://x/y"]
)
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(EvalError, match=f"--server {re.escape(url)}: expected an address"):
        backends.parse_address(url)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.toml"], ["nowhere.toml"]),
        (["gsm8k.toml", "--tasks", "soka_gsm8k"], ["not built", "soka-serve build"]),
        (["math.toml"], ["not built", "soka-serve build"]),
        (["math.toml", "--tasks", "soka_mbpp"], ["soka_mbpp", "--allow-code-execution"]),
        pytest.param(["math.toml", "--tasks", "soka_gsm9k"], ["soka_gsm9k", "no such task"], marks=pytest.mark.slow),
        (["math.toml", "--limit", "0"], ["limit"]),
        (["math.toml", "--fail-under", "most"], ["--fail-under most"]),
        (["math.toml", "--fail-under", "other=1"], ["other", "soka_builtin_math"]),
        (["math.toml", "--backend", "transformers", "--server", "http://127.0.0.1:1"], ["running server"]),
        (["math.toml", "--server", "http://127.0.0.1:1", "--", "--enforce-eager"], ["running server"]),
    ],
)
def test_what_is_refused_before_anything_runs(
    arguments: list[str], words: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOKA_ALLOW_CODE_EXECUTION", raising=False)
    manifest, *others = arguments
    done = CliRunner().invoke(main, ["eval", str(root / "manifests" / manifest), *others])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_without_a_task_says_where_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"a": "x", "b": "y"}\n')
    (tmp_path / "mine.toml").write_text(
        'schema = 1\n[base]\nbuiltin = "tiny"\n[train]\nsteps = 1\n'
        '[train.data]\njsonl = "data.jsonl"\nprompt = "{{ a }}"\ncompletion = "{{ b }}"\n'
    )
    done = CliRunner().invoke(main, ["eval", "mine.toml"])
    assert done.exit_code == 2, done.output
    assert "mine.toml: no task to run" in done.output
    assert "--tasks" in done.output
