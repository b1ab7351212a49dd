"""Inspect: every kind of directory, and numbers that agree with torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from soka_serve.adapter.export import export
from soka_serve.adapter.inspect import inspect
from soka_serve.base.base import Base
from soka_serve.compiler.merge.merge import merge
from soka_serve.errors import CheckpointError
from soka_serve.kron import dense_delta
from soka_serve.kron.intruders import count_intruders
from tests.support.kron_oracle import oracle_delta
from tests.support.tiny_models import all_factors, random_factors, small_config, write_base, write_test_adapter

Spoil = Callable[[dict[str, torch.Tensor]], object]
NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    factors = all_factors()
    adapter = write_test_adapter(tmp_path / "adapter", factors, dtype=dtype)
    found = inspect(adapter)
    assert found.kind == "adapter"
    assert [m.module for m in found.modules] == sorted(factors)
    for module in found.modules:
        kept = factors[module.module].to(dtype).to(torch.float32)
        assert module.delta_norm == pytest.approx(float(oracle_delta(kept).norm()), rel=1e-6)
        assert module.sigma == pytest.approx(kept.sigma.tolist())
        assert (module.rank, module.factor_shape) == (kept.rank, tuple(kept.shape))
        assert module.parameters == kept.parameters
    assert found.facts["parameters"] == sum(f.parameters for f in factors.values())
    assert found.facts["bytes"] == int(str(found.facts["parameters"])) * dtype.itemsize
    text = found.to_text()
    assert f"{NAME} " in text
    assert "64x96" in text
    assert "seed  0" in text
    assert json.loads(json.dumps(found.to_json()))["modules"][0]["module"] == min(factors)


def test_layers_are_counted_not_spelt(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2, 10)]
    adapter = write_test_adapter(tmp_path / "a", {n: random_factors(64, 64, 1, 0) for n in names})
    assert [m.module for m in inspect(adapter).modules] == names


def test_exported_terms_have_unit_factors(tmp_path: Path) -> None:
    export(write_test_adapter(tmp_path / "a"), tmp_path / "out")
    for module in inspect(tmp_path / "out").modules:
        assert module.term_norms == pytest.approx(module.sigma, rel=1e-5)


def test_training_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from soka_serve.adapter.format import read_adapter
    from soka_serve.peft import build_soka_model

    base = write_base(tmp_path / "base", dtype=torch.float32)
    model = build_soka_model(
        AutoModelForCausalLM.from_pretrained(base), {NAME: random_factors(64, 96, 2, 0)}, initial=True
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    model.save_pretrained(tmp_path / "checkpoint")
    found = inspect(tmp_path / "checkpoint")
    assert found.kind == "training checkpoint"
    assert "frozen" in str(found.facts["initial factors"])
    checkpoint = read_adapter(tmp_path / "checkpoint")
    delta = oracle_delta(checkpoint.factors[NAME]) - oracle_delta(checkpoint.initial[NAME])
    assert found.modules[0].delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)


def test_lora(tmp_path: Path) -> None:
    source = write_test_adapter(tmp_path / "a", {NAME: random_factors(64, 96, 2, 0)})
    export(source, tmp_path / "lora", to="lora", rank=64)
    (module,) = inspect(tmp_path / "lora").modules
    assert (module.rank, module.weight_shape, module.parameters) == (64, (64, 96), 64 * 160)
    assert module.delta_norm == pytest.approx(inspect(source).modules[0].delta_norm, rel=1e-4)
    assert "sigma" not in inspect(tmp_path / "lora").to_text()


def test_intruders_beside_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.float32)
    factors = {NAME: random_factors(64, 96, 2, 0, scale=2.0), NAME.replace("down", "up"): random_factors(96, 64, 1, 1)}
    adapter = write_test_adapter(tmp_path / "math" / "adapter", factors, base=base)
    export(adapter, tmp_path / "lora", to="lora", rank=64)
    merge(adapter, base=base, out=tmp_path / "merged", verify=False, progress=False)
    weights = Base(base).weights
    expected = {n: count_intruders(weights.read(n), weights.read(n) + dense_delta(f)) for n, f in factors.items()}
    assert expected[NAME] > 0
    for path in (adapter, tmp_path / "lora"):
        found = inspect(path, base=base)
        assert found.intruders == expected
        assert found.facts["intruder dimensions"] == f"{sum(expected.values())} in 1 of 2 modules"
        assert re.search(rf"^{NAME} +{expected[NAME]}$", found.to_text(), re.MULTILINE)
        assert found.to_json()["intruders"] == expected
    assert inspect(tmp_path / "math", base=base).parts[0].intruders == expected
    merged = inspect(tmp_path / "merged", base=base).intruders
    assert len(merged) == 14
    assert {n: c for n, c in merged.items() if c} == {n: c for n, c in expected.items() if c}
    assert not inspect(adapter).intruders


def test_intruders_are_not_counted_beside_what_is_not_the_base(tmp_path: Path) -> None:
    base, other = write_base(tmp_path / "base"), write_base(tmp_path / "other", seed=1)
    adapter = write_test_adapter(tmp_path / "a", {NAME: random_factors(64, 96, 2, 0)}, base=base)
    with pytest.raises(CheckpointError, match="made for base weights with sha256"):
        inspect(adapter, base=other)
    wide = write_test_adapter(tmp_path / "wide", {NAME: random_factors(96, 64, 2, 0)})
    with pytest.raises(CheckpointError, match=r"down_proj is \(96, 64\), the base's weight \(64, 96\)"):
        inspect(wide, base=base)
    export(adapter, tmp_path / "lora", to="lora", rank=64)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="a LoRA with use_dora"):
        inspect(tmp_path / "lora", base=base)
    with pytest.raises(CheckpointError, match="a safetensors file has no base"):
        inspect(adapter / "adapter_model.safetensors", base=base)


def _first_value_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(v for k, v in tensors.items() if "down_proj" in k)[0, 0] = float("nan")


def _three_rows_of_a(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({k: v[:3].contiguous() for k, v in tensors.items() if "lora_A" in k})


def test_models_beside_another_base_are_refused(tmp_path: Path) -> None:
    base, spoilt = (write_base(tmp_path / name, shard="1GB") for name in ("base", "spoilt"))
    _change(spoilt / "model.safetensors", _first_value_nan)
    with pytest.raises(CheckpointError, match="1 of 6144 values are NaN"):
        inspect(spoilt, base=base)
    LlamaForCausalLM(small_config(intermediate_size=48)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match=r"gate_proj is \(48, 64\), the base's weight \(96, 64\)"):
        inspect(tmp_path / "narrow", base=base)


def test_models_of_more_layers_than_the_base_are_refused(tmp_path: Path) -> None:
    base, deeper = write_base(tmp_path / "base"), write_base(tmp_path / "deeper")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="its projections are not those of"):
        inspect(deeper, base=base)


@pytest.mark.parametrize(
    ("config", "spoil", "said"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, None, "an update of weights that PEFT changed"),
        ({"target_parameters": ["experts"]}, None, "a LoRA with target_parameters"),
        ({"lora_alpha": None}, None, "lora_alpha must be a number, not None"),
        ({"lora_alpha": "x"}, None, "lora_alpha must be a number, not 'x'"),
        ({"peft_type": "VERA"}, None, "peft_type is 'VERA'"),
        ({}, _first_value_nan, "values are NaN"),
        ({}, _three_rows_of_a, "do not fit together"),
        ({}, lambda tensors: tensors.clear(), "a LoRA of no linear projection"),
    ],
)
def test_loras_that_are_no_update_of_the_base_are_refused(
    tmp_path: Path, config: dict[str, Any], spoil: Spoil | None, said: str
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_test_adapter(tmp_path / "a", {NAME: random_factors(64, 96, 2, 0)}, base=base)
    export(adapter, tmp_path / "lora", to="lora", rank=64)
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if spoil is not None:
        _change(tmp_path / "lora" / "adapter_model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=said):
        inspect(tmp_path / "lora", base=base)


def _change(file: Path, spoil: Spoil) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    spoil(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("shard", ["60KB", "1GB"])
def test_models(tmp_path: Path, shard: str) -> None:
    base = write_base(tmp_path / "base", shard=shard)
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    found = inspect(base)
    assert found.kind == "model"
    assert found.facts["layers"] == 2
    assert found.facts["kv heads"] == 1
    groups = {g.name: g for g in found.groups}
    up = groups["model.layers.*.mlp.up_proj.weight"]
    assert (up.count, up.shape, up.dtype, up.size_bytes) == (2, (96, 64), "BF16", 2 * 96 * 64 * 2)
    assert sum(g.parameters for g in found.groups) == found.facts["parameters"]
    assert "model.norm.weight" in groups
    merge(adapter, base=base, out=tmp_path / "merged", verify=False, progress=False)
    merged = inspect(tmp_path / "merged")
    assert merged.kind == "merged model"
    assert merged.groups == found.groups
    assert "adapters.adapter0.weight" in merged.to_text()


def test_build(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_test_adapter(tmp_path / "math" / "adapter", base=base)
    merge(adapter, base=base, out=tmp_path / "math" / "merged", verify=False, progress=False)
    (adapter / "soka.lock").rename(tmp_path / "math" / "soka.lock")
    (tmp_path / "math" / "report.html").touch()
    found = inspect(tmp_path / "math")
    assert found.kind == "build"
    assert [p.kind for p in found.parts] == ["adapter", "merged model"]
    assert "report.html" in str(found.facts["files"])
    text = found.to_text()
    assert text.count("Provenance") == 1
    assert "base.sha256" in text
    assert json.dumps(found.to_json())


def test_config_only_and_single_files(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text('{"num_hidden_layers": 32}')
    assert inspect(tmp_path / "c").kind == "config"
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor(1.0), "b.0.w": torch.zeros(2, 3), "b.1.w": torch.zeros(2, 3)}, file)
    found = inspect(file)
    assert found.facts["parameters"] == 13
    assert [(g.name, g.count) for g in found.groups] == [("a", 1), ("b.*.w", 2)]
    assert "scalar" in found.to_text()


def test_what_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        inspect(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither an adapter") as caught:
        inspect(tmp_path)
    assert "build/math" in str(caught.value.hint)


def test_damaged_adapter(tmp_path: Path) -> None:
    adapter = write_test_adapter(tmp_path / "a", {NAME: random_factors(64, 96, 2, 0)})
    file = adapter / "adapter_model.safetensors"
    key = f"base_model.model.{NAME}.soka_"
    good = {f"{key}left": torch.ones(2, 8, 8), f"{key}right": torch.ones(2, 8, 12), f"{key}sigma": torch.ones(2)}
    save_file({**good, f"{key}sigma": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match="do not fit together"):
        inspect(adapter)
    del good[f"{key}right"]
    save_file(good, file)
    with pytest.raises(CheckpointError, match=f"{NAME}: soka_right is missing"):
        inspect(adapter)
    file.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(adapter)
