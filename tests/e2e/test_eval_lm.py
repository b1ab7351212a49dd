"""lm-eval's models and command line with the task files: the token ids of training, the adapter at work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest

from soka_serve.adapter.format import write_adapter
from soka_serve.base.base import Base
from soka_serve.base.folder import ModelFolder
from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import generate
from soka_serve.compiler.answers import generate_answers, measure
from soka_serve.data.encode import MASKED, encode_examples
from soka_serve.data.examples import DataReader
from soka_serve.evaluation.tasks import own_task_names, tasks_directory
from soka_serve.manifest.read import read_manifest
from tests.support.scripted import OF_LM_EVAL, evaluate, metrics, simple_evaluate
from tests.support.serving import ONE_PROCESS, base_model, random_factors, with_delta

pytestmark = [pytest.mark.usefixtures("plain_evaluation"), *OF_LM_EVAL]


# ---------------------------------------------------------------------------------------- the same tokens as training

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class TrainedManifest(NamedTuple):
    """A manifest over GSM8K-shaped rows that are also the test set, and the ids that training gives their prompts."""

    manifest: Path
    kind: str
    prompt_ids: list[list[int]]


@pytest.fixture(scope="module", params=["templates", "messages"])
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TrainedManifest:
    folder = tmp_path_factory.mktemp("trained")
    base = shutil.copytree(base_directory(), folder / "base")
    (base / "chat_template.jinja").write_text(CHAT)
    rows = [
        {"question": f"Tom has {n} apples.\n He buys {n} more. How many?", "answer": f"#### {2 * n}"} for n in (3, 4)
    ]
    for row in rows:
        row["chat"] = [{"role": r, "content": row[c]} for r, c in (("user", "question"), ("assistant", "answer"))]  # type: ignore[assignment]
    for name in ("train.jsonl", "gsm8k_test.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {
        "templates": 'prompt = "Question: {{ question }}\\nAnswer:"\ncompletion = " {{ answer }}"',
        "messages": 'messages = "chat"',
    }
    manifest = folder / "mine.toml"
    head = 'schema = 1\n[base]\npath = "base"\n[train]\nsteps = 1\n[train.data]\njsonl = "train.jsonl"\n'
    manifest.write_text(f"{head}{texts[request.param]}\n")
    tokenizer = TextTokenizer.from_folder(ModelFolder(base))
    data = read_manifest(manifest).manifest.train.data
    examples = DataReader(data, folder, tokenizer=tokenizer).examples("train")
    rules = SimpleNamespace(max_length=512, overlong="drop", completion_only=True)
    encoded = encode_examples(examples, tokenizer, rules).examples
    ids = [[i for i, label in zip(e.input_ids, e.labels, strict=True) if label == MASKED] for e in encoded]
    bos = tokenizer.encode_prompts([""])[0][0]
    assert [row.count(bos) for row in ids] == [1, 1]
    return TrainedManifest(manifest, request.param, sorted(ids))


@pytest.fixture
def measured(trained: TrainedManifest, monkeypatch: pytest.MonkeyPatch) -> TrainedManifest:
    """The same, with the environment set to it."""
    monkeypatch.setenv("SOKA_EVAL_MANIFEST", str(trained.manifest))
    monkeypatch.setenv("SOKA_EVAL_DATA", str(trained.manifest.parent))
    return trained


def test_hf_sends_the_ids_of_training(lm_tasks: Any, measured: TrainedManifest) -> None:
    """What reaches the model's forward, BOS and all, with no argument of its own."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(measured.manifest.parent / "base"), dtype="float32", device="cpu", batch_size=1)
    sent: list[list[int]] = []

    def note(_: Any, __: Any, options: dict[str, Any]) -> None:
        if options["input_ids"].shape[1] > 1:  # the prompt; then one new token at a time
            sent.append(options["input_ids"][0].tolist())

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    simple_evaluate(model=model, tasks=["soka_gsm8k"], task_manager=lm_tasks, gen_kwargs={"max_gen_toks": 4})
    assert sorted(sent) == measured.prompt_ids


class _Recorder(BaseHTTPRequestHandler):
    """Answers every completion request, and keeps the prompts."""

    prompts: ClassVar[list[list[int]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.prompts.extend(body["prompt"])
        choices = [{"index": index, "text": " #### 6"} for index, _ in enumerate(body["prompt"])]
        reply = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_local_completions_sends_the_ids_of_training(
    lm_tasks: Any, measured: TrainedManifest, add_bos_token: bool
) -> None:
    """With add_bos_token=True for templates, as the docs say: by default BOS is missing. Chats bring their own."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    _Recorder.prompts.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model = LocalCompletionsAPI(
            model="mine",
            base_url=f"http://127.0.0.1:{server.server_port}/v1/completions",
            tokenizer=str(measured.manifest.parent / "base"),
            tokenizer_backend="huggingface",
            add_bos_token=add_bos_token,
            max_length=1024,
        )
        found = simple_evaluate(model=model, tasks=["soka_gsm8k"], task_manager=lm_tasks)
        server.shutdown()
    sent = sorted(_Recorder.prompts)
    needed = measured.kind == "templates"
    assert (sent == measured.prompt_ids) is (add_bos_token == needed)
    bos = measured.prompt_ids[0][:1]
    if needed and not add_bos_token:
        assert [bos + ids for ids in sent] == measured.prompt_ids
    # The two gold answers are 6 and 8.
    assert found["results"]["soka_gsm8k"]["exact_match,strict-match"] == 0.5


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


def answers_of(out: Path) -> tuple[list[str], float]:
    """What a run's log says: every answer in the order of the problems, and the score."""
    (samples,) = out.rglob("samples_soka_builtin_math_*.jsonl")
    (results,) = out.rglob("results_*.json")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    texts = [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return texts, json.loads(results.read_text())["results"]["soka_builtin_math"]["accuracy,none"]


TASK = ("--include_path", "eval/tasks", "--tasks", "soka_builtin_math", "--limit", "24", "--log_samples")


@pytest.mark.slow  # lm-eval starts
def test_plain_lm_eval_with_an_adapter(root: Path, tmp_path: Path, adapter: tuple[Path, Any]) -> None:
    """`--model_args peft=`: score and answers are the adapter's, as `measure` finds them, and not the base's."""
    folder, tuned = adapter
    arguments = f"pretrained={base_directory()},dtype=float32,peft={folder}"
    options = ("--model", "hf", "--model_args", arguments, "--device", "cpu", "--batch_size", "24")
    command_line([*options, *TASK, "--output_path", str(tmp_path / "out")], installed(root, tmp_path), root)
    tokenizer = Base(base_directory()).tokenizer
    measured, plain = (measure(model, "math", 24, tokenizer=tokenizer) for model in (tuned, base_model()))
    answers, score = answers_of(tmp_path / "out")
    assert answers == [sample.text for sample in measured.samples]
    assert answers != [sample.text for sample in plain.samples]
    assert score == measured.correct / measured.total


@pytest.mark.slow  # vLLM starts
def test_plain_lm_eval_with_an_adapter_in_vllm(root: Path, tmp_path: Path, adapter: tuple[Path, Any]) -> None:
    """`--model_args lora_local_path=`, in float32: the answers are the adapter's, token for token."""
    folder, tuned = adapter
    environment = {**installed(root, tmp_path), **ONE_PROCESS, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_NO_USAGE_STATS"] = "1"
    with suppress(PackageNotFoundError):
        # lm-eval asks for the distribution "vllm", which the CPU build has under another name.
        found = version("vllm-cpu")
        info = tmp_path / "vllm-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.partition('+')[0]}+cpu\n")
    arguments = f"pretrained={base_directory()},dtype=float32,max_model_len=512,lora_local_path={folder}"
    options = ("--model", "vllm", "--model_args", arguments, "--batch_size", "auto")
    command_line([*options, *TASK, "--output_path", str(tmp_path / "out")], environment, root)
    measured = measure(tuned, "math", 24, tokenizer=Base(base_directory()).tokenizer)
    texts, score = answers_of(tmp_path / "out")
    assert texts == [sample.text for sample in measured.samples]
    assert score == measured.correct / measured.total


def test_the_score_is_measures_score(lm_tasks: Any) -> None:
    """The same texts, judged by lm-eval's task and by `measure`'s own judge, for each family."""
    model = base_model()
    for family in ("math", "boxed", "code"):
        problems = generate(family, "test", 16)
        texts = dict(
            zip(
                [p.prompt for p in problems],
                generate_answers(model, Base(base_directory()).tokenizer, [p.prompt for p in problems], 64),
                strict=True,
            )
        )
        # The base gets few right: every other answer is replaced by the gold one.
        for problem in problems[::2]:
            texts[problem.prompt] = problem.completion
        from soka_serve.builtin.tasks import check_answer

        expected = sum(check_answer(p, texts[p.prompt]) for p in problems) / 16
        found, _ = evaluate(lm_tasks, [f"soka_builtin_{family}"], lambda doc, _: texts[doc["prompt"]], limit=16)  # noqa: B023
        assert metrics(found, f"soka_builtin_{family}")["accuracy,none"] == expected
        assert 0.5 <= expected < 1


def test_every_task_file_loads(lm_tasks: Any) -> None:
    """All names are known to lm-eval, and every function that a file names is there."""
    from lm_eval.tasks._yaml_loader import load_yaml

    assert set(own_task_names()) == set(lm_tasks.all_tasks)
    for file in tasks_directory().glob("*/*.yaml"):
        load_yaml(file, resolve_func=True)
