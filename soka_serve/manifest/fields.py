"""Types that fields of several tables have."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def _no_nul(value: str) -> str:
    if "\x00" in value:
        raise ValueError("a path or id cannot hold a NUL character")
    return value


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
PathOrId = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]  # a path, or an id on the hub
