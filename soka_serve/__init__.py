"""Kronecker-SVD adapters for LLMs, from a TOML manifest to a production endpoint.

What the command line does is one call from Python:

    plan(manifest)                  what a build would do; loads no weights
    build(manifest)                 manifest -> adapter, merged model, report
    merge(adapter, base=, out=)     adapter + base -> dense model
    combine(adapters, out)          weighted sum of adapters -> one adapter
    extract(tuned, base=, out=)     fully fine-tuned checkpoint -> adapter
    export(adapter, out, to=)       adapter -> finished adapter or LoRA
    inspect(path)                   what a directory holds
    evaluate(manifest)              a build and its base on lm-eval tasks
    compare(suite)                  methods x learning rates x seeds, measured
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from soka_serve.errors import SokaError

if TYPE_CHECKING:
    from soka_serve.adapter.combine import combine
    from soka_serve.adapter.export import export
    from soka_serve.adapter.inspect import inspect
    from soka_serve.comparison.compare import compare
    from soka_serve.compiler.build import build
    from soka_serve.compiler.extract import extract
    from soka_serve.compiler.merge.merge import merge
    from soka_serve.compiler.status import plan
    from soka_serve.evaluation.run import evaluate

__version__ = "0.1.0"

__all__ = [
    "SokaError",
    "__version__",
    "build",
    "combine",
    "compare",
    "evaluate",
    "export",
    "extract",
    "inspect",
    "merge",
    "plan",
]

# Loaded at first use: `import soka_serve` must not import torch. No submodule has one of these names: importing it
# would put the module in the function's place.
_HOMES = {
    "build": "soka_serve.compiler.build",
    "combine": "soka_serve.adapter.combine",
    "compare": "soka_serve.comparison.compare",
    "evaluate": "soka_serve.evaluation.run",
    "export": "soka_serve.adapter.export",
    "extract": "soka_serve.compiler.extract",
    "inspect": "soka_serve.adapter.inspect",
    "merge": "soka_serve.compiler.merge.merge",
    "plan": "soka_serve.compiler.status",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
