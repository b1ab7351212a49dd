"""What the commands of all rooms share: the type of their path arguments, printing, and arguments for vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from soka_serve.errors import printable_lines


class _PathType(click.Path):
    """A path; not an empty one, which an unset variable of a shell leaves, and which would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty; the current directory is '.'", param, ctx)
        return super().convert(value, param, ctx)


FILE = _PathType(path_type=Path)
SOURCE = _PathType()  # a path, or the address of an adapter that is kept elsewhere


class PassThroughCommand(click.Command):
    """A command whose arguments after `--` are vLLM's: its function gets them, as they are, as `vllm_options`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        rest = super().parse_args(ctx, args[:cut])
        ctx.params["vllm_options"] = tuple(args[cut + 1 :])
        return rest


def say(text: str) -> None:
    """Print a result. Names and texts in it may come from anyone's files: control characters are made visible."""
    click.echo(printable_lines(text))
