"""What the configurations of the stages are made of: strict models, kinds of numbers, addresses. No torch import."""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes


def check_url(url: str) -> str:
    """The URL of a server, as it came.

    Raises:
        ValueError: it is none, or holds what must not be saved.
    """
    parts = urlsplit(url)  # ValueError for brackets that do not match; `port` raises it for what is no port
    if "@" in parts.netloc:
        raise ValueError("the URL holds a user or password, which would be saved; keep secrets in the environment")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or re.search(r"\s", url):
        raise ValueError(f"{url!r} is no URL of a server; write it as http://host:port or https://host/path")
    return url


def _check_env_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):  # not shown: it may be the secret itself
        raise ValueError("no name of an environment variable; the secret itself must not stand here")
    return name


Url = Annotated[str, AfterValidator(check_url)]
EnvName = Annotated[str, AfterValidator(_check_env_name)]


class Strict(BaseModel):
    """Unknown keys are errors, and so are infinity, NaN and true in place of a number; defaults are checked too."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read true as 1."""
        items = value if isinstance(value, list | tuple) else [value]
        holds_boolean = any(isinstance(item, bool) for item in items)
        if holds_boolean and _holds_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true or false is no number; write a number")
        return value


def _holds_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_holds_number, typing.get_args(annotation)))
