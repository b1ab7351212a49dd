"""The examples in the docs run."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest


def test_the_python_page_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testfile(
        str(root / "docs" / "python.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert attempted > 20
    assert failed == 0
