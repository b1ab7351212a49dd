"""Stage `init`: what is decomposed, which rank it gets, and what is kept."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import soka_serve
from soka_serve.base.base import Base
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.target_modules import TargetModule, resolve_targets
from soka_serve.builtin import base_directory
from soka_serve.compiler.init.candidate import TargetStatistics
from soka_serve.compiler.init.initialise import InitRun, share_of
from soka_serve.compiler.init.result import Initialisation
from soka_serve.errors import BuildError, CheckpointError, PlanError, SokaError
from soka_serve.kron import Factors, dense_delta, kpsvd, stack_terms
from soka_serve.kron.factors import typical_entry
from soka_serve.kron.output_weighting import OutputMoments
from soka_serve.kron.shapes import FactorShape
from soka_serve.kron.weighting import InputMoments
from soka_serve.manifest.schema import Manifest
from tests.support import kron_oracle as oracle
from tests.support.ranks import as_processes

QUERY = "model.layers.0.self_attn.q_proj"


def _targets(*rules: dict[str, Any], base: Path | None = None) -> list[TargetModule]:
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "base": {"builtin": "tiny"},
            "adapt": [
                {"init": "weights", "calibration_batches": 0} | rule for rule in rules
            ],  # no data, if a rule asks for none
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
    best = dense_delta(kpsvd(weight, module.factor_shape, 3, algorithm="exact").factors)
    got = dense_delta(started.factors[QUERY])
    torch.testing.assert_close(got / got.norm(), best / best.norm(), rtol=1e-4, atol=1e-5)
    assert module.total_energy == pytest.approx(float(weight.double().square().sum()))
    assert len(module.sigma) > 3, "the report shows what was cut off"


def test_minor_components_are_the_smallest_terms(base: Base) -> None:
    rule = {"modules": ["q_proj"], "layers": [0], "rank": {"policy": "fixed", "rank": 3}}
    started = _start(base, rule | {"components": "minor"})
    (module,) = started.modules
    assert started.initial_modules == {QUERY}
    weight = base.checkpoint.read(f"{QUERY}.weight")
    everything = kpsvd(weight.double(), module.factor_shape, module.factor_shape.max_rank, algorithm="exact").factors
    tail = everything.terms(slice(everything.rank - 3, None))
    assert module.sigma == pytest.approx(tail.sigma.tolist(), rel=1e-4)
    assert (module.init, module.rank) == ("minor", 3)
    got, best = dense_delta(started.factors[QUERY]).double(), dense_delta(tail)
    torch.testing.assert_close(got / got.norm(), best / best.norm(), rtol=0, atol=1e-4)
    principal = dense_delta(_start(base, rule).factors[QUERY])
    assert abs(float((got * principal).sum())) < 1e-3 * float(got.norm() * principal.norm())
    assert float(got.norm()) == pytest.approx(float(principal.norm()), rel=1e-3), "the size is the rule's scale"


def test_cut_terms_are_the_smallest_and_as_large_as_they_are(base: Base) -> None:
    rule = {"modules": ["q_proj"], "layers": [0], "rank": {"policy": "fixed", "rank": 3}}
    started = _start(base, rule | {"init": "truncated"})
    assert not started.initial_modules
    weight = base.checkpoint.read(f"{QUERY}.weight").double()
    shape = started.modules[0].factor_shape
    left, sigma, right = np.linalg.svd(oracle.oracle_rearrangement(weight, shape).numpy(), full_matrices=False)
    tail = torch.from_numpy(left[:, -3:] * sigma[-3:] @ right[-3:])
    got = oracle.oracle_rearrangement(oracle.oracle_delta(started.cut[QUERY]), shape)
    assert float(tail.norm()) > 0
    assert float((got - tail).norm()) < 1e-3 * float(tail.norm())
    theta, zero = started.factors[QUERY], _start(base, rule | {"init": "zero"}).factors[QUERY]
    assert not theta.right.any()
    assert torch.equal(theta.left, zero.left)


def test_sampled_terms_start_a_module_and_count_what_they_capture(base: Base) -> None:
    rule = {"modules": ["q_proj"], "layers": [0], "init": "nystrom", "rank": {"policy": "fixed", "rank": 2}}
    started = _start(base, rule)
    (module,) = started.modules
    assert started.initial_modules == {QUERY}
    weight = base.checkpoint.read(f"{QUERY}.weight").double()
    theta = started.factors[QUERY]
    direction = dense_delta(theta).double()
    # Terms are orthogonal, so that the weight's share along their sum is what they capture together.
    captured = float((weight * direction).sum() / direction.norm()) ** 2
    assert captured == pytest.approx(sum(s * s for s in module.sigma[:2]), rel=1e-3)
    assert 0 < captured < sum(s * s for s in _start(base, rule | {"init": "weights"}).modules[0].sigma[:2])
    assert torch.equal(theta.left, _start(base, rule).factors[QUERY].left)
    assert not torch.equal(theta.left, _start(base, rule, seed=1).factors[QUERY].left)


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


@pytest.mark.parametrize(
    ("rank", "warns"),
    [
        ({"policy": "energy", "threshold": 0.9, "max": 2}, True),
        ({"policy": "budget", "parameters": 10**6, "max": 2}, True),
        ({"policy": "energy", "threshold": 0.01, "max": 2}, False),
        ({"policy": "fixed", "rank": 2}, False),
    ],
)
def test_a_policy_that_selects_nothing_warns(
    base: Base, caplog: pytest.LogCaptureFixture, rank: dict[str, Any], warns: bool
) -> None:
    _start(base, {"modules": ["q_proj"], "rank": rank})
    said = f"rank policy '{rank['policy']}' gave each of its 4 modules the most terms that it may, 2"
    assert (said in caplog.text) == warns
    assert ("WARNING" in caplog.text) == warns


def test_a_budget_goes_where_the_outputs_are_large(base: Base) -> None:
    """Of modules with alike inputs but for their size."""
    rank = {"policy": "budget", "parameters": 4000, "max": 8, "pool": 8}
    targets = _targets({"modules": ["q_proj"], "calibration_batches": 1, "rank": rank})
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))

    def statistics(asked: Any) -> Any:
        for target in asked:
            moments = InputMoments(128)
            moments.accumulate(x * (10.0 if target.module.layer == 2 else 1.0))
            yield TargetStatistics(target, moments=moments)

    started = _initialise(targets, base, statistics=statistics)
    ranks = {m.layer: m.rank for m in started.modules}
    assert ranks[2] == 8
    assert sum(ranks.values()) > 8
    weight = base.checkpoint.read("model.layers.2.self_attn.q_proj.weight")
    energies = {m.layer: m.total_energy for m in started.modules}
    assert energies[2] == pytest.approx(float((10 * x @ weight.t()).square().sum() / 512), rel=0.01)


def test_a_budgets_terms_are_fitted_together_as_fixed_ones_are(base: Base) -> None:
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 128)
    moments = InputMoments(128)
    moments.accumulate(x)
    found = []
    for rank in ({"policy": "budget", "parameters": 800, "max": 3}, {"policy": "fixed", "rank": 3}):
        targets = _targets({"modules": ["q_proj"], "layers": [0], "calibration_batches": 1, "rank": rank})
        known = lambda asked: [TargetStatistics(t, moments=moments) for t in asked]  # noqa: E731
        found.append(_initialise(targets, base, statistics=known))
    for part in ("left", "right", "sigma"):
        assert torch.equal(*(getattr(f.factors[QUERY], part) for f in found))
    assert len(found[0].modules[0].sigma) == 64, "the report shows the candidates of the budget"


def test_zero_starts_at_nothing_and_can_learn(base: Base) -> None:
    started = _start(base, {"modules": ["q_proj"], "init": "zero"})
    factors = started.factors[QUERY]
    assert not dense_delta(factors).any()
    assert factors.left.abs().min() > 0
    assert factors.sigma.min() > 0
    assert not started.initial_modules


def _sizes(tensor: torch.Tensor) -> torch.Tensor:
    """Root mean square of each term's entries."""
    return tensor.square().flatten(1).mean(1).sqrt()


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("rule", ["weights", "zero", "random"])
def test_entries_have_unit_rms_and_sigma_is_the_scale_times_the_weights(base: Base, rule: str, scale: float) -> None:
    rank = {"policy": "fixed", "rank": 3}
    started = _start(base, {"modules": ["down_proj"], "init": rule, "scale": scale, "rank": rank})
    for name, factors in started.factors.items():
        torch.testing.assert_close(_sizes(factors.left), torch.ones(3))
        torch.testing.assert_close(_sizes(factors.right), torch.full((3,), 0.0 if rule == "zero" else 1.0))
        typical = base.checkpoint.read(f"{name}.weight").square().mean().sqrt()
        torch.testing.assert_close(factors.sigma.square().mean().sqrt(), scale * typical)


@pytest.mark.parametrize("init", ["zero", "random"])
def test_nothing_is_decomposed_for_random_factors(base: Base, monkeypatch: pytest.MonkeyPatch, init: str) -> None:
    """Where a policy reads the spectrum, it is worked out; factors and ranks are the same either way."""
    whole = _start(base, {"modules": ["q_proj"], "init": init, "rank": {"policy": "energy", "threshold": 1, "max": 3}})
    assert all(len(m.sigma) > 3 and m.rank == 3 for m in whole.modules)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr("soka_serve.starts.start.Start.decompose", fail)
    rank = {"policy": "fixed", "rank": 3}
    started = _start(base, {"modules": ["q_proj"], "init": init, "rank": rank})
    assert all((m.sigma, m.rank, m.captured_frac()) == ((), 3, None) for m in started.modules)
    for name, factors in whole.factors.items():
        for part in ("left", "right", "sigma"):
            assert torch.equal(getattr(started.factors[name], part), getattr(factors, part))
    with pytest.raises(AssertionError, match="decomposed"):
        _start(base, {"modules": ["q_proj"], "init": "weights", "rank": rank})


def test_random_is_subtracted_and_follows_the_seed(base: Base) -> None:
    rules = {"modules": ["q_proj"], "init": "random"}
    started, again, other = _start(base, rules), _start(base, rules), _start(base, rules, seed=1)
    assert started.initial_modules == set(started.factors)
    assert not torch.equal(started.factors[QUERY].left, started.factors["model.layers.1.self_attn.q_proj"].left)
    assert torch.equal(started.factors[QUERY].right, again.factors[QUERY].right)
    assert not torch.equal(started.factors[QUERY].right, other.factors[QUERY].right)


def test_a_weight_of_zeros_starts_as_one_that_keeps_its_inputs_size() -> None:
    assert typical_entry(0.0, FactorShape(2, 4, 8, 4)) == 0.25
    zeros = Factors(torch.ones(2, 2, 4), torch.ones(2, 8, 4), torch.zeros(2)).with_size(0.5)
    assert zeros.sigma.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "rank", [{"policy": "fixed", "rank": 2}, {"policy": "budget", "parameters": 2000, "min": 2, "max": 2}]
)
def test_what_is_all_zeros_starts_with_factors_that_can_learn(base: Base, rank: dict[str, Any]) -> None:
    """A delta of a module that was not fine-tuned. Least squares would give factors of zeros, which stay zeros."""
    delta = {"init": "delta", "finetuned": "same", "calibration_batches": 1}
    targets = _targets({"modules": ["q_proj"], "layers": [0], "rank": rank, **delta})
    moments = InputMoments(128)
    moments.accumulate(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)))
    started = _initialise(
        targets,
        base,
        finetuned={"same": base},
        statistics=lambda asked: [TargetStatistics(t, moments=moments) for t in asked],
    )
    factors = started.factors[QUERY]
    assert factors.sigma.tolist() == [0, 0]
    for part in (factors.left, factors.right):
        torch.testing.assert_close(part.square().mean((1, 2)), torch.ones(2))


def test_auto_shapes_fit(base: Base) -> None:
    started = _start(base, {"modules": ["gate_proj"], "layers": [0], "shape": "auto", "rank": {"policy": "fixed"}})
    (module,) = started.modules
    m, n, p, q = module.factor_shape
    assert (m * p, n * q) == (module.out_features, module.in_features)


def _gradient_start(rule: dict[str, Any], gradient: torch.Tensor, base: Base) -> Factors:
    targets = _targets({"modules": ["gate_proj"], "layers": [0], "init": "gradient", **rule})
    started = _initialise(targets, base, statistics=lambda asked: [TargetStatistics(t, gradient) for t in asked])
    assert started.initial_modules == set(started.factors)
    return started.factors["model.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize("rank", [1, 3])
def test_the_first_step_from_the_gradient_is_its_best_approximation_by_twice_the_terms(base: Base, rank: int) -> None:
    """In float64, with plain gradient descent, of rectangular factors: the delta becomes -c times 2 rank terms."""
    gradient = torch.randn(352, 128, generator=torch.Generator().manual_seed(1))
    start = _gradient_start({"rank": {"policy": "fixed", "rank": rank}}, gradient, base).to(torch.float64)
    left, right, sigma = (getattr(start, part).requires_grad_() for part in ("left", "right", "sigma"))
    (dense_delta(Factors(left, right, sigma)) * gradient).sum().backward()
    rate = 1e-7
    with torch.no_grad():
        # Each factor's rate follows its width (soka_serve.peft.optimizer); plain descent balances by entries instead.
        moved = Factors(left - rate * left.grad, right - rate * right.grad, sigma - rate * sigma.grad)
        delta = dense_delta(moved) - dense_delta(Factors(left, right, sigma))
    best = kpsvd(gradient.double(), start.shape, 2 * rank, algorithm="exact")
    found = kpsvd(delta, start.shape, 2 * rank, algorithm="exact")
    assert found.captured_frac > 1 - 1e-9
    for part in ("left", "right"):
        spans = [getattr(f, part).flatten(1).double() for f in (best.factors, found.factors)]
        torch.testing.assert_close(torch.linalg.svdvals(spans[0] @ spans[1].t()), torch.ones(2 * rank).double())


def test_a_gradient_with_fewer_terms_than_asked_for_wraps(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    factors = _gradient_start(
        {"shape": [2, 1, 176, 128], "rank": {"policy": "fixed", "rank": 2}}, torch.randn(352, 128), base
    )
    assert factors.rank == 2
    assert "gate_proj: the gradient has 2 terms; 4 were asked for" in caplog.text


def test_a_gradient_of_zero_is_an_error(base: Base) -> None:
    with pytest.raises(PlanError, match=r"gradient.*zero"):
        _gradient_start({}, torch.zeros(352, 128), base)


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
        found = dense_delta(_initialise(targets, base, statistics=lambda _, k=known: k).factors[QUERY])
        whole, part = (gradients @ matrix @ inputs.t() for matrix in (weight, found))
        share = (whole * part).sum() / part.square().sum()  # the terms' size is the rule's scale
        errors.append(float((whole - share * part).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_shares_are_disjoint_and_complete_and_give_the_same(base: Base) -> None:
    targets = _targets({"rank": {"policy": "fixed", "rank": 1}}, {"modules": ["v_proj"], "init": "truncated"})
    shares = [share_of(targets, i, 3) for i in range(3)]
    assert sorted(t.module.name for share in shares for t in share) == sorted(t.module.name for t in targets)
    alone = _initialise(targets, base)
    together = as_processes(3, lambda processes: _initialise(targets, base, processes=processes))
    assert len(together) == 3
    for got in together:
        assert got.modules == alone.modules
        for name, factors in alone.factors.items():
            assert torch.equal(factors.left, got.factors[name].left)
        assert got.cut.keys() == alone.cut.keys() != set()
        for name, factors in alone.cut.items():
            assert torch.equal(factors.left, got.cut[name].left)


def test_written_and_read_back(base: Base, tmp_path: Path) -> None:
    rules = ({"modules": [f"{name}_proj"], "init": init} for name, init in (("v", "zero"), ("o", "truncated")))
    started = _start(base, {"modules": ["q_proj"]}, *rules)
    started.write(tmp_path)
    again = Initialisation.read(tmp_path)
    assert again.modules == started.modules
    assert again.initial_modules == started.initial_modules
    for name, factors in started.factors.items():
        assert torch.equal(factors.right, again.factors[name].right)
    assert again.cut.keys() == started.cut.keys() == {name for name in started.factors if name.endswith("o_proj")}
    for name, factors in started.cut.items():
        assert torch.equal(factors.right, again.cut[name].right)


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
    with pytest.raises(SokaError, match=r"extract: modules\.0: .*at least 1 character"):
        soka_serve.extract(finetuned, base="tiny", out=out, rank=1, modules=[""], progress=False)
    with pytest.raises(SokaError, match=r"extract: rank.*got 0"):
        soka_serve.extract(finetuned, base="tiny", out=out, rank=0, progress=False)
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
