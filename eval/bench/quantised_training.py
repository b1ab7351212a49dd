"""What `init = "quantisation"` gives a 4-bit base at step 0, and after a short training beside `init = "weights"`.

    python -m eval.bench.quantised_training --base FOLDER --data FOLDER --out rows.json \
        --runs full held quantisation:8:8 quantisation:8:8:24 weights:2:8:8

A run is `full` (the base as it is), `held` (the base in 4 bits) or INIT:RANK:BATCHES[:RATE], all on the base in 4 bits:
the start that stage `init` makes with so many calibration batches of four (0: not weighed), at the manifest's scale.
`before` is the mean loss per completion token of the held-out examples before training. With a RATE, `losses` are those
of the steps, of examples that were not seen before, the same for every run, and `after` is the held-out loss then.
Data, steps and schedule are those of `eval.bench.scale_law`; everything is in float32. A run that has its row already
is not made again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from eval.bench.scale_law import Bench, Run
from eval.record import make_parser, write_record
from soka_serve.base.cpu import fast_products
from soka_serve.base.model import load_base
from soka_serve.compiler.context import Context, prepare
from soka_serve.compiler.stages import init_stage
from soka_serve.io.workspace import Workspace
from soka_serve.kron import Factors
from soka_serve.manifest.read import read_manifest

MANIFEST = """
schema = 1
name = "quantised"
[base]
BASE
dtype = "float32"
quantize = "4bit"
[[adapt]]
init = "INIT"
calibration_batches = BATCHES
rank = { policy = "fixed", rank = RANK }
[train]
steps = 1
batch_size = 4
max_length = TOKENS
eval_every = 1
[train.data]
DATA
"""


class QuantisedBench(Bench):
    """The base in 4 bits, and starts on it. Of a run, `scale` is the number of calibration batches."""

    def prepare(self, init: str, rank: int, seed: int, batches: int = 0) -> Context:
        text = MANIFEST
        words = {"INIT": init, "BATCHES": batches, "BASE": self.base_words, "DATA": self.data_words, "RANK": rank}
        for name, value in (words | {"TOKENS": self.options.tokens}).items():
            text = text.replace(name, str(value))
        file = self.folder / "quantised.toml"
        file.write_text(text)
        workspace = Workspace(self.folder, "quantised")
        workspace.cache.mkdir(parents=True, exist_ok=True)
        return prepare(read_manifest(file), workspace, progress=False)

    def start(self, run: Run) -> tuple[dict[str, Factors], bool]:
        started = init_stage(self.prepare(run.init, run.rank, run.seed, int(run.scale)), self.training)
        return started.factors, bool(started.initial_modules)

    def hold(self) -> None:
        """Have the base in 4 bits from now on."""
        if not getattr(self.base, "is_quantized", False):
            directory = self.prepare("weights", 1, 0).base.directory
            self.base = load_base(directory, "float32", "4bit").requires_grad_(False)
            self.base.config.use_cache = False

    def row(self, text: str) -> dict[str, Any]:
        """One row."""
        if text == "full":
            return {"before": self.evaluate(self.base)}
        self.hold()
        if text == "held":
            return {"before": self.evaluate(self.base)}
        init, rank, batches, *rate = text.split(":")
        run = Run(init, int(rank), float(batches), float(rate[0]) if rate else 1.0)
        started = time.monotonic()
        model, _ = self.model(run)
        found: dict[str, Any] = {"start_s": round(time.monotonic() - started, 1), "before": self.evaluate(model)}
        self.base = model.unload()
        if rate:
            trained = self.train(run)
            found |= {key: trained[key] for key in ("after", "parameters", "losses", "step_s")}
        return found


def main() -> None:
    """Measure, write, print."""
    parser = make_parser("eval.bench.quantised_training", __doc__, needs_out=True)
    parser.add_argument("--base", type=Path, required=True, help="a folder, or tiny")
    parser.add_argument("--data", type=Path, required=True, help="a folder, or math")
    parser.add_argument("--runs", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=24)
    options = parser.parse_args()
    options.normalise, options.cut, options.calibration_batches, options.layers = True, False, 0, "all"
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    # `full` comes first: the base is held in 4 bits from the next one on.
    asked = sorted(dict.fromkeys(options.runs), key=lambda text: text != "full")
    bench = None
    for text in (text for text in asked if text not in rows):
        bench = bench or QuantisedBench(options)
        with fast_products():
            rows[text] = bench.row(text)
        write_record(options, {"rows": rows}, machine={"threads": 1})
        print(text, {key: value for key, value in rows[text].items() if key != "losses"}, flush=True)


if __name__ == "__main__":
    main()
