"""Combined adapters against float64 sums of `torch.kron`, and through PEFT and merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import soka_serve.peft  # noqa: F401 - registers SOKA
from soka_serve.adapter.combine import combine
from soka_serve.adapter.format import read_adapter
from soka_serve.adapter.inspect import inspect
from soka_serve.compiler.merge.merge import merge
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from tests.support.kron_oracle import draw_factors, oracle_delta, oracle_rearrangement
from tests.support.peft_models import close, logits, oracle_sum, saved, tiny_llama, tokens, trained
from tests.support.tiny_models import all_factors, write_base, write_test_adapter
from tests.support.tolerances import RELATIVE_ERROR, relative_error

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
WEIGHTS = (0.7, -1.25, 0.5)
SHAPE = FactorShape(8, 4, 8, 16)  # not square, so that no dimension is mistaken for another


def terms(seed: int, rank: int = 2, shape: FactorShape = SHAPE) -> Factors:
    return draw_factors(shape, rank, seed=seed, dtype=torch.float32, scale=0.1)


def clients(folder: Path) -> list[tuple[Path, float]]:
    """Three adapters: the second lacks a module, the third alone has another one."""
    modules = [{Q: terms(1), K: terms(2, 3)}, {Q: terms(3, 1)}, {Q: terms(5), K: terms(7, 1), "model.x": terms(9)}]
    paths = [write_test_adapter(folder / f"c{i}", found) for i, found in enumerate(modules)]
    return list(zip(paths, WEIGHTS, strict=True))


def oracle(chosen: list[tuple[Path, float]], module: str) -> Tensor:
    total = torch.zeros(64, 64, dtype=torch.float64)
    for path, weight in chosen:
        adapter = read_adapter(path)
        if module in adapter.factors:
            total += weight * oracle_delta(adapter.factors[module])
    return total


def test_all_terms_are_the_sum_itself(tmp_path: Path) -> None:
    chosen = clients(tmp_path)
    result = combine(chosen, tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    assert {name: f.rank for name, f in found.factors.items()} == {Q: 5, K: 4, "model.x": 2}
    for module, factors in found.factors.items():
        want = oracle(chosen, module)
        assert relative_error(oracle_delta(factors), want) < RELATIVE_ERROR[torch.float32]
        assert float(want.norm()) > 0.1
    one = read_adapter(chosen[0][0]).factors[K]
    torch.testing.assert_close(found.factors[K].left[:3], one.left, rtol=0, atol=0)  # as they were, bit for bit
    assert result.dropped_energy_frac < 1e-12
    assert (result.adapters, result.modules, result.ranks) == (3, 3, (2, 5))
    assert found.base_model == "tiny-test-base"
    assert inspect(tmp_path / "out").kind == "adapter"


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_keeps_the_best_terms_and_states_the_loss(tmp_path: Path, rank: int) -> None:
    chosen = clients(tmp_path)
    result = combine(chosen, tmp_path / "out", rank=rank)
    found = read_adapter(tmp_path / "out")
    lost = energy = 0.0
    for module, factors in found.factors.items():
        want = oracle(chosen, module)
        spectrum = torch.linalg.svdvals(oracle_rearrangement(want, SHAPE)).square()
        assert factors.rank == min(rank, int((spectrum > 1e-9 * spectrum[0]).sum()))
        share = float((oracle_delta(factors) - want).square().sum() / want.square().sum())
        assert share == pytest.approx(float(spectrum[rank:].sum() / spectrum.sum()), abs=1e-9)  # Eckart-Young
        assert result.by_module[module] == pytest.approx(share, abs=1e-12)
        lost, energy = lost + share * float(want.square().sum()), energy + float(want.square().sum())
    assert result.dropped_energy_frac == pytest.approx(lost / energy, abs=1e-12)
    assert result.dropped_energy_frac > 1e-3
    worst = max(result.by_module, key=lambda name: result.by_module[name])
    assert worst in result.to_text()


def test_more_terms_than_a_delta_can_have_lose_nothing(tmp_path: Path) -> None:
    shape = FactorShape(2, 1, 32, 64)
    paths = [write_test_adapter(tmp_path / f"c{i}", {Q: terms(10 * i, 2, shape)}) for i in range(3)]
    chosen = [(path, 1.0) for path in paths]
    result = combine(chosen, tmp_path / "out")
    factors = read_adapter(tmp_path / "out").factors[Q]
    assert factors.rank == 2
    assert relative_error(oracle_delta(factors), oracle(chosen, Q)) < RELATIVE_ERROR[torch.float32]
    assert result.dropped_energy_frac < 1e-12


def test_another_factor_shape_is_decomposed_in_the_first_ones(tmp_path: Path) -> None:
    first = write_test_adapter(tmp_path / "a", {Q: terms(1)})
    second = write_test_adapter(tmp_path / "b", {Q: terms(3, 2, FactorShape(4, 8, 16, 8))})
    chosen = [(first, 0.5), (second, 2.0)]
    result = combine(chosen, tmp_path / "out", rank=4)
    factors, want = read_adapter(tmp_path / "out").factors[Q], oracle(chosen, Q)
    assert (factors.rank, factors.shape) == (4, SHAPE)
    spectrum = torch.linalg.svdvals(oracle_rearrangement(want, SHAPE)).square()
    share = float((oracle_delta(factors) - want).square().sum() / want.square().sum())
    assert share == pytest.approx(float(spectrum[4:].sum() / spectrum.sum()), abs=1e-6)
    assert result.by_module[Q] == pytest.approx(share, abs=1e-9)


def test_training_checkpoints_count_with_what_they_learned(tmp_path: Path) -> None:
    """And PEFT computes with the combined adapter what it computes with the base plus both weighted deltas."""
    chosen: list[tuple[Path, float]] = []
    tensors: list[tuple[float, dict[str, Tensor]]] = []
    for seed, weight in ((2, 0.75), (5, -0.5)):
        model = trained(seed=seed)
        tensors.append((weight, saved(model, tmp_path / str(seed))))
        chosen.append((tmp_path / str(seed), weight))
    combine(chosen, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")).eval()
    want = oracle_sum(tiny_llama(), tensors, tokens())
    assert close(logits(loaded, tokens()), want)
    assert not close(logits(tiny_llama(), tokens()), want)


def test_merged_as_the_adapters_together(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.float32)
    chosen = [
        (write_test_adapter(tmp_path / f"c{i}", all_factors(rank=1 + i, seed=i), base=base), 0.5 + i) for i in range(2)
    ]
    combine(chosen, tmp_path / "out")
    merge(tmp_path / "out", base=base, out=tmp_path / "one", progress=False)  # checks the logits through PEFT
    merge(chosen, base=base, out=tmp_path / "two", progress=False, verify=False)
    (one, two), before = (
        ({k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()} for d in ("one", "two")),
        AutoModelForCausalLM.from_pretrained(base).state_dict(),
    )
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(weight, before[name]) for name, weight in one.items())
