"""The command line: help, exit codes, one clear error, nothing heavy imported before it is needed."""

from __future__ import annotations

import doctest
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import soka_serve
from soka_serve.cli import main
from soka_serve.compiler.build import build
from soka_serve.compiler.extract import extract
from soka_serve.errors import SokaError


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_every_command_has_help_with_an_example() -> None:
    for name, command in main.commands.items():
        text = _run(name, "--help")
        assert text.exit_code == 0
        assert "Example" in text.output, name
        assert command.help, name


def test_init_plan_and_a_typing_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run("init", "mine").exit_code == 0
    planned = _run("plan", "mine.toml", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["name"] == "mine"

    refused = _run("init", "mine")
    assert refused.exit_code == 2
    assert "is there already" in refused.output

    file = tmp_path / "mine.toml"
    file.write_text(file.read_text().replace("[train]", "[trian]", 1))
    wrong = _run("plan", "mine.toml")
    assert wrong.exit_code == 2
    assert "trian" in wrong.output
    assert "did you mean" in wrong.output.lower()
    assert "Traceback" not in wrong.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nowhere.toml"], ["nowhere.toml"]),
        (["build", "nowhere.toml"], ["nowhere.toml"]),
        (["inspect", "nowhere"], ["nowhere"]),
        (["merge", "nowhere", "--base", "tiny", "--out", "x"], ["nowhere"]),
        (["merge", "x", "--base", "tinny", "--out", "x"], ["tinny", "'tiny', the embedded model", "ORGANISATION/NAME"]),
        (["merge", "nowhere=half", "--base", "tiny", "--out", "x"], ["ADAPTER=WEIGHT", "half"]),
        (["combine", "nowhere=0.5", "--out", "x"], ["nowhere"]),
        (["export", "nowhere", "--out", "x"], ["nowhere"]),
        (["extract", "./nowhere", "--base", "tiny", "--out", "x", "--rank", "1"], ["nowhere"]),
        (["extract", "tiny", "--base", "tiny", "--out", "x"], ["exactly one of"]),
        (["compare", "nowhere.toml", "--minutes", "nan"], ["minutes: expected 0 or more; got nan"]),
        (["build"], ["MANIFEST"]),
        (["bild", "x"], ["bild"]),
    ],
)
def test_bad_input_gets_one_error_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = _run(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output
    assert list(tmp_path.iterdir()) == []


def test_schema_prints_the_manifests_or_the_suites() -> None:
    for arguments, title in (([], "soka-serve manifest"), (["--suite"], "soka-serve suite")):
        done = _run("schema", *arguments)
        assert done.exit_code == 0
        assert json.loads(done.stdout)["title"] == title


def test_a_bug_of_ours_exits_with_1_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("soka_serve.manifest.read.json_schema", broken)
    done = _run("schema")
    assert done.exit_code == 1
    assert "This is a bug" in done.output


def test_disk_full_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")

    monkeypatch.setattr("soka_serve.manifest.read.json_schema", full)
    done = _run("schema")
    assert done.exit_code == 2
    assert "/somewhere/file" in done.output
    assert "hint" in done.output


WITH_EXAMPLES = (
    *("soka_serve.adapter.loss", "soka_serve.adapter.weighted"),
    *("soka_serve.errors", "soka_serve.compiler.status", "soka_vllm.versions"),
    *("soka_serve.compiler.measures.spectra", "soka_serve.compiler.train.decay"),
    *("soka_serve.evaluation.backends", "soka_serve.evaluation.results"),
    *("soka_serve.serving.command", "soka_serve.serving.log", "soka_serve.serving.targets"),
)


def test_the_examples_in_readme_and_code_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    for module in WITH_EXAMPLES:
        failed, attempted = doctest.testmod(importlib.import_module(module))
        assert (failed, attempted > 0) == (0, True), module
    failed, attempted = doctest.testfile(str(root / "README.md"), module_relative=False)
    assert (failed, attempted > 0) == (0, True)


COMMANDS_WITH_OUT = {
    "build": ["m.toml"],
    "merge": ["adapter", "--base", "tiny"],
    "extract": ["tiny", "--base", "tiny", "--rank", "1"],
    "combine": ["adapter"],
    "export": ["adapter"],
    "compare": ["suite.toml"],
    "eval": ["m.toml"],
    "serve": ["adapter"],
    "plan": ["m.toml"],
}


@pytest.mark.parametrize("command", COMMANDS_WITH_OUT)
def test_an_empty_out_is_refused(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--out "$OUT"` with OUT unset."""
    monkeypatch.chdir(tmp_path)
    done = _run(command, *COMMANDS_WITH_OUT[command], "--out", "")
    assert done.exit_code == 2
    assert "'--out': is empty" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda: soka_serve.merge("adapter", base="tiny", out=""),
        lambda: soka_serve.combine([("adapter", 1.0)], ""),
        lambda: soka_serve.export("adapter", ""),
        lambda: soka_serve.plan("m.toml", out=""),
        lambda: build("m.toml", out=""),
        lambda: extract("tiny", base="tiny", out="", rank=1),
    ],
)
def test_an_empty_out_of_a_call_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(SokaError, match="out is empty"):
        call()
