"""What PEFT's users rely on beyond the mathematics: names of parameters, configs, targets, dtypes, memory, heads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from soka_serve.adapter.format import read_adapter
from soka_serve.errors import CheckpointError, PlanError, SokaError
from soka_serve.peft import SokaConfig, drop_terms, get_factors, soka_layers
from tests.support.peft_models import (
    INITS,
    adapted,
    all_projections,
    close,
    logits,
    oracle_logits,
    perturb,
    saved,
    spread,
    tiny_llama,
    tokens,
    trained,
)

# --- one adapter copied onto another by the names of its parameters ---------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("way", ["in memory", "from disk", "pruned"])
def test_an_adapter_copies_by_its_parameters_names(init: str, way: str, tmp_path: Path) -> None:
    """What TRL does for its reference model: a second adapter of the same config, then copies of `.default.`."""
    ids, base = tokens(), logits(tiny_llama(), tokens())
    model = trained(init)
    if way == "from disk":
        model.save_pretrained(str(tmp_path / "first"))
        model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "first"), is_trainable=True).eval()
    elif way == "pruned":
        drop_terms(model, {name: [1] for name, f in soka_layers(model).items() if f.spec("default")["rank"] > 1})
    want = logits(model, ids)
    model.add_adapter("ref", model.peft_config["default"])
    copied = 0
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            copied += 1
    assert copied == len(spread(tiny_llama())) * (6 if init == "weights" else 3)
    model.set_adapter("ref")
    assert torch.equal(logits(model, ids), want)
    assert not close(want, base)
    model.save_pretrained(str(tmp_path / "both"))
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), want)
    reloaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "both" / "ref"))
    assert torch.equal(logits(reloaded, ids), want)


def test_frozen_initial_factors_stay_frozen() -> None:
    model = trained()
    model.add_adapter("other", all_projections("weights", r=1))
    for name in ("default", "other"):
        model.set_adapter(name)
        model.set_requires_grad(name, True)
        trainable = {key for key, value in model.named_parameters() if value.requires_grad}
        assert trainable
        assert all(f".{name}." in key and "_initial" not in key for key in trainable)


# --- the config -------------------------------------------------------------------------------------------------------


def test_the_config_given_is_kept_and_can_be_used_again(tmp_path: Path) -> None:
    config = SokaConfig(r=2, target_modules=["q_proj"])
    first = get_peft_model(tiny_llama(), config)
    assert first.peft_config["default"] is config
    name = "model.layers.0.self_attn.q_proj"
    config.r = 4
    second = get_peft_model(tiny_llama(), config)
    assert [soka_layers(model)[name].spec("default")["rank"] for model in (first, second)] == [2, 4]
    first.save_pretrained(str(tmp_path))  # with its own ranks, though the config object has been used since
    assert read_adapter(tmp_path).config["soka_modules"][name]["rank"] == 2
    asked = {name: {"rank": 3}}
    config = SokaConfig(r=1, target_modules=["q_proj"], soka_modules=asked)
    get_peft_model(tiny_llama(), config)
    assert asked == {name: {"rank": 3}}, "the caller's dict stays as it was"


def test_a_failed_injection_leaves_the_config() -> None:
    config = SokaConfig(r=2, target_modules=["q_proj"], shape=[3, 1, 1, 1])
    with pytest.raises(PlanError, match="does not fit"):
        get_peft_model(tiny_llama(), config)
    config.shape = "balanced"
    assert len(soka_layers(get_peft_model(tiny_llama(), config))) == 2


def test_rank_pattern(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3, r"layers\.1\..*\.q_proj": 4}}
    model = get_peft_model(tiny_llama(), SokaConfig(r=2, task_type="CAUSAL_LM", **options))
    ranks = {name: layer.spec("default")["rank"] for name, layer in soka_layers(model).items()}
    assert [ranks[f"model.layers.{i}.{n}"] for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")] == [
        2,
        3,
        4,
        3,
    ]
    perturb(model)
    want = logits(model.eval(), tokens())
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path)), tokens()), want)
    assert set(read_adapter(tmp_path).factors) == set(ranks)


def test_excluded_modules_do_not_warn_on_loading(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = get_peft_model(tiny_llama(), SokaConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]))
    model.save_pretrained(str(tmp_path))
    PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert not [w for w in recwarn if "exclude_modules" in str(w.message)]


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("named", [None, ["pooler"], ["head"]])
def test_heads_of_classifiers_are_trained_and_saved(task: str, named: list[str] | None, tmp_path: Path) -> None:
    """PEFT writes the head's name into the config that it was given, after the tuner was built."""
    from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

    head = "classifier" if task == "TOKEN_CLS" else "qa_outputs"
    kind = BertForTokenClassification if task == "TOKEN_CLS" else BertForQuestionAnswering
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}

    def build() -> Any:
        torch.manual_seed(0)
        return kind(BertConfig(vocab_size=40, **size)).eval()

    names = None if named is None else [head if name == "head" else name for name in named]
    config = SokaConfig(target_modules=["query", "value"], task_type=task, modules_to_save=names)
    model = get_peft_model(build(), config)
    perturb(model, 0.3)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want, before = model.eval()(input_ids=ids)[0], build()(input_ids=ids)[0]
        assert not torch.allclose(want, before, atol=1e-2)
        tensors = saved(model, tmp_path)
        assert any(head in key for key in tensors)
        again = PeftModel.from_pretrained(build(), str(tmp_path)).eval()(input_ids=ids)[0]
    assert torch.equal(again, want)


# --- dtypes and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_autocast_adapter_dtype(init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ids = tokens()
    model = get_peft_model(tiny_llama(dtype), all_projections(init), autocast_adapter_dtype=False).eval()
    assert {p.dtype for n, p in model.named_parameters() if "soka_" in n} == {dtype}
    if init != "random":
        assert torch.equal(logits(model, ids), logits(tiny_llama(dtype), ids))
    perturb(model, 0.2)
    want, tensors = logits(model, ids), saved(model, tmp_path)
    assert close(want, oracle_logits(tiny_llama(dtype), tensors, ids), torch.bfloat16)
    assert not close(want, logits(tiny_llama(dtype), ids), torch.bfloat16)
    for low in (False, True):
        load = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low}
        again = PeftModel.from_pretrained(tiny_llama(dtype), str(tmp_path), **load)
        assert {p.dtype for n, p in again.named_parameters() if "soka_" in n} == {dtype}
        assert torch.equal(logits(again, ids), want)
    wide = PeftModel.from_pretrained(tiny_llama(dtype), str(tmp_path), low_cpu_mem_usage=True)
    assert {p.dtype for n, p in wide.named_parameters() if "soka_" in n} == {torch.float32}


@pytest.mark.parametrize("init", ["zero", "random", False])
def test_a_fresh_config_can_be_made_without_memory(init: Any, tmp_path: Path) -> None:
    ids, model = tokens(), trained("zero")
    want, tensors = logits(model, ids), saved(model, tmp_path)
    empty = peft.inject_adapter_in_model(all_projections(init), tiny_llama(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in empty.named_parameters() if "soka_" in n} == {"meta"}
    peft.set_peft_model_state_dict(empty, tensors, low_cpu_mem_usage=True)
    assert torch.equal(logits(empty, ids), want)
    assert not close(want, logits(tiny_llama(), ids))


def test_a_start_from_the_weights_needs_memory() -> None:
    with pytest.raises(SokaError, match="low_cpu_mem_usage = True gives none"):
        get_peft_model(tiny_llama(), all_projections(), low_cpu_mem_usage=True)


def test_a_finished_adapter_fits_a_model_that_has_initial_factors(tmp_path: Path) -> None:
    ids, model = tokens(), trained("random")
    want, tensors = logits(model, ids), saved(model, tmp_path)
    other = get_peft_model(tiny_llama(), all_projections("weights")).eval()
    peft.set_peft_model_state_dict(other, tensors)
    assert torch.equal(logits(other, ids), want)
    assert not saved(other, tmp_path / "again").keys() ^ tensors.keys()


# --- which modules are adapted, how they start, and what is refused ---------------------------------------------------


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
        get_peft_model(
            nn.Sequential(nn.Linear(6, 4, device="meta")), SokaConfig(init_soka_weights="weights", target_modules=["0"])
        )


def test_pefts_status_report_knows_the_layers() -> None:
    model = adapted()
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "SokaModel")
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(f.parameters for f in get_factors(model)[0].values())
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert not status.merged_adapters


def test_zero_start_depends_on_the_seed_and_the_module() -> None:
    def lefts(seed: int) -> list[Tensor]:
        theta, _ = get_factors(adapted("zero", soka_modules={}, target_modules=["q_proj"], seed=seed))
        return [factors.left for factors in theta.values()]

    assert all(torch.equal(a, b) for a, b in zip(lefts(0), lefts(0), strict=True))
    assert not torch.equal(lefts(0)[0], lefts(1)[0])
    assert not torch.equal(lefts(0)[0], lefts(0)[1])
