"""A Ray cluster of this machine: several machines as Ray sees it, each with its own CPUs and processes.

    python -m tests.support.ray_cluster MACHINES CPUS_OF_EACH

prints the address, and ends the cluster when its standard input ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.conftest import ROOT
from tests.support.serving import free_port

_STORE_BYTES = 80 * 1024 * 1024  # the least that Ray takes
# A busy machine takes longer than the 30 s that Ray waits for a raylet; and Ray kills its own processes where others
# have taken the machine's memory.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_raylet_start_wait_time_s": "180",
}


class RayCluster:
    """A running cluster: its address, and the processes that belong to it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.address = process.stdout.readline().strip()
        assert self.address, "the cluster did not start"

    def processes(self, title: str) -> list[psutil.Process]:
        """Its processes whose title begins so: `ray::NAME` for what runs a task or an actor."""
        return [p for p in psutil.Process(self._process.pid).children(recursive=True) if _title(p).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@contextmanager
def ray_cluster(machines: int, cpus: int) -> Iterator[RayCluster]:
    """Start a cluster; it ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray_cluster", str(machines), str(cpus)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_SETTINGS, "PYTHONPATH": os.environ.get("PYTHONPATH", "") or str(ROOT)},
    ) as process:
        try:
            yield RayCluster(process)
        finally:
            rest = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
            _, alive = psutil.wait_procs(rest, 10)
            for left in alive:
                left.kill()


def main() -> None:
    """Run a cluster until standard input ends."""
    from ray.cluster_utils import Cluster

    machines, cpus = map(int, sys.argv[1:])
    cluster = Cluster()
    for _ in range(machines):
        # Ports that are given: a raylet waits 15 s for agents to tell their own, which on a busy machine is not enough.
        ports = {f"{agent}_port": free_port() for agent in ("metrics_agent", "metrics_export", "runtime_env_agent")}
        cluster.add_node(
            num_cpus=cpus,
            num_gpus=0,
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            dashboard_agent_listen_port=free_port(),
            **ports,
        )
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
