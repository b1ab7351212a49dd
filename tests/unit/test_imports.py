"""What answers at once must not wait for torch, and nothing loads an engine or the harness before it is needed."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "datasets", "vllm", "lm_eval", "accelerate")
LIGHT = (
    "soka_serve",
    "soka_serve.cli",
    "soka_serve.adapter.inspect",
    "soka_serve.base.resolve",
    "soka_serve.base.targets",
    "soka_serve.builtin",
    "soka_serve.comparison.compare",
    "soka_serve.comparison.page",
    "soka_serve.comparison.preview",
    "soka_serve.comparison.held_out",
    "soka_serve.compiler.context",
    "soka_serve.compiler.methods",
    "soka_serve.compiler.plan.plan",
    "soka_serve.compiler.plan.text",
    "soka_serve.compiler.report.card",
    "soka_serve.compiler.report.page",
    "soka_serve.compiler.status",
    "soka_serve.compiler.train.resume",
    "soka_serve.data.examples",
    "soka_serve.evaluation.builtin",
    "soka_serve.evaluation.gsm8k",
    "soka_serve.evaluation.math_task",
    "soka_serve.evaluation.mbpp",
    "soka_serve.evaluation.sandbox",
    "soka_serve.evaluation.tasks",
    "soka_serve.io.lockfile",
    "soka_serve.io.outputs",
    "soka_serve.io.safetensors",
    "soka_serve.io.versions",
    "soka_serve.kron.shapes",
    "soka_serve.kron.sharding",
    "soka_serve.manifest.docs",
    "soka_serve.manifest.read",
    "soka_serve.serving.serve",
)


def test_light_modules_load_nothing_heavy() -> None:
    code = (
        "import importlib, sys\n"
        f"for module in {LIGHT!r}:\n"
        "    importlib.import_module(module)\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    if loaded: sys.exit(f'{module} loads {loaded}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
