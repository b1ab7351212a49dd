"""The Ray Serve application of replicas on a cluster of this machine, as `serve run` starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.conftest import ROOT
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.serving import ONE_PROCESS, Server, free_port

START_S = 900
REAL = "soka_serve.serving.replicas:app"
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **ONE_PROCESS}


class Application(Server):
    """The running application; `log` is what `serve run` wrote."""

    def __init__(self, url: str, log: Path, cluster: RayCluster) -> None:
        super().__init__(url, log)
        self._cluster = cluster

    def replicas(self) -> list[psutil.Process]:
        """The actors that hold a vLLM each."""
        return self._cluster.processes("ray::ServeReplica:default:Replica")

    def engines(self) -> dict[int, Server]:
        """The replicas' own servers, by the process id of each."""
        found = {}
        for process in self._cluster.processes(f"{sys.executable} -m soka_serve.serving.vllm_command"):
            words = process.cmdline()
            found[process.pid] = Server(f"http://127.0.0.1:{words[words.index('--port') + 1]}", self.log)
        return found

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of its cluster whose title begins so."""
        return self._cluster.processes(title)

    def slot_fills(self) -> float:
        """How many times any of them has put an adapter into a slot."""
        return sum(engine.metric("soka:slot_fills_total", rank="0") for engine in self.engines().values())


@contextmanager
def replicas(folder: Path, arguments: Mapping[str, Any], import_path: str = REAL) -> Iterator[Application]:
    """Start the application with these arguments, wait until it answers, and end it and its cluster."""
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "default",
                "import_path": import_path,
                "runtime_env": {"env_vars": _ENVIRONMENT},
                "args": dict(arguments),
            }
        ],
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    with ray_cluster(machines=1, cpus=8) as cluster, log.open("w") as output:
        command = [str(Path(sys.executable).with_name("serve")), "run", "--address", cluster.address]
        process = subprocess.Popen(
            [*command, str(folder / "serve.yaml")],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") or str(ROOT)},
        )
        try:
            application = Application(f"http://127.0.0.1:{port}", log, cluster)
            wait_until(lambda: answers(application, "/v1/models"), process)
            yield application
        finally:
            process.send_signal(signal.SIGINT)  # at which it takes the application down
            process.wait(60)


def wait_until(true: Any, process: subprocess.Popen[Any] | None = None, timeout_s: float = START_S) -> None:
    """Wait until a function returns True."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert process is None or process.poll() is None, "serve run has ended"
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        time.sleep(0.5)


def answers(server: Server, path: str) -> bool:
    """Whether a server answers a GET."""
    try:
        with urllib.request.urlopen(server.url + path, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
