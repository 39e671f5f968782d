"""Readers that know the truth: one that recognises the world's own pictures, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from PIL import Image

from fluxloom.evals.cases import SIZE, Case
from fluxloom.infer.pictures import pixel_hash
from fluxloom.measure.recogniser import Guess, Reading, Seen
from fluxloom.world import Scene, load_atlas, render

NONE = Guess("none", 0.0)
BLANK = Reading((), (), *[NONE] * 7, sign="", sign_p=0.0, sign_board=0.0)


def reading_of(scene: Scene) -> Reading:
    """What a reader that makes no mistakes sees. A colour that is a thing's own is none that it was painted in."""
    marks, things = render(scene, SIZE).items, []
    for number, item in enumerate(scene.items, 1):
        mask = marks == number
        ys, xs = np.nonzero(mask)
        own = load_atlas().concept(item.concept).natural == item.colour
        at = float(xs.mean() / SIZE), float(ys.mean() / SIZE), float(mask.mean())
        things.append(Seen(item.concept, 1.0, *at, None if own else item.colour, 1.0))
    back, word = scene.backdrop, scene.sign.text if scene.sign else ""
    labels = (back.place, back.time, back.weather, back.season, scene.style, scene.filter, back.hue)
    guesses = [Guess(label or "none", 1.0) for label in labels]
    return Reading(tuple(things), tuple(things), *guesses, sign=word, sign_p=1.0, sign_board=float(bool(word)))


class TruthReader:
    """Reads the true pictures of some cases without mistake, and sees nothing in any other picture."""

    content = "sha256:truth"

    def __init__(self, cases: Iterable[Case]) -> None:
        self.known: dict[str, Scene] = {}
        self.batches: list[int] = []
        for case in cases:
            truth = case.truth()
            self.known[pixel_hash(truth.target)] = case.scene
            if truth.source is not None and case.edit is not None:
                self.known[pixel_hash(truth.source)] = case.edit.source

    def read(self, batch: Sequence[Image.Image]) -> list[Reading]:
        self.batches.append(len(batch))
        scenes = [self.known.get(pixel_hash(picture)) for picture in batch]
        return [BLANK if scene is None else reading_of(scene) for scene in scenes]


@pytest.fixture
def blank() -> Reading:
    return BLANK


@pytest.fixture
def read_scene() -> Callable[[Scene], Reading]:
    return reading_of


@pytest.fixture
def truth_reader() -> type[TruthReader]:
    return TruthReader
