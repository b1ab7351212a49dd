"""The program in a model's answer: out of Markdown fences, or out of bare text."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

# A fence may stand in a list or a quotation: "1. ```python", "> ```".
_OPENING = re.compile(
    r"(?P<margin>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<marks>`{3,}|~{3,})[ \t]*(?P<language>[^`\s]*)[^`]*"
)
_CLOSING = re.compile(r"[ \t>]*(?P<marks>`{3,}|~{3,})[ \t]*")
_CODE_START = re.compile(r"\s*(?:(?:async\s+def|def|class|import|from)\s|@|\w+\s*=[^=])")
_PYTHON = frozenset({"", "python", "python3", "py", "py3", "python2", "code", "{.python}", "{python}"})


@dataclass(frozen=True)
class _Block:
    language: str
    code: str
    closed: bool


def extract_code(text: str, *, names: Collection[str] = (), prompt: str = "") -> str:
    """The program in an answer.

    The first block that parses and defines `names`; else all blocks of Python together, if they do; else the first
    block of Python; without a block, the longest run of lines that parses. Where the prompt ends inside a fence, the
    answer begins inside it, after what the fence already holds. An answer may also close a fence that the prompt, as
    it is known here, did not open.

    Args:
        text: the answer.
        names: what the tests take from the program.
        prompt: what the answer goes on from.

    >>> extract_code("Here it is:\\n```python\\ndef f():\\n    return 1\\n```\\nIt returns 1.")
    'def f():\\n    return 1'
    >>> extract_code("def f():\\n    return 1\\nThis function returns one.")
    'def f():\\n    return 1'
    >>> extract_code("    return 1\\n```\\nIt returns 1.", names=["f"], prompt="```python\\ndef f():\\n")
    'def f():\\n    return 1'
    """
    begun = next((block for block in _blocks(prompt) if not block.closed), None)
    outside = list(_blocks(text))
    # An answer that begins inside a fence, whether or not the prompt is known to have opened it.
    inside = list(_blocks(f"```\n{text}"))
    if begun is not None and begun.code.strip():
        end = "\n" if prompt.endswith("\n") else ""
        inside = [*_blocks(f"```\n{begun.code}{end}{text}"), *inside]
    readings = [inside, outside] if begun is not None else [outside, inside if _closes_first(text) else []]
    for blocks in readings:
        for block in blocks:
            if _defines(block.code, names) and (names or block.language.lower() in _PYTHON):
                return block.code
    for blocks in readings:
        python = [block.code for block in blocks if block.language.lower() in _PYTHON and _parses(block.code)]
        if len(python) > 1 and names and _defines("\n\n".join(python), names):
            return "\n\n".join(python)
    bare = _bare(text)
    if names and _defines(bare, names):
        return bare
    for blocks in readings:
        if blocks:
            return next((block.code for block in blocks if block.language.lower() in _PYTHON), blocks[0].code)
    return bare


def _blocks(text: str) -> Iterator[_Block]:
    """The fenced blocks of a text, without the margin that a list gives them; the last may be left open."""
    lines = iter(text.splitlines())
    for line in lines:
        opening = _OPENING.fullmatch(line)
        if opening is None:
            continue
        marks, margin, code, closed = opening["marks"], opening["margin"], [], False
        for inner in lines:
            closing = _CLOSING.fullmatch(inner)
            if closing and closing["marks"].startswith(marks):
                closed = True
                break
            code.append(_without_margin(inner, margin))
        body = "\n".join(code)
        yield _Block(opening["language"], body if _parses(body) else _dedented(body), closed)


def _without_margin(line: str, margin: str) -> str:
    if ">" in margin and line.lstrip().startswith(">"):
        line = line.lstrip()[1:].removeprefix(" ")
    width = len(margin)
    return line[width:] if margin and not line[:width].strip() else line


def _dedented(code: str) -> str:
    shorter = textwrap.dedent(code)
    return shorter if _parses(shorter) else code


def _closes_first(text: str) -> bool:
    """Whether code comes before the first fence, and that fence names no language: it then closes one."""
    before, fence, after = text.partition("```")
    return bool(fence) and not re.match(r"[^`\s]", after) and _CODE_START.search(before) is not None


def _bare(text: str) -> str:
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if _CODE_START.match(line)), None)
    if start is None or _parses(text):
        return text
    # A completion begins with a space where the prompt ends without one.
    first = lines[start].lstrip() if start == 0 else lines[start]
    lines = [first, *lines[start + 1 :]]
    for end in range(len(lines), 0, -1):
        code = "\n".join(lines[:end])
        if _parses(code):
            return code
    return "\n".join(lines)


def parse(code: str) -> ast.Module | None:
    """The syntax tree of a program; None where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes in the model's text
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parses(code: str) -> bool:
    return parse(code) is not None


def _defines(code: str, names: Collection[str]) -> bool:
    """Whether a program parses and its top level gives all of these names a value."""
    tree = parse(code)
    return tree is not None and bool(tree.body) and set(names) <= set(defined_names(tree))


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Functions, classes and variables that a module's top level defines."""
    for statement in tree.body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                yield name
            case ast.Import(names=modules) | ast.ImportFrom(names=modules):
                yield from (module.asname or module.name for module in modules)
