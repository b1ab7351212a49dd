"""What weighing a decomposition by the outputs' gradients, too, is worth on a real model (`weighting = "both"`).

    python -m eval.bench.output_weighting --model DIR --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out FILE.json

Some projections are decomposed as stage `init` does it for a fixed rank, from calibration rows. On test rows, over the
trained positions: `fisher` is E[(g^T E x)^2] / E[(g^T W x)^2], with x the inputs, g the gradient of the row's summed
loss by the outputs and E = W - W' the error of the weight: to second order what the loss sees of it; `output` is
E |E x|^2 / E |W x|^2. Geometric means over the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.bench.calibration import decompose, geometric_mean, read_rows
from eval.llama import start_of
from eval.record import make_parser, write_record
from soka_serve.base.model import load_base
from soka_serve.compiler.init.probe import gather
from soka_serve.data.collate import IGNORED, PadCollator
from soka_serve.data.encode import EncodedExample
from soka_serve.kron import Factors, dense_delta

BATCH = 8
WEIGHTINGS = ("inputs", "both")


class Slopes:
    """Inputs (tokens, in) of modules and gradients (tokens, out) by their outputs, at the trained positions of rows."""

    def __init__(self, model: Any, modules: Sequence[str]) -> None:
        self.model = model
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.slopes: dict[str, list[Tensor]] = {name: [] for name in modules}
        self._positions = torch.empty(0)
        model.get_input_embeddings().register_forward_hook(lambda _, ids, output: output.requires_grad_(True))
        for name in modules:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(_: Any, x: tuple[Tensor], output: Tensor) -> None:
            self.inputs[name].append(x[0][0, self._positions].detach())
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda slope: self.slopes[name].append(slope[0, self._positions])
            )

        return hook

    def run(self, example: EncodedExample) -> None:
        """Adds a row."""
        asked = torch.tensor([label != IGNORED for label in example.labels[1:]] + [False])
        asked[0] = False
        self._positions = asked
        made = self.model(
            input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels]), use_cache=False
        )
        (made.loss * asked.sum()).backward()

    def errors(self, name: str, weight: Tensor, factors: Factors) -> tuple[float, float]:
        """`fisher` and `output`."""
        x, slope = torch.cat(self.inputs[name]), torch.cat(self.slopes[name])
        missed, whole = x @ (weight - dense_delta(factors)).t(), x @ weight.t()
        fisher = (missed * slope).sum(1).square().sum() / (whole * slope).sum(1).square().sum()
        return float(fisher), float(missed.square().sum() / whole.square().sum())


def main() -> None:
    """Measure and write the result."""
    parser = make_parser("eval.bench.output_weighting", __doc__)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=4, help=f"calibration batches of {BATCH} rows")
    parser.add_argument("--test-rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_base(options.model, "float32").requires_grad_(False)
    found: list[dict[str, Any]] = [
        {"rank": rank, "weighting": weighting, "factors": {}} for rank in options.ranks for weighting in WEIGHTINGS
    ]
    for weighting in WEIGHTINGS:
        rule = {"weighting": weighting, "layers": options.layers, "calibration_batches": options.batches}
        _, base, targets = start_of(options.model, rule)
        rows = read_rows(base, options.train, BATCH * options.batches, options.max_length)
        collate = PadCollator(base.tokenizer.pad_id)
        batches = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        for known in gather(model, batches, targets):
            name, outputs = known.target.module.name, known.outputs
            weight = model.get_submodule(name).weight
            values = weight if outputs is None else outputs.weigh(weight)
            for row in found:
                if row["weighting"] == weighting:
                    factors = decompose(values, known.moments, row["rank"])
                    row["factors"][name] = factors if outputs is None else outputs.take_out(factors)
    test = Slopes(model, list(found[0]["factors"]))
    for example in read_rows(base, options.test, options.test_rows, options.max_length):
        test.run(example)
    for row in found:
        errors = {n: test.errors(n, model.get_submodule(n).weight, f) for n, f in row.pop("factors").items()}
        for at, key in enumerate(("fisher", "output")):
            row[key] = geometric_mean({name: pair[at] for name, pair in errors.items()})
        print(row, flush=True)
    write_record(options, {"rows": found})


if __name__ == "__main__":
    main()
