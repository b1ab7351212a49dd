"""Merges that are refused whole, other layers and starts, sums, other methods beside ours, hot swaps, mixed batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soka_serve.adapter.format import read_adapter
from soka_serve.errors import CheckpointError
from soka_serve.peft import SokaConfig, drop_terms, hotswap_adapter, soka_layers
from tests.support.peft_models import (
    INITS,
    all_projections,
    close,
    logits,
    oracle_logits,
    oracle_sum,
    oracle_weights,
    perturb,
    saved,
    spread,
    tiny_llama,
    tokens,
    trained,
    two_adapters,
)


@pytest.fixture(scope="module")
def two() -> PeftModel:
    return two_adapters()


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_merges_all_or_nothing(call: str) -> None:
    ids, model = tokens(), trained()
    want = logits(model, ids)
    weights = {name: layer.base_layer.weight.clone() for name, layer in soka_layers(model).items()}
    broken = soka_layers(model)["model.layers.1.mlp.up_proj"].soka_sigma["default"]
    kept = broken.detach().clone()
    broken.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: merging default.*nothing was merged"):
        getattr(model, call)(safe_merge=True)
    for name, layer in soka_layers(model).items():
        assert not layer.merged
        assert torch.equal(layer.base_layer.weight, weights[name])
    broken.data.copy_(kept)
    assert torch.equal(logits(model, ids), want)


def test_a_safe_merge_of_a_second_adapter_leaves_the_first(two: PeftModel) -> None:
    model = copy.deepcopy(two)
    model.merge_adapter(["default"])
    ids = tokens()
    want = logits(model, ids)
    soka_layers(model, "other")["model.layers.0.mlp.down_proj"].soka_right["other"].data.fill_(float("inf"))
    with pytest.warns(UserWarning, match="Already following"), pytest.raises(ValueError, match="nothing was merged"):
        soka_layers(model, "other")["model.layers.0.mlp.down_proj"].merge(safe_merge=True, adapter_names=["other"])
    with pytest.raises(ValueError, match="nothing was merged"):
        model.merge_adapter(["other"], safe_merge=True)
    assert torch.equal(logits(model, ids), want)


# --- other layers, starts and sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_transformers_conv1d(init: str, tmp_path: Path) -> None:
    """Weights stored (in, out), as in GPT-2; square ones too, where a transpose could go unseen."""
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(12, 12)).double()
    x, plain = torch.randn(5, 8, dtype=torch.float64), copy.deepcopy(base)
    config = SokaConfig(r=2, target_modules=["0", "2"], init_soka_weights=init)  # type: ignore[arg-type]
    model = get_peft_model(base, config).eval()
    if init != "random":
        assert torch.equal(model(x), plain(x))
    perturb(model, 0.3)
    want, tensors = model(x), saved(model, tmp_path)
    turned = {"0.weight": plain[0].weight.T, "2.weight": plain[2].weight.T}
    oracle = copy.deepcopy(plain)
    dense = oracle_weights(turned, tensors)
    for name in ("0", "2"):
        oracle.get_submodule(name).weight.data = dense[f"{name}.weight"].T.contiguous()
    assert torch.allclose(want, oracle(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(want, plain(x), atol=1e-2)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), want, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model(x), want)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))(x), want)
    with pytest.raises(CheckpointError, match=r"fan_in_fan_out: .*PEFT only"):
        read_adapter(tmp_path)


def test_a_module_of_the_base_may_have_a_name_like_a_part(tmp_path: Path) -> None:
    base = nn.ModuleDict({"lin": nn.Linear(6, 6), "soka_left": nn.Linear(6, 6), "soka_head": nn.Linear(6, 6)})
    model = get_peft_model(copy.deepcopy(base), SokaConfig(target_modules=["lin"], modules_to_save=["soka_head"]))
    assert not model.base_model.model["soka_left"].weight.requires_grad
    perturb(model)
    tensors = saved(model, tmp_path)
    assert not any("soka_left.weight" in key for key in tensors)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    want, got = model.state_dict(), again.state_dict()
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_fused_experts_are_refused_or_named(caplog: pytest.LogCaptureFixture) -> None:
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.ones(4, 6, 3))
    model = nn.ModuleDict({"experts": experts, "q_proj": nn.Linear(6, 6)})
    with pytest.raises(ValueError, match=r"experts of a mixture in one tensor cannot.*experts\.gate_up_proj"):
        get_peft_model(model, SokaConfig(target_modules=["gate_up_proj"]))
    with pytest.raises(ValueError, match=r"experts: a Module cannot be adapted, only torch\.nn\.Linear"):
        get_peft_model(model, SokaConfig(target_modules=["experts"]))
    with caplog.at_level("WARNING"):
        get_peft_model(model, SokaConfig(target_modules=["gate_up_proj", "q_proj"]))
    assert "cannot be adapted: experts.gate_up_proj" in caplog.text
    with pytest.raises(TypeError, match="unexpected keyword argument 'target_parameters'"):
        SokaConfig(target_parameters=["experts.gate_up_proj"])  # type: ignore[call-arg]


def test_a_random_start_has_an_effect_and_is_never_the_same() -> None:
    ids = tokens()
    one, other = all_projections("random"), all_projections("random")
    model = get_peft_model(tiny_llama(), one).eval()
    model.add_adapter("other", other)
    made = [logits(model, ids)]
    model.set_adapter("other")
    made.append(logits(model, ids))
    assert not close(made[0], logits(tiny_llama(), ids))
    assert not close(made[0], made[1])


def test_dropout_is_for_training_only() -> None:
    ids, model = tokens(), trained("random", soka_dropout=0.5)
    want = logits(model, ids)
    assert torch.equal(logits(model, ids), want)
    model.train()
    torch.manual_seed(0)
    first = logits(model, ids)
    assert not close(first, want)
    assert not close(logits(model, ids), first)
    torch.manual_seed(0)
    assert torch.equal(logits(model, ids), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    mean = torch.stack([soka_layers(model)[_Q](torch.ones(1, 64)).detach() for _ in range(2000)]).mean(0)
    model.eval()
    assert torch.allclose(mean, soka_layers(model)[_Q](torch.ones(1, 64)), atol=0.15), "inputs are scaled up"


_Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("weights", [[0.5, -2.0], [1.0, 1.0]])
def test_a_weighted_sum_of_adapters_is_exact(weights: list[float], tmp_path: Path) -> None:
    ids, model = tokens(), trained("weights")
    model.add_adapter(
        "other", all_projections("random", target_modules=["q_proj", "down_proj"], soka_modules=_only("q_", "down_"))
    )
    model.base_model.add_weighted_adapter(["default", "other"], weights, "sum")
    model.set_adapter("sum")
    ours = logits(model, ids)
    folders = [saved(model, tmp_path / name, name) for name in ("default", "other")]
    assert close(ours, oracle_sum(tiny_llama(), zip(weights, folders, strict=True), ids))
    assert not close(ours, logits(tiny_llama(), ids))
    model.save_pretrained(str(tmp_path / "sum"), selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "sum" / "sum")), ids), ours)
    assert set(read_adapter(tmp_path / "sum" / "sum").factors) == set(spread(tiny_llama()))


def _only(*starts: str) -> dict[str, Any]:
    return {name: spec for name, spec in spread(tiny_llama()).items() if name.rpartition(".")[2].startswith(starts)}


def test_a_sum_that_cannot_be_is_refused(two: PeftModel) -> None:
    add = two.base_model.add_weighted_adapter
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        add(["default", "nobody"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match=r"v_proj: the adapters have different factor shapes"):
        add(["default", "other"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="1 adapters, but 2 weights"):
        add(["default"], [1.0, 1.0], "sum")
    assert set(two.peft_config) == {"default", "other"}


@pytest.mark.parametrize("pruned", [False, True])
def test_one_adapter_of_several_ranks_scaled(pruned: bool) -> None:
    """Also where its ranks are not those that were asked for."""
    options: dict[str, Any] = {"r": 2, "target_modules": ["0", "1"], "init_soka_weights": "random"}
    options |= {} if pruned else {"rank_pattern": {"1": 1}}
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), SokaConfig(**options))
    if pruned:
        drop_terms(model, {"1": [0]})
    want = {name: layer.get_delta_weight("default") / 2 for name, layer in soka_layers(model).items()}
    model.base_model.add_weighted_adapter(["default"], [0.5], "scaled")
    for name, layer in soka_layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("scaled"), want[name])


def test_more_terms_than_a_delta_can_have_are_recompressed() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), SokaConfig(r=4, target_modules=["0"], shape=[2, 2, 2, 2]))
    model.add_adapter("b", SokaConfig(r=3, target_modules=["0"], shape=[2, 2, 2, 2], init_soka_weights="random"))
    perturb(model, 0.5)
    (layer,) = soka_layers(model).values()
    want = 2 * layer.get_delta_weight("default") + layer.get_delta_weight("b")
    model.base_model.add_weighted_adapter(["default", "b"], [2.0, 1.0], "sum")
    assert layer.spec("sum")["rank"] == 4
    assert torch.allclose(layer.get_delta_weight("sum"), want, atol=1e-5)


# --- together with other methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["ours", "other"])
def test_a_mixed_model(first: str) -> None:
    ids = tokens()
    configs = {
        "ours": SokaConfig(r=2, target_modules=["q_proj", "down_proj"], init_soka_weights="random"),
        "other": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    }
    second = "other" if first == "ours" else "ours"
    model: Any = get_peft_model(tiny_llama(), configs[first], adapter_name=first, mixed=True).eval()
    model.add_adapter(second, configs[second])
    model.set_adapter([first, second])
    both = logits(model, ids)
    alone = {}
    for name in configs:
        model.set_adapter(name)
        alone[name] = logits(model, ids)
        assert not close(alone[name], logits(tiny_llama(), ids))
        assert not close(alone[name], both)
    model.set_adapter([first, second])
    assert torch.equal(logits(model, ids), both)
    model.base_model.merge_adapter()
    assert close(logits(model, ids), both)
    model.base_model.unmerge_adapter()
    assert close(logits(model, ids), both), "what the other method merged on the same layer was kept"
    for name in configs:
        model.set_adapter(name)
        assert close(logits(model, ids), alone[name])
    model.set_adapter([first, second])
    assert close(logits(model.merge_and_unload(), ids), both)


def test_a_soka_adapter_loads_into_a_mixed_model(tmp_path: Path) -> None:
    ids, model = tokens(), trained()
    want = logits(model, ids)
    model.save_pretrained(str(tmp_path))
    mixed = peft.PeftMixedModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert torch.equal(logits(mixed, ids), want)


# --- in place of a loaded adapter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["weights", "zero"])
@pytest.mark.parametrize("new", ["weights", "random"])
def test_hotswap(old: str, new: str, tmp_path: Path) -> None:
    ids, incoming = tokens(), trained(new, seed=5, soka_modules={}, r=3)
    want = logits(incoming, ids)
    incoming.save_pretrained(str(tmp_path))
    model = trained(old)
    parameter = soka_layers(model)[_Q].soka_left["default"]
    assert not close(logits(model, ids), want)
    hotswap_adapter(model, str(tmp_path))
    assert torch.equal(logits(model, ids), want)
    assert soka_layers(model)[_Q].soka_left["default"] is parameter
    tensors = saved(model, tmp_path / "again")
    assert close(want, oracle_logits(tiny_llama(), tensors, ids))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "again")), ids), want)


def test_hotswap_refuses_before_it_changes_anything(tmp_path: Path) -> None:
    ids, model = tokens(), trained()
    want = logits(model, ids)
    trained(target_modules=["q_proj"], soka_modules={}).save_pretrained(str(tmp_path / "fewer"))
    with pytest.raises(ValueError, match=r"other modules: .*down_proj"):
        hotswap_adapter(model, str(tmp_path / "fewer"))
    trained().save_pretrained(str(tmp_path / "broken"))
    file = tmp_path / "broken" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{_Q}.soka_sigma"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="q_proj: soka_sigma has values that are not finite"):
        hotswap_adapter(model, str(tmp_path / "broken"))
    with pytest.raises(ValueError, match="no SoKA adapter 'nobody'"):
        hotswap_adapter(model, str(tmp_path / "broken"), "nobody")
    assert torch.equal(logits(model, ids), want)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, str(tmp_path / "broken"))


@pytest.mark.parametrize("with_head", [False, True])
def test_hotswap_refuses_other_whole_modules(tmp_path: Path, with_head: bool) -> None:
    whole = {"modules_to_save": ["lm_head"]}
    ids, model = tokens(), trained("weights", **({} if with_head else whole))
    trained("weights", **(whole if with_head else {})).save_pretrained(str(tmp_path))
    want = logits(model, ids)
    with pytest.raises(ValueError, match=r"lm_head.* in modules_to_save|in modules_to_save, and .*lm_head"):
        hotswap_adapter(model, str(tmp_path))
    assert torch.equal(logits(model, ids), want)


HEAD = "base_model.model.lm_head.weight"
OTHER_HEADS: list[tuple[str, Callable[[dict[str, Tensor]], object]]] = [
    (rf"{HEAD}: missing", lambda tensors: tensors.pop(HEAD)),
    (rf"{HEAD} is \(3, 32\), expected", lambda tensors: tensors.update({HEAD: torch.zeros(3, 32)})),
    (r"lm_hat\.weight: there is no such tensor", lambda tensors: tensors.update({"lm_hat.weight": torch.zeros(3)})),
]


@pytest.mark.parametrize(("message", "spoil"), OTHER_HEADS)
def test_hotswap_refuses_tensors_of_whole_modules_that_do_not_fit(
    tmp_path: Path, message: str, spoil: Callable[[dict[str, Tensor]], object]
) -> None:
    ids, model = tokens(), trained("weights", modules_to_save=["lm_head"])
    want = logits(model, ids)
    incoming = trained("weights", seed=5, modules_to_save=["lm_head"])
    incoming.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    spoilt = dict(tensors)
    spoil(spoilt)
    save_file(spoilt, file)
    with pytest.raises(CheckpointError, match=message):
        hotswap_adapter(model, str(tmp_path))
    assert torch.equal(logits(model, ids), want)
    save_file(tensors, file)
    hotswap_adapter(model, str(tmp_path))
    assert torch.equal(logits(model, ids), logits(incoming, ids))


# --- `adapter_names`: each row of a batch with its own adapter --------------------------------------------------------

ROWS = ["default", "__base__", "other", "default", "other"]


def test_each_row_of_a_batch_has_its_adapter(two: PeftModel, tmp_path: Path) -> None:
    ids = tokens(rows=5)
    mixed = two(input_ids=ids, adapter_names=ROWS).logits
    folders = {name: saved(two, tmp_path / name, name) for name in ("default", "other")}
    base = logits(tiny_llama(), ids)
    for row, name in enumerate(ROWS):
        one = ids[row : row + 1]
        oracle = oracle_logits(tiny_llama(), folders.get(name, {}), one)
        assert close(mixed[row : row + 1], oracle), row
        assert close(mixed[row : row + 1], base[row : row + 1]) == (name == "__base__"), row
    assert two.active_adapters == ["default"]
    assert close(two(input_ids=ids).logits, oracle_logits(tiny_llama(), folders["default"], ids)), "no hook is left"


def test_mixed_batches_are_differentiable(two: PeftModel) -> None:
    ids = tokens(rows=2)
    two.set_adapter("default")
    two(input_ids=ids, adapter_names=["default", "__base__"]).logits.sum().backward()
    for layer in soka_layers(two).values():
        assert layer.soka_sigma["default"].grad is not None
    two.zero_grad()


def test_mixed_batches_generate_with_beams(two: PeftModel) -> None:
    ids = tokens(rows=3, length=4)
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    rows = ["other", "__base__", "default"]
    mixed = two.generate(input_ids=ids, adapter_names=rows, **options)
    for row, name in enumerate(rows):
        if name == "__base__":
            with two.disable_adapter():
                want = two.generate(input_ids=ids[row : row + 1], **options)
        else:
            two.set_adapter(name)
            want = two.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(mixed[row, : want.shape[1]], want[0]), name
    two.set_adapter("default")


def test_mixed_batches_are_checked(two: PeftModel) -> None:
    ids = tokens(rows=2)
    with pytest.raises(ValueError, match=r"non-existing adapter.*defualt"):
        two(input_ids=ids, adapter_names=["defualt", "__base__"])
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same.*3 and 2"):
        two(input_ids=ids, adapter_names=["default"] * 3)
    with pytest.raises(TypeError, match="expected a list"):
        two(input_ids=ids, adapter_names="default")
    merged = copy.deepcopy(two)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        merged(input_ids=ids, adapter_names=["default", "__base__"])
    training = copy.deepcopy(two).train()
    with pytest.raises(ValueError, match="in training mode"):
        training(input_ids=ids, adapter_names=["default", "__base__"])
    with two.disable_adapter():
        assert torch.equal(two(input_ids=ids, adapter_names=["default", "other"]).logits, logits(tiny_llama(), ids))
