"""The task files in the real lm-eval: gold answers, changed answers, prompts, token ids, and its own command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from soka_serve.adapter import write_adapter
from soka_serve.builtin import base_directory, generate
from soka_serve.builtin.answers import generate_answers, measure
from soka_serve.data import encode_examples, load_examples
from soka_serve.evaluation import prompts
from soka_serve.evaluation.sources import SUBJECTS
from soka_serve.evaluation.tasks import own_task_names, tasks_directory
from soka_serve.manifest import read_manifest
from soka_serve.tokenizer import TextTokenizer
from tests.e2e.serving import base_model, random_factors, with_delta

lm_eval = pytest.importorskip("lm_eval")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

pytestmark = [
    # Of lm-eval and of what it imports, not of ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SOKA_EVAL_MANIFEST", "SOKA_EVAL_DATA", "SOKA_ALLOW_CODE_EXECUTION"):
        monkeypatch.delenv(name, raising=False)
    prompts._trained_on.cache_clear()
    yield
    prompts._trained_on.cache_clear()


@pytest.fixture(scope="module")
def manager() -> Any:
    # Without lm-eval's own tasks, whose index takes seconds.
    return TaskManager(include_path=str(tasks_directory()), include_defaults=False)


class Scripted(LM):  # type: ignore[misc]
    """Answers what `answer` says for a document and the number of the sample."""

    def __init__(self, answer: Callable[[Mapping[str, Any], int], str]) -> None:
        super().__init__()
        self.answer = answer
        self.seen: dict[str, int] = {}
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            prompt, options = request.args
            number = self.seen.get(prompt, 0)
            self.seen[prompt] = number + 1
            self.prompts.append(prompt)
            text = self.answer(request.doc, number)
            for stop in options["until"]:
                text = text.partition(stop)[0]
            texts.append(text)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def evaluate(manager: Any, tasks: Sequence[str], answer: Callable[..., str], **more: Any) -> tuple[Any, Scripted]:
    model = Scripted(answer)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True, **more
    )
    return found, model


def metrics(found: Any, task: str) -> dict[str, float]:
    return {k: v for k, v in found["results"][task].items() if "," in k and "stderr" not in k}


def changed_digit(text: str) -> str:
    """The last digit of a text, one higher."""
    at = max(m.start() for m in re.finditer(r"\d", text))
    return f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"


# --------------------------------------------------------------------------------------------------------- GSM8K


@pytest.mark.slow  # six times 1319 answers
def test_gsm8k_gold_and_changed_answers(
    manager: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """The whole test set, by both filters; zero-shot prompts are the manifest's, few-shot ones the harness's."""
    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    both = ["soka_gsm8k", "soka_gsm8k_fewshot"]
    found, model = evaluate(manager, both, lambda doc, _: " " + doc["answer"])
    for task in both:
        assert metrics(found, task) == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}
        assert found["n-samples"][task] == {"original": 1319, "effective": 1319}
    question = json.loads((shared_data / "gsm8k_test.jsonl").read_text().splitlines()[0])["question"]
    assert model.prompts[0] == f"Question: {question}\nAnswer:"
    shots = next(p for p in model.prompts if p.count("\n\nQuestion:") == 5)
    assert shots.count("#### ") == 5
    # A digit of the final number changed: 0, since both readings take that number and no other.
    found, _ = evaluate(manager, both, lambda doc, _: " " + changed_digit(doc["answer"]))
    for task in both:
        assert metrics(found, task) == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.0}
    # The marker lost: strict finds nothing, flexible still reads the last number.
    found, _ = evaluate(manager, ["soka_gsm8k"], lambda doc, _: doc["answer"].replace("####", "The answer is:"))
    assert metrics(found, "soka_gsm8k") == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    # A base that goes on with a question of its own is stopped there.
    rambling = "\nQuestion: What is 2 + 2?\nAnswer: 4\n#### 4"
    found, _ = evaluate(manager, ["soka_gsm8k"], lambda doc, _: doc["answer"] + rambling)
    assert metrics(found, "soka_gsm8k") == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}


def test_gsm8k_fewshot_prompts_are_the_harness_own(
    manager: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch
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
    mine = manager.load(["soka_gsm8k_fewshot"])["tasks"]["soka_gsm8k_fewshot"]
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


def test_math_gold_equal_and_other_answers(manager: Any, math_data: Path) -> None:
    pytest.importorskip("math_verify")
    answers = {p: (equal, other) for _, p, _, equal, other in PROBLEMS}
    tasks = ["soka_math", "soka_math_500", "soka_math_500_fewshot"]
    gold, model = evaluate(manager, tasks, lambda doc, _: " " + doc["solution"])
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
    equal, _ = evaluate(manager, ["soka_math_500"], lambda doc, _: answers[doc["problem"]][0])
    # By text 0.5 is not 1/2 and "2, 1" is not "1,2".
    assert metrics(equal, "soka_math_500")["math_verify,none"] == 1.0
    assert metrics(equal, "soka_math_500")["exact_match,none"] == pytest.approx(4 / 6)
    other, _ = evaluate(manager, ["soka_math_500"], lambda doc, _: answers[doc["problem"]][1])
    assert metrics(other, "soka_math_500")["math_verify,none"] == 0.0
    one, _ = evaluate(manager, ["soka_math_500"], lambda doc, _: answers[doc["problem"]][doc["level"] != 1])
    assert metrics(one, "soka_math_500")["math_verify_level_1,none"] == 1.0
    assert metrics(one, "soka_math_500")["math_verify_level_5,none"] == 0.0


# ---------------------------------------------------------------------------------------------------------- MBPP


def run_mbpp(
    manager: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch, tasks: Sequence[str], answer: Callable[..., str]
) -> tuple[Any, Scripted]:
    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    monkeypatch.setenv("SOKA_ALLOW_CODE_EXECUTION", "1")
    return evaluate(manager, tasks, answer, confirm_run_unsafe_code=True)


def name_of(code: str) -> str:
    """The first function that a program defines."""
    return re.findall(r"def (\w+)", code)[0]


def answer_or_wrong(doc: Mapping[str, Any], number: int) -> str:
    """Right for even task ids."""
    return doc["code"] if doc["task_id"] % 2 == 0 else "def wrong():\n    pass"


@pytest.mark.slow  # 500 + 500 + 257 programs
def test_mbpp_gold_programs_pass(manager: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ["soka_mbpp", "soka_mbpp_fewshot", "soka_mbpp_sanitized"]
    found, model = run_mbpp(
        manager, shared_data, monkeypatch, tasks, lambda doc, _: f"Here:\n```python\n{doc['code']}\n```\nDone."
    )
    # In a fence with words around it: the zero-shot tasks read it, the few-shot one takes text as it stands.
    assert metrics(found, "soka_mbpp") == {"pass_at_1,sandbox": 1.0}
    assert metrics(found, "soka_mbpp_sanitized") == {"pass_at_1,sandbox": 1.0}
    assert metrics(found, "soka_mbpp_fewshot") == {"pass_at_1,sandbox": 0.0}
    assert [found["n-samples"][task]["effective"] for task in tasks] == [500, 500, 257]
    shot = next(p for p in model.prompts if p.count("[BEGIN]") == 4)
    assert shot.startswith("You are an expert Python programmer, and here is your task: Write a function to find the")
    assert shot.count("\n[DONE]") == 3
    assert shot.endswith("\n[BEGIN]\n")


def test_mbpp_scores_what_passes(manager: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soka_serve.evaluation.mbpp._TEST_IDS", range(11, 31))
    found, _ = run_mbpp(manager, shared_data, monkeypatch, ["soka_mbpp", "soka_mbpp_fewshot"], answer_or_wrong)
    assert metrics(found, "soka_mbpp") == metrics(found, "soka_mbpp_fewshot") == {"pass_at_1,sandbox": 0.5}
    reasons = {s["filtered_resps"][0][0]["reason"] for s in found["samples"]["soka_mbpp"]}
    assert any(reason.startswith("NameError") for reason in reasons)
    # An answer that says it equals everything.
    cheat = "class Yes:\n    def __eq__(self, other):\n        return True\n"
    found, _ = run_mbpp(
        manager,
        shared_data,
        monkeypatch,
        ["soka_mbpp"],
        lambda doc, _: cheat + f"def {name_of(doc['code'])}(*a):\n    return Yes()",
    )
    assert metrics(found, "soka_mbpp") == {"pass_at_1,sandbox": 0.0}


def test_mbpp_pass_at_10(manager: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 20 samples right: pass@1 is 1/20 and pass@10 is 1/2; the same text 20 times shows in `varied`."""
    monkeypatch.setattr("soka_serve.evaluation.mbpp._TEST_IDS", range(11, 14))
    task = ["soka_mbpp_pass_at_10"]

    def once(doc: Mapping[str, Any], number: int) -> str:
        return doc["code"] if number == 7 else "def wrong():\n    pass"

    found, _ = run_mbpp(manager, shared_data, monkeypatch, task, once)
    assert metrics(found, task[0]) == pytest.approx(
        {"pass_at_1,sandbox": 0.05, "pass_at_10,sandbox": 0.5, "varied,sandbox": 1.0}
    )
    found, _ = run_mbpp(manager, shared_data, monkeypatch, task, lambda doc, _: doc["code"])
    assert metrics(found, task[0])["varied,sandbox"] == 0.0


def test_mbpp_without_consent_generates_nothing(
    manager: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(doc: Mapping[str, Any], number: int) -> str:
        raise AssertionError("the model was asked")

    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    with pytest.raises(Exception, match="expected SOKA_ALLOW_CODE_EXECUTION = 1, got nothing"):
        evaluate(manager, ["soka_mbpp"], never, confirm_run_unsafe_code=True)
    monkeypatch.setenv("SOKA_ALLOW_CODE_EXECUTION", "1")
    with pytest.raises(ValueError, match="confirm_run_unsafe_code=True"):
        evaluate(manager, ["soka_mbpp"], never)


@pytest.mark.slow  # 974 + 427 programs
def test_every_gold_program_of_mbpp_passes_and_none_passes_changed_tests(shared_data: Path) -> None:
    """Both files whole. No gold program is broken: problem 533 hands over a type, three return a match object.

    Changed: every test negated. A program that passes its tests passes none of their opposites.
    """
    from soka_serve.evaluation.mbpp import program_of
    from soka_serve.sandbox import Program, run_programs

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


def test_builtin_gold_and_changed_answers(manager: Any) -> None:
    families = ("math", "boxed", "code")
    gold, _ = evaluate(manager, ["soka_builtin"], lambda doc, _: doc["completion"])
    assert {metrics(gold, f"soka_builtin_{f}")["accuracy,none"] for f in families} == {1.0}
    assert metrics(gold, "soka_builtin") == {"accuracy,none": 1.0}
    assert gold["n-samples"]["soka_builtin_math"]["effective"] == 500
    wrong, _ = evaluate(manager, ["soka_builtin"], lambda doc, _: changed_digit(doc["completion"]))
    # math and boxed end in the answer: always wrong. A changed constant in a function may not show in its three tests.
    assert metrics(wrong, "soka_builtin_math") == metrics(wrong, "soka_builtin_boxed") == {"accuracy,none": 0.0}
    from soka_serve.builtin import check_answer

    still = sum(check_answer(p, changed_digit(p.completion)) for p in generate("code", "test"))
    assert metrics(wrong, "soka_builtin_code")["accuracy,none"] == pytest.approx(still / 500)
    assert still < 250


# ---------------------------------------------------------------------------------------- the same tokens as training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """A manifest over GSM8K-shaped rows, and the ids that training gives the prompts of its evaluation rows."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"question": f"Tom has {n} apples.\n He buys {n} more. How many?", "answer": f"#### {2 * n}"} for n in (3, 4)
    ]
    for name in ("train.jsonl", "gsm8k_test.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.toml").write_text(
        'schema = 1\n[base]\nbuiltin = "tiny"\n[train]\nsteps = 1\n[train.data]\njsonl = "train.jsonl"\n'
        'prompt = "Question: {{ question }}\\nAnswer:"\ncompletion = " {{ answer }}"\n'
    )
    data = read_manifest(folder / "mine.toml").manifest.train.data
    examples = load_examples(data, manifest_dir=folder, part="train")
    tokenizer = TextTokenizer.from_directory(base_directory())
    encoded = encode_examples(examples, tokenizer, max_length=512, overlong="drop", completion_only=True)
    return str(folder / "mine.toml"), [
        [i for i, label in zip(e.input_ids, e.labels, strict=True) if label == -100] for e in encoded.examples
    ]


def test_hf_sends_the_ids_of_training(
    manager: Any, trained: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the model's forward, BOS and all."""
    from lm_eval.models.huggingface import HFLM

    manifest, expected = trained
    monkeypatch.setenv("SOKA_EVAL_MANIFEST", manifest)
    monkeypatch.setenv("SOKA_EVAL_DATA", str(Path(manifest).parent))
    model = HFLM(pretrained=str(base_directory()), dtype="float32", device="cpu", batch_size=1)
    sent: list[list[int]] = []
    own = model.model.generate

    def generate_and_note(*, input_ids: Any, **options: Any) -> Any:
        sent.append(input_ids[0].tolist())
        return own(input_ids=input_ids, **{**options, "max_length": input_ids.shape[1] + 2})

    monkeypatch.setattr(model.model, "generate", generate_and_note)
    lm_eval.simple_evaluate(model=model, tasks=["soka_gsm8k"], task_manager=manager, bootstrap_iters=0)
    assert sorted(sent) == sorted(expected)
    assert {ids[0] for ids in sent} == {TextTokenizer.from_directory(base_directory())._prefix[0]}


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_local_completions_sends_the_ids_of_training(
    manager: Any, trained: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch, add_bos_token: bool
) -> None:
    """With add_bos_token=True, which the docs ask for; without it BOS is missing, lm-eval's default."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    manifest, expected = trained
    monkeypatch.setenv("SOKA_EVAL_MANIFEST", manifest)
    monkeypatch.setenv("SOKA_EVAL_DATA", str(Path(manifest).parent))
    model = LocalCompletionsAPI(
        model="mine",
        base_url="http://127.0.0.1:9/v1/completions",
        tokenizer=str(base_directory()),
        tokenizer_backend="huggingface",
        add_bos_token=add_bos_token,
        max_length=1024,
    )
    sent: list[list[int]] = []

    def answer(messages: list[list[int]], **options: Any) -> dict[str, Any]:
        sent.extend(messages)
        return {"choices": [{"index": i, "text": " #### 6"} for i, _ in enumerate(messages)]}

    monkeypatch.setattr(model, "model_call", answer)
    lm_eval.simple_evaluate(model=model, tasks=["soka_gsm8k"], task_manager=manager, bootstrap_iters=0)
    assert (sorted(sent) == sorted(expected)) is add_bos_token
    assert sorted(sent) == sorted(ids if add_bos_token else ids[1:] for ids in expected)


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random adapter with an effect, and the model it makes."""
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    shapes = {f"model.layers.{i}.self_attn.q_proj": (16, 16, 8, 8) for i in range(4)}
    factors = random_factors(shapes, 2, 0, 0.05)
    write_adapter(folder, factors, base_model=str(base_directory()))
    return folder, with_delta(factors)


def installed(root: Path, folder: Path) -> dict[str, str]:
    """An environment in which this checkout is installed: its path, and its entry points as pip would write them."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    info = folder / "soka_serve-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: soka-serve\nVersion: 0\n")
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{folder}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command_line(options: Sequence[str], environment: Mapping[str, str], folder: Path) -> str:
    program = shutil.which("lm_eval", path=str(Path(sys.executable).parent)) or "lm_eval"
    done = subprocess.run(
        [program, "run", *options], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow  # lm-eval starts twice
def test_plain_lm_eval_with_an_adapter(root: Path, tmp_path: Path, adapter: tuple[Path, Any]) -> None:
    """`--model_args peft=`: score and answers are the adapter's, as `measure` finds them, and not the base's."""
    folder, tuned = adapter
    environment = installed(root, tmp_path)
    answers = {}
    for name, more in (("base", ""), ("adapter", f",peft={folder}")):
        out = tmp_path / name
        command_line(
            [
                *("--model", "hf", "--model_args", f"pretrained={base_directory()},dtype=float32{more}"),
                *("--include_path", "eval/tasks", "--tasks", "soka_builtin_math", "--limit", "24", "--device", "cpu"),
                *("--batch_size", "24", "--output_path", str(out), "--log_samples"),
            ],
            environment,
            root,
        )
        (samples,) = out.rglob("samples_soka_builtin_math_*.jsonl")
        (results,) = out.rglob("results_*.json")
        score = json.loads(results.read_text())["results"]["soka_builtin_math"]["accuracy,none"]
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        answers[name] = [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])]
        measured = measure(tuned if more else base_model(), "math", "test", 24)
        assert answers[name] == [sample.text for sample in measured.samples]
        assert score == measured.correct / measured.total
    assert answers["base"] != answers["adapter"]


def test_the_score_is_measures_score(manager: Any) -> None:
    """The same texts, judged by lm-eval's task and by `measure`'s own judge, for each family."""
    model = base_model()
    for family in ("math", "boxed", "code"):
        problems = generate(family, "test", 16)
        texts = dict(
            zip(
                [p.prompt for p in problems],
                generate_answers(model, base_directory(), [p.prompt for p in problems], 64),
                strict=True,
            )
        )
        # The base gets few right: every other answer is replaced by the gold one.
        for problem in problems[::2]:
            texts[problem.prompt] = problem.completion
        from soka_serve.builtin import check_answer

        expected = sum(check_answer(p, texts[p.prompt]) for p in problems) / 16
        found, _ = evaluate(manager, [f"soka_builtin_{family}"], lambda doc, _: texts[doc["prompt"]], limit=16)  # noqa: B023
        assert metrics(found, f"soka_builtin_{family}")["accuracy,none"] == expected
        assert 0.5 <= expected < 1


def test_every_task_file_loads(manager: Any) -> None:
    """All names are known to lm-eval, and every function that a file names is there."""
    from lm_eval.tasks._yaml_loader import load_yaml

    assert set(own_task_names()) == set(manager.all_tasks)
    for file in tasks_directory().glob("*/*.yaml"):
        load_yaml(file, resolve_func=True)
