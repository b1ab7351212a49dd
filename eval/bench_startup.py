"""Wall time of the commands that must answer at once, each in fresh processes.

python eval/bench_startup.py --out eval/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from soka_serve.provenance import versions

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (["--help"], ["schema"], ["plan", "manifests/math.toml"], ["plan", "manifests/llama2-7b/gsm8k.toml"])


def seconds(arguments: list[str], repeats: int) -> list[float]:
    """Wall seconds of `soka-serve ARGUMENTS`, once to warm the disk's cache and then `repeats` times."""
    taken = []
    for _ in range(repeats + 1):
        started = time.monotonic()
        subprocess.run(
            [str(Path(sys.executable).parent / "soka-serve"), *arguments],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        taken.append(round(time.monotonic() - started, 3))
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    report = {
        "command": f"python eval/bench_startup.py --repeats {arguments.repeats}",
        "hardware": {"machine": platform.machine(), "cpu_cores": os.cpu_count()},
        "versions": versions(),
        "seconds": {" ".join(["soka-serve", *c]): seconds(c, arguments.repeats) for c in COMMANDS},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["seconds"], indent=1))


if __name__ == "__main__":
    main()
