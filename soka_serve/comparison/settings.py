"""The manifest of one run: the recipe of the suite, the rule of the method, and a setting of its grid."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, TypeAlias

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from soka_serve.comparison.suite import Contender, DataSet, Suite
from soka_serve.compiler.methods import METHODS, Method
from soka_serve.manifest.schema import Manifest

Setting: TypeAlias = tuple[tuple[str, float], ...]
"""A value for each axis, in the order of the grid."""

# Keys of [train] that runs have their own way with or that choose the problems, and those that only SoKA reads.
_NOT_SEARCHED = (
    "steps",
    "seed",
    "max_length",
    "data",
    "log_every",
    "eval_every",
    "save_every",
    "early_stopping",
    "answered",
)
_SOKA_KEYS = ("adapt.", "train.left_lr", "train.right_lr", "train.sigma_lr", "train.prune")


def refusal(suite: Suite, contender: Contender, axis: str, value: float) -> str | None:
    """Why an axis or one of its values cannot be set, whatever the others say; None if it can."""
    key = contender.key_of(axis)
    if key.split(".")[0] not in ("train", "adapt") or key.removeprefix("train.") in _NOT_SEARCHED:
        return "expected learning_rate, clip, scale, or a key of [train] or [[adapt]] with its table: 'train.left_lr'"
    if not _is_read(key, METHODS[contender.method]):
        return f"sets {key}, which method = {contender.method!r} does not read"
    wrong = _never(suite, contender, ((axis, value),))
    if wrong is None:
        return None
    if wrong["type"] == "extra_forbidden":
        return f"sets {key}, and manifests have no such key"
    return f"sets {key}, which does not take {value:g}: {_message(wrong, contender)}"


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
        if (wrong := _never(suite, contender, setting)) is not None:
            said = _message(wrong, contender)
            return f"its {setting[1][1]:g} does not go with {one} = {setting[0][1]:g}: {said}"
    return None


def mismatches(suite: Suite, contender: Contender) -> Iterator[tuple[tuple[str, str], str]]:
    """What of a method's words and axes does not go together, each value beside the first ones of the other axes.

    Yields:
        The table of the method and the key in it, and why.
    """
    seen = set()
    for axis, values in contender.grid.items():
        for value in values:
            for wrong in _wrong(suite, contender, _whole(contender, ((axis, value),))):
                place = _place(contender, wrong["loc"]) or ("grid", axis)
                if place not in seen:
                    seen.add(place)
                    yield place, _message(wrong, contender)


def _place(contender: Contender, found: tuple[int | str, ...]) -> tuple[str, str] | None:
    """Where the method says what an error of its manifest is about: one of its words, or an axis."""
    path = [part for part in found if isinstance(part, str)]
    for word in contender.words:
        if path[:2] == ["train", word]:
            return "train", word
    for axis in contender.grid:
        key = contender.key_of(axis).split(".")
        if key[: len(path)] == path or path[: len(key)] == key:
            return "grid", axis
    return None


def _message(wrong: ErrorDetails, contender: Contender) -> str:
    """An error's message, which names the recipe that a method borrows for the method."""
    recipe = _recipe_of(contender)
    return wrong["msg"].replace(f"the method is {recipe!r}", f"the method is {contender.method!r}")


def _never(suite: Suite, contender: Contender, setting: Setting) -> ErrorDetails | None:
    """What is wrong with values of axes alone, with the method's words, and with its other axes as well; None if they
    are taken once: what they miss, another key has."""
    wrong = [
        _wrong(suite, contender, setting, words=False),
        _wrong(suite, contender, setting),
        _wrong(suite, contender, _whole(contender, setting)),
    ]
    return wrong[0][0] if all(wrong) else None


def _whole(contender: Contender, setting: Setting) -> Setting:
    """A setting with the first value of every other axis that is a key at all."""
    others = {axis: value for axis, value in contender.first if "." in contender.key_of(axis)}
    return tuple((others | dict(setting)).items())


def _wrong(suite: Suite, contender: Contender, setting: Setting, *, words: bool = True) -> list[ErrorDetails]:
    """What manifests say of a setting."""
    try:
        manifest_of(suite, contender, suite.dataset[0], setting=setting, seed=0, words=words)
    except ValidationError as error:
        return error.errors()
    return []


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

    def plain(table: Any) -> dict[str, Any]:
        found: dict[str, Any] = table.model_dump(by_alias=True, exclude_none=True)
        return found

    train = plain(suite.train) | (contender.words if words else {})
    train |= {"method": _recipe_of(contender), "method_rank": contender.rank, "seed": seed, "log_every": 1}
    values: dict[str, Any] = {
        "schema": 1,
        "name": contender.name,
        "base": plain(suite.base),
        "adapt": [plain(contender.adapt)],
        "train": train | {"data": plain(dataset.data)},
    }
    for axis, value in setting:
        table, *inner, key = contender.key_of(axis).split(".")
        for start in values["adapt"] if table == "adapt" else (values["train"],):
            place = start
            for name in inner:
                place = place.setdefault(name, {})
            place[key] = value
    return Manifest.model_validate(values)


def _recipe_of(contender: Contender) -> str:
    """The method whose recipe it has in manifests."""
    return contender.method if METHODS[contender.method].in_manifests else "lora"
