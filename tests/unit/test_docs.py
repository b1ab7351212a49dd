"""What README and docs name is there: linked files and headings, commands and options, modules, make targets, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from soka_serve.cli import main
from soka_serve.manifest.read import parse_manifest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "eval").glob("*/README.md")),
]
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # the changelog may name what was

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"\s]+)\"")
_FILE = re.compile(r"`((?:soka_serve|plugins|eval|tests|docs|manifests)/[\w./-]*[\w/])`")


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for match in _LINK.finditer(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        link = match[1] or match[2]
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=_ids(CURRENT_PAGES))
def test_named_files_exist(page: Path) -> None:
    names = _FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))] == []


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=_ids(CURRENT_PAGES))
def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    code = "\n".join([*(body for _, body in _FENCE.findall(text)), *re.findall(r"`([^`]+)`", _FENCE.sub("", text))])
    wrong = []
    for command, rest in re.findall(r"^(?:\$ |\w+=\S+ )*soka-serve ([a-z]+)(.*)$", code, re.M):
        known = main.commands.get(command)
        if known is None:
            wrong.append(command)
            continue
        options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
        own = re.split(r" -- |#|;", rest)[0]  # what follows ` -- ` is vLLM's
        wrong += [f"{command} {option}" for option in re.findall(r"(?<!\S)--[a-z-]+", own) if option not in options]
    for module in re.findall(r"python -m ((?:eval|soka_serve)\.[\w.]*\w)", code.replace("-m\n", "-m ")):
        if not (ROOT / f"{module.replace('.', '/')}.py").exists():
            wrong.append(module)
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wrong += [name for name in re.findall(r"^(?:\$ )?make ([a-z0-9-]+)", code, re.M) if name not in targets]
    assert wrong == []


def test_the_readmes_manifest_is_one() -> None:
    [text] = [body for kind, body in _FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8")) if kind == "toml"]
    assert parse_manifest(text, "README.md").train.data.prompt
    assert len(text.splitlines()) <= 25
