"""lm-eval's models and command line with the task files: the token ids of training, the adapter at work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from soka_serve.adapter import write_adapter
from soka_serve.builtin import base_directory, generate
from soka_serve.builtin.answers import generate_answers, measure
from soka_serve.data import encode_examples, load_examples
from soka_serve.evaluation import prompts
from soka_serve.evaluation.tasks import own_task_names, tasks_directory
from soka_serve.manifest import read_manifest
from soka_serve.tokenizer import TextTokenizer
from tests.e2e.scripted import evaluate, metrics
from tests.e2e.serving import base_model, random_factors, with_delta

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
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
