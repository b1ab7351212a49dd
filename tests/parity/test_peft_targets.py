"""Which modules PEFT adapts with SoKA, how they start, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from soka_serve.errors import CheckpointError, PlanError, SokaError
from soka_serve.peft import SokaConfig, get_factors, soka_layers
from tests.support.peft_models import adapted, logits, perturb, saved, tiny_llama, tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_layers_and_exclusions_are_read() -> None:
    config = SokaConfig(
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["v_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
    )
    model = get_peft_model(tiny_llama(), config)
    assert list(soka_layers(model)) == ["model.layers.1.self_attn.q_proj"]
    assert model.peft_config["default"] is config, "PEFT's contract: the config given is the one that is kept"
    assert list(config.soka_modules) == ["model.layers.1.self_attn.q_proj"]


def test_modules_to_save_are_trained_and_saved_whole(tmp_path: Path) -> None:
    ids = tokens()
    model = adapted(target_modules=["q_proj"], soka_modules={}, modules_to_save=["lm_head"])
    perturb(model)
    assert "base_model.model.lm_head.weight" in saved(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path)), ids), logits(model, ids))


def test_default_targets_are_pefts() -> None:
    names = {name.rpartition(".")[2] for name in soka_layers(get_peft_model(tiny_llama(), SokaConfig()))}
    assert names == {"q_proj", "v_proj"}


def test_what_cannot_be_adapted_is_named_before_anything_is_replaced() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv1d(4, 4, 1), "c": nn.Embedding(4, 4)})
    with pytest.raises(PlanError, match=r"b: a Conv1d cannot be adapted.*\n.*c: a Embedding cannot be adapted"):
        get_peft_model(model, SokaConfig(target_modules=["a", "b", "c"]))
    assert type(model["a"]) is nn.Linear
    with pytest.raises(PlanError, match=r"a: factor shape \[3, 1, 3, 1\] does not fit"):
        get_peft_model(model, SokaConfig(target_modules=["a"], shape=[3, 1, 3, 1]))
    with pytest.raises(PlanError, match=r"soka_modules names modules.*\['z'\]"):
        get_peft_model(model, SokaConfig(target_modules=["a"], soka_modules={"z": {"rank": 1}}))


def test_other_peft_methods_are_not_mixed() -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    del model.peft_config
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time"),
        pytest.raises(PlanError, match="0: already adapted by another PEFT method"),
    ):
        get_peft_model(model, SokaConfig(target_modules=["0"]))


def test_more_terms_than_the_shape_has_are_capped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = SokaConfig(r=9, target_modules=["0"], shape=[2, 2, 2, 3])
        model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    assert model.peft_config["default"].soka_modules == {"0": {"rank": 4, "shape": [2, 2, 2, 3]}}
    assert "9 terms asked for, the factor shape [2, 2, 2, 3] has at most 4" in caplog.text


def test_factors_that_were_never_loaded_show() -> None:
    model = get_peft_model(tiny_llama(), SokaConfig(target_modules=["q_proj"], init_soka_weights=False))
    with pytest.raises(CheckpointError, match=r"0\.self_attn\.q_proj: the factors of adapter 'default' were"):
        logits(model, tokens())
    with pytest.raises(CheckpointError, match="were never loaded"):
        model.merge_adapter()


def test_a_weight_that_is_not_there_cannot_be_decomposed() -> None:
    with pytest.raises(SokaError, match=r"0: init_soka_weights = 'weights' decomposes the weight, which is not in mem"):
        get_peft_model(nn.Sequential(nn.Linear(6, 4, device="meta")), SokaConfig(target_modules=["0"]))


def test_pefts_status_report_knows_the_layers() -> None:
    model = adapted()
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "SokaModel")
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(f.parameters for f in get_factors(model)[0].values())
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert not status.merged_adapters


def test_empty_weights_are_for_loading_only() -> None:
    with pytest.raises(SokaError, match="low_cpu_mem_usage = True gives none"):
        get_peft_model(tiny_llama(), SokaConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)


def test_zero_start_depends_on_the_seed_and_the_module() -> None:
    def lefts(seed: int) -> list[Tensor]:
        theta, _ = get_factors(adapted("zero", soka_modules={}, target_modules=["q_proj"], seed=seed))
        return [factors.left for factors in theta.values()]

    assert all(torch.equal(a, b) for a, b in zip(lefts(0), lefts(0), strict=True))
    assert not torch.equal(lefts(0)[0], lefts(1)[0])
    assert not torch.equal(lefts(0)[0], lefts(0)[1])
