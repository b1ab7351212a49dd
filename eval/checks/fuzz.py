"""Thousands of spoilt adapters, manifests, folders, caches and frames through what reads them.

python -m eval.checks.fuzz --out eval/results/fuzz.json

    adapters    SoKA adapters through the reader, `inspect` and `merge`
    lokr        LoKr adapters, of PEFT and of LyCORIS, through the plugin's readers
    manifests   manifests, their data and bases through `plan`
    bases       bases whose tensors and config do not agree, through the list of modules
    outputs     `merge` and `export` onto folders that hold a user's files
    caches      caches of hashes
    frames      what a judged program sends to the process of its tests
    launches    options for vLLM through `serve`, and logs of servers that failed

Each case is done or refused with a message and exit code 2: no traceback, nothing half-written, nothing of the user's
lost. None takes more than 10 s of processor time (or waits for a minute), or 1 GiB beyond what its process held before.
The first that does ends the run, shrunk by hypothesis. tests/fuzzing has the changes and the checks.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from eval.record import make_parser, write_record  # noqa: E402
from soka_serve.io.progress import track  # noqa: E402
from tests.fuzzing.cases import CASES  # noqa: E402
from tests.fuzzing.limits import HANG_S, MEMORY, WAIT_S, Peak  # noqa: E402

EXAMPLES = {
    "manifests": 450,
    "bases": 1500,
    "adapters": 450,
    "outputs": 700,
    "frames": 2600,
    "lokr": 3000,
    "caches": 3000,
    "launches": 3000,
    "tokenizers": 2000,
}


def fuzz(examples: int, number: int, what: str, check: Callable[[st.DrawFn, Path], bool], good: Path) -> dict[str, Any]:
    """Run `check` on so many examples; how many there were, and how many were still good."""
    done, fine = 0, 0
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
        @given(st.data())
        def each(data: Any) -> None:
            nonlocal done, fine
            # What hangs where no signal is heeded ends the process, and says where.
            faulthandler.dump_traceback_later(3 * WAIT_S, exit=True)
            fine += check(data.draw, good)
            done += 1
            step("")

        each()
    faulthandler.cancel_dump_traceback_later()
    return {
        "examples": done,
        "still_good": fine,
        "seconds": round(time.monotonic() - started),
        "peak_mib": round(Peak.resident / (1 << 20)),
    }


def fuzz_in_process(kind: str, examples: int, number: int) -> dict[str, Any]:
    """`fuzz` in a process of its own, whose memory is then its cases' alone, and which a crash ends."""
    options = {"--only": kind, "--examples": examples, "--seed": number}
    command = [sys.executable, "-m", "eval.checks.fuzz", *(str(word) for pair in options.items() for word in pair)]
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "TMPDIR": place}
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=False)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}", "output": done.stdout[-2000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = make_parser("eval.checks.fuzz", __doc__)
    for kind, examples in EXAMPLES.items():
        parser.add_argument(f"--{kind}", type=int, default=examples)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--only", choices=EXAMPLES, help="one kind, in this process; nothing is written")
    parser.add_argument("--examples", type=int, default=100, help="of that kind")
    arguments = parser.parse_args()
    if arguments.only:
        logging.getLogger("soka_serve").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as place:
            prepare, check = CASES[arguments.only]
            prepare(Path(place))
            print(json.dumps(fuzz(arguments.examples, arguments.seed, arguments.only, check, Path(place))))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    counts = {kind: getattr(arguments, kind) for kind in EXAMPLES}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(lambda kind: fuzz_in_process(kind, counts[kind], arguments.seed), counts)
        found = dict(zip(counts, parts, strict=True))
    if failed := [kind for kind, part in found.items() if "failed" in part]:
        print(json.dumps(found, indent=1))
        raise SystemExit(f"{', '.join(failed)}: failed, see above; {arguments.out} is not written")
    report = {
        "seed": arguments.seed,
        "limits": {"processor_s": HANG_S, "clock_s": WAIT_S, "memory_mib": MEMORY >> 20},
        **found,
        "total": {
            "examples": sum(part["examples"] for part in found.values()),
            "seconds": sum(part["seconds"] for part in found.values()),
            "peak_mib": max((part["peak_mib"] for part in found.values()), default=0),
        },
    }
    print(json.dumps(write_record(arguments, report), indent=1))


if __name__ == "__main__":
    main()
