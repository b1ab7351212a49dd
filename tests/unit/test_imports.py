"""What answers at once must not wait for torch, and nothing loads an engine or the harness before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "vllm", "lm_eval", "accelerate")
MORE = (*HEAVY, "numpy", "tokenizers", "safetensors", "jinja2")
LIGHT = (
    *("soka_serve", "soka_serve.cli", "soka_serve.adapter.inspect", "soka_serve.base.resolve"),
    *("soka_serve.base.target_modules", "soka_serve.builtin", "soka_serve.comparison.compare"),
    *("soka_serve.comparison.docs", "soka_serve.comparison.page", "soka_serve.comparison.preview"),
    *("soka_serve.comparison.held_out", "soka_serve.compiler.context"),
    *("soka_serve.compiler.methods", "soka_serve.compiler.plan.plan", "soka_serve.compiler.plan.text"),
    *("soka_serve.compiler.report.card", "soka_serve.compiler.report.page", "soka_serve.compiler.status"),
    *("soka_serve.compiler.train.resume", "soka_serve.data.examples", "soka_serve.evaluation.builtin"),
    *("soka_serve.evaluation.gsm8k", "soka_serve.evaluation.math_task", "soka_serve.evaluation.mbpp"),
    *("soka_serve.evaluation.sandbox", "soka_serve.evaluation.tasks", "soka_serve.io.lockfile"),
    *("soka_serve.io.outputs", "soka_serve.io.safetensors", "soka_serve.io.versions", "soka_serve.kron.shapes"),
    *("soka_serve.kron.sharding", "soka_serve.manifest.docs", "soka_serve.manifest.read", "soka_serve.serving.serve"),
)
COMMANDS = ("--help", "schema", "schema --suite", "plan manifests/math.toml", "inspect tests/data/stored/out/stored")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        *((f"from soka_serve.cli import main; main({c.split()}, standalone_mode=False)", HEAVY) for c in COMMANDS),
        ("from soka_serve.base.resolve import open_base; open_base('tiny').checkpoint.sha256()", HEAVY),
        ("from soka_serve.serving.doctor import quick_checks; quick_checks()", HEAVY),
        ("from soka_serve.manifest.read import json_schema; json_schema()", MORE),
        ("from soka_serve.manifest.read import read_manifest; read_manifest('manifests/math.toml')", MORE),
        ("from soka_serve.manifest.starter import starter_manifest; starter_manifest('x')", MORE),
        (f"import importlib\nfor module in {LIGHT}: importlib.import_module(module)", HEAVY),
    ],
)
def test_what_answers_at_once_loads_nothing_heavy(root: Path, code: str, heavy: tuple[str, ...]) -> None:
    code += f"\nimport sys; sys.exit([name for name in {heavy} if name in sys.modules] or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
