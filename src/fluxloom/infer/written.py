"""How a prompt came to be, where nobody typed it as it is: part of a request, and of its receipt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from fluxloom.errors import BadInput

MAX_PROMPT = 2_000  # characters; the longest text length of the family (512 tokens) is under that


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where a prompt comes from; a picture is drawn again from the prompt itself.

    text      what was typed
    template  the template that it was put into
    slots     what filled the template's gaps
    enhancer  what then added to it
    model     which model, where the enhancer asked one
    """

    text: str
    template: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)
    enhancer: str | None = None
    model: str | None = None

    @classmethod
    def of(cls, found: object) -> Written | None:
        """From what a request holds: one of these, its JSON (as in a receipt), or None. Raises BadInput for another."""
        if found is None or isinstance(found, Written):
            return found
        names = [item.name for item in fields(cls)]
        if not isinstance(found, Mapping) or "text" not in found:
            raise BadInput(
                f"got written {str(found)[:80]!r}, allowed {', '.join(names)}, try {{'text': 'what was typed'}}"
            )
        for name, value in found.items():
            if name not in names:
                near = next(iter(get_close_matches(str(name), names, n=1)), names[0])
                raise BadInput(f"got {name!r} in written, allowed {', '.join(names)}, try {near!r}")
            if not _fits(name, value):
                raise BadInput(f"got written.{name} {str(value)[:80]!r}, allowed text, try leaving it out")
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """As a receipt records it."""
        return {**vars(self), "slots": dict(self.slots)}


def _fits(name: str, value: object) -> bool:
    if name == "slots":
        return isinstance(value, Mapping) and all(isinstance(one, str) for one in (*value, *value.values()))
    return isinstance(value, str) or (value is None and name != "text")
