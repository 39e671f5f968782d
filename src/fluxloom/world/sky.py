"""Sky, sun, moon, clouds, and what falls from them; and the light that time and weather cast on the land."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import cv2

from fluxloom.world.decor import place
from fluxloom.world.paint import RGB, Canvas, Light, lighter, mix
from fluxloom.world.scene import Backdrop

SKIES: dict[str, tuple[RGB, RGB, RGB]] = {
    "day": ((64, 146, 240), (128, 194, 252), (214, 238, 255)),
    "sunset": ((84, 66, 150), (236, 110, 104), (255, 206, 120)),
    "dawn": ((118, 152, 222), (244, 184, 204), (255, 232, 190)),
    "night": ((12, 16, 52), (28, 38, 96), (64, 78, 146)),
}
SUN: dict[str, RGB] = {"day": (255, 226, 92), "sunset": (255, 150, 66), "dawn": (255, 240, 196)}
# How far the sky turns to a plain grey in each weather, and how bright that grey is by day.
OVERCAST: dict[str, tuple[float, RGB]] = {
    "clear": (0.0, (0, 0, 0)),
    "cloudy": (0.45, (188, 200, 216)),
    "rain": (0.72, (134, 148, 170)),
    "snow": (0.68, (206, 214, 228)),
    "fog": (0.8, (214, 220, 226)),
    "thunderstorm": (0.85, (84, 90, 116)),
}
FACTOR: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.82, 0.76),
    "dawn": (0.97, 0.92, 0.97),
    "night": (0.43, 0.50, 0.74),
}
# Light on the items keeps them nameable: never darker than 0.8.
ITEM_FACTOR: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.93, 0.88),
    "dawn": (0.99, 0.96, 0.98),
    "night": (0.80, 0.83, 0.93),
}
DIM: dict[str, tuple[float, float]] = {  # weather -> brightness, grey
    "clear": (1.0, 0.0),
    "cloudy": (0.95, 0.10),
    "rain": (0.84, 0.25),
    "snow": (0.97, 0.15),
    "fog": (1.0, 0.30),
    "thunderstorm": (0.70, 0.25),
}


@lru_cache(64)
def light_of(time: str | None, weather: str | None) -> Light:
    dim, grey = DIM[weather or "clear"]
    r, g, b = FACTOR[time or "day"]
    return Light((r * dim, g * dim, b * dim), grey)


@lru_cache(64)
def item_light(place_name: str, time: str | None, weather: str | None) -> Light:
    if place_name == "underwater":
        return Light((0.88, 0.98, 1.0))
    r, g, b = ITEM_FACTOR[time or "day"]
    dim = 0.95 if weather in ("rain", "thunderstorm") and time != "night" else 1.0
    return Light((r * dim, g * dim, b * dim))


@dataclass(frozen=True)
class Setting:
    """What painters of a place need: the canvas, the backdrop and its light."""

    canvas: Canvas
    backdrop: Backdrop

    @property
    def light(self) -> Light:
        return light_of(self.backdrop.time, self.backdrop.weather)

    @property
    def night(self) -> bool:
        return self.backdrop.time == "night"

    @property
    def season(self) -> str:
        return self.backdrop.season or "summer"

    @property
    def sun_x(self) -> float:
        """Where sun or moon stands: to one side, as the middle belongs to the items."""
        rng = random.Random(f"{self.backdrop.seed('sky')}/sun")
        return rng.choice((rng.uniform(0.1, 0.32), rng.uniform(0.68, 0.9)))

    @property
    def low_sky(self) -> RGB:
        return sky_colours(self.backdrop.time or "day", self.backdrop.weather or "clear")[2]

    def rng(self, layer: str) -> random.Random:
        return random.Random(self.backdrop.seed(layer))

    def far(self, rgb: RGB, distance: float) -> RGB:
        """A lit colour seen through air: distant things take the colour of the low sky."""
        return mix(self.light.on(rgb), self.low_sky, distance)

    def decor(self, kind: str, x: float, foot: float, size: float, variant: int = 0, mirror: bool = False) -> None:
        place(self.canvas, kind, x, foot, size, self.light, variant, self.season, mirror)


@lru_cache(64)
def sky_colours(time: str, weather: str) -> tuple[RGB, RGB, RGB]:
    share, grey = OVERCAST[weather]
    if time != "day":
        grey = mix(grey, SKIES[time][1], 0.24)
    if time == "night":
        grey = mix(grey, (20, 24, 60), 0.62)
    top, middle, low = (mix(c, grey, share) for c in SKIES[time])
    return top, middle, lighter(low, 0.06 if weather != "clear" else 0.0)


def paint_sky(s: Setting, horizon: float) -> None:
    """Gradient, stars, sun or moon, clouds, lightning: down to the horizon."""
    c, b = s.canvas, s.backdrop
    time, weather = b.time or "day", b.weather or "clear"
    c.gradient(sky_colours(time, weather), 0, horizon + 0.03, bands=5 if c.flat else 0)
    rng, x = s.rng("sky"), s.sun_x
    high = rng.uniform(0.1, 0.2)
    stars = [(rng.random(), rng.random() * 0.9 * horizon, rng.uniform(0.0022, 0.0052)) for _ in range(46)]
    if weather == "clear":
        if time == "night":
            for sx, sy, r in stars:
                c.disc(sx, sy, r, (250, 246, 222) if r > 0.0035 else (168, 176, 222))
            _moon(c, x, high)
        else:
            _sun(c, x, {"day": high, "sunset": horizon - 0.06, "dawn": horizon - 0.02}[time], time)
    _clouds(s, horizon, time, weather)
    if weather == "thunderstorm":
        _bolt(c, s.rng("fall"), horizon)


def _sun(c: Canvas, x: float, y: float, time: str) -> None:
    colour = SUN[time]
    radius = 0.06 if time == "day" else 0.085
    if c.flat:
        c.spot(x, y, radius * 1.7, radius * 1.7, colour, 0.35, hard=True)
    else:
        c.glow(x, y, 0.36, colour, 0.34)
        c.glow(x, y, 0.15, (255, 244, 214), 0.4)
    c.disc(x, y, radius, colour)
    if not c.flat:
        c.disc(x - 0.006, y - 0.006, radius * 0.8, lighter(colour, 0.28))


def _moon(c: Canvas, x: float, y: float) -> None:
    if c.flat:
        c.spot(x, y, 0.1, 0.1, (190, 200, 250), 0.22, hard=True)
    else:
        c.glow(x, y, 0.28, (120, 136, 220), 0.6)
    c.disc(x, y, 0.06, (250, 244, 214))
    for dx, dy, r in ((-0.02, -0.012, 0.014), (0.018, 0.01, 0.018), (-0.008, 0.026, 0.009)):
        c.disc(x + dx, y + dy, r, (226, 216, 178))


def _clouds(s: Setting, horizon: float, time: str, weather: str) -> None:
    rng = s.rng("clouds")
    plan = [
        (
            rng.uniform(-0.05, 1.05),
            rng.uniform(0.05, 0.8),
            rng.uniform(0.26, 0.42),
            rng.randrange(6),
            rng.random() < 0.5,
        )
        for _ in range(9)
    ]
    clear_count = rng.choice((1, 2, 2, 3))
    count = {"clear": clear_count, "fog": 0, "snow": 5, "cloudy": 8, "rain": 8, "thunderstorm": 9}[weather]
    tint = {
        "day": Light(),
        "sunset": Light((1.0, 0.78, 0.72)),
        "dawn": Light((1.0, 0.9, 0.93)),
        "night": Light((0.36, 0.41, 0.62)),
    }[time]
    dark = {"rain": 0.68, "thunderstorm": 0.5, "cloudy": 0.9}.get(weather, 1.0)
    light = Light(tuple(f * dark for f in tint.factor), 0.1)  # type: ignore[arg-type]
    if time == "night" and weather == "clear":
        count = min(count, 1)
    for x, y, size, variant, mirror in plan[:count]:
        foot = (0.1 + y * 0.55) * horizon + size * 0.33
        place(s.canvas, "cloud", x, foot, size * (1.15 if weather != "clear" else 1.0), light, variant, mirror=mirror)


def _bolt(c: Canvas, rng: random.Random, horizon: float) -> None:
    x, y = rng.choice((rng.uniform(0.12, 0.3), rng.uniform(0.7, 0.88))), 0.1
    points = [(x, y)]
    while y < horizon * 0.85:
        x += rng.uniform(-0.06, 0.06)
        y += 0.085
        points.append((x, y))
    if not c.flat:
        c.glow(x, y * 0.6, 0.3, (150, 150, 220), 0.6)
    c.line(points, (255, 224, 96), 0.02, 3)
    c.line(points, (255, 252, 214), 0.009, 1)


def paint_fog(s: Setting) -> None:
    """Fog over the land, thickest at two fifths of the height: about the horizon, wherever that is."""
    pale = lighter(s.low_sky, 0.12)
    s.canvas.veil((pale, pale), (0.25, 0.62, 0.72, 0.55, 0.38, 0.3))


def paint_fall(canvas: Canvas, backdrop: Backdrop) -> None:
    """Rain or snow in front of everything, thick enough (2 pixels at 256) to survive the autoencoder."""
    rng = random.Random(backdrop.seed("fall"))
    if backdrop.weather in ("rain", "thunderstorm"):
        pairs = []
        for _ in range(54):
            x, y, long = rng.uniform(-0.05, 1.05), rng.uniform(-0.05, 1), rng.uniform(0.045, 0.075)
            pairs.append([(x, y), (x - long * 0.28, y + long)])
        colour: RGB = (150, 176, 216) if backdrop.time == "night" else (206, 224, 246)
        dry = canvas.pixels.copy()
        canvas.lines(pairs, colour, 0.008)
        canvas.pixels[:] = cv2.addWeighted(canvas.pixels, 0.72, dry, 0.28, 0)
    elif backdrop.weather == "snow":
        for _ in range(70):
            canvas.disc(rng.random(), rng.random(), rng.uniform(0.006, 0.0135), (252, 253, 255))
    elif backdrop.weather == "fog":
        pale = lighter(sky_colours(backdrop.time or "day", "fog")[2], 0.1)
        canvas.veil((pale, pale), (0.1, 0.16, 0.2, 0.16))
