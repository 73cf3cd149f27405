"""A transformer's shape by name or by numbers."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Sized(BaseModel):
    """`width`, `depth` and `heads`, or a named `size` of SIZES; after validation all that are given agree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    SIZES: ClassVar[Mapping[str, tuple[int, int, int]]]  # width, depth, heads

    size: str | None = None
    width: int = Field(default=0, ge=0)
    depth: int = Field(default=0, ge=0)
    heads: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        if not isinstance(size, str) or size not in cls.SIZES:
            return values
        named = dict(zip(("width", "depth", "heads"), cls.SIZES[size], strict=True))
        for name, value in named.items():
            if values.get(name, value) != value:
                raise ValueError(f"{name} is {values[name]}, but size {size} has {value}: give one of the two")
        return {**values, **named}

    @model_validator(mode="after")
    def _has_a_size(self) -> Self:
        for name in ("width", "depth", "heads"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is missing: give size ({', '.join(self.SIZES)}), or width, depth and heads")
        return self
