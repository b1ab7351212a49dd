"""Stage `init` on a real model and real rows: what activation weighting costs beside a plain forward pass.

    python -m eval.bench.init_real --model DIR --train gsm8k_train.jsonl --out FILE.json

In processor seconds: `forward` of the whole model over the calibration batches, as training pads them (no loss, no
cache); stage `init` at rank 1 without calibration (`unweighted`) and with it (`weighted`, loading the base included).
Products are a build's (`fast_products`). `ratio` is (weighted - unweighted) / forward. `peak_mb` is the most anonymous
memory of the weighted stage above what was held before: pages of mapped files do not count, and a base in its stored
dtype is nothing else on a CPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eval.bench.calibration import read_rows
from eval.llama import start_of
from eval.measure import alone
from eval.memory import AnonymousPeak
from eval.record import make_parser, write_record
from soka_serve.base.cpu import fast_products
from soka_serve.base.model import Dtype, load_base
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.compiler.init.placement import load_layered
from soka_serve.compiler.init.probe import gather
from soka_serve.data.collate import PadCollator

BATCH = 8


def cpu_s(work: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    work()
    return round(time.process_time() - start, 2)


@torch.no_grad()
def forward_s(folder: Path, dtype: Dtype, batches: list[dict[str, torch.Tensor]]) -> float:
    """Processor seconds of a forward pass."""
    model = load_base(folder, dtype)
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    with fast_products():
        return cpu_s(lambda: [model(**one, use_cache=False) for one in inputs])


def run(case: dict[str, Any]) -> dict[str, Any]:
    """All of it, in a process of its own."""
    torch.set_num_threads(case["threads"])
    torch.linalg.svd(torch.randn(64, 64))  # libraries set up outside the measurement
    folder, dtype, batches = Path(case["model"]), case["dtype"], case["batches"]
    runs = {name: {"calibration_batches": count, "rank": {"policy": "fixed", "rank": 1}}
            for name, count in (("unweighted", 0), ("weighted", batches))}  # fmt: skip
    _, base, targets = start_of(folder, runs["weighted"])
    rows = read_rows(base, Path(case["train"]), BATCH * batches, case["max_length"])
    collate = PadCollator(base.tokenizer.pad_id)
    data = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    found: dict[str, Any] = {"tokens": sum(len(r.input_ids) for r in rows), "forward_s": forward_s(folder, dtype, data)}
    for name, rule in runs.items():
        targets = start_of(folder, rule)[2]
        with tempfile.TemporaryDirectory() as scratch, AnonymousPeak() as peak:

            def statistics(wanted: Any, scratch: str = scratch) -> Any:
                model, placement = load_layered(base, dtype, torch.device("cpu"))
                return gather(model, data, wanted, Path(scratch), placement)

            run = InitRun(targets, base, Path(scratch), statistics=statistics, progress=False)
            with fast_products():
                found[f"{name}_s"] = cpu_s(run.initialise)
    extra = found["weighted_s"] - found["unweighted_s"]
    return found | {"ratio": round(extra / found["forward_s"], 2), "peak_mb": round(peak.added_bytes / 1e6)}


def main() -> None:
    """Measure and write the result."""
    parser = make_parser("eval.bench.init_real", __doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=8, help=f"calibration batches of {BATCH} rows")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes:
        rows.append({"dtype": dtype} | alone(run, {**vars(options), "dtype": dtype}))
        print(rows[-1], flush=True)
    write_record(options, {"rows": rows})


if __name__ == "__main__":
    main()
