"""What a user waits for before anything useful happens, each in fresh processes.

    python -m eval.bench.startup --out eval/results/startup.json

- commands that must answer at once: their wall time;
- `build`: wall time of the shortest one (four steps, no calibration, adapter only) and of the same build again, with
  nothing to do; and how much of the first one is imports;
- `serve`: wall time until `soka-serve serve` of that build says how to ask it (its adapter was probed then), and until
  plain vLLM on the same base with the same options but those for adapters answers /health, in turn; and the processor
  time of all processes until then.

`--quick` leaves out the last two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from soka_serve.io.versions import versions

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
COMMANDS = (["--help"], ["schema"], ["plan", "manifests/math.toml"], ["plan", "manifests/llama2-7b/gsm8k.toml"])
MANIFEST = """\
schema = 1
name = "start"

[base]
builtin = "tiny"

[[adapt]]
calibration_batches = 0

[train]
steps = 4
learning_rate = 0.1  # so that few steps have an effect, which serve asks for

[train.data]
jsonl = "data.jsonl"

[output]
write = ["adapter"]
"""
EXAMPLE = {"prompt": "Q: 1 + 1?\nA:", "completion": " 2"}  # no marker of an answer, so that nothing is asked at the end
BUILD_IMPORTS = "from soka_serve.compiler import papers, stages; from soka_serve.compiler.train import run, train"


def run(command: list[str], cwd: Path = ROOT) -> str:
    """Its standard output. The hub is not asked."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, env=env).stdout


def seconds(command: list[str], repeats: int, cwd: Path = ROOT) -> list[float]:
    """Wall seconds, once to warm the disk's cache and then `repeats` times."""
    taken = []
    for _ in range(repeats + 1):
        started = time.monotonic()
        run(command, cwd)
        taken.append(round(time.monotonic() - started, 3))
    return taken[1:]


def build_times(folder: Path, repeats: int) -> dict[str, list[float]]:
    """The shortest build, the same with nothing to do, and the imports alone."""
    (folder / "start.toml").write_text(MANIFEST)
    (folder / "data.jsonl").write_text(f"{json.dumps(EXAMPLE)}\n" * 64)
    build = [str(BIN / "soka-serve"), "build", "start.toml"]
    return {
        "four steps": seconds([*build, "--force"], repeats, folder),
        "nothing to do": seconds(build, repeats, folder),
        "imports of a build": seconds([sys.executable, "-c", BUILD_IMPORTS], repeats),
    }


def is_healthy(port: int) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def until_ready(command: list[str], cwd: Path, is_ready: Callable[[str], bool]) -> dict[str, float]:
    """Wall and processor seconds until `is_ready` of what it has printed; the server is then stopped."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    log = cwd / "server.log"
    started = time.monotonic()
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        while not is_ready(log.read_text(errors="replace")):
            if server.poll() is not None:
                raise SystemExit(f"{shlex.join(command)} ended:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        wall = time.monotonic() - started
        everyone = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        cpu = sum(times.user + times.system for times in (process.cpu_times() for process in everyone))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(60)
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


def serve_times(folder: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """`soka-serve serve` and the same base in plain vLLM, in turn."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = [str(BIN / "soka-serve"), "serve", "build/start/adapter", "--port", str(port)]
    shown = run([*ours, "--dry-run"], folder)
    line = shlex.split(next(line for line in shown.splitlines() if " --model " in line))
    first = next(i for i, word in enumerate(line) if "=" not in word)  # after the environment
    kept = line[first : line.index("--enable-lora")] + ["--enforce-eager"] * ("--enforce-eager" in line)
    plain = ["env", *line[:first], *kept]
    found: dict[str, list[dict[str, float]]] = {"soka-serve serve": [], "vLLM alone": []}
    for repeat in range(repeats + 1):  # the first round warms caches
        rounds = {
            "soka-serve serve": until_ready(ours, folder, lambda said: "curl" in said),
            "vLLM alone": until_ready(plain, folder, lambda _: is_healthy(port)),
        }
        for name, times in rounds.items():
            found[name] += [times] if repeat else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="commands only, no build and no server")
    arguments = parser.parse_args()
    command = f"python -m eval.bench.startup --repeats {arguments.repeats}" + " --quick" * arguments.quick
    soka = str(BIN / "soka-serve")
    report: dict[str, Any] = {
        "command": command,
        "hardware": {"machine": platform.machine(), "cpu_cores": os.cpu_count()},
        "versions": versions(),
        "seconds": {" ".join(["soka-serve", *c]): seconds([soka, *c], arguments.repeats) for c in COMMANDS},
    }
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            report["build_seconds"] = build_times(Path(name), arguments.repeats)
            report["serve"] = serve_times(Path(name), min(arguments.repeats, 3))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for what in ("seconds", "build_seconds"):
        for key, taken in report.get(what, {}).items():
            print(f"{key}: {statistics.median(taken):.2f} s")
    for key, rounds in report.get("serve", {}).items():
        print(f"{key}: {[r['wall_s'] for r in rounds]} s, processor {[r['cpu_s'] for r in rounds]} s")


if __name__ == "__main__":
    main()
