"""SoKA on bitsandbytes bases. They run on the CPU too; the GPU run is marked, and skipped loudly without one."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from soka_serve.kron import dense_delta, kpsvd
from soka_serve.manifest.rules import SMALL
from soka_serve.peft import SokaConfig, build_soka_model, get_factors, soka_layers
from soka_serve.peft.optimizer import learning_rates
from tests.support.peft_models import logits, perturb, steps, tiny_llama, tokens, trainable

pytest.importorskip("bitsandbytes", reason="k-bit bases need bitsandbytes (pip install -e '.[kbit]')")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),  # bitsandbytes, on float32 inputs
]

KINDS = ("4bit", "8bit")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def quantised(kind: str, folder: Path, device: str) -> nn.Module:
    """The tiny LLaMA as transformers quantises it on loading."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not (folder / "config.json").exists():
        tiny_llama(intermediate=128).save_pretrained(folder)  # bitsandbytes on the CPU wants multiples of 32
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if kind == "8bit":
        settings = {"load_in_8bit": True}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), device_map={"": device}, dtype=torch.float32
    )
    # Not eval(): on the CPU bitsandbytes then repacks 4-bit weights in place and its state_dict() damages them for good
    # (see test_a_repacked_weight). Nothing in this model depends on the mode.
    return model.train()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of the base, quantised bytes and their scales included, by its name in the base."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value.clone()
        for name, value in model.state_dict().items()
        if "soka_" not in name
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("init", ["weights", "zero"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_0_training_and_reload(
    kind: str, init: str, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = tokens().to(device)
    base = quantised(kind, tmp_path / "base", device)
    before, weights = logits(base, ids), base_weights(base)
    config = SokaConfig(r=3, target_modules=["q_proj", "down_proj"], init_soka_weights=init, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    model = get_peft_model(base, config)
    assert torch.equal(logits(model, ids), before)

    # Trained as usual: gradients reach the factors through the quantised layers, the base stays as it is.
    losses = steps(model, torch.optim.AdamW(trainable(model), lr=2e-2), [ids] * 6)
    assert losses[-1] < losses[0] - 0.2
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, weights[name]), name
    ours = logits(model, ids)
    assert not torch.equal(ours, before)

    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantised(kind, tmp_path / "base", device), str(tmp_path / "adapter")).train()
    assert torch.equal(logits(again, ids), ours)

    # Merging rounds to k bits again, and says so; unmerging gives back the very bits, and the very output.
    with caplog.at_level(logging.WARNING):
        model.merge_adapter(safe_merge=True)
    assert "rounded to bnb" in caplog.text
    merged = logits(model, ids)
    assert not torch.equal(merged, before)
    rounding = 0.1 if kind == "8bit" else 1.0
    assert (merged - ours).abs().mean() < rounding * (ours - before).abs().mean()
    model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, weights[name]), name
    assert torch.equal(logits(model, ids), ours)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_merge_into_one_rounding(kind: str, tmp_path: Path) -> None:
    ids = tokens()
    model = get_peft_model(
        quantised(kind, tmp_path, "cpu"), SokaConfig(init_soka_weights="weights", r=2, target_modules=["q_proj"])
    )
    model.add_adapter("other", SokaConfig(init_soka_weights="weights", r=1, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    perturb(model, 0.2)
    together = copy.deepcopy(model)
    together.merge_adapter(["default", "other"])
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["other"])
    assert torch.equal(logits(model, ids), logits(together, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_init_weights_decomposes_what_the_quantised_layer_computes(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(
        quantised(kind, tmp_path, "cpu"), SokaConfig(init_soka_weights="weights", r=4, target_modules=["v_proj"])
    )
    theta, _ = get_factors(model)
    for name, layer in soka_layers(model).items():
        identity = torch.eye(layer.in_features)
        with torch.no_grad():
            seen = (layer.base_layer(identity).float()).T
        found, wanted = (dense_delta(f) for f in (theta[name], kpsvd(seen, theta[name].shape, 4).factors))
        assert (found / found.norm() - wanted / wanted.norm()).norm() < 0.02, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_on_a_prepared_model(kind: str, tmp_path: Path) -> None:
    ids = tokens()
    base = prepare_model_for_kbit_training(
        quantised(kind, tmp_path, "cpu"), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(
        base, SokaConfig(init_soka_weights="weights", r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert trainable(model)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable(model))


def test_a_repacked_weight_is_read_merged_and_restored_rightly(tmp_path: Path) -> None:
    """4-bit inference on a CPU with AVX512-BF16 changes the weight's bytes in place; elsewhere this tests the usual."""
    ids = tokens()
    base = quantised("4bit", tmp_path, "cpu").eval()
    before = logits(base, ids)
    model = get_peft_model(base, SokaConfig(init_soka_weights="weights", r=4, target_modules=["v_proj"])).eval()
    assert torch.equal(logits(model, ids), before)
    straight = get_peft_model(
        quantised("4bit", tmp_path, "cpu"), SokaConfig(init_soka_weights="weights", r=4, target_modules=["v_proj"])
    )
    for (name, theta), expected in zip(get_factors(model)[0].items(), get_factors(straight)[0].values(), strict=True):
        error = (dense_delta(theta) - dense_delta(expected)).norm() / dense_delta(expected).norm()
        assert error < 0.02, name
    perturb(model, 0.3)
    ours = logits(model, ids)
    model.merge_adapter()
    merged = logits(model, ids)
    assert (merged - ours).abs().mean() < 0.7 * (ours - before).abs().mean()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), ours)


def test_terms_that_mend_a_base_move_as_small_terms_do(tmp_path: Path) -> None:
    """By their size beside the weight: size * rate^2 is that of terms of SMALL."""
    for share in (0.03, 0.0003):
        rates = {}
        for mark in ("4bit", None):
            model = quantised("4bit", tmp_path, "cpu")
            probe = get_peft_model(
                model, SokaConfig(init_soka_weights="weights", r=1, target_modules=["q_proj"], init_scale=share)
            )
            factors = get_factors(probe)[0]
            made = build_soka_model(probe.unload(), factors, initial=False, soka_quantize=mark)
            rates[mark] = list(learning_rates(made, {"left": 1.0, "right": 1.0, "sigma": 1.0}).values())
        expected = min(1.0, math.sqrt(SMALL / share)) / math.sqrt(SMALL)
        for marked, plain in zip(rates["4bit"], rates[None], strict=True):
            assert marked / plain == pytest.approx(expected, rel=0.02), share
