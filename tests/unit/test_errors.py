"""Names, paths and contents of files that others made: nothing of them reaches a terminal, a log or a card as it is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from soka_serve.adapter.format import CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from soka_serve.compiler.report.card import extracted_card
from soka_serve.errors import CheckpointError, is_printable, printable, printable_lines
from soka_serve.io.names import is_model_name
from soka_serve.io.safetensors import read_header
from soka_serve.kron import Factors

EVIL = "x\x1b[31mred\nerror: forged\r\u202e\x9b1m"
TARGET = "model.layers.0.self_attn.q_proj"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def check(text: str) -> None:
    """Nothing that a terminal obeys, and no line of the intruder's own."""
    assert is_printable(text.replace("\n", "")), repr(text)
    assert not any(line.startswith("error: forged") for line in text.splitlines()), text
    assert "forged" in text  # it is shown, though


def write(folder: Path, base: str | None = None, lock: dict[str, object] | None = None) -> Path:
    shape = Checkpoint.open(base_directory()).tensors[f"{TARGET}.weight"].shape
    factors = Factors(torch.ones(1, shape[0] // 8, shape[1] // 8), torch.ones(1, 8, 8), torch.ones(1))
    write_adapter(folder, {TARGET: factors}, base_model=base or str(base_directory()), lock=lock)
    return folder


def change(folder: Path, old: str, new: str) -> None:
    text = (folder / CONFIG_FILE).read_text()
    assert old in text
    (folder / CONFIG_FILE).write_text(text.replace(old, json.dumps(new)[1:-1]))


def test_what_is_printable() -> None:
    for plain in ("", "model.layers.0", "Grüße, 世界\u3000😀", "a\u200db"):
        assert is_printable(plain)
        assert printable(plain) == plain
    for c in (*map(chr, range(32)), "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e", "\u2066", "\ud800"):
        assert not is_printable(f"a{c}b")
        shown = printable(f"a{c}b")
        assert shown.isascii()
        assert shown.isprintable()
    assert len(printable("\x1b" * 10_000_000)) < 2000
    assert printable_lines("a\n\tb\r\x1bc") == "a\n\tb\\r\\x1bc"
    assert printable_lines("") == ""


@pytest.mark.parametrize("name", ["a", "7b", "org/name", "org/name:v2", "a@1+2", "A.b-c_d", "a" * 200])
def test_names_of_models(name: str) -> None:
    assert is_model_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "a" * 201, "x" * 10_000_000, "__base__", "_", ".a", "-a", "/a", "a/", "a//b", "a/../b", "a/.b"),
        *("a b", "a\n", "\na", "a\x1b", "a\0", "é", "ﬁ", "a,b", "a=b", "a\\b", "a|b", "{a}", '"', "a\u202e"),
    ],
)
def test_names_of_none(name: str) -> None:
    assert not is_model_name(name)


def test_tensors_of_such_names_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({f"{key}{EVIL}": value for key, value in tensors.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="printable characters") as caught:
        read_header(folder / WEIGHTS_FILE)
    check(caught.value.message)
    for command in ("inspect", "serve"):
        done = run(command, folder)
        assert done.exit_code == 2
        check(done.output)


@pytest.mark.parametrize("old", [TARGET, "builtin:x"])
def test_configs_with_such_names_are_refused(tmp_path: Path, old: str) -> None:
    folder = write(tmp_path / "a", base="builtin:x")
    change(folder, old, EVIL)
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder)
    check(caught.value.message)


def test_inspect(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", base="builtin:x", lock={"name": EVIL, f"key{EVIL}": "v", "base": {"name": EVIL}})
    done = run("inspect", folder)
    assert done.exit_code == 0, done.output
    check(done.output)
    model = tmp_path / "model"
    shutil.copytree(base_directory(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": [EVIL], "vocab_size": EVIL}))
    done = run("inspect", model)
    assert done.exit_code == 0, done.output
    check(done.output)


def test_plan_shows_what_data_hold(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": f"q{EVIL}", "a": f"a{EVIL}"}) + "\n")
    (tmp_path / "m.toml").write_text(
        'schema = 1\n[base]\nbuiltin = "tiny"\n[[adapt]]\nmodules = ["q_proj"]\n'
        '[train.data]\njsonl = "d.jsonl"\nprompt = "{{ q }}"\ncompletion = "{{ a }}"\n'
    )
    done = run("plan", tmp_path / "m.toml")
    assert done.exit_code == 0, done.output
    check(done.output)


def test_errors_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("inspect", tmp_path / EVIL.replace("\n", ""))
    assert done.exit_code == 2
    check(done.output)
    assert run("--help").exit_code == 0  # sets up logging
    logging.getLogger("soka_serve.x").warning("a %s", EVIL.replace("\n", ""))
    run("schema")
    check(capsys.readouterr().err or "forged")


def test_names_on_the_command_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    for name in (EVIL, "__base__", "x" * 100_000, "a b"):
        done = run("serve", f"{name}={folder}", "--dry-run")
        assert done.exit_code == 2
        assert "letters, digits" in done.output
        assert is_printable(done.output.replace("\n", ""))
        assert len(done.output) < 3 * len(name) + 5000


def test_cards(tmp_path: Path) -> None:
    card = extracted_card(f"/models/base{EVIL}`", f"/models/tuned{EVIL}", 1, 1, 0.5)
    check(card)
    folder = write(tmp_path / f"name{EVIL.replace('/', '')}|x", base="builtin:x")
    done = run("merge", folder, "--base", "tiny", "--out", tmp_path / "out", "--allow-other-base", "--no-verify")
    assert done.exit_code == 0, done.output
    check((tmp_path / "out" / "README.md").read_text())
    assert is_printable(done.output.replace("\n", ""))
    done = run("export", folder, "--out", tmp_path / "lora", "--to", "lora", "--rank", "2")
    assert done.exit_code == 0, done.output
    assert is_printable(done.output.replace("\n", ""))
