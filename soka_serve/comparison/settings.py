"""The manifest of one run: the recipe of the suite, the rule of the method, and a setting of its grid."""

from __future__ import annotations

from itertools import product
from typing import Any, TypeAlias, cast

from pydantic import ValidationError

from soka_serve.comparison.suite import SHARED_KEYS, Contender, DataSet, Suite
from soka_serve.compiler.methods import METHODS, Method
from soka_serve.manifest.schema import Manifest, Train

Setting: TypeAlias = tuple[tuple[str, float], ...]
"""A value for each axis, in the order of the grid."""

# Keys of [train] that runs have their own way with, and those that only SoKA's training depends on.
_NOT_SEARCHED = ("steps", "seed", "data", "log_every", "eval_every", "save_every", "early_stopping", "answered")
_SOKA_KEYS = ("adapt.", "train.left_lr", "train.right_lr", "train.sigma_lr", "train.prune")


def refused_words(suite: Suite, contender: Contender) -> dict[str, str]:
    """Why words of a method's own [train] do not go with the rest of it, by key."""
    first = tuple((axis, values[0]) for axis, values in contender.grid.items())
    try:
        manifest_of(suite, contender, suite.dataset[0], setting=first, seed=0)
    except ValidationError as error:
        said = {str(e["loc"][-1]): e["msg"] for e in error.errors() if e["loc"][:1] == ("train",)}
        return {key: said[key] for key in contender.words if key in said}
    return {}


def refusal(suite: Suite, contender: Contender, axis: str, value: float) -> str | None:
    """Why an axis or one of its values cannot be set, whatever words the method has; None if it can."""
    key = contender.key_of(axis)
    if key.split(".")[0] not in ("train", "adapt") or key.removeprefix("train.") in _NOT_SEARCHED:
        return "expected learning_rate, clip, scale, or a key of [train] or [[adapt]] with its table: 'train.left_lr'"
    if not _is_read(key, METHODS[contender.method]):
        return f"sets {key}, which method = {contender.method!r} does not read"
    try:
        manifest_of(suite, contender, suite.dataset[0], setting=((axis, value),), seed=0, words=False)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            return f"sets {key}, and manifests have no such key"
        return f"sets {key}, which does not take {value:g}: {first['msg']}"
    return None


def _is_read(key: str, method: Method) -> bool:
    """Whether a method's training depends on a key at all."""
    if key == "train.method_scale":
        return method.scaled
    if key == "train.method_rank":
        return method.ranked
    return method.kronecker or not key.startswith(_SOKA_KEYS)


def disagreement(suite: Suite, contender: Contender, axes: tuple[str, str]) -> str | None:
    """Why two axes, whose values are taken one by one, do not go together; None if they do."""
    one, other = axes
    if contender.key_of(one) == contender.key_of(other):
        return f"sets {contender.key_of(one)}, as {one} does"
    for setting in product(*([(axis, value) for value in contender.grid[axis]] for axis in axes)):
        try:
            manifest_of(suite, contender, suite.dataset[0], setting=setting, seed=0, words=False)
        except ValidationError as error:
            return f"its {setting[1][1]:g} does not go with {one} = {setting[0][1]:g}: {error.errors()[0]['msg']}"
    return None


def manifest_of(
    suite: Suite, contender: Contender, dataset: DataSet, *, setting: Setting, seed: int, words: bool = True
) -> Manifest:
    """The manifest of one run. A method that manifests do not know has the recipe of `lora`.

    Args:
        setting: values of axes, or of some of them.
        words: with the method's own [train], which may need an axis that `setting` lacks.

    Raises:
        pydantic.ValidationError: the setting has a key that manifests lack, or a value that it does not take.
    """
    shared: Any = suite.train
    train = Train(
        method=cast(Any, contender.method if METHODS[contender.method].in_manifests else "lora"),
        method_rank=contender.rank,
        data=dataset.data,
        seed=seed,
        log_every=1,
        **{name: getattr(shared, name) for name in SHARED_KEYS},
    )
    manifest = Manifest(schema=1, name=contender.name, base=suite.base, adapt=(contender.adapt,), train=train)
    values = manifest.model_dump(by_alias=True, exclude_none=True)
    if words:
        values["train"] |= contender.words
    for axis, value in setting:
        table, *inner, key = contender.key_of(axis).split(".")
        for start in values["adapt"] if table == "adapt" else (values["train"],):
            place = start
            for name in inner:
                place = place.setdefault(name, {})
            place[key] = value
    return Manifest.model_validate(values)
