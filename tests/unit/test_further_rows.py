"""A further row of a registry is all that a further start or regulariser takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from soka_serve.adapter.format import read_adapter

MANIFEST = """
schema = 1
name = "mine"
base = { builtin = "tiny" }
adapt = [{ init = "ones" }]
[train]
steps = 4
batch_size = 4
log_every = 1
regularise = { largest = 0.5 }
data = { builtin = "math", limit = 64 }
[output]
write = ["adapter"]
[eval]
limit = 1
"""


def test_a_further_row_is_in_the_manifest_trains_and_is_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MANIFEST, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.further_rows", str(tmp_path)]
    done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert "'ones': Left one, Right zero (a test's)" in said["reference"]
    assert "Weight of the mean over modules of Right's largest entry (a test's)." in said["reference"]
    # Right is zero at the first step, and has moved at the last.
    values = [row["largest"] for row in said["history"] if "largest" in row]
    assert values[0] == 0 < values[-1]
    factors = read_adapter(tmp_path / "mine" / "adapter").factors
    left = torch.cat([f.left.flatten() for f in factors.values()])
    assert (left > 0).double().mean() > 0.9  # of random ones half
    assert "ones" in (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
