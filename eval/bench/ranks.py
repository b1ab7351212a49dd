"""Whether any way of spreading terms over modules beats the same number in each: short trainings on GSM8K.

    python -m eval.bench.ranks --base FOLDER --data FOLDER --out rows.json --arms fixed:1 gradient:1 --seeds 0 1 2

Claim to be tested, written before the runs: at equal numbers of trained parameters (those of one term in every module),
an arm has a lower held-out answer loss than `fixed:1` in each of three seeds, by more than the standard deviation of
`fixed:1` over the seeds, and by more than two standard errors over the paired examples. An arm that does is `better` in
`summary`; one for which the opposite holds is `worse`; with fewer than three seeds there is no verdict.

An arm is WAY:R. All start from principal components of the weights, unweighted, and train with the same rate, steps,
batches and schedule; each step's gradient has norm 1, as with clip = 0. Ways:

- `fixed`: R terms in every module. `fixed:4` shows what four times the parameters are worth.
- `weights`, `outputs`, `gradient`: `policy = "budget"`, the parameters of R terms per module, at most `--most` terms in
  one, by energy per parameter of the weight, of the layer's output on the calibration batches (activation weighting),
  or of the loss's gradient over them; sizes as they are.
- `sensitivity`: of `--from-terms` terms in every module those with the largest sum of |theta dL/dtheta| per parameter,
  over theta's entries and the calibration batches, before any training. `best`: the same, R in every module.
- `pruned`: trains R terms in every module, then keeps after `--prune-after` steps the terms with the largest such sums
  over those steps, each of a gradient of norm 1, as many as have the parameters of one term per module, with what they
  and their moments in AdamW have become. Rates are those of the terms that are left.

`parameters` are those at the end. The calibration batches are the first of each seed's training batches. `--data` holds
gsm8k_train.jsonl and gsm8k_test.jsonl. A run that has its row in `--out` already is not made again.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.bench.calibration import read_rows
from eval.llama import start_of
from eval.record import make_parser, write_record
from soka_serve.base.cpu import attention_for, fast_products
from soka_serve.base.model import load_base
from soka_serve.comparison.run import answer_losses
from soka_serve.compiler.init.candidate import Candidate, TargetStatistics, decompose, read_matrix
from soka_serve.compiler.init.initialise import choose_ranks
from soka_serve.compiler.init.probe import gather
from soka_serve.compiler.train.trained_positions import output_layer, trained_positions
from soka_serve.data.collate import PadCollator
from soka_serve.kron import Factors
from soka_serve.manifest.rules import RankBudget
from soka_serve.manifest.schema import SOKA_RATE
from soka_serve.peft import build_soka_model, create_soka_optimizer, get_factors, soka_layers
from soka_serve.peft.parts import PARTS

Batch = dict[str, Tensor]
Scores = dict[str, Tensor]
BASELINE = "fixed:1"
SHARED = ("steps", "batch", "rate", "tokens", "most", "from_terms", "prune_after", "calibration_batches", "held_out")
SOURCES: dict[str, dict[str, Any]] = {
    "weights": {"init": "weights", "calibration_batches": 0},
    "outputs": {"init": "weights"},
    "gradient": {"init": "gradient"},
}


class Bench:
    """The base and its rows; what is found on the way is kept for the next arm."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.base_model: Any = load_base(options.base, "float32").requires_grad_(False).eval()
        self.base_model.config.use_cache = False
        _, self.base, _ = start_of(options.base, {})
        self.rows = read_rows(self.base, options.data / "gsm8k_train.jsonl", 2000, options.tokens)
        self.test = read_rows(self.base, options.data / "gsm8k_test.jsonl", options.held_out, options.tokens)
        self.collate = PadCollator(self.base.tokenizer.pad_id)
        self.pool = self.candidates("weights", [])

    def batches(self, seed: int) -> list[Batch]:
        """Those of all steps of a seed."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()
        size = self.options.batch
        return [
            self.collate([self.rows[i] for i in order[n * size : (n + 1) * size]]) for n in range(self.options.steps)
        ]

    def candidates(self, source: str, batches: Sequence[Batch]) -> dict[str, Candidate]:
        """Decompositions of all modules as stage `init` makes them for a budget, with at most `--most` terms each."""
        rank = {"policy": "budget", "parameters": 1, "max": self.options.most, "pool": self.options.most}
        rule = {"calibration_batches": len(batches), **SOURCES[source], "rank": rank}
        _, base, targets = start_of(self.options.base, rule)
        folder = self.folder / source
        folder.mkdir(exist_ok=True)
        known = gather(self.base_model, batches, targets) if batches else map(TargetStatistics, targets)
        made = {}
        for number, one in enumerate(known):
            matrix = read_matrix(one.target, base.weights, gradient=one.gradient)
            made[one.target.module.name] = decompose(one, matrix, folder / f"{number}.safetensors", seed=number)
        return {t.module.name: made[t.module.name] for t in targets}

    def budget(self, terms: int) -> int:
        """Parameters of so many terms in every module."""
        return sum(c.shape.parameters(terms) for c in self.pool.values())

    def ranks(self, source: str, batches: Sequence[Batch], parameters: int) -> dict[str, int]:
        """What a budget by the energies of a source gives."""
        most = self.options.most
        policy = RankBudget(policy="budget", parameters=parameters, max=most, pool=most)
        found = self.candidates(source, batches if source != "weights" else [])
        members = []
        for candidate in found.values():
            rule = candidate.target.rule.model_copy(update={"rank": policy})
            members.append(replace(candidate, target=replace(candidate.target, rule=rule)))
        return choose_ranks(members, {})

    def start(self, way: str, terms: int, batches: Sequence[Batch]) -> dict[str, Factors]:
        """The factors of an arm at step 0, by module; modules without any are left out."""
        calibration = batches[: self.options.calibration_batches]
        if way in ("fixed", "pruned"):
            return {name: c.read(terms) for name, c in self.pool.items()}
        if way in ("sensitivity", "best"):
            found = {name: c.read(self.options.from_terms) for name, c in self.pool.items()}
            fewest = terms if way == "best" else 0
            kept = choose_terms(self.sensitivity(found, calibration), found, self.budget(terms), fewest)
            return {name: found[name].terms(index).with_size(self.pool[name].size) for name, index in kept.items()}
        ranks = self.ranks(way, calibration, self.budget(terms))
        return {name: self.pool[name].read(rank) for name, rank in ranks.items() if rank}

    def sensitivity(self, factors: Mapping[str, Factors], batches: Sequence[Batch]) -> Scores:
        """Sums of |theta dL/dtheta| of every term at its start."""
        model = build_soka_model(self.base_model, factors, initial=True)
        scores: Scores = {}
        for batch in batches:
            backward(model, batch)
            add_scores(scores, model)
            model.zero_grad()
        self.base_model = model.unload()
        return scores

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """One row."""
        way, terms = arm.split(":")
        batches, started = self.batches(seed), time.process_time()
        factors = self.start(way, int(terms), batches)
        prepared = time.process_time()
        model = build_soka_model(self.base_model, factors, initial=True)
        optimizer = create_soka_optimizer(model, lr=self.options.rate, sigma_lr=1.0)
        scores: Scores = {}
        losses = []
        for step, batch in enumerate(batches):
            if way == "pruned" and step == self.options.prune_after:
                kept = choose_terms(scores, factors, self.budget(1))
                model, optimizer = self.prune(model, optimizer, kept)
            losses.append(backward(model, batch))
            trained = [p for p in model.parameters() if p.requires_grad]
            norm = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad /= norm
            if way == "pruned" and step < self.options.prune_after:
                add_scores(scores, model)
            part = min(1.0, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            for group in optimizer.param_groups:
                group.setdefault("peak", group["lr"])
                group["lr"] = group["peak"] * part
            optimizer.step()
            optimizer.zero_grad()
        ended = time.process_time()
        row = {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "ranks": count_terms({name: layer.theta("default").rank for name, layer in soka_layers(model).items()}),
            "answer_loss": [round(loss, 4) for loss in answer_losses(model, self.test, self.collate)],
            "losses": [round(loss, 4) for loss in losses],
            "prepare_s": round(prepared - started, 1),
            "train_s": round(ended - prepared, 1),
        }
        self.base_model = model.unload().eval()
        return row

    def prune(self, model: Any, optimizer: torch.optim.Optimizer, kept: Mapping[str, list[int]]) -> tuple[Any, Any]:
        """The model with these terms alone, and an optimiser that goes on where the other was."""
        theta, initial = get_factors(model)
        names = {name: {part: getattr(layer, f"soka_{part}")["default"] for part in PARTS} for name, layer in
                 soka_layers(model).items()}  # fmt: skip
        states = {name: {part: optimizer.state[p] for part, p in parts.items()} for name, parts in names.items()}
        theta, initial = ({n: f[n].terms(index) for n, index in kept.items()} for f in (theta, initial))
        pruned = build_soka_model(model.unload(), initial, initial=True)
        after = create_soka_optimizer(
            pruned, lr=self.options.rate, sigma_lr=1.0
        )  # of the sizes at the start, as the other's
        for name, layer in soka_layers(pruned).items():
            layer.set_factors("default", theta[name], initial[name])
            for part in PARTS:
                state = states[name][part]
                after.state[getattr(layer, f"soka_{part}")["default"]] = {
                    key: value[kept[name]].clone() if value.ndim else value.clone() for key, value in state.items()
                }
        return pruned, after


def backward(model: Any, batch: Batch) -> float:
    """Forward and backward pass of the mean loss over the trained positions, as training makes them."""
    head = output_layer(model)
    assert head is not None
    with trained_positions(head, batch) as picked, attention_for(batch["labels"].shape[1], torch.device("cpu")):
        loss = model(**picked).loss
        loss.backward()
    return float(loss.detach())


def add_scores(scores: Scores, model: Any) -> None:
    """Add |theta dL/dtheta|, summed over the entries of each term, (r,) float64 by module."""
    for name, layer in soka_layers(model).items():
        parameters = [getattr(layer, f"soka_{part}")["default"] for part in PARTS]
        found = [(p.detach() * p.grad).double().abs().flatten(1 if p.ndim > 1 else 0) for p in parameters]
        terms = sum((f.sum(1) if f.ndim > 1 else f for f in found), torch.zeros(1, dtype=torch.float64))
        scores[name] = scores.get(name, 0) + terms


def choose_terms(
    scores: Scores, factors: Mapping[str, Factors], parameters: int, fewest: int = 0
) -> dict[str, list[int]]:
    """The terms with the largest score per parameter that the parameters pay for, by module in ascending order.

    The best `fewest` of every module come first.
    """
    costs = {name: f.shape.parameters(1) for name, f in factors.items()}
    order = sorted(
        (
            (place >= fewest, -float(each[k]) / costs[name], name, k)
            for name, each in scores.items()
            for place, k in enumerate(each.argsort(descending=True).tolist())
        )
    )
    kept: dict[str, list[int]] = {}
    for *_, name, k in order:
        if costs[name] <= parameters:
            parameters -= costs[name]
            kept.setdefault(name, []).append(k)
    return {name: sorted(kept[name]) for name in factors if name in kept}


def count_terms(ranks: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Terms of all modules by projection, and by tenths of the depth."""
    depth = 1 + max(int(name.split(".")[2]) for name in ranks)
    found: dict[str, dict[str, int]] = {"projections": {}, "modules_by_rank": {}, "tenths": {}}
    for name, rank in ranks.items():
        tenth = str(10 * int(name.split(".")[2]) // depth)
        for kind, key in (("projections", name.rpartition(".")[2]), ("tenths", tenth)):
            found[kind][key] = found[kind].get(key, 0) + rank
        found["modules_by_rank"][str(rank)] = found["modules_by_rank"].get(str(rank), 0) + 1
    return found


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every arm against the baseline: paired over examples, seed by seed."""
    losses: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        losses.setdefault(row["arm"], {})[row["seed"]] = row["answer_loss"]
    means = {arm: {seed: statistics.mean(each) for seed, each in seeds.items()} for arm, seeds in losses.items()}
    base = losses.get(BASELINE, {})
    spread = statistics.stdev(means[BASELINE].values()) if len(base) > 1 else math.nan
    summary: dict[str, Any] = {}
    for arm, seeds in losses.items():
        both = [seed for seed in seeds if seed in base]
        summary[arm] = {"loss": round(statistics.mean(means[arm].values()), 4)}
        summary[arm]["by_seed"] = {seed: round(loss, 4) for seed, loss in sorted(means[arm].items())}
        if arm == BASELINE:
            summary[arm] |= {"spread": round(spread, 4)} if len(base) > 1 else {}
        elif both:
            by_seed = [means[arm][seed] - means[BASELINE][seed] for seed in both]
            each = [statistics.mean(d) for d in zip(*(_minus(seeds[s], base[s]) for s in both), strict=True)]
            error = statistics.stdev(each) / math.sqrt(len(each))
            mean = statistics.mean(each)
            sure = abs(mean) > max(spread, 2 * error) and len({d < 0 for d in by_seed}) == 1
            verdict = ("better" if mean < 0 else "worse") if sure else "not told apart"
            summary[arm] |= {
                "difference": round(mean, 4),
                "standard_error": round(error, 4),
                "differences_by_seed": [round(d, 4) for d in by_seed],
                "verdict": verdict if len(both) > 2 else "too few seeds",
            }
    return summary


def _minus(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def main() -> None:
    """Run what is missing and write the result after every run."""
    parser = make_parser("eval.bench.ranks", __doc__, needs_out=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", required=True, metavar="WAY:R")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=SOKA_RATE)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--most", type=int, default=8, help="terms of a module, with a budget")
    parser.add_argument("--from-terms", type=int, default=4, help="per module, of which `sensitivity` chooses")
    parser.add_argument("--prune-after", type=int, default=8, help="steps")
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=60, help="test rows")
    parser.add_argument("--other-work", default="unknown", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    shared = {name: getattr(options, name) for name in SHARED}
    with tempfile.TemporaryDirectory() as folder, fast_products():
        bench: Callable[[], Bench] | Bench = lambda: Bench(options, Path(folder))  # noqa: E731
        for seed in options.seeds:
            for arm in options.arms:
                key = {"arm": arm, "seed": seed, **shared}
                if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
                    continue
                bench = bench if isinstance(bench, Bench) else bench()
                rows.append({**key, **bench.train(arm, seed)})
                save(options, rows)
                row = rows[-1]
                print(arm, seed, row["parameters"], statistics.mean(row["answer_loss"]), row["ranks"],
                      row["prepare_s"], row["train_s"], flush=True)  # fmt: skip
    save(options, rows)


def save(options: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows, and the summary of those that share the settings of this command."""
    same = [row for row in rows if all(row.get(name) == getattr(options, name) for name in SHARED)]
    machine = {"threads": 1, "other_work": options.other_work}
    write_record(options, {"summary": compare(same), "rows": rows}, machine=machine)


if __name__ == "__main__":
    main()
