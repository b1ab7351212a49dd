"""What every table of the manifest shares: strictness, and checks across keys that report all they find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

_PYDANTIC_ERRORS = frozenset(get_args(ErrorType))

Key = tuple[str | int, ...]

# Tags of a key that takes a table or an array of tables; pydantic puts them into the locations of errors.
TABLE_FORM, ARRAY_FORM = "a table", "an array of tables"


@dataclass(frozen=True)
class TableKeys:
    """What a table held, for checks across its keys.

    `present` are the keys that were written and say something else than their default; `values` holds the valid ones
    among them and the defaults of the others, so a check that needs a value which is itself wrong can tell, and keep
    quiet about it.
    """

    present: frozenset[str]
    values: Mapping[str, Any]

    def has(self, *names: str) -> list[str]:
        """Those of the names that the table sets."""
        return [name for name in names if name in self.present]

    def knows(self, *names: str) -> bool:
        """Whether all of these have a valid value (their default counts)."""
        return all(name in self.values for name in names)

    def show(self, name: str) -> str:
        """`8`, or `8, the default`."""
        return f"{self.values[name]}" if name in self.present else f"{self.values[name]}, the default"


def value_of(table: object, name: str) -> Any:
    """A key of a table that is still a mapping or already a model; None where it has none."""
    return table.get(name) if isinstance(table, Mapping) else getattr(table, name, None)


def check_source(keys: TableKeys, names: tuple[str, ...]) -> Iterator[tuple[Key, str]]:
    """For `Table.conflicts`: exactly one of the names must be set."""
    came = keys.has(*names)
    if not came:
        yield (), f"expected one of {', '.join(names)}; got none of them"
    for name in came[1:]:
        yield (name,), f"{name} and {came[0]} exclude each other: give exactly one of {', '.join(names)}"


class Table(BaseModel):
    """A TOML table: frozen, strict, unknown keys forbidden.

    `LATER` names the keys that a dump leaves out at their default: those that came after dumps had gone into stored
    hashes (stage keys, resume points, records of comparisons), which a new key must leave as they are.
    """

    LATER: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=False
    )

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        """Yield (key, message) for each contradiction between keys of this table; () blames the table itself."""
        yield from ()

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for name in self.LATER:
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                values.pop(name, None)
        return values

    @model_validator(mode="wrap")
    @classmethod
    def _check_all(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Report wrong keys and contradictions together; pydantic alone would stop after the former."""
        errors: list[ErrorDetails] = []
        table: Self | None = None
        try:
            table = handler(data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        if not isinstance(data, Mapping) or any(not e["loc"] for e in errors):
            found = []
        else:
            found = list(cls.conflicts(cls._see(data, {e["loc"][0] for e in errors})))
        if table is not None and not found:
            return table
        details = [_keep(e) for e in errors]
        details += [
            InitErrorDetails(type=PydanticCustomError("conflict", "{message}", {"message": m}), loc=key, input=data)
            for key, m in found
        ]
        raise ValidationError.from_exception_data(cls.__name__, details)

    @classmethod
    def _see(cls, data: Mapping[str, Any], wrong: set[int | str]) -> TableKeys:
        """Sort what came into present keys and valid values.

        A key that repeats its default counts as absent, so that a dumped model can be read back.
        """
        values = {
            name: field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }
        present = frozenset(
            name
            for name, value in data.items()
            if value is not None and (name not in values or _differ(value, values[name]))
        )
        for name in present:
            values.pop(name, None)
            if name not in wrong:
                values[name] = data[name]
        return TableKeys(present, values)


def _differ(value: object, default: object) -> bool:
    """Whether a value says something else than the default, which a table may say as a mapping."""
    if isinstance(default, Table) and isinstance(value, Mapping):
        return {name: v for name, v in value.items() if v is not None} != default.model_dump(exclude_none=True)
    return value != default


def _keep(error: ErrorDetails) -> InitErrorDetails:
    """Turn a reported error back into one that can be raised again."""
    kind: str | PydanticCustomError = error["type"]
    if kind not in _PYDANTIC_ERRORS:
        context = {**error.get("ctx", {}), "message": error["msg"]}
        kind = PydanticCustomError(error["type"], "{message}", context)
    return InitErrorDetails(type=kind, loc=error["loc"], input=error["input"], ctx=error.get("ctx", {}))
