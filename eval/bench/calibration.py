"""Which calibration tokens, and how many, give the best activation-weighted start on a real model.

    python -m eval.bench.calibration --model DIR --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out FILE.json

For each kind of tokens (`KINDS`) and number of training rows, the second moments of some projections' inputs weigh a
decomposition of rank r (as stage `init` does it for a fixed rank). `error` is E |(W - W') x|^2 / E |W x|^2 over the
trained positions of test rows, its geometric mean over the modules; a position is trained where the loss asks for the
next token. `unweighted` is the plain decomposition's; `oracle` that of the test positions' own moments. `share` is what
the kind `first` (a row's first position, the attention sink) and the heaviest other position of a row, averaged over
rows, hold of the trace of the moment over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.record import make_parser, write_record
from soka_serve.base.base import Base
from soka_serve.base.model import load_base
from soka_serve.data.encode import MASKED, EncodedExample, encode_examples
from soka_serve.data.examples import DataReader
from soka_serve.kron.decompose import kpsvd
from soka_serve.kron.factors import Factors
from soka_serve.kron.shapes import balanced_shape
from soka_serve.kron.weighting import InputMoments, OutputError, refine_terms, weighted_kpsvd
from soka_serve.manifest.schema import Manifest

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
PARTS = ("first", "prompt", "trained")  # of a row's positions
KINDS = {"all": PARTS, "all but the first": PARTS[1:], "trained": PARTS[2:], "unweighted": (), "oracle": ()}
PROMPT = {"prompt": "Question: {{ question }}\nAnswer:", "completion": " {{ answer }}"}


def read_rows(base: Base, file: Path, count: int, max_length: int) -> list[EncodedExample]:
    """The first rows of a file that are not too long, as training encodes them."""
    data = {"jsonl": str(file.resolve()), **PROMPT}
    train = {"steps": 0, "max_length": max_length, "data": data}
    made = {"schema": 1, "base": {"path": str(base.directory)}, "adapt": [{"init": "weights"}], "train": train}
    manifest = Manifest.model_validate(made)
    examples = DataReader(manifest.train.datasets[0], Path(), 0, base.tokenizer).examples("train")
    return encode_examples(examples[: 2 * count], base.tokenizer, manifest.train).examples[:count]


class Sums:
    """Sums of x x^T over positions of each part, by module, as rows are run one by one."""

    def __init__(self, model: Any, modules: Sequence[str]) -> None:
        self.model, self.modules = model, modules
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.tokens = dict.fromkeys(PARTS, 0)
        self.shares: dict[str, list[tuple[float, float]]] = {name: [] for name in modules}
        self._row: dict[str, Tensor] = {}
        for name in modules:
            hook = lambda _, x, name=name: self._add(name, x[0][0].float())  # noqa: E731
            model.get_submodule(name).register_forward_pre_hook(hook)

    def run(self, example: EncodedExample) -> None:
        """Adds one row."""
        trained = torch.tensor([label != MASKED for label in example.labels[1:]] + [False])
        first = torch.arange(len(trained)) == 0
        self._row = {"first": first, "trained": trained & ~first, "prompt": ~trained & ~first}
        for part, mask in self._row.items():
            self.tokens[part] += int(mask.sum())
        self.model.model(input_ids=torch.tensor([example.input_ids]), use_cache=False)

    def _add(self, name: str, x: Tensor) -> None:
        energy = x.square().sum(1)
        self.shares[name].append((float(energy[0] / energy.sum()), float(energy[1:].max() / energy.sum())))
        for part, mask in self._row.items():
            total = self.sums.setdefault((name, part), torch.zeros(x.shape[1], x.shape[1]))
            total.addmm_(x[mask].t(), x[mask])

    def moments(self, name: str, parts: Sequence[str]) -> InputMoments:
        """The moments of a module over some parts."""
        made = InputMoments(self.sums[name, parts[0]].shape[0])
        made._sum = torch.stack([self.sums[name, part] for part in parts]).sum(0)
        made.tokens = sum(self.tokens[part] for part in parts)
        return made


def decompose(weight: Tensor, moments: InputMoments | None, rank: int) -> Factors:
    """As stage `init` with a fixed rank."""
    shape = balanced_shape(*weight.shape)
    if moments is None:
        return kpsvd(weight, shape, rank).factors
    problem = OutputError(weight, shape, moments)
    return refine_terms(problem, weighted_kpsvd(problem, rank).factors)


def output_error(weight: Tensor, factors: Factors, moment: Tensor) -> float:
    """Share of the output's energy that an approximation misses."""
    rest = weight - torch.einsum("k,kij,kab->iajb", *(factors.sigma, factors.left, factors.right)).reshape_as(weight)
    return float(((rest @ moment) * rest).sum() / ((weight @ moment) * weight).sum())


def mean_errors(weights: dict[str, Tensor], sums: Sums, test: Sums, kind: str, rank: int) -> dict[str, float]:
    """Over the modules, all and by projection."""
    errors: dict[str, float] = {}
    for name, weight in weights.items():
        source, parts = (test, ("trained",)) if kind == "oracle" else (sums, KINDS[kind])
        factors = decompose(weight, source.moments(name, parts) if parts else None, rank)
        error = output_error(weight, factors, test.moments(name, ("trained",)).moment())
        errors[name] = error
    return geometric_mean(errors)


def geometric_mean(values: dict[str, float]) -> dict[str, float]:
    """Of values by module: by projection, and over all."""
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        for group in (name.rpartition(".")[2], "all"):
            groups.setdefault(group, []).append(math.log(value))
    return {group: round(math.exp(sum(logs) / len(logs)), 5) for group, logs in groups.items()}


def main() -> None:
    """Measure and write the result."""
    parser = make_parser("eval.bench.calibration", __doc__)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64, 128], help="calibration rows")
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = Base(options.model)
    model = load_base(options.model, "float32").requires_grad_(False)
    modules = [f"model.layers.{layer}.{name}" for layer in options.layers for name in PROJECTIONS]
    weights = {name: model.get_submodule(name).weight for name in modules}
    with torch.no_grad():
        test = Sums(model, modules)
        for example in read_rows(base, options.test, options.test_rows, options.max_length):
            test.run(example)
        for name in modules:
            model.get_submodule(name)._forward_pre_hooks.clear()
        sums, found = Sums(model, modules), []
        for rows, example in enumerate(read_rows(base, options.train, max(options.rows), options.max_length), 1):
            sums.run(example)
            if rows not in options.rows:
                continue
            for kind in KINDS if rows == min(options.rows) else list(KINDS)[:3]:
                for rank in options.ranks:
                    errors = mean_errors(weights, sums, test, kind, rank)
                    tokens = sum(sums.tokens[part] for part in KINDS[kind])
                    found.append({"kind": kind, "rows": rows, "tokens": tokens, "rank": rank, "error": errors})
                    print(found[-1], flush=True)
            share = {
                name: [round(sum(column) / len(column), 4) for column in zip(*pairs, strict=True)]
                for name, pairs in sums.shares.items()
            }
            write_record(options, {"share": share, "rows": found})


if __name__ == "__main__":
    main()
