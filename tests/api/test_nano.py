"""nano end to end: what it draws and edits, measured on the pixels, each measure with a control that fails it.

No picture is picked by its result: seeds count up from 1 in the order of the lists, and the concepts are every 18th of
the atlas. What was measured when the bounds were set stands beside them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import fluxloom as fl
from fluxloom import world
from fluxloom.measure.recogniser import Recogniser
from fluxloom.world.colours import name_shares
from fluxloom.world.words import SIGN_WORDS, article

SIZE = 256
STEPS = 8  # half of the defaults: a little rougher, in half the time
PLAIN = world.Backdrop("plain", None, None, None, "purple", (1, 2, 3, 4, 5, 6))
MEADOW = world.Backdrop("meadow", "day", "clear", "summer", None, (1, 2, 3, 4, 5, 6))


@cache
def nano() -> fl.Loom:
    return fl.load("nano")


# Cached one by one, not as a fixture of the module: under pytest-xdist each process then draws only what it measures.
@cache
def result(prompt: str, seed: int) -> fl.Result:
    return nano().generate(prompt, seed=seed, steps=STEPS)


def drawn(prompt: str, seed: int) -> np.ndarray:
    return np.asarray(result(prompt, seed).image)


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.3, 0.59, 0.11])


def main_colour(rgb: np.ndarray, where: np.ndarray | None = None) -> str:
    """The colour name that covers most of a region; greys do not count."""
    alpha = np.full(rgb.shape[:2], 255) if where is None else where * 255
    shares = name_shares(np.dstack([rgb, alpha]).astype(np.uint8))
    return max(shares.keys() - {"grey"}, key=shares.__getitem__)


# ---------------------------------------------------------------------------------------------- colours

COLOURED = {  # prompt -> main colour of the middle of the picture, and of its upper corners
    "a red apple on a white background": ("red", "white"),
    "a blue car on a yellow background": ("blue", "yellow"),
    "粉色背景前，一辆绿色的汽车": ("green", "pink"),
}


def test_things_and_backgrounds_have_the_colours_asked_for() -> None:
    """The table is its own control: all colours differ, so no picture passes for another's prompt."""
    seen = {}
    for seed, prompt in enumerate(COLOURED, 1):
        picture = drawn(prompt, seed)
        corners = np.hstack([picture[:32, :32], picture[:32, -32:]])
        seen[prompt] = main_colour(picture[96:160, 96:160]), main_colour(corners)
    assert seen == COLOURED


# ---------------------------------------------------------------------------------------------- places and times

VIEWS = {
    "meadow": ("a house in a meadow by day in summer", "夏天的白天，草地上有一座房子"),
    "night": ("a house in a meadow at night in summer", "夏天的夜晚，草地上有一座房子"),
    "sunset": ("a house in a meadow at sunset in summer", "夏天的日落时分，草地上有一座房子"),
    "snow": ("a house in a snowy field by day", "白天，雪地里有一座房子"),
    "underwater": ("a fish underwater", "海底有一条鱼"),
}


def sides(picture: np.ndarray, top: int, bottom: int) -> np.ndarray:
    """Both sides of the picture between two rows: backdrop, as the middle belongs to the thing."""
    return np.hstack([picture[top:bottom, :48], picture[top:bottom, -48:]]).astype(np.float32)


def share_of_hues(rgb: np.ndarray, low: float, high: float) -> float:
    """Share of the pixels that have a plain hue between the bounds (degrees) and are not dark."""
    hue, saturation, value = cv2.split(cv2.cvtColor(rgb / np.float32(255), cv2.COLOR_RGB2HSV))
    return float(((hue >= low) & (hue < high) & (saturation > 0.3) & (value > 0.35)).mean())


# measure, bound, the views that pass it; beside them the least of those that pass and the most of the others
MEASURES: dict[str, tuple[Callable[[np.ndarray], float], float, set[str]]] = {
    "dark sky": (lambda p: 1 - float(luma(sides(p, 0, 96)).mean()) / 255, 0.72, {"night"}),
    "green ground": (lambda p: share_of_hues(sides(p, 216, 256), 68, 168), 0.6, {"meadow", "sunset"}),
    "red over green in the sky": (lambda p: float((sides(p, 0, 96) @ [1, -1, 0]).mean()), 45, {"sunset"}),
    "white ground": (lambda p: float(sides(p, 216, 256).min(-1).mean()) / 255, 0.66, {"snow"}),
    "blue all around": (lambda p: share_of_hues(sides(p, 96, 208), 175, 230), 0.5, {"underwater"}),
}


@pytest.mark.parametrize("language", [0, 1], ids=["english", "chinese"])
def test_places_and_times_look_as_asked(language: int) -> None:
    """Each measure holds for the views that were asked to be so, and for no other."""
    first = 1 + language * len(VIEWS)
    views = {name: drawn(prompts[language], seed) for seed, (name, prompts) in enumerate(VIEWS.items(), first)}
    for what, (measure, bound, expected) in MEASURES.items():
        values = {name: measure(view) for name, view in views.items()}
        print(what, {name: round(value, 2) for name, value in values.items()})
        assert {name for name, value in values.items() if value > bound} == expected, (what, values)


# ---------------------------------------------------------------------------------------------- things


@cache
def recogniser() -> Recogniser:
    return Recogniser.load()


def test_the_thing_asked_for_is_drawn() -> None:
    """An independent recogniser, which refuses what is melted, sees the one of 215 things that was asked for.

    Measured: 11 of 12. The control asks for the next one's.
    """
    atlas = world.load_atlas()
    asked = sorted(atlas.concepts)[::18]
    assert len(asked) == 12
    pictures = []
    for seed, concept in enumerate(map(atlas.concept, asked), 1):
        english = f"{article(concept.en)} {concept.en} on a purple background"
        prompt = english if seed % 2 else f"紫色背景前，一{concept.measure}{concept.zh}"
        pictures.append(result(prompt, seed).image)
    seen = [{thing.concept for thing in reading.things} for reading in recogniser().read(pictures)]
    print(dict(zip(asked, seen, strict=True)))
    assert sum(key in things for key, things in zip(asked, seen, strict=True)) >= 9
    assert sum(key in things for key, things in zip(asked[1:] + asked[:1], seen, strict=True)) <= 1


# ---------------------------------------------------------------------------------------------- edits

PAIR = world.Scene(MEADOW, "3d", (world.Item("car", 0.33, 0.9, 0.5, "red"), world.Item("dog", 0.78, 0.92, 0.34)))
SIGN = world.Sign("OPEN", 0.68, 0.9, 0.11)
SIGNED = world.Scene(MEADOW, "3d", (world.Item("penguin", 0.2, 0.9, 0.32),), SIGN)
EDITS = {  # name -> instruction, source, exact target
    "night": ("make it night", PAIR, PAIR.put(time="night")),
    "recolour": ("make the car blue", PAIR, PAIR.with_item(0, colour="blue")),
    "remove": ("去掉狗", PAIR, replace(PAIR, items=PAIR.items[:1])),
    "sign": ('change the sign to "CAFE"', SIGNED, replace(SIGNED, sign=replace(SIGN, text="CAFE"))),
}


@cache
def truth(name: str) -> world.EditPicture:
    _, source, target = EDITS[name]
    return world.render_edit(world.Edit(name, source, target), SIZE)


@cache
def edited(name: str) -> np.ndarray:
    source = Image.fromarray(truth(name).source.pixels)
    seed = 1 + list(EDITS).index(name)
    # What the model itself does; locked, it would keep 44 dB outside of what it removes, not 31.
    return np.asarray(nano().edit(source, EDITS[name][0], seed=seed, steps=STEPS, lock="off").image)


def error(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    return float(np.square(a.astype(np.float64) - b)[where].mean())


def way_gone(picture: np.ndarray, name: str) -> float:
    """How far a picture is on the way from an edit's source (0) to its exact target (1), where they differ."""
    pair = truth(name)
    left = error(picture, pair.target.pixels, pair.change) / error(pair.source.pixels, pair.target.pixels, pair.change)
    return 1 - left


def kept(picture: np.ndarray, name: str) -> float:
    """PSNR against an edit's source outside the pixels that the edit changes."""
    pair = truth(name)
    return float(10 * np.log10(255**2 / error(picture, pair.source.pixels, ~pair.change)))


def elsewhere() -> np.ndarray:
    """Other things in another meadow: as like the source as chance would have it."""
    things = world.Item("house", 0.33, 0.9, 0.5), world.Item("cat", 0.78, 0.92, 0.34)
    return world.render(world.Scene(replace(MEADOW, seeds=(11, 12, 13, 14, 15, 16)), "3d", things), SIZE).pixels


@pytest.mark.parametrize(("name", "other"), [("recolour", "remove"), ("remove", "recolour")])
def test_local_edits_change_what_they_should_and_keep_the_rest(name: str, other: str) -> None:
    """Measured: 0.98 and 0.97 of the way (the other edit: 0.02 at most), 30 and 31 dB outside (other pictures: 13)."""
    ways = way_gone(edited(name), name), way_gone(edited(other), name)
    outside = kept(edited(name), name), kept(elsewhere(), name)
    print(name, ways, outside)
    assert ways[0] > 0.8
    assert ways[1] < 0.2
    assert outside[0] > 26
    assert outside[1] < 18


def test_a_recoloured_thing_has_the_new_colour() -> None:
    pair = truth("recolour")
    car = (pair.source.items == 1) & pair.change
    assert main_colour(pair.source.pixels, car) == "red"
    assert main_colour(edited("recolour"), car) == "blue"
    assert main_colour(edited("remove"), car) == "red"


def contours(picture: np.ndarray) -> np.ndarray:
    grey = cv2.GaussianBlur(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)).ravel()


def test_night_falls_on_the_same_picture() -> None:
    """Measured: 0.30 of the light is left (the truth: 0.47), contours correlate by 0.56 (the truth: 0.56)."""
    source, night = truth("night").source.pixels, edited("night")
    assert luma(night).mean() < 0.55 * luma(source).mean()
    assert luma(edited("recolour")).mean() > 0.9 * luma(source).mean()
    print("light", luma(night).mean() / luma(source).mean())
    same, other = (np.corrcoef(contours(night), contours(picture))[0, 1] for picture in (source, elsewhere()))
    print("contours", same, other)
    assert same > 0.4
    assert other < 0.2


def test_signs_read_the_new_words() -> None:
    """Letter by letter, without a list of words: after "OPEN" the first six of the world. The control is the sign
    before. Locked, as edits are: a lock that put back parts of the old letters would make them unreadable."""
    source = Image.fromarray(truth("sign").source.pixels)
    assert recogniser().read([source])[0].sign == "OPEN"
    words = SIGN_WORDS[1:7]
    pictures = [nano().edit(source, f'change the sign to "{word}"', seed=7, steps=STEPS).image for word in words]
    read = [found.sign for found in recogniser().read(pictures)]
    print("read", read, "of", words)
    assert sum(map(str.__eq__, read, words)) >= 2
    assert np.mean([SequenceMatcher(None, *pair).ratio() for pair in zip(read, words, strict=True)]) > 0.8
    assert "OPEN" not in read
    print("kept", kept(edited("sign"), "sign"))
    assert kept(edited("sign"), "sign") > 21


# ---------------------------------------------------------------------------------------------- promises


def test_replay_is_bit_exact(tmp_path: Path) -> None:
    """At the size that users get. The control is the picture of the next prompt."""
    first, second = (result(prompt, seed) for seed, prompt in enumerate(list(COLOURED)[:2], 1))
    again = nano().replay(first.save(tmp_path / "first.png"))
    assert again.verdict == "bit-exact"
    assert again.result.receipt.pixels == first.receipt.pixels != second.receipt.pixels


FRESH = """
import json, re, time
import fluxloom.api
start = time.process_time()
pipe = fluxloom.api.load("nano")
seconds = time.process_time() - start
pipe.edit(pipe.generate("a red apple", seed=1, steps=2), "make it blue", seed=2, steps=2)
status = open("/proc/self/status").read()
print(json.dumps([seconds, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024**2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_a_fresh_process_loads_fast_and_stays_small() -> None:
    """Promised: under 2 s and 1.5 GB; measured 0.3 s and 0.7 GB. CPU seconds, as the machine may be busy."""
    done = subprocess.run([sys.executable, "-c", FRESH], check=True, capture_output=True, text=True, timeout=120)
    seconds, gigabytes = json.loads(done.stdout)
    print(f"{seconds:.2f} s, {gigabytes:.2f} GB")
    assert 0.01 < seconds < 2
    assert 0.1 < gigabytes < 1.5
