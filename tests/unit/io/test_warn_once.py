"""One thing is told once: warnings of one command, and causes within one error."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import soka_serve
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from tests.support.tiny_models import write_base, write_test_adapter

RULES = "modules = ['k_proj']\n[[adapt]]\nmodules = ['k_proj']\nenabled = false\n[[adapt]]\nmodules = ['q_proj']"


def write_sharded(folder: Path) -> Path:
    """The embedded base in two shards, the first with a tensor that the index does not name."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base_directory() / name).read_bytes())
    tensors = load_file(base_directory() / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i in (0, 1):
        part = {name: tensors[name] for name in names[i::2]}
        weight_map |= dict.fromkeys(part, f"model-0000{i + 1}-of-00002.safetensors")
        more = {} if i else {"spare.weight": torch.zeros(2, 2)}
        save_file(part | more, folder / f"model-0000{i + 1}-of-00002.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_manifest(folder: Path, name: str = "m", rules: str = "modules = ['q_proj']") -> Path:
    text = f"schema = 1\n[base]\npath = 'base'\n[[adapt]]\n{rules}\n[train]\nsteps = 1\nbatch_size = 2\n"
    text += "[train.data]\nbuiltin = 'math'\nlimit = 8\n[eval]\nlimit = 2\n"
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


def said(output: str) -> Counter[str]:
    lines = [line.strip() for line in output.splitlines() if line.startswith(("warning: ", "error: ", "/"))]
    return Counter(line.removeprefix("error: ") for line in lines)


def test_a_command_warns_of_one_thing_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sharded(tmp_path / "base")
    manifest = str(write_manifest(tmp_path, rules=RULES))
    (tmp_path / "build" / "m").mkdir(parents=True)
    (tmp_path / "build" / "m" / "soka.lock").write_text("stages = 3\n")
    done = CliRunner().invoke(main, ["plan", manifest])
    counts = said(done.output)
    assert done.exit_code == 0, done.output
    assert all(count == 1 for count in counts.values()), counts
    for words in ("spare.weight", "adapt[0] has no effect", "soka.lock: stages: not a table"):
        assert sum(words in line for line in counts) == 1, (words, counts)


def test_each_command_warns_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is remembered between two calls from Python."""
    write_sharded(tmp_path / "base")
    manifest = write_manifest(tmp_path)
    for calls in (1, 2):
        soka_serve.plan(manifest, out=tmp_path / "out")
        assert caplog.text.count("spare.weight for one") == calls


def test_a_build_warns_of_one_thing_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sharded(tmp_path / "base")
    soka_serve.build(write_manifest(tmp_path), out=tmp_path / "out", progress=False)
    counts = Counter(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert all(count == 1 for count in counts.values()), counts
    assert sum("not in the index" in text for text in counts) == 1, counts
    assert sum("does not use" in text for text in counts) == 1, counts


def test_merge_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_base(tmp_path / "base")
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    soka_serve.merge(write_test_adapter(tmp_path / "adapter"), base=base, out=tmp_path / "out", progress=False)
    assert caplog.text.count("model.norm.weight for one") == 1


def test_an_error_names_a_cause_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three builds on one base that has lost a shard."""
    monkeypatch.chdir(tmp_path)
    base = write_sharded(tmp_path / "base")
    manifests = [str(write_manifest(tmp_path, name)) for name in "abc"]
    for name in "abc":  # as far as `serve` looks before it looks at the base
        (tmp_path / "build" / name / "adapter").mkdir(parents=True)
        (tmp_path / "build" / name / "soka.lock").write_text("[stages]\nexport = 'x'\n")
    (base / "model-00002-of-00002.safetensors").unlink()
    for command in (["serve", *manifests, "--dry-run"], ["plan", manifests[0]], ["inspect", str(base)]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 2, done.output
        assert done.output.count("model-00002-of-00002.safetensors: missing") == 1, done.output
