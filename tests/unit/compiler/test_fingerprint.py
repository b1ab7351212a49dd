"""What a resume point belongs to: where the base lies is no part of it, and the tokens are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soka_serve.compiler.keys import InputHashes, stage_keys
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.train.run import TrainingRun, fingerprint
from soka_serve.data.encode import EncodedExample
from soka_serve.manifest.schema import Manifest
from tests.support.training import make_examples


def run_on(folder: Path, base: dict[str, Any], method: str = "soka", **train: Any) -> TrainingRun:
    table = {"steps": 1, "data": {"builtin": "math"}, "method": method} | train
    manifest = Manifest.model_validate({"schema": 1, "base": base, "train": table})
    return TrainingRun(folder, manifest, METHODS[method], ["layer"], folder)


def test_where_the_base_lies_does_not_count(tmp_path: Path) -> None:
    rows = make_examples(4)
    one = fingerprint(run_on(tmp_path, {"path": "b1"}), rows, 1)
    assert fingerprint(run_on(tmp_path, {"path": "b2"}), rows, 1) == one
    assert fingerprint(run_on(tmp_path, {"hub": "owner/name", "revision": "1"}), rows, 1) == one
    assert fingerprint(run_on(tmp_path, {"path": "b1"}, precision="float32"), rows, 1) == one, "what 'auto' is here"
    for base, train in (
        ({"dtype": "bfloat16"}, {}),
        ({"quantize": "4bit"}, {}),
        ({}, {"precision": "bfloat16"}),
        ({}, {"learning_rate": 1.0}),
    ):
        assert fingerprint(run_on(tmp_path, {"path": "b1"} | base, **train), rows, 1) != one


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("soka", "method_rank"),
        ("soka", "method_scale"),
        ("full", "method_rank"),
        ("full", "method_scale"),
        ("lora", "sigma_lr"),
        ("pissa", "sigma_lr"),
    ],
)
def test_what_the_method_does_not_read_counts_neither_here_nor_in_keys(tmp_path: Path, method: str, key: str) -> None:
    """Where the key is the same, so is the folder, and a run goes on there."""
    runs = [run_on(tmp_path, {"builtin": "tiny"}, method, **more) for more in ({}, {key: 3})]
    inputs = InputHashes(base="b", config="c", tokenizer="t", data="d", finetuned={}, base_name="n", manifest="m")
    keys = [stage_keys(run.manifest, inputs, ["layer"]) for run in runs]
    assert keys[0] == keys[1]
    assert len({fingerprint(run, make_examples(4), 1) for run in runs}) == 1


def test_the_tokens_count(tmp_path: Path) -> None:
    rows, run = make_examples(4), run_on(tmp_path, {"path": "b"})
    first, *others = rows.examples
    changed = EncodedExample([*first.input_ids[:-1], 5], first.labels)
    masked = EncodedExample(first.input_ids, [-100, *first.labels[1:-1], -100])
    found = {fingerprint(run, replace(rows, examples=[one, *others]), 1) for one in (first, changed, masked)}
    assert len(found) == 3
    assert fingerprint(run, make_examples(4), 1) in found


def test_the_tokens_of_evaluations_count_where_there_are_any(tmp_path: Path) -> None:
    """They choose the weights that early stopping keeps."""
    rows, plain = make_examples(4), run_on(tmp_path, {"path": "b"})
    evaluated = run_on(tmp_path, {"path": "b"}, data={"builtin": "math"}, eval_every=1)
    others = make_examples(3, seed=1)
    assert fingerprint(plain, rows, 1, others) == fingerprint(plain, rows, 1)
    assert fingerprint(evaluated, rows, 1, others) != fingerprint(evaluated, rows, 1, rows)
    assert fingerprint(evaluated, rows, 1, rows) == fingerprint(evaluated, rows, 1, make_examples(4))
