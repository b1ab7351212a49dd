"""The suite's reference, in Markdown, rendered from its schema.

`python -m soka_serve.comparison.docs` rewrites docs/suite.md; a test holds the committed file against it.
"""

from __future__ import annotations

from soka_serve.comparison.suite import Suite
from soka_serve.manifest.docs import links_to, reference, write_page
from soka_serve.manifest.schema import SCHEMA_VERSION, Manifest

_INTRO = f"""\
# The suite

This page is the reference of all keys of a comparison suite: what each expects, its default and its meaning. A suite is
one TOML file, which `soka-serve compare SUITE.toml` reads; `--dry-run` shows what it would run.
[Comparing methods](comparing.md) has an example and the protocol, `eval/suites/` the suites that ship. This is version
{SCHEMA_VERSION} of the format.

The page is generated from `soka_serve/comparison/suite.py` by `python -m soka_serve.comparison.docs`; edit the schema,
not this file.

- Unknown keys are errors, and so are keys that another key makes meaningless. All problems of a file are reported at
  once, each with its line and column.
- Types are strict, as in [a manifest](manifest.md).
- Relative paths start at the suite's directory, or at the folder that `--root` names.
- Tables that a manifest has too have the manifest's keys. Where the manifest's page says "relative to the manifest",
  the line above holds in a suite.

## In an editor

`soka-serve schema --suite > suite.schema.json` writes the JSON Schema. [The editors that read a manifest's
schema](manifest.md#in-an-editor) complete and check a suite whose first line is

```toml
#:schema ./suite.schema.json
```
"""


def suite_reference() -> str:
    """Write the suite's reference as Markdown."""
    return reference(Suite, _INTRO, links_to("manifest.md", Manifest))


if __name__ == "__main__":
    write_page(suite_reference(), "docs/suite.md")
