"""A running `soka-serve serve` for the tests, and the metrics that its server shows."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.support import preloaded

START_S = 900


class Command:
    """A running `soka-serve serve`.

    Args:
        fresh: in an interpreter of its own, and vLLM in others, as a user starts it: a minute of processor time.
    """

    def __init__(self, folder: Path, *arguments: str | Path, fresh: bool = False, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._groups: set[int] = set()
        self.output = folder / f"output-{self.port}.txt"
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO",  # TRL, imported by another test, sets it to ERROR for the whole process
            "XDG_CACHE_HOME": str(folder / "cache"),
            **environment,
        }
        given = list(map(str, arguments))
        cut = given.index("--") if "--" in given else len(given)
        command = ["soka_serve", "serve", *given[:cut], "--port", str(self.port), *given[cut:]]
        self.process: subprocess.Popen[bytes] | preloaded.Program
        with self.output.open("w") as output, Path(os.devnull).open() as nothing:
            if fresh:
                command = [sys.executable, "-m", *command]
                self.process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=self.environment)
            else:
                files = (nothing, output, output)
                self.process = preloaded.start("vllm", command, cwd=folder, files=files, env=self.environment)

    @property
    def text(self) -> str:
        """Everything that it wrote so far."""
        return self.output.read_text()

    @property
    def log(self) -> Path:
        """vLLM's log."""
        return Path(self.environment["XDG_CACHE_HOME"]) / "soka-serve" / "logs" / f"vllm-{self.port}.log"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if "ready after" in self.text and "# " in self.text:
                return
            time.sleep(0.5)
        log = self.log.read_text()[-6000:] if self.log.exists() else ""
        raise AssertionError(f"not ready:\n{self.text}\n{log}")

    def wait(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + START_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self.group()
            time.sleep(0.2)
        return self.process.wait()

    def group(self) -> list[int]:
        """The running processes of vLLM's group, which is known once this was called while soka-serve ran."""
        processes = _processes()
        self._groups |= {group for pid, parent, group, _ in processes if parent == self.process.pid and pid == group}
        return [pid for pid, _, group, state in processes if group in self._groups and state not in "ZX"]

    def end(self) -> None:
        """Whatever happened, leave nothing behind."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(180)


def _processes() -> list[tuple[int, int, int, str]]:
    """(pid, parent, group, state) of all processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        found.append((int(stat.parent.name), int(parent), int(group), state))
    return found


def samples(url: str) -> dict[tuple[str, str], float]:
    """(name, labels as written) -> value of our metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    found = {}
    for line in lines:
        match = re.match(r"(soka:\w+)\{?([^}]*)\}? (\S+)$", line)
        if match:
            found[match[1], match[2]] = float(match[3])
    return found


def wait_for_requests(url: str, before: dict[tuple[str, str], float], adapter: str, count: int) -> tuple[float, float]:
    """Until `count` of the adapter's requests have ended since `before`: how many were aborted, how many complete."""
    deadline = time.monotonic() + 180
    while True:
        now = samples(url)
        labels = [("soka:requests_total", f'adapter="{adapter}",reason="{reason}"') for reason in ("abort", "length")]
        aborted, complete = (now.get(label, 0) - before.get(label, 0) for label in labels)
        if aborted + complete >= count:
            return aborted, complete
        assert time.monotonic() < deadline, now
        time.sleep(0.2)
