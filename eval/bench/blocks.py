"""Times the CUDA kernel at one layer's shapes under other sizes of blocks, numbers of programs and warps.

    python -m eval.bench.blocks --out eval/results/blocks_cuda.json

Each case (rank, tokens, adapters) is that of `eval.bench.kernel`, LLaMA-2-7B's shapes in bfloat16. `chosen_us` is what
the plugin launches, each row's `us` that of one other choice, `of_chosen` their ratio. One choice changes one or two
settings of the plugin's; those that the compiler refuses (shared memory, registers) are left out, and counted.
`TRITON_INTERPRET=1 python -m eval.bench.blocks --device interpreter` shows that it runs; its times mean nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch

from eval.bench.kernel import MODELS, Case, Layer, graph_us
from eval.measure import best_us
from eval.record import make_parser, write_record
from soka_vllm.ops import triton_ops

CHOICES: dict[str, tuple[int, ...]] = {
    "BLOCK_M": (16, 32, 64),
    "BLOCK_N": (32, 64),
    "BLOCK_P": (32, 64),
    "BLOCK_Q": (32, 64),
    "programs": (1, 2, 4, 8, 16),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3),
}
_PAIRS = (("BLOCK_M", "programs"), ("BLOCK_N", "BLOCK_Q"), ("num_warps", "num_stages"))
Choice = dict[str, int]


def choices(settings: Collection[str]) -> Iterator[Choice]:
    """Nothing changed, then one of the settings at a time, then the pairs of them that depend on each other."""
    yield {}
    for name in settings:
        yield from ({name: value} for value in CHOICES[name])
    for one, other in _PAIRS:
        if one in settings and other in settings:
            yield from ({one: a, other: b} for a, b in itertools.product(CHOICES[one], CHOICES[other]))


def configured(change: Choice) -> Any:
    """`triton_ops.configure` with some of its settings changed."""
    chosen = triton_ops.configure

    def configure(*inputs: Any) -> tuple[int, dict[str, Any], dict[str, int]]:
        programs, constants, options = chosen(*inputs)
        changed = constants | {k: v for k, v in change.items() if k in constants}
        return change.get("programs", programs), changed, options | {k: v for k, v in change.items() if k in options}

    return configure


def measure(case: Case, device: str, settings: Collection[str], seconds: float) -> dict[str, Any]:
    """All choices of one case."""
    layer, chosen, times, refused = Layer(case, device), triton_ops.configure, [], 0
    for change in choices(settings):
        triton_ops.configure = configured(change)
        try:
            found = (graph_us if device == "cuda" else best_us)({"soka": layer.soka()}, seconds)["soka"]
        except Exception as error:  # noqa: BLE001 - Triton's own classes, which differ between its versions
            refused += 1
            print(case, change, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
        else:
            times.append((change, found))
            print(case, change, found, flush=True)
        finally:
            triton_ops.configure = chosen
    if not times or times[0][0]:
        raise RuntimeError(f"{case}: the kernel does not run as the plugin launches it")
    base = times[0][1]
    rows = [{**change, "us": us, "of_chosen": round(us / base, 3)} for change, us in times[1:]]
    return {**case._asdict(), "chosen_us": base, "refused": refused, "rows": sorted(rows, key=lambda row: row["us"])}


def main() -> None:
    """Run all cases and write the result."""
    parser = make_parser("eval.bench.blocks", __doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "interpreter"])
    parser.add_argument("--model", default="llama-2-7b", choices=MODELS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--settings", nargs="+", default=list(CHOICES), choices=CHOICES, help="which of them change")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each choice")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = [
        Case(options.model, "bfloat16" if options.device == "cuda" else "float32", rank, tokens, options.adapters)
        for rank, tokens in itertools.product(options.ranks, options.tokens)
    ]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rows = []
    for case in cases:
        rows.append(measure(case, options.device, options.settings, options.seconds))
        write_record(options, {"cases": rows}, machine={"device": name})  # each time: a limit of time may end this


if __name__ == "__main__":
    main()
