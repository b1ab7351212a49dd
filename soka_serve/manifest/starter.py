"""The manifest that `soka-serve init NAME` writes, rendered from the schema."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from soka_serve.errors import ManifestError, ManifestProblem
from soka_serve.io.toml_text import toml_value
from soka_serve.manifest.nodes import Node, below, expected, forms_of, policies_of, resolve, root
from soka_serve.manifest.schema import NAME_PATTERN, SCHEMA_VERSION
from soka_serve.manifest.table import TABLE_FORM

_WIDTH = 100

# Per table, the keys that a first manifest meets; a value is written out, None leaves the key commented, at its
# default or, where there is none, at an example.
_KEYS: dict[str, dict[str, Any]] = {
    "[base]": {"builtin": "tiny", "path": None, "hub": None, "revision": None, "dtype": None, "quantize": None},
    "[[adapt]]": {
        **{"modules": ..., "layers": None, "shape": None, "init": ..., "scale": None, "rank": ...},
    },
    "[train]": {
        **{"method": None, "steps": 300, "epochs": None, "batch_size": 32, "learning_rate": None, "max_length": None},
        **{"precision": None, "gradient_checkpointing": None, "seed": None},
    },
    "[train.data]": {
        **{"builtin": "math", "jsonl": None, "hub": None, "config": None, "prompt": None, "completion": None},
        **{"messages": None, "eval_jsonl": None, "eval_split": None, "eval_frac": None},
    },
    "[output]": {"write": ["adapter", "merged"], "dir": None},
    "[serve]": {"name": None, "port": None},
    "[eval]": {"limit": None, "tasks": None},
}


def starter_manifest(name: str) -> str:
    """Write a commented manifest that builds as it is: the embedded base on its word problems.

    Args:
        name: the build's name.

    Raises:
        ManifestError: the name cannot name a build.
    """
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > 100:
        wanted = expected(below(root(), "name") or {})
        raise ManifestError(name, [ManifestProblem("name", f"expected {wanted}; got {name!r}")])
    return "\n".join(_lines(name)) + "\n"


def default_or_example(raw: Node) -> Any:
    """A key's default; its first example where it has none."""
    default = raw.get("default")
    return raw.get("examples", [None])[0] if default is None else default


def _lines(name: str) -> Iterator[str]:
    yield f"# {name}: a soka-serve manifest."
    yield "#"
    yield f"#   soka-serve plan {name}.toml     what would run; loads no weights"
    yield f"#   soka-serve build {name}.toml    choose ranks, initialise, fine-tune, write the artefacts"
    yield "#"
    yield "# Lines that are commented out show a key's default or, where it has none, an example."
    yield "# Every key: docs/manifest.md; for editors: `soka-serve schema`."
    yield ""
    top = root()["properties"]
    yield from _comment(top["schema"]["description"])
    yield f"schema = {SCHEMA_VERSION}"
    yield from _comment(top["name"]["description"])
    yield f"name = {toml_value(name)}"
    for header, keys in _KEYS.items():
        table = _table(header)
        yield ""
        yield from _comment(table["description"])
        yield header
        for key, value in keys.items():
            yield from _key(key, table["properties"][key], value)


def _key(key: str, raw: Node, value: Any) -> Iterator[str]:
    yield from _comment(raw["description"])
    policies = policies_of(resolve(raw))
    if policies:
        yield from _policies(key, policies)
        return
    shown = default_or_example(raw) if value is None or value is ... else value
    yield f"{'# ' if value is None else ''}{key} = {toml_value(shown)}"


def _policies(key: str, policies: dict[str, Node]) -> Iterator[str]:
    for i, (policy, table) in enumerate(policies.items()):
        given = {"policy": policy}
        given |= {
            name: default_or_example(raw)
            for name, raw in table["properties"].items()
            if name != "policy" and ("default" in raw or "examples" in raw)
        }
        if i:
            yield from _comment(table["description"])
        yield f"{'# ' if i else ''}{key} = {toml_value(given)}"


def _table(header: str) -> Node:
    node = root()
    for part in header.strip("[]").split("."):
        child = resolve(node["properties"][part])
        child = forms_of(child).get(TABLE_FORM, child)
        node = resolve(child["items"]) if "items" in child else child
    return node


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent="# ", subsequent_indent="# ")
