"""`[train.regularise]`: each row against float64 numpy, its effect in training, what it refuses, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soka_serve.adapter.format import read_adapter
from soka_serve.base.model import load_base
from soka_serve.compiler.history import read_history
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.train.regularise import Regularisation, check_devices, check_regularisers
from soka_serve.compiler.train.run import TrainResult
from soka_serve.compiler.train.trainer import SokaTrainer
from soka_serve.data.encode import EncodedExample
from soka_serve.errors import ManifestError, PlanError
from soka_serve.kron import Factors, dense_delta, kpsvd
from soka_serve.kron.factors import rearrange
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.read import read_manifest
from soka_serve.peft import build_soka_model, soka_layers
from soka_serve.regularisers import REGULARISERS, Constraint, Divergence, Penalty, Rewrite
from tests.support.training import (
    interrupted_at,
    load_trained,
    make_base,
    make_examples,
    make_factors,
    run_training,
    tensors_of,
)

RATE = 5e-2
ALONE: dict[str, Any] = {"initial": (), "adapt": [{"init": "zero"}]}  # nothing is subtracted
SORSA, KASA = {"sorsa": 30.0}, {"kasa": 30.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("regularise") / "base")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Six steps from bent factors without any."""
    return train(base, tmp_path_factory.mktemp("plain"), factors=bent(base), learning_rate=0.5, sigma_lr=1.0)


def train(base: Path, work: Path, **options: Any) -> TrainResult:
    return run_training(base, work, **({"steps": 6, "learning_rate": RATE} | options))


def bent(base: Path) -> dict[str, Factors]:
    """Starting factors that are neither orthogonal nor of size 1."""
    return {k: Factors(f.left * 1.2, f.right * 0.9 + 0.3, f.sigma) for k, f in make_factors(base).items()}


def some_modules(dtype: torch.dtype = torch.float64) -> list[tuple[Factors, Factors | None]]:
    """Two modules of different shapes, the first with initial factors."""
    generator = torch.Generator().manual_seed(0)

    def factors(r: int, *shape: int) -> Factors:
        m, n, p, q = shape
        sizes = ((r, m, n), (r, p, q), (r,))
        return Factors(*(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes))

    return [(factors(3, 4, 2, 3, 5), factors(3, 4, 2, 3, 5)), (factors(2, 2, 2, 4, 4), None)]


def reference(name: str, modules: list[tuple[Factors, Factors | None]]) -> float:
    """The penalties by definition, in numpy."""
    values = []
    for theta, initial in modules:
        left, right, sigma = (t.detach().double().numpy() for t in (theta.left, theta.right, theta.sigma))
        if name == "sorsa":
            for factor in (left, right):
                columns = np.stack([term.reshape(-1) / np.sqrt(term.size) for term in factor], axis=1)
                values.append(np.sqrt(((columns.T @ columns - np.eye(len(factor))) ** 2).sum()))
        else:
            norms = np.sqrt(left[0].size * right[0].size)
            start = 0.0 if initial is None else initial.sigma.double().numpy()
            values.append((((sigma - start) * norms) ** 2).sum())
    return float(np.mean(values))


PENALTIES = [name for name, row in REGULARISERS.items() if isinstance(row, Penalty)]


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_and_gradient_are_the_definition(name: str) -> None:
    row = REGULARISERS[name]
    assert isinstance(row, Penalty)
    modules = some_modules()
    assert row.penalty(modules).item() == pytest.approx(reference(name, modules), rel=1e-12)
    leaves = [t.requires_grad_() for theta, _ in modules for t in (theta.left, theta.right, theta.sigma)]
    gradients = torch.autograd.grad(row.penalty(modules), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        entry = (0,) * leaf.ndim
        with torch.no_grad():
            leaf[entry] += 1e-5
            above = reference(name, modules)
            leaf[entry] -= 2e-5
            below = reference(name, modules)
            leaf[entry] += 1e-5
        expected = (above - below) / 2e-5
        assert (0.0 if gradient is None else float(gradient[entry])) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_what_starts_right_has_no_penalty(base: Path, name: str) -> None:
    row = REGULARISERS[name]
    assert isinstance(row, Penalty)
    modules = [(f, f) for f in make_factors(base).values()]
    leaves = [t.requires_grad_() for theta, _ in modules for t in (theta.left, theta.right, theta.sigma)]
    value = row.penalty(modules)
    assert value.item() < 1e-5
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)


def test_the_step_sees_the_gradient_of_the_sum(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch and in two: the task's gradient plus the numbers times the penalties'."""
    found: list[dict[str, torch.Tensor]] = []
    clip = SokaTrainer._clip_grad_norm

    def noted(self: SokaTrainer, model: torch.nn.Module) -> Any:
        norm = clip(self, model)
        found.append({k: p.grad.double() * float(norm) for k, p in model.named_parameters() if p.grad is not None})
        return norm

    monkeypatch.setattr(SokaTrainer, "_clip_grad_norm", noted)
    factors, table = bent(base), {"sorsa": 2.0, "kasa": 0.1}
    options: dict[str, Any] = {"steps": 1, "factors": factors, "initial": ()}
    for number, (size, regularise) in enumerate([(4, {}), (4, table), (2, table)]):
        work = tmp_path / f"{number}"
        train(base, work, batch_size=size, accumulate=4 // size, regularise=regularise, **options)
    leaves = {k: [t.double().requires_grad_() for t in (f.left, f.right, f.sigma)] for k, f in factors.items()}
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in table.items():
        row = REGULARISERS[name]
        assert isinstance(row, Penalty)
        total = total + weight * row.penalty([(Factors(*leaves[k]), None) for k in factors])
    total.backward()
    for k, tensors in leaves.items():
        for part, tensor in zip(("left", "right", "sigma"), tensors, strict=True):
            key = f"base_model.model.{k}.soka_{part}.default.weight"
            assert tensor.grad is not None
            for step in found[1:]:
                torch.testing.assert_close(step[key], found[0][key] + tensor.grad, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ effect


@pytest.mark.parametrize(("name", "table"), [("sorsa", SORSA), ("kasa", KASA)])
def test_less_of_what_it_penalises(
    base: Path, plain: TrainResult, tmp_path: Path, name: str, table: dict[str, float]
) -> None:
    result = train(base, tmp_path, regularise=table, factors=bent(base), learning_rate=0.5)
    assert reference(name, _trained(result)) < 0.8 * reference(name, _trained(plain))
    lines, others = read_history(result.history), read_history(plain.history)
    start = [(f, f) for f in bent(base).values()]
    assert lines[0][name] == pytest.approx(reference(name, start), rel=1e-5, abs=1e-6)
    assert lines[-1][name] < 0.8 * reference(name, _trained(plain))
    assert lines[0]["loss"] == pytest.approx(others[0]["loss"], rel=1e-6)  # the task's
    assert name not in others[0]


def _trained(result: TrainResult) -> list[tuple[Factors, Factors | None]]:
    adapter = read_adapter(result.directory)
    return [(factors, adapter.initial.get(name)) for name, factors in adapter.factors.items()]


def test_a_frozen_part_is_left_alone(base: Path, tmp_path: Path) -> None:
    result = train(base, tmp_path, regularise=SORSA, left_lr=0.0, steps=1)
    assert all(
        torch.equal(f.left, make_factors(base)[k].left) for k, f in read_adapter(result.directory).factors.items()
    )


# ------------------------------------------------------------------------------------------------------- consistency


def divergence(adapted: Any, examples: list[EncodedExample]) -> torch.Tensor:
    """The mean KL(base || adapted) at trained positions, one example at a time, with PEFT's own switch."""
    values = []
    for example in examples:
        ids, targets = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        with torch.no_grad(), adapted.disable_adapter():
            p = adapted(input_ids=ids).logits[0, :-1].softmax(-1)
        logits = adapted(input_ids=ids).logits[0, :-1]
        values.append((p * (p.log() - logits.log_softmax(-1))).sum(-1)[targets != -100])
    return torch.cat(values).mean()


def test_divergence_is_the_definition() -> None:
    row = REGULARISERS["consistency"]
    assert isinstance(row, Divergence)
    base, adapted = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = (np.exp(t.numpy()) / np.exp(t.numpy()).sum(-1, keepdims=True) for t in (base, adapted))
    np.testing.assert_allclose(row.divergences(base, adapted).numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-12)
    assert row.divergences(base.half(), adapted.half()).dtype == torch.float32
    assert not row.divergences(base, base).any()


def test_the_step_sees_the_gradient_of_the_divergence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the mean over the positions of all batches, whatever the padding."""
    found: list[dict[str, torch.Tensor]] = []
    clip = SokaTrainer._clip_grad_norm

    def noted(self: SokaTrainer, model: torch.nn.Module) -> Any:
        norm = clip(self, model)
        found.append({k: p.grad * float(norm) for k, p in model.named_parameters() if p.grad is not None})
        return norm

    monkeypatch.setattr(SokaTrainer, "_clip_grad_norm", noted)
    options: dict[str, Any] = {"steps": 1, "factors": bent(base), "initial": (), "left_lr": 0.0}
    options |= {"train_set": make_examples(4), "batch_size": 2, "accumulate": 2}
    for number, table in enumerate([{}, {"consistency": 3.0}]):
        result = train(base, tmp_path / f"{number}", regularise=table, **options)
    adapted = build_soka_model(load_base(base), bent(base), initial=False)
    value = divergence(adapted, make_examples(4).examples)
    assert read_history(result.history)[0]["consistency"] == pytest.approx(value.item(), rel=0.1)  # a mean of batches
    value.backward()
    parameters = dict(adapted.named_parameters())
    assert not any("soka_left" in key for key in found[1])
    for key, gradient in found[1].items():
        expected = parameters[key].grad
        assert expected is not None
        torch.testing.assert_close(gradient - found[0][key], 3 * expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["soka", "lora"])
def test_consistent_answers_are_nearer_to_the_base(base: Path, tmp_path: Path, method: str) -> None:
    found = []
    for number, table in enumerate([{}, {"consistency": 10.0}]):
        work = tmp_path / f"{number}"
        rate = 0.5 if method == "soka" else 1e-2
        result = run_training(base, work, method=method, steps=8, learning_rate=rate, regularise=table)
        with torch.no_grad():
            found.append(float(divergence(load_trained(base, result), make_examples(16).examples)))
    lines = read_history(result.history)
    assert abs(lines[0]["consistency"]) < 1e-6
    assert lines[-1]["consistency"] > 0
    assert 0 < found[1] < 0.8 * found[0]


def test_consistency_needs_a_process_per_gpu() -> None:
    check_devices({"consistency": 1.0, "sorsa": 1.0}, 1)
    check_devices({"sorsa": 1.0}, 2)
    with pytest.raises(PlanError, match=r"train\.regularise\.consistency needs a process per GPU; this one has 2"):
        check_devices({"consistency": 1.0}, 2)


# ----------------------------------------------------------------------------------------------------------- protect


def inside(base: Path, result: TrainResult, count: int, start: dict[str, Factors]) -> tuple[float, float]:
    """Norms of the change of R(K(theta)) in float64: within the weight's leading terms at most, and whole at least."""
    weights = load_base(base).state_dict()
    found = []
    for name, theta in read_adapter(result.directory).factors.items():
        change = dense_delta(theta.to(torch.float64)) - dense_delta(start[name].to(torch.float64))
        left, _, right = np.linalg.svd(rearrange(weights[f"{name}.weight"].double(), theta.shape).numpy())
        matrix = rearrange(change, theta.shape).numpy()
        found.append((np.linalg.norm(left[:, :count].T @ matrix @ right[:count].T), np.linalg.norm(matrix)))
    return max(within for within, _ in found), min(whole for _, whole in found)


def test_what_is_allowed_is_the_projection() -> None:
    """Against a dense float64 projection of each factor, and of sigma by least squares."""
    row, theta = REGULARISERS["protect"], some_modules()[0][0]
    assert isinstance(row, Constraint)
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guard = row.guard(weight, theta, 1)
    left, _, right = np.linalg.svd(rearrange(weight, theta.shape).numpy())
    for part, basis in (("left", left[:, :1]), ("right", right[:1].T)):
        change = getattr(theta, part)
        flat = change.flatten(1).numpy()
        expected = flat - flat @ basis @ basis.T
        np.testing.assert_allclose(guard.allowed(part, change).flatten(1).numpy(), expected, atol=1e-12)
        torch.testing.assert_close(guard.allowed(part, change[1:]), guard.allowed(part, change)[1:])
    column = (theta.left.flatten(1).numpy() @ left[:, 0]) * (theta.right.flatten(1).numpy() @ right[0])
    sigma = theta.sigma.numpy()
    expected = sigma - column * (column @ sigma) / (column @ column)
    np.testing.assert_allclose(guard.allowed("sigma", theta.sigma).numpy(), expected, atol=1e-12)


def test_a_term_outside_of_what_is_protected_keeps_its_sigma() -> None:
    row, weight = REGULARISERS["protect"], torch.randn(12, 10, generator=torch.Generator().manual_seed(1))
    assert isinstance(row, Constraint)
    terms = kpsvd(weight, FactorShape(4, 2, 3, 5), 3).factors
    guard = row.guard(weight, terms, 2)
    allowed = guard.allowed("sigma", torch.ones(3))
    torch.testing.assert_close(allowed, torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)


def test_steps_leave_the_leading_terms_alone(base: Path, tmp_path: Path) -> None:
    results, start = [], make_factors(base, rank=3)
    for number, table in enumerate([{}, {"protect": 2}]):
        results.append(train(base, tmp_path / f"{number}", factors=start, learning_rate=0.5, regularise=table))
    (free, _), (held, whole) = (inside(base, result, 2, start) for result in results)
    assert held < 1e-5 * whole
    assert free > 1e-2 * whole
    losses = [line["loss"] for line in read_history(results[1].history)]
    assert losses[-1] < losses[0]
    assert all(0 < line["protect"] < 1 for line in read_history(results[1].history))


def test_all_terms_cannot_be_protected(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"train\.regularise\.protect = 40: .*: expected fewer than the .* terms"):
        train(base, tmp_path, regularise={"protect": 40})


# ----------------------------------------------------------------------------------------------------- orthogonalise


def test_rewritten_terms_are_the_kronecker_svd() -> None:
    row = REGULARISERS["orthogonalise"]
    assert isinstance(row, Rewrite)
    for theta, _ in some_modules():
        terms, cosine = row.rewritten(theta)
        torch.testing.assert_close(dense_delta(terms), dense_delta(theta), rtol=0, atol=1e-12)
        sizes = [float(t.square().mean().sqrt()) for t in (theta.left, theta.right)]
        size = np.sqrt(np.prod(theta.shape)) * np.prod(sizes)
        singular = np.linalg.svd(rearrange(dense_delta(theta), theta.shape).numpy(), compute_uv=False)
        np.testing.assert_allclose(terms.sigma.numpy() * size, singular[: theta.rank], atol=1e-12)
        columns = [t.flatten(1).numpy() for t in (theta.left, theta.right)]
        units = [c / np.linalg.norm(c, axis=1, keepdims=True) for c in columns]
        largest = [np.abs(u @ u.T - np.eye(len(u))).max() for u in units]
        assert cosine.item() == pytest.approx(np.mean(largest), rel=1e-12)
        assert row.rewritten(terms)[1].item() < 1e-12
        for factor, scale in zip((terms.left, terms.right), sizes, strict=True):
            gram = factor.flatten(1) @ factor.flatten(1).t() / factor[0].numel() / scale**2
            torch.testing.assert_close(gram, torch.eye(theta.rank, dtype=gram.dtype), rtol=0, atol=1e-12)
    single, cosine = row.rewritten(theta.terms(0))
    torch.testing.assert_close(dense_delta(single), dense_delta(theta.terms(0)))
    assert cosine.item() == 0
    zero = Factors(theta.left, torch.zeros_like(theta.right), theta.sigma)
    assert row.rewritten(zero)[0] is zero


def test_terms_are_orthogonal_after_every_other_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the delta as it was, and averages that begin again."""
    changes: list[float] = []
    rewrite = Regularisation.rewrite

    def noted(self: Regularisation, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        (layer, *_) = soka_layers(model).values()
        before = dense_delta(layer.theta("default").to(torch.float64)).detach()
        rewrite(self, model, optimizer, step)
        after = dense_delta(layer.theta("default").to(torch.float64)).detach()
        changes.append(float((after - before).norm() / before.norm()))
        state = optimizer.state[layer.soka_left["default"]]
        assert bool(state["exp_avg"].any()) == (step % 2 == 1)
        assert float(state["step"]) == step % 2

    monkeypatch.setattr(Regularisation, "rewrite", noted)
    options: dict[str, Any] = {"factors": bent(base), "learning_rate": 8.0} | ALONE
    result = train(base, tmp_path, regularise={"orthogonalise": 2}, **options)
    assert len(changes) == 5
    assert changes[::2] == [0, 0, 0]
    assert all(0 < change < 1e-6 for change in changes[1::2])
    values = [line.get("orthogonalise") for line in read_history(result.history)]
    assert [value is not None for value in values] == [False, True, False, True, False, False]
    assert values[1] > values[3] > 0
    losses = [line["loss"] for line in read_history(result.history)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("table", "options", "trained"),
    [(SORSA, {}, True), (KASA, {}, True), ({"orthogonalise": 2}, ALONE, True), ({"protect": 1}, {}, False)],
)
def test_sigma_is_trained_where_it_is_needed(
    base: Path, tmp_path: Path, table: dict[str, float], options: dict[str, Any], trained: bool
) -> None:
    result = train(base, tmp_path, regularise=table, **options)
    factors = read_adapter(result.directory).factors
    count = sum(f.parameters - (0 if trained else f.rank) for f in factors.values())
    assert result.trainable_parameters == count


# ---------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("table", "options"),
    [(SORSA | KASA | {"consistency": 1.0, "protect": 1}, {}), ({"orthogonalise": 2}, ALONE)],
    ids=["added", "rewritten"],
)
def test_an_interrupted_run_ends_with_the_same_weights(
    base: Path, tmp_path: Path, table: dict[str, float], options: dict[str, Any]
) -> None:
    whole = train(base, tmp_path / "whole", regularise=table, **options)
    with interrupted_at(4):
        train(base, tmp_path / "cut", regularise=table, **options, save_every=3)
    assert (tmp_path / "cut" / "checkpoint-3").exists()
    resumed = train(base, tmp_path / "cut", regularise=table, **options, save_every=3)
    assert resumed.steps == 6
    for key, tensor in tensors_of(whole).items():
        assert torch.equal(tensors_of(resumed)[key], tensor)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("lines", "place", "words"),
    [
        ("sorsa = -1", "6:9", "at least 0"),
        ('sorsa = "much"', "6:9", "expected a number"),
        ("sorso = 1.0", "6:1", "unknown key (did you mean 'sorsa'?)"),
        ('sorsa = 0.1\n[train]\nmethod = "lora"', "6:1", "sorsa belongs to method = 'soka'; the method is 'lora'"),
        ("sorsa = 0.1\n[train]\nleft_lr = 0\nright_lr = 0", "6:1", "sorsa acts on left and right alone"),
        ("kasa = 0.1\n[train]\nsigma_lr = 0", "6:1", "kasa acts on sigma alone, which is not trained"),
        ('consistency = 0.1\n[train]\nmethod = "full"', "6:1", "method = 'full' changes the base's weights"),
        ('consistency = 0.1\n[train]\nmethod = "pissa"', "6:1", "method = 'pissa' changes the base's weights"),
        ("protect = 1.5", "6:11", "expected a whole number"),
        ("protect = 1\n[train]\nprune = { threshold = 0.1 }", "6:1", "protect does not go with prune"),
        ("protect = 2\n[[adapt]]\nextra_terms = 1", "6:1", "protect does not go with extra_terms in [[adapt]]"),
        ('kasa = 2\n[[adapt]]\ntrain_factors = ["left"]', "6:1", "kasa does not go with train_factors in [[adapt]]"),
        (
            'orthogonalise = 9\n[[adapt]]\ninit = "weights"',
            "6:1",
            "does not go with init = 'weights', whose terms are subtracted again",
        ),
        ('orthogonalise = 9\nprotect = 1\n[[adapt]]\ninit = "zero"', "6:1", "does not go with protect: what sigma"),
        ('orthogonalise = 9\n[[adapt]]\ninit = "zero"\n[train]\nsigma_lr = 2', "6:1", "does not go with sigma_lr"),
        ("sorsa = 0.1", "6:1", "one of whose factors starts at zero"),
    ],
)
def test_what_does_not_go(tmp_path: Path, lines: str, place: str, words: str) -> None:
    file = tmp_path / "m.toml"
    file.write_text(
        f'schema = 1\nbase.builtin = "tiny"\n\n\n[train.regularise]\n{lines}\n[train.data]\nbuiltin = "math"\n'
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(file)
    assert f"m.toml:{place}: train.regularise" in caught.value.message
    assert words in caught.value.message


def test_methods_that_manifests_do_not_name_are_refused_too() -> None:
    with pytest.raises(PlanError, match=r"train\.regularise\.sorsa belongs to method = 'soka'; the method is 'cdka'"):
        check_regularisers(SORSA, METHODS["cdka"], subtracted=False, partly=False)
    with pytest.raises(PlanError, match=r"consistency asks the base, and method = 'corda' changes its weights"):
        check_regularisers({"consistency": 1.0}, METHODS["corda"], subtracted=False, partly=True)
    with pytest.raises(PlanError, match="starting factors are subtracted, so theta is not the delta"):
        check_regularisers({"orthogonalise": 2}, METHODS["soka"], subtracted=True, partly=False)
    with pytest.raises(PlanError, match="protect acts on terms that are trained whole"):
        check_regularisers({"protect": 2}, METHODS["soka"], subtracted=True, partly=True)


def test_deepspeed_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SokaTrainer.create_accelerator_and_postprocess

    def with_deepspeed(self: SokaTrainer) -> None:
        made(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(SokaTrainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(PlanError, match=r"train\.regularise\.sorsa does not go with DeepSpeed"):
        train(base, tmp_path, regularise=SORSA, max_grad_norm=1.0)
