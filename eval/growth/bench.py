"""How cost grows with rank, tokens, adapters, layers and model size, on a CPU.

    python -m eval.growth.bench --out eval/results/growth.json

Measures series of points, one size changing in each, and fits cost = a * x^b to every series by least squares over the
logarithms, with the standard error of b. Writes a JSON record, and beside it an HTML page with a log-log chart of each
series. `--only` takes some of the series, `--small` tiny sizes, to see that everything runs.

A time is processor time of one call, all threads together: the best of at least three calls after a warm-up, and of as
many as take about `--seconds`. What is measured:

- kpsvd-*: the truncated KPSVD of one n x n weight (float32, the "decaying" spectrum of eval/bench/kpsvd.py);
- init-layers: stage `init` over a generated LLaMA checkpoint, without calibration; time and its own (anonymous) memory;
- init-data-layers: the same with activation weighting over two batches of four rows of 128 tokens, and one forward pass
  over them for comparison;
- merge-layers: `merge` of an adapter into such a checkpoint, base hash included, with and without verification; time
  and its own memory. Points of these two run in fresh processes, so that one does not inherit another's memory;
- serve-*: the plugin's operator, one n x n projection, tokens dealt in turn to the adapters, float32;
- serve-slots: an adapter of one LLaMA layer put into a slot that another has left, all slots being taken;
- train-*: SoKA's layer on one n x n projection, `init = "weights"`, forward and backward with the input's gradient;
  besides, the frozen layer alone and the delta alone;
- size-width: parameters and bytes of an adapter of one LLaMA layer. Computed, not measured.

`arithmetic_exponent` is the same fit through what arithmetic says at the same points: multiply-adds, or a count that is
proportional to the cost. Fits share the points' systematic errors: the standard error says how straight the line is.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from eval.growth import measures
from eval.growth.page import Curve, Panel, Point, render
from eval.record import make_parser, write_record
from soka_serve.io.text import count, size


class Study(NamedTuple):
    """One series of points: `measure` is called with every one of `values` for `varies`, and with `fixed`."""

    title: str
    measure: Callable[..., Point]
    varies: str
    values: Sequence[int]
    fixed: dict[str, int]
    small_values: Sequence[int]
    small_fixed: dict[str, int]
    panels: tuple[Panel, ...]

    def settings(self, small: bool) -> list[dict[str, int]]:
        """The arguments of every point."""
        values, fixed = (self.small_values, self.small_fixed) if small else (self.values, self.fixed)
        return [{self.varies: value, **fixed} for value in values]


class Fit(NamedTuple):
    """cost = factor * x^exponent."""

    exponent: float
    standard_error: float
    factor: float


def fit_power(xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """Least squares over the logarithms, three points at least; None where a value is 0, which has none."""
    if min(ys) <= 0:
        return None
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    rest = math.fsum((y - intercept - slope * x) ** 2 for x, y in zip(log_x, log_y, strict=True))
    middle = statistics.fmean(log_x)
    spread = math.fsum((x - middle) ** 2 for x in log_x)
    return Fit(slope, math.sqrt(rest / (len(xs) - 2) / spread), math.exp(intercept))


# ---------------------------------------------------------------------------------------------------- the studies


def seconds_text(seconds: float) -> str:
    """0.0123 -> '12.3 ms'."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def one_time(name: str, work: Callable[..., float], key: str, theory: str) -> tuple[Panel, ...]:
    """The chart of a study that measures one time."""
    return (Panel("processor time", seconds_text, theory, (Curve(f"{key}_s", name, work),)),)


def operator_panels(theory: str) -> tuple[Panel, ...]:
    """The chart of a study of the plugin's operator."""
    return one_time("soka::add_kron", measures.operator_work, "operator", theory)


def training_panels(theory: str) -> tuple[Panel, ...]:
    """The chart of a study of the training layer."""
    lines = (
        Curve("layer_s", "SoKA's layer", measures.layer_work),
        Curve("base_s", "the frozen layer alone", measures.base_work),
        Curve("delta_s", "the delta alone", measures.delta_work),
    )
    return (Panel("processor time", seconds_text, theory, lines),)


def size_panel(quantity: str, text: Callable[[float], str], key: str, theory: str) -> Panel:
    """One of the two charts of adapter sizes."""
    lines = (("soka1", "SoKA, rank 1"), ("soka4", "SoKA, rank 4"), ("lora", f"LoRA, rank {measures.LORA_RANK}"))
    return Panel(quantity, text, theory, tuple(Curve(f"{name}_{key}", title) for name, title in lines))


STUDIES = {
    "kpsvd-size": Study(
        "KPSVD against the side of the weight", measures.measure_kpsvd,
        "side", (512, 1024, 2048, 4096), {"rank": 16}, (128, 256, 512), {"rank": 4},
        one_time("KPSVD", measures.kpsvd_work, "kpsvd",
            "2: a Krylov block is multiplied by all n² values of the weight, and back. The number of blocks depends on "
            "the spectrum, up to 12."),
    ),
    "kpsvd-rank": Study(
        "KPSVD against rank", measures.measure_kpsvd,
        "rank", (4, 8, 16, 32, 64, 128), {"side": 2048}, (2, 8, 32), {"side": 256},
        one_time("KPSVD", measures.kpsvd_work, "kpsvd",
            "Below 1: a block has rank + max(8, rank / 8) columns. Orthogonalising them costs n · columns² more, which "
            "tells at high ranks."),
    ),
    "init-layers": Study(
        "Stage init against layers", measures.measure_init,
        "layers", (1, 2, 4, 8), {"hidden": 512, "rank": 16}, (1, 2, 3), {"hidden": 128, "rank": 4},
        (
            Panel("processor time", seconds_text, "1: every layer has the same seven weights.",
                (Curve("init_s", "init", measures.per_layer),)),
            Panel("peak of its own memory", size,
                "0: one weight is decomposed at a time. The chosen terms of all layers are read at the end, and tell "
                "when they outweigh one decomposition.",
                (Curve("init_peak_bytes", "init", measures.constant),)),
        ),
    ),
    "init-data-layers": Study(
        "Stage init with activation weighting against layers", measures.measure_init,
        "layers", (2, 4, 8, 16, 32), {"hidden": 256, "rank": 1, "batches": 2},
        (1, 2, 3), {"hidden": 128, "rank": 1, "batches": 1},
        (
            Panel("processor time", seconds_text, "1: every layer is run once, and has the same seven weights.",
                (Curve("init_s", "init", measures.per_layer), Curve("forward_s", "forward pass", measures.per_layer))),
            Panel("peak of its own memory", size, "0: one layer's moments at a time, beside the hidden states.",
                (Curve("init_peak_bytes", "init", measures.constant),)),
        ),
    ),
    "merge-layers": Study(
        "Merge against layers", measures.measure_merge,
        "layers", (1, 2, 4, 8), {"hidden": 1024, "rank": 8}, (1, 2, 3), {"hidden": 256, "rank": 4},
        (
            Panel("processor time", seconds_text,
                "1: all values are read, hashed, summed and written once. Verification looks at a sample of at most 16 "
                "tensors: below 1 while that counts.",
                (Curve("plain_s", "not verified", measures.per_layer),
                 Curve("verified_s", "verified", measures.per_layer))),
            Panel("peak of its own memory", size,
                "Near 0: blocks of a few MiB, whatever the layers, and the adapter's terms, which do grow with them.",
                (Curve("plain_peak_bytes", "not verified", measures.constant),
                 Curve("verified_peak_bytes", "verified", measures.constant))),
        ),
    ),
    "serve-tokens": Study(
        "Serving operator against tokens", measures.measure_operator,
        "tokens", (1, 4, 16, 64, 256, 1024), {"rank": 4, "adapters": 1, "width": 4096},
        (1, 8, 64), {"rank": 2, "adapters": 1, "width": 256},
        operator_panels("1: a token costs rank · m · q · (n + p) multiply-adds. Calling torch costs the same for any "
            "number of tokens, so below 1 for few."),
    ),
    "serve-rank": Study(
        "Serving operator against rank", measures.measure_operator,
        "rank", (1, 2, 4, 8, 16, 32), {"tokens": 64, "adapters": 1, "width": 4096},
        (1, 2, 4), {"tokens": 16, "adapters": 1, "width": 256},
        operator_panels("1: a term costs tokens · m · q · (n + p) multiply-adds. Reading inputs and adding to outputs "
            "does not depend on the rank, so below 1 for few terms."),
    ),
    "serve-adapters": Study(
        "Serving operator against adapters in the batch", measures.measure_operator,
        "adapters", (1, 2, 4, 8, 16, 32, 64), {"tokens": 64, "rank": 4, "width": 4096},
        (1, 4, 16), {"tokens": 16, "rank": 2, "width": 256},
        operator_panels("0: the same multiply-adds. From the second adapter on every token gets a copy of its factors, "
            "a step that a power does not describe."),
    ),
    "serve-slots": Study(
        "Filling a slot against slots", measures.measure_slots,
        "slots", (8, 32, 128, 512, 1024), {"width": 1024, "rank": 1}, (2, 4, 8), {"width": 128, "rank": 1},
        one_time("one layer's factors", measures.constant, "fill", "0: where another adapter's were, there is room."),
    ),
    "serve-width": Study(
        "Serving operator against width", measures.measure_operator,
        "width", (1024, 2048, 4096, 8192), {"tokens": 64, "rank": 4, "adapters": 1},
        (64, 128, 256), {"tokens": 16, "rank": 2, "adapters": 1},
        operator_panels("1.5 between squares: m = n = p = q = √width make it 2 · width^1.5 multiply-adds a token and "
            "term. Twice a square needs fewer."),
    ),
    "train-tokens": Study(
        "Training layer against tokens", measures.measure_training,
        "tokens", (64, 128, 256, 512, 1024, 2048, 4096), {"rank": 4, "width": 2048},
        (16, 64, 256), {"rank": 2, "width": 256},
        training_panels("1: every product is proportional to the tokens, but for building a dense delta, where that "
            "is chosen."),
    ),
    "train-rank": Study(
        "Training layer against rank", measures.measure_training,
        "rank", (1, 2, 4, 8, 16, 32), {"tokens": 512, "width": 2048},
        (1, 2, 4), {"tokens": 64, "width": 256},
        training_panels("The delta 1, the frozen layer 0, the whole between them. Where building the dense delta is "
            "chosen, more terms cost next to nothing."),
    ),
    "size-width": Study(
        "Adapter of one LLaMA layer against hidden size (computed)", measures.compute_size,
        "width", (512, 1024, 2048, 4096, 8192, 16384), {}, (512, 1024, 2048), {},
        (
            size_panel("trained parameters", count, "parameters",
                "1: a balanced term has about 2 · √(out · in) values, a rank of LoRA out + in."),
            size_panel("bytes on disk", size, "bytes",
                "1: 4 bytes a value, headers left out. SoKA with twice its trained terms, as init = \"weights\" "
                "exports at most."),
        ),
    ),
}  # fmt: skip


def run_study(name: str, study: Study, effort: measures.Effort, small: bool) -> dict[str, Any]:
    """Measure all points of a study and fit its curves."""
    settings, points = study.settings(small), []
    for setting in settings:
        point = {study.varies: setting[study.varies], **study.measure(effort, **setting)}
        points.append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in point.items()})
        told = "; ".join(f"{panel.quantity}: {panel.told(point)}" for panel in study.panels)
        print(f"{name}, {study.varies} {setting[study.varies]}: {told}", flush=True)
    return {
        "title": study.title,
        "varies": study.varies,
        "fixed": {key: value for key, value in settings[0].items() if key != study.varies},
        "points": points,
        "charts": [
            {
                "quantity": panel.quantity,
                "theory": panel.theory,
                "fits": {line.key: fit_line(line, study.varies, settings, points) for line in panel.lines},
            }
            for panel in study.panels
        ],
    }


def fit_line(line: Curve, varies: str, settings: Sequence[dict[str, int]], points: Sequence[Point]) -> dict[str, Any]:
    """The fit of one curve, and the exponent that arithmetic gives at the same points."""
    xs = [point[varies] for point in points]
    fit = fit_power(xs, [point[line.key] for point in points])
    found: dict[str, Any] = {"no_fit": "a value is 0"} if fit is None else rounded(fit._asdict())
    if line.work is not None:
        work = [line.work(**setting) for setting in settings]
        expected = fit_power(xs, work)
        assert expected is not None  # every count of work is positive
        found |= {"arithmetic": work, "arithmetic_exponent": round(expected.exponent, 3)}
    return found


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Four significant digits."""
    return {key: float(f"{value:.4g}") for key, value in values.items()}


def main() -> None:
    """Run the studies; the results are written after each."""
    parser = make_parser("eval.growth.bench", __doc__, needs_out=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per point and curve (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument(
        "--only", action="extend", nargs="+", choices=STUDIES, metavar="SERIES", help=f"of {', '.join(STUDIES)}"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [name for name in STUDIES if name in (options.only or STUDIES)]
    found: dict[str, Any] = {
        "threads": options.threads,
        "small": options.small,
        "seed": measures.SEED,
        "load_average_at_start": os.getloadavg()[0],
        "series": {},
    }
    effort = measures.Effort(options.threads, options.seconds)
    panels = {name: study.panels for name, study in STUDIES.items()}
    for name in names:
        found["series"][name] = run_study(name, STUDIES[name], effort, options.small)
        record = write_record(options, found)
        options.out.with_suffix(".html").write_text(render(record, panels, measures.LEAST_CALLS))


if __name__ == "__main__":
    main()
