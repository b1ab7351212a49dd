"""Training, planning, evaluation and serving read text alike: as transformers opens the base's tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soka_serve.base.base import Base
from soka_serve.base.folder import ModelFolder
from soka_serve.base.pretrained import open_tokenizer
from soka_serve.base.served_tokenizer import check_reading, read_served
from soka_serve.base.tokenizer_class import reads_plainly, tokenizer_directory
from soka_serve.builtin import base_directory
from soka_serve.compiler.context import prepare
from soka_serve.compiler.merge.papers import copy_side_files
from soka_serve.compiler.plan.text import render_plan
from soka_serve.compiler.stages import encode
from soka_serve.compiler.status import plan
from soka_serve.data.examples import Example
from soka_serve.errors import CheckpointError
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import read_manifest
from soka_serve.serving.command import ServeOptions, make_launch, parse_options
from tests.fuzzing.bases import KINDS, change, check_tokenizer
from tests.unit.base.test_tokenizer import LLAMA_CLASS, build_llama2, save

HUB = "deepseek-ai/DeepSeek-R1-Distill-Llama-Tiny"
PROMPT = "Question: Max has 30 pens.\nAnswer:"
MANIFEST = """\
schema = 1
name = "small"
[base]
path = "base"
[train]
steps = 1
eval_every = 1
[train.data]
jsonl = "rows.jsonl"
eval_jsonl = "rows.jsonl"
"""
REFUSED = {
    "class": "LlamaTokenizer, which does not fit tokenizer.json",
    "class of the config": "LlamaTokenizer, which does not fit tokenizer.json",
    "another class": "GemmaTokenizer cannot read text: Unk token",
    "EOS behind, by tokenizer.json": "puts '</s>' behind every text",
    "EOS without embedding": "'<|end|>' has the id 626",
    "token without embedding": "' pens' has the id 626",
    "versions of the file": "fast_tokenizer_files",
}


@pytest.fixture(autouse=True)
def _environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "child" not in request.node.name:  # it imports transformers, which takes seconds
        monkeypatch.setattr(Base, "planned_tokenizer", Base.tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A manifest with a base and data of its own."""
    shutil.copytree(base_directory(), tmp_path / "base")
    (tmp_path / "small.toml").write_text(MANIFEST)
    rows = [{"prompt": PROMPT, "completion": " 30"}, {"prompt": "Eva  has\n2", "completion": " 2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _trained(folder: Path) -> list[list[int]]:
    context = prepare(read_manifest(folder / "small.toml"), Workspace(folder / "build", "small"), progress=False)
    return [example.input_ids for example in encode(context)[0].examples]


def _served(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder / "base")(text)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in REFUSED])
def test_training_and_planning_read_as_servers_do(folder: Path, kind: str) -> None:
    KINDS[kind](folder / "base")
    trained = _trained(folder)
    served = _served(folder, PROMPT)
    assert trained[0][: len(served)] == served
    made = plan(folder / "small.toml", out=folder / "build")
    assert made.data.tokens == sum(map(len, trained))
    if kind in ("added token", "added_tokens.json", "extra special token"):
        assert "tokenizer.json alone would read 1 of 2 examples otherwise" in render_plan(made, color=False)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_in_serving_is_refused(folder: Path, kind: str) -> None:
    KINDS[kind](folder / "base")
    said = []
    for refuse in (lambda: plan(folder / "small.toml", out=folder / "build"), lambda: _trained(folder)):
        with pytest.raises(CheckpointError) as caught:
            refuse()
        assert REFUSED[kind] in caught.value.message
        assert caught.value.hint
        said.append(caught.value.message)
    assert said[0] == said[1]


def test_both_readings_are_shown(folder: Path) -> None:
    KINDS["class"](folder / "base")
    ids = _served(folder, PROMPT)[1:]
    with pytest.raises(CheckpointError) as caught:
        _trained(folder)
    lines = caught.value.message.splitlines()
    assert "tokenizer_config.json: tokenizer_class 'LlamaTokenizerFast'" in lines[0]
    assert PROMPT.split("\n")[0] in lines[1]
    assert lines[2].startswith(f"  tokenizer.json: {ModelFolder(folder / 'base').backend.encode(PROMPT).ids[1:5]}"[:-1])
    assert lines[3].startswith(f"  LlamaTokenizer: {ids[:5]}"[:-1])
    assert "'Question:Maxhas30pens.Answer:30'" in lines[4]
    assert "PreTrainedTokenizerFast" in str(caught.value.hint)
    change(folder / "base", "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert _trained(folder)[0][: len(ids)] == _served(folder, PROMPT)[: len(ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_plans_read_as_builds_do_where_tokenizer_json_is_taken_as_it_stands(folder: Path, kind: str) -> None:
    KINDS[kind](folder / "base")
    check_tokenizer(folder / "base")
    assert reads_plainly(ModelFolder(folder / "base")) == (kind in ("saved again", "EOS behind, by tokenizer.json"))


def test_a_chat_does_not_mind_an_end_behind_every_text(folder: Path) -> None:
    KINDS["EOS behind, by tokenizer.json"](folder / "base")
    chat = [Example("<s>a", " b</s>", templated=True)]
    assert check_reading(Base(folder / "base").tokenizer, chat, ModelFolder(folder / "base")) == 0


def test_the_childs_tokenizer_is_the_same(folder: Path) -> None:
    KINDS["special tokens cut up"](folder / "base")
    here, there = Base(folder / "base").tokenizer, read_served(ModelFolder(folder / "base"))
    for text in (PROMPT, "</s> and <s>", ""):
        assert here.encode_prompts([text])[0] == there.encode_prompts([text])[0]
    assert (here.settings, here.stop_ids, here.pad_id) == (there.settings, there.stop_ids, there.pad_id)
    (folder / "base" / "added_tokens.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot build this tokenizer: JSONDecodeError"):
        plan(folder / "small.toml", out=folder / "build")


# ------------------------------------------------------------------------------------------------------------ hub ids


def _snapshot(tmp_path: Path, hub: str = HUB) -> Path:
    """A hub cache with one model in it, whose files name a class that garbles text, as the real one's do."""
    place = tmp_path / "hub" / f"models--{hub.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot = place / "snapshots" / ("0" * 40)
    shutil.copytree(base_directory(), snapshot)
    change(snapshot, "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    return snapshot


def _by_hub_id(tmp_path: Path, hub: str = HUB) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hub, cache_dir=tmp_path / "hub", local_files_only=True)


@pytest.mark.parametrize("hub", [HUB, "someone/other-llama"])
def test_a_directory_is_opened_as_the_hub_id_would_be(tmp_path: Path, hub: str) -> None:
    snapshot = _snapshot(tmp_path, hub)
    theirs = _by_hub_id(tmp_path, hub)
    place = tokenizer_directory(ModelFolder(snapshot), hub)
    assert open_tokenizer(place)(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]
    assert (place == snapshot) == (hub != HUB)
    assert tokenizer_directory(ModelFolder(snapshot), None) == snapshot
    assert _by_hub_id(tmp_path, hub).decode(theirs(PROMPT)["input_ids"][1:]) == (
        PROMPT if hub == HUB else PROMPT.replace(" ", "").replace("\n", "")
    )


def test_vllm_reads_a_hub_base_as_training_does(tmp_path: Path) -> None:
    from vllm.tokenizers import get_tokenizer

    snapshot = _snapshot(tmp_path)
    place = tokenizer_directory(ModelFolder(snapshot), HUB)
    ids = get_tokenizer(str(place))(PROMPT)["input_ids"]
    assert ids == Base(place).tokenizer.encode_prompts([PROMPT])[0] == _by_hub_id(tmp_path)(PROMPT)["input_ids"]
    # What `--tokenizer` is for: the snapshot's own files garble the text.
    assert get_tokenizer(str(snapshot))(PROMPT)["input_ids"] != ids


def test_the_folder_follows_the_base(tmp_path: Path) -> None:
    snapshot = _snapshot(tmp_path)
    place = tokenizer_directory(ModelFolder(snapshot), HUB)
    stamp = (place / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer_directory(ModelFolder(snapshot), HUB) == place
    assert (place / "tokenizer.json").stat().st_mtime_ns == stamp
    (place / "tokenizer.json").write_text("somebody else was here")
    assert tokenizer_directory(ModelFolder(snapshot), HUB) == place
    assert (place / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_a_merged_model_of_such_a_base_names_the_class(tmp_path: Path) -> None:
    snapshot = _snapshot(tmp_path)
    (tmp_path / "merged").mkdir()
    copy_side_files(Base(snapshot), tmp_path / "merged", None, HUB)
    assert open_tokenizer(tmp_path / "merged")(PROMPT)["input_ids"] == _by_hub_id(tmp_path)(PROMPT)["input_ids"]


def test_a_build_of_such_a_base_has_other_keys_than_one_of_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = _snapshot(tmp_path)
    monkeypatch.setattr("soka_serve.base.resolve.fetch_snapshot", lambda *a, **o: snapshot)
    keys, tokens = [], []
    for base in (f'hub = "{HUB}"', f'path = "{snapshot}"'):
        (tmp_path / "small.toml").write_text(MANIFEST.replace('path = "base"', base))
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": PROMPT, "completion": " 30"}) + "\n")
        context = prepare(read_manifest(tmp_path / "small.toml"), Workspace(tmp_path / "build", "small"))
        keys.append(context.keys["tune"])
        if base.startswith("hub"):
            tokens = encode(context)[0].examples[0].input_ids
            assert plan(tmp_path / "small.toml", out=tmp_path / "build").data.tokens == len(tokens)
    assert keys[0] != keys[1]
    assert tokens[: len(_by_hub_id(tmp_path)(PROMPT)["input_ids"])] == _by_hub_id(tmp_path)(PROMPT)["input_ids"]


def test_mistrals_own_files_are_left_aside(tmp_path: Path) -> None:
    from soka_serve.serving.targets import Target

    shutil.copytree(base_directory(), tmp_path / "m")
    target = Target(given="m", name="m", kind="merged", path=tmp_path / "m")

    def options() -> dict[str, list[str]]:
        return parse_options(make_launch([target], None, ServeOptions()).command[4:])

    assert "--tokenizer-mode" not in options()
    (tmp_path / "m" / "tekken.json").write_text("{}")
    (tmp_path / "m" / "consolidated.safetensors").touch()
    assert options()["--tokenizer-mode"] == ["hf"]


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_the_quick_check_asks_chats_with_one_bos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from soka_serve.base.model import load_base
    from soka_serve.compiler.check import answer, choose_questions

    chat = [{"role": "user", "content": "Max has 30 pens."}, {"role": "assistant", "content": "30"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "small.toml").write_text(MANIFEST + 'messages = "messages"\n')
    loaded = read_manifest(folder / "small.toml")
    tokenizer = Base(folder / "base").tokenizer
    questions = choose_questions(loaded.manifest, folder, tokenizer)
    assert questions is not None
    model = load_base(folder / "base")
    asked: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **o: asked.extend(o["input_ids"][0].tolist()) or generate(**o))
    answer(model, tokenizer, questions, 2)
    trained = _trained(folder)[0]
    assert asked == trained[: len(asked)]
    assert asked.count(1) == 1


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_evaluation_asks_chats_as_training_does(folder: Path, monkeypatch: pytest.MonkeyPatch, bos: str) -> None:
    """A chat template may write no BOS where the tokenizer puts one before plain prompts."""
    from soka_serve.base.model import load_base
    from soka_serve.evaluation import gsm8k
    from soka_serve.evaluation.models import LocalModel, ServedModel
    from soka_serve.serving.command import Launch

    template = bos + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "30"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "small.toml").write_text(MANIFEST.replace("eval_jsonl", "messages = 'messages'\neval_jsonl"))
    monkeypatch.setenv("SOKA_EVAL_MANIFEST", str(folder / "small.toml"))
    (prompt, plain) = gsm8k.prompt({"question": PROMPT}), "not a chat"
    served = ServedModel(Launch(()), "m", folder / "base", 64, 1)
    local = LocalModel(load_base(folder / "base"), Base(folder / "base").tokenizer, 64, 1)
    ids = served.tok_encode(prompt)
    assert ids == _trained(folder)[0][: len(ids)] == local.tok_batch_encode([prompt])[0][0].tolist()
    assert ids.count(1) == bool(bos)
    assert served.tok_encode(plain) == local.tok_batch_encode([plain])[0][0].tolist() == _served(folder, plain)


def test_answers_keep_the_space_that_they_begin_with_in_transformers_too(tmp_path: Path) -> None:
    from soka_serve.base.model import load_base
    from soka_serve.evaluation.models import LocalModel

    tokenizer = Base(save(build_llama2(), tmp_path, **LLAMA_CLASS)).tokenizer
    local = LocalModel(load_base(base_directory()), tokenizer, 64, 1)
    (pair,) = tokenizer.encode_pairs([("def f():\n", "    return 3")])
    assert local.tok_decode(pair.input_ids[pair.prompt_length :]) == "    return 3"


def test_evaluation_of_a_base_whose_tokenizer_names_neither_end_nor_padding(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from soka_serve.base.model import load_base
    from soka_serve.evaluation.models import LocalModel

    change(folder / "base", "tokenizer_config.json", eos_token=None, pad_token=None)
    local = LocalModel(load_base(folder / "base"), Base(folder / "base").tokenizer, 64, 2)
    asked = [(PROMPT, {"until": [], "max_gen_toks": 8}), (f"{PROMPT} 30\n{PROMPT}", {"until": [], "max_gen_toks": 8})]
    found = local.generate_until([Instance("generate_until", {}, request, 0) for request in asked])
    assert all(found)
    assert local.tokenizer.pad_token_id == local.eot_token_id == 2


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: os.mkfifo(f / "tokenizer.model"), "tokenizer.model"),
        (lambda f: (f / "vocab.json").touch() or os.truncate(f / "vocab.json", 3 << 30), "vocab.json"),
        (lambda f: change(f, "tokenizer_config.json", added_tokens_decoder={"x": 3}), "cannot build this tokenizer"),
        (lambda f: change(f, "tokenizer_config.json", tokenizer_class=["x"]), "cannot build this tokenizer"),
        (lambda f: change(f, "tokenizer_config.json", tokenizer_class="ByT5Tokenizer"), "ByT5Tokenizer"),
        (lambda f: (f / "added_tokens.json").write_text("["), "cannot build this tokenizer"),
    ],
)
def test_hostile_files(folder: Path, spoil: Callable[[Path], object], word: str) -> None:
    spoil(folder / "base")
    with pytest.raises(CheckpointError, match=word):
        _trained(folder)
