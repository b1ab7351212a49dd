"""Kronecker components of (fine-tuned W) - W; nothing is subtracted, the adapter starts as that delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.starts.start import Material, Start

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Delta(Start):
    """What a full fine-tuning changed."""

    meaning: ClassVar[str] = "components of a fine-tuned checkpoint's delta"
    told: ClassVar[str] = "the strongest Kronecker components of the change that a full fine-tuning had made"
    spectrum_of: ClassVar[str] = "the fine-tuned change"
    source: ClassVar[str | None] = "finetuned"
    source_is: ClassVar[str] = "the fully fine-tuned checkpoint"
    subtracted: ClassVar[bool] = False
    changes: ClassVar[bool] = True

    def matrix(self, material: Material) -> Tensor:
        assert material.tuned is not None
        return material.tuned.float().sub_(material.weight)
