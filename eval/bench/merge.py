#!/usr/bin/env python3
"""Time and memory of `soka-serve merge` against copying the same files, on a generated checkpoint.

    python -m eval.bench.merge [--gib 2] [--rank 8] [--repeats 5] [--peft] [--out eval/results/merge.json]

A LLaMA-shaped bfloat16 checkpoint of at least --gib GiB in shards of 1 GB, random weights, and an adapter on all
seven projections of every layer, with a soka.lock, so that the merge also hashes the base. Copy and merge alternate;
both read the base from the disk, as it is dropped from the page cache before, and flush what they wrote to the disk.
A merge runs in a process of its own, which samples its anonymous memory (pages of files that the kernel caches do not
count) every 5 ms; the baseline is taken when everything is imported.

With --peft also what PEFT does: `from_pretrained` in the checkpoint's dtype, LoRA of the same rank on the same modules
(random, as loaded), `merge_and_unload`, `save_pretrained`, flushed. It holds the whole model in memory.

A copy mostly waits for the disk, a merge needs both cores: on a machine that is busy with other things the ratio grows.
There, run it in a session of its own whose scheduling group goes first (as root):

    setsid -w sh -c 'echo -15 > /proc/self/autogroup; exec python -m eval.bench.merge'
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from eval.llama import random_factors
from eval.memory import AnonymousPeak
from eval.record import make_parser, write_record
from soka_serve.adapter.format import write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.compiler.merge.merge import merge

HIDDEN, INTERMEDIATE, VOCABULARY, KEY_VALUE = 4096, 11008, 32000, 1024
SHARD_BYTES = 10**9


def layer_shapes(layer: int) -> dict[str, tuple[int, int]]:
    """The seven projections of one LLaMA layer with grouped-query attention."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return {
        f"{attention}.q_proj": (HIDDEN, HIDDEN),
        f"{attention}.k_proj": (KEY_VALUE, HIDDEN),
        f"{attention}.v_proj": (KEY_VALUE, HIDDEN),
        f"{attention}.o_proj": (HIDDEN, HIDDEN),
        f"{mlp}.gate_proj": (INTERMEDIATE, HIDDEN),
        f"{mlp}.up_proj": (INTERMEDIATE, HIDDEN),
        f"{mlp}.down_proj": (HIDDEN, INTERMEDIATE),
    }


def generate(folder: Path, *, size_bytes: int, rank: int) -> tuple[Path, Path]:
    """Write base and adapter; returns their directories."""
    base = folder / "base"
    base.mkdir()
    embedding = VOCABULARY * HIDDEN * 2
    per_layer = sum(o * i for o, i in layer_shapes(0).values()) * 2
    layers = max(1, -(-(size_bytes - 2 * embedding) // per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= layer_shapes(layer)
        shapes[f"model.layers.{layer}.input_layernorm"] = (HIDDEN,)
        shapes[f"model.layers.{layer}.post_attention_layernorm"] = (HIDDEN,)
    shapes |= {"model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []

    def flush_shard() -> None:
        save_file(shard, base / f"model-{len(shards) + 1:05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, shape in shapes.items():
        tensor = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush_shard()
        shard[f"{name}.weight"] = tensor
    flush_shard()
    weight_map = {n: f"model-{i + 1:05d}.safetensors" for i, names in enumerate(shards) for n in names}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 128, "num_key_value_heads": KEY_VALUE // 128,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    projections = {name: size for layer in range(layers) for name, size in layer_shapes(layer).items()}
    factors = random_factors(projections, rank, generator)
    lock = {"soka": 1, "base": {"name": "generated", "sha256": Checkpoint.open(base).sha256()}}
    write_adapter(folder / "adapter", factors, base_model="generated", lock=lock)
    return base, folder / "adapter"


def forget(base: Path) -> None:
    """Drop the checkpoint from the page cache, and write what earlier rounds left to write: all begin alike."""
    os.sync()
    for file in base.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_files(base: Path, out: Path) -> float:
    """Seconds for a plain copy of the checkpoint, flushed to the disk."""
    forget(base)
    started = time.monotonic()
    out.mkdir()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, out / file.name)
    for file in sorted(out.iterdir()):  # at the end, so that the disk writes one file while the next is read
        flush(file)
    return time.monotonic() - started


def flush(file: Path) -> None:
    """To the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def merge_with_peft(base: Path, rank: int, out: Path) -> None:
    """What PEFT's users do, with a LoRA of the same rank on the same modules."""
    from peft import LoraConfig, get_peft_model

    from soka_serve.base.pretrained import open_model

    model = open_model(base, dtype="auto")
    names = sorted({name.rsplit(".", 1)[1] for name in layer_shapes(0)})
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload().save_pretrained(out)
    for file in sorted(out.iterdir()):
        flush(file)


def merge_here(base: Path, adapter: Path, out: Path, verify: bool, *, peft_rank: int | None = None) -> dict[str, Any]:
    """One merge in this process, with its time and the peak of its memory above the baseline."""
    torch.ones(8) @ torch.ones(8)
    if peft_rank is not None:  # imported, as what the other way needs is
        importlib.import_module("peft")
        importlib.import_module("transformers.models.llama.modeling_llama")
    error = None
    with AnonymousPeak() as peak:
        forget(base)
        cpu, started = time.process_time(), time.monotonic()
        if peft_rank is None:
            merged = merge(adapter, base=base, out=out, verify="tensors" if verify else False, progress=False)
            error = merged.max_error_ulp
        else:
            merge_with_peft(base, peft_rank, out)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_s": cpu, "peak_bytes": peak.added_bytes, "max_error_ulp": error}


def run_round(base: Path, adapter: Path, kinds: list[str], rank: int) -> tuple[float, dict[str, Any]]:
    """Seconds of a copy, and what `merge_here` says of each kind of merge, each in a process of its own."""
    out = base.parent / "out"
    copied = copy_files(base, out)
    shutil.rmtree(out)
    line, merged = f"copy {copied:.2f} s", {}
    for kind in kinds:
        command = [sys.executable, "-m", "eval.bench.merge", "--one", str(base), str(adapter), str(out), kind]
        command += ["--peft", "--rank", str(rank)] if kind == "PEFT" else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        merged[kind] = run = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(out)
        line += f", merge ({kind}) {run['seconds']:.2f} s, {run['peak_bytes'] / 2**20:.0f} MiB"
    print(line, file=sys.stderr)
    return copied, merged


def main() -> int:
    """Generate, alternate, report."""
    parser = make_parser("eval.bench.merge", __doc__)
    parser.set_defaults(out=Path("eval/results/merge.json"))
    parser.add_argument("--gib", type=float, default=2.0, help="least size of the checkpoint, GiB")
    parser.add_argument("--rank", type=int, default=8, help="terms per module")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="PEFT's merge_and_unload and save_pretrained too")
    parser.add_argument("--folder", type=Path, help="where the generated files go for the time of the run")
    parser.add_argument("--one", nargs=4, metavar=("BASE", "ADAPTER", "OUT", "VERIFY"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        one, two, three = map(Path, a.one[:3])
        print(json.dumps(merge_here(one, two, three, a.one[3] == "verify", peft_rank=a.rank if a.peft else None)))
        return 0
    kinds = ["verify", "no verify", *(["PEFT"] if a.peft else [])]
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        base, adapter = generate(folder, size_bytes=int(a.gib * 2**30), rank=a.rank)
        tensors = Checkpoint.open(base).tensors.values()
        size, largest = sum(t.nbytes for t in tensors), max(t.numel for t in tensors) * 4
        print(f"{size / 2**30:.2f} GiB, largest tensor {largest / 2**20:.0f} MiB in float32", file=sys.stderr)
        rounds = [run_round(base, adapter, kinds, a.rank) for _ in range(a.repeats + 1)]
    counted = rounds[1:]  # the first round reads the programs from the disk
    copies = [copied for copied, _ in counted]
    copy_s = statistics.median(copies)
    result: dict[str, Any] = {
        "what": "soka-serve merge against copying the same files, both from and to the disk",
        "checkpoint_bytes": size,
        "largest_tensor_float32_bytes": largest,
        "rank": a.rank,
        "repeats": a.repeats,
        "copy_s": {"median": copy_s, "all": copies},
    }
    for kind in kinds:
        runs = [merged[kind] for _, merged in counted]
        seconds = [r["seconds"] for r in runs]
        result[f"merge ({kind})"] = {
            "seconds": {"median": statistics.median(seconds), "all": seconds},
            "cpu_s": statistics.median(r["cpu_s"] for r in runs),
            "times_copy": statistics.median(seconds) / copy_s,
            "peak_bytes_above_baseline": max(r["peak_bytes"] for r in runs),
            "peak_over_largest_tensor": max(r["peak_bytes"] for r in runs) / largest,
            "max_error_ulp": runs[0]["max_error_ulp"],
        }
    group = Path("/proc/self/autogroup")
    load = {
        "load_average": os.getloadavg()[0],
        "nice_of_session": int(group.read_text().split()[-1]) if group.exists() else None,
    }
    machine = {"memory_bytes": psutil.virtual_memory().total}
    record = write_record(a, result | {"machine_at_the_end": load}, machine=machine)
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
