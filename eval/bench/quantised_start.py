"""What Kronecker terms of the quantisation error W - Q(W) would give a 4-bit base at step 0 (LoftQ, SVDQuant).

    python -m eval.bench.quantised_start --model DIR --test gsm8k_test.jsonl --out eval/results/quantised_start.json

Q is bitsandbytes' NF4 with double quantisation, as `base.quantize = "4bit"` holds the projections of the layers. The
loss per trained token of the first test rows is that of the model whose projections are W, Q(W), and Q(W) plus the best
`rank` Kronecker terms (balanced shape) or the best matrix of that rank (LoftQ's first step) of the error. `energy` is
the share of the errors' energy that those hold, over all modules; `parameters` is how many values they have.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.bench.calibration import read_rows
from eval.record import make_parser, write_record
from soka_serve.base.base import Base
from soka_serve.base.cpu import fast_products
from soka_serve.base.model import load_base
from soka_serve.data.encode import MASKED, EncodedExample
from soka_serve.kron import dense_delta, kpsvd
from soka_serve.kron.shapes import FactorShape, balanced_shape

Shape = Callable[[int, int], FactorShape]
KINDS: dict[str, Shape] = {
    "kronecker": balanced_shape,
    "low rank": lambda out, into: FactorShape(out, 1, 1, into),  # a product of vectors is a Kronecker product
}


def held(weight: Tensor) -> Tensor:
    """A weight (out, in) as a 4-bit base holds it, in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    found: Tensor = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    return found.float()


@torch.no_grad()
def mean_loss(model: Any, rows: list[EncodedExample]) -> float:
    """Mean over the trained tokens of all rows."""
    total, tokens = 0.0, 0
    for row in rows:
        trained = sum(label != MASKED for label in row.labels[1:])
        inputs = torch.tensor([row.input_ids])
        total += float(model(input_ids=inputs, labels=torch.tensor([row.labels]), use_cache=False).loss) * trained
        tokens += trained
    return total / tokens


def main() -> None:
    """Measure, write, print."""
    parser = make_parser("eval.bench.quantised_start", __doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True, help="rows of GSM8K")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Base(options.model)
    rows = read_rows(base, options.test, options.rows, options.max_length)
    model = load_base(options.model, "float32").requires_grad_(False)
    modules = {module.name: model.get_submodule(module.name).weight for module in base.layout.modules}
    found: list[dict[str, Any]] = []
    with fast_products():
        found.append({"projections": "W", "loss": mean_loss(model, rows)})
        whole = {name: weight.data.clone() for name, weight in modules.items()}
        for weight in modules.values():
            weight.data.copy_(held(weight.data))
        found.append({"projections": "Q(W)", "loss": mean_loss(model, rows)})
        few = {name: weight.data.clone() for name, weight in modules.items()}
        for kind, shape in KINDS.items():
            captured, total, parameters = 0.0, 0.0, 0
            for name, weight in modules.items():
                terms = kpsvd(whole[name] - few[name], shape(*weight.shape), options.rank)
                captured += float(terms.factors.sigma.double().square().sum())
                total += terms.total_energy
                parameters += terms.factors.parameters
                weight.data.copy_(few[name] + dense_delta(terms.factors))
            loss = mean_loss(model, rows)
            found.append({"projections": f"Q(W) + {kind}", "rank": options.rank, "loss": loss})
            found[-1] |= {"energy": captured / total, "parameters": parameters}
            for name, weight in modules.items():
                weight.data.copy_(few[name])
    tokens = sum(sum(label != MASKED for label in row.labels[1:]) for row in rows)
    packages = {"bitsandbytes": version("bitsandbytes")}
    write_record(options, {"tokens": tokens, "found": found}, machine={"threads": 1}, packages=packages)
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
