"""An HTML page of results, in the style of the comparison's; needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from soka_serve.comparison.page import FOLDER
from soka_serve.compiler.report.page import environment

_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""


def render_page(title: str, body: str, filters: dict[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """The page: `body` is a Jinja template that begins with what it adds to the style; `values` are its names."""
    templates = environment(FOLDER, autoescape=True)
    templates.filters |= filters or {}
    assert templates.loader is not None
    source = templates.loader.get_source(templates, "compare.html.jinja")[0]
    style = source[source.index("<style>") : source.index("</style>")]
    return templates.from_string(f"{_HEAD}<title>{title}</title>\n{style}{body}").render(**values)
