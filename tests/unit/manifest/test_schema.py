"""The JSON Schema: valid itself, and of one mind with the models."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import Field, ValidationError

from soka_serve.manifest.nodes import tables
from soka_serve.manifest.read import json_schema
from soka_serve.manifest.rules import Adapt
from soka_serve.manifest.schema import Base, Data, Manifest, Output, Train
from soka_serve.manifest.starter import starter_manifest
from soka_serve.manifest.table import Table

ROOT = Path(__file__).resolve().parents[3]
MINIMAL: dict[str, Any] = {"schema": 1, "base": {"builtin": "tiny"}, "train": {"data": {"builtin": "math"}}}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_what_editors_need() -> None:
    schema = json_schema()
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["$id"]
    assert schema["title"] == "soka-serve manifest"
    assert "schema" in schema["properties"]
    assert "version" not in schema["properties"]
    text = json.dumps(schema)
    assert "null" not in text  # TOML has none
    assert "$defs" not in text
    assert "prefixItems" not in text


def test_every_key_is_described_once_and_every_table_is_closed() -> None:
    schema = json_schema()
    for name, table in {"Manifest": schema, **schema["definitions"]}.items():
        assert table["additionalProperties"] is False, name
        assert table["description"], name
        for key, node in table["properties"].items():
            target = node.get("$ref", "").removeprefix("#/definitions/")
            assert node.get("description") or schema["definitions"][target]["description"], f"{name}.{key}"


def test_optional_keys_have_a_default_or_an_example() -> None:
    tableless = {"base", "data", "train", "output", "serve", "eval", "adapt", "rank", "prune", "regularise"}
    for header, table in tables():
        for key, node in table["properties"].items():
            if key in tableless or key in table.get("required", ()):
                continue
            assert node.get("default") is not None or node.get("examples"), f"{header} {key}"


def test_shipped_manifests_and_the_starter_conform(validator: jsonschema.Draft7Validator) -> None:
    texts = [path.read_text() for path in sorted((ROOT / "manifests").rglob("*.toml"))] + [starter_manifest("x")]
    for text in texts:
        validator.validate(tomllib.loads(text))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), 2),
        (("nmae",), "x"),
        (("name",), "../x"),
        (("base", "builtin"), "tinny"),
        (("base", "trust_remote_code"), True),
        (("adapt",), []),
        (("adapt",), [{"rank": {"rank": 3}}]),
        (("adapt",), [{"rank": {"policy": "fixed", "threshold": 0.5}}]),
        (("adapt",), [{"rank": {"policy": "budget"}}]),
        (("adapt",), [{"rank": 4}]),
        (("adapt",), [{"layers": "al"}]),
        (("adapt",), [{"layers": 3}]),
        (("adapt",), [{"shape": [1, 2, 3]}]),
        (("adapt",), [{"shape": "ballanced"}]),
        (("adapt",), [{"modules": "q_proj"}]),
        (("train", "batch_size"), 0),
        (("train", "batch_size"), "8"),
        (("train", "learning_rate"), 0),
        (("train", "warmup_frac"), 1),
        (("train", "packing"), 1),
        (("output",), {"write": []}),
        (("output",), {"write": ["mergd"]}),
        (("serve",), {"port": 65536}),
    ],
)
def test_both_refuse(validator: jsonschema.Draft7Validator, place: tuple[str, ...], value: object) -> None:
    manifest = json.loads(json.dumps(MINIMAL))
    validator.validate(manifest)
    Manifest.model_validate(manifest)
    table = manifest
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    assert not validator.is_valid(manifest)
    with pytest.raises(ValidationError):
        Manifest.model_validate(manifest)


@pytest.mark.parametrize("layers", ["all", "0", "0-15", "4-", "-4-", [0, 2, 4]])
def test_both_accept_layers(validator: jsonschema.Draft7Validator, layers: object) -> None:
    manifest = {**MINIMAL, "adapt": [{"layers": layers}]}
    validator.validate(manifest)
    Manifest.model_validate(manifest)


def test_python_callers_meet_the_same_checks() -> None:
    assert Base(builtin="tiny").builtin == "tiny"
    with pytest.raises(ValidationError, match="exclude each other"):
        Base(builtin="tiny", hub="a/b")
    with pytest.raises(ValidationError, match="steps and epochs"):
        Train(data=Data(builtin="math"), steps=1, epochs=1)
    with pytest.raises(ValidationError, match="needs evaluation data"):
        Train(data=Data(jsonl="x"), eval_every=1)
    with pytest.raises(ValidationError, match="max_grad_norm and clip exclude each other"):
        Train(steps=1, data=Data(builtin="math"), clip=2.0, max_grad_norm=1.0)
    with pytest.raises(ValidationError, match="scale does not go with init = 'delta'"):
        Adapt(init="delta", scale=0.5)
    with pytest.raises(ValidationError, match="adapter_terms belongs to method = 'soka'; the method is 'lora'"):
        Manifest.model_validate(
            {**MINIMAL, "train": {**MINIMAL["train"], "method": "lora"}, "output": Output(adapter_terms="trained")}
        )
    with pytest.raises(ValidationError, match="trained whole"):
        Manifest.model_validate(
            {**MINIMAL, "base": Base(builtin="tiny", quantize="8bit"), "train": {**MINIMAL["train"], "method": "full"}}
        )


def test_a_key_that_repeats_its_default_contradicts_nothing() -> None:
    assert Data(jsonl="x", split="train").split == "train"
    with pytest.raises(ValidationError, match="split belongs to hub"):
        Data(jsonl="x", split="test")


def test_a_later_key_leaves_dumps_as_they_were() -> None:
    """Dumps go into stored hashes, nested tables with them."""

    class Inner(Table):
        LATER = frozenset({"new"})
        old: int = 1
        new: tuple[int, ...] = ()

    class Outer(Table):
        inner: Inner = Field(default_factory=Inner)
        many: tuple[Inner, ...] = (Inner(),)

    assert Outer().model_dump(mode="json") == {"inner": {"old": 1}, "many": [{"old": 1}]}
    changed = Outer(inner=Inner(new=(2,)))
    assert changed.model_dump()["inner"] == {"old": 1, "new": (2,)}
    assert Outer.model_validate(Outer().model_dump()) == Outer()
    assert Outer.model_validate(changed.model_dump()) == changed
