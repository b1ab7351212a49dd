"""The model card: a README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath

from soka_serve.builtin import base_directory
from soka_serve.compiler.methods import METHODS, Method
from soka_serve.compiler.report.data import ReportData
from soka_serve.compiler.report.page import environment
from soka_serve.errors import printable
from soka_serve.io.text import accuracy_interval, flatten, span, visible

_MOST_SAMPLES = 2
_HASHES = re.compile(r"^(manifest|base|data|adapter)(\.sha256|_sha256)$")


def render_card(data: ReportData) -> str:
    """The card of a build, as Markdown with YAML front matter.

    A base that is a local directory is named by its last part: its path on the training machine is private.
    """
    accuracies = (("base model alone", data.accuracy_before), ("this build", data.accuracy_after))
    dense = data.registered.whole_model or ("merged" in data.artefacts and "adapter" not in data.artefacts)
    return _render(
        "card.md.jinja",
        _use(data.base_name, data.name, data.registered, dense=dense, quantize=data.quantize),
        data=data,
        accuracies=[(name, accuracy) for name, accuracy in accuracies if accuracy is not None and accuracy[1] > 0],
        rank_span=span([m.rank for m in data.modules]),
        factors=sorted({(m.shape, m.factor_shape) for m in data.modules}),
        projections=list(dict.fromkeys(m.projection for m in data.modules)),
        samples=[s for s in data.samples if s.after.strip()][:_MOST_SAMPLES],
        hashes=[(key, text) for key, text in flatten(data.lock) if _HASHES.match(key)],
    )


def extracted_card(base_name: str, finetuned_name: str, modules: int, parameters: int, kept_energy_frac: float) -> str:
    """The card of an adapter that `soka-serve extract` took from a fine-tuned checkpoint."""
    finetuned = _shown(_public(finetuned_name))
    name = f"{PurePath(finetuned).name}-soka"
    return _render(
        "card_extracted.md.jinja",
        _use(base_name, name, METHODS["soka"]),
        finetuned=finetuned,
        modules=modules,
        parameters=parameters,
        kept_energy_frac=kept_energy_frac,
    )


def _render(template: str, use: Mapping[str, object], **values: object) -> str:
    helpers = {"scalar": _scalar, "fence": _fence, "inline": _inline, "interval": accuracy_interval}
    text = environment(autoescape=False).get_template(template).render(**helpers, **use, **values)
    return text.encode("utf-8", "replace").decode("utf-8")


def _use(
    base_name: str, name: str, method: Method, *, dense: bool = False, quantize: str | None = None
) -> dict[str, object]:
    """Template variables of the paragraphs on loading and serving."""
    base_model = _public(base_name)
    base = _shown(base_model)
    path = f"path/to/{base}" if base_model != base_name else base
    return {
        "name": name,
        "method": method,
        "quantize": quantize,
        "dense": dense,  # there is a whole model, and no adapter
        "base": base,
        "base_model": base_model,  # for the front matter, which has its own way with what is not printable
        "base_path": path,
        "base_literal": json.dumps(path, ensure_ascii=False),
        "builtin": base == "builtin:tiny",
    }


def _public(name: str) -> str:
    """The base's name for publication: a hub id, the last part of a local directory, or 'builtin:tiny'."""
    if Path(name) == base_directory():
        return "builtin:tiny"
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _shown(name: str) -> str:
    """A name that can stand within a line and in backticks."""
    return printable(name).replace("`", "'")


def _scalar(text: str) -> str:
    """A YAML scalar: a JSON string is one, once characters that YAML forbids are gone."""
    return json.dumps("".join(c if c.isprintable() else " " for c in text), ensure_ascii=False)


def _fence(text: str) -> str:
    """A fenced code block, with a fence longer than any run of backticks in the (untrusted) text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text).rstrip()}\n{fence}"


def _inline(text: str) -> str:
    """One line of a table's cell: neither line ends nor column separators."""
    return " ".join(visible(text).split()).replace("|", "\\|")
