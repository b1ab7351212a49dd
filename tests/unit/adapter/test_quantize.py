"""Adapters that add to a base in bits: what says so is kept, or the adapter is refused where it would be lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel

import soka_serve.peft
from soka_serve.adapter.combine import combine
from soka_serve.adapter.export import export
from soka_serve.adapter.format import AdapterBase, read_adapter, write_adapter
from soka_serve.adapter.given import open_given
from soka_serve.adapter.inspect import inspect
from soka_serve.base.base import Base
from soka_serve.base.target_modules import resolve_targets
from soka_serve.builtin import base_directory
from soka_serve.compiler.merge.merge import merge
from soka_serve.compiler.plan.given import check_base
from soka_serve.errors import CheckpointError, PlanError, SokaError
from soka_serve.io.budget import ReadingBudget
from soka_serve.manifest.read import parse_manifest
from soka_serve.peft.errors import FitError
from soka_serve.serving.command import ServeOptions
from soka_serve.serving.serve import plan_launch
from soka_vllm.readers import look_at
from tests.support.peft_models import tiny_llama
from tests.support.tiny_models import random_factors

NAME = "model.layers.0.self_attn.q_proj"
ALLOW = "SOKA_ALLOW_OTHER_BASE"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(ALLOW, raising=False)


def write(folder: Path, quantize: str | None = "4bit", seed: int = 0) -> Path:
    base = AdapterBase(str(base_directory()), quantize)
    write_adapter(folder, {NAME: random_factors(128, 128, 2, seed)}, base_model=base)
    return folder


def test_the_mark_is_kept_and_shown(tmp_path: Path) -> None:
    marked, plain = write(tmp_path / "marked"), write(tmp_path / "plain", None)
    assert (read_adapter(marked).quantize, read_adapter(plain).quantize) == ("4bit", None)
    assert "soka_quantize" not in json.loads((plain / "adapter_config.json").read_text())
    assert "4bit" in str(inspect(marked).facts["adds to"])
    assert "adds to" not in inspect(plain).facts
    combine([(marked, 0.5), (write(tmp_path / "other", seed=1), 0.5)], tmp_path / "sum")
    export(marked, tmp_path / "again", rank=1)
    assert [read_adapter(tmp_path / name).quantize for name in ("sum", "again")] == ["4bit", "4bit"]


@pytest.mark.parametrize("value", ["3bit", "", None, 4, ["4bit"]])
def test_other_values_are_refused(tmp_path: Path, value: object) -> None:
    file = write(tmp_path / "a") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"soka_quantize": value}))
    with pytest.raises(CheckpointError, match="soka_quantize must be '4bit' or '8bit'"):
        read_adapter(tmp_path / "a")


def test_where_it_would_be_lost_it_is_refused(tmp_path: Path) -> None:
    marked, plain = write(tmp_path / "marked"), write(tmp_path / "plain", None)
    with pytest.raises(SokaError, match="adds to a base in 4bit, which a LoRA cannot say"):
        export(marked, tmp_path / "lora", to="lora", rank=2)
    for unlike in ([(marked, 1.0), (plain, 1.0)], [(plain, 1.0), (marked, 1.0)]):
        with pytest.raises(CheckpointError, match="a base's own weights"):
            combine(unlike, tmp_path / "sum", allow_other_base=True)
        with pytest.raises(CheckpointError, match="a base's own weights"):
            merge(unlike, base="tiny", out=tmp_path / "merged", allow_other_base=True)
    assert not any((tmp_path / name).exists() for name in ("lora", "sum", "merged"))


def test_it_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    marked = write(tmp_path / "marked")
    with pytest.raises(SokaError, match="adds to its base in 4bit") as caught:
        plan_launch([str(marked)], ServeOptions())
    assert "soka-serve merge" in str(caught.value.hint)
    with pytest.raises(ValueError, match="adds to its base in 4bit"):
        look_at(marked, "SOKA", ReadingBudget())
    monkeypatch.setenv(ALLOW, "1")
    assert plan_launch([str(marked)], ServeOptions())
    assert "weights that the adapters do not add to" in caplog.text
    look_at(marked, "SOKA", ReadingBudget())


def test_peft_refuses_it_on_plain_weights(tmp_path: Path) -> None:
    model = tiny_llama()
    name = "model.layers.0.self_attn.q_proj"
    weight = model.get_submodule(name).weight
    factors = {name: random_factors(*weight.shape, 2, 0)}
    write_adapter(tmp_path / "a", factors, base_model=AdapterBase("x", "8bit"))
    with pytest.raises(FitError, match=r"adds to a base in 8bit .*the layer is not quantised"):
        PeftModel.from_pretrained(model, str(tmp_path / "a"))
    write_adapter(tmp_path / "plain", factors, base_model="x")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain"))
    with pytest.raises(FitError, match="adds to a base in 8bit"):
        soka_serve.peft.hotswap_adapter(loaded, str(tmp_path / "a"))


# ----------------------------------------------------------------------------------------------------------- manifests

TRAIN = '[train]\nsteps = 1\ndata = { builtin = "math" }\n'


def test_manifests_need_the_bits() -> None:
    text = f'schema = 1\n[base]\nbuiltin = "tiny"\n[[adapt]]\n[[adapt]]\ninit = "quantisation"\n{TRAIN}'
    with pytest.raises(SokaError, match=r"6:1.*init = 'quantisation' needs base.quantize = '4bit' or '8bit'"):
        parse_manifest(text, "m.toml")
    assert parse_manifest(text.replace('"tiny"', '"tiny"\nquantize = "8bit"'), "m.toml")


@pytest.mark.parametrize(("bits", "ok"), [("4bit", True), ("8bit", False), ("none", False)])
def test_training_goes_on_from_it_on_such_a_base_alone(tmp_path: Path, bits: str, ok: bool) -> None:
    given = open_given(write(tmp_path / "marked"))
    text = f'schema = 1\n[base]\nbuiltin = "tiny"\nquantize = "{bits}"\n[[adapt]]\ninit = "adapter"\nadapter = "a"\n'
    manifest = parse_manifest(text + TRAIN, "m.toml")
    assert resolve_targets(manifest, Base(base_directory()).layout.modules)
    if ok:
        check_base({"a": given}, "", manifest, str)
        return
    with pytest.raises(PlanError, match=f"adds to a base in 4bit; base.quantize is '{bits}'"):
        check_base({"a": given}, "", manifest, str)
