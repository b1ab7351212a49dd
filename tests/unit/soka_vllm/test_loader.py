"""What the served model's modules are called in an adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import NEEDS_VLLM

pytestmark = [NEEDS_VLLM, pytest.mark.filterwarnings("ignore")]  # of vLLM's imports

DECODER = "language_model.model.layers.0.self_attn.q_proj"


def manager(*, multimodal: bool) -> Any:
    """As much of vLLM's LoRAModelManager as names need."""
    mapping = SimpleNamespace(language_model=["language_model"])
    return SimpleNamespace(model=SimpleNamespace(), supports_mm=multimodal, mm_mapping=mapping)


@pytest.mark.parametrize(
    ("own", "served"),
    [
        ("language_model.model.layers.0.self_attn.q_proj", DECODER),
        ("model.layers.0.self_attn.q_proj", DECODER),  # of a checkpoint of the language model alone
        ("model.layers.9.self_attn.q_proj", "model.layers.9.self_attn.q_proj"),  # nowhere: an error names it so
    ],
)
def test_names_of_a_language_model_within_a_multimodal_one(own: str, served: str) -> None:
    from soka_vllm.loader import _served_names

    assert _served_names("SOKA", [own], {DECODER: None}, manager(multimodal=True)) == {served: own}


def test_a_language_model_without_a_prefix_of_its_own() -> None:
    """A bare decoder under `llm.`: its modules have `model.` in a checkpoint of the language model."""
    from soka_vllm.loader import _served_names

    other = manager(multimodal=True)
    other.mm_mapping = SimpleNamespace(language_model=["llm."])
    names = _served_names("SOKA", ["model.layers.0.mlp.up_proj"], {"llm.layers.0.mlp.up_proj": None}, other)
    assert names == {"llm.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj"}


def test_names_of_other_models_stay() -> None:
    from soka_vllm.loader import _served_names

    name = "model.layers.0.self_attn.q_proj"
    assert _served_names("SOKA", [name], {DECODER: None}, manager(multimodal=False)) == {name: name}
