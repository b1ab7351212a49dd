"""Builds on a disk that is full, and under a clock that jumps.

python -m eval.checks.faults --out eval/results/faults.json

- Disk full: a small build whose output, temporary files and caches are on a file system of so many MB (a tmpfs: needs
  root, for mount). It must end with exit code 1 or 2 and a message that says so, without a traceback, and leave either
  no build or a whole one. Then the file system grows, and the same command must finish, with the tensors of a build
  that never was short of space.
- Clock jumps: `time.time` of the build's processes jumps by up to a day, forwards and backwards, at every call. It must
  finish with the same tensors.

Other faults have tests of their own: builds and merges killed at random points (tests/e2e), files cut short or spoilt
(eval/checks/fuzz.py), a server whose engine is killed and adapters spoilt while it serves (eval/checks/soak.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

from eval.record import make_parser, write_record  # noqa: E402
from soka_serve.io.file_names import WEIGHTS_FILE  # noqa: E402
from tests.support.builds import same_tensors, write_manifest  # noqa: E402

SIZES_MB = (0.1, 0.3, 1.0, 3.0, 5.0, 7.0)
JUMPING_CLOCK = """\
import random, time
real, chance = time.time, random.Random(0)
time.time = lambda: real() + chance.uniform(-86400, 86400)
time.time_ns = lambda: int(time.time() * 1e9)
"""


def build(manifest: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the build as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "soka_serve", "build", str(manifest), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@contextmanager
def file_system(place: Path, size_mb: float) -> Iterator[None]:
    """A tmpfs of that size at `place`."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size_mb * 1e6)}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def adapter(out: Path) -> Path:
    """The file that is compared."""
    return out / "small" / "adapter" / WEIGHTS_FILE


def fill(manifest: Path, place: Path, size_mb: float, whole: Path) -> dict[str, Any]:
    """A build that runs out of space, and one after it that does not."""
    with file_system(place, size_mb):
        homes = {"TMPDIR": str(place), "HOME": str(place), "XDG_CACHE_HOME": str(place / "cache")}
        first = build(manifest, place / "build", **homes)
        left = adapter(place / "build").exists()
        found = {
            "size_mb": size_mb,
            "exit_code": first.returncode,
            "said": next((x for x in first.stderr.splitlines()[::-1] if "rror" in x), "").replace(str(place), "DISK"),
            "traceback": "Traceback" in first.stderr,
            "build_left": left,
            "whole": not left or same_tensors(adapter(place / "build"), adapter(whole)),
        }
        subprocess.run(["mount", "-o", "remount,size=200000000", str(place)], check=True)
        again = build(manifest, place / "build", **homes)
        same = again.returncode == 0 and same_tensors(adapter(place / "build"), adapter(whole))
    fine = first.returncode == 0 if left else first.returncode in (1, 2) and "space" in first.stderr
    return {**found, "then_finishes_with_the_same_tensors": same, "ok": fine and same and not found["traceback"]}


def main() -> None:
    """Run everything and write the result."""
    parser = make_parser("eval.checks.faults", __doc__, needs_out=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, whole = write_manifest(folder), folder / "whole"
        done = build(manifest, whole)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows = []
        for number, size_mb in enumerate(SIZES_MB):
            rows.append(fill(manifest, folder / f"disk-{number}", size_mb, whole))
            print(json.dumps(rows[-1]), flush=True)
        (folder / "clock").mkdir()
        (folder / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)
        jumping = build(manifest, folder / "jumping", PYTHONPATH=str(folder / "clock"))
        same = jumping.returncode == 0 and same_tensors(adapter(folder / "jumping"), adapter(whole))
        clock = {"exit_code": jumping.returncode, "same_tensors": same, "ok": same}
        print(json.dumps(clock), jumping.stderr[-2000:] if not same else "", flush=True)
    write_record(arguments, {"disk_full": rows, "clock_jumps": clock})
    sys.exit(not all(part["ok"] for part in [*rows, clock]))


if __name__ == "__main__":
    main()
