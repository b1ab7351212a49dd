"""A whole training step on the embedded base: SoKA against PEFT's LoRA and LoKr at (nearly) equal parameters.

    python eval/bench_step.py --out eval/results/step.json

A step is forward, backward and AdamW on the same batch. For one number of SoKA terms all methods take turns in one
process, step by step; `step_ratio` is SoKA's median processor time over the other's (other load on the machine does not
change it as it does wall time). Peak memory is measured in a fresh process per method: the high-water mark of resident
memory during steps above what the adapted model held before (`peak_ratio`, SoKA's over the other's). LoRA and LoKr get
the setting whose number of trained parameters is nearest to SoKA's from above, or below where there is none above.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bench_kpsvd import cpu_name, resident_bytes
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model

from soka_serve.base_model import load_base
from soka_serve.builtin import base_directory
from soka_serve.peft import SokaConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
LOKR_SETTINGS = [(factor, rank) for factor in (-1, 2, 4, 8, 16) for rank in (1, 2, 4, 8, 16, 100_000)]


def make_config(method: str, setting: Any) -> PeftConfig:
    """PEFT config of one method: a rank, for LoKr (decompose_factor, rank), for SoKA (init, rank)."""
    common = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "soka":
        return SokaConfig(r=setting[1], init_soka_weights=setting[0], **common)
    if method == "lokr":
        return LoKrConfig(r=setting[1], alpha=setting[1], decompose_factor=setting[0], **common)
    return LoraConfig(r=setting, lora_alpha=setting, **common)


def make_model(method: str, setting: Any) -> Any:
    """The embedded base with one fresh adapter, in training mode."""
    torch.manual_seed(0)
    return get_peft_model(load_base(base_directory(), "float32"), make_config(method, setting)).train()


def parameters(method: str, setting: Any) -> int:
    """Trained parameters."""
    return sum(p.numel() for p in make_model(method, setting).parameters() if p.requires_grad)


def nearest(method: str, settings: Any, wanted: int) -> tuple[Any, int]:
    """The setting with the fewest parameters from `wanted` up, else the one with the most."""
    counts = [(parameters(method, setting), setting) for setting in settings]
    above = [c for c in counts if c[0] >= wanted]
    count, setting = min(above, key=lambda c: c[0]) if above else max(counts, key=lambda c: c[0])
    return setting, count


def make_step(method: str, setting: Any, rows: int, length: int) -> Callable[[], None]:
    """One training step as a function."""
    model = make_model(method, setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(4, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_peak(options: dict[str, Any]) -> int:
    """Peak bytes of three steps, in a process of its own."""
    torch.set_num_threads(options["threads"])
    make_step(options["method"], options["setting"], 2, 8)()  # libraries set up outside the measurement
    step = make_step(options["method"], options["setting"], options["rows"], options["length"])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident_bytes("VmRSS")
    for _ in range(3):
        step()
    return resident_bytes("VmHWM") - before


def compare(rank: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one number of SoKA terms."""
    wanted = parameters("soka", ("weights", rank))
    methods = {"soka": (("weights", rank), wanted), "soka (zero init)": (("zero", rank), wanted)}
    methods["lora"] = nearest("lora", LORA_RANKS, wanted)
    methods["lokr"] = nearest("lokr", LOKR_SETTINGS, wanted)
    size = {"rows": options.rows, "length": options.length}
    steps = {name: make_step(name.split()[0], setting, **size) for name, (setting, _) in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repeat >= 2:
                times[name].append(time.process_time() - start)
    peaks = {}
    for name, (setting, _) in methods.items():
        case = {"method": name.split()[0], "setting": setting, "threads": options.threads, **size}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(measure_peak, (case,))
    for name, (setting, count) in methods.items():
        yield {
            "soka_rank": rank,
            "method": name,
            "setting": setting,
            "parameters": count,
            "step_cpu_ms": round(statistics.median(times[name]) * 1e3, 1),
            "peak_mib": round(peaks[name] / 2**20, 1),
            "step_ratio": round(statistics.median(times["soka"]) / statistics.median(times[name]), 2),
            "peak_ratio": round(peaks["soka"] / peaks[name], 2),
        }


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="SoKA terms per module")
    parser.add_argument("--rows", type=int, default=32, help="sequences in the batch (the quickstart's)")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for rank in options.ranks:
        for row in compare(rank, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {
        "command": f"python eval/bench_step.py --ranks {' '.join(map(str, options.ranks))} --rows {options.rows} "
        f"--length {options.length} --repeats {options.repeats} --threads {options.threads}",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"cpu": cpu_name(), "cpus": os.cpu_count()},
        "seed": 0,
        "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
