"""A build to serve, and an environment in which nothing is set."""

from __future__ import annotations

from pathlib import Path

import pytest

import soka_serve
from tests.support.builds import write_manifest


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_API_KEY", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SOKA_ADAPTER_ROOTS", "SOKA_ALLOW_OTHER_BASE", "SOKA_LORA", "SOKA_SLOT_PARAMETERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml and its build, adapter and merged model."""
    folder = tmp_path_factory.mktemp("built")
    soka_serve.build(write_manifest(folder, steps=2), out=folder / "build", progress=False)
    return folder
