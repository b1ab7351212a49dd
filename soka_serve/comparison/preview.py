"""What a comparison would run, and how many parameters each method trains, for `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from soka_serve.base.modules import BaseModules
from soka_serve.base.resolve import resolve_base
from soka_serve.base.targets import resolve_targets
from soka_serve.comparison.plan import count_runs
from soka_serve.comparison.suite import Contender, LoadedSuite, manifest_of, read_suite
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.plan.modules import plan_training


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
    base = resolve_base(loaded.suite.base, manifest_dir=loaded.directory, weights=False, name_key=loaded.name_key)
    base.check_adaptable()
    counts = {m.name: _count(loaded, m, base.layout) for m in loaded.suite.method}
    return Preview(loaded, base.layout.size.parameters, counts)


def _count(loaded: LoadedSuite, contender: Contender, base: BaseModules) -> tuple[int, int]:
    """Fewest and most trained parameters of a method."""
    suite = loaded.suite
    manifest = manifest_of(suite, contender, suite.datasets_of(contender)[0], rate=contender.rates[0], seed=0)
    targets = resolve_targets(manifest, base.modules)
    planned = plan_training(manifest, targets, METHODS[contender.method], base.size)
    low, high = planned.parameters_min, planned.parameters_max
    if manifest.train.sigma_lr == 0:
        # One scale per term is frozen; the fewest terms are not known exactly, so the lower bound stays loose.
        return low - sum(m.rank_max for m in planned.modules), high - sum(m.rank_min for m in planned.modules)
    return low, high
