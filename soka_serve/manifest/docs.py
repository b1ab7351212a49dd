"""The manifest's reference, in Markdown, rendered from the schema, and what renders that of any such schema.

`python -m soka_serve.manifest.docs` rewrites docs/manifest.md; a test holds the committed file against it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from soka_serve.io.toml_text import toml_value
from soka_serve.manifest.nodes import Node, expected, forms_of, nodes_of, resolve, tables
from soka_serve.manifest.schema import SCHEMA_VERSION, Manifest
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
- A comparison suite is another file, with keys of its own: [the suite](suite.md).

## In an editor

`soka-serve schema > soka.schema.json` writes the JSON Schema. Editors with Taplo (Even Better TOML in VS Code)
complete and check a manifest whose first line is

```toml
#:schema ./soka.schema.json
```
"""


_STARTER = """\
## A starter

What `soka-serve init example` writes:

```toml
{text}
```
"""


def manifest_reference() -> str:
    """Write the manifest's reference as Markdown."""
    return reference(Manifest, _INTRO) + _STARTER.format(text=starter_manifest("example").rstrip())


def reference(model: type[BaseModel], intro: str, linked: Sequence[tuple[Node, str]] = ()) -> str:
    """Write the reference of a file's keys as Markdown: a section for each of its tables.

    Args:
        model: the schema of the whole file.
        intro: the page's heading and what precedes the tables.
        linked: tables that another page has, with a link to each. Where the model has the same table, the link stands
            in place of the rows, and no section follows for the tables inside it.
    """
    with nodes_of(model):
        return "".join(f"{line}\n" for line in (intro, *_sections(linked)))


def links_to(page: str, model: type[BaseModel]) -> list[tuple[Node, str]]:
    """The tables of a model, each with a link to its section of a page that `reference` wrote of the model."""
    with nodes_of(model):
        found = [(table, _heading(header, table)) for header, table in tables()]
    return [(table, f"[{heading}]({page}#{_anchor(heading)})") for table, heading in found]


def _sections(linked: Sequence[tuple[Node, str]]) -> Iterator[str]:
    told: list[str] = []  # names of tables that a link stands for
    for header, table in tables():
        name = header.strip("[]")
        if any(name == outer or name.startswith(f"{outer}.") for outer in told):
            continue
        yield f"## {_heading(header, table)}"
        yield ""
        yield " ".join(table.get("description", "").split())
        yield ""
        if link := next((link for node, link in linked if node == table), None):
            told.append(name)
            yield f"Its keys are those of {link}."
        else:
            yield from _rows(table)
        yield ""


def _heading(header: str, table: Node) -> str:
    policy = table["properties"].get("policy", {}).get("const")
    if policy:
        return f'`{header}` with `policy = "{policy}"`'
    return f"`{header}`" if header else "Top level"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


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


def write_page(text: str, default: str) -> None:
    """Write a page to the file that the command line names, or else to the default one."""
    file = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_page(manifest_reference(), "docs/manifest.md")
