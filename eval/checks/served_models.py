"""Which architectures vLLM serves with our adapters as transformers computes them: one tiny random checkpoint of each.

    python -m eval.checks.served_models --out eval/results/served_models.json

Each has a SoKA adapter on all of its projections. A server, started as `soka-serve serve` starts it, and transformers
with our PEFT layers give the log-probabilities of one prompt in float32; the file has their largest difference for base
and adapter, and by how much the adapter moves them. Mixtures of experts are refused where they cannot run. The language
model of a multimodal one is served where torchvision is installed.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # fewer processes to start

from eval.record import make_parser, write_record
from soka_serve.errors import SokaError
from soka_serve.serving.doctor import find_engine
from tests.support import served_models as models


def measure(architecture: models.Architecture, folder: Path) -> dict[str, Any]:
    """What is said of one architecture."""
    started = time.monotonic()
    base = models.write_checkpoint(folder / "base", architecture)
    adapter = models.write_random_adapter(folder / "adapter", base)
    plain, adapted = models.expected(base, adapter, architecture)
    found: dict[str, Any] = {"architecture": architecture.name, "config": architecture.config}
    try:
        with models.served(base, adapter, folder / "vllm.log", architecture.options) as ask:
            found["base_difference"] = models.difference(ask("base"), plain)
            found["adapter_difference"] = models.difference(ask("adapter"), adapted)
    except SokaError as error:
        found["error"] = error.message.replace(str(base), "BASE")
    found |= {"effect": models.difference(plain, adapted), "attention": architecture.attention}
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = make_parser("eval.checks.served_models", __doc__)
    parser.add_argument("--only", action="extend", nargs="+", help="names of architectures")
    given = parser.parse_args()
    engine = find_engine()
    rows = []
    multimodal = (models.MULTIMODAL,) if find_spec("torchvision") else ()
    for architecture in (*models.ARCHITECTURES, *multimodal, *models.EXPERTS):
        if not given.only or architecture.name in given.only:
            with tempfile.TemporaryDirectory(prefix="soka-served-") as folder:
                rows.append(measure(architecture, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    write_record(given, {"rows": rows}, packages={engine.distribution: engine.version} if engine else {})


if __name__ == "__main__":
    main()
