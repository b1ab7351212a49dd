"""Whether one `learning_rate` and one `scale` are right at every rank and start: short trainings on GSM8K.

    python -m eval.bench.scale_law --base FOLDER --data FOLDER --out rows.json --runs weights:1:0.003:8 lora:2:1:0.001

A run is INIT:RANK:SCALE:RATE[:SEED]. INIT is weights, weighted (by inputs, as that start is unless a manifest says
otherwise), both (by outputs as well), gradient, random, zero, or lora (PEFT's, alpha = rank, where SCALE multiplies
alpha). SEED is of the start and of the order of the examples. `--data` is a folder with gsm8k_train.jsonl, whose first
2,000 problems are trained on and whose last ones are held out, or `math`, the embedded word problems. `--base tiny` is
the embedded model. A run that has its row in `--out` already is not made again. Each row has the loss per step, of
examples that were not seen before as long as the first epoch lasts; the gradient's norm per step before it is scaled;
and the mean loss per completion token of the same held-out examples for every run: `after` training (of the base: RATE
0), and with `--cut` also `cut`, with only as many terms served as were trained. `best` compares the rates of rows that
differ in nothing else.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from eval.record import make_parser, write_record
from soka_serve.base.cpu import attention_for, fast_products
from soka_serve.base.model import load_base
from soka_serve.comparison.run import answer_losses
from soka_serve.compiler.context import Context, prepare
from soka_serve.compiler.stages import encode, init_stage
from soka_serve.compiler.train.trained_positions import output_layer, trained_positions
from soka_serve.data.collate import PadCollator
from soka_serve.io.workspace import Workspace
from soka_serve.kron import Factors, recompress
from soka_serve.manifest.read import read_manifest
from soka_serve.peft import build_soka_model, create_soka_optimizer, soka_layers

# Options that a row repeats.
DATA = ("base", "task", "tokens", "held_out", "calibration_batches")
SHARED = (*DATA, "layers", "steps", "batch", "warmup", "normalise")
GROUPED = ("init", "rank", "scale", *SHARED)
Losses = dict[float, dict[int, float]]  # by rate and seed
TRAINED, HELD_OUT = 2000, 400  # problems of GSM8K's training file, from its start and from its end
# INIT as a manifest says it; what starts without looking at data has no calibration.
WITHOUT_DATA = {"weights": "weights", "random": "random", "zero": "zero"}
TINY, MATH = Path("tiny"), Path("math")  # a base and a task that the package holds
MANIFEST = """
schema = 1
name = "scale-law"
[base]
BASE
[[adapt]]
layers = "LAYERS"
init = "INIT"
weighting = "WEIGHTING"
scale = 1.0
calibration_batches = BATCHES
rank = { policy = "fixed", rank = RANK }
[train]
steps = 1
batch_size = 4
max_length = TOKENS
seed = SEED
eval_every = 1
[train.data]
DATA
"""
GSM8K = """
jsonl = "TRAIN"
eval_jsonl = "HELD_OUT"
prompt = "Question: {{ question }}\\nAnswer:"
completion = " {{ answer }}"
"""


@dataclass(frozen=True)
class Run:
    """What is trained: a start, its number of terms, its scale, and the learning rate."""

    init: str
    rank: int
    scale: float
    rate: float
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Run:
        init, rank, scale, rate, *seed = text.split(":")
        return cls(init, int(rank), float(scale), float(rate), *map(int, seed))


class Bench:
    """The base, its examples, and the starts that were made already."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.folder = options.out.with_suffix(".cache").absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base_words, self.data_words = 'builtin = "tiny"', 'builtin = "math"'
        if options.base != TINY:
            self.base_words = f'path = "{options.base.absolute()}"'
        if options.data != MATH:
            self.data_words = GSM8K
            lines = (options.data / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)
            for name, part in (("TRAIN", lines[:TRAINED]), ("HELD_OUT", lines[-HELD_OUT:])):
                file = self.folder / f"{name.lower()}.jsonl"
                file.write_text("".join(part))
                self.data_words = self.data_words.replace(name, str(file))
        context = self.prepare("weights", 1, 0)
        self.training, held_out = encode(context)
        assert held_out is not None
        self.base: Any = load_base(context.base.directory, "float32").requires_grad_(False)
        self.base.config.use_cache = False
        self.collate = PadCollator(context.base.tokenizer.pad_id)
        self.held_out = held_out.examples[: options.held_out]

    def prepare(self, init: str, rank: int, seed: int) -> Context:
        """What the compiler makes of the manifest of a run."""
        words = {
            "INIT": WITHOUT_DATA.get(init, "gradient" if init == "gradient" else "weights"),
            "WEIGHTING": "both" if init == "both" else "inputs",
            "BATCHES": 0 if init in WITHOUT_DATA else self.options.calibration_batches,
            "BASE": self.base_words,
            "DATA": self.data_words,
            "LAYERS": self.options.layers,
            "RANK": rank,
            "SEED": seed,
            "TOKENS": self.options.tokens,
        }
        text = MANIFEST
        for name, value in words.items():
            text = text.replace(name, str(value))
        if words["INIT"] in ("random", "zero"):
            text = text.replace("calibration_batches = 0\n", "")
        file = self.folder / "law.toml"
        file.write_text(text)
        workspace = Workspace(self.folder, "law")
        workspace.cache.mkdir(parents=True, exist_ok=True)
        return prepare(read_manifest(file), workspace, progress=False)

    def start(self, run: Run) -> tuple[dict[str, Factors], bool]:
        """The factors that stage `init` gives with `scale` = 1, times the scale; and whether they are subtracted."""
        started = init_stage(self.prepare(run.init, run.rank, run.seed), self.training)
        scaled = {n: Factors(f.left, f.right, f.sigma * run.scale) for n, f in started.factors.items()}
        return scaled, bool(started.initial_modules)

    def model(self, run: Run) -> tuple[Any, torch.optim.Optimizer]:
        if run.init == "lora":
            torch.manual_seed(run.seed)
            alpha = run.rank * run.scale
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(self.base, LoraConfig(r=run.rank, lora_alpha=alpha, target_modules=names))
            trained = [p for p in model.parameters() if p.requires_grad]
            return model, torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
        factors, initial = self.start(run)
        adapted = build_soka_model(self.base, factors, initial=initial)
        return adapted, create_soka_optimizer(adapted, lr=run.rate, weight_decay=0.0)

    def train(self, run: Run) -> dict[str, Any]:
        """One row."""
        model, optimizer = self.model(run)
        trained = [p for p in model.parameters() if p.requires_grad]
        peaks = [group["lr"] for group in optimizer.param_groups]
        losses, norms, started = [], [], time.monotonic()
        steps = self.options.steps
        for step, batch in enumerate(self.batches(run.seed)):
            part = min(1.0, (step + 1) / self.options.warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * part
            losses.append(self.backward(model, batch))
            gradients = [p.grad for p in trained if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
            if self.options.normalise and norms[-1] > 0:
                for gradient in gradients:
                    gradient.div_(norms[-1])
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(losses[-1]) or losses[-1] > 3 * losses[0]:
                break
        seconds = time.monotonic() - started
        finished = len(losses) == steps and math.isfinite(losses[-1])
        served = finished and self.options.cut and run.init not in ("lora", "zero")
        row = {
            "parameters": sum(p.numel() for p in trained),
            "after": self.evaluate(model) if finished else None,
            "cut": self.evaluate(cut(model)) if served else None,
            "losses": [round(x, 4) for x in losses],
            "norms": [round(x, 5) for x in norms],
            "step_s": round(seconds / len(losses), 2),
        }
        self.base = model.unload()
        return row

    def batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """What the steps see: epochs in seeded orders."""
        examples, size = self.training.examples, self.options.batch
        generator, order = torch.Generator().manual_seed(seed), list[int]()
        for _ in range(self.options.steps):
            if len(order) < size:
                order = torch.randperm(len(examples), generator=generator).tolist()
            chosen, order = order[:size], order[size:]
            yield self.collate([examples[i] for i in chosen])

    def backward(self, model: Any, batch: dict[str, torch.Tensor]) -> float:
        head = output_layer(model)
        assert head is not None
        with trained_positions(head, batch) as inputs, attention_for(batch["labels"].shape[1], torch.device("cpu")):
            loss = model(**inputs).loss
        loss.backward()
        return float(loss.detach())

    def evaluate(self, model: Any) -> float:
        """Mean loss per completion token of the held-out examples; NaN without any."""
        tokens = [sum(label >= 0 for label in e.labels[1:]) for e in self.held_out]
        losses = answer_losses(model, self.held_out, self.collate)
        total = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
        return round(total / sum(tokens), 5) if tokens else math.nan


@torch.no_grad()
def cut(model: Any) -> Any:
    """The model with the best rank terms of its delta in place of trained minus initial ones, twice as many."""
    for layer in soka_layers(model).values():
        delta = layer.delta("default")
        kept, _ = recompress(delta, rank=delta.rank // 2)
        layer.set_factors("default", kept, Factors(kept.left, kept.right, torch.zeros_like(kept.sigma)))
    return model


def best_rates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For rows that differ in rate and seed alone: which rate is best, and by how much.

    `after` has each rate's mean loss; `above_best`, over the seeds that a rate shares with the best one, the mean of
    its loss less the best rate's with the same seed, the standard error of that mean (None of one seed) and the number
    of seeds; `vertex`, by seed, where the parabola through the seed's best rate and its neighbours on the grid is
    lowest, over the logarithm of the rate. A rate with a run that did not finish is in `failed`.
    """
    groups: dict[tuple[Any, ...], Losses] = defaultdict(lambda: defaultdict(dict))
    failed: dict[tuple[Any, ...], set[float]] = defaultdict(set)
    for row in rows:
        key, rate = tuple(row[k] for k in GROUPED), row["rate"]
        if row["after"] is None:
            failed[key].add(rate)
        elif rate > 0:
            groups[key][rate][row["seed"]] = row["after"]
    found = []
    for key, losses in groups.items():
        done = {rate: seeds for rate, seeds in sorted(losses.items()) if rate not in failed[key]}
        if len(done) < 2:
            continue
        most = max(done, key=lambda rate: len(done[rate]))  # compared with this one first: rates may lack seeds
        best = min(done, key=lambda rate: statistics.fmean(_gaps(done[rate], done[most]) or [math.inf]))
        row = {
            "best": best,
            "after": {f"{rate:g}": round(statistics.fmean(seeds.values()), 4) for rate, seeds in done.items()},
            "above_best": {f"{rate:g}": _summary(_gaps(done[rate], done[best])) for rate in done if rate != best},
            "vertex": {str(seed): vertex for seed in done[best] if (vertex := _vertex(done, seed))},
            "failed": sorted(failed[key]),
        }
        found.append({**dict(zip(GROUPED, key, strict=True)), **row})
    return found


def _gaps(ones: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    return [ones[seed] - others[seed] for seed in ones if seed in others]


def _summary(gaps: Sequence[float]) -> dict[str, Any]:
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    mean = statistics.fmean(gaps) if gaps else math.nan
    return {"mean": round(mean, 4), "error": error and round(error, 4), "seeds": len(gaps)}


def _vertex(losses: Losses, seed: int) -> float | None:
    """None where the seed's best rate is at the end of its grid."""
    points = [(math.log(rate), seeds[seed]) for rate, seeds in losses.items() if seed in seeds]
    at = min(range(len(points)), key=lambda i: points[i][1])
    if not 0 < at < len(points) - 1:
        return None
    (x0, y0), (x1, y1), (x2, y2) = points[at - 1 : at + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return round(math.exp((x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)), 3)


def commands(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes the rows, a command for each setting of the options."""
    made: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for row in rows:
        run = "{init}:{rank}:{scale:g}:{rate:g}:{seed}".format(**row)
        made[tuple(row[name] for name in SHARED)].append(run)
    found = []
    for key, runs in made.items():
        options = dict(zip(SHARED, key, strict=True))
        base, task, normalised = options.pop("base"), options.pop("task"), options.pop("normalise")
        data = "math" if task == "math" else "DATA"
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        words += [] if normalised else ["--no-normalise"]
        found.append(" ".join(["python -m eval.bench.scale_law --base", base, "--data", data, *words, "--runs", *runs]))
    return found


def main() -> None:
    parser = make_parser("eval.bench.scale_law", __doc__, needs_out=True)
    parser.add_argument("--base", type=Path, required=True, help="a folder, or tiny")
    parser.add_argument("--data", type=Path, required=True, help="a folder, or math")
    parser.add_argument("--runs", nargs="+", default=[])
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--layers", default="all", help="adapt these layers only, as in a manifest")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--no-normalise", dest="normalise", action="store_false", help="gradients as they come")
    parser.add_argument("--cut", action="store_true", help="measure with half of the terms served as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows, earlier = before.get("rows", []), {name: before[name] for name in ("earlier",) if name in before}
    named = {"base": options.base.name, "task": "math" if options.data == MATH else "gsm8k"}
    shared = named | {name: getattr(options, name) for name in SHARED if name not in named}
    bench = Bench(options)
    for text in options.runs:
        key = {**vars(Run.parse(text)), **shared}
        if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
            continue
        with fast_products():
            rows.append({**key, **bench.train(Run.parse(text))})
        found = {"commands": commands(rows), "best": best_rates(rows), "rows": rows, **earlier}
        write_record(options, found, machine={"threads": 1})
        print(text, rows[-1]["losses"][-1], rows[-1]["after"], rows[-1]["step_s"], flush=True)


if __name__ == "__main__":
    main()
