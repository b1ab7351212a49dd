"""What a training run leaves behind: pruned terms, its history, resume points, and folders of somebody else's."""

from __future__ import annotations

import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from transformers import TrainingArguments

from soka_serve.adapter.format import read_adapter
from soka_serve.compiler.history import read_history
from soka_serve.compiler.train.callbacks import Pruning, Spectrum, tracker_metrics
from soka_serve.compiler.train.resume import newest_point
from soka_serve.compiler.train.run import TrainResult
from soka_serve.compiler.train.trainer import SokaTrainer
from soka_serve.data.collate import PadCollator
from soka_serve.errors import BuildError, PlanError
from soka_serve.kron import dense_delta
from soka_serve.kron.factors import energy_by_term
from soka_serve.manifest.schema import Prune
from tests.support.training import (
    interrupted_at,
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


# ---------------------------------------------------------------------------------------------------------- pruning


def test_pruning_drops_terms_and_goes_on(base: Path, tmp_path: Path) -> None:
    factors = make_factors(base, rank=3)
    result = run_training(
        base, tmp_path, factors=factors, steps=12, prune={"threshold": 0.3, "every": 2, "patience": 2, "min": 1}
    )
    adapter = read_adapter(result.directory)
    assert result.pruned
    assert all(adapter.factors[name].rank == 3 - result.pruned.get(name, 0) for name in factors)
    assert all(adapter.initial[name].rank == adapter.factors[name].rank for name in factors)
    history = read_history(result.history)
    ranks = [sum(m["rank"] for m in line["modules"].values()) for line in history]
    assert ranks[0] == 3 * len(factors)
    assert ranks[-1] == 3 * len(factors) - sum(result.pruned.values())
    assert ranks == sorted(ranks, reverse=True)
    assert history[-1]["loss"] < history[0]["loss"]
    assert result.trainable_parameters == sum(f.parameters - f.rank for f in adapter.factors.values())


def test_pruned_modules_train_at_the_rates_of_their_terms(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the history has the schedule's rate, which pruning does not change."""
    trainers: list[Any] = []
    make = SokaTrainer.create_optimizer
    monkeypatch.setattr(SokaTrainer, "create_optimizer", lambda self, model=None: trainers.append(self) or make(self))
    prune = {"every": 1, "patience": 1}
    histories = [
        read_history(
            run_training(
                *(base, tmp_path / name),
                rank=3,
                steps=3,
                log_every=1,
                schedule="linear",
                prune=prune | {"threshold": at},
            ).history
        )
        for name, at in (("whole", 1e-9), ("pruned", 0.4))
    ]
    whole, pruned = (trainer.optimizer.param_groups for trainer in trainers)
    left = [len(group["params"][0]) for group in pruned]
    assert {len(group["params"][0]) for group in whole} == {3}
    assert min(left) < 3
    expected = [group["initial_lr"] * math.sqrt(3 / terms) for group, terms in zip(whole, left, strict=True)]
    assert [group["initial_lr"] for group in pruned] == pytest.approx(expected, rel=1e-12)
    assert trainers[1].lr_scheduler.base_lrs == [group["initial_lr"] for group in pruned]
    rates = [[line["learning_rate"] for line in history] for history in histories]
    assert rates[1] == pytest.approx(rates[0], rel=1e-12)


def test_pruning_needs_one_process(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(PlanError, match=r"train\.prune needs a single process; there are 2"):
        run_training(base, tmp_path, prune={"threshold": 0.3})


def test_a_term_is_dropped_after_failing_in_a_row() -> None:
    pruning = Pruning(Prune(threshold=0.1, every=1, patience=2, min=1))
    assert pruning.check("m", [10.0, 0.5, 9.0]) == [0, 1, 2]
    assert pruning.check("m", [10.0, 5.0, 9.0]) == [0, 1, 2]  # recovered: counted from the start
    assert pruning.check("m", [10.0, 0.5, 9.0]) == [0, 1, 2]
    assert pruning.check("m", [10.0, 0.5, 9.0]) == [0, 2]
    assert pruning.failures == {"m": [0, 0]}


def test_pruning_keeps_the_strongest_up_to_min() -> None:
    pruning = Pruning(Prune(threshold=0.9, every=1, patience=1, min=2))
    assert pruning.check("m", [1.0, 3.0, 2.0]) == [1, 2]


def test_pruning_leaves_a_zero_start_alone() -> None:
    assert Pruning(Prune(threshold=0.5, every=1, patience=1)).check("m", [0.0, 0.0]) == [0, 1]


# ---------------------------------------------------------------------------------------------------------- history


def test_history_has_every_module(base: Path, tmp_path: Path) -> None:
    result = run_training(base, tmp_path, steps=5, log_every=2, eval_every=2, eval_set=make_examples(8, seed=3))
    history = read_history(result.history)
    trained = [line for line in history if "loss" in line]
    assert [line["step"] for line in trained] == [2, 4, 5]
    assert [line["step"] for line in history if "eval_loss" in line] == [2, 4, 5]
    for line in trained:
        assert all(math.isfinite(line[key]) for key in ("loss", "grad_norm", "learning_rate"))
        assert set(line["modules"]) == set(target_names())
    last = trained[-1]["modules"]
    adapter = read_adapter(result.directory)
    for name, state in last.items():
        assert state["rank"] == 2
        assert state["sigma"] == pytest.approx(energy_by_term(adapter.factors[name]).sqrt().tolist())
        assert 1 <= state["effective_rank"] <= 2 + 1e-9


def test_effective_rank_is_of_what_training_added(base: Path, tmp_path: Path) -> None:
    """Against dense deltas: shares of ||sigma L (x) R - sigma0 L0 (x) R0||^2 per term."""
    result = run_training(base, tmp_path, steps=3)
    adapter = read_adapter(result.directory)
    modules = read_history(result.history)[-1]["modules"]
    for name in target_names()[:3]:
        theta, initial = adapter.factors[name], adapter.initial[name]
        energy = torch.stack(
            [(dense_delta(theta.terms(k)) - dense_delta(initial.terms(k))).double().square().sum() for k in range(2)]
        )
        share = energy / energy.sum()
        assert modules[name]["effective_rank"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)


def test_tracker_metrics() -> None:
    metrics = tracker_metrics({"a": Spectrum((2.0, 1.0), (1.0, 1.0)), "b": Spectrum((3.0,), (9.0,))})
    assert metrics["effective_rank"] == pytest.approx(1.5)
    assert metrics["effective_rank/a"] == pytest.approx(2.0)
    assert metrics["sigma/a/1"] == 1.0
    assert metrics["rank/b"] == 1
    assert tracker_metrics({}) == {}


def test_a_finished_run_is_not_repeated(base: Path, tmp_path: Path) -> None:
    first = run_training(base, tmp_path)
    stamp = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run_training(base, tmp_path) == first == TrainResult.read(tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_another_recipe_starts_afresh(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_training(base, tmp_path)
    other = run_training(base, tmp_path, steps=6)
    assert other.steps == 6
    assert "another recipe; starting afresh" in caplog.text


def test_no_result(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no finished training run"):
        TrainResult.read(tmp_path)


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_saving(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes through; the half-written resume point is not taken for a whole one. An epoch has four steps."""
    options: dict[str, Any] = {"steps": 6, "save_every": 2, "train_set": make_examples(16)}
    whole = tensors_of(run_training(base, tmp_path / "whole", **options))
    save = torch.save

    def interrupted(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        if "checkpoint-4" in str(path):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_training(base, tmp_path / "cut", **options)
    assert (tmp_path / "cut" / "checkpoint-4").exists()
    point = newest_point(tmp_path / "cut")
    assert point is not None
    assert point.step == 2
    resumed = tensors_of(run_training(base, tmp_path / "cut", **options))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("initial", "moves_sigma"), [((), False), (("zero",), True), (None, False)])
def test_a_start_of_zero_goes_on_as_it_began(
    base: Path, tmp_path: Path, initial: tuple[str, ...] | None, moves_sigma: bool
) -> None:
    """Whether sigma is trained depends on the start: terms of zero, alone or beside others, or sigmas of zero."""
    factors = make_factors(base)
    first, second, *_ = factors
    if initial is None:  # every term is subtracted
        options: dict[str, Any] = {}
    else:  # nothing is, or all but one module
        subtracted = set(factors) - {first} if initial else ()
        options = {"initial": subtracted}
        for name in set(factors) - set(subtracted):
            factors[name] = replace(factors[name], right=torch.zeros_like(factors[name].right))
    if moves_sigma:
        factors[second] = replace(factors[second], sigma=torch.zeros_like(factors[second].sigma))
    options |= {"factors": factors, "steps": 6, "save_every": 3}
    whole = run_training(base, tmp_path / "whole", **options)
    with interrupted_at(4):
        run_training(base, tmp_path / "cut", **options)
    resumed = tensors_of(run_training(base, tmp_path / "cut", **options))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors_of(whole).items())
    trained = read_adapter(whole.directory).factors
    moved = {name for name, start in factors.items() if not torch.equal(trained[name].sigma, start.sigma)}
    assert moved == ({second} if moves_sigma else set())


@pytest.mark.parametrize("grouped", [True, False])
def test_one_of_two_processes_goes_on_with_the_examples_of_its_epoch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    """The second epoch has another order than the first. An epoch has four steps here; a run goes on after six."""
    seen: list[list[list[int]]] = []
    call = PadCollator.__call__

    def watched(self: PadCollator, rows: Any) -> Any:
        seen[-1].append([id_ for row in rows for id_ in row.input_ids])
        return call(self, rows)

    monkeypatch.setattr(PadCollator, "__call__", watched)
    monkeypatch.setattr(
        "accelerate.accelerator.prepare_data_loader",
        lambda *a, **k: prepare_data_loader(*a, **k | {"num_processes": 2, "process_index": 0}),
    )
    options: dict[str, Any] = {"steps": 8, "save_every": 6, "train_set": make_examples(32), "group_by_length": grouped}
    seen.append([])
    run_training(base, tmp_path / "whole", **options)
    seen.append([])
    with interrupted_at(6):
        run_training(base, tmp_path / "cut", **options)
    seen.append([])
    run_training(base, tmp_path / "cut", **options)
    assert len(seen[0]) == 8
    assert seen[0][:4] != seen[0][4:]
    assert seen[2] == seen[0][6:]


@pytest.mark.parametrize("limit", [8_000, 50_000, 45_000])
def test_files_that_cannot_grow(base: Path, tmp_path: Path, limit: int) -> None:
    """The kernel refuses to write the adapter (8 kB), or the optimiser's state, as on a full disk."""
    factors = make_factors(base)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(BuildError, match="cannot write") as raised:
            run_training(base, tmp_path, factors=factors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.hint
    assert run_training(base, tmp_path, factors=factors).steps == 4


def test_tensorboard_gets_every_module(base: Path, tmp_path: Path) -> None:
    """The real tracker, read back from its event files; the state that each checkpoint holds keeps none of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(base, tmp_path, report_to=["tensorboard"], steps=4)
    (events,) = tmp_path.glob("runs/*/events.*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    tags = set(read.Tags()["scalars"])
    name = target_names()[0]
    modules = {f"train/effective_rank/{name}", f"train/rank/{name}", f"train/sigma/{name}/0", f"train/sigma/{name}/1"}
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/effective_rank"} | modules <= tags
    history = read_history(TrainResult.read(tmp_path).history)
    losses = {line["step"]: line["loss"] for line in history if "loss" in line}
    assert {s.step: s.value for s in read.Scalars("train/loss")} == pytest.approx(losses)
    assert len(losses) == 4
    sigma = {line["step"]: line["modules"][name]["sigma"][0] for line in history if "loss" in line}
    assert {s.step: s.value for s in read.Scalars(f"train/sigma/{name}/0")} == pytest.approx(sigma)


@pytest.mark.parametrize("name", ["checkpoint-500/model.bin", "adapter/adapter_model.safetensors", "history.jsonl"])
@pytest.mark.parametrize("text", [None, "{}", "[]", "{"])
def test_a_folder_of_somebody_elses_training_is_left_alone(
    base: Path, tmp_path: Path, name: str, text: str | None
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(BuildError, match=f"holds {name.split('/')[0]}, and no run.json"):
        run_training(base, tmp_path)
    assert (tmp_path / name).read_text() == "mine"
