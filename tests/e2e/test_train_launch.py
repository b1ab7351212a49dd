"""Several processes under `accelerate launch`, and the accelerate configs that ship."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

from soka_serve.compiler.history import read_history
from soka_serve.compiler.train.run import TrainResult
from tests.support.preloaded import start
from tests.support.serving import free_port
from tests.support.training import make_base, run_training


@pytest.fixture(scope="module")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[2]


MODULE = "tests.support.train_launched"


def launch(root: Path, folder: Path, name: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Train in two processes with a shipped config: from `base` to `two`."""
    config = root / "eval" / "configs" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", "-m", MODULE, str(folder / "base"), str(folder / "two")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, json.dumps(options)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch_as(reports: list[dict[str, Any]], folder: Path, work_dir: Path, **options: Any) -> list[tuple[int, str]]:
    """Train in processes with the environments of reported ones; the exit code and the log of each."""
    port = {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    programs = []
    for rank, report in enumerate(reports):
        command = [MODULE, folder / "base", work_dir, json.dumps(options)]
        with Path(os.devnull).open() as nothing, (folder / f"{rank}.log").open("w") as log:
            files = (nothing, log, log)
            programs.append(start("soka", command, cwd=folder, files=files, env=report["environment"] | port))
    return [(program.wait(300), (folder / f"{rank}.log").read_text()) for rank, program in enumerate(programs)]


def reports_of(folder: Path) -> list[dict[str, Any]]:
    """What the two processes of the first run noted."""
    return [json.loads((folder / f"two-{rank}.json").read_text()) for rank in range(2)]


OPTIONS: dict[str, Any] = {"steps": 8, "save_every": 4, "learning_rate": 0.15}
KINDS = {"multi_cpu": "Parameter", "fsdp": "DTensor"}


@pytest.fixture(scope="module", params=sorted(KINDS))
def whole(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A finished run of two processes, plain or sharded (FSDP 2, made to run on CPUs): (config, its folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_base(folder / "base")
    done = launch(root, folder, request.param, **OPTIONS, batch_size=2)
    assert done.returncode == 0, done.stderr
    return request.param, folder


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(whole: tuple[str, Path]) -> None:
    """Same losses, same weights; only the first process writes."""
    name, folder = whole
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
    reports = reports_of(folder)
    assert [(r["environment"]["WORLD_SIZE"], r["sharded"]) for r in reports] == [("2", [KINDS[name]])] * 2
    assert {"history.jsonl", "adapter_model.safetensors"} <= set(reports[0]["written"])
    # Its random state is all that the second process adds to a resume point.
    assert reports[1]["written"] == ["rng_state_1.pth"]


@pytest.mark.slow
def test_two_processes_resume(whole: tuple[str, Path]) -> None:
    """A run that dies after its first resume point goes on, and ends with the weights of one that did not."""
    _, folder = whole
    cut = folder / "cut"
    for code, log in launch_as(reports_of(folder), folder, cut, **OPTIONS, batch_size=2, diverge_at=6):
        assert code == 1
        assert "training diverged: the loss is nan at step 6 of 8" in log
    assert (cut / "checkpoint-4" / "complete.json").exists()
    for code, log in launch_as(reports_of(folder), folder, cut, **OPTIONS, batch_size=2):
        assert code == 0, log
    tensors = load_file(cut / "adapter" / "adapter_model.safetensors")
    for key, tensor in load_file(folder / "two" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensors[key], tensor)


@pytest.mark.parametrize(("name", "kind"), [("multi_cpu", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_accelerate_reads_the_configs(root: Path, name: str, kind: str) -> None:
    config = load_config_from_file(str(root / "eval" / "configs" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.num_processes == 2
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
