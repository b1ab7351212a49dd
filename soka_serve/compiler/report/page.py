"""Write report.html: one self-contained page that shows what a build did.

The page holds its own styles and pictures, has no script, and forbids itself every request (Content-Security-Policy).
Model output is untrusted: everything passes through Jinja's autoescape.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from soka_serve.compiler.report.data import ReportData
from soka_serve.compiler.report.view import page_context
from soka_serve.io.files import write_text_atomic
from soka_serve.io.text import count, dims, duration, moment, percent, size, times, value_text, visible, words


def write_report(path: Path, data: ReportData) -> None:
    """Write report.html atomically.

    Raises:
        BuildError: when the disk is full or the place not writable.
    """
    write_text_atomic(path, render_report(data))


def render_report(data: ReportData) -> str:
    """The whole page as HTML."""
    page = environment(autoescape=True).get_template("report.html.jinja").render(page_context(data))
    # A lone surrogate, which JSON can smuggle into a sample, has no UTF-8 form.
    return page.encode("utf-8", "replace").decode("utf-8")


def environment(folder: Path | None = None, *, autoescape: bool) -> Environment:
    """The Jinja environment of the templates in `folder`; None: those that lie beside this file."""
    env = Environment(
        loader=FileSystemLoader(folder or Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    named = (count, dims, duration, moment, percent, size, times, visible, words)
    env.filters |= {"value": value_text, **{function.__name__: function for function in named}}
    return env
