"""The manifest of one run: the recipe of the suite, the rule of the method, and a setting of its grid."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

from pydantic import ValidationError

from soka_serve.comparison.suite import SHARED_KEYS, Contender, DataSet, Suite
from soka_serve.compiler.methods import METHODS
from soka_serve.manifest.schema import Manifest, Train

Setting: TypeAlias = tuple[tuple[str, float], ...]
"""A value for each axis, in the order of the grid."""


def refusal(suite: Suite, contender: Contender, axis: str, value: float) -> str | None:
    """Why an axis or one of its values cannot be set; None if it can."""
    key = contender.key_of(axis)
    if key.split(".")[0] not in ("train", "adapt") or key.removeprefix("train.") in ("steps", "seed", "data"):
        return "expected learning_rate, clip, scale, or a key of [train] or [[adapt]] with its table: 'train.left_lr'"
    try:
        manifest_of(suite, contender, suite.dataset[0], setting=((axis, value),), seed=0)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            return f"sets {key}, and manifests have no such key"
        return f"sets {key}, which does not take {value:g}: {first['msg']}"
    return None


def manifest_of(suite: Suite, contender: Contender, dataset: DataSet, *, setting: Setting, seed: int) -> Manifest:
    """The manifest of one run. A method that manifests do not know has the recipe of `lora`.

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
    for axis, value in setting:
        table, *inner, key = contender.key_of(axis).split(".")
        for start in values["adapt"] if table == "adapt" else (values["train"],):
            place = start
            for name in inner:
                place = place.setdefault(name, {})
            place[key] = value
    return Manifest.model_validate(values)
