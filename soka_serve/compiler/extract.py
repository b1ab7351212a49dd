"""`soka-serve extract`: a Kronecker adapter from a fully fine-tuned checkpoint minus its base, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from soka_serve.base.base import Base
from soka_serve.base.resolve import open_base
from soka_serve.errors import SokaError
from soka_serve.io.file_names import ADAPTER_FILES
from soka_serve.io.outputs import Lock, OutputKind
from soka_serve.io.places import given_path
from soka_serve.io.stamps import FileStamps
from soka_serve.io.warn_once import one_command

if TYPE_CHECKING:
    from soka_serve.base.target_modules import TargetModule
    from soka_serve.compiler.init.result import Initialisation


def _is_extracted(lock: Lock | None) -> bool:
    result = lock.get("result") if lock is not None and "export" not in lock else None
    return isinstance(result, Mapping) and "kept_energy_frac" in result


EXTRACTED = OutputKind(what="an extracted adapter", is_marked=_is_extracted, files=lambda *_: ADAPTER_FILES)


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction kept.

    `kept_energy_frac` is the share of the deltas' squared Frobenius norm that the adapter holds, over all modules;
    `fell_short` how many modules hold less than the `energy` that was asked for, since they have `max_rank` terms.
    """

    out: Path
    modules: int
    parameters: int
    ranks: tuple[int, int]
    kept_energy_frac: float
    fell_short: int = 0

    def to_text(self) -> str:
        """A few lines for people."""
        low, high = self.ranks
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        text = (
            f"adapter     {self.out}\n"
            f"modules     {self.modules}, {ranks}, {self.parameters:,} parameters\n"
            f"energy      {self.kept_energy_frac:.2%} of the fine-tuning delta is kept"
        )
        if self.fell_short:
            text += f"\n            {self.fell_short} modules stopped at max_rank = {high} with less than was asked for"
        return text


@one_command()
def extract(
    finetuned: str | Path,
    *,
    base: str | Path,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    max_rank: int = 64,
    modules: Sequence[str] = (),
    shape: str | Sequence[int] = "balanced",
    progress: bool = True,
) -> ExtractResult:
    """Decompose (fine-tuned - base) into Kronecker terms and write them as an adapter of the base.

    Its ten parameters are the options of `soka-serve extract`.

    Args:
        finetuned: directory or hub id of the fine-tuned checkpoint.
        base: directory or hub id of its base, or 'tiny'.
        out: the adapter's directory; an earlier extraction in it is replaced as a whole, anything else refused.
        rank: terms per module.
        energy: or the share of each delta's own energy to keep.
        parameters: or a total, spread by captured energy per parameter. Exactly one of the three.
        max_rank: most terms per module for `energy` and `parameters`.
        modules: projection names or patterns; default: all in the language model's layers.
        shape: 'balanced', 'auto', 'm,n,p,q' or four numbers.
        progress: show progress.

    Raises:
        SokaError: a checkpoint that is missing or of another shape; a delta that is zero everywhere.
    """
    from soka_serve.compiler.init.initialise import InitRun
    from soka_serve.io.files import scratch_directory

    policy = _rank_policy(rank, energy, parameters, max_rank)
    rule = {"init": "delta", "finetuned": "tuned", "rank": policy, "shape": parse_shape(shape)}
    target = given_path(out, "out")
    EXTRACTED.check(target, keep=[Path(base), Path(finetuned)])  # before anything is fetched
    opened, tuned = open_base(str(base)), open_base(str(finetuned))
    EXTRACTED.check(target, keep=[opened.directory, tuned.directory])
    for each in (opened, tuned):
        each.check_plain()
    unchanged = FileStamps([*opened.checkpoint.files, *tuned.checkpoint.files])
    targets = _targets(opened, rule | ({"modules": list(modules)} if modules else {}))
    with scratch_directory(target) as scratch:
        run = InitRun(targets, opened, finetuned={"tuned": tuned}, scratch=scratch, progress=progress)
        started = run.initialise()
    if not sum(m.total_energy for m in started.modules):
        raise SokaError(
            f"{tuned.name} equals {opened.name} on every adapted module: there is nothing to extract",
            hint="Check that the first argument is the fine-tuned checkpoint, and --modules names what was tuned.",
        )
    result = _summary(started, energy, target)
    _write(result, started, opened, tuned, unchanged)
    return result


def _rank_policy(rank: int | None, energy: float | None, parameters: int | None, most: int) -> dict[str, object]:
    """`[[adapt]] rank` for the one of the three that is given."""
    given = {"rank": rank, "energy": energy, "parameters": parameters}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise SokaError(
            f"extract takes exactly one of rank, energy and parameters; got {', '.join(chosen) or 'none'}",
            hint="For example: --rank 4, or --energy 0.9.",
        )
    if rank is not None:
        return {"policy": "fixed", "rank": rank}
    if energy is not None:
        return {"policy": "energy", "threshold": energy, "of": "total", "max": most, "pool": most}
    return {"policy": "budget", "parameters": parameters, "max": most, "pool": most}


def _targets(base: Base, rule: Mapping[str, object]) -> list[TargetModule]:
    """The modules of the base that a rule adapts."""
    from pydantic import ValidationError

    from soka_serve.base.target_modules import resolve_targets
    from soka_serve.manifest.schema import Manifest

    train = {"steps": 0, "data": {"builtin": "math"}}
    tables = {"schema": 1, "base": {"path": str(base.directory)}, "adapt": [rule], "train": train}
    try:
        manifest = Manifest.model_validate(tables)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"][2:]) or "modules"
        raise SokaError(f"extract: {key}: {first['msg']}; got {first['input']!r:.80}") from None
    return resolve_targets(manifest, base.layout.modules, base.layout.left_out)


def _summary(started: Initialisation, energy: float | None, out: Path) -> ExtractResult:
    """What was kept; `energy` is what was asked for, if it was."""
    captured = {m.module: sum(s * s for s in m.sigma[: m.rank]) for m in started.modules}
    # In float32 the terms of a whole spectrum add up to the total to rounding only.
    short = [m for m in started.modules if energy and captured[m.module] < energy * m.total_energy * (1 - 1e-6)]
    ranks = [m.rank for m in started.modules if m.rank]
    return ExtractResult(
        out=out,
        modules=len(started.factors),
        parameters=sum(f.parameters for f in started.factors.values()),
        ranks=(min(ranks), max(ranks)),
        kept_energy_frac=sum(captured.values()) / sum(m.total_energy for m in started.modules),
        fell_short=len(short),
    )


def _write(result: ExtractResult, started: Initialisation, base: Base, tuned: Base, unchanged: FileStamps) -> None:
    """Write the adapter with its lock and card."""
    from soka_serve.adapter.format import write_adapter
    from soka_serve.compiler.report.card import extracted_card
    from soka_serve.io.files import replace_directory
    from soka_serve.io.versions import versions

    lock = {
        "soka": 1,
        "base": {"name": base.name, "sha256": base.checkpoint.sha256()},
        "finetuned": {"name": tuned.name, "sha256": tuned.checkpoint.sha256()},
        "versions": versions(),
        "result": {"kept_energy_frac": result.kept_energy_frac, "trainable_parameters": result.parameters},
        "ranks": {m.module: m.rank for m in started.modules},
    }
    unchanged.check()  # the hashes were taken after the weights were read
    with replace_directory(result.out, foreign=EXTRACTED.foreign) as new:
        card = extracted_card(base.name, tuned.name, result.modules, result.parameters, result.kept_energy_frac)
        write_adapter(new, started.factors, base_model=base.name, lock=lock, card=card)


def parse_shape(shape: str | Sequence[int]) -> object:
    """'balanced', 'auto', 'm,n,p,q' or four numbers, as the manifest takes it."""
    if not isinstance(shape, str):
        return list(shape)
    if shape in ("balanced", "auto"):
        return shape
    try:
        numbers = [int(part) for part in shape.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or min(numbers) < 1:
        raise SokaError(f"--shape: expected 'balanced', 'auto' or m,n,p,q; got {shape!r}", hint="Such as 64,64,64,64.")
    return numbers
