"""From a trained model to a finished adapter: recompressed, written, loaded by PEFT, merged, and checked by others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
from soka_serve.io.safetensors import read_header
from soka_serve.kron import Factors, linear_with_delta, recompress, stack_terms
from soka_serve.peft import SokaConfig, get_factors, soka_layers
from tests.support.peft_models import logits, oracle_logits, perturb, spread, tiny_llama, tokens
from tests.support.tolerances import TOLERANCE


def trained(folder: Path, target: str = "all-linear") -> tuple[PeftModel, Path]:
    """A few real steps from the weights' own components, and the base as a checkpoint."""
    ids, base = tokens(), tiny_llama()
    base.save_pretrained(folder / "base")
    modules = {n: spec for n, spec in spread(base).items() if target in ("all-linear", n.rpartition(".")[2])}
    targets = target if target == "all-linear" else [target]
    config = SokaConfig(target_modules=targets, soka_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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
    assert not any(p.requires_grad for p in finished.parameters())
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
    model = get_peft_model(nn.Sequential(base), SokaConfig(r=2, target_modules=["0"], shape=[5, 4, 4, 6]))
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


@pytest.mark.parametrize("order", ["left", "right", "dense"])
def test_every_way_of_computing_gives_the_same_gradients(order: str) -> None:
    model, base, x = _linear()
    (layer,) = soka_layers(model).values()
    x.requires_grad_()
    results = []
    for way in ("layer", order):
        model.zero_grad()
        x.grad = None
        if way == "layer":
            y = model(x)
        else:
            factors = layer.delta("default")
            y = linear_with_delta(
                x,
                base.weight,
                base.bias,
                (factors.left, factors.right, factors.sigma),
                order=order,  # type: ignore[arg-type]
            )
        y.square().sum().backward()
        grads = [layer.soka_left, layer.soka_right, layer.soka_sigma]
        assert x.grad is not None
        results.append([y.detach(), x.grad.clone(), *(store["default"].grad.clone() for store in grads)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
