"""Thousands of spoilt manifests through `plan`, and spoilt adapters through the reader, `inspect` and `merge`.

python eval/fuzz.py --manifests 10000 --adapters 1000 --out eval/results/fuzz.json

Each is done or refused with a message and exit code 2: no traceback, no hang (a minute), nothing half-written. The
first that is not ends the run, shrunk by hypothesis. tests/fuzzing.py has the changes and the checks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from soka_serve.progress import track  # noqa: E402
from soka_serve.provenance import versions  # noqa: E402
from tests.fuzzing import (  # noqa: E402
    check_adapter,
    check_plan,
    copy_of,
    spoil_adapter,
    spoilt_manifests,
    write_good_adapter,
)


def fuzz(
    examples: int, number: int, what: str, strategy: st.SearchStrategy[Any], check: Callable[[Any], bool]
) -> dict[str, Any]:
    """Run `check` on so many examples; how many there were, and how many were still good."""
    done, good = 0, 0
    started = time.monotonic()
    with track(examples, what, unit="example") as step:

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def each(example: Any) -> None:
            nonlocal done, good
            good += check(example)
            done += 1
            step("")

        each()
    return {"examples": done, "still_good": good, "seconds": round(time.monotonic() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifests", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()

    def plan(text: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            return check_plan(text, Path(folder))

    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        write_good_adapter(good)

        def adapter(data: Any) -> bool:
            with copy_of(good) as folder:
                spoil_adapter(data.draw, folder)
                return check_adapter(folder)

        report = {
            "command": f"python eval/fuzz.py --manifests {arguments.manifests} --adapters {arguments.adapters} "
            f"--seed {arguments.seed}",
            "hardware": {"machine": platform.machine(), "cpu_cores": os.cpu_count()},
            "versions": versions(),
            "adapters": fuzz(arguments.adapters, arguments.seed, "adapters", st.data(), adapter),
            "manifests": fuzz(arguments.manifests, arguments.seed, "manifests", spoilt_manifests(), plan),
        }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({kind: report[kind] for kind in ("manifests", "adapters")}, indent=1))


if __name__ == "__main__":
    main()
