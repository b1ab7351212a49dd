"""Whether one `learning_rate` and one `scale` are right at every rank and start: short trainings on GSM8K.

    python -m eval.bench.scale_law --base FOLDER --data FOLDER --out rows.json --runs weights:1:1:0.3 lora:2:1:0.001

A run is INIT:RANK:SCALE:RATE[:SEED]. INIT is weights, weighted, gradient, random, zero, or lora (PEFT's, alpha = rank,
where SCALE multiplies alpha). `--data` holds gsm8k_train.jsonl and gsm8k_test.jsonl. A run that has its row in `--out`
already is not made again. Each row has the loss per step, of examples that were not seen before, so that it
is a held-out loss as well; the gradient's norm per step before any clipping; and the mean loss per completion token of
the same held-out examples for every run: `after` training (of the base: RATE 0), and `cut`, with only as many terms
served as were trained.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from eval.record import make_parser, write_record
from soka_serve.base.model import load_base
from soka_serve.compiler.context import Context, prepare
from soka_serve.compiler.stages import encode, init_stage
from soka_serve.io.workspace import Workspace
from soka_serve.kron import Factors, recompress
from soka_serve.manifest.read import read_manifest
from soka_serve.peft import build_soka_model, create_soka_optimizer, soka_layers

# Options that a row repeats.
SHARED = ("steps", "batch", "warmup", "tokens", "held_out", "layers", "calibration_batches", "normalise")
NORM = 1e-2  # below that of any gradient here; AdamW does not see the factor
# INIT as a manifest says it; what starts without looking at data has no calibration.
WITHOUT_DATA = {"weights": "weights", "random": "random", "zero": "zero"}
MANIFEST = """
schema = 1
name = "scale-law"
[base]
path = "BASE"
[[adapt]]
layers = "LAYERS"
init = "INIT"
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
jsonl = "DATA/gsm8k_train.jsonl"
limit = 2000
eval_jsonl = "DATA/gsm8k_test.jsonl"
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
        context = self.prepare("weights", 1, 0)
        training, held_out = encode(context)
        assert held_out is not None
        self.base = load_base(options.base, "float32").requires_grad_(False)
        self.training, self.held_out = training.examples, held_out.examples[: options.held_out]

    def prepare(self, init: str, rank: int, seed: int) -> Context:
        """What the compiler makes of the manifest of a run."""
        words = {
            "INIT": WITHOUT_DATA.get(init, "gradient" if init == "gradient" else "weights"),
            "BATCHES": 0 if init in WITHOUT_DATA else self.options.calibration_batches,
            "BASE": self.options.base.absolute(),
            "DATA": self.options.data.absolute(),
            "LAYERS": self.options.layers,
            "RANK": rank,
            "SEED": seed,
            "TOKENS": self.options.tokens,
        }
        text = MANIFEST
        for name, value in words.items():
            text = text.replace(name, str(value))
        file = self.folder / "law.toml"
        file.write_text(text)
        workspace = Workspace(self.folder, "law")
        workspace.cache.mkdir(parents=True, exist_ok=True)
        return prepare(read_manifest(file), workspace, progress=False)

    def start(self, run: Run) -> tuple[dict[str, Factors], bool]:
        """The factors that stage `init` gives with `scale` = 1, times the scale; and whether they are subtracted."""
        context = self.prepare(run.init, run.rank, run.seed)
        started = init_stage(context, encode(context)[0])
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
        generator = torch.Generator().manual_seed(run.seed)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        steps, batch = self.options.steps, self.options.batch
        peaks = [group["lr"] for group in optimizer.param_groups]
        losses, norms, started = [], [], time.monotonic()
        for step in range(steps):
            part = min(1.0, (step + 1) / self.options.warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * part
            examples = [self.training[i] for i in order[step * batch : (step + 1) * batch]]
            losses.append(self._backward(model, examples))
            norms.append(float(torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()))
            if self.options.normalise:
                torch.nn.utils.clip_grad_norm_(trained, NORM)
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(losses[-1]) or losses[-1] > 3 * losses[0]:
                break
        seconds = time.monotonic() - started
        finished = len(losses) == steps and math.isfinite(losses[-1])
        row = {
            "parameters": sum(p.numel() for p in trained),
            "after": self.evaluate(model) if finished else None,
            "cut": self.evaluate(cut(model)) if finished and run.init not in ("lora", "zero") else None,
            "losses": [round(x, 4) for x in losses],
            "norms": [round(x, 5) for x in norms],
            "step_s": round(seconds / len(losses), 2),
        }
        self.base = model.unload()
        return row

    def _backward(self, model: Any, examples: Sequence[Any]) -> float:
        tokens = sum(_trained(e) for e in examples)
        total = 0.0
        for example in examples:
            loss = _loss(model, example) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def evaluate(self, model: Any) -> float:
        """Mean loss per completion token of the held-out examples; NaN without any."""
        if not self.held_out:
            return math.nan
        total = sum(float(_loss(model, e)) for e in self.held_out)
        return total / sum(_trained(e) for e in self.held_out)


@torch.no_grad()
def cut(model: Any) -> Any:
    """The model with the best rank terms of its delta in place of trained minus initial ones, twice as many."""
    for layer in soka_layers(model).values():
        delta = layer.delta("default")
        kept, _ = recompress(delta, rank=delta.rank // 2)
        layer.set_factors("default", kept, Factors(kept.left, kept.right, torch.zeros_like(kept.sigma)))
    return model


def _trained(example: Any) -> int:
    return sum(label >= 0 for label in example.labels[1:])


def _loss(model: Any, example: Any) -> Tensor:
    """Summed loss of one example's completion; logits of its positions only."""
    inner = model.base_model.model
    hidden = inner.model(input_ids=torch.tensor([example.input_ids]), use_cache=False).last_hidden_state[0]
    labels = torch.tensor(example.labels)[1:]
    kept = labels >= 0
    return torch.nn.functional.cross_entropy(inner.lm_head(hidden[:-1][kept]), labels[kept], reduction="sum")


def main() -> None:
    parser = make_parser("eval.bench.scale_law", __doc__, needs_out=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=[])
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--layers", default="all", help="adapt these layers only, as in a manifest")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--normalise", action="store_true", help="every step's gradient at one norm, as with clip = 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    shared = {name: getattr(options, name) for name in SHARED}
    bench = Bench(options)
    for text in options.runs:
        key = {**vars(Run.parse(text)), **shared}
        if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
            continue
        rows.append({**key, **bench.train(Run.parse(text))})
        write_record(options, {"rows": rows}, machine={"threads": 1})
        later = rows[-1]["losses"][options.steps // 2 :]
        print(text, sum(later) / max(1, len(later)), rows[-1]["after"], rows[-1]["step_s"], flush=True)


if __name__ == "__main__":
    main()
