"""What the served model's modules are called in an adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.conftest import NEEDS_VLLM

pytestmark = [NEEDS_VLLM, pytest.mark.filterwarnings("ignore")]  # of vLLM's imports

DECODER = "language_model.model.layers.0.self_attn.q_proj"


def manager(*, multimodal: bool) -> Any:
    """As much of vLLM's LoRAModelManager as names need."""
    mapping = SimpleNamespace(language_model=["language_model"])
    found = SimpleNamespace(
        model=nn.Module(), supports_mm=multimodal, mm_mapping=mapping, modules={}, packed_modules={}
    )
    found.lora_config = SimpleNamespace(target_modules=None)
    found._is_moe = found.is_pooling_model = False
    return found


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


def test_a_module_of_another_stage_of_a_pipeline() -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    from soka_vllm.loader import _served_names

    staged = manager(multimodal=True)
    staged.model = nn.ModuleDict(
        {"language_model": nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList()})})}
    )
    staged.model["language_model"]["model"]["layers"].append(PPMissingLayer())
    assert _served_names("SOKA", ["model.layers.0.self_attn.q_proj"], {}, staged) == {
        DECODER: "model.layers.0.self_attn.q_proj"
    }


def test_two_names_of_one_module_are_refused() -> None:
    from soka_vllm.loader import _served_names

    names = [DECODER, "model.layers.0.self_attn.q_proj"]
    with pytest.raises(ValueError, match=rf"{names[0]} and {names[1]} are both the served model's {DECODER}"):
        _served_names("SOKA", names, {DECODER: None}, manager(multimodal=True))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", DECODER])
@pytest.mark.parametrize("taken", [False, True])
def test_a_lora_that_would_change_nothing(name: str, taken: bool) -> None:
    from soka_vllm.loader import check_lora

    other = manager(multimodal=True)
    other.modules = {DECODER: None}
    if taken:
        other._get_text_lora_names = None
    lora = SimpleNamespace(loras={name: None})
    if name == DECODER or taken:
        check_lora(lora, other)
    else:
        with pytest.raises(ValueError, match="no layer of the served model that takes adapters; close is"):
            check_lora(lora, other)


def test_names_of_other_models_stay() -> None:
    from soka_vllm.loader import _served_names

    name = "model.layers.0.self_attn.q_proj"
    assert _served_names("SOKA", [name], {DECODER: None}, manager(multimodal=False)) == {name: name}
