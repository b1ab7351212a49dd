"""The manifest's JSON schema as nodes: which table a key belongs to, and what it expects, in English.

A node is one (sub)schema as pydantic prints it: a dict with `type`, `properties`, `anyOf`, `$ref` and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from soka_serve.io.scoped import scoped
from soka_serve.manifest.rules import LAYER_RANGE
from soka_serve.manifest.schema import NAME_PATTERN, Manifest
from soka_serve.manifest.table import ARRAY_FORM, TABLE_FORM

Node = dict[str, Any]
TomlPath = tuple[str | int, ...]

_TYPES = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a table",
}
_PATTERNS = {
    NAME_PATTERN: "a string of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    LAYER_RANGE: "'all' or a range such as '0-15', '4-' or '-4-'",
}


_model: ContextVar[type[BaseModel]] = ContextVar("model", default=Manifest)


def nodes_of(model: type[BaseModel]) -> AbstractContextManager[type[BaseModel]]:
    """Let this module describe another model than the manifest's, such as a comparison suite's."""
    return scoped(_model, model)


def root() -> Node:
    """The whole file's node. Do not change it: it is shared."""
    return _schema(_model.get())


@cache
def _schema(model: type[BaseModel]) -> Node:
    return model.model_json_schema(by_alias=True)


def resolve(node: Node) -> Node:
    """Follow a reference, and look past 'or null': TOML has no null."""
    while True:
        if "$ref" in node:
            node = root()["$defs"][node["$ref"].rsplit("/", 1)[-1]]
            continue
        options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
        if len(options) != 1:
            return node
        node = options[0]


@dataclass(frozen=True)
class Location:
    """The key that a pydantic location leads to.

    `path` is the location as TOML spells it, `node` what is expected there (None for an unknown key), `table` the
    node of the table that holds the last key, and `policies` the other tables it could have been.
    """

    path: TomlPath
    node: Node | None
    table: Node
    policies: dict[str, Node]


def walk(location: tuple[str | int, ...]) -> Location:
    """Follow a pydantic location, dropping the tags that it inserts for a choice between tables."""
    path: TomlPath = ()
    node: Node | None = root()
    table = root()
    policies: dict[str, Node] = {}
    for part in location:
        if node is not None and (choice := policies_of(node)):
            policies, node = choice, choice.get(str(part))
            continue
        if node is not None and (forms := forms_of(node)):
            node = forms.get(str(part)) or forms[ARRAY_FORM if isinstance(part, int) else TABLE_FORM]
            if part in forms:
                continue
        if node is not None and "properties" in node:
            table = node
        path = (*path, part)
        node = below(node, part) if node is not None else None
    return Location(path, node, table, policies)


def policies_of(node: Node) -> dict[str, Node]:
    """The tables that a node chooses between by their `policy`; empty for every other node."""
    if "discriminator" not in node:
        return {}
    options = [resolve(option) for option in node["oneOf"]]  # in the schema's order; the mapping is sorted
    return {option["properties"]["policy"]["const"]: option for option in options}


def forms_of(node: Node) -> dict[str, Node]:
    """The nodes of a key that takes a table or an array of tables; empty for every other node."""
    if "oneOf" not in node or "discriminator" in node:
        return {}
    return {ARRAY_FORM if "items" in form else TABLE_FORM: form for form in map(resolve, node["oneOf"])}


def below(node: Node, part: str | int) -> Node | None:
    """The node of a key in a table, or of an item in an array."""
    child = node.get("properties", {}).get(part) if isinstance(part, str) else node.get("items")
    child = child or node.get("additionalProperties") or None  # of a table whose keys are free
    return resolve(child) if child is not None else None


def tables() -> Iterator[tuple[str, Node]]:
    """All tables with their TOML header, in the schema's order; each rank policy has the header of its table."""

    def visit(header: str, path: str, node: Node) -> Iterator[tuple[str, Node]]:
        yield header, node
        for name, raw in node["properties"].items():
            child = resolve(raw)
            inner = f"{path}.{name}" if path else name
            if forms := forms_of(child):
                child = forms[TABLE_FORM]
                yield from visit(f"[{inner}]", inner, child)
                item = resolve(forms[ARRAY_FORM]["items"])
                own = {key: value for key, value in item["properties"].items() if key not in child["properties"]}
                yield f"[[{inner}]]", {**item, "properties": own, "required": []}
            elif "properties" in child:
                yield from visit(f"[{inner}]", inner, child)
            elif "properties" in (item := resolve(child.get("items", {}))):
                yield from visit(f"[[{inner}]]", inner, item)
            for policy in policies_of(child).values():
                yield f"[{inner}]", policy

    yield from visit("", "", root())


def expected(node: Node) -> str:
    """Say what a node accepts: 'a whole number, at least 1'."""
    node = resolve(node)
    if policies_of(node):
        return "a table with a policy"
    if forms := forms_of(node):
        return " or ".join(forms)
    if "anyOf" in node:
        return " or ".join(expected(option) for option in node["anyOf"])
    if "const" in node:
        return quote(node["const"])
    if "enum" in node:
        return one_of(node["enum"])
    if node.get("pattern") in _PATTERNS:
        return _PATTERNS[node["pattern"]]
    if node.get("type") == "array":
        return _expected_array(node)
    text = "a non-empty string" if node.get("minLength") else _TYPES[node["type"]]
    limits = [
        f"{word} {node[key]:g}"
        for key, word in (
            ("exclusiveMinimum", "above"),
            ("minimum", "at least"),
            ("exclusiveMaximum", "below"),
            ("maximum", "at most"),
        )
        if key in node
    ]
    return ", ".join([text, *limits])


def _expected_array(node: Node) -> str:
    if "prefixItems" in node:
        return "four whole numbers [m, n, p, q], each at least 1"
    item = resolve(node["items"])
    if "enum" in item:
        what = f"an array of {one_of(item['enum'], 'and')}"
    elif "properties" in item:
        what = "an array of tables"
    else:
        what = f"an array of {_TYPES[item['type']].split(' ', 1)[-1]}s"
    return f"{what}, at least {node['minItems']}" if node.get("minItems") else what


def one_of(words: list[Any], last: str = "or") -> str:
    """'a', 'b' or 'c'."""
    quoted = [quote(word) for word in words]
    return f"{', '.join(quoted[:-1])} {last} {quoted[-1]}" if len(quoted) > 1 else quoted[0]


def quote(word: object) -> str:
    """A word as messages show it."""
    return f"'{word}'" if isinstance(word, str) else str(word)
