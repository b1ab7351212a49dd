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
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from eval.bench.kpsvd import draw_weight
from eval.memory import AnonymousPeak
from eval.record import hardware, make_parser, write_record
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.opened import Base
from soka_serve.base.targets import resolve_targets
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.io.progress import track
from soka_serve.io.versions import versions
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.schema import Manifest

RANK = 64
LARGE = "mlp.up_proj"
SMALL = "self_attn.q_proj"


def sizes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's projections."""
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    return attention | {"mlp.gate_proj": (inner, hidden), LARGE: (inner, hidden), "mlp.down_proj": (hidden, inner)}


def write_model(folder: Path, hidden: int, inner: int, layers: int) -> None:
    """A LLaMA checkpoint, a file per layer."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": max(hidden // 128, 1),
        "num_key_value_heads": max(hidden // 128, 1), "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    where: dict[str, str] = {}
    with track(layers, "writing the model", unit="layer") as step:
        for layer in range(layers):
            tensors: dict[str, torch.Tensor] = {}
            for number, (name, size) in enumerate(sizes(hidden, inner).items()):
                weight = draw_weight("decaying", *size, seed=7 * layer + number)
                weight *= size[1] ** -0.5 / weight.square().mean().sqrt()
                tensors[f"model.layers.{layer}.{name}.weight"] = weight.bfloat16()
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden).bfloat16()
            if layer == 0:
                embeddings = torch.randn(64, hidden, generator=torch.Generator().manual_seed(0))
                tensors["model.embed_tokens.weight"] = embeddings.bfloat16()
                tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
            file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
            step(file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


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
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "base": {"path": case["model"]},
            "adapt": [{"calibration_batches": 0, "rank": {"policy": "fixed", "rank": RANK}}],
            "train": {"steps": 0, "data": {"builtin": "math"}},
        }
    )
    base = Base(Path(case["model"]))
    targets = resolve_targets(manifest, base.layout.modules)
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


def alone(function: Callable[[dict[str, Any]], Any], case: dict[str, Any]) -> Any:
    """Its result from a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (case,))


def main() -> None:
    """Run everything and write the result."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint; made where it is missing")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, required=True)
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
    record = {
        "command": f"python -m eval.bench.kpsvd_7b --model DIR --hidden {options.hidden} --intermediate "
        f"{options.intermediate} --layers {options.layers} --threads {options.threads} --device {options.device}",
        "versions": versions(),
        "hardware": hardware(device=options.device),
        "rank": RANK,
        **found,
    }
    write_record(options.out, record)


if __name__ == "__main__":
    main()
