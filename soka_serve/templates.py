"""Jinja2 templates of a manifest (prompt, completion) and of tokenizers (chat). No torch.

Both run in Jinja2's sandbox: a template comes with a dataset or a tokenizer, and is not trusted with Python objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from soka_serve.errors import DataError

DEFAULT_PROMPT = "{{ prompt }}"
DEFAULT_COMPLETION = "{{ completion }}"


class _NullValueError(Exception):
    """A template wrote a null."""


def _refuse_null(value: object) -> object:
    # Jinja would write the word "None" into the training text.
    if value is None:
        raise _NullValueError
    return value


@cache
def _environment() -> SandboxedEnvironment:
    return SandboxedEnvironment(
        undefined=StrictUndefined, finalize=_refuse_null, autoescape=False, keep_trailing_newline=True
    )


class RowTemplate:
    """One template of the manifest, rendered with a row's columns as variables.

    Args:
        text: the Jinja2 source.
        key: its dotted key in the manifest, for errors: 'train.data.prompt'.

    Raises:
        DataError: the template does not parse.
    """

    def __init__(self, text: str, key: str) -> None:
        self.text = text
        self.key = key
        try:
            self._template = _environment().from_string(text)
            self.columns = frozenset(meta.find_undeclared_variables(_environment().parse(text)))
        except TemplateSyntaxError as error:
            raise DataError(f"{key}: template line {error.lineno}: {error.message}") from None

    def render(self, row: Mapping[str, Any], where: str) -> str:
        """Render one row.

        Raises:
            DataError: the row lacks a column (named, with the columns there are), a value is null, or the template
                fails in another way. `where` says which row: 'train.jsonl:12'.
        """
        try:
            return self._template.render(row)
        except UndefinedError as error:
            missing = sorted(self.columns - set(row))
            if not missing:
                raise DataError(f"{where}: {self.key}: {error.message}") from None
            raise DataError(
                f"{where}: {self.key} names {_columns(missing)}, which the row does not have; it has "
                f"{_columns(sorted(row))}",
                hint=self._hint(missing, row),
            ) from None
        except _NullValueError:
            nulls = sorted(name for name in self.columns if row.get(name) is None)
            raise DataError(
                f"{where}: {self.key}: {_columns(nulls) if nulls else 'an expression'} is null",
                hint="Give a default in the template: {{ column or '' }}.",
            ) from None
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(f"{where}: {self.key}: the template fails: {type(error).__name__}: {error}") from None

    def _hint(self, missing: Sequence[str], row: Mapping[str, Any]) -> str:
        near = {name: get_close_matches(name, list(row), n=1, cutoff=0.6) for name in missing}
        tips = [f"did you mean '{found[0]}' for '{name}'?" for name, found in near.items() if found]
        if tips:
            return "; ".join(tips).capitalize()
        return f"Write {self.key} over the columns there are, such as '{{{{ {next(iter(sorted(row)), 'text')} }}}}'."


def _columns(names: Sequence[str]) -> str:
    quoted = ", ".join(f"'{name}'" for name in names)
    return ("column " if len(names) == 1 else "columns ") + (quoted or "none")


# ------------------------------------------------------------------------------------------------ chat templates


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for other trainers; here the body is only rendered."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> Node | list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


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
def _chat_environment() -> ImmutableSandboxedEnvironment:
    # The settings that chat templates are written for: transformers, `utils/chat_template_utils.py`.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@cache
def _chat_template(source: str) -> Any:
    return _chat_environment().from_string(source)


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Render chat messages as transformers' `apply_chat_template(..., tokenize=False)` does.

    Args:
        source: the tokenizer's chat template.
        messages: (role, content) mappings.
        add_generation_prompt: end with the header of the assistant's turn.
        special_tokens: 'bos_token', 'eos_token', … by name.

    Raises:
        DataError: the template does not parse, or refuses these messages.
    """
    try:
        return str(
            _chat_template(source).render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        )
    except TemplateSyntaxError as error:
        raise DataError(f"chat template, line {error.lineno}: {error.message}") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(f"the chat template refuses the messages: {error}") from None
