"""What `accelerate launch` gives the processes that it starts, for programs that start without it."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ROOT
from tests.support.preloaded import start
from tests.support.serving import free_port

# What `accelerate launch` says to the processes that it starts.
LAUNCHED = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def launched_environments(config: str, folder: Path, machines: int) -> list[dict[str, str]]:
    """What `accelerate launch` gives each of two processes with a shipped config.

    Args:
        config: its name.
        folder: for notes.
        machines: 2 for a process on each of two machines (two addresses of this one).
    """
    command = ["accelerate.commands.launch", "--config_file", ROOT / "eval" / "configs" / f"{config}.yaml"]
    command += ["--num_machines", machines, "--main_process_port", free_port() if machines > 1 else 0]
    command += ["--main_process_ip", "127.0.0.1"] if machines > 1 else []
    noting = ["--no_python", "sh", "-c", f"env -0 > {folder}/environment-$RANK"]
    launches = [
        start("soka", [*map(str, command), "--machine_rank", str(rank), *noting], cwd=folder, env=NO_GPU)
        for rank in range(machines)
    ]
    assert [launch.wait(120) for launch in launches] == [0] * machines
    texts = [(folder / f"environment-{rank}").read_text().split("\0")[:-1] for rank in range(2)]
    return [dict(line.split("=", 1) for line in text if line.startswith(LAUNCHED)) for text in texts]
