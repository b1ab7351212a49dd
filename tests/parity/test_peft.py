"""The tuner against real PEFT and a float64 torch.kron oracle."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from soka_serve.errors import CheckpointError, PlanError, SokaError
from soka_serve.kron import Factors
from soka_serve.peft import SokaConfig, SokaLinear, build_soka_model, get_factors, soka_layers
from soka_serve.peft.layer import stack_difference
from tests.support.peft_models import logits, oracle_logits, perturb, spread, tiny_llama, tokens
from tests.support.tolerances import TOLERANCE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adapted(init: str = "weights", dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """A tiny LLaMA with awkward ranks and shapes on every projection."""
    base = tiny_llama(dtype)
    config.setdefault("soka_modules", spread(base))
    config.setdefault("target_modules", "all-linear")
    return get_peft_model(base, SokaConfig(init_soka_weights=init, task_type="CAUSAL_LM", **config)).eval()  # type: ignore[arg-type]


def saved(model: PeftModel, directory: Path) -> dict[str, Tensor]:
    model.save_pretrained(str(directory))
    return load_file(directory / "adapter_model.safetensors")


def close(ours: Tensor, oracle: Tensor, dtype: torch.dtype, loosen: float = 1.0) -> bool:
    rtol, atol = TOLERANCE[dtype]
    scale = float(oracle.abs().max())
    return torch.allclose(ours.double(), oracle.double(), rtol=rtol * loosen, atol=atol * loosen * max(1.0, scale))


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
    model = get_peft_model(nn.Sequential(base), SokaConfig(r=3, target_modules=["0"], shape=[5, 4, 2, 3]))
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
        nn.Sequential(nn.Linear(6, 8).double()), SokaConfig(r=2, target_modules=["0"], shape=[4, 2, 2, 3])
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


def test_get_delta_weight_is_the_kron_sum() -> None:
    model = adapted()
    perturb(model)
    for layer in soka_layers(model).values():
        dense = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        for factors, sign in ((layer.theta("default"), 1), (layer.initial("default"), -1)):
            assert factors is not None
            wide = factors.to(torch.float64)
            for k in range(factors.rank):
                dense += (sign * wide.sigma[k] * torch.kron(wide.left[k], wide.right[k])).detach()
        assert close(layer.get_delta_weight("default"), dense, torch.float32)
        assert dense.abs().max() > 1e-3


# --- mutations: each must be seen by the parity check above ----------------------------------------------------------


def _mutated(mutation: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    if mutation == "no sigma":
        return {k: torch.ones_like(v) if "soka_sigma" in k else v for k, v in tensors.items()}, torch.kron
    if mutation == "no initial factors":
        return {k: v for k, v in tensors.items() if not k.endswith("_initial")}, torch.kron
    if mutation == "swapped order":
        return tensors, lambda left, right: torch.kron(right, left)
    return tensors, torch.kron


@pytest.mark.parametrize("mutation", ["none", "no sigma", "no initial factors", "swapped order"])
def test_the_parity_check_sees_mutations(mutation: str, tmp_path: Path) -> None:
    ids, base = tokens(), tiny_llama()
    model = adapted()
    perturb(model, 0.2)
    tensors, kron = _mutated(mutation, saved(model, tmp_path))
    agrees = close(logits(model, ids), oracle_logits(base, tensors, ids, kron), torch.float32, 4.0)
    assert agrees == (mutation == "none")


def _without_sigma(theta: Factors, initial: Factors) -> Factors:
    ones = torch.ones_like(theta.sigma)
    return stack_difference(Factors(theta.left, theta.right, ones), Factors(initial.left, initial.right, ones))


def _swapped(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, sigma: Tensor, **_: Any
) -> Tensor:
    delta = sum(s * torch.kron(b, a) for s, a, b in zip(sigma, left, right, strict=True))
    return nn.functional.linear(x, weight + delta, bias)


def _reshaped(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, sigma: Tensor, **_: Any
) -> Tensor:
    matrix = (sigma[:, None] * left.flatten(1)).T @ right.flatten(1)
    return nn.functional.linear(x, weight + matrix.reshape(weight.shape), bias)


BROKEN: dict[str, tuple[str, Any]] = {
    "none": ("soka_serve.peft.layer.stack_difference", stack_difference),
    "dropped sigma": ("soka_serve.peft.layer.stack_difference", _without_sigma),
    "dropped initial factors": ("soka_serve.peft.layer.stack_difference", lambda theta, initial: theta),
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
    assert close(logits(model, ids), oracle, torch.float32, 4.0) == (mutation == "none")


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
    assert close(second, oracle_logits(base, tensors["other"], ids), torch.float32, 4.0)

    model.base_model.set_adapter(["default", "other"])
    both = logits(model, ids)
    sums = {f"{k}": v for k, v in tensors["default"].items()}
    weights = oracle_sum(base, [sums, tensors["other"]])
    assert close(both, weights(ids), torch.float32, 4.0)

    model.merge_adapter()
    assert close(logits(model, ids), weights(ids), torch.float32, 4.0)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("other")
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), both)

    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        merge_one_by_one(model)
    assert close(logits(model, ids), weights(ids), torch.float32, 4.0)
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


def oracle_sum(base: nn.Module, adapters: list[dict[str, Tensor]]) -> Any:
    """Logits of the float64 base with several dense deltas."""
    from tests.support.peft_models import oracle_weights

    model = tiny_llama(torch.float64)
    start = {name: value.double() for name, value in base.state_dict().items()}
    total = dict(start)
    for tensors in adapters:
        for name, value in oracle_weights(base, tensors).items():
            total[name] = total[name] + value - start[name]
    model.load_state_dict(total)
    return lambda ids: logits(model, ids)


def test_a_merge_that_is_not_finite_is_refused_and_leaves_the_base() -> None:
    ids = tokens()
    model = adapted()
    perturb(model)
    ours = logits(model, ids)
    (layer, *_) = soka_layers(model).values()
    kept = layer.soka_sigma["default"].detach().clone()
    with torch.no_grad():
        layer.soka_sigma["default"][0] = float("inf")
    weight = layer.base_layer.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"q_proj: merging default gives values that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged
    with torch.no_grad():
        layer.soka_sigma["default"].copy_(kept)
    assert torch.equal(logits(model, ids), ours)


def test_merging_leaves_a_base_shared_with_another_model_alone() -> None:
    ids = tokens()
    base = tiny_llama()
    shared = base.model.layers[0].self_attn.q_proj.weight.data
    before = shared.clone()
    model = get_peft_model(base, SokaConfig(r=2, target_modules=["q_proj"]))
    perturb(model)
    model.merge_adapter()
    assert not torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.weight, before)
    assert torch.equal(shared, before)
    assert not torch.equal(logits(model, ids), logits(tiny_llama(), ids))


# --- on disk ---------------------------------------------------------------------------------------------------------


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
    assert config["soka_modules"]["model.layers.0.self_attn.o_proj"] == {"rank": 2, "shape": [8, 8, 8, 8]}
    zero = saved(adapted("zero", target_modules=["o_proj"], soka_modules={}), tmp_path / "zero")
    assert not any(key.endswith("_initial") for key in zero)


def test_a_training_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    """Save, load and train on: the same losses as without the break."""

    def run(model: PeftModel, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            ids = tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    run(model, optimizer, range(3))
    model.save_pretrained(str(tmp_path))
    state = copy.deepcopy(optimizer.state_dict())
    straight = run(model, optimizer, range(3, 6))

    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True).eval()
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=3e-2)
    optimizer.load_state_dict(state)
    assert run(again, optimizer, range(3, 6)) == straight
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


# --- targets ---------------------------------------------------------------------------------------------------------


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


# --- given factors ---------------------------------------------------------------------------------------------------


def _given(scale: float = 0.3) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, spec in spread(tiny_llama()).items():
        r, (m, n, p, q) = spec["rank"], spec["shape"]
        made[name] = Factors(
            left=torch.randn(r, m, n, generator=generator) / (m * n) ** 0.5,
            right=torch.randn(r, p, q, generator=generator) / (p * q) ** 0.5,
            sigma=scale * torch.rand(r, generator=generator),
        )
    return made


@pytest.mark.parametrize("initial", [False, True])
def test_build_and_read_back(initial: bool, tmp_path: Path) -> None:
    ids, base, given = tokens(), tiny_llama(), _given(3.0)
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
    assert close(logits(model, ids), oracle_logits(base, saved(model, tmp_path), ids), torch.float32, 4.0)


def test_build_refuses_what_does_not_fit() -> None:
    given = _given()
    name = next(iter(given))
    with pytest.raises(PlanError, match="no modules to adapt"):
        build_soka_model(tiny_llama(), {}, initial=True)
    with pytest.raises(PlanError, match=r"model lacks.*\['model.layers.9.q_proj'\]"):
        build_soka_model(tiny_llama(), {name: given[name], "model.layers.9.q_proj": given[name]}, initial=True)
    with pytest.raises(PlanError, match="does not fit"):
        build_soka_model(tiny_llama(), {name: given["model.layers.0.mlp.down_proj"]}, initial=True)


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


def test_a_16_bit_base_trains_float32_factors() -> None:
    model = adapted(dtype=torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)


def test_factors_cast_to_bfloat16_still_start_at_exactly_zero() -> None:
    """TRL casts the trainable parameters of a quantised model to bfloat16, and leaves buffers alone."""
    ids = tokens()
    model = adapted(dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(logits(model, ids), logits(tiny_llama(torch.bfloat16), ids))
    perturb(model, 0.2)
    assert not torch.equal(logits(model, ids), logits(tiny_llama(torch.bfloat16), ids))
