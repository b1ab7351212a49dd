"""The task files in the real lm-eval: gold answers, changed answers, prompts."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from soka_serve.builtin.tasks import generate
from soka_serve.evaluation.sources import SUBJECTS
from soka_serve.evaluation.tasks import tasks_directory
from tests.support.scripted import OF_LM_EVAL, ScriptedModel, changed_digit, evaluate, lm_eval, metrics

pytestmark = [pytest.mark.usefixtures("plain_evaluation"), *OF_LM_EVAL]


# --------------------------------------------------------------------------------------------------------- GSM8K


@pytest.mark.slow  # six times 1319 answers
def test_gsm8k_gold_and_changed_answers(
    lm_tasks: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """The whole test set, by both filters; zero-shot prompts are the manifest's, few-shot ones the harness's."""
    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    both = ["soka_gsm8k", "soka_gsm8k_fewshot"]
    found, model = evaluate(lm_tasks, both, lambda doc, _: " " + doc["answer"])
    for task in both:
        assert metrics(found, task) == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}
        assert found["n-samples"][task] == {"original": 1319, "effective": 1319}
    question = json.loads((shared_data / "gsm8k_test.jsonl").read_text().splitlines()[0])["question"]
    assert model.prompts[0] == f"Question: {question}\nAnswer:"
    shots = next(p for p in model.prompts if p.count("\n\nQuestion:") == 5)
    assert shots.count("#### ") == 5
    # A digit of the final number changed: 0, since both readings take that number and no other.
    found, _ = evaluate(lm_tasks, both, lambda doc, _: " " + changed_digit(doc["answer"]))
    for task in both:
        assert metrics(found, task) == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.0}
    # The marker lost: strict finds nothing, flexible still reads the last number.
    found, _ = evaluate(lm_tasks, ["soka_gsm8k"], lambda doc, _: doc["answer"].replace("####", "The answer is:"))
    assert metrics(found, "soka_gsm8k") == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    # A base that goes on with a question of its own is stopped there.
    rambling = "\nQuestion: What is 2 + 2?\nAnswer: 4\n#### 4"
    found, _ = evaluate(lm_tasks, ["soka_gsm8k"], lambda doc, _: doc["answer"] + rambling)
    assert metrics(found, "soka_gsm8k") == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}


def test_gsm8k_fewshot_prompts_are_the_harness_own(
    lm_tasks: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against lm-eval's own gsm8k.yaml on the same rows."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    harness = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml")
    ours = load_yaml(tasks_directory() / "gsm8k" / "soka_gsm8k_fewshot.yaml")
    for key in ("doc_to_text", "doc_to_target", "metric_list", "filter_list", "generation_kwargs", "num_fewshot"):
        assert ours[key] == harness[key]
    for key in ("tag", "dataset_path", "dataset_name"):
        harness.pop(key)
    theirs = ConfigurableTask(config={**harness, "custom_dataset": ours["custom_dataset"], "metadata": {}})
    mine = lm_tasks.load(["soka_gsm8k_fewshot"])["tasks"]["soka_gsm8k_fewshot"]
    for task in (theirs, mine):
        task.set_fewshot_seed(1234)
    docs = list(mine.test_docs())[:3]
    assert [theirs.fewshot_context(d, 5) for d in docs] == [mine.fewshot_context(d, 5) for d in docs]


# ---------------------------------------------------------------------------------------------------------- MATH

PROBLEMS = [
    ("Level 1", "What is half of $1$?", r"Half of it is $\boxed{\frac{1}{2}}$.", r"$\boxed{0.5}$", r"$\boxed{0.4}$"),
    ("Level 1", "Which way?", r"He goes $\boxed{\text{east}}$.", r"\boxed{east}", r"\boxed{west}"),
    ("Level 2", "Find the domain.", r"It is $\boxed{[2,5)}$.", "The answer is: $[2, 5)$", r"\boxed{(2,5)}"),
    ("Level 3", "Which angle?", r"It is $\boxed{45^\circ}$.", r"\boxed{45}", r"\boxed{54^\circ}"),
    (
        "Level 5",
        "Which matrix?",
        r"So $\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}$.",
        r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
        r"\boxed{\begin{pmatrix}1&2\\4&3\end{pmatrix}}",
    ),
    ("Level ?", "Which solutions?", r"They are $\boxed{1,2}$.", r"\boxed{2, 1}", r"\boxed{1,3}"),
]


@pytest.fixture
def math_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"level": lv, "problem": p, "solution": s, "type": "Algebra"} for lv, p, s, _, _ in PROBLEMS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in [f"math_{subject}" for subject in SUBJECTS] + ["math_500"]:
        # Questions differ between subjects, as the scripted model is asked by them.
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.setenv("SOKA_EVAL_DATA", str(tmp_path))
    return tmp_path


def test_math_gold_equal_and_other_answers(lm_tasks: Any, math_data: Path) -> None:
    pytest.importorskip("math_verify")
    answers = {p: (equal, other) for _, p, _, equal, other in PROBLEMS}
    tasks = ["soka_math", "soka_math_500", "soka_math_500_fewshot"]
    gold, model = evaluate(lm_tasks, tasks, lambda doc, _: " " + doc["solution"])
    levels = {f"math_verify_level_{n},none": 1.0 for n in (1, 2, 3, 5)}
    for task in ("soka_math_algebra", "soka_math_500", "soka_math_500_fewshot"):
        found = metrics(gold, task)
        # No problem of level 4: not a number, rather than 0.
        assert str(found.pop("math_verify_level_4,none")) == "nan"
        assert found == {"exact_match,none": 1.0, "math_verify,none": 1.0, **levels}
    assert metrics(gold, "soka_math") == {"exact_match,none": 1.0, "math_verify,none": 1.0}
    assert len(gold["group_subtasks"]["soka_math"]) == 7
    assert model.prompts[0].endswith("### Instruction:\nWhat is half of $1$?\n\n### Response:")
    shot = next(p for p in model.prompts if p.startswith("Problem:\n"))
    assert shot.count("Problem:\n") == 5
    assert shot.endswith("Problem:\nWhat is half of $1$?\n\nSolution:")
    equal, _ = evaluate(lm_tasks, ["soka_math_500"], lambda doc, _: answers[doc["problem"]][0])
    # By text 0.5 is not 1/2 and "2, 1" is not "1,2".
    assert metrics(equal, "soka_math_500")["math_verify,none"] == 1.0
    assert metrics(equal, "soka_math_500")["exact_match,none"] == pytest.approx(4 / 6)
    other, _ = evaluate(lm_tasks, ["soka_math_500"], lambda doc, _: answers[doc["problem"]][1])
    assert metrics(other, "soka_math_500")["math_verify,none"] == 0.0
    one, _ = evaluate(lm_tasks, ["soka_math_500"], lambda doc, _: answers[doc["problem"]][doc["level_number"] != 1])
    assert metrics(one, "soka_math_500")["math_verify_level_1,none"] == 1.0
    assert metrics(one, "soka_math_500")["math_verify_level_5,none"] == 0.0


# ---------------------------------------------------------------------------------------------------------- MBPP


def run_mbpp(
    lm_tasks: Any,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    tasks: Sequence[str],
    answer: Callable[..., str],
) -> tuple[Any, ScriptedModel]:
    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    monkeypatch.setenv("SOKA_ALLOW_CODE_EXECUTION", "1")
    return evaluate(lm_tasks, tasks, answer, confirm_run_unsafe_code=True)


def name_of(code: str) -> str:
    """The first function that a program defines."""
    return re.findall(r"def (\w+)", code)[0]


def answer_or_wrong(doc: Mapping[str, Any], number: int) -> str:
    """Right for even task ids."""
    return doc["code"] if doc["task_id"] % 2 == 0 else "def wrong():\n    pass"


@pytest.mark.slow
def test_mbpp_gold_programs_pass(lm_tasks: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through lm-eval a hundred of them; the next but two has all."""
    monkeypatch.setattr("soka_serve.evaluation.mbpp._TEST_IDS", range(11, 111))
    tasks = ["soka_mbpp", "soka_mbpp_fewshot", "soka_mbpp_sanitized"]
    found, model = run_mbpp(
        lm_tasks, shared_data, monkeypatch, tasks, lambda doc, _: f"Here:\n```python\n{doc['code']}\n```\nDone."
    )
    # In a fence with words around it: the zero-shot tasks read it, the few-shot one takes text as it stands.
    assert metrics(found, "soka_mbpp") == {"pass_at_1,sandbox": 1.0}
    assert metrics(found, "soka_mbpp_sanitized") == {"pass_at_1,sandbox": 1.0}
    assert metrics(found, "soka_mbpp_fewshot") == {"pass_at_1,sandbox": 0.0}
    assert [found["n-samples"][task]["effective"] for task in tasks] == [100, 100, 56]
    shot = next(p for p in model.prompts if p.count("[BEGIN]") == 4)
    assert shot.startswith("You are an expert Python programmer, and here is your task: Write a function to find the")
    assert shot.count("\n[DONE]") == 3
    assert shot.endswith("\n[BEGIN]\n")


def test_mbpp_scores_what_passes(lm_tasks: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soka_serve.evaluation.mbpp._TEST_IDS", range(11, 31))
    found, _ = run_mbpp(lm_tasks, shared_data, monkeypatch, ["soka_mbpp", "soka_mbpp_fewshot"], answer_or_wrong)
    assert metrics(found, "soka_mbpp") == metrics(found, "soka_mbpp_fewshot") == {"pass_at_1,sandbox": 0.5}
    reasons = {s["filtered_resps"][0][0]["reason"] for s in found["samples"]["soka_mbpp"]}
    assert any(reason.startswith("NameError") for reason in reasons)
    # An answer that says it equals everything.
    cheat = "class Yes:\n    def __eq__(self, other):\n        return True\n"
    found, _ = run_mbpp(
        lm_tasks,
        shared_data,
        monkeypatch,
        ["soka_mbpp"],
        lambda doc, _: cheat + f"def {name_of(doc['code'])}(*a):\n    return Yes()",
    )
    assert metrics(found, "soka_mbpp") == {"pass_at_1,sandbox": 0.0}


def test_mbpp_pass_at_10(lm_tasks: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 20 samples right: pass@1 is 1/20 and pass@10 is 1/2; the same text 20 times shows in `varied`."""
    monkeypatch.setattr("soka_serve.evaluation.mbpp._TEST_IDS", range(11, 14))
    task = ["soka_mbpp_pass_at_10"]

    def once(doc: Mapping[str, Any], number: int) -> str:
        return doc["code"] if number == 7 else "def wrong():\n    pass"

    found, _ = run_mbpp(lm_tasks, shared_data, monkeypatch, task, once)
    assert metrics(found, task[0]) == pytest.approx(
        {"pass_at_1,sandbox": 0.05, "pass_at_10,sandbox": 0.5, "varied,sandbox": 1.0}
    )
    found, _ = run_mbpp(lm_tasks, shared_data, monkeypatch, task, lambda doc, _: doc["code"])
    assert metrics(found, task[0])["varied,sandbox"] == 0.0


def test_mbpp_without_consent_generates_nothing(
    lm_tasks: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(doc: Mapping[str, Any], number: int) -> str:
        raise AssertionError("the model was asked")

    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    with pytest.raises(Exception, match="expected SOKA_ALLOW_CODE_EXECUTION = 1, got nothing"):
        evaluate(lm_tasks, ["soka_mbpp"], never, confirm_run_unsafe_code=True)
    monkeypatch.setenv("SOKA_ALLOW_CODE_EXECUTION", "1")
    with pytest.raises(ValueError, match="confirm_run_unsafe_code=True"):
        evaluate(lm_tasks, ["soka_mbpp"], never)


@pytest.mark.slow  # 974 + 427 programs
def test_every_gold_program_of_mbpp_passes_and_none_passes_changed_tests(shared_data: Path) -> None:
    """Both files whole. No gold program is broken: problem 533 hands over a type, three return a match object.

    Changed: every test negated. A program that passes its tests passes none of their opposites.
    """
    from soka_serve.evaluation.mbpp import program_of
    from soka_serve.evaluation.sandbox import Program, run_programs

    for file, total in (("mbpp.jsonl", 974), ("sanitized-mbpp.jsonl", 427)):
        docs = [json.loads(line) for line in (shared_data / file).read_text().splitlines()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of the dataset's programs
            programs = [program_of(doc, doc["code"]) for doc in docs]
        verdicts = run_programs(programs, allow_code_execution=True)
        assert [(d["task_id"], v.reason) for d, v in zip(docs, verdicts, strict=True) if not v.passed] == []
        assert len(verdicts) == total
        if file == "mbpp.jsonl":
            opposite = [
                Program(p.code, (f"assert not ({p.tests[0].strip().removeprefix('assert')})",), p.setup, p.names)
                for p in programs
            ]
            assert not any(v.passed for v in run_programs(opposite, allow_code_execution=True))


# ----------------------------------------------------------------------------------------- the embedded families


def test_builtin_gold_and_changed_answers(lm_tasks: Any) -> None:
    families = ("math", "boxed", "code")
    gold, _ = evaluate(lm_tasks, ["soka_builtin"], lambda doc, _: doc["completion"])
    assert {metrics(gold, f"soka_builtin_{f}")["accuracy,none"] for f in families} == {1.0}
    assert metrics(gold, "soka_builtin") == {"accuracy,none": 1.0}
    assert gold["n-samples"]["soka_builtin_math"]["effective"] == 500
    wrong, _ = evaluate(lm_tasks, ["soka_builtin"], lambda doc, _: changed_digit(doc["completion"]))
    # math and boxed end in the answer: always wrong. A changed constant in a function may not show in its three tests.
    assert metrics(wrong, "soka_builtin_math") == metrics(wrong, "soka_builtin_boxed") == {"accuracy,none": 0.0}
    from soka_serve.builtin.tasks import check_answer

    still = sum(check_answer(p, changed_digit(p.completion)) for p in generate("code", "test"))
    assert metrics(wrong, "soka_builtin_code")["accuracy,none"] == pytest.approx(still / 500)
    assert still < 250
