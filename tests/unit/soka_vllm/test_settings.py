"""Settings of the plugin, and what vLLM's cache of compiled graphs knows of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from soka_vllm import metrics, settings
from soka_vllm.hooks import rows
from soka_vllm.settings import METRICS_VARIABLE
from soka_vllm.sources import installed_sources, version_of
from tests.conftest import NEEDS_VLLM


def _stock() -> dict[str, object]:
    return {"VLLM_SOMETHING": 1}


def _key() -> dict[str, object]:
    return settings.compile_factors(_stock)


@pytest.mark.parametrize(("name", "value"), [("SOKA_LORA", "0"), ("SOKA_SLOT_PARAMETERS", "7")])
def test_what_is_in_a_compiled_graph_is_in_its_key(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    before = _key()
    assert before.items() > _stock().items()
    assert before["soka_vllm"]
    monkeypatch.setenv(name, value)
    assert _key() != before
    monkeypatch.setenv("SOKA_SUMS", "3")  # of no graph
    after = _key()
    monkeypatch.delenv("SOKA_SUMS")
    assert _key() == after


def test_a_folder_of_a_users_is_not_the_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing would show what workers write there: the metrics of slots would be missing."""
    monkeypatch.setenv(METRICS_VARIABLE, str(tmp_path))
    assert not settings.has_metrics_folder()
    monkeypatch.delenv(METRICS_VARIABLE)
    assert not settings.has_metrics_folder()
    made: list[Path] = []
    monkeypatch.setattr(metrics.REGISTRY, "register", lambda collector: made.append(collector._folder))
    monkeypatch.setattr(metrics.tempfile, "mkdtemp", lambda prefix: str(tmp_path / f"{prefix}1"))
    metrics.make_folder()
    assert made == [tmp_path / "soka-metrics-1"]
    assert settings.has_metrics_folder()


@NEEDS_VLLM
def test_vllm_asks_there_for_both_of_its_caches() -> None:
    found = installed_sources()
    for module, name in (
        ("vllm.compilation.caching", "aot_compile_hash_factors"),
        ("vllm.compilation.backends", "VllmBackend.__call__"),
    ):
        assert "compile_factors" in found.attributes(module, name)
    row = next(hook for hook in rows(version_of(found)) if hook.name == "compile_factors")
    assert (row.module, row.replacement) == ("vllm.envs", "soka_vllm.settings:compile_factors")
