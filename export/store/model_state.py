"""What model.json holds: a model's aliases, and which version numbers have been given out.

<model>/model.json <--read, changed, written whole-- storage: a number for each draft, an alias for each promotion
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.manifest import LARGEST_RECORD, NAME_PATTERN

FILE_NAME = "model.json"


class ModelState(BaseModel):
    """The one record of a model that changes: it is replaced whole.

    Attributes:
        aliases: the version that each alias points at; one that is not there any more is no alias.
        last_version: the highest number given out; none is given twice, whatever became of the first.
        published: whether the model ever had a version; one that never had leaves nothing behind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    aliases: dict[str, int] = {}
    last_version: int = Field(default=0, ge=0)
    published: bool = False

    def as_json(self) -> bytes:
        """Return the bytes of model.json, with a checksum."""
        record: dict[str, Any] = self.model_dump(mode="json")
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
        record["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
        return json.dumps(record, indent=2).encode() + b"\n"


def from_json(contents: bytes, *, source: str) -> ModelState:
    """Decode the contents of a model.json; `source` is named in errors.

    Raises:
        ValueError: they are not, byte for byte, what was written.
    """
    try:
        record: dict[str, Any] = json.loads(contents) if len(contents) <= LARGEST_RECORD else {}
        record.pop("checksum", None)
        state = ModelState.model_validate(record, strict=True)
        genuine = state.as_json() == contents
    except (ValueError, ValidationError, AttributeError, RecursionError):
        genuine = False
    if not genuine:
        raise ValueError(
            f"{source}: expected the aliases and version numbers that were written, got something else: it was changed "
            "or damaged; restore it from a backup, or delete it: the versions stay, aliases must be set again"
        )
    return state


def checked_alias(alias: str) -> str:
    """Return an alias if it is a plain name that is not a number.

    Raises:
        ValueError: it could be taken for a version, or leave its place.
    """
    if alias.isdecimal() or not NAME_PATTERN.fullmatch(alias):
        raise ValueError(
            f"alias {alias!r}: expected a plain name that is not a number, such as 'stable' or 'canary'; "
            "choose another name"
        )
    return alias
