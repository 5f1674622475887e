"""What every section of a recipe is: fixed once read, and strict about its keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of keys. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
