"""The whole path on a real model, as a user takes it: build, evaluate through a vLLM server, size of what comes.

    python -m eval.bench.real_path --base SMOLLM2 --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out real_path.json

Runs manifests/smollm2/gsm8k.toml, with files in place of the hub, through `soka-serve build` and `soka-serve eval`, in
a temporary folder and in processes of their own. `wall_s` and `cpu_s` are of whole commands, imports and the server's
start included; `peak_gib` is the largest resident set of a process of the build.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from eval.record import make_parser, write_record
from soka_serve.evaluation.sources import DATA_VARIABLE

MANIFEST = Path(__file__).resolve().parents[2] / "manifests" / "smollm2" / "gsm8k.toml"
NAME = "smollm2-gsm8k"


def own_files(text: str, base: Path, train: Path) -> str:
    """The manifest's text with files in place of the hub's."""
    for pattern, line in (
        (r'^hub = "HuggingFaceTB/.*$', f"path = {json.dumps(str(base.resolve()))}"),
        (r"^write = ", 'measure = ["intruders"]\nwrite = '),
        (r'^hub = "openai/gsm8k"\nconfig = .*\nsplit = .*$', f"jsonl = {json.dumps(str(train.resolve()))}"),
    ):
        text, count = re.subn(pattern, line.replace("\\", r"\\"), text, flags=re.M)
        if count != 1:
            raise SystemExit(f"{MANIFEST} has changed: this script replaces {pattern}")
    return text


def command(*words: str, folder: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run one soka-serve command; what it took, and what a build says of its stages."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "soka_serve", *words],
        cwd=folder, env=os.environ | (environment or {}), check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(done.stdout, flush=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = {"wall_s": round(time.monotonic() - started, 1), "cpu_s": round(cpu, 1)}
    if stages := re.search(r"^seconds +(.*)$", done.stdout, re.M):
        found["stages_s"] = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+)", stages[1])}
    return found


def _told(part: dict[str, Any]) -> dict[str, Any]:
    """What one model's answers took, and what shows that the adapter was at work."""
    return {name: part[name] for name in ("role", "seconds", "asked", "active")}


def main() -> None:
    """Run both commands and write the record."""
    parser = make_parser("eval.bench.real_path", __doc__, needs_out=True)
    parser.add_argument("--base", type=Path, required=True, help="folder with SmolLM2-135M-Instruct")
    parser.add_argument("--train", type=Path, required=True, help="GSM8K's training file")
    parser.add_argument("--test", type=Path, required=True, help="GSM8K's test file")
    parser.add_argument("--limit", type=int, default=200, help="test problems (default: %(default)s)")
    options = parser.parse_args()
    for option, path in (("--base", options.base), ("--train", options.train), ("--test", options.test)):
        if not path.exists():
            parser.error(f"{option} {path}: it does not exist")
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name, "data")
        manifest = folder / "gsm8k.toml"
        manifest.write_text(own_files(MANIFEST.read_text(encoding="utf-8"), options.base, options.train))
        data.mkdir()
        (data / "gsm8k_test.jsonl").symlink_to(options.test.resolve())
        build = command("build", manifest.name, folder=folder)
        build["peak_gib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)
        evaluation = command(
            "eval", manifest.name, "--limit", str(options.limit),
            folder=folder, environment={DATA_VARIABLE: str(data)},
        )  # fmt: skip
        made = folder / "build" / NAME
        lock = tomllib.loads((made / "soka.lock").read_text(encoding="utf-8"))
        history = [json.loads(line) for line in (made / "history.jsonl").read_text().splitlines()]
        results = json.loads((folder / "build" / f"{NAME}-eval" / "results-vllm.json").read_text())
        found = {
            "manifest": "manifests/smollm2/gsm8k.toml",
            "build": build,
            **{key: lock[key] for key in ("result", "comparison")},
            "eval_loss": {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row},
            "train_loss": [row["loss"] for row in history if "loss" in row],
            "intruders": [row["count"] for row in json.loads((made / "measured.json").read_text())["intruders"]],
            "adapter_bytes": sum(file.stat().st_size for file in (made / "adapter").iterdir()),
            "eval": evaluation | {"scores": results["scores"], "parts": [_told(part) for part in results["parts"]]},
        }
    write_record(options, found, machine={"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
