"""The training stage on a tiny random LLaMA: every method learns, and every switch does what it says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from soka_serve.adapter.export import export
from soka_serve.adapter.format import read_adapter
from soka_serve.base.base import Base
from soka_serve.base.model import load_base
from soka_serve.compiler.history import read_history
from soka_serve.compiler.methods import METHODS, DenseOutput, in_manifests
from soka_serve.compiler.methods.pissa import Pissa
from soka_serve.compiler.train.clip import RelativeClip
from soka_serve.compiler.train.decay import anneal_weight_decay, decay_share
from soka_serve.compiler.train.trainer import SokaTrainer
from soka_serve.data.encode import EncodedExample, EncodedSet
from soka_serve.errors import BuildError, CheckpointError, DataError, PlanError
from soka_serve.kron import Factors, dense_delta
from soka_serve.peft import soka_layers
from tests.support.training import (
    load_trained,
    logits_of,
    make_base,
    make_examples,
    make_factors,
    run_training,
    target_names,
    tensors_of,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("train") / "base")


# ----------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", in_manifests())
def test_every_method_learns(base: Path, tmp_path: Path, method: str) -> None:
    """20 steps lower the loss, and what is on disk changes the untouched base's answers."""
    rate = {"full": 3e-3, "soka": 5e-2}.get(method, 1e-2)
    result = run_training(base, tmp_path, method=method, steps=20, learning_rate=rate)
    losses = [line["loss"] for line in read_history(result.history)]
    assert len(losses) == result.steps == result.steps_run == result.steps_planned == 20
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert result.final_loss == losses[-1]
    assert not result.stopped_early
    assert not list(tmp_path.glob("checkpoint-*"))
    before = logits_of(load_base(base).eval())
    trained = logits_of(load_trained(base, result))
    assert (trained - before).abs().max() > 0.1
    if method == "full":
        again = AutoModelForCausalLM.from_pretrained(result.directory)
        assert again.config.use_cache
    else:
        again = PeftModel.from_pretrained(load_base(base), str(result.directory)).eval()
    torch.testing.assert_close(logits_of(again.eval()), trained)


def test_soka_starts_at_the_base_and_its_adapter_reads_back(base: Path, tmp_path: Path) -> None:
    result = run_training(base, tmp_path, steps=3)
    adapter = read_adapter(result.directory)
    assert set(adapter.factors) == set(adapter.initial) == set(target_names())
    for name, start in make_factors(base).items():
        assert torch.equal(adapter.initial[name].left, start.left)
        assert not torch.equal(adapter.factors[name].left, start.left)
        assert adapter.factors[name].left.dtype == torch.float32
    # Sigma, one value per term, is left alone beside Left and Right.
    assert result.trainable_parameters == sum(f.parameters - f.rank for f in adapter.factors.values())
    assert all(torch.equal(adapter.factors[name].sigma, adapter.initial[name].sigma) for name in adapter.factors)
    whole = export(result.directory, tmp_path / "whole")
    assert (whole.ranks, whole.dropped_energy_frac < 1e-9) == ((4, 4), True)
    cut = export(result.directory, tmp_path / "cut", rank="trained")
    assert (cut.ranks, 0 < cut.dropped_energy_frac < 0.9) == ((2, 2), True)
    share = 1 - cut.dropped_energy_frac / 2
    stated = export(result.directory, tmp_path / "stated", energy=share)
    assert 0 < stated.dropped_energy_frac < 1 - share
    assert max(stated.by_module.values()) <= 1 - share
    assert cut.parameters < stated.parameters < whole.parameters


def test_zero_steps_export_the_initialisation(base: Path, tmp_path: Path) -> None:
    result = run_training(base, tmp_path, steps=0)
    assert (result.steps, result.final_loss) == (0, None)
    adapter = read_adapter(result.directory)
    for name, start in make_factors(base).items():
        assert torch.equal(adapter.factors[name].sigma, start.sigma)
    trained = load_trained(base, result)
    assert torch.equal(logits_of(trained), logits_of(load_base(base).eval()))


def test_modules_without_initial_factors_start_from_their_own_delta(base: Path, tmp_path: Path) -> None:
    factors = make_factors(base)
    first, *others = factors
    result = run_training(base, tmp_path, steps=0, factors=factors, initial=frozenset(others))
    delta = {name: dense_delta(read_adapter(result.directory).delta_factors(name)) for name in factors}
    torch.testing.assert_close(delta[first], dense_delta(factors[first]))
    assert all(delta[name].abs().max() < 1e-5 for name in others)


def test_cut_terms_are_off_the_weight_and_no_start(base: Path, tmp_path: Path) -> None:
    """As training on a base without them, with weight decay to zero and KaSA's norm of sigma itself."""
    cut = make_factors(base)
    first = next(iter(cut))  # of which nothing is cut
    theta = {k: Factors(f.left.flip(0), torch.zeros_like(f.right), f.sigma) for k, f in cut.items()}
    del cut[first]
    without = tmp_path / "without"
    shutil.copytree(base, without)
    weights = load_file(base / "model.safetensors")
    weights |= {f"{k}.weight": weights[f"{k}.weight"] - dense_delta(f) for k, f in cut.items()}
    save_file(weights, without / "model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any] = {"factors": theta, "initial": (), "steps": 3, "weight_decay": 0.2, "learning_rate": 0.1}
    options |= {"regularise": {"kasa": 0.1}, "adapt": [{"init": "zero"}]}
    here = run_training(base, tmp_path / "here", cut=cut, **options)
    there = run_training(without, tmp_path / "there", **options)
    plain = run_training(base, tmp_path / "plain", **options)
    logs = [read_history(result.history) for result in (here, there, plain)]
    for key in ("loss", "grad_norm", "kasa"):
        values = [[line[key] for line in lines] for lines in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
        assert key != "loss" or values[0] != pytest.approx(values[2], rel=1e-2)
    adapter, alone = (read_adapter(result.directory) for result in (here, there))
    assert adapter.initial.keys() == theta.keys()
    for name, terms in alone.factors.items():
        expected = dense_delta(terms) - (0 if name == first else dense_delta(cut[name]))
        torch.testing.assert_close(dense_delta(adapter.delta_factors(name)), expected, rtol=1e-3, atol=1e-4)


def test_pissa_leaves_a_plain_lora_of_the_untouched_base(base: Path, tmp_path: Path) -> None:
    """W - B0 A0 + B A as trained equals W + [B, -B0] [A; A0] as written; before training it is the base."""
    result = run_training(base, tmp_path, method="pissa", steps=0)
    config = json.loads((result.directory / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 4, True)
    trained = load_trained(base, result)
    torch.testing.assert_close(logits_of(trained), logits_of(load_base(base).eval()), rtol=1e-4, atol=1e-4)


def test_pissa_trains_what_it_says(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live model's last logits, on the rewritten base, are the written adapter's on the untouched one."""
    models = []
    build = Pissa.build
    monkeypatch.setattr(Pissa, "build", lambda *a: models.append(build(*a)) or models[-1])
    result = run_training(base, tmp_path, method="pissa", steps=5)
    live = models[0].eval()
    name = "model.layers.0.self_attn.q_proj"
    rewritten = live.get_submodule(f"base_model.model.{name}").base_layer.weight
    original = load_base(base).get_submodule(name).weight
    assert (rewritten - original).abs().max() > 0.05
    written = load_trained(base, result)
    torch.testing.assert_close(logits_of(written), logits_of(live), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "pissa", "lokr", "full"])
def test_merged_baseline_answers_as_trained(base: Path, tmp_path: Path, method: str) -> None:
    result = run_training(base, tmp_path / "run", method=method)
    METHODS[method].merge(
        result.directory, DenseOutput(Base(base), tmp_path / "merged", "auto", "base", progress=False)
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.float32
    trained = logits_of(load_trained(base, result))
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-4, atol=1e-4)
    assert (logits_of(merged) - logits_of(load_base(base).eval())).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize("part", ["left", "right", "sigma"])
def test_a_multiplier_of_zero_freezes_a_factor(base: Path, tmp_path: Path, part: str) -> None:
    result = run_training(base, tmp_path, **{"sigma_lr": 1.0, f"{part}_lr": 0.0})
    adapter = read_adapter(result.directory)
    for name, start in make_factors(base).items():
        for other in ("left", "right", "sigma"):
            unchanged = torch.equal(getattr(adapter.factors[name], other), getattr(start, other))
            assert unchanged == (other == part), (name, other)
    frozen = sum(getattr(f, part).numel() for f in adapter.factors.values())
    assert result.trainable_parameters == sum(f.parameters for f in adapter.factors.values()) - frozen


def test_the_first_step_moves_each_factor_by_its_rate(base: Path, tmp_path: Path) -> None:
    """AdamW's first step moves each value by its rate: lr RMS / sqrt(spread rank sqrt(modules))."""
    result = run_training(base, tmp_path, steps=1, warmup_frac=0.0, left_lr=4.0, sigma_lr=1.0, schedule="constant")
    adapter = read_adapter(result.directory)
    starts = make_factors(base)
    for name, start in starts.items():
        m, n, p, q = start.shape
        spread = (m**0.5 + n**0.5) * (p**0.5 + q**0.5) / 4
        for part, multiplier, width in (("left", 4, spread), ("right", 1, spread), ("sigma", 1, 1)):
            before, after = getattr(start, part), getattr(adapter.factors[name], part)
            size = float(before.square().mean().sqrt())
            expected = 5e-2 * multiplier * size / (width * start.rank) ** 0.5 / len(starts) ** 0.25
            assert (after - before).abs().median().item() == pytest.approx(expected, rel=1e-3), (name, part)
    assert read_history(result.history)[0]["learning_rate"] == pytest.approx(5e-2)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_single_step_trains(base: Path, tmp_path: Path, schedule: str) -> None:
    """A warm-up's first step has the rate 0, and this one is the only one."""
    single = run_training(base, tmp_path / "single", steps=1, schedule=schedule)
    plain = run_training(base, tmp_path / "plain", steps=1, schedule=schedule, warmup_frac=0.0)
    moved, expected = (read_adapter(result.directory).factors for result in (single, plain))
    for name, start in make_factors(base).items():
        assert torch.equal(moved[name].left, expected[name].left), name
        assert not torch.equal(moved[name].left, start.left), name


def test_weight_decay_pulls_the_model_towards_the_base(base: Path, tmp_path: Path) -> None:
    sizes = []
    for decay in (0.0, 100.0):
        result = run_training(base, tmp_path / f"{decay:g}", steps=12, weight_decay=decay)
        layers = soka_layers(load_trained(base, result)).values()
        sizes.append(sum(layer.get_delta_weight("default").norm().item() for layer in layers))
    assert sizes[1] < 0.9 * sizes[0]


def test_annealed_weight_decay_pulls_less(base: Path, tmp_path: Path) -> None:
    sizes = {}
    for schedule in ("constant", "linear", "cosine"):
        options = {"weight_decay": 100.0, "weight_decay_schedule": schedule, "steps": 12, "schedule": "constant"}
        layers = soka_layers(load_trained(base, run_training(base, tmp_path / schedule, **options))).values()
        sizes[schedule] = sum(layer.get_delta_weight("default").norm().item() for layer in layers)
    assert sizes["constant"] < min(sizes["linear"], sizes["cosine"])
    assert sizes["linear"] != sizes["cosine"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_each_step_decays_by_what_is_left(schedule: str) -> None:
    """SGD without a gradient: theta_T = theta_0 * product of (1 - rate * decay * share); its state is reloaded."""
    shares = {
        "constant": [1.0] * 6,
        "linear": [1 - t / 6 for t in range(6)],
        "cosine": [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)],
    }[schedule]
    decayed, spared = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [spared], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    steps = iter(range(6))
    anneal_weight_decay(optimizer, lambda: decay_share(schedule, next(steps), 6))
    for _ in range(6):
        decayed.grad, spared.grad = torch.zeros(2).double(), torch.zeros(2).double()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert decayed.tolist() == pytest.approx([math.prod(1 - 0.1 * 0.5 * s for s in shares)] * 2, rel=1e-12)
    assert spared.tolist() == [1.0, 1.0]


def test_clip_is_relative_to_the_median_of_the_norms_before() -> None:
    clip = RelativeClip(2.0, [1.0] * 7)
    assert clip.limit == math.inf
    for norm in (math.inf, math.nan, 100.0):
        clip.add(norm)
    assert clip.limit == 2.0
    for _ in range(32):
        clip.add(4.0)
    assert clip.limit == 8.0
    assert RelativeClip(0, [1.0] * 32).limit == math.inf


def test_each_gradient_is_scaled_to_norm_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, seen = SokaTrainer._clip_grad_norm, []

    def noted(self: SokaTrainer, model: torch.nn.Module) -> Any:
        norm = clip(self, model)
        gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        seen.append((float(norm), float(torch.stack(gradients).norm())))
        return norm

    monkeypatch.setattr(SokaTrainer, "_clip_grad_norm", noted)
    run_training(base, tmp_path / "scaled", steps=3)
    assert [after for _, after in seen] == pytest.approx([1.0] * 3, rel=1e-5)
    assert all(abs(before - 1) > 1e-3 for before, _ in seen)
    seen.clear()
    run_training(base, tmp_path / "plain", steps=3, clip=3.0)
    assert [before for before, _ in seen] == pytest.approx([after for _, after in seen])


def test_clip_is_refused_under_deepspeed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SokaTrainer.create_accelerator_and_postprocess

    def with_deepspeed(self: SokaTrainer) -> None:
        made(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(SokaTrainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(PlanError, match=r"train\.clip = 0 does not go with DeepSpeed"):
        run_training(base, tmp_path)


def test_weight_decay_is_refused_under_deepspeed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SokaTrainer.create_optimizer

    def with_deepspeed(self: SokaTrainer, model: Any = None) -> Any:
        self.is_deepspeed_enabled = True
        return made(self, model)

    monkeypatch.setattr(SokaTrainer, "create_optimizer", with_deepspeed)
    with pytest.raises(PlanError, match=r"train\.weight_decay = 0\.1 does not go with DeepSpeed"):
        run_training(base, tmp_path, weight_decay=0.1)


@pytest.mark.parametrize("options", [{"clip": 0.5}, {"max_grad_norm": 0.01}])
def test_clipping_changes_what_is_learned(base: Path, tmp_path: Path, options: dict[str, float]) -> None:
    plain = tensors_of(run_training(base, tmp_path / "plain", steps=12, clip=100.0))
    clipped = tensors_of(run_training(base, tmp_path / "clipped", steps=12, **options))
    assert any(not torch.equal(clipped[name], tensor) for name, tensor in plain.items())


def test_gradient_checkpointing_changes_nothing(base: Path, tmp_path: Path) -> None:
    plain = tensors_of(run_training(base, tmp_path / "plain"))
    saved = tensors_of(run_training(base, tmp_path / "saved", gradient_checkpointing=True))
    for name, tensor in plain.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6)


def test_accumulation_equals_a_larger_batch(base: Path, tmp_path: Path) -> None:
    """The loss is the mean over all tokens of a step, however they are split."""
    large = tensors_of(run_training(base, tmp_path / "large", batch_size=8))
    small = tensors_of(run_training(base, tmp_path / "small", batch_size=2, accumulate=4))
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["soka", "lora"])
def test_bfloat16_trains_float32_factors(base: Path, tmp_path: Path, method: str) -> None:
    exact = tensors_of(run_training(base, tmp_path / "exact", method=method))
    rounded = tensors_of(
        run_training(base, tmp_path / "rounded", method=method, precision="bfloat16", dtype="bfloat16")
    )
    assert {t.dtype for t in rounded.values()} == {torch.float32}
    trained = [n for n in exact if "initial" not in n]
    assert any(not torch.equal(exact[n], rounded[n]) for n in trained)
    assert max((exact[n] - rounded[n]).abs().max().item() for n in trained) < 0.1


@pytest.mark.parametrize(
    ("found", "fast"),
    [({}, False), ({"amx_bf16": True}, True), ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True)],
    ids=["neither", "AMX", "AMD"],
)
def test_half_precision_without_fast_products_warns(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    found: dict[str, object],
    fast: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    run_training(base, tmp_path / "exact", steps=1)
    assert "without fast products" not in caplog.text
    run_training(base, tmp_path / "held", steps=1, dtype="bfloat16")
    assert ("without fast products" in caplog.text) == (not fast)
    caplog.clear()
    run_training(base, tmp_path / "computed", steps=1, precision="bfloat16")
    assert ("without fast products" in caplog.text) == (not fast)
    run_training(base, tmp_path / "other", steps=1, dtype="float16")
    assert "without fast products" in caplog.text


@pytest.mark.parametrize("amx", [False, True])
def test_auto_holds_a_half_precision_base_in_what_the_cpu_is_fast_in(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    load_base(base, "bfloat16").save_pretrained(tmp_path / "half")
    losses = {
        dtype: run_training(tmp_path / "half", tmp_path / dtype, dtype=dtype).final_loss
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert losses["float32"] != losses["bfloat16"]
    assert losses["auto"] == losses["bfloat16" if amx else "float32"]


def test_a_base_in_half_precision_is_trained_in_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    load_base(base, "bfloat16").save_pretrained(tmp_path / "half")
    trained = {
        said: tensors_of(run_training(tmp_path / "half", tmp_path / said, method="lora", precision=said))
        for said in ("auto", "bfloat16", "float32")
    }
    for name, tensor in trained["auto"].items():
        assert torch.equal(tensor, trained["bfloat16"][name])
    assert any(not torch.equal(tensor, trained["float32"][name]) for name, tensor in trained["auto"].items())


def test_packing_trains(base: Path, tmp_path: Path) -> None:
    result = run_training(base, tmp_path, packing=True, epochs=2, steps=None)
    assert result.steps == result.steps_planned < 2 * 64 / 4
    assert result.final_loss is not None
    assert result.final_loss < read_history(result.history)[0]["loss"]


def test_packing_trains_on_the_same_loss(base: Path, tmp_path: Path) -> None:
    """All examples in one step, padded or packed: one loss, one update. Fails if packed examples see each other."""
    examples = make_examples(8)
    options: dict[str, Any] = {"train_set": examples, "batch_size": 8, "steps": 2, "warmup_frac": 0.0}
    padded = run_training(base, tmp_path / "padded", **options)
    packed = run_training(base, tmp_path / "packed", packing=True, **options)
    losses = [[line["loss"] for line in read_history(r.history)] for r in (padded, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    expected = tensors_of(padded)
    for name, tensor in tensors_of(packed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "quantize"), [("soka", "8bit"), ("soka", "4bit"), ("lora", "4bit")])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:MatMul8bitLt:UserWarning")
def test_quantised_base_trains(base: Path, tmp_path: Path, method: str, quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    result = run_training(base, tmp_path, method=method, quantize=quantize, steps=5, group_by_length=False)
    losses = [line["loss"] for line in read_history(result.history)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert {t.dtype for t in tensors_of(result).values()} == {torch.float32}


# -------------------------------------------------------------------------------------------- evaluation, stopping


def test_early_stopping_keeps_the_best(base: Path, tmp_path: Path) -> None:
    """A rate that overfits: training stops before its end, and the weights kept are the best evaluation's."""
    result = run_training(
        base,
        tmp_path,
        method="full",
        steps=40,
        learning_rate=2e-2,
        schedule="constant",
        train_set=EncodedSet(make_examples(4).examples, 4, 0, 0),
        eval_set=make_examples(16, seed=7),
        eval_every=2,
        early_stopping=3,
        save_every=100,
    )
    evaluated = {line["step"]: line["eval_loss"] for line in read_history(result.history) if "eval_loss" in line}
    best = min(evaluated, key=evaluated.__getitem__)
    assert result.stopped_early
    assert result.steps == best
    assert result.steps_run == best + 3 * 2 < result.steps_planned
    assert result.eval_loss == evaluated[best]
    model = load_trained(base, result)
    examples = make_examples(16, seed=7).examples
    with torch.no_grad():
        per_batch = []
        from soka_serve.data.collate import PadCollator

        for start in range(0, 16, 4):
            per_batch.append(model(**PadCollator(0)(examples[start : start + 4])).loss.item())
    assert sum(per_batch) / 4 == pytest.approx(evaluated[best], rel=1e-4)


JUDGED: dict[str, Any] = {"eval_every": 2, "early_stopping": 3, "answered": 8, "steps": 20, "save_every": 3}
ANNEALED: dict[str, Any] = {"weight_decay": 20.0, "weight_decay_schedule": "cosine"}


def marks(model: Any) -> float:
    """What evaluations find in the order of steps: a number of the weights, so that it is the same after a kill."""
    with torch.no_grad():
        return float(sum(p.abs().sum() for n, p in model.named_parameters() if p.requires_grad)) % 0.37


def test_the_best_answers_are_kept_and_not_the_best_loss(base: Path, tmp_path: Path) -> None:
    asked: list[float] = []
    found = [0.1, 0.5, 0.3, 0.5, 0.2, 0.9]
    result = run_training(
        *(base, tmp_path),
        eval_set=make_examples(8, seed=7),
        accuracy=lambda _: asked.append(1) or found[len(asked) - 1],
        **JUDGED,
    )
    lines = [line for line in read_history(result.history) if "eval_loss" in line]
    assert [line["eval_accuracy"] for line in lines] == found[:5]
    assert (result.steps, result.steps_run, result.stopped_early) == (4, 10, True)
    assert result.eval_loss == next(line["eval_loss"] for line in lines if line["step"] == 4)
    assert min(lines, key=lambda line: line["eval_loss"])["step"] != 4


def test_a_run_that_was_interrupted_keeps_the_same_best_answers(base: Path, tmp_path: Path) -> None:
    options = JUDGED | ANNEALED | {"eval_set": make_examples(8, seed=7)}
    whole = run_training(base, tmp_path / "whole", accuracy=marks, **options)
    seen: list[float] = []

    def interrupted(model: Any) -> float:
        seen.append(marks(model))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return seen[-1]

    with pytest.raises(KeyboardInterrupt):
        run_training(base, tmp_path / "again", accuracy=interrupted, **options)
    again = run_training(base, tmp_path / "again", accuracy=marks, **options)
    assert (again.steps, again.steps_run) == (whole.steps, whole.steps_run)
    assert [x.get("eval_accuracy") for x in read_history(again.history)] == [
        x.get("eval_accuracy") for x in read_history(whole.history)
    ]
    assert all(torch.equal(t, tensors_of(whole)[name]) for name, t in tensors_of(again).items())


def test_answers_need_problems(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"train\.answered is set, and this run has no problems"):
        run_training(base, tmp_path, eval_set=make_examples(8), **JUDGED)


NO_LABELS = EncodedSet([EncodedExample([1, 2], [-100, -100])], total=3, dropped=2, truncated=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eval_every": 2}, DataError, "no evaluation examples"),
        ({"train_set": NO_LABELS}, DataError, "no training examples: 3 were read, 2 dropped"),
        ({"method": "pissa", "quantize": "8bit"}, PlanError, r"base\.quantize holds them in a few bits"),
    ],
    ids=["no evaluation examples", "no training examples", "a quantised base to rewrite"],
)
def test_what_cannot_be_trained(
    base: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "quantize" in options:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(error, match=message):
        run_training(base, tmp_path, **options)


def test_divergence_stops_with_a_mend(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"training diverged: the loss is (nan|inf) at step \d+ of 30") as raised:
        run_training(base, tmp_path, method="full", steps=30, learning_rate=1e30, warmup_frac=0.0)
    assert "lower train.learning_rate" in str(raised.value.hint)


def test_steps_without_a_gradient_are_told(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A term that starts at zero and becomes huge at once leaves a finite loss, and layers that nothing passes."""
    factors = {name: Factors(f.left, 0 * f.right, f.sigma) for name, f in make_factors(base).items()}
    told = []
    for rate in (0.1, 1e8):
        caplog.clear()
        options: dict[str, Any] = {"initial": (), "learning_rate": rate, "warmup_frac": 0.0}
        run_training(base, tmp_path / f"{rate}", factors=factors, adapt=[{"init": "zero"}], **options)
        told.append([r.getMessage() for r in caplog.records if "the gradient is zero" in r.getMessage()])
    assert not told[0]
    (line,) = told[1]
    assert line.endswith("nothing is learned from it (learning_rate is 1e+08)")


@pytest.mark.parametrize("method", ["soka", "full"])
def test_a_base_that_is_not_finite_is_blamed(base: Path, tmp_path: Path, method: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")  # nothing adapts it, so that initialisation never reads it
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"hold NaN or infinity: model\.norm\.weight$"):
        run_training(broken, tmp_path, method=method, steps=2)
