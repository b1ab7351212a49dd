"""What a user waits for before anything useful happens, each in fresh processes.

    python -m eval.bench.startup --out eval/results/startup.json

- commands that must answer at once: their wall time;
- `build`: wall time of the shortest one (four steps, no calibration, adapter only) and of the same build again, with
  nothing to do; and how much of the first one is imports;
- `serve`: wall time until `soka-serve serve` of that build says how to ask it (its adapter was probed then), and until
  plain vLLM on the same base with the same options but those for adapters answers /health, in turn; and the processor
  time of all processes until then;
- `plugin` (`eval.bench.plugin_cost`): what loading vLLM's plugins takes with ours and without, in each kind of process
  that vLLM has, after all that the process imports by itself; by module, our own time. `--before CHECKOUT` measures
  another checkout's plugin side by side.

`--quick` leaves out the last three, `--plugin` all but the last.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from eval.record import make_parser, write_record
from soka_serve.serving.client import Client, Endpoint

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
COMMANDS = (["--help"], ["schema"], ["plan", "manifests/math.toml"], ["plan", "manifests/llama2-7b/gsm8k.toml"])
MANIFEST = """\
schema = 1
name = "start"

[base]
builtin = "tiny"

[[adapt]]
init = "weights"
calibration_batches = 0

[train]
steps = 4
learning_rate = 20.0  # so that few steps have an effect, which serve asks for

[train.data]
jsonl = "data.jsonl"

[output]
write = ["adapter"]
"""
EXAMPLE = {"prompt": "Q: 1 + 1?\nA:", "completion": " 2"}  # no marker of an answer, so that nothing is asked at the end
# What each kind of process imports of vLLM by itself; the last is started to look at a model's class.
PROCESSES = {
    "API": (
        "vllm.engine.arg_utils",
        "vllm.entrypoints.openai.api_server",
        "vllm.entrypoints.openai.models.serving",
        "vllm.v1.engine.async_llm",
    ),
    "engine": ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"),
    "worker": ("vllm.v1.worker.worker_base", "vllm.v1.worker.cpu_worker"),
    "model's class": ("vllm.model_executor.models.registry",),
}
BUILD_IMPORTS = "from soka_serve.compiler import papers, stages; from soka_serve.compiler.train import run, train"


def run(command: list[str], cwd: Path = ROOT) -> str:
    """Its standard output. The hub is not asked."""
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout


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


def until_ready(command: list[str], cwd: Path, is_ready: Callable[[str], bool]) -> dict[str, float]:
    """Wall and processor seconds until `is_ready` of what it has printed; the server is then stopped."""
    log = cwd / "server.log"
    started = time.monotonic()
    with log.open("wb") as output:
        to_log: dict[str, Any] = {"stdout": output, "stderr": output}
        server = subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, start_new_session=True, **to_log)
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
            "vLLM alone": until_ready(plain, folder, lambda _: Client(Endpoint(port=port)).is_healthy()),
        }
        for name, times in rounds.items():
            found[name] += [times] if repeat else []
    return found


def plugin_costs(repeats: int, before: Path | None) -> dict[str, Any]:
    """By kind of process: seconds that loading the plugins takes in each round, in processor time and on the wall."""
    checkouts = [str(path) for path in (ROOT, before) if path is not None]
    found: dict[str, Any] = {}
    for process, modules in PROCESSES.items():
        command = [sys.executable, "-X", "importtime", "-m", "eval.bench.plugin_cost", str(repeats)]
        told = json.loads(run([*command, ",".join(checkouts), *modules]).splitlines()[-1])
        by_plugin = dict(zip(("none", "this", "before"), zip(*told["rounds"], strict=True), strict=False))
        last = by_plugin["this"][-1]
        found[process] = {
            "imports_cpu_s": round(told["imports_cpu_s"], 2),
            "cpu_s": {name: [round(r["cpu_s"], 3) for r in rounds] for name, rounds in by_plugin.items()},
            "wall_s": {name: [round(r["wall_s"], 3) for r in rounds] for name, rounds in by_plugin.items()},
            "own_modules": {name: len(rounds[-1]["self_ms"]) for name, rounds in by_plugin.items()},
            "vllm_modules": {name: rounds[-1]["vllm_modules"] for name, rounds in by_plugin.items()},
            "self_ms": dict(sorted(last["self_ms"].items(), key=lambda item: -item[1])),
        }
        medians = {name: statistics.median(taken) for name, taken in found[process]["cpu_s"].items()}
        extra = {name: round(taken - medians["none"], 3) for name, taken in medians.items() if name != "none"}
        found[process]["beyond_vllm_cpu_s"] = extra  # of the medians
        print(f"{process}: beyond vLLM's own plugins {extra} s of the processor", flush=True)
    return found


def main() -> None:
    parser = make_parser("eval.bench.startup", __doc__, needs_out=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="commands only, no build and no server")
    parser.add_argument("--plugin", action="store_true", help="the plugin in vLLM's processes only")
    parser.add_argument("--before", type=Path, help="another checkout, whose plugin is measured too")
    arguments = parser.parse_args()
    soka = str(BIN / "soka-serve")
    report: dict[str, Any] = {}
    load_before = round(os.getloadavg()[0], 2)
    if not arguments.plugin:
        taken = {" ".join(["soka-serve", *c]): seconds([soka, *c], arguments.repeats) for c in COMMANDS}
        report["seconds"] = taken
    if not arguments.quick and not arguments.plugin:
        with tempfile.TemporaryDirectory() as name:
            report["build_seconds"] = build_times(Path(name), arguments.repeats)
            report["serve"] = serve_times(Path(name), min(arguments.repeats, 3))
    if not arguments.quick:
        before = arguments.before
        if before is not None:
            report["before"] = run(["git", "-C", str(before), "rev-parse", "HEAD"]).strip()
        report["plugin"] = plugin_costs(arguments.repeats, before)
    write_record(arguments, report, machine={"load_average": load_before})
    for what in ("seconds", "build_seconds"):
        for key, taken in report.get(what, {}).items():
            print(f"{key}: {statistics.median(taken):.2f} s")
    for key, rounds in report.get("serve", {}).items():
        print(f"{key}: {[r['wall_s'] for r in rounds]} s, processor {[r['cpu_s'] for r in rounds]} s")


if __name__ == "__main__":
    main()
