"""A whole training step: SoKA against PEFT's LoRA, PiSSA, DoRA and LoKr, and LyCORIS' LoKr, at about equal parameters.

    python -m eval.bench.step --out eval/results/step.json
    python -m eval.bench.step --llama 4096 11008 1 --ranks 1 4 --rows 1 --length 512 --repeats 3 --out ...

On the embedded base, or with `--llama` on a LLaMA of the given hidden size, intermediate size and number of layers with
random weights (4096 11008 1: one decoder layer of LLaMA-2-7B's, 32 heads). A step is forward, backward and AdamW on the
same batch. For one number of SoKA terms all methods take turns in one
process, step by step; `step_ratio` is SoKA's median processor time over the other's (other load on the machine does not
change it as it does wall time). Peak memory is measured in a fresh process per method: the high-water mark of resident
memory during steps above what the adapted model held before (`peak_ratio`, SoKA's over the other's). LoRA and LoKr get
the setting whose number of trained parameters is nearest to SoKA's from above, or below where there is none above.

"lycoris", beside one term and where lycoris-lora is installed, is one whole Kronecker product in every projection, with
factors as near to squares as it makes them (`factor` -1): a term of SoKA's that starts from zero. Its forward and
backward pass are fused Triton kernels on a GPU (`LYCORIS_KERNEL_BACKEND`).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from eval.measure import Peak, alone
from eval.record import make_parser, write_record
from soka_serve.base.model import load_base
from soka_serve.builtin import base_directory
from soka_serve.kron.shapes import balanced_shape
from soka_serve.peft import SokaConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
LOKR_SETTINGS = [(factor, rank) for factor in (-1, 2, 4, 8, 16) for rank in (1, 2, 4, 8, 16, 100_000)]
LARGE_LOKR_SETTINGS = [(factor, rank) for factor in (-1, 8, 16) for rank in (1, 4, 16)]
VOCABULARY = 512  # of a model that --llama describes: the head is no part of what is compared


class Size(NamedTuple):
    """A batch, and the model: None is the embedded base, else hidden size, intermediate size and layers."""

    rows: int
    length: int
    llama: tuple[int, ...] | None
    dtype: str
    device: str


def make_config(method: str, setting: Any) -> PeftConfig:
    """PEFT config of one method: a rank, for LoKr (decompose_factor, rank), for SoKA (init, rank)."""
    common: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "soka":
        return SokaConfig(r=setting[1], init_soka_weights=setting[0], **common)
    if method == "lokr":
        return LoKrConfig(r=setting[1], alpha=setting[1], decompose_factor=setting[0], **common)
    extra: dict[str, Any] = {"use_dora": True} if method == "dora" else {}
    if method == "pissa":
        extra = {"init_lora_weights": "pissa_niter_4"}
    return LoraConfig(r=setting, lora_alpha=setting, **extra, **common)


def make_base(llama: Sequence[int] | None, dtype: Any) -> Any:
    """The embedded base, or a LLaMA with random weights."""
    if llama is None:
        return load_base(base_directory(), dtype)
    hidden, inner, layers = llama
    heads = max(hidden // 128, 1)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def make_model(method: str, setting: Any, llama: Sequence[int] | None, dtype: str, device: str = "cpu") -> Any:
    """The base with one fresh adapter, in training mode. Adapters are in float32, as PEFT casts them."""
    torch.manual_seed(0)
    with torch.device(device):
        if method == "lycoris":
            return add_lycoris(make_base(llama, dtype), setting).train()
        return get_peft_model(make_base(llama, dtype), make_config(method, setting)).train()


def add_lycoris(base: Any, factor: int) -> Any:
    """The base with LyCORIS' LoKr, one Kronecker product without a factorisation of its factors."""
    from lycoris.modules.lokr import LokrModule

    base.requires_grad_(False)
    layers = [(name, layer) for name, layer in base.named_modules() if name.endswith("_proj")]
    base.lycoris = torch.nn.ModuleList(
        LokrModule(name.replace(".", "_"), layer, factor=factor, full_matrix=True, bypass_mode=True)
        for name, layer in layers
    )
    for module in base.lycoris:
        module.apply_to()
    return base


def parameters(method: str, setting: Any, llama: Sequence[int] | None) -> int:
    """Trained parameters, from the shapes of the projections."""
    with torch.device("meta" if llama else "cpu"):
        base = make_base(llama, "float32")
    if method == "soka":
        layers = [m for name, m in base.named_modules() if name.endswith("_proj")]
        return sum(balanced_shape(m.out_features, m.in_features).parameters(setting[1]) for m in layers)
    with torch.device("meta" if llama else "cpu"):
        if method == "lycoris":
            model = add_lycoris(base, setting)
        else:
            model = get_peft_model(base, make_config("lora" if method == "pissa" else method, setting))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def nearest(method: str, settings: Any, wanted: int, llama: Sequence[int] | None) -> tuple[Any, int]:
    """The setting with the fewest parameters from `wanted` up, else the one with the most."""
    counts = [(parameters(method, setting, llama), setting) for setting in settings]
    above = [c for c in counts if c[0] >= wanted]
    count, setting = min(above, key=lambda c: c[0]) if above else max(counts, key=lambda c: c[0])
    return setting, count


def make_step(method: str, setting: Any, size: Size) -> Callable[[], None]:
    """One training step as a function."""
    model = make_model(method, setting, size.llama, size.dtype, size.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(
        4, model.config.vocab_size, (size.rows, size.length), generator=torch.Generator().manual_seed(1)
    ).to(size.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if size.device == "cuda":
            torch.cuda.synchronize()

    return step


def measure_peak(case: tuple[str, Any, Size, int]) -> int:
    """Peak bytes of three steps, in a process of its own."""
    method, setting, size, threads = case
    torch.set_num_threads(threads)
    # Libraries set up outside the measurement.
    make_step(method, setting, size._replace(rows=2, length=8, llama=size.llama and (256, 256, 1)))()
    step = make_step(method, setting, size)
    gc.collect()
    with Peak(size.device) as peak:
        for _ in range(3):
            step()
    return peak.added_bytes


def compare(rank: int, size: Size, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one number of SoKA terms."""
    wanted = parameters("soka", ("weights", rank), size.llama)
    methods: dict[str, tuple[Any, int]] = {
        "soka": (("weights", rank), wanted),
        "soka (zero init)": (("zero", rank), wanted),
    }
    for name in ("lora", "pissa", "dora"):
        methods[name] = nearest(name, LORA_RANKS, wanted, size.llama)
    methods["lokr"] = nearest("lokr", LARGE_LOKR_SETTINGS if size.llama else LOKR_SETTINGS, wanted, size.llama)
    if rank == 1 and find_spec("lycoris"):
        methods["lycoris"] = (-1, parameters("lycoris", -1, size.llama))
    steps = {name: make_step(name.split()[0], setting, size) for name, (setting, _) in methods.items()}
    clock = time.perf_counter if size.device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if repeat >= 2:
                times[name].append(clock() - start)
    steps.clear()
    peaks = {}
    for name, (setting, _) in methods.items():
        peaks[name] = alone(measure_peak, (name.split()[0], setting, size, options.threads))
    for name, (setting, count) in methods.items():
        yield {
            "soka_rank": rank,
            "method": name,
            "setting": setting,
            "parameters": count,
            "step_ms": round(statistics.median(times[name]) * 1e3, 1),
            "peak_mib": round(peaks[name] / 2**20, 1),
            "step_ratio": round(statistics.median(times["soka"]) / statistics.median(times[name]), 2),
            "peak_ratio": round(peaks["soka"] / peaks[name], 2),
        }


def main() -> None:
    """Run all cases and write the result."""
    parser = make_parser("eval.bench.step", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="SoKA terms per module")
    parser.add_argument("--rows", type=int, default=32, help="sequences in the batch (the quickstart's)")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--llama", type=int, nargs=3, metavar=("HIDDEN", "INTERMEDIATE", "LAYERS"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: wall time")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llama = tuple(options.llama) if options.llama else None
    size = Size(options.rows, options.length, llama, options.dtype, options.device)
    rows = []
    for rank in options.ranks:
        for row in compare(rank, size, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
        write_record(options, {"seed": 0, "rows": rows})  # each time: a limit of time may end this


if __name__ == "__main__":
    main()
