"""Several processes under `accelerate launch`, and the accelerate configs that ship."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

from soka_serve.compiler.history import read_history
from soka_serve.compiler.train.installed import check_installed
from soka_serve.compiler.train.run import TrainResult
from soka_serve.errors import PlanError
from tests.conftest import ROOT
from tests.support.launched import NO_GPU, launched_environments
from tests.support.preloaded import start
from tests.support.serving import free_port
from tests.support.training import make_base, make_examples, make_manifest, make_mixed_start, run_training

OPTIONS: dict[str, Any] = {"steps": 8, "save_every": 4, "learning_rate": 0.15, "weight_decay": 0.5}
REGULARISED = {"sorsa": 1.0, "kasa": 0.1, "consistency": 0.5, "protect": 1}
KINDS = {"multi_cpu": "Parameter", "fsdp": "DTensor"}


@dataclass
class Launched:
    """A config's name, the environments that it makes, and the folder of its runs, with `base` in it."""

    config: str
    environments: list[dict[str, str]]
    folder: Path

    def train(self, work_dir: str, **options: Any) -> list[tuple[int, str]]:
        """Train in two processes with these environments; the exit code and the log of each."""
        port = {"MASTER_PORT": str(free_port()), **NO_GPU}
        command = ["tests.support.train_launched", self.folder / "base", self.folder / work_dir, json.dumps(options)]
        programs = []
        for rank, environment in enumerate(self.environments):
            with Path(os.devnull).open() as nothing, (self.folder / f"{rank}.log").open("w") as log:
                files = (nothing, log, log)
                programs.append(start("soka", command, cwd=self.folder, files=files, env=environment | port))
        return [(program.wait(300), (self.folder / f"{rank}.log").read_text()) for rank, program in enumerate(programs)]


@pytest.fixture(scope="module", params=sorted(KINDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """With a finished run in `two`, plain or sharded (FSDP 2, made to run on CPUs)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_base(folder / "base")
    # Sharded ones on two machines, the others on one.
    environments = launched_environments(request.param, folder, 2 if request.param == "fsdp" else 1)
    launched = Launched(request.param, environments, folder)
    for code, log in launched.train("two", **OPTIONS, batch_size=2):
        assert code == 0, log
    return launched


def check_alike(result: TrainResult, expected: TrainResult) -> None:
    """The same tensors, to what the order of sums makes of them."""
    tensors, others = (load_file(r.directory / "adapter_model.safetensors") for r in (result, expected))
    assert tensors.keys() == others.keys()
    for key, tensor in others.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(whole: Launched) -> None:
    """Same losses, same weights; only the first process writes."""
    folder = whole.folder
    result = TrainResult.read(folder / "two")
    history = read_history(result.history)
    losses = [line["loss"] for line in history]
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])
    single = run_training(folder / "base", folder / "one", **OPTIONS, batch_size=4)
    expected = read_history(single.history)
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-3)
    module = "model.layers.1.mlp.down_proj"
    for key in ("sigma", "effective_rank"):
        assert history[-1]["modules"][module][key] == pytest.approx(expected[-1]["modules"][module][key], rel=1e-2)
    assert result.trainable_parameters == single.trainable_parameters
    tensors = load_file(result.directory / "adapter_model.safetensors")
    alone = load_file(single.directory / "adapter_model.safetensors")
    assert tensors.keys() == alone.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-3)
    reports = [json.loads((folder / f"two-{rank}.json").read_text()) for rank in range(2)]
    assert [report["sharded"] for report in reports] == [[KINDS[whole.config]]] * 2
    assert {"history.jsonl", "adapter_model.safetensors"} <= set(reports[0]["written"])
    # Its random state is all that the second process adds to a resume point.
    assert reports[1]["written"] == ["rng_state_1.pth"]


@pytest.mark.slow
def test_two_processes_regularise_like_one(whole: Launched) -> None:
    """Sharded or not, every process adds the same, and the history has one value."""
    folder = whole.folder
    options = OPTIONS | {"weight_decay": 0.0, "regularise": REGULARISED}
    for code, log in whole.train("regularised", **options, batch_size=2):
        assert code == 0, log
    result = TrainResult.read(folder / "regularised")
    single = run_training(folder / "base", folder / "regularised-one", **options, batch_size=4)
    plain = run_training(folder / "base", folder / "plain-one", **options | {"regularise": {}}, batch_size=4)
    for line, expected in zip(read_history(result.history), read_history(single.history), strict=True):
        for name in REGULARISED:
            assert line[name] == pytest.approx(expected[name], rel=2e-2, abs=1e-4)
    tensors = load_file(result.directory / "adapter_model.safetensors")
    unregularised = load_file(plain.directory / "adapter_model.safetensors")
    by_one = load_file(single.directory / "adapter_model.safetensors")
    for key, tensor in by_one.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=2e-3, atol=2e-3)
    apart, moved = (
        sum(float((tensors[key] - other[key]).square().sum()) ** 0.5 for key in tensors)
        for other in (by_one, unregularised)
    )
    assert moved > 5 * apart


@pytest.mark.slow
def test_two_processes_resume(whole: Launched) -> None:
    """A run that dies after its first resume point goes on, and ends with the weights of one that did not."""
    cut = whole.folder / "cut"
    for code, log in whole.train("cut", **OPTIONS, batch_size=2, diverge_at=6):
        assert code == 1
        assert "training diverged: the loss is nan at step 6 of 8" in log
    assert (cut / "checkpoint-4" / "complete.json").exists()
    for code, log in whole.train("cut", **OPTIONS, batch_size=2):
        assert code == 0, log
    tensors = load_file(cut / "adapter" / "adapter_model.safetensors")
    for key, tensor in load_file(whole.folder / "two" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensors[key], tensor)


@pytest.mark.slow
def test_two_processes_rewrite_and_choose_like_one(whole: Launched) -> None:
    """Terms made orthogonal, a weight decay that fades and, where processes have the whole model, the weights of the
    best answers: the first process asks, and both stop."""
    folder = whole.folder
    options = OPTIONS | {
        **{"initial": (), "adapt": [{"init": "zero"}], "regularise": {"orthogonalise": 2}},
        **{"weight_decay": 2.0, "weight_decay_schedule": "cosine"},
    }
    accuracies = [0.1, 0.5, 0.3] if whole.config == "multi_cpu" else []
    if accuracies:
        options |= {"eval_every": 2, "early_stopping": 1, "answered": 8}
    for code, log in whole.train("rewritten", **options, accuracies=accuracies, batch_size=2):
        assert code == 0, log
    reports = [json.loads((folder / f"rewritten-{rank}.json").read_text()) for rank in range(2)]
    assert [report["asked"] for report in reports] == [len(accuracies), 0]

    def alone(name: str, **others: Any) -> TrainResult:
        left = iter(accuracies)
        judged = {"eval_set": make_examples(8, seed=7), "accuracy": lambda _: next(left)} if accuracies else {}
        return run_training(folder / "base", folder / name, **options | judged | others, batch_size=4)

    result, single = TrainResult.read(folder / "rewritten"), alone("rewritten-one")
    assert (result.steps, result.steps_run) == (single.steps, single.steps_run) == ((4, 6) if accuracies else (8, 8))
    for line, expected in zip(read_history(result.history), read_history(single.history), strict=True):
        assert line.keys() == expected.keys()
        for key in {"loss", "orthogonalise", "eval_loss", "eval_accuracy"} & expected.keys():
            assert line[key] == pytest.approx(expected[key], rel=1e-2), key
    check_alike(result, single)
    unfaded = alone("unfaded", weight_decay_schedule="constant")
    with pytest.raises(AssertionError):
        check_alike(result, unfaded)


@pytest.mark.slow
def test_two_processes_train_what_each_form_says(whole: Launched) -> None:
    """With another optimiser than AdamW, where it can step what each process has a part of."""
    optimiser = "adafactor" if whole.config == "multi_cpu" else "adamw"
    options = OPTIONS | {"steps": 3, "optimiser": optimiser, "weight_decay_schedule": "linear"}
    for code, log in whole.train("form", **options, mixed=True, batch_size=2):
        assert code == 0, log
    result, start = TrainResult.read(whole.folder / "form"), make_mixed_start(whole.folder / "base")
    single = run_training(whole.folder / "base", whole.folder / "form-one", **options, **start, batch_size=4)
    assert result.trainable_parameters == single.trainable_parameters
    check_alike(result, single)
    tensors = load_file(result.directory / "adapter_model.safetensors")
    for number, (name, terms) in enumerate(start["factors"].items()):
        moved = {
            part
            for part in ("left", "right", "sigma")
            if not torch.equal(tensors[f"base_model.model.{name}.soka_{part}"], getattr(terms, part))
        }
        kind = 3 if name in start["cut"] else number % 4
        assert moved == [set(), {"sigma"}, {"left", "sigma"}, {"left", "right"}][kind], name
        if name in start["cut"]:
            assert torch.equal(tensors[f"base_model.model.{name}.soka_left_initial"], start["cut"][name].left)


@pytest.mark.slow  # as the runs of its launch are
def test_only_sharded_launches_refuse_an_optimiser(whole: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in whole.environments[0].items():
        monkeypatch.setenv(key, value)
    check_installed(make_manifest(optimiser="adamw").train)
    refused = pytest.raises(PlanError, match=r'train\.optimiser = "adafactor" does not go with FSDP 2')
    with refused if whole.config == "fsdp" else nullcontext():
        check_installed(make_manifest(optimiser="adafactor").train)


@pytest.mark.parametrize(("name", "kind"), [("multi_cpu", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_accelerate_reads_the_configs(name: str, kind: str) -> None:
    config = load_config_from_file(str(ROOT / "eval" / "configs" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.num_processes == 2
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
