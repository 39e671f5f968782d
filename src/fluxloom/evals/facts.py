"""What can be held against a picture: each fact is decided by one small method on what a reader saw, the same for a
model's picture, the true one and its round trip through the autoencoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fluxloom.measure.recogniser import Reading, Seen
from fluxloom.world import load_atlas

BOARD = 0.5  # probability from which on there is a sign board


@dataclass(frozen=True)
class Fact:
    """Something that must hold in a picture."""

    def holds(self, seen: Reading) -> bool:
        raise NotImplementedError

    def instead(self, seen: Reading) -> str:
        """What was seen of the kind that this fact is about."""
        names = [f"{thing.colour} {thing.concept}" if thing.colour else thing.concept for thing in seen.things]
        return ", ".join(names) or "no thing"

    def to_dict(self) -> dict[str, Any]:
        return {"fact": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class There(Fact):
    """A thing is recognisably there."""

    concept: str

    def holds(self, seen: Reading) -> bool:
        return _thing(seen, self.concept) is not None

    def __str__(self) -> str:
        return self.concept


@dataclass(frozen=True)
class Gone(Fact):
    """A thing is not to be recognised."""

    concept: str

    def holds(self, seen: Reading) -> bool:
        return _thing(seen, self.concept) is None

    def __str__(self) -> str:
        return f"no {self.concept}"


@dataclass(frozen=True)
class Coloured(Fact):
    """A thing is there, in a colour that it was asked to have; one that is its own does not count as repainted."""

    concept: str
    colour: str

    def holds(self, seen: Reading) -> bool:
        thing = _thing(seen, self.concept)
        return thing is not None and self.colour == (thing.colour or load_atlas().concept(self.concept).natural)

    def __str__(self) -> str:
        return f"{self.colour} {self.concept}"


@dataclass(frozen=True)
class LeftOf(Fact):
    """Two things are there, the centre of the first to the left of the second's."""

    concept: str
    other: str

    def holds(self, seen: Reading) -> bool:
        first, second = _thing(seen, self.concept), _thing(seen, self.other)
        return first is not None and second is not None and first.x < second.x

    def __str__(self) -> str:
        return f"{self.concept} left of {self.other}"


@dataclass(frozen=True)
class Beyond(Fact):
    """A thing is there, its centre on one side of x (share of the width)."""

    concept: str
    side: Literal["left", "right"]
    x: float

    def holds(self, seen: Reading) -> bool:
        thing = _thing(seen, self.concept)
        return thing is not None and (thing.x < self.x if self.side == "left" else thing.x > self.x)

    def __str__(self) -> str:
        return f"{self.concept} {self.side} of {self.x:.2f}"


@dataclass(frozen=True)
class Sized(Fact):
    """A thing is there and covers more, or less, than a share of the picture."""

    concept: str
    way: Literal["bigger", "smaller"]
    area: float

    def holds(self, seen: Reading) -> bool:
        thing = _thing(seen, self.concept)
        return thing is not None and (thing.area > self.area if self.way == "bigger" else thing.area < self.area)

    def __str__(self) -> str:
        return f"{self.concept} {self.way} than {self.area:.1%}"


@dataclass(frozen=True)
class Label(Fact):
    """The picture as a whole: its place, time, weather, season, style or filter."""

    field: str
    value: str

    def holds(self, seen: Reading) -> bool:
        return bool(getattr(seen, self.field).label == self.value)

    def instead(self, seen: Reading) -> str:
        return f"{self.field} {getattr(seen, self.field).label}"

    def __str__(self) -> str:
        return f"{self.field} {self.value}"


@dataclass(frozen=True)
class Word(Fact):
    """A sign bears exactly this word."""

    text: str

    def holds(self, seen: Reading) -> bool:
        return seen.sign == self.text

    def instead(self, seen: Reading) -> str:
        return f'sign "{seen.sign}"'

    def __str__(self) -> str:
        return f'sign "{self.text}"'


@dataclass(frozen=True)
class NoBoard(Fact):
    """There is no sign board."""

    def holds(self, seen: Reading) -> bool:
        return seen.sign_board < BOARD

    def instead(self, seen: Reading) -> str:
        return f'sign "{seen.sign}"'

    def __str__(self) -> str:
        return "no sign"


def _thing(seen: Reading, concept: str) -> Seen | None:
    """The surest sight of a thing, if it is sure enough to count."""
    return next((thing for thing in seen.things if thing.concept == concept), None)
