"""Every benchmark and check says what it does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from eval.checks.compat import TESTS
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
