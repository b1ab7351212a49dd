"""Stage `init` at real layer shapes, rule by rule: time and peak memory.

    python -m eval.bench.init --out eval/results/init.json

Generates a LLaMA checkpoint of a few decoder layers (bf16; `--kind` as in eval/bench/kpsvd.py), then runs
`InitRun` under each rule in a fresh process. `peak_memory_ratio` is the peak of resident memory above what the
process held just before (the kernel's high-water mark; for rules with a pass over data that is with the base model
loaded), in multiples of the largest weight in float32. The bound is 6 for every rule without activation weighting.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.llama import VOCABULARY, start_of, write_model
from eval.measure import Peak, alone
from eval.record import make_parser, write_record
from soka_serve.base.base import Base
from soka_serve.base.cpu import fast_products
from soka_serve.base.model import load_base
from soka_serve.base.target_modules import budget_groups
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.compiler.init.probe import gather

TOKENS = 32  # per batch of the rules with a pass over data

BUDGET = {"policy": "budget", "parameters": 200_000, "max": 64, "pool": 64}
RULES: dict[str, dict[str, Any]] = {
    "weights, fixed 64": {"calibration_batches": 0, "rank": {"policy": "fixed", "rank": 64}},
    "weights, elbow, max 64": {"calibration_batches": 0, "rank": {"policy": "elbow", "max": 64}},
    "weights, budget, max 64": {"calibration_batches": 0, "rank": BUDGET},
    "weights, auto shape, fixed 8": {"calibration_batches": 0, "shape": "auto", "rank": {"policy": "fixed", "rank": 8}},
    "delta, budget, max 64": {"init": "delta", "finetuned": "tuned", "rank": BUDGET},
    "gradient, budget, max 64": {"init": "gradient", "calibration_batches": 2, "rank": BUDGET},
    "weights, activation weighting, fixed 1": {"calibration_batches": 2, "rank": {"policy": "fixed", "rank": 1}},
    "weights, activation weighting, fixed 8": {"calibration_batches": 2, "rank": {"policy": "fixed", "rank": 8}},
}


def make_statistics(base: Path, scratch: Path) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """`InitRun`'s `statistics` over random batches, with the model loaded into memory of its own."""
    model = load_base(base, "bfloat16").requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # not a view of the mapped file, which would count as it is read
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY, (1, TOKENS), generator=generator) for _ in range(2)]
    batches = [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]
    return lambda targets: gather(model, batches, targets, scratch)


def run_rule(options: dict[str, Any]) -> dict[str, Any]:
    """One rule, in a process of its own."""
    torch.set_num_threads(options["threads"])
    base, tuned, scratch = (Path(options[key]) for key in ("base", "tuned", "scratch"))
    manifest, opened, targets = start_of(base, RULES[options["rule"]])
    needs_data = targets[0].rule.batches > 0
    statistics = make_statistics(base, scratch) if needs_data else None
    arguments: dict[str, Any] = {
        "finetuned": {"tuned": Base(tuned)},
        "statistics": statistics,
        "budgets": {t.module.name: i for i, group in budget_groups(manifest, targets).items() for t in group},
        "scratch": scratch,
        "progress": False,
    }
    torch.linalg.svd(torch.randn(64, 64))  # libraries set up outside the measurement
    gc.collect()
    with Peak() as peak, fast_products():
        start = time.perf_counter()
        started = InitRun(targets, opened, **arguments).initialise()
        seconds = time.perf_counter() - start
    largest = max(t.module.out_features * t.module.in_features for t in targets)
    return {
        "rule": options["rule"],
        "modules": len(started.modules),
        "ranks": sorted({m.rank for m in started.modules}),
        "time_s": round(seconds, 2),
        "peak_memory_ratio": round(peak.added_bytes / (4 * largest), 2),
    }


def main() -> None:
    """Run all rules and write the result."""
    parser = make_parser("eval.bench.init", __doc__)
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size (default: LLaMA-2-7B's)")
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--kind", choices=("decaying", "random"), default="decaying", help="spectrum of the weights")
    parser.add_argument("--rule", action="extend", nargs="+", choices=list(RULES), help="only these rules")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / name) for name in ("base", "tuned")}
        for name, noise in (("base", 0.0), ("tuned", 0.1)):
            sizes = (options.hidden, options.intermediate, options.layers)
            write_model(Path(paths[name]), *sizes, kind=options.kind, noise=noise)
        for number, rule in enumerate(options.rule or RULES):
            scratch = Path(folder) / f"scratch-{number}"
            scratch.mkdir()
            case = {**paths, "rule": rule, "scratch": str(scratch), "threads": options.threads}
            rows.append(alone(run_rule, case))
            print(json.dumps(rows[-1]), flush=True)
            write_record(options, {"rows": rows})


if __name__ == "__main__":
    main()
