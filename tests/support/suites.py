"""Small suites of comparisons, and what their runs left."""

from __future__ import annotations

from typing import Any

from soka_serve.comparison.plan import Cell, RunInputs, list_cells
from soka_serve.comparison.read import parse_suite
from soka_serve.comparison.settings import Setting

GOOD = """
schema = 1
name = "s"
[base]
builtin = "tiny"
[train]
steps = 3
[[dataset]]
name = "math"
data = { builtin = "math" }
[[method]]
name = "a"
method = "lora"
grid = { learning_rate = [4e-3, 1e-3], scale = [1.0, 2.0] }
[[method]]
name = "b"
method = "soka"
grid = { learning_rate = [1e-2, 2e-2], "train.sigma_lr" = [0.5] }
adapt = { init = "random", rank = { policy = "fixed", rank = 2 } }
"""
TEXT = """
schema = 1
name = "s"
[base]
builtin = "tiny"
[train]
steps = 20
[protocol]
seeds = [0, 1]
sweep_seeds = [100]
settings = 5
[[dataset]]
name = "math"
data = { builtin = "math" }
[[dataset]]
name = "code"
data = { builtin = "code" }
[[method]]
name = "first"
method = "lora"
grid = { learning_rate = [1.0, 2.0, 4.0], scale = [1.0, 2.0] }
[[method]]
name = "second"
method = "soka"
adapt = { init = "weights" }
grid = { learning_rate = [1.0, 2.0] }
priority = 2
datasets = ["code"]
"""
INPUTS = RunInputs("base", "papers", {"math": "m", "code": "c"}, {}, {"torch": "1"}, "cpu")
START: Setting = (("learning_rate", 2.0), ("scale", 2.0))

Records = dict[str, dict[str, Any]]


def cells_of(text: str = TEXT, inputs: RunInputs = INPUTS) -> list[Cell]:
    return list_cells(parse_suite(text, "s.toml"), inputs)


def record(loss: float, status: str = "done", right: int = 0, answered: int = 0) -> dict[str, Any]:
    return {"status": status, "answered": answered, "correct": right, "answer_loss": [loss]}
