"""Adapters that PEFT saves, loads, resumes or gets as given factors; damaged ones; finished ones, checked by others."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from soka_serve.adapter.format import check_against, read_adapter, write_adapter
from soka_serve.base.weight_map import WeightMap
from soka_serve.errors import CheckpointError, PlanError
from soka_serve.io.safetensors import read_header
from soka_serve.kron import Factors, recompress, stack_terms
from soka_serve.kron.shapes import FactorShape
from soka_serve.peft import SokaConfig, build_soka_model, get_factors
from tests.support.kron_oracle import draw_factors
from tests.support.peft_models import (
    adapted,
    close,
    logits,
    oracle_logits,
    perturb,
    saved,
    spread,
    steps,
    tiny_llama,
    tokens,
    trainable,
)
from tests.support.tolerances import TOLERANCE


def test_keys_on_disk(tmp_path: Path) -> None:
    tensors = saved(adapted(target_modules=["o_proj"], soka_modules={}, r=2), tmp_path)
    assert {key for key in tensors if ".0." in key} == {
        f"base_model.model.model.layers.0.self_attn.o_proj.soka_{part}{kind}"
        for part in ("left", "right", "sigma")
        for kind in ("", "_initial")
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "SOKA"
    assert config["soka_format"] == 1
    assert config["soka_initial"] is True
    assert config["init_soka_weights"] is False
    assert config.keys().isdisjoint({"rank_pattern", "soka_dropout", "fan_in_fan_out"}), "older readers refuse these"
    found = read_adapter(tmp_path)
    assert set(found.initial) == set(found.factors)
    assert config["soka_modules"]["model.layers.0.self_attn.o_proj"] == {"rank": 2, "shape": [8, 8, 8, 8]}
    zero = saved(adapted("zero", target_modules=["o_proj"], soka_modules={}), tmp_path / "zero")
    assert not any(key.endswith("_initial") for key in zero)


def test_a_training_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    """Save, load and train on: the same losses as without the break."""
    batches = [tokens(seed=seed) for seed in range(6)]
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    steps(model, optimizer, batches[:3])
    model.save_pretrained(str(tmp_path))
    state = copy.deepcopy(optimizer.state_dict())
    straight = steps(model, optimizer, batches[3:])

    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True).eval()
    optimizer = torch.optim.AdamW(trainable(again), lr=3e-2)
    optimizer.load_state_dict(state)
    assert steps(again, optimizer, batches[3:]) == straight
    for mine, other in zip(get_factors(model)[0].values(), get_factors(again)[0].values(), strict=True):
        assert torch.equal(mine.left, other.left)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(_key("q_proj", "left")), "q_proj: missing soka_left"),
        (lambda t: t.pop(_key("q_proj", "sigma_initial")), "q_proj: missing soka_sigma_initial"),
        (lambda t: t.update({_key("q_proj", "extra"): torch.ones(1)}), "does not name: .*soka_extra"),
        (lambda t: t.update({_key("v_proj", "right"): torch.ones(3, 5, 4)}), r"v_proj: soka_right is \(3, 5, 4\)"),
        (lambda t: t[_key("k_proj", "sigma")].fill_(float("nan")), "k_proj: soka_sigma has values that are not finite"),
    ],
)
def test_damaged_weights_are_an_error_and_not_a_warning(damage: Any, message: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = saved(adapted(), tmp_path)
    damage(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def _key(projection: str, part: str) -> str:
    return f"base_model.model.model.layers.0.self_attn.{projection}.soka_{part}"


def test_another_base_is_an_error(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    saved(adapted(), tmp_path)
    sizes: dict[str, Any] = {"vocab_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=96, intermediate_size=112, num_hidden_layers=2, **sizes))
    with pytest.raises(PlanError, match=r"q_proj: factor shape \[4, 16, 16, 4\] does not fit") as caught:
        PeftModel.from_pretrained(wide, str(tmp_path))
    assert "down_proj" in caught.value.message
    sizes["head_dim"] = 32
    short = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=112, num_hidden_layers=1, **sizes))
    with pytest.raises(PlanError, match=r"modules that the model lacks.*model\.layers\.1\.mlp\.down_proj"):
        PeftModel.from_pretrained(short, str(tmp_path))


def _given() -> dict[str, Factors]:
    return {
        name: draw_factors(FactorShape(*spec["shape"]), spec["rank"], 7, torch.float32, scale=0.02)
        for name, spec in spread(tiny_llama()).items()
    }


@pytest.mark.parametrize("initial", [False, True])
def test_build_and_read_back(initial: bool, tmp_path: Path) -> None:
    ids, base, given = tokens(), tiny_llama(), _given()
    model = build_soka_model(tiny_llama(), given, initial=initial, base_model="some/base").eval()
    theta, start = get_factors(model)
    assert set(theta) == set(given)
    assert all(torch.equal(theta[n].right, given[n].right) for n in given)
    assert set(start) == (set(given) if initial else set())
    assert model.peft_config["default"].base_model_name_or_path == "some/base"
    assert torch.equal(logits(model, ids), logits(base, ids)) == initial
    perturb(model, 0.1)
    assert not torch.equal(get_factors(model)[0][next(iter(given))].left, theta[next(iter(given))].left)
    if initial:
        assert all(torch.equal(get_factors(model)[1][n].left, given[n].left) for n in given)
    model.peft_config["default"].base_model_name_or_path = None
    assert close(logits(model, ids), oracle_logits(base, saved(model, tmp_path), ids))


def test_build_refuses_what_does_not_fit() -> None:
    given = _given()
    name = next(iter(given))
    with pytest.raises(PlanError, match="no modules to adapt"):
        build_soka_model(tiny_llama(), {}, initial=True)
    with pytest.raises(PlanError, match=r"model lacks.*\['model.layers.9.q_proj'\]"):
        build_soka_model(tiny_llama(), {name: given[name], "model.layers.9.q_proj": given[name]}, initial=True)
    with pytest.raises(PlanError, match="does not fit"):
        build_soka_model(tiny_llama(), {name: given["model.layers.0.mlp.down_proj"]}, initial=True)


# --- from a trained model to a finished adapter -----------------------------------------------------------------------


def trained(folder: Path, target: str = "all-linear") -> tuple[PeftModel, Path]:
    """A few real steps from the weights' own components, and the base as a checkpoint."""
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    modules = {n: spec for n, spec in spread(base).items() if target in ("all-linear", n.rpartition(".")[2])}
    targets = target if target == "all-linear" else [target]
    start: dict[str, Any] = {"init_soka_weights": "weights", "soka_modules": modules}
    config = SokaConfig(target_modules=targets, task_type="CAUSAL_LM", **start)
    model = get_peft_model(base, config)
    steps(model, torch.optim.AdamW(trainable(model), lr=2e-2), [tokens()] * 5)
    return model.eval(), folder / "base"


def deltas(model: PeftModel) -> dict[str, Factors]:
    theta, initial = get_factors(model)
    return {n: recompress(stack_terms(theta[n], initial[n], signs=(1, -1)))[0] for n in theta}


def near(ours: Tensor, other: Tensor, times: float = 4.0) -> bool:
    rtol, atol = TOLERANCE[torch.float32]
    size = max(1.0, float(other.abs().max()))
    return torch.allclose(ours.double(), other.double(), rtol=times * rtol, atol=times * atol * size)


def test_a_finished_adapter_is_what_was_trained(tmp_path: Path, root: Path) -> None:
    ids = tokens()
    model, base = trained(tmp_path)
    ours, before = logits(model, ids), logits(tiny_llama(), ids)
    folder = tmp_path / "adapter"
    write_adapter(folder, deltas(model), base_model=str(base), lock={"seed": 0}, card="# card\n")

    adapter = read_adapter(folder)
    check_against(adapter, WeightMap(read_header(base / "model.safetensors")))
    assert all(adapter.factors[n].rank <= 2 * f.rank for n, f in get_factors(model)[0].items())
    finished = PeftModel.from_pretrained(tiny_llama(), str(folder))
    assert finished.peft_config["default"].inference_mode
    assert not trainable(finished)
    assert near(logits(finished, ids), ours)
    assert near(
        logits(finished, ids), oracle_logits(tiny_llama(), load_file(folder / "adapter_model.safetensors"), ids)
    )
    assert not near(ours, before, 1000)

    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder))  # finds the base by itself
    assert torch.equal(logits(auto, ids), logits(finished, ids))

    merged = finished.merge_and_unload(safe_merge=True)
    assert near(logits(merged, ids), ours)
    merged.save_pretrained(tmp_path / "merged")

    checker = root.parent / "shared" / "accept" / "check_adapter.py"
    if not checker.exists():
        pytest.skip(f"no {checker.name} beside the repository; everything before it passed")
    command = [sys.executable, str(checker), "--base", str(base), "--adapter", str(folder)]
    result = subprocess.run(
        [*command, "--merged", str(tmp_path / "merged")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["modules"] == 14


def test_peft_converts_it_to_lora(tmp_path: Path) -> None:
    ids = tokens()
    model, _ = trained(tmp_path, "v_proj")
    assert model.supports_lora_conversion()
    config, state = peft.convert_to_lora(model, rank=32)  # full: nothing is lost
    lora = get_peft_model(tiny_llama(), config).eval()
    peft.set_peft_model_state_dict(lora, state)
    assert near(logits(lora, ids), logits(model, ids), 40)
    assert not near(logits(tiny_llama(), ids), logits(model, ids), 400)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} refuses PEFT below {MIN_PEFT_VERSION} here",
)
def test_transformers_own_adapter_interface() -> None:
    """`model.add_adapter` injects the tuner without a PeftModel around it."""
    ids, model = tokens(), tiny_llama()
    before = logits(model, ids)
    model.add_adapter(SokaConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model, ids), before)
    perturb(model, 0.2)
    assert not torch.equal(logits(model, ids), before)
    model.disable_adapters()
    assert torch.equal(logits(model, ids), before)


# --- base and delta computed together or apart -----------------------------------------------------------------------


def _linear() -> tuple[PeftModel, nn.Linear, Tensor]:
    torch.manual_seed(0)
    base = nn.Linear(24, 20)
    model = get_peft_model(
        nn.Sequential(base), SokaConfig(init_soka_weights="weights", r=2, target_modules=["0"], shape=[5, 4, 4, 6])
    )
    perturb(model, 0.3)
    return model, base, torch.randn(400, 24)


def test_a_hook_on_the_base_layer_is_still_called_and_changes_nothing_else() -> None:
    model, base, x = _linear()
    together = model(x)
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    apart = model(x)
    assert calls == [1]
    assert near(apart.detach(), together.detach())
