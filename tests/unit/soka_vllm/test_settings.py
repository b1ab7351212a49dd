"""Settings of the plugin, and what vLLM's cache of compiled graphs knows of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from soka_vllm import settings
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
@pytest.mark.filterwarnings("ignore")  # of vLLM's imports
def test_vllm_asks_there_for_both_of_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs
    from vllm.compilation import caching

    stock: Callable[[], dict[str, object]] = envs.compile_factors
    asked = []
    monkeypatch.setattr(envs, "compile_factors", lambda: asked.append(1) or settings.compile_factors(stock))
    monkeypatch.setattr(caching, "hash_factors", lambda factors: factors["soka_vllm"])

    class Config:
        def compute_hash(self) -> str:
            return "config"

    assert caching.aot_compile_hash_factors(Config())[0] == settings.compile_factors(stock)["soka_vllm"]
    assert asked
