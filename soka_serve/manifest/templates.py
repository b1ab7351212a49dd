"""Jinja2 templates of a manifest (prompt, completion) and of tokenizers (chat).

A template of linear cost is rendered here; any other in a process of its own, `soka_serve.manifest.template_child`,
with limits on time, memory and text: `{% for i in range(10**5) %}` in itself is small, and in another one has no end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from soka_serve.errors import DataError
from soka_serve.manifest import template_env
from soka_serve.manifest.template_child import MAX_TEXT, RenderResult, render

DEFAULT_PROMPT = "{{ prompt }}"
DEFAULT_COMPLETION = "{{ completion }}"

_MAX_DEPTH = 100
_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def parse_template(text: str, environment: SandboxedEnvironment | None = None) -> nodes.Template:
    """The syntax tree of a template; nothing of it is evaluated.

    Raises:
        ValueError: it does not parse, or is too long; says where.
    """
    if len(text) > template_env.MAX_TEMPLATE:
        raise ValueError(f"the template has {len(text):,} characters; at most {template_env.MAX_TEMPLATE:,} are read")
    try:
        tree = (environment or template_env.row_environment()).parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the template: {error.message}") from None
    except RecursionError:
        raise ValueError("the template is nested too deeply") from None
    except (ArithmeticError, ValueError) as error:  # a number that Python does not take
        raise ValueError(f"the template does not parse: {error}") from None
    if _is_deep(tree):
        raise ValueError("the template is nested too deeply")
    return tree


def _is_deep(tree: nodes.Template) -> bool:
    """Whether functions that call themselves for each level of the tree would go too deep."""
    level: list[nodes.Node] = [tree]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in node.iter_child_nodes()]
    return bool(level)


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
            tree = parse_template(text)
        except ValueError as error:
            raise DataError(f"{key}: {str(error).replace('line', 'template line', 1)}") from None
        self._names = template_env.names_of(tree)
        # Jinja evaluates constants when it compiles, and when it looks for variables.
        self._template: Any = None
        if template_env.is_plain(tree, text):
            try:
                self._template = template_env.row_environment().from_string(text)
            except TemplateSyntaxError as error:  # a filter or test that there is not
                raise DataError(f"{key}: template line {error.lineno}: {error.message}") from None
            self.columns = frozenset(meta.find_undeclared_variables(tree))
        else:
            self.columns = (
                self._names - template_env.own_names(tree) - frozenset(template_env.row_environment().globals)
            )
            (compiled,) = render("row", text, [])
            if compiled.text is None:
                raise self._error(compiled, {}, "")

    def render(self, row: Mapping[str, Any], where: str) -> str:
        """Render one row.

        Raises:
            DataError: the row lacks a column (named, with the columns there are), a value is null, or the template
                fails in another way, or is beyond a limit. `where` says which row: 'train.jsonl:12'.
        """
        done = self.render_many([(where, row)])[0]
        if isinstance(done, DataError):
            raise done
        return done

    def render_many(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str | DataError]:
        """Render rows given with where they stand; the error in place of the text of a row that fails.

        Rows after one that is beyond a limit may be missing.
        """
        if self._template is not None:
            return [self._render_here(row, where) for where, row in rows]
        sent = [{name: row[name] for name in self._names if name in row} for _, row in rows]
        results = render("row", self.text, sent) if rows else ()
        found: list[str | DataError] = []
        for (where, row), done in zip(rows, results, strict=False):
            found.append(self._error(done, row, where) if done.text is None else done.text)
            if done.problem == "limit":
                break
        return found

    def _render_here(self, row: Mapping[str, Any], where: str) -> str | DataError:
        try:
            text = str(self._template.render(row))
        except UndefinedError as error:
            return self._error(RenderResult(None, "undefined", str(error.message)), row, where)
        except template_env.NullValueError:
            return self._error(RenderResult(None, "null"), row, where)
        except _FAILURES as error:
            return self._error(RenderResult(None, "fails", str(error), error=type(error).__name__), row, where)
        if len(text) > MAX_TEXT:
            return self._error(
                RenderResult(None, "limit", f"makes more than {MAX_TEXT:,} characters of text"), row, where
            )
        return text

    def _error(self, done: RenderResult, row: Mapping[str, Any], where: str) -> DataError:
        """What is said of a row that was not rendered."""
        place = f"{where}: {self.key}" if where else self.key
        if done.problem == "syntax":
            return DataError(f"{self.key}: template line {done.line}: {done.message}")
        if done.problem == "limit":
            return DataError(
                f"{place}: the template {done.message}",
                hint="Loops over long ranges and repetition without end are stopped: write the template over the "
                "row's columns.",
            )
        if done.problem == "null":
            nulls = sorted(name for name in self.columns if row.get(name) is None)
            return DataError(
                f"{place}: {_columns(nulls) if nulls else 'an expression'} is null",
                hint="Give a default in the template: {{ column or '' }}.",
            )
        missing = sorted(self.columns - set(row)) if done.problem == "undefined" else []
        if missing:
            return DataError(
                f"{place} names {_columns(missing)}, which the row does not have; it has {_columns(sorted(row))}",
                hint=self._hint(missing, row),
            )
        failed = f"the template fails: {done.error}: " if done.problem == "fails" else ""
        return DataError(f"{place}: {failed}{done.message}")

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


def render_chats(
    source: str,
    chats: Sequence[tuple[Sequence[Mapping[str, Any]], bool]],
    *,
    special_tokens: Mapping[str, str],
    name: str = "the chat template",
) -> list[str | DataError]:
    """Render chats as transformers' `apply_chat_template(..., tokenize=False)` does.

    Args:
        source: the tokenizer's chat template.
        chats: messages, (role, content) mappings each; and whether the text ends with the header of an answer.
        special_tokens: 'bos_token', 'eos_token', … by name.
        name: what errors call the template.

    Returns:
        The texts in order; the error in place of one that fails. Chats after one that is beyond a limit may be missing.
    """
    if len(source) > template_env.MAX_TEMPLATE:
        return [DataError(f"{name} has {len(source):,} characters; at most {template_env.MAX_TEMPLATE:,} are read")]
    shared = {"tools": None, "documents": None, **special_tokens}
    sent = [{**shared, "messages": list(messages), "add_generation_prompt": header} for messages, header in chats]
    found: list[str | DataError] = []
    for done in render("chat", source, sent) if sent else ():
        if done.text is not None:
            found.append(done.text)
        elif done.problem == "syntax":
            found.append(DataError(f"chat template, line {done.line}: {done.message}"))
        elif done.problem == "limit":
            found.append(DataError(f"{name} {done.message}", hint="Use prompt and completion templates instead."))
            break
        else:
            found.append(DataError(f"the chat template refuses the messages: {done.message}"))
    return found
