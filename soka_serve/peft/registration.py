"""Making PEFT know the type "SOKA".

PEFT's `register_peft_method` refuses a name that is not a member of its `PeftType` enum, and offers no way to add one,
so the member is added here first. That reaches into the enum, hence the check of PEFT's version, which runs when this
module is imported: before anything else here imports PEFT, and so before a missing name could.
"""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from soka_serve.errors import SokaError
from soka_serve.peft.parts import PREFIX

if TYPE_CHECKING:
    from peft.utils import PeftType

NAME = "SOKA"
OLDEST_PEFT = "0.21.0"
FIRST_UNTRIED_PEFT = "0.22"


def check_peft_version(version: str) -> None:
    """Raise SokaError unless `version` of PEFT is one that this package was written and tested against.

    >>> check_peft_version("0.21.2")
    >>> check_peft_version("0.19.0")
    Traceback (most recent call last):
        ...
    soka_serve.errors.SokaError: soka_serve.peft needs peft >=0.21.0,<0.22; peft 0.19.0 is installed
    """
    if not Version(OLDEST_PEFT) <= Version(version) < Version(f"{FIRST_UNTRIED_PEFT}.dev0"):
        raise SokaError(
            f"soka_serve.peft needs peft >={OLDEST_PEFT},<{FIRST_UNTRIED_PEFT}; peft {version} is installed",
            hint=f'pip install "peft>={OLDEST_PEFT},<{FIRST_UNTRIED_PEFT}"',
        )


def add_peft_type() -> PeftType:
    """Add the member SOKA to PEFT's `PeftType` enum, once, and return it.

    Does what `enum` does for a member in the class body: the string's value, the member's name, and its entries in the
    lookups by name and by value. Afterwards `PeftType("SOKA")`, `PeftType.SOKA` and pickling work as for any member.
    """
    from peft.utils import PeftType

    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)  # EnumType's own __setattr__ refuses to set a member
    return PeftType[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT. Calling it again does nothing.

    Raises:
        SokaError: another package has taken the type "SOKA".
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    peft_type = add_peft_type()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is config_cls:
        return
    if known is not None:
        raise SokaError(
            f"the PEFT type {NAME} is already registered, by {known.__module__}.{known.__qualname__}",
            hint="only one of the two packages can be imported in a process",
        )
    register_peft_method(
        name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX, is_mixed_compatible=True
    )


check_peft_version(installed_version("peft"))
