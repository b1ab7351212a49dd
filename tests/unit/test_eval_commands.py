"""Every benchmark and check says what it does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from eval.bench.real_path import MANIFEST, own_files
from eval.checks.compat import TESTS
from soka_serve.manifest.read import read_manifest
from tests.support import preloaded

# One process: most of them import torch, and some vLLM.
_CODE = """\
import contextlib, io, runpy, sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code:
                sys.exit(f"{name}: {ended.code}")
    if "usage: " not in said.getvalue():
        sys.exit(f"{name}: no help")
"""


@pytest.mark.slow
def test_each_command_of_eval_has_a_help(root: Path) -> None:
    commands = [
        ".".join(file.relative_to(root).with_suffix("").parts)
        for file in sorted((root / "eval").rglob("*.py"))
        if "make_parser(" in (text := file.read_text()) or "ArgumentParser(" in text
        if '__name__ == "__main__"' in text
    ]
    assert len(commands) > 15
    host = "vllm" if find_spec("vllm") else "soka"
    done = preloaded.run(host, [preloaded.CODE, _CODE, *commands], cwd=root)
    assert done.returncode == 0, done.stderr


def test_the_tests_that_compat_runs_are_there(root: Path) -> None:
    assert [test for tests in TESTS.values() for test in tests if not (root / test).exists()] == []


def test_the_manifest_on_a_real_model_takes_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(own_files(MANIFEST.read_text(encoding="utf-8"), tmp_path, tmp_path / "train.jsonl"))
    manifest, shipped = read_manifest(mine).manifest, read_manifest(MANIFEST).manifest
    assert manifest.base.path == str(tmp_path)
    assert manifest.train.data.jsonl == str(tmp_path / "train.jsonl")
    assert (manifest.base.hub, manifest.train.data.hub) == (None, None)
    assert (manifest.adapt, manifest.train.steps) == (shipped.adapt, shipped.train.steps)
