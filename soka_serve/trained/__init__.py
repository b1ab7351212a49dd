"""The registry of what is trained: one row for each key that leaves some of a module's factors as they start.

A further way is a file here, a row in `TRAINED`, and a key of `[[adapt]]` of the row's name; plan, training, adapters
in training and export ask the rows through a module's `Form` and compare no names. Importing this package does not
load torch.
"""

from __future__ import annotations

from soka_serve.trained.extra_terms import MOST_EXTRA_TERMS
from soka_serve.trained.form import PLAIN, TENSORS, TRAINED, Form, form_problem
from soka_serve.trained.row import PARTS, Factor, RuleFacts, Trained

__all__ = [
    "MOST_EXTRA_TERMS",
    "PARTS",
    "PLAIN",
    "TENSORS",
    "TRAINED",
    "Factor",
    "Form",
    "RuleFacts",
    "Trained",
    "form_problem",
]
