"""Times whole models in vLLM on the CPU: without adapters, with the plugin, and with vLLM's own LoRA.

    python -m eval.bench.serve --out eval/results/serve_cpu.json

For each model (the embedded base in float32; a random LLaMA of 100M parameters in bfloat16) these engines live at
once, each in a process of its own and with one thread:

- "plain" and "plain_eager": no adapters configured; vLLM compiles such a model on CPUs, unless it is told not to. With
  adapters configured it never compiles there, so "plain_eager" is what the others have in common;
- "soka": adapters configured, and the plugin; its adapters have `--ranks` terms at the balanced factor shapes. Like the
  next ones with enforce_eager: without it vLLM does not compile either, but chooses its layers as if it did;
- "soka_not_told": the same without enforce_eager, before adapters are loaded;
- "lora_R": adapters configured, no plugin, vLLM's LoRA with slots of rank R: those of `--ranks`, whose parameters are
  nearly equal to a SoKA adapter's of so many terms, and 16.

A case is a number of requests dealt in turn to a number of adapters (0: all ask the base), once as prefill (prompts of
many tokens, one token of answer) and once as decode (short prompts, many tokens of answer). All engines take turns at a
case, round after round; the figures are tokens per second of processor time (which other load on the machine changes
less than it does wall time) in the best round, and `ratio` is over "plain_eager" in its best. Only ratios within one
case should be compared. "idle" cases ran before any adapter was loaded, those of "cases" with all slots full. `load`:
medians for an adapter from the disk into its slot, and one from vLLM's cache into a slot, and the memory of all layers'
slots over their number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from eval.llama import random_factors
from eval.record import make_parser, write_record
from soka_serve.adapter.format import write_adapter
from soka_serve.builtin import base_directory
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE

# Else vLLM gives lm_head slots too, and on CPUs computes them for every token.
LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SLOTS = 64
EXTRA = 8  # adapters more than slots, so that some are in the cache only
REQUESTS_AND_ADAPTERS = [(8, 0), (8, 1), (8, 8), (64, 0), (64, 1), (64, 8), (64, 64)]
SIZES = {"embedded": (64, 32), "100M": (16, 8)}  # tokens of an answer with 8 and with 64 requests
SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
PREFILL = {8: 128, 64: 16}  # tokens of a prompt


class Model(NamedTuple):
    """What is served, and the (out, in) of its projections by module name."""

    directory: Path
    dtype: str
    weights: dict[str, tuple[int, int]]
    vocabulary: int


def make_models(folder: Path) -> dict[str, Model]:
    """The embedded base, and a random LLaMA written to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from soka_serve.base.pretrained import open_model

    torch.manual_seed(0)
    config = LlamaConfig(**SMALL_LLAMA, vocab_size=32768, tie_word_embeddings=True, max_position_embeddings=1024)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    models = {}
    for name, directory, dtype in (("embedded", base_directory(), "float32"), ("100M", folder / "model", "bfloat16")):
        model = open_model(directory)
        assert name == "embedded" or model.num_parameters() >= 100e6
        weights = {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.named_parameters() if "_proj" in n}
        models[name] = Model(directory, dtype, weights, model.config.vocab_size)
    return models


def write_adapters(folder: Path, model: Model, kind: str, rank: int) -> int:
    """SLOTS + EXTRA adapters of all projections; returns the parameters of one."""
    parameters = 0
    for i in range(SLOTS + EXTRA):
        torch.manual_seed(i)
        if kind == "soka":
            factors = random_factors(model.weights, rank)
            write_adapter(folder / f"{i}", factors, base_model="base", dtype=torch.bfloat16)
            parameters = sum(f.parameters for f in factors.values())
            continue
        tensors = {}
        for name, (out, width) in model.weights.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width).bfloat16() * 0.03
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank).bfloat16() * 0.03
        (folder / f"{i}").mkdir(parents=True)
        save_file(tensors, folder / f"{i}" / WEIGHTS_FILE, metadata={"format": "pt"})
        targets = sorted({name.rpartition(".")[2] for name in model.weights})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
        (folder / f"{i}" / CONFIG_FILE).write_text(json.dumps(config))
        parameters = sum(t.numel() for t in tensors.values())
    return parameters


def slot_bytes(model: torch.nn.Module) -> float:
    """In a worker: bytes of all slots in all layers, over the number of slots asked for."""
    from soka_vllm.slots import SlotStore

    total = 0
    for layer in model.modules():
        stores = [value for value in vars(layer).values() if isinstance(value, SlotStore)]
        if stores and not stores[0].empty:
            total += sum(store.nbytes for store in stores)
        elif "lora_a_stacked" in vars(layer):
            total += sum(t.nbytes for t in (*layer.lora_a_stacked, *layer.lora_b_stacked))  # type: ignore[misc]
    return total / SLOTS


class Engine:
    """One vLLM engine; lives in a process of its own, driven through a pipe (`Remote`)."""

    def __init__(self, model: Model, options: Mapping[str, Any]) -> None:
        from vllm import LLM

        self.vocabulary = model.vocabulary
        self.numbers: dict[str, int] = {}
        self.llm = LLM(
            str(model.directory),
            dtype=model.dtype,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=256,
            max_num_seqs=64,
            max_num_batched_tokens=1024,
            **options,
        )

    def request(self, folder: str, i: int) -> Any:
        """vLLM's request for adapter number i of a folder."""
        from vllm.lora.request import LoRARequest

        path = f"{folder}/{i}"
        return LoRARequest(path, self.numbers.setdefault(path, len(self.numbers) + 1), path)

    def seconds(self, requests: int, folder: str, adapters: int, prompt: int, tokens: int) -> float:
        """Processor time of one batch; its adapters are in their slots before."""
        from vllm import SamplingParams

        draw = random.Random(0)
        prompts = [
            {"prompt_token_ids": [draw.randrange(3, self.vocabulary) for _ in range(prompt)]} for _ in range(requests)
        ]
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        loras = [self.request(folder, i) for i in range(adapters)]
        for lora in loras:
            self.llm.llm_engine.add_lora(lora)
        asked = [loras[i % adapters] for i in range(requests)] if adapters else None
        start = time.process_time()
        done = self.llm.generate(prompts, params, lora_request=asked, use_tqdm=False)
        taken = time.process_time() - start
        assert sum(len(output.outputs[0].token_ids) for output in done) == requests * tokens
        return taken

    def load(self, folder: str) -> dict[str, float]:
        """Load all adapters, then those again that lost their slots; median milliseconds, and bytes of a slot."""

        def timed(i: int) -> float:
            start = time.process_time()
            self.llm.llm_engine.add_lora(self.request(folder, i))
            return (time.process_time() - start) * 1e3

        cold = [timed(i) for i in range(SLOTS + EXTRA)]
        swapped = [timed(i) for i in range(EXTRA)]
        return {
            "from_disk_ms": round(statistics.median(cold), 2),
            "from_cache_ms": round(statistics.median(swapped), 2),
            "slot_bytes": round(self.llm.apply_model(slot_bytes)[0]),
        }


def work(pipe: Connection, model: Model, options: Mapping[str, Any]) -> None:
    """The other end of `Remote`."""
    engine = Engine(model, options)
    pipe.send(None)
    while (call := pipe.recv()) is not None:
        pipe.send(getattr(engine, call[0])(*call[1:]))


class Remote:
    """An `Engine` elsewhere; the constructor does not wait until it is up."""

    def __init__(self, model: Model, *, plugin: bool, threads: int, **options: Any) -> None:
        os.environ.update(
            {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in one process, whose time is taken
                "VLLM_PLUGINS": "soka" if plugin else "",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(threads),
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `slot_bytes`
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                "VLLM_LOGGING_LEVEL": "WARNING",
            }
        )
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(other, model, options))
        self.process.start()
        other.close()

    def call(self, *call: Any) -> Any:
        """Call a method of the engine."""
        self.pipe.send(call)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def run_cases(engines: Mapping[str, tuple[Remote, str]], size: tuple[int, int], cases: Any, rounds: int) -> list[Any]:
    """All engines at all cases, taking turns; tokens/s of the best round and ratios over "plain_eager".

    Args:
        engines: by name the engine and the folder of its adapters ("" where it has none).
        size: tokens of an answer with few and with many requests.
        cases: (requests, adapters) pairs.
        rounds: per engine and case, after one that does not count.
    """
    rows = []
    for requests, adapters in cases:
        for phase, prompt, tokens in (
            ("prefill", PREFILL[requests], 1),
            ("decode", 4, size[0] if requests == 8 else size[1]),
        ):
            taking_part = {name: e for name, e in engines.items() if e[1] or name.startswith("plain")}
            best = dict.fromkeys(taking_part, float("inf"))
            for turn in range(rounds + 1):
                for name, (engine, folder) in taking_part.items():
                    # The plain engines answer without adapters, as what the others are held against.
                    asked = 0 if name.startswith("plain") else adapters
                    taken = engine.call("seconds", requests, folder, asked, prompt, tokens)
                    best[name] = min(best[name], taken) if turn else best[name]
            work_done = requests * (prompt if phase == "prefill" else tokens)
            row: dict[str, Any] = {"phase": phase, "requests": requests, "adapters": adapters}
            row["tokens_per_s"] = {name: round(work_done / taken, 1) for name, taken in best.items()}
            row["ratio"] = {name: round(best["plain_eager"] / taken, 4) for name, taken in best.items()}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def bench(name: str, model: Model, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One model: start the engines, run them idle, load the adapters, run all cases."""
    common: dict[str, Any] = {"threads": options.threads}
    lora: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": SLOTS,
        "lora_target_modules": LAYERS,
        "enforce_eager": True,
    }
    soka = {**lora, "max_cpu_loras": len(options.ranks) * (SLOTS + EXTRA), "max_lora_rank": 8}
    remotes = {"soka": Remote(model, plugin=True, **common, **soka)}
    if not options.loads:
        remotes |= {
            "plain": Remote(model, plugin=False, **common),
            "plain_eager": Remote(model, plugin=False, enforce_eager=True, **common),
            "soka_not_told": Remote(model, plugin=True, **common, **{**soka, "enforce_eager": False}),
        }
    lora_ranks = [*options.ranks, 16]
    for rank in lora_ranks:
        more = {"max_cpu_loras": SLOTS + EXTRA, "max_lora_rank": rank}
        remotes[f"lora_{rank}"] = Remote(model, plugin=False, **common, **lora, **more)
    sets = {f"soka_{rank}": ("soka", rank) for rank in options.ranks} | {f"lora_{r}": ("lora", r) for r in lora_ranks}
    result: dict[str, Any] = {
        "parameters": {n: write_adapters(folder / n, model, kind, rank) for n, (kind, rank) in sets.items()}
    }
    for remote in remotes.values():
        remote.pipe.recv()  # it is up
    if not options.loads:
        idle = {n: (remote, "unused") for n, remote in remotes.items()}
        result["idle"] = run_cases(idle, SIZES[name], [(8, 0), (64, 0)], options.idle_rounds)
        remotes.pop("soka_not_told").close()
    loaded = {n: (remotes[n if n in remotes else "soka"], str(folder / n)) for n in sets}
    result["load"] = {n: remote.call("load", adapters) for n, (remote, adapters) in loaded.items()}
    print(json.dumps(result["load"]), flush=True)
    if not options.loads:
        plain = {n: (remotes[n], "") for n in ("plain", "plain_eager")}
        result["cases"] = run_cases(plain | loaded, SIZES[name], REQUESTS_AND_ADAPTERS, options.rounds)
    for remote in remotes.values():
        remote.close()
    return result


def main() -> None:
    """Run everything and write the result."""
    parser = make_parser("eval.bench.serve", __doc__)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], choices=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--idle-rounds", type=int, default=5)
    parser.add_argument("--loads", action="store_true", help="only how long loading an adapter takes")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        results = {name: bench(name, models[name], Path(folder) / name, options) for name in options.models}
    found = {
        "seeds": {"weights": 0, "adapters": list(range(SLOTS + EXTRA)), "prompts": 0},
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],  # before and after
        "models": results,
    }
    write_record(options, found, packages={"vllm": version("vllm-cpu")})


if __name__ == "__main__":
    main()
