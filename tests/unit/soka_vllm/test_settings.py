"""Settings of the plugin, and what vLLM's cache of compiled graphs knows of them."""

from __future__ import annotations

import pytest

from soka_vllm import settings
from soka_vllm.hooks import rows
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
