"""Every test of the sandbox: nothing of it is left afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandboxed import nothing_left


@pytest.fixture(autouse=True)
def scratches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where scratch directories are made; no process and no scratch directory survives a test."""
    tmp_path_factory.getbasetemp()  # pytest's own folder shall not be made in ours
    with nothing_left() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder in which any user may do anything: what keeps a program out of it is the sandbox."""
    with tempfile.TemporaryDirectory(prefix="soka-outside-", dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)
