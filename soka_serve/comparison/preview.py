"""What a comparison would run, and how many parameters each method trains, for `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from soka_serve.base.modules import BaseModules
from soka_serve.base.resolve import resolve_base
from soka_serve.base.target_modules import resolve_targets
from soka_serve.comparison.plan import runs_per_cell
from soka_serve.comparison.read import LoadedSuite, read_suite
from soka_serve.comparison.settings import manifest_of
from soka_serve.comparison.suite import Contender, Protocol, Suite
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.plan.given import settle_targets
from soka_serve.compiler.plan.modules import plan_training


@dataclass(frozen=True)
class Preview:
    """A suite before anything runs. `parameters` holds (fewest, most) trained parameters by method."""

    loaded: LoadedSuite
    base_parameters: int
    parameters: dict[str, tuple[int, int]]

    def to_text(self) -> str:
        """Methods with their parameters, what each is searched over, and what all of it costs."""
        suite = self.loaded.suite
        protocol, recipe = suite.protocol, cast(Any, suite.train)
        width = max(len(m.name) for m in suite.method)
        lines = [f"{suite.name}: base with {self.base_parameters:,} parameters", ""]
        for contender in suite.method:
            low, high = self.parameters[contender.name]
            count = f"{high:,}" if low == high else f"{low:,} to {high:,}"
            lines.append(f"  {contender.name:<{width}}  {count} trained parameters ({high / self.base_parameters:.3%})")
        if any(METHODS[m.method].kronecker for m in suite.method):
            lines.append(
                "  (with those that a rate of 0 leaves as they start, by default σ; records count what was trained)"
            )
        sweep, final = runs_per_cell(suite)
        lines += [
            "",
            f"each method on each dataset: {_search(suite, sweep)}{final} runs of the results; by priority:",
        ]
        for contender in sorted(suite.method, key=lambda m: m.priority):
            axes = [f"{axis} {', '.join(f'{v:g}' for v in values)}" for axis, values in contender.grid.items()]
            grid = "; ".join([*axes, *(f"{key} {word}" for key, word in contender.words.items())])
            names = ", ".join(d.name for d in suite.datasets_of(contender))
            lines.append(f"  {contender.priority}  {contender.name:<{width}}  on {names}: {grid}")
        cells = sum(len(suite.datasets_of(m)) for m in suite.method)
        steps = cells * (sweep + final) * recipe.steps
        forward = cells * (
            sweep * protocol.validation + final * (protocol.test + 2 * sum(o.examples for o in suite.other))
        )
        lines += [
            "",
            f"{cells * (sweep + final):,} runs; {steps:,} steps = {steps * recipe.batch_size * recipe.accumulate:,} "
            f"trained examples of at most {recipe.max_length} tokens; {forward:,} examples forward only",
        ]
        return "\n".join(lines)


def preview(suite: Path | str | LoadedSuite, root: Path | str | None = None) -> Preview:
    """Check a suite against its base's config, and count.

    Raises:
        SokaError: a suite that is wrong, or does not fit its base.
    """
    loaded = suite if isinstance(suite, LoadedSuite) else read_suite(suite, root)
    base = resolve_base(loaded.suite.base, manifest_dir=loaded.directory, weights=False, name_key=loaded.name_key)
    base.check_adaptable()
    counts = {m.name: _count(loaded, m, base.layout) for m in loaded.suite.method}
    return Preview(loaded, base.layout.size.parameters, counts)


def _count(loaded: LoadedSuite, contender: Contender, base: BaseModules) -> tuple[int, int]:
    """Fewest and most trained parameters of a method, over the values of its axes."""
    suite, counts = loaded.suite, list[int]()
    shaping = [(axis, values) for axis, values in contender.grid.items() if contender.key_of(axis).startswith("adapt.")]
    for axis, value in [*((axis, value) for axis, values in shaping for value in values), contender.first[0]]:
        setting = tuple((dict(contender.first) | {axis: value}).items())
        manifest = manifest_of(suite, contender, suite.datasets_of(contender)[0], setting=setting, seed=0)
        targets, _ = settle_targets(resolve_targets(manifest, base.modules), manifest, loaded.directory)
        planned = plan_training(manifest, targets, METHODS[contender.method], base.size)
        counts += [planned.parameters_min, planned.parameters_max]
    return min(counts), max(counts)


def _search(suite: Suite, runs: int) -> str:
    if not runs:
        return "one setting, nothing to search, "
    return f"{suite.settings} settings {_with_seeds(suite.protocol)} = {runs} runs to choose one, then "


def _with_seeds(protocol: Protocol) -> str:
    """With how many sweep seeds each setting is tried."""
    seeds = len(protocol.sweep_seeds)
    if protocol.finalists is None or seeds == 1:
        return f"x {seeds} sweep seed{'s' * (seeds > 1)}"
    return f"with one sweep seed, the best {protocol.finalists} with {seeds - 1} more"
