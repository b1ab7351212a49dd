"""The keys of a suite for readers and editors: the page docs/suite.md and the JSON Schema."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

from soka_serve.comparison.docs import suite_reference
from soka_serve.comparison.suite import Claim, Contender, DataSet, Other, Protocol, Suite
from soka_serve.manifest.nodes import nodes_of, tables
from soka_serve.manifest.read import json_schema

ROOT = Path(__file__).resolve().parents[3]
SUITES = sorted((ROOT / "eval" / "suites").glob("*.toml"))
MINIMAL: dict[str, Any] = {
    "schema": 1,
    "name": "s",
    "base": {"builtin": "tiny"},
    "train": {"steps": 3},
    "dataset": [{"name": "math", "data": {"builtin": "math"}}],
    "method": [{"name": "a", "method": "lora", "grid": {"learning_rate": [1e-3]}}],
}


def test_the_committed_page_is_current() -> None:
    committed = (ROOT / "docs/suite.md").read_text(encoding="utf-8")
    assert committed == suite_reference(), "run: python -m soka_serve.comparison.docs"


def test_the_page_has_every_key_of_a_suite_and_links_to_those_of_a_manifest() -> None:
    text = suite_reference()
    for table in (Suite, Protocol, DataSet, Other, Contender, Claim, Suite.model_fields["train"].annotation):
        assert isinstance(table, type)
        assert issubclass(table, BaseModel)
        for name, field in table.model_fields.items():
            assert f"| `{field.alias or name}` |" in text
    for key, there in {"base": "base", "dataset.data": "traindata", "method.adapt": "adapt"}.items():
        section = text.partition(f"## `[{key}]`")[2].partition("\n## ")[0]
        assert f"(manifest.md#{there})" in section
        assert "| key |" not in section  # the manifest's page has the rows
    assert "adapt.rank" not in "\n".join(line for line in text.splitlines() if line.startswith("#"))


def test_every_key_of_a_suite_says_what_it_is_without_it() -> None:
    own = ("", "[protocol]", "[[dataset]]", "[[other]]", "[[method]]", "[[claim]]")
    with nodes_of(Suite):
        found = {header: table for header, table in tables() if header in own}
    assert tuple(found) == own
    for header, table in found.items():
        for key, node in table["properties"].items():
            assert node.get("description"), f"{header} {key}"
            known = key in table.get("required", ()) or node.get("default") not in (None, [])
            assert known or "default: " in node["description"].lower(), f"{header} {key}"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = json_schema(Suite, "suite")
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_what_editors_need(validator: jsonschema.Draft7Validator) -> None:
    schema = validator.schema
    assert schema["$id"] != json_schema()["$id"]
    assert schema["title"] == "soka-serve suite"
    text = json.dumps(schema)
    for word in ("null", "$defs", "prefixItems"):
        assert word not in text


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites_conform(validator: jsonschema.Draft7Validator, path: Path) -> None:
    validator.validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), 2),
        (("methods",), []),
        (("dataset",), []),
        (("train", "steps"), 0),
        (("train", "learning_rate"), 1e-3),
        (("protocol",), {"choose_by": "los"}),
        (("protocol",), {"seeds": []}),
        (("method", 0, "method"), "LoRA"),
        (("method", 0, "grid"), {}),
        (("method", 0, "grid", "learning_rate"), 1e-3),
        (("method", 0, "adapt"), [{"modules": ["q_proj"]}]),
        (("method", 0, "adapt"), {"rank": {"rank": 3}}),
        (("claim",), [{"candidate": "a"}]),
    ],
)
def test_both_refuse(validator: jsonschema.Draft7Validator, place: tuple[str | int, ...], value: object) -> None:
    suite = copy.deepcopy(MINIMAL)
    validator.validate(suite)
    Suite.model_validate(suite)
    table: Any = suite
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    assert not validator.is_valid(suite)
    with pytest.raises(ValidationError):
        Suite.model_validate(suite)
