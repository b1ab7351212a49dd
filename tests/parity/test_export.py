"""Exports: the same delta with fewer terms, and the best LoRA, held against float64 and against PEFT's own LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import soka_serve.peft  # noqa: F401 - registers SOKA
from soka_serve.adapter.export import export
from soka_serve.adapter.format import read_adapter
from soka_serve.kron import Factors
from soka_serve.peft import build_soka_model
from tests.support.tiny_models import all_factors, oracle_delta, random_factors, write_base, write_test_adapter

IDS = torch.arange(24).reshape(2, 12)


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
