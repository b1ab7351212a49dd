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
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eval.bench.kpsvd import draw_weight
from eval.memory import reset_peak, resident_bytes
from eval.record import hardware, make_parser, write_record
from soka_serve.base.model import load_base
from soka_serve.base.opened import Base
from soka_serve.base.targets import budget_groups, resolve_targets
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.compiler.init.probe import gather
from soka_serve.io.versions import versions
from soka_serve.manifest.schema import Manifest

VOCABULARY = 64
TOKENS = 32  # per batch of the rules with a pass over data

BUDGET = {"policy": "budget", "parameters": 200_000, "max": 64, "pool": 64}
RULES: dict[str, dict[str, Any]] = {
    "weights, fixed 64": {"calibration_batches": 0, "rank": {"policy": "fixed", "rank": 64}},
    "weights, elbow, max 64": {"calibration_batches": 0, "rank": {"policy": "elbow", "max": 64}},
    "weights, budget, max 64": {"calibration_batches": 0, "rank": BUDGET},
    "weights, auto shape, fixed 8": {
        "calibration_batches": 0,
        "shape": "auto",
        "rank": {"policy": "fixed", "rank": 8},
    },
    "delta, budget, max 64": {"init": "delta", "finetuned": "tuned", "rank": BUDGET},
    "gradient, budget, max 64": {"init": "gradient", "calibration_batches": 2, "rank": BUDGET},
    "weights, activation weighting, fixed 1": {"calibration_batches": 2, "rank": {"policy": "fixed", "rank": 1}},
    "weights, activation weighting, fixed 8": {"calibration_batches": 2, "rank": {"policy": "fixed", "rank": 8}},
}


def write_checkpoint(directory: Path, options: dict[str, Any], noise: float = 0.0) -> None:
    """A LLaMA checkpoint with generated weights; `noise` times a random matrix is added (a "fine-tuned" one)."""
    hidden, inner = options["hidden"], options["intermediate"]
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": options["layers"], "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    embeddings = torch.randn(VOCABULARY, hidden, generator=torch.Generator().manual_seed(2))
    tensors = {"model.embed_tokens.weight": embeddings, "model.norm.weight": torch.ones(hidden)}
    sizes = {**dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden)), "gate": (inner, hidden), "up": (inner, hidden)}
    sizes["down"] = (hidden, inner)
    generator = torch.Generator().manual_seed(1)
    for layer in range(options["layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden)
        for name, size in sizes.items():
            weight = draw_weight(options["kind"], *size)
            weight *= size[1] ** -0.5 / weight.square().mean().sqrt()
            if noise:
                weight += noise * size[1] ** -0.5 * torch.randn(size, generator=generator)
            part = "self_attn" if name in "qkvo" else "mlp"
            tensors[f"{prefix}.{part}.{name}_proj.weight"] = weight.bfloat16()
    save_file({k: v.bfloat16() for k, v in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})


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
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "base": {"path": str(base)},
            "adapt": [RULES[options["rule"]]],
            "train": {"steps": 0, "data": {"builtin": "math"}},
        }
    )
    opened = Base(base)
    targets = resolve_targets(manifest, opened.layout.modules)
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
    before, start = reset_peak(), time.perf_counter()
    started = InitRun(targets, opened, **arguments).initialise()
    seconds, peak = time.perf_counter() - start, resident_bytes("VmHWM")
    largest = max(t.module.out_features * t.module.in_features for t in targets)
    return {
        "rule": options["rule"],
        "modules": len(started.modules),
        "ranks": sorted({m.rank for m in started.modules}),
        "time_s": round(seconds, 2),
        "peak_memory_ratio": round((peak - before) / (4 * largest), 2),
    }


def main() -> None:
    """Run all rules and write the result."""
    parser = make_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size (default: LLaMA-2-7B's)")
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--kind", choices=("decaying", "random"), default="decaying", help="spectrum of the weights")
    parser.add_argument("--rule", action="append", choices=list(RULES), help="only this rule (repeatable)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options: dict[str, Any] = {
        k: getattr(arguments, k) for k in ("hidden", "intermediate", "layers", "kind", "threads")
    }
    record: dict[str, Any] = {
        "command": "python -m eval.bench.init "
        + " ".join(f"--{key} {value}" for key, value in options.items())
        + "".join(f' --rule "{rule}"' for rule in arguments.rule or ()),
        "versions": versions(),
        "hardware": hardware(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / name) for name in ("base", "tuned")}
        write_checkpoint(Path(paths["base"]), options)
        write_checkpoint(Path(paths["tuned"]), options, noise=0.1)
        for number, rule in enumerate(arguments.rule or RULES):
            scratch = Path(folder) / f"scratch-{number}"
            scratch.mkdir()
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(run_rule, ({**options, **paths, "rule": rule, "scratch": str(scratch)},))
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_record(arguments.out, record)


if __name__ == "__main__":
    main()
