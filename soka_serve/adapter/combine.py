"""`soka-serve combine`: the weighted sum of several adapters of one base as one adapter, and what is lost of it.

Terms of one factor shape concatenate, so that the sum is exact; fewer terms are the sum's best ones. It is the server's
step of federated training (FedSVD, arXiv:2505.12805, for LoRA): the clients' updates are summed and factored again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from soka_serve.adapter.format import unlike_bits, write_adapter
from soka_serve.adapter.loss import lost_energy, percent, shares, summary_lines
from soka_serve.adapter.source import AdapterSource, read_source
from soka_serve.adapter.weighted import check_weight, weighted_lock, weighted_table
from soka_serve.errors import CheckpointError, SokaError, first_ten, joined, printable
from soka_serve.io.file_names import ADAPTER_FILES
from soka_serve.io.files import replace_directory
from soka_serve.io.outputs import OutputKind
from soka_serve.io.places import given_path
from soka_serve.io.progress import track
from soka_serve.io.versions import versions
from soka_serve.io.warn_once import one_command
from soka_serve.kron import Factors, add_delta_, dense_delta, kpsvd, recompress, stack_terms

COMBINED = OutputKind(
    what="a combined adapter",
    is_marked=lambda lock: lock is not None and isinstance(lock.get("combine"), Mapping) and "export" not in lock,
    files=lambda *_: ADAPTER_FILES,
)

_Sources = Sequence[tuple[AdapterSource, float]]


@dataclass(frozen=True)
class CombineResult:
    """What a combination wrote and what it dropped.

    `dropped_energy_frac` is the share of the summed deltas' squared Frobenius norm, over all modules, that the written
    adapter does not hold; `by_module` gives it per module. Without `rank` both are float32's rounding, about 1e-14.
    """

    out: Path
    adapters: int
    modules: int
    parameters: int
    ranks: tuple[int, int]
    dropped_energy_frac: float
    by_module: dict[str, float] = field(repr=False)

    def to_text(self) -> str:
        """A few lines for people."""
        lines = [
            f"adapter     {self.out}, of {self.adapters}",
            *summary_lines(self.modules, self.ranks, self.parameters, self.dropped_energy_frac, self.by_module),
        ]
        return "\n".join(lines)


@one_command()
def combine(
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    rank: int | None = None,
    allow_other_base: bool = False,
    progress: bool = False,
) -> CombineResult:
    """Write the adapter whose delta is the sum of weight * delta, module by module.

    A module that only some of the adapters have gets the sum of those. Without `rank` all terms are kept, sigma times
    the weight; more terms than a delta of the factor shape can have are recompressed, which loses nothing.

    Args:
        adapters: directories with weights. Training checkpoints count with trained - initial.
        out: directory of the new adapter; an earlier combination in it is replaced as a whole, anything else refused.
        rank: most terms per module: the best ones of the sum. A module whose adapters have different factor shapes
            gets the shape of the first of them.
        allow_other_base: combine adapters that were made for different bases; the result names the first one's.
        progress: show progress.

    Raises:
        CheckpointError: an adapter is damaged, or adapters that do not go together, all reasons at once.
        SokaError: a rank below 1.
        BuildError: disk full and the like, or `out` holds something else.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise SokaError(f"rank: expected at least 1; got {rank!r}")
    if not adapters:
        raise CheckpointError("no adapter to combine", hint="give at least one adapter directory")
    out, chosen = given_path(out, "out"), [(Path(path), weight) for path, weight in adapters]
    COMBINED.check(out, keep=[path for path, _ in chosen])
    sources = [(read_source(path), weight) for path, weight in chosen]
    modules = list(dict.fromkeys(name for source, _ in sources for name in source.adapter.factors))
    _check(sources, modules, rank, allow_other_base)
    written: dict[str, Factors] = {}
    energies: dict[str, tuple[float, float]] = {}
    with replace_directory(out, foreign=COMBINED.foreign) as new:
        with track(len(modules), "combine", unit="module", enabled=progress) as advance:
            for name in modules:
                parts = [(s.adapter.delta_factors(name), w) for s, w in sources if name in s.adapter.factors]
                written[name], energies[name] = _sum(name, parts, rank)
                advance(name)
        dropped, by_module = shares(energies)
        ranks = [factors.rank for factors in written.values()]
        parameters = sum(factors.parameters for factors in written.values())
        result = CombineResult(
            out, len(sources), len(modules), parameters, (min(ranks), max(ranks)), dropped, by_module
        )
        first = sources[0][0]
        write_adapter(
            new,
            written,
            base_model=first.adapter.base,
            lock=_lock(sources, result, rank),
            card=_card(sources, result),
        )
    return result


def _sum(module: str, parts: Sequence[tuple[Factors, float]], rank: int | None) -> tuple[Factors, tuple[float, float]]:
    """The float32 terms of one module's sum; the sum's energy, and what they lose of it.

    Raises:
        CheckpointError: a weight makes it larger than float32 can hold.
    """
    largest = torch.finfo(torch.float32).max
    for factors, weight in parts:
        if float(factors.sigma.double().abs().max()) * abs(weight) > largest:
            raise CheckpointError(
                f"{module}: weight {weight:g} makes its terms larger than float32 can hold", hint="give smaller weights"
            )
    deltas, weights = [factors.to(torch.float64) for factors, _ in parts], [weight for _, weight in parts]
    shape = deltas[0].shape
    if rank is not None and any(delta.shape != shape for delta in deltas):
        dense = torch.zeros(shape.out_features, shape.in_features, dtype=torch.float64)
        for delta, weight in zip(deltas, weights, strict=True):
            dense.add_(dense_delta(delta), alpha=weight)
        found = kpsvd(dense, shape, rank)
        terms = found.factors.to(torch.float32)
        rest = float(add_delta_(dense, terms.to(torch.float64), -1).square().sum())
        return terms, (found.total_energy, min(rest, found.total_energy))
    total = stack_terms(*deltas, signs=weights)
    if rank is None and total.rank <= shape.max_rank:
        terms = total.to(torch.float32)
    else:
        terms = recompress(total, rank=rank, rtol=1e-7)[0].to(torch.float32)
    return terms, lost_energy(total, terms)


def _check(sources: _Sources, modules: Sequence[str], rank: int | None, allow_other_base: bool) -> None:
    """Refuse what cannot be summed, all reasons at once."""
    problems: list[SokaError] = []
    for source, weight in sources:
        try:
            check_weight(source.adapter, weight)
        except CheckpointError as error:
            problems.append(error)
    problems += unlike_bits([source.adapter for source, _ in sources])
    if not allow_other_base:
        problems += _other_bases([source for source, _ in sources])
    for name in modules:
        problems += _unlike_shapes(name, [s for s, _ in sources if name in s.adapter.factors], rank)
    if problems:
        message, hint = joined(problems)
        raise CheckpointError("\n".join(first_ten(message.split("\n"))), hint=hint)


def _other_bases(sources: Sequence[AdapterSource]) -> list[SokaError]:
    """Adapters of another base than the first one's: by the hash of its weights, or by name where one has no hash."""
    problems: list[SokaError] = []
    first = sources[0]
    for source in sources[1:]:
        mine, other = source.base_sha256, first.base_sha256
        what = "base weights with sha256 "
        if mine is None or other is None:
            mine, other, what = source.adapter.base_model or "none", first.adapter.base_model or "none", "base "
        if mine != other:
            problems.append(
                CheckpointError(
                    f"{source.adapter.directory}: made for {what}{mine}, {first.adapter.directory} for {other}",
                    hint="combine adapters of one base, or --allow-other-base if the difference is intended",
                )
            )
    return problems


def _unlike_shapes(name: str, sources: Sequence[AdapterSource], rank: int | None) -> list[SokaError]:
    """Factors of one module that belong to weights of different shapes, or whose terms do not concatenate."""
    problems: list[SokaError] = []
    first = sources[0].adapter
    here = first.factors[name].shape
    for source in sources[1:]:
        shape, place = source.adapter.factors[name].shape, f"{source.adapter.directory}: {name}"
        size, other = ((s.out_features, s.in_features) for s in (shape, here))
        if size != other:
            problems.append(CheckpointError(f"{place}: its delta is {size}, that of {first.directory} {other}"))
        elif shape != here and rank is None:
            problems.append(
                CheckpointError(
                    f"{place}: factor shape {list(shape)}, {first.directory} has {list(here)}",
                    hint="terms of different factor shapes do not concatenate: give --rank, and their sum is "
                    "decomposed in the first one's shape",
                )
            )
    return problems


def _lock(sources: _Sources, result: CombineResult, rank: int | None) -> dict[str, Any]:
    first = sources[0][0]
    base = (first.lock or {}).get("base")
    return {
        "soka": 1,
        "base": base if isinstance(base, Mapping) else {"name": first.adapter.base_model or "unknown"},
        "combine": {
            "rank": "all" if rank is None else rank,
            "dropped_energy_frac": result.dropped_energy_frac,
            "most_dropped_energy_frac": max(result.by_module.values()),
            "adapters": weighted_lock(sources),
        },
        "versions": versions(),
    }


def _card(sources: _Sources, result: CombineResult) -> str:
    base = printable(Path(sources[0][0].adapter.base_model or "its base").name)
    return (
        "---\nlibrary_name: peft\ntags: [soka]\n---\n\n"
        f"# SoKA (Kronecker) adapter for {base}, a sum of {result.adapters}\n\n"
        f"{result.modules} modules, {result.parameters:,} parameters. Made by `soka-serve combine`: the sum of "
        f"weight x delta. {percent(result.dropped_energy_frac)} of its energy (squared Frobenius norm) is lost.\n\n"
        f"{weighted_table(sources)}\n\n"
        "Load with `import soka_serve.peft` and `PeftModel.from_pretrained`.\n"
    )
