"""The open-air places: layer upon layer, from the far land to what lies at one's feet."""

from __future__ import annotations

import random
from dataclasses import replace

from fluxloom.world.paint import RGB, Point, below, darker, height_at, lighter, mix, ridge
from fluxloom.world.sky import SUN, Setting

GRASS: dict[str, tuple[RGB, RGB, RGB]] = {  # far, near top, near bottom
    "spring": ((164, 206, 128), (134, 204, 92), (84, 164, 70)),
    "summer": ((120, 182, 106), (98, 184, 78), (54, 138, 62)),
    "autumn": ((214, 178, 98), (206, 166, 80), (160, 118, 56)),
    "winter": ((226, 236, 246), (240, 246, 252), (206, 220, 238)),
}


def hills(
    s: Setting, base: float, layers: int, colours: tuple[RGB, RGB, RGB], swing: float = 0.05
) -> list[list[Point]]:
    """Rolling land in layers that come nearer; returns the skyline of each."""
    rng, c, lines = s.rng("far"), s.canvas, []
    for k in range(layers):
        line = ridge(rng, base + 0.06 * k, swing * (1 - 0.22 * k), 1.3 + 0.5 * k)
        near = (k + 1) / (layers + 1)
        top = s.far(mix(colours[0], colours[1], near), 0.5 * (1 - near))
        low = s.far(mix(colours[0], colours[2], near), 0.35 * (1 - near))
        c.shaded(below(line, 1.0), (top,) if c.flat else (top, low, low))
        if c.style == "cartoon":
            c.line(line, darker(top, 0.35), 0.007)
        elif not c.flat:
            c.line([(x, y + 0.004) for x, y in line], lighter(top, 0.28), 0.007)
        lines.append(line)
    return lines


def near_ground(s: Setting, base: float, top: RGB, low: RGB, swing: float = 0.02) -> list[Point]:
    c, lit = s.canvas, s.light.on
    line = ridge(s.rng("ground"), base, swing, 1.1)
    c.shaded(below(line), (lit(mix(top, low, 0.35)),) if c.flat else (lit(top), lit(mix(top, low, 0.5)), lit(low)))
    if c.style == "cartoon":
        c.line(line, darker(lit(top), 0.35), 0.007)
    return line


def stripes(s: Setting, line: list[Point], top: RGB, low: RGB) -> None:
    """Gentle lighter swathes over near ground."""
    if s.canvas.flat:
        return
    rng = s.rng("ground")
    for k in range(3):
        y = 0.1 + 0.1 * k
        swathe = [(x, h + y * (1 + 0.5 * k) + 0.012 * rng.uniform(-1, 1)) for x, h in line[::3]]
        under = [(x, h + 0.02 + 0.012 * k) for x, h in swathe]
        s.canvas.poly([*swathe, *under[::-1]], s.light.on(mix(mix(top, low, 0.3 + 0.25 * k), (255, 255, 230), 0.1)))


def scatter(
    s: Setting, line: list[Point], kind: str, count: int, size: float, variants: int, layer: str = "details"
) -> None:
    """Small things over the near ground, growing towards the viewer."""
    rng = random.Random(f"{s.backdrop.seed(layer)}/{kind}")
    spots = sorted((rng.random(), rng.random()) for _ in range(count))
    for depth, x in spots:
        foot = height_at(line, x)
        y = foot + 0.03 + (0.98 - foot) * depth
        s.decor(kind, x, y, size * (0.55 + 0.75 * depth), rng.randrange(variants), rng.random() < 0.5)


def season_details(s: Setting, line: list[Point], rich: float = 1.0) -> None:
    """Flowers in spring, tufts in summer, leaves in autumn."""
    scatter(s, line, "tuft", round(9 * rich), 0.075, 4)
    if s.season == "spring":
        scatter(s, line, "flower", round(17 * rich), 0.085, 6)
    elif s.season == "summer":
        scatter(s, line, "flower", round(5 * rich), 0.075, 6)
    elif s.season == "autumn":
        scatter(s, line, "leaf", round(22 * rich), 0.055, 4)


def grove(
    s: Setting, line: list[Point], kinds: tuple[str, ...], count: int, size: float, distance: float, key: str
) -> None:
    """Trees standing along a skyline."""
    rng = random.Random(f"{s.backdrop.seed('far')}/{key}")
    for _ in range(count):
        x, scale = rng.random(), rng.uniform(0.8, 1.25)
        kind, variant, mirror = rng.choice(kinds), rng.randrange(4), rng.random() < 0.5
        s.decor(kind, x, height_at(line, x) + 0.012 + 0.02 * distance, size * scale, variant, mirror)


def meadow(s: Setting) -> None:
    colours = GRASS[s.season]
    lines = hills(s, 0.5, 3, colours)
    grove(s, lines[1], ("tree", "tree", "bush"), 7, 0.1, 0.2, "a")
    line = near_ground(s, 0.68, colours[1], colours[2])
    stripes(s, line, colours[1], colours[2])
    rng = s.rng("details")
    for side in (-1, 1):
        if rng.random() < 0.75:
            x = 0.5 + side * rng.uniform(0.36, 0.5)
            s.decor("tree", x, 0.72 + rng.uniform(0, 0.05), rng.uniform(0.34, 0.46), rng.randrange(4), side < 0)
    season_details(s, line)


PEAKS = (((0.05, 0.3), (0.4, 0.6), (0.72, 0.98)), ((-0.1, 0.3), (0.3, 0.7), (0.7, 1.1)))  # where they may stand


def mountains(s: Setting) -> None:
    c, rng = s.canvas, s.rng("far")
    for k, (base, tall, haze) in enumerate(((0.62, 0.34, 0.5), (0.66, 0.27, 0.22))):
        xs = [rng.uniform(*span) for span in PEAKS[k]]
        for x in xs:
            _peak(s, rng, x, base, tall * rng.uniform(0.72, 1.1), haze)
    colours = GRASS[s.season]
    line = ridge(rng, 0.63, 0.02, 1.5)
    tone = s.far(mix(colours[1], (40, 96, 80), 0.35 if s.season != "winter" else 0.05), 0.18)
    c.poly(below(line), tone)
    grove(s, line, ("pine",), 15, 0.13, 0.3, "a")
    line = near_ground(s, 0.71, colours[1], colours[2])
    stripes(s, line, colours[1], colours[2])
    scatter(s, line, "rock", 4, 0.11, 3)
    season_details(s, line, 0.6)


def _peak(s: Setting, rng: random.Random, x: float, base: float, tall: float, haze: float) -> None:
    c = s.canvas
    stone: RGB = (128, 132, 160) if s.season != "winter" else (158, 170, 198)
    half = tall * rng.uniform(0.72, 0.95)
    top = base - tall
    jag = [rng.uniform(-0.02, 0.02) for _ in range(6)]
    left: list[Point] = [
        (x - half, base),
        (x - half * 0.55 + jag[0], base - tall * 0.42),
        (x - half * 0.22 + jag[1], base - tall * 0.78),
    ]
    right: list[Point] = [
        (x + half * 0.25 + jag[2], base - tall * 0.74),
        (x + half * 0.6 + jag[3], base - tall * 0.38),
        (x + half, base),
    ]
    spine: list[Point] = [(x, top), (x + 0.04, base - tall * 0.6), (x - 0.02, base - tall * 0.35), (x + 0.05, base)]
    lit, shade = s.far(lighter(stone, 0.14), haze), s.far(darker(stone, 0.3), haze)
    c.poly([*left, *spine], lit)
    c.poly([spine[0], *right, *spine[:0:-1]], shade)
    deep = 0.5 if s.season == "winter" else 0.3
    snow, blue = s.far((252, 253, 255), haze * 0.6), s.far((204, 216, 240), haze * 0.6)

    def at(a: Point, b: Point, t: float) -> Point:
        return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t

    foot_l, foot_r = at((x, top), left[1], deep * 1.5), at((x, top), right[1], deep * 1.5)
    mid = (x + 0.02, top + tall * deep * 0.9)
    c.poly([(x, top), at((x, top), left[2], 0.8), foot_l, at(foot_l, mid, 0.4), mid], snow)
    c.poly([(x, top), at((x, top), right[0], 0.8), foot_r, at(foot_r, mid, 0.35), (mid[0], mid[1] + 0.02)], blue)
    if c.style == "cartoon":
        c.line([*left, (x, top), *right], darker(shade, 0.35), 0.007)


def forest(s: Setting) -> None:
    c, colours = s.canvas, GRASS[s.season]
    rng = s.rng("far")
    kinds = ("pine", "pine", "tree") if rng.random() < 0.5 else ("tree", "tree", "pine")
    back = ridge(rng, 0.56, 0.02, 1.4)
    wood: RGB = {
        "spring": (104, 168, 96),
        "summer": (58, 124, 82),
        "autumn": (196, 128, 66),
        "winter": (176, 194, 210),
    }[s.season]
    for k in range(2):
        tops: list[Point] = []
        x = -0.04
        while x < 1.06:
            y = 0.3 + 0.09 * k + rng.uniform(-0.05, 0.05)
            step = rng.uniform(0.03, 0.05)
            tops += [(x, y + 0.07), (x + step / 2, y), (x + step, y + 0.07)]
            x += step
        c.poly(below(tops, 0.66), s.far(darker(wood, 0.1 * k), 0.55 - 0.25 * k))
    grove(s, back, kinds, 13, 0.3, 0.4, "a")
    line = near_ground(s, 0.62, mix(colours[1], (60, 110, 60), 0.25 if s.season != "winter" else 0), colours[2])
    path: RGB = (206, 176, 132) if s.season != "winter" else (222, 228, 238)
    foot = rng.uniform(0.42, 0.58)
    c.poly([(foot - 0.035, 0.63), (foot + 0.035, 0.63), (0.66, 1.02), (0.3, 1.02)], s.light.on(path))
    front = s.rng("details")
    for side in (-1, 1):
        s.decor(
            front.choice(kinds),
            0.5 + side * front.uniform(0.38, 0.48),
            0.8,
            front.uniform(0.56, 0.72),
            front.randrange(4),
            side < 0,
        )
        s.decor("bush", 0.5 + side * front.uniform(0.33, 0.46), 0.86, 0.16, front.randrange(4))
    season_details(s, line, 0.7)


def snow(s: Setting) -> None:
    lines = hills(s, 0.54, 2, ((214, 228, 244), (230, 238, 250), (206, 220, 242)))
    winter = replace(s, backdrop=replace(s.backdrop, season="winter"))
    grove(winter, lines[0], ("pine", "pine", "tree"), 9, 0.15, 0.2, "a")
    line = near_ground(s, 0.68, (246, 250, 255), (202, 218, 242))
    c, rng = s.canvas, s.rng("details")
    for _ in range(5):
        x, y = rng.random(), rng.uniform(0.76, 0.96)
        c.oval(x, y, rng.uniform(0.08, 0.18), 0.014, s.light.on((222, 233, 248)))
    for side in (-1, 1):
        winter.decor("pine", 0.5 + side * rng.uniform(0.37, 0.48), 0.76, rng.uniform(0.32, 0.46), rng.randrange(4))
    if not c.flat:
        for _ in range(24):
            x = rng.random()
            c.disc(x, rng.uniform(height_at(line, x) + 0.02, 1), 0.0045, lighter(s.light.on((250, 252, 255)), 0.5))


def desert(s: Setting) -> None:
    c, rng = s.canvas, s.rng("far")
    rock: RGB = (206, 128, 88)
    for _ in range(2):
        x, wide, tall = rng.uniform(0.05, 0.95), rng.uniform(0.12, 0.24), rng.uniform(0.1, 0.19)
        lit = s.far(rock, 0.3)
        c.poly(
            [(x - wide * 0.62, 0.6), (x - wide / 2, 0.57 - tall), (x + wide / 2, 0.57 - tall), (x + wide * 0.62, 0.6)],
            lit,
        )
        c.poly(
            [
                (x + wide * 0.1, 0.6),
                (x + wide * 0.16, 0.57 - tall),
                (x + wide / 2, 0.57 - tall),
                (x + wide * 0.62, 0.6),
            ],
            darker(lit, 0.16),
        )
    for k in range(3):
        _dune(s, rng, 0.56 + 0.075 * k, 0.5 - 0.2 * k)
    ground = near_ground(s, 0.77, (248, 212, 142), (222, 172, 100))
    front = s.rng("details")
    for k in range(6):
        y, x = 0.82 + 0.032 * k, front.uniform(0, 0.7)
        c.line([(x, y), (x + 0.08, y - 0.006), (x + 0.16, y + 0.002)], s.light.on((230, 184, 114)), 0.007)
    for side in (-1, 1):
        if front.random() < 0.8:
            s.decor("cactus", 0.5 + side * front.uniform(0.34, 0.46), 0.8, front.uniform(0.2, 0.34), front.randrange(4))
    scatter(s, ground, "rock", 3, 0.08, 3)


def _dune(s: Setting, rng: random.Random, base: float, haze: float) -> None:
    c = s.canvas
    peak = rng.uniform(0.15, 0.85)
    high = rng.uniform(0.05, 0.09)
    left: list[Point] = [
        (-0.02, base + 0.05),
        (peak - 0.28, base + 0.012),
        (peak - 0.1, base - high * 0.72),
        (peak, base - high),
    ]
    right: list[Point] = [(peak + 0.16, base - high * 0.35), (peak + 0.36, base + 0.02), (1.02, base + 0.045)]
    lit, dark = s.far((248, 206, 134), haze), s.far((214, 152, 92), haze)
    c.poly(below([*left, *right]), lit)
    c.poly(
        [(peak, base - high), *right, (1.02, base + 0.2), (peak + 0.12, base + 0.2), (peak + 0.03, base + 0.05)],
        dark if c.flat else mix(dark, lit, 0.25),
    )
    if c.style == "cartoon":
        c.line([*left, *right], darker(dark, 0.3), 0.006)


def _water(s: Setting, top: float, bottom: float, near: RGB) -> None:
    """Water that mirrors the low sky, with a path of light under sun or moon."""
    c, b = s.canvas, s.backdrop
    lit = s.light.on(near)
    c.gradient((mix(lit, s.low_sky, 0.55), lit, darker(lit, 0.12)), top, bottom, bands=4 if c.flat else 0)
    rng = s.rng("far")
    crest = mix(lit, lighter(s.low_sky, 0.3), 0.5)
    pairs = []
    for _ in range(34):
        depth = rng.random()
        x, y, half = rng.random(), top + 0.015 + (bottom - top - 0.03) * depth, 0.012 + 0.03 * depth
        pairs.append([(x - half, y), (x, y - 0.004 - 0.005 * depth), (x + half, y)])
    c.lines(pairs, crest, 0.006)
    if b.weather == "clear":
        gleam = []
        for k in range(9):
            y, half = top + 0.012 + (bottom - top - 0.03) * k / 9, 0.02 + 0.008 * k + 0.03 * rng.random()
            gleam.append([(s.sun_x - half, y), (s.sun_x + half, y)])
        shine = (208, 214, 250) if s.night else lighter(SUN[b.time or "day"], 0.45)
        c.lines(gleam, mix(lit, shine, 0.72), 0.009)


def sea(s: Setting) -> None:
    c = s.canvas
    rng = random.Random(s.backdrop.seed("details"))
    _water(s, 0.48, 1.0, (32, 120, 196))
    if rng.random() < 0.6:
        x, wide = rng.uniform(0.1, 0.9), rng.uniform(0.12, 0.2)
        c.poly(
            [(x - wide, 0.483), (x - wide * 0.45, 0.455), (x, 0.425), (x + wide * 0.5, 0.452), (x + wide, 0.483)],
            s.far((86, 140, 110), 0.4),
        )
    for k in range(3):
        y = 0.66 + 0.13 * k
        wave = ridge(rng, y, 0.012, 5.0, 40)
        tone = s.light.on(mix((46, 140, 206), (20, 88, 160), k / 3))
        c.poly(below(wave), tone) if c.flat else c.shaded(
            below(wave), (lighter(tone, 0.14), tone, tone, darker(tone, 0.12))
        )
        c.line(wave, mix(tone, lighter(s.low_sky, 0.5), 0.6), 0.009)


def beach(s: Setting) -> None:
    c, lit = s.canvas, s.light.on
    _water(s, 0.46, 0.72, (34, 146, 206))
    rng = s.rng("ground")
    shore = ridge(rng, 0.665, 0.014, 1.6)
    c.poly(below([(x, y - 0.022) for x, y in shore]), mix(lit((236, 250, 252)), s.low_sky, 0.12))
    c.poly(below([(x, y - 0.004) for x, y in shore]), lit((214, 186, 134)))
    sand = [(x, y + 0.03) for x, y in shore]
    c.shaded(
        below(sand),
        (lit((250, 226, 168)),) if c.flat else (lit((246, 218, 158)), lit((252, 230, 178)), lit((236, 202, 140))),
    )
    front = s.rng("details")
    for _ in range(9):
        x, y = front.random(), front.uniform(0.76, 0.98)
        c.line([(x, y), (x + 0.05, y - 0.006), (x + 0.1, y)], lit((234, 204, 146)), 0.006)
    scatter(s, sand, "shell", 5, 0.07, 2)
    side = front.choice((-1, 1))
    s.decor(
        "palm", 0.5 + side * front.uniform(0.38, 0.46), 0.78, front.uniform(0.5, 0.64), front.randrange(4), side > 0
    )
