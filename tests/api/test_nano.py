"""nano end to end, measured on the pixels that it draws, each measure with a negative control that fails it.

What is drawn was fixed beforehand: seeds count 1, 2, 3 ... in the order of the lists, concepts are every 18th of the
atlas, and no picture was picked by its result. The bounds leave room under what was measured (see each test).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest

import fluxloom as fl
from fluxloom import world
from fluxloom.world.colours import name_shares
from fluxloom.world.words import SIGN_WORDS, article

SIZE = 256
STEPS = 6  # half of the default: the same pictures, a little rougher, in half the time


@cache
def nano() -> fl.Loom:
    return fl.load("nano")


# Cached one by one, not as fixtures of the module: under pytest-xdist each process then draws only what it measures.
@cache
def drawn(prompt: str, seed: int) -> fl.Result:
    return nano().generate(prompt, seed=seed, steps=STEPS)


def pixels(result: fl.Result) -> np.ndarray:
    return np.asarray(result.image)


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32)


# ---------------------------------------------------------------------------------------------- colours


def main_colour(rgb: np.ndarray) -> str:
    """The colour name that covers most of a region; greys do not count."""
    shares = name_shares(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))
    return max(shares.keys() - {"grey"}, key=shares.__getitem__)


def object_and_background(rgb: np.ndarray) -> tuple[str, str]:
    """The main colours of the middle and of the two upper corners."""
    middle = rgb[SIZE * 3 // 8 : SIZE * 5 // 8, SIZE * 3 // 8 : SIZE * 5 // 8]
    return main_colour(middle), main_colour(np.hstack([rgb[:32, :32], rgb[:32, -32:]]))


COLOURED = {
    "a red apple on a white background": ("red", "white"),
    "a blue car on a yellow background": ("blue", "yellow"),
    "粉色背景前，一辆绿色的汽车": ("green", "pink"),
}


def test_things_and_backgrounds_have_the_colours_asked_for() -> None:
    """The control is in the table: all colours differ, so no picture would pass for another's prompt."""
    seen = {prompt: object_and_background(pixels(drawn(prompt, k))) for k, prompt in enumerate(COLOURED, 1)}
    assert seen == COLOURED
