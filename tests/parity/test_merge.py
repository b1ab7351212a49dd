"""Merged weights and exports against float64 and against PEFT's own, on real tiny checkpoints."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import soka_serve.peft  # noqa: F401 - registers SOKA
from soka_serve.adapter.export import export
from soka_serve.adapter.format import read_adapter
from soka_serve.compiler.merge.merge import merge
from soka_serve.io.lockfile import read_lock
from soka_serve.io.safetensors import read_header
from soka_serve.kron import Factors
from soka_serve.peft import build_soka_model
from tests.support.kron_oracle import oracle_delta
from tests.support.tiny_models import all_factors, random_factors, write_base, write_test_adapter

ULP = 0.51  # one rounding, in every dtype
IDS = torch.arange(24).reshape(2, 12)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def check_weights(base: Path, merged: Path, deltas: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    before, after = weights(base), weights(merged)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        got = after[name]
        assert got.dtype == dtype
        module = name.removesuffix(".weight")
        if module not in deltas:
            assert torch.equal(got, weight.to(dtype))
            continue
        want = weight.double() + deltas[module]
        size = torch.maximum(want.abs(), weight.double().abs()).clamp_min(torch.finfo(dtype).tiny)
        assert float(((got.double() - want).abs() / (torch.finfo(dtype).eps * size)).max()) <= ULP
        assert not torch.equal(got.double(), weight.double())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_is_base_plus_delta_and_what_peft_makes(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    base = write_base(tmp_path / "base", dtype=dtype, tied=tied)
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    result = merge(adapter, base=base, out=tmp_path / "merged", progress=False)
    assert result.verified == ("tensors", "logits")
    check_weights(base, tmp_path / "merged", {n: oracle_delta(f) for n, f in all_factors().items()}, dtype)

    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert ours.dtype == dtype
    assert (ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()) == tied
    alone = original(IDS).logits
    with torch.no_grad():
        peft_model = PeftModel.from_pretrained(original, adapter)
        theirs = peft_model.merge_and_unload()
    # PEFT sums a float32 delta in float32; in bfloat16 what counts is the last rounding.
    most = 1.01 if dtype == torch.bfloat16 else 32.0
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        size = torch.maximum(mine.abs(), other.abs()).double() + oracle_size(name)
        assert float(((mine.double() - other.double()).abs() / (torch.finfo(dtype).eps * size)).max()) <= most, name
    with torch.no_grad():
        effect = (ours(IDS).logits - alone).abs().max()
        apart = (ours(IDS).logits - theirs(IDS).logits).abs().max()
    assert effect > 1
    assert apart <= (1e-4 if dtype == torch.float32 else 0.25)


def oracle_size(name: str) -> torch.Tensor | float:
    """The magnitude of the delta, which bounds the rounding where W + delta almost cancels."""
    factors = all_factors().get(name.removesuffix(".weight"))
    return 0.0 if factors is None else oracle_delta(factors).abs()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_can_change(tmp_path: Path, before: torch.dtype, after: torch.dtype) -> None:
    base = write_base(tmp_path / "base", dtype=before)
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    name = str(after).removeprefix("torch.")
    merge(adapter, base=base, out=tmp_path / "merged", dtype=name, verify="tensors", progress=False)  # type: ignore[arg-type]
    check_weights(base, tmp_path / "merged", {n: oracle_delta(f) for n, f in all_factors().items()}, after)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == name
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(tmp_path / "merged").values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == after


def test_dtype_changes_the_order_of_the_data(tmp_path: Path) -> None:
    """Integers keep their dtype and move before the narrower floats; the base is hashed in its own order."""
    base = write_base(tmp_path / "base", dtype=torch.float32, shard="10GB")
    file = base / "model.safetensors"
    count = torch.arange(5, dtype=torch.int32)
    save_file({**load_file(file), "zz.count": count}, file, metadata={"format": "pt"})
    assert list(read_header(file))[-1] == "zz.count"
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    merge(adapter, base=base, out=tmp_path / "merged", dtype="bfloat16", verify="tensors", progress=False)
    merged = tmp_path / "merged" / file.name
    assert next(iter(read_header(merged))) == "zz.count"
    after = load_file(merged)
    assert torch.equal(after.pop("zz.count"), count)
    save_file({n: t for n, t in load_file(file).items() if n != "zz.count"}, file, metadata={"format": "pt"})
    save_file(after, merged, metadata={"format": "pt"})
    check_weights(base, tmp_path / "merged", {n: oracle_delta(f) for n, f in all_factors().items()}, torch.bfloat16)
    expected, written = (read_lock(tmp_path / d / "soka.lock")["base"] for d in ("adapter", "merged"))
    assert written["sha256"] == expected["sha256"]


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    """Different modules, ranks and factor shapes; a negative weight; one rounding for all of them."""
    base = write_base(tmp_path / "base")
    generator = torch.Generator().manual_seed(5)
    odd = "model.layers.0.mlp.gate_proj"  # (96, 64)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sets = [
        all_factors(seed=1),
        all_factors(seed=2, layers=1),
        {odd: Factors(randn(2, 1, 8), randn(2, 96, 8), torch.ones(2))},
        {odd: Factors(randn(1, 96, 64), randn(1, 1, 1), torch.ones(1))},
    ]
    amounts = [1.0, -0.5, 0.25, 0.1]
    paths = [write_test_adapter(tmp_path / f"a{i}", s, base=base) for i, s in enumerate(sets)]
    result = merge(list(zip(paths, amounts, strict=True)), base=base, out=tmp_path / "merged", progress=False)
    assert result.verified == ("tensors",)
    deltas: dict[str, torch.Tensor] = {}
    for factors, amount in zip(sets, amounts, strict=True):
        for name, f in factors.items():
            deltas[name] = deltas.get(name, torch.zeros(())) + amount * oracle_delta(f)
    check_weights(base, tmp_path / "merged", deltas, torch.bfloat16)


@pytest.mark.parametrize("way", ["page cache", "direct", "no O_DIRECT", "refused later"])
def test_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """Blocks smaller than a row of Left, of a row, of several rows, and not a divisor of anything."""
    direct: list[Path] = []
    real = os.open

    def watched(path: Path, flags: int, *mode: int, **options: Any) -> int:
        if flags & os.O_DIRECT:
            if way == "no O_DIRECT":
                raise OSError(errno.EINVAL, "Invalid argument", str(path))
            direct.append(path)
        return real(path, flags, *mode, **options)

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        if way == "refused later" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, data, offset)

    written = os.pwrite
    monkeypatch.setattr("soka_serve.compiler.merge.files.os.pwrite", refusing)
    if way != "page cache":  # as with little memory; 8 KiB are less than the file, and no multiple of anything in it
        monkeypatch.setattr("soka_serve.compiler.merge.layout.MergeLayout.fits_memory", lambda layout: False)
        monkeypatch.setattr("soka_serve.compiler.merge.files._DIRECT_BYTES", 8192)
    monkeypatch.setattr("soka_serve.compiler.merge.files.os.open", watched)
    base = write_base(tmp_path / "base", dtype=torch.float32, shard="10GB")
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    deltas = {n: oracle_delta(f) for n, f in all_factors().items()}
    caplog.set_level(logging.INFO)
    for values in (1, 64 * 3, 64 * 8, 64 * 27, 1 << 20):
        monkeypatch.setattr("soka_serve.compiler.merge.stream._BLOCK_VALUES", values)
        monkeypatch.setattr("soka_serve.compiler.merge.stream._COPY_BYTES", values * 5 + 1)
        for hashed in (True, False):
            merge(
                adapter, base=base, out=tmp_path / "merged", verify=False, allow_other_base=not hashed, progress=False
            )
            check_weights(base, tmp_path / "merged", deltas, torch.float32)
    has_none = "the file system has no O_DIRECT" in caplog.text
    if way in ("direct", "refused later") and has_none:
        pytest.skip("the file system of the temporary folder has no O_DIRECT")
    assert (bool(direct), has_none) == (way in ("direct", "refused later"), way == "no O_DIRECT")
    assert ("the file system refuses O_DIRECT" in caplog.text) == (way == "refused later")


def test_a_training_checkpoint_counts_with_trained_minus_initial(tmp_path: Path) -> None:
    """Trained and initial terms are large and almost cancel, as they do with init = 'weights'."""
    base = write_base(tmp_path / "base", dtype=torch.float32)
    name = "model.layers.1.self_attn.q_proj"
    start = random_factors(64, 64, 4, 3, scale=2.0)
    model = build_soka_model(AutoModelForCausalLM.from_pretrained(base), {name: start}, initial=True)
    change = torch.randn(start.left.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "soka_left" in key and parameter.requires_grad:
                parameter += change
    model.save_pretrained(tmp_path / "checkpoint")
    merge(tmp_path / "checkpoint", base=base, out=tmp_path / "merged", progress=False)
    trained = Factors(start.left + change, start.right, start.sigma)
    delta = oracle_delta(trained) - oracle_delta(start)
    assert 1e-4 < float(delta.abs().max()) < 1
    check_weights(base, tmp_path / "merged", {name: delta}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_independent_acceptance_check(tmp_path: Path, root: Path, dtype: torch.dtype) -> None:
    script = root.parent / "shared" / "accept" / "check_adapter.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    base = write_base(tmp_path / "base", dtype=dtype)
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    merge(adapter, base=base, out=tmp_path / "merged", progress=False)
    command = [sys.executable, script, "--base", base, "--adapter", adapter, "--merged"]
    found, wrong = (
        subprocess.run([*command, merged], capture_output=True, text=True, check=False)
        for merged in (tmp_path / "merged", base)
    )
    assert found.returncode == 0, found.stdout + found.stderr
    said = json.loads(found.stdout.splitlines()[-1])
    assert said["modules"] == len(all_factors())
    assert said["parameters"] == sum(f.parameters for f in all_factors().values())
    assert wrong.returncode == 1


# --- exports: the same delta with fewer terms, and the best LoRA ------------------------------------------------------


def deltas_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: oracle_delta(f) for name, f in read_adapter(directory).factors.items()}


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits.double(), -1)


def test_finished_adapter_keeps_its_delta(tmp_path: Path) -> None:
    """Linearly dependent terms are merged; nothing else changes."""
    factors = all_factors()
    name = "model.layers.0.mlp.up_proj"
    f = factors[name]
    factors[name] = Factors(
        torch.cat([f.left, f.left]), torch.cat([f.right, f.right]), torch.cat([f.sigma, 2 * f.sigma])
    )
    source = write_test_adapter(tmp_path / "source", factors)
    result = export(source, tmp_path / "out")
    after = read_adapter(tmp_path / "out")
    assert after.factors[name].rank == f.rank
    assert not after.initial
    for module, delta in deltas_of(tmp_path / "out").items():
        want = oracle_delta(factors[module])
        assert float((delta - want).norm() / want.norm()) < 1e-6
        sigma = after.factors[module].sigma
        assert torch.equal(sigma, sigma.sort(descending=True).values)
    assert result.dropped_energy_frac < 1e-12
    assert "lost        0% of the deltas' energy" in result.to_text()
    assert (tmp_path / "out" / "README.md").read_text() == "# test\n"


def test_training_checkpoint_becomes_trained_minus_initial(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.float32)
    name = "model.layers.1.self_attn.v_proj"
    start = random_factors(32, 64, 3, 3, scale=0.5)
    model = build_soka_model(AutoModelForCausalLM.from_pretrained(base), {name: start}, initial=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
        trained = torch.log_softmax(model(input_ids=IDS).logits.double(), -1)
    model.save_pretrained(tmp_path / "checkpoint")
    checkpoint = read_adapter(tmp_path / "checkpoint")
    delta = oracle_delta(checkpoint.factors[name]) - oracle_delta(checkpoint.initial[name])
    result = export(tmp_path / "checkpoint", tmp_path / "out")
    after = read_adapter(tmp_path / "out")
    assert not after.initial
    assert after.factors[name].rank <= 6
    assert float((oracle_delta(after.factors[name]) - delta).norm() / delta.norm()) < 1e-5
    assert result.dropped_energy_frac < 1e-10
    assert float((logits(base, tmp_path / "out") - trained).abs().max()) < 1e-4
    assert float((logits(base) - trained).abs().max()) > 0.1
    lock = (tmp_path / "out" / "soka.lock").read_text()
    assert "source_is_checkpoint = true" in lock


@pytest.mark.parametrize("rank", [1, 2])
def test_cut_terms_are_the_reported_energy(tmp_path: Path, rank: int) -> None:
    source = write_test_adapter(tmp_path / "source")
    result = export(source, tmp_path / "out", rank=rank)
    assert result.ranks == (rank, rank)
    check_energy(tmp_path / "out", result.dropped_energy_frac, result.by_module)
    assert result.dropped_energy_frac > 0.05


def check_energy(out: Path, total: float, by_module: dict[str, float]) -> None:
    want = {n: oracle_delta(f) for n, f in all_factors().items()}
    got = deltas_of(out)
    lost = {n: float((want[n] - got[n]).square().sum()) for n in want}
    energy = {n: float(d.square().sum()) for n, d in want.items()}
    assert total == pytest.approx(sum(lost.values()) / sum(energy.values()), rel=1e-4)
    assert by_module == pytest.approx({n: lost[n] / energy[n] for n in want}, rel=1e-4)


def test_rounding_counts_as_loss(tmp_path: Path) -> None:
    source = write_test_adapter(tmp_path / "source")
    result = export(source, tmp_path / "out", dtype="bfloat16")
    assert 1e-8 < result.dropped_energy_frac < 1e-4
    check_energy(tmp_path / "out", result.dropped_energy_frac, result.by_module)


def test_lora_of_full_rank_is_the_adapter(tmp_path: Path) -> None:
    """Through PEFT's real LoRA; modules of fewer dimensions than the rank are padded."""
    base = write_base(tmp_path / "base", dtype=torch.float32)
    source = write_test_adapter(tmp_path / "source", base=base)
    result = export(source, tmp_path / "lora", to="lora", rank=64)
    assert result.dropped_energy_frac < 1e-10
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 64, 64)
    assert {p.name for p in (tmp_path / "lora").iterdir()} == {p.name for p in source.iterdir()}
    ours, theirs, alone = logits(base, source), logits(base, tmp_path / "lora"), logits(base)
    assert float((ours - theirs).abs().max()) < 1e-3
    assert float((ours - alone).abs().max()) > 1


@pytest.mark.parametrize("rank", [1, 8])
def test_lora_of_low_rank_is_the_best_one(tmp_path: Path, rank: int) -> None:
    base = write_base(tmp_path / "base", dtype=torch.float32)
    source = write_test_adapter(tmp_path / "source", base=base)
    result = export(source, tmp_path / "lora", to="lora", rank=rank)
    assert result.ranks == (rank, rank)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    lost = energy = 0.0
    for name, factors in all_factors().items():
        delta = oracle_delta(factors)
        sigma = torch.linalg.svdvals(delta)
        got = model.base_model.model.get_submodule(name).get_delta_weight("default").double()
        here = float((got - delta).square().sum())
        assert here == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-4)
        assert result.by_module[name] == pytest.approx(here / float(sigma.square().sum()), rel=1e-4)
        lost, energy = lost + here, energy + float(sigma.square().sum())
    assert result.dropped_energy_frac == pytest.approx(lost / energy, rel=1e-4)
    assert 0.1 < result.dropped_energy_frac < 1
    assert f"{result.dropped_energy_frac:.2%} of the" in (tmp_path / "lora" / "README.md").read_text()
