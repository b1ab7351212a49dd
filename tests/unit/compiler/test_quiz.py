"""`[train] answered`: which problems evaluations ask, and how answers are marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import soka_serve
from soka_serve.base.model import load_base
from soka_serve.base.resolve import open_base
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import generate
from soka_serve.compiler import answers
from soka_serve.compiler.check import choose_questions
from soka_serve.compiler.quiz import make_quiz
from soka_serve.data.examples import DataReader
from soka_serve.errors import DataError, PlanError
from soka_serve.manifest.schema import Manifest
from tests.support.tiny_models import WithoutBos

UNMARKED = """\
schema = 1
base = { builtin = "tiny" }
[train]
steps = 2
eval_every = 1
early_stopping = 1
answered = 2
data = { jsonl = "eval.jsonl", eval_jsonl = "eval.jsonl" }
"""
TOKENIZER = open_base("tiny").tokenizer


def manifest(count: int | None, **data: Any) -> Manifest:
    judged = {"eval_every": 5, "early_stopping": 2, "answered": count} if count else {}
    train = {"steps": 10, "data": data or {"builtin": "math"}} | judged
    return Manifest.model_validate(
        {"schema": 1, "base": {"builtin": "tiny"}, "train": train, "eval": {"limit": 20, "max_new_tokens": 8}}
    )


def write(folder: Path, completions: list[str]) -> dict[str, str]:
    rows = [{"prompt": f"Question {n}", "completion": text} for n, text in enumerate(completions)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"jsonl": "eval.jsonl", "eval_jsonl": "eval.jsonl"}


def test_none_without_the_key(tmp_path: Path) -> None:
    assert make_quiz(manifest(None), tmp_path, TOKENIZER) is None


def test_built_in_problems_are_none_that_results_are_measured_on(tmp_path: Path) -> None:
    quiz = make_quiz(manifest(30), tmp_path, TOKENIZER)
    assert quiz is not None
    prompts = {problem.prompt for problem in quiz.problems}
    assert len(prompts) == 30
    assert not prompts & {problem.prompt for problem in generate("math", "test", 500)}


def test_built_in_problems_are_asked_as_they_are_trained_on(tmp_path: Path) -> None:
    """By evaluations during training, and by the quick check."""
    made = manifest(30, builtin="math", prompt="# {{ prompt }}\nReply:", completion=" {{ answer }}.")
    quiz, plain = make_quiz(made, tmp_path, TOKENIZER), make_quiz(manifest(30), tmp_path, TOKENIZER)
    questions = choose_questions(made, tmp_path, TOKENIZER)
    assert quiz is not None
    assert plain is not None
    assert questions is not None
    assert [p.prompt for p in quiz.problems] == [f"# {p.prompt}\nReply:" for p in plain.problems]
    assert [p.answer for p in quiz.problems] == [p.answer for p in plain.problems]
    examples = DataReader(made.train.datasets[0], tmp_path).examples("eval", limit=20)
    assert questions.prompts == [example.prompt for example in examples]
    assert questions.expected == [example.completion for example in examples]


def test_prompts_of_no_token_are_not_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tokenizer: Any = WithoutBos()
    data = write(tmp_path, ["#### 1", "#### 2"])
    texts = manifest(2, **data, prompt="{{ '' if completion == '#### 1' else prompt }}")
    questions = choose_questions(texts, tmp_path, tokenizer)
    assert questions is not None
    assert questions.prompts == ["Question 1"]
    assert "1 of 2 held-out prompts have no token" in caplog.text
    with pytest.raises(DataError, match="1 of 2 held-out prompts have no token"):
        make_quiz(texts, tmp_path, tokenizer)
    nothing = manifest(None, **data, prompt="")
    assert choose_questions(nothing, tmp_path, tokenizer) is None
    asked = choose_questions(nothing, tmp_path, TOKENIZER)  # whose BOS is something to go on from
    assert asked is not None
    assert asked.prompts == ["", ""]
    with pytest.raises(DataError, match=r"train\.data\.prompt: 20 of 20 held-out prompts have no token"):
        choose_questions(manifest(None, builtin="math", prompt=""), tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": "{{ prompt }}{{ question }}"}, "eval.jsonl:1: .*question"),
        ({"eval_jsonl": "m.toml"}, "m.toml:1:1: malformed JSON"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(tmp_path: Path, more: dict[str, str], message: str) -> None:
    rows = [{"prompt": "a", "question": "b", "completion": "c"}] * 4
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path, ["#### 1"])
    data = {"jsonl": "train.jsonl", "eval_jsonl": "eval.jsonl"} | more
    file = tmp_path / "m.toml"
    file.write_text(
        UNMARKED.split("eval_every")[0] + "".join(f"data.{key} = '{value}'\n" for key, value in data.items())
    )
    for command in (soka_serve.plan, soka_serve.build):
        with pytest.raises(DataError, match=message):
            command(file)
    assert not list((tmp_path / "build").glob("**/tune-*"))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_launches_that_shard_the_model_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert make_quiz(manifest(None), tmp_path, TOKENIZER) is None
    with pytest.raises(PlanError, match=r"train\.answered does not go with (FSDP|DeepSpeed)"):
        make_quiz(manifest(3), tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("completions", "family", "found"),
    [
        ([" 2 + 2 = 4 #### 4", " so #### 1,000", " #### -3"], "math", ["4", "1000"]),
        ([r" \boxed{\frac{1}{2}}", r" it is \boxed{x}", r" \boxed{3}"], "boxed", [r"\frac{1}{2}", "x"]),
    ],
)
def test_data_of_ones_own_is_marked(tmp_path: Path, completions: list[str], family: str, found: list[str]) -> None:
    quiz = make_quiz(manifest(2, **write(tmp_path, completions)), tmp_path, TOKENIZER)
    assert quiz is not None
    assert [(p.family, p.answer) for p in quiz.problems] == [(family, answer) for answer in found]


def test_answers_that_cannot_be_marked_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path, [" #### 4", " four"])
    with pytest.raises(DataError, match=r"of 2 evaluation examples not every one has its answer after ####"):
        make_quiz(manifest(2, **data), tmp_path, TOKENIZER)


def test_data_that_cannot_be_marked_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    write(tmp_path, [" four"] * 4)
    (tmp_path / "m.toml").write_text(UNMARKED)
    with pytest.raises(DataError, match="not every one has its answer"):
        soka_serve.build(tmp_path / "m.toml", out=tmp_path / "build", progress=False)
    assert not list(tmp_path.rglob("init-*"))


def test_fewer_examples_than_are_asked_for_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quiz = make_quiz(manifest(5, **write(tmp_path, [" #### 4", " #### 5"])), tmp_path, TOKENIZER)
    assert quiz is not None
    assert len(quiz.problems) == 2
    assert "train.answered = 5: there are only 2 evaluation examples" in caplog.text


def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiz = make_quiz(manifest(4, **write(tmp_path, [" #### 4", " #### 5", " #### 6", " #### 7"])), tmp_path, TOKENIZER)
    assert quiz is not None
    texts = [" I say #### 4", " #### 5.0", " 6", " #### 8"]
    monkeypatch.setattr(answers, "generate_answers", lambda *given, **named: texts)
    assert quiz.accuracy(None) == 0.5


def test_the_embedded_model_answers(tmp_path: Path) -> None:
    quiz = make_quiz(manifest(3), tmp_path, TOKENIZER)
    assert quiz is not None
    model = load_base(base_directory(), "float32")
    model.config.use_cache = False  # as training leaves it
    model.train()
    assert quiz.accuracy(model) in (0, 1 / 3, 2 / 3, 1)
    assert model.training
