"""How far chains of edits drift: nano, ten edits one upon the other, plainly chained and with locked pixels.

    python bench/drift.py --chains 6 --steps 8 --out bench/results/2026-11-21-drift.json --figure docs/images/drift.webp

A chain starts from a render of the illustrated world with two or three things, and in half of them a sign. The first
thing, the hero, is never named by an instruction. Edits (recolour, replace, reword) are of kinds that leave nothing
open, so that the exact renders tell which pixels may change (and SPARE around them); in every other chain the sixth is
of the whole picture (time or weather). Both arms get the same instructions and noise. Plain: every turn edits the last
output. Locked: of every output only what changed goes back into the last picture. What is measured is what should not
have changed, against the first picture; an edit of everything starts the count anew. Nothing is saved with losses.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

import fluxloom as fl
from fluxloom.edit.curves import curves
from fluxloom.edit.drift import Drift
from fluxloom.edit.lock import lock
from fluxloom.evals.cases import EDITS
from fluxloom.infer.request import Reference, Request
from fluxloom.measure.identity import WorldIdentity
from fluxloom.measure.recogniser import Recogniser
from fluxloom.world import Edit, Mix, Scene, load_atlas, render, render_edit
from fluxloom.world import edits as proposals
from fluxloom.world import mix as draw
from fluxloom.world.render import sign_box
from fluxloom.world.scene import PLACES
from fluxloom.world.words import SIGN_WORDS

SIZE = 256
TURNS = 10
GLOBAL = 6  # the turn with an edit of everything, in every other chain
SPARE = 6  # pixels around what changes between the exact renders: a model's new thing has not the exact outline
ARMS = ("plain", "locked")


def recolour(scene: Scene, k: int, rng: random.Random) -> Edit | None:
    item, concept = scene.items[k], load_atlas().concept(scene.items[k].concept)
    colour = draw.colour_for(rng, concept, 1.0, "train")
    if colour is None or colour in (item.colour, concept.natural):
        return None
    return Edit("recolour", scene, scene.with_item(k, colour=colour), k, -1, colour)


def substitute(scene: Scene, k: int, rng: random.Random) -> Edit | None:
    new = proposals._substitute(rng, scene, k, Mix.scenes(), "train")
    if new is None or new.concept in {item.concept for item in scene.items}:
        return None
    items = tuple(new if j == k else item for j, item in enumerate(scene.items))
    return Edit("replace", scene, replace(scene, items=items), k, k)


def reword(scene: Scene, k: int, rng: random.Random) -> Edit | None:
    if scene.sign is None:
        return None
    sign = replace(scene.sign, text=rng.choice([word for word in SIGN_WORDS if word != scene.sign.text]))
    left, _, right, _ = sign_box(sign)
    if left < 0.01 or right > 0.99:
        return None
    return Edit("sign_text", scene, replace(scene, sign=sign), value=sign.text)


def relight(scene: Scene, rng: random.Random) -> Edit | None:
    kind = rng.choice(("time", "weather"))
    values = [v for v in getattr(PLACES[scene.backdrop.place], kind + "s") if v != getattr(scene.backdrop, kind)]
    if not values:
        return None
    value = rng.choice(values)
    target = scene.put(**{kind: value})
    return Edit(kind, scene, target, value=value) if getattr(target.backdrop, kind) == value else None


MAKERS = {"recolour": recolour, "replace": substitute, "sign_text": reword}
WEIGHTS = (6, 1, 3)


def chain_of(number: int) -> list[Edit]:
    """The edits of a chain, each from the target of the one before."""
    rng = random.Random(f"drift {number}")
    while True:
        found = _attempt(number, rng)
        if len(found) == TURNS:
            return found


def _attempt(number: int, rng: random.Random) -> list[Edit]:
    """Ten edits, or fewer where the scene has no more to offer."""
    signed = number % 4 < 2
    mix = replace(Mix.scenes(), sign=float(signed), filter=0.0, plain=0.0)
    scene = draw.draw_scene(rng, mix, "train", "two" if signed else "three")
    # The hero needs room of its own: what is done to the others must not cover it.
    if len(PLACES[scene.backdrop.place].times) < 2 or not proposals._clear_of_others(scene.items[0], 0, scene):
        return []
    found: list[Edit] = []
    # What was replaced is not named again: where nano failed to, the next words would be of something missing.
    free = set(range(1, len(scene.items)))
    for _ in range(20 * TURNS):
        if number % 2 == 1 and len(found) == GLOBAL - 1:
            edit = relight(scene, rng)
        else:
            [kind] = rng.choices(tuple(MAKERS), WEIGHTS)
            edit = MAKERS[kind](scene, rng.choice([*free]), rng) if free else None
        if edit is not None and len(found) < TURNS:
            found.append(edit)
            scene = edit.target
            free -= {edit.subject} if edit.kind == "replace" else set()
    return found


def may_change(edit: Edit) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if edit.kind not in MAKERS:
        return np.ones((SIZE, SIZE), bool)
    exact = render_edit(edit, SIZE).change.astype(np.uint8)
    return cv2.dilate(exact, np.ones((2 * SPARE + 1,) * 2, np.uint8)).astype(bool)


def run(loom: fl.api.Loom, reader: Recogniser, number: int, arm: str, steps: int | None) -> Iterator[dict[str, Any]]:
    """The turns of one chain."""
    edits, words = chain_of(number), random.Random(f"words {number}")
    picture = render(edits[0].source, SIZE).pixels
    chain = Drift(picture, WorldIdentity(reader, edits[0].source.items[0].concept))
    for turn, edit in enumerate(edits, 1):
        text = edit.instruction(words, "en")
        asked = Request(
            prompt=text, references=(Reference(Image.fromarray(picture)),), seed=1_000 * number + turn, steps=steps
        )
        [result] = loom.pipeline.run(asked)
        after, kept = np.asarray(result.image), None
        if arm == "locked":
            after, _, kept = lock(picture, after)
        found = chain.add(after, may_change(edit))
        [seen] = reader.read([Image.fromarray(after)])
        here = {thing.concept for thing in seen.things}
        yield {
            "chain": arm, "run": number, "turn": turn, "kind": edit.kind, "instruction": text,
            "done": all(fact.holds(seen) for fact in EDITS[edit.kind](edit)),
            "things": sum(item.concept in here for item in edit.target.items) / len(edit.target.items),
            "whole": kept.whole if kept else None,
            **found.to_dict(),
        }  # fmt: skip
        picture = after


def chains_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every run as columns over its turns: what was asked, whether it was seen, the meters against the start."""
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["run"], row["chain"]), []).append(row)
    return [
        {
            "run": run, "chain": chain, "kind": " ".join(row["kind"] for row in found),
            "done": "".join("-+"[row["done"]] for row in found),
            "whole": [row["turn"] for row in found if row["whole"]],
            **{
                name: [None if row["total"][name] is None else round(row["total"][name], 3) for row in found]
                for name in ("psnr", "delta_e", "sharpness", "identity")
            },
        }
        for (run, chain), found in runs.items()
    ]  # fmt: skip


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each arm how often the recogniser saw what was asked for, by kind; the share of all things that it saw; and
    medians of the meters at the last turn, of the chains without and with an edit of everything (a wrong edit, which
    every chain meets sooner or later, would rule a mean)."""
    out: dict[str, Any] = {}
    for arm in ARMS:
        own = [row for row in rows if row["chain"] == arm]
        done = {
            kind: [row["done"] for row in own if row["kind"] == kind] for kind in sorted({row["kind"] for row in own})
        }
        out[arm] = {"done": {kind: f"{sum(found)} of {len(found)}" for kind, found in done.items()}}
        out[arm]["things"] = mean(row["things"] for row in own)
        for name, odd in (("local", 0), ("with one edit of everything", 1)):
            last = [row["total"] for row in own if row["turn"] == TURNS and row["run"] % 2 == odd]
            out[arm][name] = {key: median(row[key] for row in last) for key in (last[0] if last else ())}
    return out


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--steps", type=int, help="of the solver; nano's own unless given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    loom, reader, rows, began = fl.load("nano"), Recogniser.load(), [], time.perf_counter()
    for number in range(options.chains):
        for arm in ARMS:
            rows += [rounded(row) for row in run(loom, reader, number, arm, options.steps)]
        about = {
            "model": loom.pipeline.runtime.content, "recogniser": reader.content, "size": SIZE, "turns": TURNS,
            "chains": number + 1, "steps": options.steps, "minutes": (time.perf_counter() - began) / 60,
            "summary": summary(rows),
        }  # fmt: skip
        lines = ",\n".join(json.dumps(line) for line in chains_of(rows))
        options.out.write_text(json.dumps(rounded(about), indent=1)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n', "utf-8")
        print(json.dumps(rounded(about["summary"])), flush=True)
    if options.figure:
        drawn = [row for row in rows if row["run"] % 2 == 0]
        curves(drawn, ("psnr", "delta_e", "sharpness", "identity")).save(options.figure, quality=75, method=6)


if __name__ == "__main__":
    main()
