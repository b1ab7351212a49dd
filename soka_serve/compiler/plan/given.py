"""Targets that start from a finished adapter: their ranks and shapes, and whether the adapter fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from soka_serve.base.target_modules import TargetModule, beyond_shape
from soka_serve.errors import CheckpointError, PlanError, name_some
from soka_serve.kron.shapes import check_shape, parallel_of
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.problems import dotted
from soka_serve.manifest.rules import RankFixed
from soka_serve.manifest.schema import Manifest

if TYPE_CHECKING:
    from soka_serve.adapter.given import GivenAdapter


def sources_of(targets: Sequence[TargetModule], key: str) -> list[str]:
    """What the rules of targets name with a key that their starts read, each once."""
    return sorted({t.rule.source for t in targets if t.rule.start.source == key and t.rule.source})


def settle_targets(
    targets: Sequence[TargetModule], manifest: Manifest, directory: Path, name_key: Callable[[TomlPath], str] = dotted
) -> tuple[list[TargetModule], dict[str, GivenAdapter]]:
    """The targets, those that start from an adapter with its ranks and factor shapes, and the adapters.

    Args:
        targets: what `resolve_targets` returned.
        manifest: for messages.
        directory: of the manifest, where relative paths start.
        name_key: what messages call a key of the manifest, such as `LoadedManifest.name_key`.

    Returns:
        The targets in their order, and the adapters by what the manifest calls them.

    Raises:
        CheckpointError: no adapter, of another kind, or damaged.
        PlanError: all that does not fit: modules that an adapter lacks or that no rule takes from it, other shapes, or
            such as have too few terms.
    """
    adapters = {source: _open(source, manifest, directory, name_key) for source in sources_of(targets, "adapter")}
    settled, problems = [], []
    left = {source: set(adapter.terms) for source, adapter in adapters.items()}
    lacking: dict[str, list[str]] = {}
    for target in targets:
        source, name = target.rule.source, target.module.name
        if target.rule.start.source != "adapter" or source is None:
            settled.append(target)
            continue
        left[source].discard(name)
        if name not in adapters[source].terms:
            lacking.setdefault(source, []).append(name)
            continue
        rank, shape = adapters[source].terms[name]
        size = (target.module.out_features, target.module.in_features)
        try:
            check_shape(shape, *size, module=name, tp=target.rule.tp, parallel=parallel_of(name))
        except PlanError as error:
            problems.append(f"{_key(manifest, source, name_key)}: {error.message}")
            continue
        rule = target.rule.model_copy(update={"rank": RankFixed(rank=min(rank, shape.max_rank))})
        settled.append(replace(target, rule=rule, shape=shape))
        problems += [f"{name_key(place)}: {message} ({name})" for place, message in beyond_shape(manifest, settled[-1])]
    for source, names in lacking.items():
        problems.append(
            f"{_key(manifest, source, name_key)}: the adapter has no terms for {name_some(names)}, which the rule "
            "starts from it"
        )
    for source, rest in left.items():
        if rest:
            problems.append(
                f"{_key(manifest, source, name_key)}: no rule starts {name_some(sorted(rest))} from the adapter, whose "
                "change there would be lost"
            )
    if problems:
        raise PlanError(
            "\n".join(problems), hint="`soka-serve inspect ADAPTER` lists an adapter's modules and factor shapes."
        )
    return settled, adapters


def check_base(
    adapters: dict[str, GivenAdapter], base_sha256: str, manifest: Manifest, name_key: Callable[[TomlPath], str]
) -> None:
    """Refuse adapters whose soka.lock names other base weights, and those of a base in other bits.

    Raises:
        PlanError: names them.
    """
    problems = [
        f"{_key(manifest, source, name_key)}: {adapter.directory} was made for other base weights "
        f"({adapter.base_sha256[:12]} in its soka.lock; this base's are {base_sha256[:12]})"
        for source, adapter in adapters.items()
        if adapter.base_sha256 not in (None, base_sha256) and adapter.base_sha256
    ]
    bits = manifest.base.quantize
    problems += [
        f"{_key(manifest, source, name_key)}: {adapter.directory} adds to a base in {adapter.quantize}; base.quantize "
        f"is {bits!r}"
        for source, adapter in adapters.items()
        if adapter.quantize not in (None, bits)
    ]
    if problems:
        raise PlanError("\n".join(problems), hint="Its terms add to the weights that it was trained with.")


def _open(source: str, manifest: Manifest, directory: Path, name_key: Callable[[TomlPath], str]) -> GivenAdapter:
    from soka_serve.adapter.given import open_given  # which loads torch
    from soka_serve.adapter.remote.address import is_url
    from soka_serve.adapter.remote.fetch import local_adapter
    from soka_serve.adapter.remote.problems import FetchError

    try:
        return open_given(local_adapter(source) if is_url(source) else directory / Path(source).expanduser())
    except FetchError as error:
        message = f"{_key(manifest, source, name_key)}: {error.message}"
        raise FetchError(message, hint=error.hint, kind=error.kind) from error
    except CheckpointError as error:
        raise CheckpointError(f"{_key(manifest, source, name_key)}: {error.message}", hint=error.hint) from error


def _key(manifest: Manifest, source: str, name_key: Callable[[TomlPath], str]) -> str:
    rule = next(i for i, rule in enumerate(manifest.adapt) if rule.adapter == source)
    return name_key(("adapt", rule, "adapter"))
