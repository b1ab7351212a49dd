"""The manifest's reference, in Markdown, rendered from the schema.

`python -m soka_serve.manifest.docs` rewrites docs/manifest.md; a test holds the committed file against it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from soka_serve.io.toml_text import toml_value
from soka_serve.manifest.nodes import Node, expected, forms_of, resolve, tables
from soka_serve.manifest.schema import SCHEMA_VERSION
from soka_serve.manifest.starter import starter_manifest

_INTRO = f"""\
# The manifest

This page is the reference of all keys of a manifest: what each expects, its default and its meaning. A manifest is one
TOML file. `soka-serve init NAME` writes a starter, `soka-serve plan NAME.toml` shows what it would do, `soka-serve
build NAME.toml` does it. This is version {SCHEMA_VERSION} of the format.

The page is generated from `soka_serve/manifest/schema.py` by `python -m soka_serve.manifest.docs`; edit the schema, not
this file.

- Unknown keys are errors, and so are keys that another key makes meaningless. All problems of a file are reported at
  once, each with its line and column.
- Types are strict: `8` is not `"8"`; a whole number may stand where a number is expected.
- Relative paths start at the manifest's directory; `[output] dir` starts where the command runs.
- Rules (`[[adapt]]`) are read in order. A module that several rules match takes each key from the last rule that
  sets it. Without a rule, every linear projection in the language model's layers is adapted with one term. `plan` and
  `build` name what is not adapted: routers and experts, vision towers, convolutions, layers that the checkpoint has and
  the model has not.

## In an editor

`soka-serve schema > soka.schema.json` writes the JSON Schema. Editors with Taplo (Even Better TOML in VS Code)
complete and check a manifest whose first line is

```toml
#:schema ./soka.schema.json
```
"""


def manifest_reference() -> str:
    """Write the reference as Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _INTRO
    for header, table in tables():
        policy = table["properties"].get("policy", {}).get("const")
        if policy:
            yield f'## `[adapt.rank]` with `policy = "{policy}"`'
        else:
            yield f"## `{header}`" if header else "## Top level"
        yield ""
        yield " ".join(table.get("description", "").split())
        yield ""
        yield from _rows(table)
        yield ""
    yield "## A starter"
    yield ""
    yield "What `soka-serve init example` writes:"
    yield ""
    yield "```toml"
    yield starter_manifest("example").rstrip()
    yield "```"
    yield ""


def _rows(table: Node) -> Iterator[str]:
    yield "| key | expects | default | meaning |"
    yield "|---|---|---|---|"
    for key, raw in sorted(table["properties"].items(), key=lambda item: item[0] != "policy"):
        node = resolve(raw)
        if raw.get("default") is not None and not _is_table(node) and key != "policy":
            default = f"`{toml_value(raw['default'])}`"
        else:
            default = "required" if key in ("policy", *table.get("required", ())) else "–"
        meaning = raw.get("description") or node.get("description", "")
        yield f"| `{key}` | {_cell(expected(node))} | {_cell(default)} | {_cell(' '.join(meaning.split()))} |"


def _is_table(node: Node) -> bool:
    """Whether a key is a table, or an array of them: its default is told by its own section."""
    return bool("properties" in node or forms_of(node)) or "properties" in resolve(node.get("items", {}))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(file: Path) -> None:
    """Write the reference to a file."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(manifest_reference(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/manifest.md"))
