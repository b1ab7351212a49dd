"""KPSVD of a whole LLaMA-2-7B: all 224 projections, from safetensors on disk, against exact SVDs and PiSSA.

python -m eval.bench.kpsvd_7b --model DIR --out eval/results/kpsvd_7b.json

Generates the checkpoint in DIR where there is none (13 GB, bf16, with the "decaying" spectrum of eval/bench/kpsvd.py,
another draw for every projection), then, each in a fresh process with `--threads` threads:

- stage `init` over all of it, rank 64 at the balanced factor shapes: wall time, and the peak of the process's own
  memory (anonymous pages; the mapped files do not count) above what it held before;
- on one 4096 x 4096 and one 11008 x 4096 projection: a full SVD of the rearranged weight (torch.linalg.svd), and PEFT's
  PiSSA initialisation at rank 64, exact (`pissa`, a full SVD of the weight) and fast (`pissa_niter_16`). Scaled to the
  224 projections by the number of each size: `scaled_s`.

`--device cuda` runs all of it there. `--layers` makes a smaller model.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from eval.llama import LARGE, SMALL, start_of, write_model
from eval.measure import alone
from eval.memory import AnonymousPeak
from eval.record import make_parser, write_record
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.kron.shapes import balanced_shape

RANK = 64


def timed(device: str, work: Callable[[], object]) -> float:
    """Wall seconds."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - started, 2)


def run_init(case: dict[str, Any]) -> dict[str, Any]:
    """Stage `init` over the whole model."""
    torch.set_num_threads(case["threads"])
    torch.linalg.svd(torch.randn(64, 64, device=case["device"]))  # libraries set up outside the measurement
    rule = {"calibration_batches": 0, "rank": {"policy": "fixed", "rank": RANK}}
    _, base, targets = start_of(Path(case["model"]), rule)
    device = torch.device(case["device"])
    with tempfile.TemporaryDirectory() as scratch, AnonymousPeak() as peak:
        run = InitRun(targets, base, device=device, scratch=Path(scratch))
        seconds = timed(case["device"], run.initialise)
    return {"modules": len(targets), "seconds": seconds, "peak_mb": round(peak.added_bytes / 1e6)}


def run_other(case: dict[str, Any]) -> float:
    """One other way of decomposing one projection."""
    torch.set_num_threads(case["threads"])
    device, name = case["device"], f"model.layers.0.{case['module']}.weight"
    weight = Checkpoint.open(Path(case["model"])).read(name).float().to(device)
    torch.linalg.svd(torch.randn(64, 64, device=device))
    if case["how"] == "exact KPSVD":
        m, n, p, q = balanced_shape(*weight.shape)
        rearranged = weight.view(m, p, n, q).permute(0, 2, 1, 3).reshape(m * n, p * q)
        return timed(device, lambda: torch.linalg.svd(rearranged, full_matrices=False))
    holder = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device))
    holder[0].weight.data = weight
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=case["how"])
    return timed(device, lambda: get_peft_model(holder, config))


def main() -> None:
    """Run everything and write the result."""
    parser = make_parser("eval.bench.kpsvd_7b", __doc__, needs_out=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint; made where it is missing")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if not options.model.exists():
        write_model(options.model, options.hidden, options.intermediate, options.layers)
    case = {"model": str(options.model), "threads": options.threads, "device": options.device}
    found: dict[str, Any] = {"init": alone(run_init, case)}
    print(json.dumps(found["init"]), flush=True)
    counts = {SMALL: 4 * options.layers, LARGE: 3 * options.layers}
    for how in ("exact KPSVD", "pissa", "pissa_niter_16"):
        seconds = {module: alone(run_other, {**case, "module": module, "how": how}) for module in counts}
        scaled = sum(seconds[module] * count for module, count in counts.items())
        ratio = round(scaled / found["init"]["seconds"], 2)
        found[how] = {"seconds": seconds, "scaled_s": round(scaled), "over_init": ratio}
        print(how, json.dumps(found[how]), flush=True)
    write_record(options, {"rank": RANK, **found}, machine={"device": options.device})


if __name__ == "__main__":
    main()
