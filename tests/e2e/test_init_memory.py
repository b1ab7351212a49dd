"""Stage `init` stays under its memory bound, whatever the rule: the benchmark at a smaller width."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RULES = ("weights, budget, max 64", "delta, budget, max 64", "gradient, budget, max 64")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_under_six_times_the_largest_weight(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "init.json"
    command = [sys.executable, "-m", "eval.bench.init", "--hidden", "2048", "--intermediate", "5504"]
    command += [part for rule in RULES for part in ("--rule", rule)]
    # The allocator keeps freed blocks of up to 32 MiB, which is most tensors at this width and none at a 7B model's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    subprocess.run([*command, "--threads", "1", "--out", str(out)], check=True, cwd=root, env=environment)
    rows = {row["rule"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == set(RULES)
    for row in rows.values():
        assert row["modules"] == 7
        assert 1 < row["peak_memory_ratio"] < 6  # a decomposition alone holds one copy of its weight
