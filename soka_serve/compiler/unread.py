"""Keys that a manifest sets and its method does not read: methods are compared by one word, so they may stay."""

from __future__ import annotations

from collections.abc import Iterator

from soka_serve.compiler.methods import METHODS
from soka_serve.manifest.schema import Manifest
from soka_serve.trained import PARTS

_CHOOSES = {"modules", "layers", "enabled"}  # of [[adapt]]: which modules, for every method with an adapter


def unread_keys(manifest: Manifest) -> list[str]:
    """What of a manifest its method leaves unread, as notes."""
    method, found = METHODS[manifest.train.method], list(_unread(manifest))
    notes = [f"method = {method.name!r} does not read {', '.join(found)}"] if found else []
    if method.whole_model and manifest.output.write == ("adapter",) and "write" in manifest.output.model_fields_set:
        notes.append(f"method = {method.name!r} has no adapter: the whole model is written, to merged")
    if method.whole_model and manifest.base.dtype not in ("auto", "float32"):
        notes.append(f"base.dtype is not that of training: method = {method.name!r} trains the model in float32")
    return notes


def _unread(manifest: Manifest) -> Iterator[str]:
    train, method = manifest.train, METHODS[manifest.train.method]
    keys: list[str] = []
    if not method.ranked:
        keys.append("method_rank")
    if not method.scaled:
        keys.append("method_scale")
    if not method.kronecker:
        # The gradients that "spectra" takes are those of the targets.
        read = set() if method.whole_model and "spectra" not in manifest.output.measure else _CHOOSES
        for index, rule in enumerate(manifest.adapt):
            yield from (
                f"adapt[{index}].{key}" for key in type(rule).model_fields if key in rule.model_fields_set - read
            )
        keys += [f"{part}_lr" for part in PARTS]
        if "adapter_dtype" in manifest.output.model_fields_set:
            yield "output.adapter_dtype"
    yield from (f"train.{key}" for key in keys if key in train.model_fields_set)
