"""The other places: streets, a room, under water, outer space, a plain backdrop; and the one door to them all."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from fluxloom.world import places
from fluxloom.world.paint import RGB, Light, Point, below, darker, lighter, mix, ridge
from fluxloom.world.places import GRASS, grove, hills, near_ground, scatter, season_details
from fluxloom.world.sky import SUN, Setting, paint_fog, paint_sky, sky_colours

HUES: dict[str, RGB] = {
    "red": (214, 72, 72), "orange": (246, 164, 88), "yellow": (250, 218, 110), "green": (140, 202, 140),
    "blue": (126, 182, 236), "purple": (178, 148, 224), "pink": (248, 178, 204), "brown": (158, 116, 84),
    "black": (46, 46, 54), "white": (244, 245, 248),
}  # fmt: skip


def _skyline(s: Setting, base: float, tall: float, haze: float, key: str, windows: bool) -> None:
    c = s.canvas
    rng = random.Random(f"{s.backdrop.seed('far')}/{key}")
    x = rng.uniform(-0.08, 0.0)
    lit_window: RGB = (255, 222, 130)
    while x < 1.0:
        wide, high = rng.uniform(0.1, 0.17), tall * rng.uniform(0.5, 1.15)
        paint: RGB = rng.choice(((206, 140, 116), (150, 168, 196), (226, 196, 150), (128, 142, 176), (196, 170, 176)))
        wall = s.far(paint, haze)
        top = base - high
        c.poly([(x, base), (x, top), (x + wide, top), (x + wide, base)], wall)
        c.poly([(x + wide * 0.72, base), (x + wide * 0.72, top), (x + wide, top), (x + wide, base)], darker(wall, 0.13))
        roof = rng.random()
        if roof < 0.3:
            c.poly([(x, top), (x + wide / 2, top - 0.05), (x + wide, top)], darker(wall, 0.2))
        elif roof < 0.5:
            c.line([(x + wide / 2, top), (x + wide / 2, top - 0.07)], darker(wall, 0.25), 0.008)
        if windows:
            columns, rows = 3, max(2, int(high / 0.055))
            for i in range(columns):
                for j in range(rows):
                    shine = rng.random() < 0.62
                    wx, wy = x + wide * (0.14 + 0.28 * i), top + 0.022 + 0.055 * j
                    if wy < base - 0.03:
                        glass = (
                            (lit_window if shine else darker(wall, 0.35))
                            if s.night
                            else mix(wall, (226, 240, 255), 0.62)
                        )
                        c.rect(wx, wy, wx + wide * 0.18, wy + 0.03, glass)
        if c.style == "cartoon":
            c.line([(x, base), (x, top), (x + wide, top), (x + wide, base)], darker(wall, 0.45), 0.006)
        x += wide + rng.uniform(-0.01, 0.02)


def city(s: Setting) -> None:
    c, lit = s.canvas, s.light.on
    _skyline(s, 0.68, 0.46, 0.55, "a", False)
    _skyline(s, 0.72, 0.34, 0.12, "b", True)
    rng = s.rng("details")
    white = s.season == "winter"
    for k in range(7):
        s.decor("bush" if k % 2 else "tree", rng.random(), 0.745, 0.1 if k % 2 else 0.2, rng.randrange(4))
    walk: RGB = (232, 238, 246) if white else (198, 196, 200)
    c.gradient((lit(walk), lit(darker(walk, 0.1))), 0.735, 0.83)
    c.rect(0, 0.82, 1, 0.836, lit((156, 154, 162)))
    road: RGB = (176, 182, 194) if white else (96, 98, 110)
    c.gradient((lit(road), lit(darker(road, 0.18))), 0.835, 1.0)
    for k in range(4):
        x = 0.04 + 0.26 * k
        c.poly([(x, 0.915), (x + 0.13, 0.915), (x + 0.125, 0.932), (x - 0.008, 0.932)], lit((246, 232, 180)))
    for x in (rng.uniform(0.08, 0.2), rng.uniform(0.8, 0.92)):
        _street_lamp(s, x)
    if s.season == "autumn":
        scatter(s, [(0.0, 0.74), (1.0, 0.74)], "leaf", 12, 0.05, 4)


def _street_lamp(s: Setting, x: float) -> None:
    s.decor("lamp", x, 0.79, 0.36)
    if s.night:
        s.canvas.glow(x, 0.47, 0.15, (255, 214, 120), 0.9)
        s.canvas.disc(x, 0.48, 0.018, (255, 244, 196))


def road(s: Setting) -> None:
    c, lit, colours = s.canvas, s.light.on, GRASS[s.season]
    lines = hills(s, 0.5, 2, colours, 0.035)
    grove(s, lines[0], ("tree", "bush"), 6, 0.1, 0.2, "a")
    line = near_ground(s, 0.585, colours[1], colours[2], 0.0)
    season_details(s, line, 0.7)
    asphalt: RGB = (98, 100, 112) if s.season != "winter" else (150, 158, 172)
    c.shaded([(0.47, 0.585), (0.53, 0.585), (1.02, 1.02), (-0.02, 1.02)], (lit(asphalt), lit(darker(asphalt, 0.15))))
    for side in (-1, 1):
        c.poly(
            [
                (0.5 + side * 0.024, 0.585),
                (0.5 + side * 0.027, 0.585),
                (0.5 + side * 0.47, 1.02),
                (0.5 + side * 0.44, 1.02),
            ],
            lit((238, 238, 236)),
        )
    for near, far in ((0.0, 0.16), (0.3, 0.48), (0.66, 0.9)):
        ya, yb = 0.6 + 0.42 * near, 0.6 + 0.42 * far
        wa, wb = 0.003 + 0.016 * near, 0.003 + 0.016 * far
        c.poly([(0.5 - wa, ya), (0.5 + wa, ya), (0.5 + wb, yb), (0.5 - wb, yb)], lit((255, 222, 96)))
    rng = s.rng("details")
    for side in (-1, 1):
        for depth in (0.15, 0.55):
            x = 0.5 + side * (0.14 + 0.42 * depth + rng.uniform(0, 0.06))
            s.decor("tree", x, 0.61 + 0.2 * depth, 0.16 + 0.32 * depth, rng.randrange(4), side < 0)


def room(s: Setting) -> None:
    c, b = s.canvas, s.backdrop
    light = Light((0.74, 0.74, 0.88), 0.0) if s.night else (Light((1.0, 0.94, 0.88)) if b.time == "sunset" else Light())
    wall = light.on(mix(HUES[b.hue or "blue"], (255, 255, 255), 0.25))
    c.gradient((wall,) if c.flat else (lighter(wall, 0.1), wall, darker(wall, 0.08)), 0, 0.74)
    rng = s.rng("far")
    if rng.random() < 0.6:
        for k in range(13):
            x = 0.04 + k / 13
            c.rect(x, 0, x + 0.03, 0.72, mix(wall, (255, 255, 255), 0.16))
    _window(s, light, rng.choice((0.2, 0.24, 0.76, 0.8)))
    wood: RGB = rng.choice(((196, 142, 92), (172, 118, 76), (214, 168, 116)))
    planks = light.on(wood)
    c.gradient((planks,) if c.flat else (darker(planks, 0.1), planks, lighter(planks, 0.06)), 0.74, 1.0)
    for k in range(5):
        y = 0.74 + 0.26 * (k / 5) ** 1.3
        c.line([(0, y), (1, y)], darker(planks, 0.2), 0.005)
    for k in range(9):
        x = (k - 4) / 4
        c.line([(0.5 + x * 0.5, 0.75), (0.5 + x * 0.86, 1.0)], darker(planks, 0.13), 0.004)
    c.rect(0, 0.715, 1, 0.745, light.on((248, 246, 240)))
    rug: RGB = rng.choice(((206, 96, 96), (98, 132, 186), (116, 164, 128), (222, 176, 96)))
    c.oval(0.5, 0.91, 0.42, 0.075, light.on(rug))
    c.oval(0.5, 0.91, 0.36, 0.058, light.on(lighter(rug, 0.22)))


def _window(s: Setting, light: Light, x: float) -> None:
    c, time = s.canvas, s.backdrop.time or "day"
    half, top, bottom = 0.135, 0.14, 0.5
    c.rect(x - half - 0.02, top - 0.02, x + half + 0.02, bottom + 0.02, light.on((250, 248, 244)))
    pane: list[Point] = [(x - half, top), (x + half, top), (x + half, bottom), (x - half, bottom)]
    c.shaded(pane, sky_colours(time, "clear"), 4 if c.flat else 0)
    if time == "night":
        rng = s.rng("sky")
        for _ in range(9):
            c.disc(x + rng.uniform(-half, half) * 0.9, rng.uniform(top + 0.02, bottom - 0.1), 0.005, (250, 246, 222))
        c.disc(x + 0.05, top + 0.09, 0.033, (250, 244, 214))
    else:
        c.disc(x + 0.055, top + (0.08 if time == "day" else 0.22), 0.033, SUN[time])
    hill: RGB = {"day": (112, 184, 96), "sunset": (126, 92, 96), "dawn": (132, 150, 130), "night": (34, 50, 80)}[time]
    c.poly(
        [
            (x - half, bottom),
            (x - half, bottom - 0.08),
            (x, bottom - 0.055),
            (x + half, bottom - 0.1),
            (x + half, bottom),
        ],
        hill,
    )
    frame = light.on((250, 248, 244))
    c.line([(x, top), (x, bottom)], frame, 0.014)
    c.line([(x - half, (top + bottom) / 2), (x + half, (top + bottom) / 2)], frame, 0.014)
    cloth = light.on(lighter(HUES[s.rng("details").choice(("red", "yellow", "green", "purple", "white"))], 0.12))
    for side in (-1, 1):
        e = x + side * (half + 0.05)
        c.poly(
            [
                (e, top - 0.04),
                (e - side * 0.1, top - 0.04),
                (e - side * 0.07, top + 0.2),
                (e - side * 0.035, bottom + 0.06),
                (e + side * 0.01, bottom + 0.06),
            ],
            cloth,
        )
        c.line([(e - side * 0.035, top - 0.02), (e - side * 0.018, bottom + 0.05)], darker(cloth, 0.14), 0.006)
    c.line([(x - half - 0.08, top - 0.045), (x + half + 0.08, top - 0.045)], light.on((140, 100, 70)), 0.014)


def underwater(s: Setting) -> None:
    c = s.canvas
    c.gradient(((94, 206, 226), (36, 140, 198), (16, 80, 150)), 0, 1, bands=6 if c.flat else 0)
    rng = s.rng("sky")
    if not c.flat:
        for _ in range(4):
            x, wide = rng.uniform(0, 1), rng.uniform(0.03, 0.08)
            c.shaded_ray(x, wide, rng.uniform(-0.25, 0.1))
    far = s.rng("far")
    for k in range(2):
        line = ridge(far, 0.74 + 0.05 * k, 0.05, 2.2)
        c.poly(below(line), mix((18, 92, 150), (40, 120, 150), k))
    line = ridge(s.rng("ground"), 0.85, 0.02, 1.4)
    c.shaded(below(line), ((222, 206, 150),) if c.flat else ((226, 214, 160), (178, 170, 136)))
    rng = s.rng("details")
    for side in (-1, 1):
        for _ in range(3):
            kind = rng.choice(("weed", "weed", "coral", "rock"))
            x = 0.5 + side * rng.uniform(0.26, 0.5)
            s.decor(
                kind,
                x,
                0.9 + rng.uniform(-0.02, 0.06),
                {"weed": 0.34, "coral": 0.22, "rock": 0.18}[kind] * rng.uniform(0.8, 1.2),
                rng.randrange(6),
            )
    bubbles = s.rng("clouds")
    for _ in range(16):
        x, y, r = bubbles.random(), bubbles.uniform(0.04, 0.8), bubbles.uniform(0.006, 0.017)
        c.disc(x, y, r, (170, 228, 244))
        c.disc(x - r * 0.25, y - r * 0.25, r * 0.6, (222, 246, 252))


def space(s: Setting) -> None:
    c = s.canvas
    c.gradient(((18, 12, 46), (34, 20, 78), (16, 14, 52)), 0, 1, bands=5 if c.flat else 0)
    rng = s.rng("clouds")
    if not c.flat:
        for _ in range(5):
            tint: RGB = rng.choice(((120, 50, 170), (40, 80, 180), (170, 50, 120)))
            c.glow(rng.random(), rng.random(), rng.uniform(0.25, 0.45), tint, 0.5)
    stars = s.rng("sky")
    for _ in range(80):
        x, y, r = stars.random(), stars.random(), stars.uniform(0.002, 0.0055)
        c.disc(x, y, r, (255, 250, 228) if r > 0.0035 else (164, 168, 220))
    for _ in range(3):
        x, y, r = stars.random(), stars.uniform(0, 0.5), stars.uniform(0.014, 0.024)
        c.poly(
            [
                (x, y - r),
                (x + r * 0.18, y - r * 0.18),
                (x + r, y),
                (x + r * 0.18, y + r * 0.18),
                (x, y + r),
                (x - r * 0.18, y + r * 0.18),
                (x - r, y),
                (x - r * 0.18, y - r * 0.18),
            ],
            (255, 252, 236),
        )
    _planet(s)


def _planet(s: Setting) -> None:
    c, rng = s.canvas, s.rng("far")
    x, y, r = (
        rng.choice((rng.uniform(0.08, 0.24), rng.uniform(0.76, 0.92))),
        rng.uniform(0.12, 0.3),
        rng.uniform(0.08, 0.13),
    )
    tone: RGB = rng.choice(((238, 150, 96), (96, 170, 226), (206, 128, 210), (120, 204, 160)))
    if not c.flat:
        c.glow(x, y, r * 2.2, tone, 0.45)
    c.disc(x, y, r, darker(tone, 0.3))
    c.disc(x - r * 0.12, y - r * 0.12, r * 0.86, tone)
    for k in (-0.35, 0.1, 0.45):
        half = r * 0.72 * math.cos(k)
        c.line(
            [(x - r * 0.12 - half, y + k * r), (x - r * 0.12 + half * 0.8, y + k * r + 0.008)],
            lighter(tone, 0.25),
            0.012,
        )
    # The pale ground of a moon: something to stand on.
    line = ridge(s.rng("ground"), 0.87, 0.022, 1.3)
    c.shaded(below(line), ((150, 148, 178),) if c.flat else ((176, 174, 204), (104, 100, 140)))
    ground = s.rng("details")
    for _ in range(7):
        cx, cy, cr = ground.random(), ground.uniform(0.91, 1.0), ground.uniform(0.02, 0.05)
        c.oval(cx, cy, cr, cr * 0.36, (112, 108, 146))
        c.oval(cx + 0.003, cy + 0.005, cr * 0.86, cr * 0.26, (138, 134, 168))


def plain(s: Setting) -> None:
    c = s.canvas
    tone = HUES[s.backdrop.hue or "blue"]
    c.gradient((tone,) if c.flat else (lighter(tone, 0.12), tone, tone, darker(tone, 0.1)))
    if not c.flat:
        c.glow(0.5, 0.45, 0.62, lighter(tone, 0.2), 0.16)


PAINTERS: dict[str, tuple[Callable[[Setting], None], float]] = {  # place -> painter, horizon (0: no sky of its own)
    "meadow": (places.meadow, 0.58), "beach": (places.beach, 0.46), "sea": (places.sea, 0.48),
    "desert": (places.desert, 0.64), "mountains": (places.mountains, 0.66), "forest": (places.forest, 0.52),
    "snow": (places.snow, 0.62), "city": (city, 0.7), "road": (road, 0.56), "room": (room, 0.0),
    "underwater": (underwater, 0.0), "space": (space, 0.0), "plain": (plain, 0.0),
}  # fmt: skip


def paint_place(s: Setting) -> None:
    painter, horizon = PAINTERS[s.backdrop.place]
    if horizon:
        paint_sky(s, horizon)
    painter(s)
    if s.backdrop.weather == "fog":
        paint_fog(s)
