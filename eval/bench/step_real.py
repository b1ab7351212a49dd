"""A training step on a real model and real rows: the cost of each way of doing it, for SoKA, LoRA and the whole model.

    python -m eval.bench.step_real --model DIR --train gsm8k_train.jsonl --cases soka:1:trained ... --out FILE.json

Batches of 8 rows as training makes them, in processor seconds of one thread, forward, backward and AdamW; the cases
take turns in one process, batch by batch. `step_s` is the median of `steps_s` but for its first, which warms up.
`random` has batches in random order and logits of all positions; `grouped` has batches of similar lengths
(`group_by_length`); `trained` is grouped, with logits of the trained positions alone, which is what training does;
`bfloat16` is `trained` under autocast, on a base that is held in bfloat16; `compiled` is `bfloat16` with decoder
layers through torch.compile (`train.compile`), which the first step waits for; the name of a regulariser is `trained`
with that one at 1. Method `base` is a forward pass alone, without loss or gradients; `soka` has theta and theta0,
which start from the weights has, and `zero` theta alone, as terms that start at zero. `peak_mb` is the most memory of
one step above what was held before, each case in a process of its own. `epoch` counts what all batches hold.
"""

from __future__ import annotations

import atexit
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from eval.bench.calibration import read_rows
from eval.bench.step import TARGETS
from eval.measure import alone
from eval.memory import AnonymousPeak
from eval.record import make_parser, write_record
from soka_serve.base.base import Base
from soka_serve.base.cpu import attention_for, fast_products
from soka_serve.base.model import load_base
from soka_serve.compiler.train.compiled import compiled_layers
from soka_serve.compiler.train.length_groups import LengthGroups
from soka_serve.compiler.train.regularise import Regularisation, base_logits
from soka_serve.compiler.train.trained_positions import output_layer, trained_positions
from soka_serve.data.collate import PadCollator
from soka_serve.kron import Factors
from soka_serve.peft import SokaConfig, soka_layers
from soka_serve.regularisers import REGULARISERS

ROWS = 8
_TO_THE_END = ExitStack()  # of the process
atexit.register(_TO_THE_END.close)
Batch = dict[str, Tensor]


def make_batches(folder: Path, file: Path, max_length: int) -> dict[bool, list[Batch]]:
    """An epoch's batches, by whether they are grouped by length."""
    base = Base(folder)
    rows = read_rows(base, file, 10_000, max_length)
    groups = LengthGroups([len(row.input_ids) for row in rows], ROWS, seed=0)
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    orders = {True: list(groups), False: mixed}
    collate = PadCollator(base.tokenizer.pad_id)
    return {
        grouped: [collate([rows[i] for i in order[n * ROWS : (n + 1) * ROWS]]) for n in range(len(rows) // ROWS)]
        for grouped, order in orders.items()
    }


def make_model(folder: Path, method: str, rank: int, dtype: Any) -> Any:
    """The base with a fresh adapter, in training mode; SoKA with theta0 = theta, which costs what any other does."""
    torch.manual_seed(0)
    base = load_base(folder, dtype)
    base.config.use_cache = False
    common: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "lora":
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, **common)).train()
    if method == "zero":
        return get_peft_model(base, SokaConfig(r=rank, init_soka_weights="zero", **common)).train()
    if method == "soka":
        model = get_peft_model(base, SokaConfig(r=rank, init_soka_weights=False, soka_initial=True, **common))
        for layer in soka_layers(model).values():
            theta = layer.theta("default")
            start = Factors(torch.randn_like(theta.left), torch.randn_like(theta.right), torch.ones_like(theta.sigma))
            layer.set_factors("default", start, start)
        return model.train()
    return base.train().requires_grad_(method == "full")


def make_step(folder: Path, method: str, rank: int, way: str) -> tuple[Callable[[Batch], None], int]:
    """One step as a function of a batch, and the number of trained parameters."""
    half = way in ("bfloat16", "compiled")
    model = make_model(folder, method, rank, "bfloat16" if half else "float32")
    head = output_layer(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    if way == "compiled":
        _TO_THE_END.enter_context(compiled_layers(model))
    added = Regularisation({way: 1.0} if way in REGULARISERS else {})

    def step(batch: Batch) -> None:
        if optimizer is None:
            with torch.no_grad():
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            return
        picked = way not in ("random", "grouped") and head is not None
        with trained_positions(head, batch) if picked and head is not None else nullcontext(batch) as inputs:
            tokens = batch["labels"].shape[1]
            with torch.autocast("cpu", torch.bfloat16, enabled=half), attention_for(tokens, torch.device("cpu")):
                base = base_logits(model, inputs) if added.asks_base else None
                outputs = model(**inputs)
                loss = outputs.loss
                if base is not None:
                    loss = loss + added.divergence(base, outputs.logits, inputs["labels"], None)
            loss.backward()
        added.add_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def measure_peak(case: tuple[Path, str, int, str, Batch]) -> int:
    """Peak bytes of the first step, in a process of its own: a later one finds memory that the first has left."""
    folder, method, rank, way, batch = case
    torch.set_num_threads(1)
    step, _ = make_step(folder, method, rank, way)
    with AnonymousPeak() as peak:
        step(batch)
    return peak.added_bytes


def measure(options: Any, batches: dict[bool, list[Batch]]) -> Iterator[dict[str, Any]]:
    """A row for each case, METHOD:RANK:WAY."""
    cases = {name: (options.model, m, int(r), way) for name in options.cases for m, r, way in [name.split(":")]}
    steps = {name: make_step(*case) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in (0, *range(options.batches)):  # the first time warms up
        for name, (step, _) in steps.items():
            start = time.process_time()
            step(batches[cases[name][3] != "random"][number])
            times[name].append(time.process_time() - start)
            print(name, number, f"{times[name][-1]:.2f} s", flush=True)
    counts = {name: count for name, (_, count) in steps.items()}
    steps.clear()
    for name, case in cases.items():
        own = batches[case[3] != "random"][: options.batches]
        positions = statistics.mean(batch["labels"].numel() for batch in own)
        row = {"case": name, "parameters": counts[name], "step_s": round(statistics.median(times[name][1:]), 2)}
        row |= {
            "steps_s": [round(s, 2) for s in times[name]],
            "positions": positions,
        }
        if options.peaks:
            row["peak_mb"] = round(alone(measure_peak, (*case, own[0])) / 1e6)
        print(row, flush=True)
        yield row


def main() -> None:
    """Run the cases and write the result."""
    parser = make_parser("eval.bench.step_real", __doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument(
        "--cases", nargs="+", required=True, metavar="METHOD:RANK:WAY", help="base, soka, zero, lora or full"
    )
    parser.add_argument("--batches", type=int, default=5, help="of each kind, after one step that warms up")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--products", choices=("auto", "torch"), default="auto", help="whose float32 products")
    parser.add_argument("--peaks", action="store_true", help="measure memory as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = make_batches(options.model, options.train, options.max_length)
    counts = {
        "grouped" if grouped else "random": {
            "positions": sum(b["labels"].numel() for b in some),
            "tokens": sum(int(b["attention_mask"].sum()) for b in some),
            "trained": sum(int((b["labels"][:, 1:] >= 0).sum()) for b in some),
        }
        for grouped, some in batches.items()
    }
    print(counts, flush=True)
    with fast_products() if options.products == "auto" else nullcontext():
        rows = list(measure(options, batches))
    write_record(options, {"epoch": counts, "rows": rows})


if __name__ == "__main__":
    main()
