"""What the command line does, as typed calls. `import soka_serve` gives them without importing torch.

The embedded model makes the examples run anywhere:

>>> import soka_serve
>>> made = soka_serve.plan("manifests/math.toml")
>>> made.name
'math'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from soka_serve.base.resolve import open_base, resolve_base
from soka_serve.errors import SokaError
from soka_serve.io.places import given_path
from soka_serve.io.warn_once import one_command

if TYPE_CHECKING:
    from soka_serve.adapter.export import ExportResult
    from soka_serve.compiler.merge.merge import MergeResult
    from soka_serve.compiler.plan.plan import Plan

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@one_command()
def plan(manifest: str | Path, *, out: str | Path | None = None, policies: int | None = None) -> Plan:
    """What a build of this manifest would do. Loads no weights and no torch.

    Args:
        manifest: path of the TOML file.
        out: folder of builds, where caches are looked for; default: `[output] dir`.
        policies: also list rank policies with about so many trainable parameters.

    Raises:
        SokaError: a manifest that is wrong, or does not fit its base or data.
    """
    from soka_serve.compiler.plan.plan import make_plan
    from soka_serve.compiler.status import stage_statuses
    from soka_serve.manifest.read import read_manifest

    given = None if out is None else given_path(out, "out")
    loaded = read_manifest(Path(manifest))
    root = given or Path(loaded.manifest.output.dir)
    directory = resolve_base(loaded.manifest.base, manifest_dir=loaded.directory, weights=False)
    statuses = stage_statuses(loaded, directory, root)
    return make_plan(loaded, base_directory=directory, stages=statuses, policies=policies)


def parse_weighted(text: str) -> tuple[Path, float]:
    """'ADAPTER' or 'ADAPTER=WEIGHT', as the merge command takes it.

    >>> parse_weighted("build/math/adapter=0.5")[1]
    0.5
    """
    path, separator, number = text.rpartition("=")
    if not separator or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(number)
    except ValueError:
        raise SokaError(
            f"{text}: expected ADAPTER or ADAPTER=WEIGHT with a number; got weight {number!r}",
            hint="For example: build/math/adapter=0.5",
        ) from None


@one_command()
def merge(
    adapters: str | Path | Sequence[tuple[Path, float]],
    *,
    base: str | Path,
    out: str | Path,
    revision: str | None = None,
    dtype: str = "auto",
    verify: bool = True,
    allow_other_base: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Add adapters to a base's weights, shard by shard; write a dense model that any engine loads.

    Args:
        adapters: one adapter directory, or several with weights: W + sum(weight * delta).
        base: directory, hub id, or 'tiny'.
        out: directory of the merged model; an earlier one in it is replaced as a whole, anything else refused.
        revision: of a hub base.
        dtype: of the merged weights; 'auto' keeps the base's.
        verify: reload the result and compare it with base + adapters.
        allow_other_base: merge although the adapter's soka.lock names other base weights.
        progress: show progress.

    Raises:
        SokaError: anything the user can mend; `out` is left as it was.
    """
    from soka_serve.compiler.merge.merge import merge as run
    from soka_serve.compiler.merge.papers import MERGED

    target = given_path(out, "out")
    chosen = [(Path(adapters), 1.0)] if isinstance(adapters, str | Path) else list(adapters)
    MERGED.check(target, keep=[Path(base), *(path for path, _ in chosen)])  # before anything is fetched
    directory, _ = open_base(str(base), revision)
    return run(
        chosen,
        base=directory,
        out=target,
        dtype=cast("Dtype", dtype),
        verify="auto" if verify else False,
        allow_other_base=allow_other_base,
        progress=progress,
    )


@one_command()
def export(
    source: str | Path, out: str | Path, *, to: str = "soka", rank: int | None = None, dtype: str = "float32"
) -> ExportResult:
    """Write an adapter, or a training checkpoint, as a finished SoKA adapter or as a LoRA.

    Args:
        source: adapter or checkpoint directory.
        out: directory of the export; an earlier one in it is replaced as a whole, anything else refused.
        to: 'soka' (exact unless `rank` cuts it) or 'lora' (best approximation of rank `rank`).
        rank: terms, or LoRA rank.
        dtype: of the written tensors.

    Raises:
        SokaError: a source that is no adapter; `rank` missing for 'lora'.
    """
    import torch

    from soka_serve.adapter.export import export as run

    return run(
        Path(source),
        given_path(out, "out"),
        to=cast(Literal["soka", "lora"], to),
        rank=rank,
        dtype=getattr(torch, dtype),
    )
