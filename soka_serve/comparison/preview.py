"""What a comparison would run, and how many parameters each method trains, for `--dry-run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soka_serve.base.foreign_code import check_no_adapter, check_no_code
from soka_serve.base.modules import Module
from soka_serve.base.plain_weights import check_plain_weights
from soka_serve.base.read_modules import read_modules
from soka_serve.base.resolve import resolve_base
from soka_serve.base.targets import resolve_targets
from soka_serve.comparison.plan import count_runs
from soka_serve.comparison.suite import Contender, LoadedSuite, manifest_of, read_suite
from soka_serve.compiler.plan.estimate import lokr_parameters, lora_parameters
from soka_serve.compiler.plan.plan import plan_modules, total_parameters


@dataclass(frozen=True)
class Preview:
    """A suite before anything runs. `parameters` holds (fewest, most) trained parameters by method."""

    loaded: LoadedSuite
    base_parameters: int
    parameters: dict[str, tuple[int, int]]

    def to_text(self) -> str:
        """Methods with their parameters, then the runs in the order in which they can start."""
        suite = self.loaded.suite
        width = max(len(m.name) for m in suite.method)
        lines = [f"{suite.name}: base with {self.base_parameters:,} parameters", ""]
        for contender in suite.method:
            low, high = self.parameters[contender.name]
            count = f"{high:,}" if low == high else f"{low:,} to {high:,}"
            lines.append(f"  {contender.name:<{width}}  {count} trained parameters ({high / self.base_parameters:.3%})")
        seeds = ", ".join(map(str, suite.protocol.seeds))
        sweeps = ", ".join(map(str, suite.protocol.sweep_seeds))
        lines += ["", f"runs, by priority: each rate with seed {sweeps}, then the best rate with seeds {seeds}", ""]
        for contender in sorted(suite.method, key=lambda m: m.priority):
            rates = ", ".join(f"{rate:g}" for rate in contender.rates)
            for dataset in suite.datasets_of(contender):
                lines.append(f"  {contender.priority}  {contender.name:<{width}}  on {dataset.name}: rates {rates}")
        more = suite.protocol.extensions * len(suite.protocol.sweep_seeds)
        lines += ["", f"{count_runs(suite)} runs; up to {more} more per line where the best rate is at the edge"]
        return "\n".join(lines)


def preview(suite: Path | str | LoadedSuite) -> Preview:
    """Check a suite against its base's config, and count.

    Raises:
        SokaError: a suite that is wrong, or does not fit its base.
    """
    loaded = suite if isinstance(suite, LoadedSuite) else read_suite(suite)
    directory = resolve_base(loaded.suite.base, manifest_dir=loaded.directory, weights=False)
    check_no_code(directory)
    check_no_adapter(directory)
    check_plain_weights(directory)
    base = read_modules(directory)
    modules, size = base.modules, base.size
    counts = {m.name: _count(loaded, m, modules, size.parameters) for m in loaded.suite.method}
    return Preview(loaded, size.parameters, counts)


def _count(loaded: LoadedSuite, contender: Contender, modules: Sequence[Module], whole: int) -> tuple[int, int]:
    suite = loaded.suite
    if contender.method == "full":
        return whole, whole
    manifest = manifest_of(suite, contender, suite.datasets_of(contender)[0], rate=contender.rates[0], seed=0)
    targets = resolve_targets(manifest, modules)
    if contender.method != "soka":
        count = adapter_parameters(contender.method, contender.rank, [t.module for t in targets])
        return count, count
    low, high = total_parameters(manifest, targets, plan_modules(manifest, targets, []))
    if manifest.train.sigma_lr == 0:
        # One scale per term is frozen; the fewest terms are not known exactly, so the lower bound stays loose.
        planned = plan_modules(manifest, targets, [])
        return low - sum(m.rank_max for m in planned), high - sum(m.rank_min for m in planned)
    return low, high


def adalora_start(rank: int) -> int:
    """The rank that AdaLoRA begins with.

    >>> adalora_start(1), adalora_start(2), adalora_start(8)
    (2, 3, 12)
    """
    return math.ceil(1.5 * rank)


def adapter_parameters(method: str, rank: int, modules: Sequence[Module]) -> int:
    """Trainable parameters of a PEFT method over these modules, as PEFT counts them when training begins."""
    lora = sum(lora_parameters(m, rank) for m in modules)
    if method == "lokr":
        return sum(lokr_parameters(m, rank) for m in modules)
    if method == "adalora":
        return sum(lora_parameters(m, adalora_start(rank)) + adalora_start(rank) for m in modules)
    if method == "dora":
        return lora + sum(m.out_features for m in modules)
    if method == "osf":
        halves = [(m, min(m.in_features, m.out_features)) for m in modules]
        return sum((size - size // 2) * (m.in_features + m.out_features + 1) for m, size in halves)
    return lora
