"""vLLM's own parser has the options that `soka-serve serve` gives and reads, by the sources; nothing is imported."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from soka_serve.serving import command
from soka_vllm.sources import Sources, installed_sources
from tests.conftest import NEEDS_VLLM
from tests.support.releases import of_each, sources_of

# Where releases have the options of the HTTP server.
FRONT_ENDS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")
ENGINE = "vllm.engine.arg_utils"


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def given() -> set[str]:
    """The options in the functions of the command that make vLLM's."""
    made = [ast.parse(inspect.getsource(function)) for function in (command._ours, command._tokenizer_mode)]
    return {text for tree in made for text in texts(tree) if text.startswith("--")} | {command._API_PROCESSES[0]}


def parsed(sources: Sources) -> set[str]:
    """The options that a release's parser has: those it is told one by one, and the fields of its dataclasses."""
    found: set[str] = set()
    for module in (ENGINE, *FRONT_ENDS):
        held = sources._module(module)
        for node in ast.walk(held[0]) if held else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                found |= {text for part in node.args for text in texts(part) if text.startswith("-")}
        for name in ("BaseFrontendArgs", "FrontendArgs"):
            found |= {f"--{field.replace('_', '-')}" for field in sources.fields(module, name)}
    return found


def check(sources: Sources) -> None:
    known = parsed(sources)
    assert given() - known == set()
    assert set(command._READ) - known == set()


def test_all_that_is_given_is_found() -> None:
    """No option is made elsewhere in the module, which makes the command."""
    assert given() >= {"--served-model-name", "--lora-target-modules", "--api-server-count", "--tokenizer-mode"}
    source = Path(inspect.getfile(command)).read_text()
    used = {text for text in texts(ast.parse(source)) if text.startswith("--") and " " not in text}
    listed = {*command._TAKEN, *command._TAKEN_WITH_ADAPTERS, *command._READ, *command._COMPILATION}
    listed |= {name for names, *_ in command._TAKEN_VALUES for name in names} | {*command._API_PROCESSES}
    assert used - listed - given() == {"--"}


@NEEDS_VLLM
def test_the_installed_vllm_has_each_option() -> None:
    check(installed_sources())


@of_each
def test_a_release_at_hand_has_each_option(place: Path) -> None:
    check(sources_of(place))
