"""Stage `init`: what is decomposed, which rank it gets, and what is kept."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import soka_serve
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.opened import Base
from soka_serve.base.targets import TargetModule, resolve_targets
from soka_serve.builtin import base_directory
from soka_serve.compiler.init.candidate import TargetStatistics
from soka_serve.compiler.init.initialise import InitRun, share_of
from soka_serve.compiler.init.result import Initialisation
from soka_serve.compiler.processes import Processes
from soka_serve.errors import BuildError, CheckpointError, PlanError, SokaError
from soka_serve.kron import dense_delta, kpsvd, stack_terms
from soka_serve.kron.output_weighting import OutputMoments
from soka_serve.kron.weighting import InputMoments
from soka_serve.manifest.schema import Manifest

QUERY = "model.layers.0.self_attn.q_proj"


def _targets(*rules: dict[str, Any], base: Path | None = None) -> list[TargetModule]:
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "base": {"builtin": "tiny"},
            "adapt": [{"calibration_batches": 0, **rule} for rule in rules],  # no data, if a rule asks for none
            "train": {"steps": 1, "data": {"builtin": "math"}},
        }
    )
    return resolve_targets(manifest, Base(base or base_directory()).layout.modules)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(base_directory())


def _start(base: Base, *rules: dict[str, Any], **options: Any) -> Initialisation:
    return _initialise(_targets(*rules), base, **options)


def _initialise(targets: list[TargetModule], base: Base, **options: Any) -> Initialisation:
    with TemporaryDirectory() as scratch:
        return InitRun(targets, base, Path(scratch), progress=False, **options).initialise()


def test_weights_are_the_principal_terms(base: Base) -> None:
    started = _start(base, {"modules": ["q_proj"], "rank": {"policy": "fixed", "rank": 3}})
    assert len(started.modules) == 4
    assert started.initial_modules == set(started.factors)
    module = started.modules[0]
    weight = base.checkpoint.read(f"{QUERY}.weight")
    best = kpsvd(weight, module.factor_shape, 3, algorithm="exact")
    torch.testing.assert_close(dense_delta(started.factors[QUERY]), dense_delta(best.factors), rtol=1e-4, atol=1e-5)
    assert module.total_energy == pytest.approx(float(weight.double().square().sum()))
    assert len(module.sigma) > 3, "the report shows what was cut off"


def test_policies_live_side_by_side(base: Base) -> None:
    budget = 3000
    started = _start(
        base,
        {"modules": ["q_proj"], "rank": {"policy": "fixed", "rank": 2}},
        {"modules": ["o_proj"], "rank": {"policy": "elbow", "max": 6}},
        {"modules": ["gate_proj", "up_proj"], "rank": {"policy": "budget", "parameters": budget}},
    )
    by_policy: dict[str, list[Any]] = {}
    for module in started.modules:
        by_policy.setdefault(module.policy, []).append(module)
    assert {m.rank for m in by_policy["fixed"]} == {2}
    assert all(1 <= m.rank <= 6 for m in by_policy["elbow"])
    spent = sum(m.parameters for m in by_policy["budget"])
    assert budget - by_policy["budget"][0].factor_shape.parameters(1) < spent <= budget
    assert {m.module for m in started.modules if m.rank} == set(started.factors)


def test_zero_starts_at_nothing_and_can_learn(base: Base) -> None:
    started = _start(base, {"modules": ["q_proj"], "init": "zero"})
    factors = started.factors[QUERY]
    assert not dense_delta(factors).any()
    assert factors.left.abs().min() > 0
    assert factors.sigma.min() > 0
    assert not started.initial_modules


def test_random_starts_at_the_size_of_the_weights_terms_and_is_subtracted(base: Base) -> None:
    started = _start(base, {"modules": ["q_proj"], "init": "random"})
    assert started.initial_modules == set(started.factors)
    module, factors = started.modules[0], started.factors[QUERY]
    size = dense_delta(factors).square().sum()
    assert float(size) == pytest.approx(module.total_energy / module.factor_shape.max_rank, rel=1e-4)
    assert not torch.equal(factors.left, started.factors["model.layers.1.self_attn.q_proj"].left)
    again, other = _start(base, {"init": "random"}), _start(base, {"init": "random"}, seed=1)
    torch.testing.assert_close(again.factors[QUERY].right, _start(base, {"init": "random"}).factors[QUERY].right)
    assert not torch.equal(again.factors[QUERY].right, other.factors[QUERY].right)


def test_auto_shapes_fit(base: Base) -> None:
    started = _start(base, {"modules": ["gate_proj"], "layers": [0], "shape": "auto", "rank": {"policy": "fixed"}})
    (module,) = started.modules
    m, n, p, q = module.factor_shape
    assert (m * p, n * q) == (module.out_features, module.in_features)


def test_gradient_follows_the_gradient(base: Base) -> None:
    targets = _targets({"modules": ["q_proj"], "layers": [0], "init": "gradient"})
    gradient = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    started = _initialise(targets, base, statistics=lambda asked: [TargetStatistics(t, gradient) for t in asked])
    got = dense_delta(started.factors[QUERY])
    best = dense_delta(kpsvd(gradient, started.modules[0].factor_shape, 1).factors)
    torch.testing.assert_close(got / got.norm(), best / best.norm(), rtol=1e-3, atol=1e-5)
    with pytest.raises(PlanError, match=r"gradient.*zero"):
        _initialise(targets, base, statistics=lambda asked: [TargetStatistics(t, torch.zeros(128, 128)) for t in asked])


@pytest.mark.parametrize("rank", [{"policy": "fixed", "rank": 2}, {"policy": "budget", "parameters": 1026}])
def test_outputs_weigh_the_decomposition(base: Base, rank: dict[str, Any]) -> None:
    rule = {"modules": ["q_proj"], "layers": [0], "calibration_batches": 1, "weighting": "both", "rank": rank}
    targets = _targets(rule)
    assert targets[0].shape is not None
    generator = torch.Generator().manual_seed(1)
    inputs, plain = (torch.randn(500, 128, generator=generator) for _ in range(2))
    gradients = plain * torch.logspace(-1.5, 0.5, 128)
    moments, outputs = InputMoments(128), OutputMoments(targets[0].shape)
    moments.accumulate(inputs)
    outputs.accumulate(gradients)
    weight = base.checkpoint.read(f"{QUERY}.weight").float()
    errors = []
    for given in (None, outputs):
        known = [TargetStatistics(targets[0], moments=moments, outputs=given)]
        rest = weight - dense_delta(_initialise(targets, base, statistics=lambda _, k=known: k).factors[QUERY])
        errors.append(float((gradients @ rest @ inputs.t()).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_shares_are_disjoint_and_complete_and_give_the_same(base: Base) -> None:
    targets = _targets({"rank": {"policy": "fixed", "rank": 1}})
    shares = [share_of(targets, i, 3) for i in range(3)]
    assert sorted(t.module.name for share in shares for t in share) == sorted(t.module.name for t in targets)
    alone = _initialise(targets, base)
    together = _in_threads(targets, base, 3)
    assert len(together) == 3
    for got in together:
        assert got.modules == alone.modules
        for name, factors in alone.factors.items():
            assert torch.equal(factors.left, got.factors[name].left)


def _in_threads(targets: list[TargetModule], base: Base, count: int) -> list[Initialisation]:
    """What each of several "processes" gets, which exchange their lists at a barrier."""
    barrier = threading.Barrier(count)
    rounds: list[dict[int, list[Any]]] = []

    class RankProcesses(Processes):
        def __init__(self, index: int) -> None:
            self.count, self.index, self._rounds = count, index, iter(range(9))

        def gather(self, items: list[Any]) -> list[Any]:
            number = next(self._rounds)
            if barrier.wait(60) == 0:
                rounds.append({})
            barrier.wait(60)
            rounds[number][self.index] = items
            barrier.wait(60)
            return [item for i in range(count) for item in rounds[number][i]]

    def run(index: int) -> Initialisation:
        return _initialise(targets, base, processes=RankProcesses(index))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_written_and_read_back(base: Base, tmp_path: Path) -> None:
    started = _start(base, {"modules": ["q_proj"]}, {"modules": ["v_proj"], "init": "zero"})
    started.write(tmp_path)
    again = Initialisation.read(tmp_path)
    assert again.modules == started.modules
    assert again.initial_modules == started.initial_modules
    for name, factors in started.factors.items():
        assert torch.equal(factors.right, again.factors[name].right)


def test_not_finite_weights_are_named(tmp_path: Path) -> None:
    for file in base_directory().iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{QUERY}.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{QUERY}.weight"):
        _initialise(_targets({"modules": ["q_proj"]}), Base(tmp_path))


@pytest.fixture
def finetuned(tmp_path: Path) -> Path:
    """The embedded base plus a delta of Kronecker rank two on the query projections."""
    directory = tmp_path / "tuned"
    directory.mkdir()
    for file in base_directory().iterdir():
        if file.is_file():
            (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("q_proj.weight")]:
        shape = _targets({"modules": ["q_proj"]})[0].shape
        assert shape is not None
        one = kpsvd(torch.randn(tensors[name].shape, generator=generator), shape, 2)
        tensors[name] = tensors[name] + 0.01 * dense_delta(one.factors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_extract_recovers_a_kronecker_delta(finetuned: Path, base: Base, tmp_path: Path) -> None:
    result = soka_serve.extract(
        finetuned, base="tiny", out=tmp_path / "adapter", rank=2, modules=["q_proj"], progress=False
    )
    assert result.kept_energy_frac == pytest.approx(1, abs=1e-4)
    from soka_serve.adapter.format import read_adapter

    adapter = read_adapter(tmp_path / "adapter")
    tuned = Checkpoint.open(finetuned)
    want = tuned.read(f"{QUERY}.weight") - base.checkpoint.read(f"{QUERY}.weight")
    torch.testing.assert_close(dense_delta(adapter.delta_factors(QUERY)), want, rtol=1e-3, atol=1e-5)
    assert want.abs().max() > 1e-4
    half = soka_serve.extract(
        finetuned, base="tiny", out=tmp_path / "adapter", rank=1, modules=["q_proj"], progress=False
    )
    assert half.kept_energy_frac < 0.95
    kept = soka_serve.extract(
        finetuned, base="tiny", out=tmp_path / "adapter", energy=0.99, modules=["q_proj"], progress=False
    )
    assert kept.ranks == (2, 2)


def test_extract_refuses_what_makes_no_sense(finetuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(SokaError, match="exactly one of"):
        soka_serve.extract(finetuned, base="tiny", out=out)
    with pytest.raises(SokaError, match="nothing to extract"):
        soka_serve.extract("tiny", base="tiny", out=out, rank=1, progress=False)
    with pytest.raises(SokaError, match="--shape"):
        soka_serve.extract(finetuned, base="tiny", out=out, rank=1, shape="1,2", progress=False)
    assert not out.exists()
    with pytest.raises(BuildError, match="would destroy"):
        soka_serve.extract(finetuned, base="tiny", out=finetuned, rank=1, progress=False)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is an extracted adapter.*thesis\.tex"):
        soka_serve.extract(finetuned, base="tiny", out=out, rank=1, progress=False)


def test_extract_says_when_max_rank_kept_it_from_the_energy(finetuned: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": "tiny", "out": tmp_path / "adapter", "modules": ["q_proj"], "progress": False}
    short = soka_serve.extract(finetuned, energy=0.99, max_rank=1, **options).to_text()
    assert "4 modules" in short
    assert "max_rank" in short
    assert "max_rank" not in soka_serve.extract(finetuned, energy=0.99, **options).to_text()


def test_delta_then_nothing_is_subtracted(finetuned: Path, base: Base) -> None:
    started = _start(
        base,
        {"modules": ["q_proj"], "init": "delta", "finetuned": "tuned", "rank": {"policy": "fixed", "rank": 2}},
        finetuned={"tuned": Base(finetuned)},
    )
    assert not started.initial_modules
    want = Checkpoint.open(finetuned).read(f"{QUERY}.weight") - base.checkpoint.read(f"{QUERY}.weight")
    torch.testing.assert_close(dense_delta(stack_terms(started.factors[QUERY])), want, rtol=1e-3, atol=1e-5)
