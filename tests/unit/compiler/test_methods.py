"""Every method of the registry starts at the base, learns, has the parameters that it says; dtypes of merges."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from soka_serve.base.base import Base
from soka_serve.base.model import Dtype, load_base
from soka_serve.base.modules import Module
from soka_serve.builtin import base_directory
from soka_serve.comparison.plan import RunSpec
from soka_serve.comparison.preview import preview
from soka_serve.comparison.read import LoadedSuite, parse_suite
from soka_serve.comparison.run import measure_run
from soka_serve.compiler.methods import FULL, METHODS, DenseOutput, StartingPoint, in_manifests
from soka_serve.compiler.methods.lora import Lora
from soka_serve.io.safetensors import read_header
from soka_serve.kron import kpsvd
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.schema import Train
from soka_serve.peft import soka_layers

ADAPTERS = [name for name, method in METHODS.items() if not method.whole_model]
RANK = 2
SCALE = 3.0  # of the update, for the methods that have one


def modules() -> list[Module]:
    return [m for m in Base(base_directory()).layout.modules if m.projection in ("q_proj", "v_proj", "down_proj")]


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build(method: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = load_base(base_directory(), "float32")
    factors = {}
    if METHODS[method].kronecker:
        weights = model.state_dict()
        for m in modules():
            shape = balanced_shape(m.out_features, m.in_features)
            factors[m.name] = kpsvd(weights[f"{m.name}.weight"], shape, RANK).factors
    start = StartingPoint(
        targets=[m.name for m in modules()],
        rank=RANK,
        scale=SCALE,
        base_name=str(base_directory()),
        device=torch.device("cpu"),
        steps=10,
        initial_dir=folder / "initial",
        batches=lambda: [batch(1), batch(2)],
        factors=factors,
        initial=frozenset(factors),
    )
    return METHODS[method].build(model, start)


@pytest.mark.parametrize("method", ADAPTERS)
def test_it_starts_at_the_base_and_a_step_has_an_effect(method: str, tmp_path: Path) -> None:
    data = batch()
    with torch.no_grad():
        base = load_base(base_directory(), "float32")(**data).logits
    model = build(method, tmp_path).train()
    with torch.no_grad():
        start = model(**data).logits
    assert torch.allclose(start, base, atol=2e-3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    loss = model(**data).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**data)
    assert (after.logits - start).abs().max() > 1e-4
    assert after.loss < loss


@pytest.mark.parametrize("method", ADAPTERS)
def test_parameters_are_what_peft_counts(method: str, tmp_path: Path) -> None:
    count, _ = build(method, tmp_path).get_nb_trainable_parameters()
    assert sum(METHODS[method].parameters(m, RANK) for m in modules()) == count


def test_the_components_of_cdka_have_one_rate_and_a_fixed_factor(tmp_path: Path) -> None:
    model = build("cdka", tmp_path)
    for name, layer in soka_layers(model).items():
        out_features, in_features = layer.get_base_layer().weight.shape
        factors = layer.theta("default")
        assert factors.shape == (out_features // 2, 2, 2, in_features // 2), name
        assert torch.allclose(factors.sigma, torch.tensor(SCALE * RANK / math.sqrt(RANK * 2)))
    optimizer = METHODS["cdka"].optimizer(model, 0.5, 0.0)
    assert optimizer is not None
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_adalora_reallocates_its_ranks_from_the_callback(tmp_path: Path) -> None:
    model = build("adalora", tmp_path).train()
    (callback,) = METHODS["adalora"].callbacks()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def zero_scales() -> int:
        return sum(int((p == 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)

    for step in range(1, 11):
        model(**batch(step)).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(Any, SimpleNamespace(global_step=step), Any, model=model)  # type: ignore[arg-type]
        optimizer.zero_grad()
    # It began with three ranks a module and keeps two, wherever they are worth most.
    assert zero_scales() == len(modules())


def test_manifests_may_name_the_methods_that_the_registry_says() -> None:
    assert set(get_args(Train.model_fields["method"].annotation)) == set(in_manifests())


SUITE = """
schema = 1
name = "toy"
[base]
builtin = "tiny"
[train]
steps = 2
batch_size = 2
[protocol]
validation = 2
test = 2
max_new_tokens = 4
[[dataset]]
name = "math"
data = { builtin = "math", limit = 8 }
[[method]]
name = "mine"
method = "toy"
rank = 3
grid = { learning_rate = [1e-2], scale = [2.0] }
adapt = { modules = ["q_proj"] }
[[method]]
name = "cdka"
method = "cdka"
grid = { learning_rate = [1e-2], scale = [2.0] }
adapt = { modules = ["q_proj"] }
"""


class Toy(Lora):
    """LoRA of rank 1, whatever rank is asked for."""

    def parameters(self, module: Module, rank: int) -> int:
        return super().parameters(module, 1)

    def config(self, start: StartingPoint) -> Any:
        return super().config(replace(start, rank=1))


def test_a_further_method_is_a_class_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Toy("toy", "Toy"))
    suite = parse_suite(SUITE, "s.toml")
    loaded = LoadedSuite(suite, tmp_path / "s.toml", tmp_path, SUITE, "0" * 64)
    assert preview(loaded).parameters == dict.fromkeys(("mine", "cdka"), (counted := 4 * 2 * 128, counted))
    setting = (("learning_rate", 1e-2), ("scale", 2.0))
    other = measure_run(loaded, RunSpec("cdka", "math", "sweep", setting, 0, "j"), tmp_path)
    assert (other["status"], other["trainable_parameters"]) == ("done", counted)
    with monkeypatch.context() as patch:
        patch.setattr("soka_serve.comparison.run.answer_losses", lambda model, examples, collate: [math.nan] * 2)
        assert measure_run(loaded, RunSpec("cdka", "math", "sweep", setting, 0, "j"), tmp_path)["status"] == "diverged"
    record = measure_run(loaded, RunSpec("mine", "math", "final", setting, 0, "k"), tmp_path)
    assert record["status"] == "done"
    assert record["trainable_parameters"] == counted
    assert len(record["loss"]) == len(record["answer_loss"]) == 2
    assert record["adapter_bytes"] > 4 * counted


# --- dense models written from memory keep the dtypes of the base -----------------------------------------------------


WIDE = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The embedded base in bfloat16, with one weight, and a buffer that sorts first, in float32."""
    folder = tmp_path / "base"
    shutil.copytree(base_directory(), folder)
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    tensors[WIDE] = tensors[WIDE].float()
    tensors["a.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize(("dtype", "wide", "others"), [("auto", "F32", "BF16"), ("float16", "F16", "F16")])
def test_each_weight_keeps_its_own_dtype(tmp_path: Path, base: Path, dtype: Dtype, wide: str, others: str) -> None:
    FULL.merge(base_directory(), DenseOutput(Base(base), tmp_path / "out", dtype, "base", progress=False))
    written = read_header(tmp_path / "out" / "model.safetensors")
    assert written[WIDE].dtype == wide
    assert set(Counter(info.dtype for name, info in written.items() if name != WIDE)) == {others}
    expected = load_file(base_directory() / "model.safetensors")[WIDE]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[WIDE], expected.to(written[WIDE].torch_dtype))
