"""Types that fields of several tables have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _no_nul(value: str) -> str:
    if "\x00" in value:
        raise ValueError("a path or id cannot hold a NUL character")
    return value


def _integer_one(value: object) -> object:
    if type(value) is not int:  # Python's 1 == True == 1.0 would let those through the Literal
        raise PydanticCustomError("expected", "{expected}", {"expected": "the integer 1"})
    return value


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
PathOrId = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]  # a path, or an id on the hub
FormatVersion = Annotated[Literal[1], BeforeValidator(_integer_one)]
