"""What is trained of the factors: the model, its file and its export against a float64 torch.kron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from soka_serve.adapter.export import export
from soka_serve.adapter.format import read_adapter
from soka_serve.adapter.given import open_given
from soka_serve.adapter.inspect import inspect
from soka_serve.errors import CheckpointError, PlanError
from soka_serve.kron import Factors
from soka_serve.peft import SokaConfig, create_soka_optimizer, drop_terms, soka_layers
from soka_serve.peft.errors import FitError
from soka_serve.peft.hotswap import hotswap_adapter
from tests.support.peft_models import (
    adapted,
    close,
    logits,
    perturb,
    steps,
    tiny_llama,
    tokens,
    trainable,
)

SUBSETS = [["sigma"], ["left"], ["right"], ["left", "sigma"], ["right", "sigma"]]
FORMS: list[dict[str, Any]] = [*({"train_factors": parts} for parts in SUBSETS), {"core": True}]
EXTRA: list[dict[str, Any]] = [{**form, "extra_terms": 2} for form in ({}, FORMS[0], {"core": True})]


def dense(left: Tensor, right: Tensor, sigma: Tensor) -> Tensor:
    """Float64, with torch.kron alone."""
    terms = zip(left.double(), right.double(), sigma.double(), strict=True)
    return torch.stack([s * torch.kron(a, b) for a, b, s in terms]).sum(0)


def direct(start: Factors, tensors: dict[str, Tensor], form: dict[str, Any]) -> Tensor:
    """The delta as its row defines it, from the stored tensors of one module and the factors at the start."""
    theta = dense(tensors["left"], tensors["right"], tensors["sigma"])
    if form.get("core"):
        core = torch.diag(tensors["sigma"].double()) + tensors["core"].double()
        left, right = tensors["left"].double(), tensors["right"].double()
        ranks = range(len(core))
        theta = torch.stack([core[j, k] * torch.kron(left[j], right[k]) for j in ranks for k in ranks]).sum(0)
    if form.get("extra_terms"):
        theta = theta + dense(tensors["extra_left"], tensors["extra_right"], tensors["extra_sigma"])
    return theta - dense(start.left, start.right, start.sigma)


def tensors_of(model: PeftModel) -> dict[str, dict[str, Tensor]]:
    """By module the tensors that are its own, without the initial ones."""
    return {
        name: {
            store.removeprefix("soka_"): parts["default"].detach().clone()
            for store, parts in layer.stores("default").items()
            if not store.endswith("_initial")
        }
        for name, layer in soka_layers(model).items()
    }


def oracle(start: dict[str, Factors], model: PeftModel, form: dict[str, Any], ids: Tensor) -> Tensor:
    base = tiny_llama(torch.float64)
    state = base.state_dict()
    base.load_state_dict(tiny_llama().state_dict())
    for name, tensors in tensors_of(model).items():
        state[f"{name}.weight"] += direct(start[name], tensors, form)
    return logits(base, ids)


def starts(model: PeftModel) -> dict[str, Factors]:
    return {
        name: Factors(
            *(
                t.detach().clone()
                for t in (layer.soka_left["default"], layer.soka_right["default"], layer.soka_sigma["default"])
            )
        )
        for name, layer in soka_layers(model).items()
    }


@pytest.mark.parametrize("form", [*FORMS, *EXTRA], ids=str)
def test_a_model_is_what_its_form_says(form: dict[str, Any], tmp_path: Path) -> None:
    """At step 0, away from it, saved and read back, exported with as many terms as were trained, and merged."""
    ids, base = tokens(), tiny_llama()
    model = adapted(soka_trained=form)
    before, start = logits(base, ids), starts(model)
    assert torch.equal(logits(model, ids), before)
    perturb(model, 0.2)
    after, expected = logits(model, ids), oracle(start, model, form, ids)
    assert close(after, expected)
    assert not close(before, expected, loosen=100)

    model.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "saved"), is_trainable=True)
    assert torch.equal(logits(again, ids), after)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    result = export(tmp_path / "saved", tmp_path / "out")
    assert result.dropped_energy_frac < 1e-12
    written, trained = read_adapter(tmp_path / "out"), soka_layers(model)
    most = {
        name: layer.form("default").served(layer.spec("default")["rank"], subtracted=True)
        for name, layer in trained.items()
    }
    assert {name: factors.rank for name, factors in written.factors.items()} == most
    assert {name: rank for name, (rank, _) in open_given(tmp_path / "saved").terms.items()} == most
    assert not load_file(tmp_path / "out" / "adapter_model.safetensors").keys() - {
        f"base_model.model.{n}.soka_{part}" for n in trained for part in ("left", "right", "sigma")
    }
    assert close(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")), ids), expected)
    assert close(logits(model.merge_and_unload(), ids), expected)


@pytest.mark.parametrize("form", [*FORMS, EXTRA[1]], ids=str)
def test_steps_change_what_is_trained_and_nothing_else(form: dict[str, Any]) -> None:
    model = adapted(soka_trained=form).train()
    ids, before = tokens(), {name: value.clone() for name, value in model.state_dict().items()}
    named = [n for n, p in model.named_parameters() if p.requires_grad]
    optimizer = create_soka_optimizer(model, lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    losses = steps(model, optimizer, [ids] * 4)
    assert losses[-1] < losses[0]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(named)


def test_factors_that_moved_and_are_not_trained_are_refused(tmp_path: Path) -> None:
    adapted(soka_trained={"core": True}).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("soka_left"))
    save_file(tensors | {key: tensors[key] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{key} differs from its initial one, and is not trained"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("parts", SUBSETS, ids=str)
def test_gradients_are_those_of_the_whole_difference(parts: Any) -> None:
    """Folded terms have the gradients that the parts have where everything is trained."""
    ids = tokens()
    whole = adapted(dtype=torch.float64)
    perturb(whole, 0.1)
    part = adapted(dtype=torch.float64, soka_trained={"train_factors": parts})
    frozen = [n for n, p in part.named_parameters() if not p.requires_grad and ".soka_" in n]
    with torch.no_grad():
        for layer, other in zip(soka_layers(part).values(), soka_layers(whole).values(), strict=True):
            values = other.theta("default")
            layer.set_factors("default", values, None)
            for name in layer.form("default").frozen:  # the same in both, as the form says
                layer.stores("default")[f"soka_{name}_initial"]["default"].copy_(getattr(values, name))
    assert frozen
    reference = adapted(dtype=torch.float64)
    with torch.no_grad():
        for mine, its in zip(soka_layers(reference).values(), soka_layers(part).values(), strict=True):
            mine.set_factors("default", its.theta("default"), its.initial("default"))
    for model in (part, reference):
        model(input_ids=ids, labels=ids).loss.backward()
    named = dict(reference.named_parameters())
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-9, atol=1e-12)


def test_modules_differ_and_everything_can_be_trained_again() -> None:
    config = SokaConfig(
        init_soka_weights="weights",
        target_modules=["q_proj"],
        soka_trained={"train_factors": ["sigma"]},
        soka_modules={"model.layers.0.self_attn.q_proj": {"trained": {}}},
    )
    model = get_peft_model(tiny_llama(), config)
    first, second = soka_layers(model).values()
    assert (first.form("default").choices, second.form("default").choices) == ({}, {"train_factors": ["sigma"]})
    assert len(trainable(model)) == 4
    model.set_adapter("default")  # which makes all tensors of an adapter trainable, in PEFT
    assert len(trainable(model)) == 4
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert len(trainable(model)) == 4


def test_a_config_used_twice_makes_the_same_adapter_twice() -> None:
    config = SokaConfig(
        init_soka_weights="weights",
        target_modules=["q_proj"],
        soka_trained={"train_factors": ["sigma"]},
        soka_modules={"model.layers.0.self_attn.q_proj": {"trained": {}}},
    )
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("second", config)
    for name in ("default", "second"):
        forms = [layer.form(name).choices for layer in soka_layers(model, name).values()]
        assert forms == [{}, {"train_factors": ["sigma"]}]


def test_what_no_module_takes_from_soka_trained_is_not_held_against_it() -> None:
    """With zeros at the start soka_trained may leave Right out where soka_modules says otherwise of every module."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    left: dict[str, Any] = {"train_factors": ["left"]}

    def config(*told: str) -> SokaConfig:
        modules = {name: {"trained": {"train_factors": ["right"]}} for name in told}
        return SokaConfig(target_modules=["q_proj"], soka_trained=left, soka_modules=modules)

    model = get_peft_model(tiny_llama(), config(*names))
    assert {tuple(layer.form("default").choices["train_factors"]) for layer in soka_layers(model).values()} == {
        ("right",)
    }
    base = tiny_llama()
    with pytest.raises(FitError, match=rf"{names[1]}: init_soka_weights = 'zero' .* and soka_trained does not train"):
        get_peft_model(base, config(names[0]))
    assert not soka_layers(base)


@pytest.mark.parametrize("form", [{"core": True}, {"train_factors": ["left"]}], ids=str)
def test_zeros_that_are_not_trained_are_refused(form: dict[str, Any]) -> None:
    with pytest.raises(FitError, match="starts right at zero, and soka_trained does not train it"):
        SokaConfig(init_soka_weights="zero", soka_trained=form)
    with pytest.raises(FitError, match=r"starts right at zero, and soka_modules\['a\.q_proj'\] does not train it"):
        SokaConfig(init_soka_weights="zero", soka_modules={"a.q_proj": {"trained": form}, "a.k_proj": {}})
    SokaConfig(init_soka_weights="zero", soka_trained={"train_factors": ["right"]})


def test_a_core_has_a_most(tmp_path: Path) -> None:
    form = {"core": True}
    with pytest.raises(FitError, match="soka_trained: core: takes 1024 terms at most, not 1025"):
        SokaConfig(init_soka_weights="weights", r=1025, soka_trained=form)
    model = get_peft_model(
        tiny_llama(), SokaConfig(init_soka_weights="weights", target_modules=["q_proj"], soka_trained=form)
    )
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"rank": 1', '"rank": 1025'))
    with pytest.raises(CheckpointError, match="trained: core: takes 1024 terms at most"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"train_factors": []}, "train_factors: expected some of left, right, sigma"),
        ({"train_factors": ["sigma", "sigma"]}, "each once"),
        ({"train_factors": "sigma"}, "train_factors: expected some of"),
        (
            {"train_factor": ["sigma"]},
            "unknown key 'train_factor'; this version reads train_factors, core",
        ),
        ({"extra_terms": -1}, "extra_terms: expected a whole number from 0 to 1024; got -1"),
        ({"extra_terms": 1025}, "extra_terms: expected a whole number from 0 to 1024; got 1025"),
        ({"core": 1}, "core: expected true or false; got 1"),
        (["sigma"], "expected an object"),
    ],
    ids=str,
)
def test_forms_that_cannot_be(form: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=words):
        SokaConfig(soka_trained=form)
    model = get_peft_model(tiny_llama(), SokaConfig(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["soka_modules"]["model.layers.0.self_attn.q_proj"]["trained"] = form
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        read_adapter(tmp_path)
    with pytest.raises(FitError, match=words):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_a_core_has_the_gradient_of_its_product() -> None:
    """Against autograd through Left, core and Right in float64."""
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 10, bias=False).double()
    config = SokaConfig(
        init_soka_weights="weights", r=3, target_modules=["0"], shape=[5, 4, 2, 3], soka_trained={"core": True}
    )
    model = get_peft_model(torch.nn.Sequential(base), config)
    (layer,) = soka_layers(model).values()
    perturb(model, 0.3)
    x, target = torch.randn(5, 12).double(), torch.randn(5, 10).double()
    ((model(x) - target) ** 2).sum().backward()
    (parameter,) = trainable(model)
    assert parameter is layer.soka_core["default"]
    core = parameter.detach().clone().requires_grad_()
    left, right = layer.soka_left["default"], layer.soka_right["default"]
    delta = torch.stack([core[j, k] * torch.kron(left[j], right[k]) for j in range(3) for k in range(3)]).sum(0)
    ((x @ (base.weight + delta).T - target) ** 2).sum().backward()
    assert core.grad.abs().min() > 0
    torch.testing.assert_close(parameter.grad, core.grad, rtol=1e-10, atol=1e-12)


def test_extra_terms_are_as_large_as_the_others() -> None:
    """Whose rates they have, so that a step of Right changes as much as one of the others' does."""
    config = SokaConfig(init_soka_weights="weights", r=3, target_modules=["q_proj"], soka_trained={"extra_terms": 2})
    for layer in soka_layers(get_peft_model(tiny_llama(), config)).values():
        for part in ("left", "sigma"):
            sizes = [
                float(getattr(layer, f"soka_{x}{part}")["default"].detach().square().mean().sqrt())
                for x in ("", "extra_")
            ]
            assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)


def test_a_core_moves_as_far_as_the_terms_that_it_has() -> None:
    """Its r x r entries move together: lr times sigma's size over the root of r x r terms and of the modules' root."""
    config = SokaConfig(init_soka_weights="weights", r=3, target_modules=["q_proj"], soka_trained={"core": True})
    model = get_peft_model(tiny_llama(), config)
    layers = list(soka_layers(model).values())
    groups = create_soka_optimizer(model, lr=0.3).param_groups
    rates = {id(group["params"][0]): group["lr"] for group in groups}
    for layer in layers:
        size = float(layer.soka_sigma["default"].square().mean().sqrt())
        found = rates[id(layer.soka_core["default"])]
        assert found == pytest.approx(0.3 * size / 3 / len(layers) ** 0.25)
    assert len(groups) == len(layers) == 2


def test_what_a_core_is_refused_for(tmp_path: Path) -> None:
    model = adapted(soka_trained={"core": True})
    name = next(iter(soka_layers(model)))
    with pytest.raises(PlanError, match="belongs to all terms; none can be dropped"):
        drop_terms(model, {name: [0]})
    model.save_pretrained(str(tmp_path))
    plain = adapted()
    before = logits(plain, tokens())
    with pytest.raises(FitError, match=r"an adapter in training, with .*soka_core"):
        hotswap_adapter(plain, str(tmp_path))
    assert torch.equal(logits(plain, tokens()), before)
    finished = export(tmp_path, tmp_path / "out")
    hotswap_adapter(model, str(finished.out))  # the form goes with the factors
    assert len(trainable(model)) == 3 * len(soka_layers(model))
    assert not any(layer.form("default").choices for layer in soka_layers(model).values())


def test_weighted_sums_and_inspect_read_adapters_in_training(tmp_path: Path) -> None:
    form = {"core": True}
    model = adapted(soka_trained=form)
    start = starts(model)
    perturb(model, 0.2)
    model.save_pretrained(str(tmp_path))
    expected = {name: direct(start[name], tensors, form) for name, tensors in tensors_of(model).items()}
    norms = {m.module: m.delta_norm for m in inspect(tmp_path).modules}
    assert norms == {n: pytest.approx(float(v.norm()), rel=1e-4) for n, v in expected.items()}
    model.base_model.add_weighted_adapter(["default"], [0.5], "summed")
    for name, layer in soka_layers(model, "summed").items():
        half = layer.get_delta_weight("summed").double()
        torch.testing.assert_close(half, 0.5 * expected[name], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_that_trained_more_does_not_fit_a_form_that_trains_less(tmp_path: Path) -> None:
    whole = adapted()
    perturb(whole, 0.1)
    tensors = get_peft_model_state_dict(whole)
    part = adapted(soka_trained={"train_factors": ["sigma"]})
    with pytest.raises(CheckpointError, match="soka_left differs from its initial one, and the adapter here does not"):
        set_peft_model_state_dict(part, tensors)
