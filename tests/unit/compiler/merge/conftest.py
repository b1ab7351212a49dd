"""A base, an adapter of it, and an earlier merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from soka_serve.io.lockfile import write_lock
from tests.support.tiny_models import write_base, write_test_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("merge") / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_test_adapter(tmp_path / "adapter", base=base)


@pytest.fixture
def old(tmp_path: Path) -> Callable[[], None]:
    """An earlier merged model in tmp_path/out; the function checks that it is still there, and nothing else is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    write_lock(out / "soka.lock", {"soka": 1, "kind": "merged"})

    def check() -> None:
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "soka.lock"]
        assert (out / "config.json").read_text() == "old"
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    return check
