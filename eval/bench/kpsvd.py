"""Exact against truncated KPSVD: time, captured energy, peak memory.

    python -m eval.bench.kpsvd --out eval/results/kpsvd.json

For each weight and method a fresh process draws the weight (seeded), decomposes it at the balanced shape, and reports
the time (on the wall and of the processor; ratios take the latter, which other load does not
change) and the peak of its memory above what it held just before, in multiples of the weight in float32 (CPU: the
kernel's high-water mark of resident memory; CUDA: torch's). Ratios compare runs of one call of this script. Weights:
"random" is Gaussian, the flattest spectrum and so the slowest to converge; "decaying" has a spectrum like a trained
weight's; `--checkpoint DIR` adds the largest projection of a local checkpoint.

    python -m eval.bench.kpsvd --starts --checkpoint DIR --threads 1 --out eval/results/kpsvd_starts.json

What the starts that take other terms of a weight cost, beside the principal ones of `init = "weights"` without
calibration batches ("auto"): "sampled" ones (`init = "nystrom"`), and the exact "minor" ones, which take a full SVD
whatever the rank.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.measure import Peak, alone
from eval.record import make_parser, write_record
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.kron import kpsvd
from soka_serve.kron.decompose import Decomposition, minor_kpsvd, sampled_kpsvd
from soka_serve.kron.shapes import FactorShape, balanced_shape

CASES = [("random", 4096, 4096), ("decaying", 4096, 4096), ("random", 11008, 4096), ("random", 4096, 11008)]
START_CASE = ("decaying", 4096, 4096)
START_RANKS = (1, 8, 64)
MINOR_RANK = 8


def draw_weight(kind: str, out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A seeded (out, in) float32 weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    if kind == "decaying":
        # Kronecker-structured scales over noise: the rearranged rows and columns differ in size by a power law.
        m, n, p, q = balanced_shape(out_features, in_features)
        rows = (torch.arange(1, m * n + 1)[torch.randperm(m * n, generator=generator)] ** -0.35).view(m, 1, n, 1)
        columns = (torch.arange(1, p * q + 1)[torch.randperm(p * q, generator=generator)] ** -0.35).view(1, p, 1, q)
        weight = (weight.view(m, p, n, q) * rows * columns).reshape(out_features, in_features)
    return weight


def read_weight(directory: Path) -> Tensor:
    """The largest projection of a checkpoint."""
    base = Checkpoint.open(directory)
    names = [name for name in base.tensors if name.endswith("_proj.weight")]
    return base.read(max(names, key=lambda name: (base.tensors[name].end - base.tensors[name].start, name))).float()


def decompose(weight: Tensor, shape: FactorShape, rank: int, method: Any) -> Decomposition:
    """The terms that a method finds."""
    if method == "minor":
        return minor_kpsvd(weight, shape, rank)
    return sampled_kpsvd(weight, shape, rank) if method == "sampled" else kpsvd(weight, shape, rank, algorithm=method)


def run_case(options: dict[str, Any]) -> dict[str, Any]:
    """One weight and method, in a process of its own."""
    torch.set_num_threads(options["threads"])
    device = options["device"]
    source = options["checkpoint"]
    weight = read_weight(source) if source else draw_weight(options["kind"], options["out"], options["in"])
    weight = weight.to(device)
    shape = balanced_shape(*weight.shape)
    # Libraries set up, and their work buffers allocated, outside the measurement.
    warm = torch.randn(600, 600, device=device)
    decompose(warm, balanced_shape(600, 600), 8, options["method"])
    with Peak(device) as peak:
        start, start_cpu = time.perf_counter(), time.process_time()
        result = decompose(weight, shape, options["rank"], options["method"])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "factor_shape": list(shape),
        "time_s": round(seconds, 3),
        "cpu_time_s": round(cpu_seconds, 3),
        "captured_energy": float(result.factors.sigma.double().square().sum()),
        "captured_frac": result.captured_frac,
        "peak_memory_ratio": round(peak.added_bytes / (weight.numel() * 4), 2),
    }


def compare(options: dict[str, Any]) -> dict[str, Any]:
    """Both methods on one weight, and their ratios."""
    row: dict[str, Any] = {key: options[key] for key in ("kind", "out", "in", "rank")}
    for method in ("exact", "truncated"):
        row[method] = alone(run_case, {**options, "method": method})
    exact, truncated = row["exact"], row["truncated"]
    row["captured_energy_ratio"] = truncated["captured_energy"] / exact["captured_energy"]
    clock = "time_s" if options["device"] == "cuda" else "cpu_time_s"
    row["speed_up"] = round(exact[clock] / truncated[clock], 1)
    return row


def compare_starts(options: dict[str, Any]) -> list[dict[str, Any]]:
    """A weight's principal terms, the sampled ones and the minor ones, by rank."""
    rows = []
    for rank in START_RANKS:
        row: dict[str, Any] = {key: options[key] for key in ("kind", "out", "in")} | {"rank": rank}
        for method in ("auto", "sampled", *(["minor"] if rank == MINOR_RANK else [])):
            row[method] = alone(run_case, {**options, "rank": rank, "method": method})
        clock = "time_s" if options["device"] == "cuda" else "cpu_time_s"
        row["speed_up_of_sampled"] = round(row["auto"][clock] / row["sampled"][clock], 1)
        row["energy_of_sampled"] = row["sampled"]["captured_energy"] / row["auto"]["captured_energy"]
        rows.append(row)
    return rows


def main() -> None:
    """Run all cases and write the result."""
    parser = make_parser("eval.bench.kpsvd", __doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", type=Path, help="local checkpoint whose largest projection is added")
    parser.add_argument("--starts", action="store_true", help="the costs of other starts instead")
    arguments = parser.parse_args()
    common = {"rank": arguments.rank, "device": arguments.device, "threads": arguments.threads}
    drawn = [START_CASE] if arguments.starts else CASES
    cases = [{**common, "kind": kind, "out": out, "in": features, "checkpoint": None} for kind, out, features in drawn]
    if arguments.checkpoint:
        out_features, in_features = read_weight(arguments.checkpoint).shape
        rank = min(arguments.rank, FactorShape(*balanced_shape(out_features, in_features)).max_rank)
        case = {"kind": "trained", "out": out_features, "in": in_features, "rank": rank}
        cases.append({**common, **case, "checkpoint": arguments.checkpoint})
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = compare_starts(case) if arguments.starts else [compare(case)]
        print(json.dumps(found, indent=1), flush=True)
        rows += found
        write_record(arguments, {"rows": rows}, machine={"device": device})  # each time: a limit of time may end this


if __name__ == "__main__":
    main()
