"""What loading the plugin costs a process of vLLM, beyond what the process imports by itself.

    python -X importtime -m eval.bench.plugin_cost REPEATS CHECKOUT[,CHECKOUT...] MODULE...

Imports modules of vLLM, then loads vLLM's general plugins in forks of itself, in turn without the plugin and with that
of each checkout; prints JSON. Imports nothing of the project's itself. `eval.bench.startup` calls it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OWN = "lora_filesystem_resolver,lora_hf_hub_resolver"  # vLLM's own plugins


def ours() -> list[str]:
    """The project's modules that are imported."""
    return sorted(name for name in sys.modules if name.partition(".")[0] in ("soka_serve", "soka_vllm"))


def load(checkout: str | None) -> dict[str, Any]:
    """In a fork: load the plugins, and say what it took in seconds and what was imported for it."""
    os.environ["VLLM_PLUGINS"] = OWN if checkout is None else f"{OWN},soka"
    if checkout is not None:
        sys.path[:0] = [checkout, f"{checkout}/plugins"]
    from vllm.plugins import load_general_plugins

    before = {name for name in sys.modules if name.startswith("vllm.")}
    with tempfile.TemporaryFile("w+") as times:
        os.dup2(times.fileno(), 2)  # of -X importtime
        wall, cpu = time.perf_counter(), time.process_time()
        load_general_plugins()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        times.seek(0)
        lines = [line.removeprefix("import time:").split("|") for line in times if line.startswith("import time:")]
    self_ms = {line[2].strip(): round(int(line[0]) / 1000, 2) for line in lines}
    names = {name: self_ms.get(name, 0.0) for name in ours()}
    more = sorted(name for name in sys.modules if name.startswith("vllm.") and name not in before)
    return {"cpu_s": cpu, "wall_s": wall, "self_ms": names, "vllm_modules": len(more)}


def in_fork(checkout: str | None) -> dict[str, Any]:
    """`load`, in a process that ends."""
    with tempfile.NamedTemporaryFile("r") as told:
        child = os.fork()
        if not child:
            status = 1
            try:
                Path(told.name).write_text(json.dumps(load(checkout)))
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        found: dict[str, Any] = json.loads(told.read())
        return found


def main(repeats: str, checkouts: str, *modules: str) -> None:
    """Measure, and print the rounds by checkout."""
    places = [None, *checkouts.split(",")]
    for module in modules:
        importlib.import_module(module)
    assert not ours()
    imports_cpu = time.process_time()
    rounds = [[in_fork(place) for place in places] for _ in range(int(repeats) + 1)][1:]  # the first warms caches
    print(json.dumps({"imports_cpu_s": imports_cpu, "rounds": rounds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
