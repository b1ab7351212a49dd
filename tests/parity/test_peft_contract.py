"""What PEFT's users rely on beyond the mathematics: names, configs, mixed batches, renamed models, safe merges."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soka_serve.adapter import read_adapter
from soka_serve.errors import CheckpointError, PlanError, SokaError
from soka_serve.peft import SokaConfig, drop_terms, hotswap_adapter, soka_layers
from tests.peft_models import logits, oracle_logits, oracle_weights, perturb, spread, tiny_llama, tokens
from tests.tolerances import TOLERANCE

INITS = ("weights", "zero", "random")


def soka(init: Any = "weights", **options: Any) -> SokaConfig:
    base = tiny_llama()
    options = {"soka_modules": spread(base), "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return SokaConfig(init_soka_weights=init, **options)


def trained(init: Any = "weights", seed: int = 2, **options: Any) -> PeftModel:
    model: PeftModel = get_peft_model(tiny_llama(), soka(init, **options)).eval()
    perturb(model, 0.2, seed)
    return model


def close(ours: Tensor, oracle: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    rtol, atol = TOLERANCE[dtype]
    return torch.allclose(ours.double(), oracle.double(), rtol=4 * rtol, atol=4 * atol * float(oracle.abs().max()))


def saved(model: PeftModel, folder: Path, adapter: str = "default") -> dict[str, Tensor]:
    model.save_pretrained(str(folder), selected_adapters=[adapter])
    return load_file((folder if adapter == "default" else folder / adapter) / "adapter_model.safetensors")


# --- one adapter copied onto another by the names of its parameters --------------------------------------------------


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
    model.add_adapter("other", soka("weights", r=1))
    for name in ("default", "other"):
        model.set_adapter(name)
        model.set_requires_grad(name, True)
        trainable = {key for key, value in model.named_parameters() if value.requires_grad}
        assert trainable
        assert all(f".{name}." in key and "_initial" not in key for key in trainable)


def test_the_file_s_names_have_no_adapter_in_them(tmp_path: Path) -> None:
    tensors = saved(trained(target_modules=["q_proj"], soka_modules={}), tmp_path)
    assert {key.rpartition(".")[2] for key in tensors} == {
        f"soka_{part}{kind}" for part in ("left", "right", "sigma") for kind in ("", "_initial")
    }
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())).isdisjoint(
        {"rank_pattern", "soka_dropout", "fan_in_fan_out"}
    ), "older readers refuse keys that they do not know"
    assert set(read_adapter(tmp_path).initial) == set(read_adapter(tmp_path).factors)


# --- the config --------------------------------------------------------------------------------------------------------


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


# --- dtypes and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_autocast_adapter_dtype(init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ids = tokens()
    model = get_peft_model(tiny_llama(dtype), soka(init), autocast_adapter_dtype=False).eval()
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
    empty = peft.inject_adapter_in_model(soka(init), tiny_llama(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in empty.named_parameters() if "soka_" in n} == {"meta"}
    peft.set_peft_model_state_dict(empty, tensors, low_cpu_mem_usage=True)
    assert torch.equal(logits(empty, ids), want)
    assert not close(want, logits(tiny_llama(), ids))


def test_a_start_from_the_weights_needs_memory() -> None:
    with pytest.raises(SokaError, match="low_cpu_mem_usage = True gives none"):
        get_peft_model(tiny_llama(), soka(), low_cpu_mem_usage=True)


def test_a_finished_adapter_fits_a_model_that_has_initial_factors(tmp_path: Path) -> None:
    ids, model = tokens(), trained("random")
    want, tensors = logits(model, ids), saved(model, tmp_path)
    other = get_peft_model(tiny_llama(), soka("weights")).eval()
    peft.set_peft_model_state_dict(other, tensors)
    assert torch.equal(logits(other, ids), want)
    assert not saved(other, tmp_path / "again").keys() ^ tensors.keys()


# --- mixed batches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> PeftModel:
    """Two adapters, of which the second leaves most layers alone."""
    model = trained()
    model.add_adapter("other", SokaConfig(r=2, target_modules=["v_proj", "down_proj"], init_soka_weights="random"))
    return model.eval()


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
    with pytest.raises(ValueError, match="non-existing adapter.*defualt"):
        two(input_ids=ids, adapter_names=["defualt", "__base__"])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same.*3 and 2"):
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


# --- models whose modules were renamed ---------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x)) + x  # type: ignore[no-any-return]


class _Model(nn.Module):
    def __init__(self, *path: str, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner: nn.Module = nn.ModuleDict({"layers": nn.ModuleList([_Block() for _ in range(layers)])})
        for name in reversed(path):
            inner = nn.ModuleDict({name: inner})
        self.model, self.path = inner, path

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.model
        for name in self.path:
            inner = inner[name]
        for block in inner["layers"]:
            x = block(x)
        return x


@pytest.mark.parametrize("targets", ["short", "full"])
@pytest.mark.parametrize("way", ["_checkpoint_conversion_mapping", "key_mapping", "keys renamed by hand"])
def test_an_adapter_loads_into_a_renamed_model(way: str, targets: str, tmp_path: Path) -> None:
    names = ["attn"] if targets == "short" else ["model.layers.0.attn", "model.layers.1.attn"]
    config = SokaConfig(r=2, target_modules=names, soka_modules={"model.layers.1.attn": {"shape": [6, 2, 2, 6]}})
    model = get_peft_model(_Model(), config)
    perturb(model, 0.3)
    x = torch.randn(3, 12)
    want, before = model(x), _Model()(x)
    model.save_pretrained(str(tmp_path))
    renamed, options = _Model("language_model"), {}
    if way == "_checkpoint_conversion_mapping":
        renamed._checkpoint_conversion_mapping = {"^model": "model.language_model"}
    elif way == "key_mapping":
        options["key_mapping"] = {r"^model\.": "model.language_model."}
    else:
        file = tmp_path / "adapter_model.safetensors"
        save_file(
            {k.replace("model.layers", "model.language_model.layers"): v for k, v in load_file(file).items()}, file
        )
    loaded = PeftModel.from_pretrained(renamed, str(tmp_path), **options)
    assert torch.allclose(loaded(x), want, atol=1e-6)
    assert not torch.allclose(want, before, atol=1e-2)
    assert set(loaded.peft_config["default"].soka_modules) == {f"model.language_model.layers.{i}.attn" for i in (0, 1)}


def test_targets_and_the_file_decide_where_no_name_is_known(tmp_path: Path) -> None:
    config = SokaConfig(r=2, target_modules=["attn"], shape=[6, 2, 2, 6])
    model = get_peft_model(_Model(), config)
    perturb(model, 0.3)
    x = torch.randn(3, 12)
    want = model(x)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    spec = json.loads(file.read_text())
    spec["soka_modules"] = {k.replace("layers", "h"): v for k, v in spec["soka_modules"].items()}
    file.write_text(json.dumps({**spec, "shape": "balanced", "r": 1}))
    loaded = PeftModel.from_pretrained(_Model(), str(tmp_path))
    assert torch.allclose(loaded(x), want, atol=1e-6)


def test_a_renamed_model_that_lacks_layers_is_refused(tmp_path: Path) -> None:
    get_peft_model(_Model(), SokaConfig(target_modules=["attn"])).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"the config does not name|missing|does not name"):
        PeftModel.from_pretrained(_Model("language_model", layers=1), str(tmp_path))


def test_transformers_own_loading(tmp_path: Path) -> None:
    """`model.load_adapter` has its own renaming of keys."""
    ids, model = tokens(), trained()
    want = logits(model, ids)
    model.save_pretrained(str(tmp_path))
    base = tiny_llama()
    report = base.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(base, ids), want)
    assert not close(want, logits(tiny_llama(), ids))
    assert set(base.get_adapter_state_dict()) == {
        key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")
    }


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_is_injected_from_its_tensors(init: str, tmp_path: Path) -> None:
    ids, model = tokens(), trained(init)
    want, tensors = logits(model, ids), saved(model, tmp_path)
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    config = SokaConfig(target_modules=["q_proj"], init_soka_weights=init)
    with pytest.warns(RuntimeWarning, match="The state_dict contained these additional target modules"):
        injected = peft.inject_adapter_in_model(config, tiny_llama(), state_dict=tensors)
    peft.set_peft_model_state_dict(injected, tensors)
    assert torch.equal(logits(injected, ids), want)


# --- merging -----------------------------------------------------------------------------------------------------------


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


# --- other layers, starts and sums -------------------------------------------------------------------------------------


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
    dense = oracle_weights(nn.ParameterDict(), tensors) if not turned else _dense(turned, tensors)
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


def _dense(weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    class Holder:
        def state_dict(self) -> dict[str, Tensor]:
            return weights

    return oracle_weights(Holder(), tensors)  # type: ignore[arg-type]


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


def test_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="embed_tokens: a Embedding cannot be adapted, only torch.nn.Linear"):
        get_peft_model(tiny_llama(), SokaConfig(target_modules=["embed_tokens", "q_proj"]))


def test_a_random_start_has_an_effect_and_is_never_the_same() -> None:
    ids = tokens()
    one, other = soka("random"), soka("random")
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
        "other", soka("random", target_modules=["q_proj", "down_proj"], soka_modules=_only("q_", "down_"))
    )
    model.base_model.add_weighted_adapter(["default", "other"], weights, "sum")
    model.set_adapter("sum")
    ours = logits(model, ids)
    start = {name: value.double() for name, value in tiny_llama().state_dict().items()}
    total = dict(start)
    for name, weight in zip(("default", "other"), weights, strict=True):
        for key, value in oracle_weights(tiny_llama(), saved(model, tmp_path / name, name)).items():
            total[key] = total[key] + weight * (value - start[key])
    oracle = tiny_llama(torch.float64)
    oracle.load_state_dict(total)
    assert close(ours, logits(oracle, ids))
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


def test_more_terms_than_a_delta_can_have_are_recompressed() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), SokaConfig(r=4, target_modules=["0"], shape=[2, 2, 2, 2]))
    model.add_adapter("b", SokaConfig(r=3, target_modules=["0"], shape=[2, 2, 2, 2], init_soka_weights="random"))
    perturb(model, 0.5)
    (layer,) = soka_layers(model).values()
    want = 2 * layer.get_delta_weight("default") + layer.get_delta_weight("b")
    model.base_model.add_weighted_adapter(["default", "b"], [2.0, 1.0], "sum")
    assert layer.spec("sum")["rank"] == 4
    assert torch.allclose(layer.get_delta_weight("sum"), want, atol=1e-5)


# --- together with other methods ---------------------------------------------------------------------------------------


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


# --- in place of a loaded adapter --------------------------------------------------------------------------------------


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
