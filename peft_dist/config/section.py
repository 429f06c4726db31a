"""What the parts of a recipe share: the rules of a section, and the kinds of values.

Models are frozen, refuse unknown keys and never change what they were given.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Shared rules of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class Matches:
    """A rule for a text: the pattern of all of it, and the same in words."""

    pattern: str
    words: str

    def check(self, text: str) -> str:
        """Return the text.

        Raises:
            ValueError: For one that does not match.
        """
        if not re.fullmatch(self.pattern, text):
            shown = repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
            raise ValueError(f"got {shown}; must be {self.words}")
        return text

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$"}
