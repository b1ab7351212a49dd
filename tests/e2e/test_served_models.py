"""Served log-probabilities of other architectures than LLaMA, against transformers with our PEFT layers.

Two of them, for the time that a server takes to start: capped scores and a sliding window, and normed queries and keys.
All of docs/serving.md's table: `python -m eval.checks.served_models`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.served_models import (
    ARCHITECTURES,
    Architecture,
    difference,
    expected,
    served,
    write_checkpoint,
    write_random_adapter,
)
from tests.support.serving import ONE_PROCESS

CHOSEN = [a for a in ARCHITECTURES if a.name in ("Gemma 2", "Qwen3")]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make venv installs it)")
@pytest.mark.parametrize("architecture", CHOSEN, ids=[a.name for a in CHOSEN])
def test_served_as_transformers_computes_it(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)
    base = write_checkpoint(tmp_path / "base", architecture)
    adapter = write_random_adapter(tmp_path / "adapter", base)
    plain, adapted = expected(base, adapter, architecture)
    assert difference(plain, adapted) > 0.5
    with served(base, adapter, tmp_path / "vllm.log") as ask:
        assert difference(ask("base"), plain) < 2e-5
        assert difference(ask("adapter"), adapted) < 2e-5
