"""The Jinja2 environments of templates, and which templates can be rendered without a limit.

Both are sandboxed and immutable: a template comes with a manifest, a dataset or a tokenizer, and is not trusted with
Python objects. `soka_serve.manifest.template_child` renders those that loop or compute, within limits.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 200_000  # characters of a template; chat templates in use have up to 30,000

# What a template of linear cost consists of: no loop, no macro, no variable of its own, nothing that multiplies.
_PLAIN_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem,
    nodes.Slice, nodes.Call, nodes.Filter, nodes.Test, nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand,
    nodes.CondExpr, nodes.If, nodes.Concat, nodes.Add, nodes.Neg,
)  # fmt: skip
_PLAIN_FILTERS = {
    "capitalize", "count", "d", "default", "first", "int", "last", "length", "lower", "replace", "string", "title",
    "tojson", "trim", "upper",
}  # fmt: skip
_PLAIN_METHODS = {
    "capitalize", "count", "endswith", "find", "get", "items", "keys", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rpartition", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
    "values",
}  # fmt: skip
_PLAIN_TEXT = 20_000  # characters
_PLAIN_NAMES = 16  # a column may be written so many times


class NullValueError(Exception):
    """A template wrote a null."""


def _refuse_null(value: object) -> object:
    # Jinja would write the word "None" into the training text.
    if value is None:
        raise NullValueError
    return value


@cache
def row_environment() -> ImmutableSandboxedEnvironment:
    """For a manifest's prompt and completion."""
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_refuse_null, autoescape=False, keep_trailing_newline=True
    )


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for other trainers; here the body is only rendered."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters, which would change the text.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@cache
def chat_environment() -> ImmutableSandboxedEnvironment:
    """For a tokenizer's chat template, with the settings of transformers' `utils/chat_template_utils.py`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def is_plain(tree: nodes.Template, text: str) -> bool:
    """Whether rendering takes time and memory in proportion to the template and the row, whatever the row holds."""
    if len(text) > _PLAIN_TEXT:
        return False
    names = 0
    for node in [tree, *tree.find_all(nodes.Node)]:
        names += isinstance(node, nodes.Name)
        if type(node) not in _PLAIN_NODES or names > _PLAIN_NAMES or not _is_plain_call(node):
            return False
    return True


def _is_plain_call(node: nodes.Node) -> bool:
    """Whether a call or filter is one of those whose result is no longer than what goes in; True for other nodes."""
    if isinstance(node, nodes.Filter):
        name, known = node.name, _PLAIN_FILTERS
    elif isinstance(node, nodes.Call):
        name, known = getattr(node.node, "attr", ""), _PLAIN_METHODS
    else:
        return True
    if name not in known or node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    if name != "replace":
        return True
    texts = [arg.value for arg in node.args if isinstance(arg, nodes.Const) and isinstance(arg.value, str)]
    return len(texts) == len(node.args) == 2 and 0 < len(texts[0]) >= len(texts[1])


def names_of(tree: nodes.Template) -> frozenset[str]:
    """The names that a template reads: variables of the row, and those of its own."""
    return frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")


def own_names(tree: nodes.Template) -> frozenset[str]:
    """The names that a template gives values to: by `set`, loops and macros."""
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    return frozenset(stored | {macro.name for macro in tree.find_all(nodes.Macro)} | {"loop", "self", "caller"})


def environment_of(kind: str) -> Any:
    """The environment of 'row' or 'chat' templates."""
    return row_environment() if kind == "row" else chat_environment()
