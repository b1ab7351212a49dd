"""What a comparison measures by is never trained on, and its losses are the model's own, example by example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from soka_serve.base.base import Base
from soka_serve.base.model import load_base
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import generate
from soka_serve.comparison.held_out import HeldOutReader, without
from soka_serve.comparison.plan import RunSpec
from soka_serve.comparison.read import read_suite
from soka_serve.comparison.run import answer_losses, measure_run
from soka_serve.comparison.suite import DataSet, Other, Protocol
from soka_serve.data.collate import PadCollator
from soka_serve.data.encode import EncodedSet
from soka_serve.errors import DataError
from tests.support.tiny_models import WithoutBos

SPLIT = """
schema = 1
name = "s"
[base]
builtin = "tiny"
[train]
steps = 1
batch_size = 2
[protocol]
test = 3
validation = 3
[[dataset]]
name = "own"
answers = "hashes"
data = { jsonl = "all.jsonl", eval_frac = 0.25 }
[[method]]
name = "lora"
method = "lora"
grid = { learning_rate = [1e-3] }
"""


def write(path: Path, questions: list[str]) -> None:
    path.write_text(
        "".join(json.dumps({"prompt": q, "completion": f" so\n#### {i}"}) + "\n" for i, q in enumerate(questions))
    )


@pytest.fixture
def reader(tmp_path: Path) -> HeldOutReader:
    write(tmp_path / "train.jsonl", [f"Train {i}" for i in range(6)])
    write(tmp_path / "test.jsonl", ["Long " * 60, *(f"Test {i}" for i in range(5))])
    return HeldOutReader(Protocol(test=3, validation=2), tmp_path, Base(base_directory()).tokenizer, 64)


def dataset(**others: Any) -> DataSet:
    data = {"jsonl": "train.jsonl", "eval_jsonl": "test.jsonl"}
    return DataSet.model_validate({"name": "own", "data": data, "answers": "hashes"} | others)


def trained(reader: HeldOutReader) -> EncodedSet:
    rows = reader.other(Other.model_validate({"name": "all", "data": {"jsonl": "train.jsonl"}}))
    return EncodedSet(rows, len(rows), 0, 0)


def test_test_problems_come_first_of_those_that_fit_then_validation(reader: HeldOutReader) -> None:
    test, validation = reader.problems(dataset())
    assert [p.prompt for p in test.problems] == ["Test 0", "Test 1", "Test 2"]
    assert [p.prompt for p in validation.problems] == ["Test 3", "Test 4"]
    assert [p.answer for p in test.problems] == ["1", "2", "3"]
    assert len(without(trained(reader), dataset(), test, validation).examples) == 6


def test_validation_from_the_training_data_is_not_trained_on(reader: HeldOutReader) -> None:
    own = dataset(validation="train")
    test, validation = reader.problems(own)
    assert [p.prompt for p in validation.problems] == ["Train 4", "Train 5"]
    kept = without(trained(reader), own, test, validation).examples
    assert len(kept) == 4
    assert not {tuple(e.input_ids) for e in kept} & {tuple(e.input_ids) for e in validation.encoded}


def test_what_would_measure_what_was_seen_is_refused(reader: HeldOutReader, tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", ["Test 0", "Test 1", "Test 2", "Test 1", "Test 3"])
    with pytest.raises(DataError, match="1 validation problems have the prompt of a test problem"):
        reader.problems(dataset())
    write(tmp_path / "test.jsonl", [f"Train {i}" for i in range(5)])
    for own, leaked in ((dataset(), 5), (dataset(validation="train"), 3)):
        with pytest.raises(DataError, match=f"{leaked} training examples are held-out problems too"):
            without(trained(reader), own, *reader.problems(own))


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (["Test 0", "Long " * 60, "Test 1"], r"2 test problems have at most train.max_length = 64 .*asks for 3"),
        (["a", "b", "c", "d"], "1 validation problems have at most"),
    ],
)
def test_too_few_problems_are_told(reader: HeldOutReader, tmp_path: Path, questions: list[str], message: str) -> None:
    write(tmp_path / "test.jsonl", questions)
    with pytest.raises(DataError, match=message):
        reader.problems(dataset())


def test_what_eval_frac_holds_out_is_the_same_for_every_seed(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [f"Question {i}" for i in range(24)])
    (tmp_path / "s.toml").write_text(SPLIT)
    spec = RunSpec("lora", "own", "sweep", (("learning_rate", 1e-3),), 100, "key")
    assert measure_run(read_suite(tmp_path / "s.toml"), spec, tmp_path)["status"] == "done"


def test_an_answer_of_another_kind_is_told(reader: HeldOutReader) -> None:
    with pytest.raises(DataError, match="evaluation example 0 has no answer of the kind 'boxed'"):
        reader.problems(dataset(answers="boxed"))


@pytest.mark.parametrize("family", ["math", "boxed", "code"])
def test_fresh_test_problems_are_none_of_those_that_were_looked_at(tmp_path: Path, family: str) -> None:
    tokenizer = Base(base_directory()).tokenizer
    reader = HeldOutReader(Protocol(test=200, validation=200), tmp_path, tokenizer, 128)
    own = DataSet.model_validate({"name": family, "data": {"builtin": family}, "test_seed": 2})
    test, validation = reader.problems(own)
    looked_at = [problem.prompt for problem in generate(family, "test", 500)]
    assert not {problem.prompt for problem in test.problems} & set(looked_at)
    assert [problem.prompt for problem in validation.problems] == looked_at[:200]


def test_built_in_problems_are_asked_as_they_are_trained_on(tmp_path: Path) -> None:
    data = {"builtin": "math", "prompt": "# {{ prompt }}", "completion": " {{ answer }}."}
    own = DataSet.model_validate({"name": "math", "data": data})
    tokenizer = Base(base_directory()).tokenizer
    test, _ = HeldOutReader(Protocol(test=2, validation=2), tmp_path, tokenizer, 128).problems(own)
    problems = generate("math", "test", 2)
    assert [p.prompt for p in test.problems] == [f"# {p.prompt}" for p in problems]
    assert [tokenizer.decode(e.input_ids).removeprefix("<s>").removesuffix("</s>") for e in test.encoded] == [
        f"# {p.prompt} {p.answer}." for p in problems
    ]


def test_built_in_problems_must_fit(tmp_path: Path) -> None:
    own = DataSet.model_validate({"name": "math", "data": {"builtin": "math"}})
    tokenizer = Base(base_directory()).tokenizer
    with pytest.raises(DataError, match="held-out problems are longer than"):
        HeldOutReader(Protocol(test=2, validation=2), tmp_path, tokenizer, 8).problems(own)


def test_prompts_without_any_token_are_refused_where_answers_are_asked(tmp_path: Path) -> None:
    """A base that puts nothing before a text has nothing to go on from, and would fail after each run's training."""
    tokenizer: Any = WithoutBos()
    write(tmp_path / "test.jsonl", [f"Test {i}" for i in range(4)])
    built = {"name": "math", "data": {"builtin": "math", "prompt": ""}}
    own = {
        "name": "own",
        "answers": "hashes",
        "data": {"jsonl": "test.jsonl", "eval_jsonl": "test.jsonl", "prompt": ""},
    }
    for table in (built, own):
        data = DataSet.model_validate(table)
        asked = HeldOutReader(Protocol(test=1, validation=1), tmp_path, tokenizer, 128)
        with pytest.raises(DataError, match=rf"dataset '{data.name}': 1 of 1 held-out prompts have no token"):
            asked.problems(data)
    losses = Protocol(test=1, validation=1, answered=0)
    assert HeldOutReader(losses, tmp_path, tokenizer, 128).problems(DataSet.model_validate(built))


def test_losses_are_those_of_each_example_alone(reader: HeldOutReader) -> None:
    model = load_base(base_directory(), "float32").train()
    test, _ = reader.problems(dataset())
    examples = [*test.encoded, *trained(reader).examples]
    found = answer_losses(model, examples, PadCollator(0))
    assert model.training
    for example, loss in zip(examples, found, strict=True):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        assert loss == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
