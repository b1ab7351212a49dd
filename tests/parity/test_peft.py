"""The tuner against real PEFT and a float64 torch.kron oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from soka_serve.kron import Factors
from soka_serve.kron.apply import Terms
from soka_serve.kron.factors import stack_difference
from soka_serve.peft import SokaConfig, SokaLinear, get_factors, soka_layers
from tests.support.peft_models import (
    adapted,
    close,
    logits,
    oracle_logits,
    oracle_sum,
    perturb,
    saved,
    spread,
    tiny_llama,
    tokens,
    trainable,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- step 0, and away from it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["weights", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_0_is_the_base_bit_for_bit(init: str, dtype: torch.dtype) -> None:
    ids, base = tokens(), tiny_llama(dtype)
    before = logits(base, ids)
    model = adapted(init, dtype)
    assert torch.equal(logits(model, ids), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model, ids), logits(tiny_llama(dtype), ids))
    for name, value in base.state_dict().items():
        wrapped = model.base_model.model.state_dict()
        assert torch.equal(wrapped.get(name, wrapped.get(name.replace(".weight", ".base_layer.weight"))), value)
    perturb(model)
    assert not torch.equal(logits(model, ids), before)


def test_gradients_at_step_0_are_those_of_the_trained_factors_alone() -> None:
    """W + K(theta) - K(initial) has the gradients of the paper's frozen residual plus K(theta)."""
    torch.manual_seed(0)
    base = nn.Linear(12, 10, bias=False).double()
    x, target = torch.randn(5, 12).double(), torch.randn(5, 10).double()
    weight = base.weight.detach().clone()
    model = get_peft_model(
        nn.Sequential(base), SokaConfig(init_soka_weights="weights", r=3, target_modules=["0"], shape=[5, 4, 2, 3])
    )
    (layer,) = soka_layers(model).values()
    ((model(x) - target) ** 2).sum().backward()
    trained = [layer.soka_left["default"], layer.soka_right["default"], layer.soka_sigma["default"]]
    parts = [value.detach().clone().requires_grad_() for value in trained]
    dense = sum(parts[2][k] * torch.kron(parts[0][k], parts[1][k]) for k in range(3))
    residual = weight - dense.detach()
    ((x @ (residual + dense).T - target) ** 2).sum().backward()
    for value, reference in zip(trained, parts, strict=True):
        assert value.grad.abs().max() > 0
        torch.testing.assert_close(value.grad, reference.grad, rtol=1e-10, atol=1e-12)
    assert base.weight.grad is None


def test_gradcheck_away_from_step_0() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 8).double()),
        SokaConfig(init_soka_weights="weights", r=2, target_modules=["0"], shape=[4, 2, 2, 3]),
    )
    perturb(model, 0.3)
    (layer,) = soka_layers(model).values()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    values = [layer.soka_left["default"], layer.soka_right["default"], layer.soka_sigma["default"]]

    def run(x: Tensor, left: Tensor, right: Tensor, sigma: Tensor) -> Tensor:
        pairs = {
            f"base_model.model.0.soka_{part}.default.weight": value
            for part, value in (("left", left), ("right", right), ("sigma", sigma))
        }
        return torch.func.functional_call(model, pairs, (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (x, *(v.detach().clone().requires_grad_() for v in values)))


def test_the_kpsvd_start_has_the_config_s_shapes_and_ranks() -> None:
    model = adapted()
    expected = spread(tiny_llama())
    theta, initial = get_factors(model)
    assert set(theta) == set(initial) == set(expected)
    assert {n: {"rank": f.rank, "shape": list(f.shape)} for n, f in theta.items()} == expected
    assert model.peft_config["default"].soka_modules == expected
    for name, factors in theta.items():
        assert torch.equal(factors.left, initial[name].left)
        assert factors.left.data_ptr() != initial[name].left.data_ptr()


# --- parity: adapter == oracle == merged == unloaded == reloaded, and not the base -----------------------------------


@pytest.mark.parametrize("init", ["weights", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_adapter_merged_unloaded_reloaded_agree(init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ids, base = tokens(), tiny_llama(dtype)
    before = logits(base, ids)
    model = adapted(init, dtype)
    perturb(model, 0.2)
    ours = logits(model, ids)
    oracle = oracle_logits(base, saved(model, tmp_path), ids)
    effect = (oracle - before.double()).abs().max()

    # 16-bit activations round after each of some twenty operations, on both sides alike.
    loosen = 4.0
    assert close(ours, oracle, dtype, loosen)
    assert not close(before, oracle, dtype, 4 * loosen), effect

    model.merge_adapter(safe_merge=True)
    merged = logits(model, ids)
    assert close(merged, oracle, dtype, loosen)
    assert not torch.equal(merged, before)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), ours)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), ours)

    for low in (False, True):
        reloaded = PeftModel.from_pretrained(tiny_llama(dtype), str(tmp_path), low_cpu_mem_usage=low)
        assert torch.equal(logits(reloaded, ids), ours)

    unloaded = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, SokaLinear) for m in unloaded.modules())
    assert torch.equal(logits(unloaded, ids), merged)
    assert set(unloaded.state_dict()) == set(base.state_dict())
    for name, value in unloaded.state_dict().items():
        assert value.dtype == base.state_dict()[name].dtype


def test_unload_gives_the_base_back() -> None:
    ids = tokens()
    model = adapted()
    perturb(model)
    assert torch.equal(logits(model.unload(), ids), logits(tiny_llama(), ids))


# --- mutations: each must be seen by the parity check above ----------------------------------------------------------


def _without_sigma(theta: Factors, initial: Factors) -> Factors:
    ones = torch.ones_like(theta.sigma)
    return stack_difference(Factors(theta.left, theta.right, ones), Factors(initial.left, initial.right, ones))


def _stacked(terms: Terms, initial: Terms) -> Terms:
    both = stack_difference(Factors(*terms), Factors(*initial))
    return both.left, both.right, both.sigma


def _swapped(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms, initial: Terms) -> Tensor:
    left, right, sigma = _stacked(terms, initial)
    delta = sum(s * torch.kron(b, a) for s, a, b in zip(sigma, left, right, strict=True))
    return nn.functional.linear(x, weight + delta, bias)


def _reshaped(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms, initial: Terms) -> Tensor:
    left, right, sigma = _stacked(terms, initial)
    matrix = (sigma[:, None] * left.flatten(1)).T @ right.flatten(1)
    return nn.functional.linear(x, weight + matrix.reshape(weight.shape), bias)


BROKEN: dict[str, tuple[str, Any]] = {
    "none": ("soka_serve.kron.apply.stack_difference", stack_difference),
    "dropped sigma": ("soka_serve.kron.apply.stack_difference", _without_sigma),
    "dropped initial factors": ("soka_serve.kron.apply.stack_difference", lambda theta, initial: theta),
    "swapped Kronecker order": ("soka_serve.peft.layer.linear_with_delta", _swapped),
    "plain reshape": ("soka_serve.peft.layer.linear_with_delta", _reshaped),
}


@pytest.mark.parametrize("mutation", BROKEN)
def test_the_parity_check_sees_a_broken_implementation(
    mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens()
    model = adapted()
    perturb(model, 0.2)
    oracle = oracle_logits(tiny_llama(), saved(model, tmp_path), ids)
    monkeypatch.setattr(*BROKEN[mutation])
    assert close(logits(model, ids), oracle) == (mutation == "none")


# --- several adapters ------------------------------------------------------------------------------------------------


def test_several_adapters_of_different_ranks_and_shapes(tmp_path: Path) -> None:
    ids, base = tokens(), tiny_llama()
    model = adapted()
    perturb(model, 0.2, seed=3)
    model.add_adapter("other", SokaConfig(r=5, target_modules=["q_proj", "down_proj"], init_soka_weights="zero"))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    first = logits(model, ids)
    model.set_adapter("other")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    assert torch.equal(logits(model, ids), logits(base, ids))
    perturb(model, 0.3, seed=4)
    second = logits(model, ids)
    assert not torch.equal(first, second)

    model.save_pretrained(str(tmp_path))
    tensors = {"default": load_file(tmp_path / "adapter_model.safetensors")}
    tensors["other"] = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert close(second, oracle_logits(base, tensors["other"], ids))

    model.base_model.set_adapter(["default", "other"])
    both = logits(model, ids)
    summed = oracle_sum(base, [(1.0, tensors["default"]), (1.0, tensors["other"])], ids)
    assert close(both, summed)

    model.merge_adapter()
    assert close(logits(model, ids), summed)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("other")
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), both)

    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        merge_one_by_one(model)
    assert close(logits(model, ids), summed)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), both)

    model.set_adapter("other")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert torch.equal(logits(model, ids), second)

    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "other"), adapter_name="one")
    assert torch.equal(logits(loaded, ids), second)
    loaded.load_adapter(str(tmp_path), adapter_name="two", is_trainable=True)
    assert torch.equal(logits(loaded, ids), second)
    loaded.set_adapter("two")
    assert torch.equal(logits(loaded, ids), first)


def merge_one_by_one(model: PeftModel) -> None:
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])


def test_merging_leaves_a_base_shared_with_another_model_alone() -> None:
    ids = tokens()
    base = tiny_llama()
    shared = base.model.layers[0].self_attn.q_proj.weight.data
    before = shared.clone()
    model = get_peft_model(base, SokaConfig(init_soka_weights="weights", r=2, target_modules=["q_proj"]))
    perturb(model)
    model.merge_adapter()
    assert not torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.weight, before)
    assert torch.equal(shared, before)
    assert not torch.equal(logits(model, ids), logits(tiny_llama(), ids))


# --- memory savers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    ids = tokens()

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted()
        perturb(model)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, saved_memory = gradients(False), gradients(True)
    assert set(plain) == set(saved_memory)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(saved_memory[name], gradient)


def test_factors_cast_to_bfloat16_still_start_at_exactly_zero() -> None:
    """TRL casts the trainable parameters of a quantised model to bfloat16, and leaves buffers alone."""
    ids = tokens()
    model = adapted(dtype=torch.bfloat16)
    for parameter in trainable(model):
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(logits(model, ids), logits(tiny_llama(torch.bfloat16), ids))
    perturb(model, 0.2)
    assert not torch.equal(logits(model, ids), logits(tiny_llama(torch.bfloat16), ids))
