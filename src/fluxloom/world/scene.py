"""What a picture of the illustrated world shows, as plain frozen data: the exact truth behind every pixel and word."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fluxloom.world.atlas import load_atlas

TIMES = ("day", "sunset", "night", "dawn")
WEATHERS = ("clear", "cloudy", "rain", "snow", "fog", "thunderstorm")
SEASONS = ("spring", "summer", "autumn", "winter")
FILTERS = ("pixel", "pencil", "watercolour", "mono")
COLOURLESS_FILTERS = ("pencil", "mono")
LAYERS = ("sky", "clouds", "far", "ground", "details", "fall")
WALLS = ("blue", "green", "pink", "yellow", "orange", "purple", "red", "white", "black", "brown")

_NO_SNOW = tuple(weather for weather in WEATHERS if weather != "snow")


@dataclass(frozen=True)
class Place:
    """Which times, weathers and seasons a place knows; an empty tuple means that it has none."""

    times: tuple[str, ...] = TIMES
    weathers: tuple[str, ...] = WEATHERS
    seasons: tuple[str, ...] = SEASONS
    hues: tuple[str, ...] = ()


PLACES: dict[str, Place] = {
    "meadow": Place(),
    "beach": Place(weathers=_NO_SNOW, seasons=()),
    "sea": Place(weathers=_NO_SNOW, seasons=()),
    "desert": Place(weathers=("clear", "cloudy", "thunderstorm"), seasons=()),
    "mountains": Place(),
    "forest": Place(),
    "city": Place(),
    "road": Place(),
    "snow": Place(weathers=("clear", "cloudy", "snow", "fog"), seasons=()),
    "room": Place(weathers=(), seasons=(), hues=("blue", "green", "pink", "yellow", "white", "purple")),
    "underwater": Place(times=(), weathers=(), seasons=()),
    "space": Place(times=(), weathers=(), seasons=()),
    "plain": Place(times=(), weathers=(), seasons=(), hues=WALLS),
}


@dataclass(frozen=True)
class Backdrop:
    """Everything behind the items. `seeds` has one number per layer, so that an edit of one leaves the others."""

    place: str
    time: str | None
    weather: str | None
    season: str | None
    hue: str | None
    seeds: tuple[int, ...]

    def seed(self, layer: str) -> int:
        return self.seeds[LAYERS.index(layer)]

    def fit(self, default_time: str = "day", default_hue: str = "blue") -> Backdrop:
        """The same backdrop with what the place does not know taken out, and what it needs put in.

        Snow falls in winter only: asked to snow, another season becomes winter.
        """
        place = PLACES[self.place]
        time = (self.time if self.time in place.times else default_time) if place.times else None
        weather = (self.weather if self.weather in place.weathers else "clear") if place.weathers else None
        season = (self.season if self.season in place.seasons else "summer") if place.seasons else None
        if weather == "snow" and season:
            season = "winter"
        if weather == "fog" and time == "night":
            weather = "cloudy"  # fog by night would leave nothing to see
        hue = (self.hue if self.hue in place.hues else default_hue) if place.hues else None
        return replace(self, time=time, weather=weather, season=season, hue=hue)


@dataclass(frozen=True)
class Item:
    """One thing: x is its centre, y its lower edge, size its long side, all as shares of the picture's side."""

    concept: str
    x: float
    y: float
    size: float
    colour: str | None = None
    mirror: bool = False

    def box(self, style: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        width, height = (self.size * s for s in load_atlas().concept(self.concept).shape(style))
        return self.x - width / 2, self.y - height, self.x + width / 2, self.y


@dataclass(frozen=True)
class Sign:
    """A wooden board with a word; x is its centre, y the foot of its post, letters their height."""

    text: str
    x: float
    y: float
    letters: float


@dataclass(frozen=True)
class Scene:
    """Items are drawn in order: a later one stands in front."""

    backdrop: Backdrop
    style: str
    items: tuple[Item, ...] = field(default=())
    sign: Sign | None = None
    filter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        backdrop = dict(data["backdrop"])
        backdrop["seeds"] = tuple(backdrop["seeds"])
        return cls(
            backdrop=Backdrop(**backdrop),
            style=data["style"],
            items=tuple(Item(**i) for i in data["items"]),
            sign=Sign(**data["sign"]) if data["sign"] else None,
            filter=data["filter"],
        )

    def put(self, **changes: Any) -> Scene:
        """A copy with some fields changed; backdrop fields may be named directly and are made to fit."""
        names = set(Backdrop.__dataclass_fields__)
        behind = {k: v for k, v in changes.items() if k in names}
        rest = {k: v for k, v in changes.items() if k not in names}
        if behind:
            rest["backdrop"] = replace(self.backdrop, **behind).fit()
        return replace(self, **rest)

    def without_item(self, index: int) -> Scene:
        return replace(self, items=self.items[:index] + self.items[index + 1 :])

    def with_item(self, index: int, **changes: Any) -> Scene:
        items = list(self.items)
        items[index] = replace(items[index], **changes)
        return replace(self, items=tuple(items))


def relations(scene: Scene) -> list[tuple[int, str, int]]:
    """Every plain spatial fact about pairs of items: (a, "left" | "above" | "behind" | "bigger", b)."""
    facts: list[tuple[int, str, int]] = []
    boxes = [item.box(scene.style) for item in scene.items]
    for a, (la, ta, ra, ba) in enumerate(boxes):
        for b, (lb, tb, rb, bb) in enumerate(boxes):
            if a == b:
                continue
            across = min(ra, rb) - max(la, lb)
            down = min(ba, bb) - max(ta, tb)
            xa, xb = (la + ra) / 2, (lb + rb) / 2
            if across <= 0.02 and xb - xa > 0.15:
                facts.append((a, "left", b))
            if down <= 0.03 and across > 0 and abs(xa - xb) < 0.2 and ta < tb:
                facts.append((a, "above", b))
            narrow = min(ra - la, rb - lb)
            if a < b and across > 0.25 * narrow and down > 0.1 and ba < bb:
                facts.append((a, "behind", b))
            if scene.items[a].size > 1.5 * scene.items[b].size:
                facts.append((a, "bigger", b))
    return facts
