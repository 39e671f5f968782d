"""How far the recogniser can be trusted: calibration and measurement on scenes that it was not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.measure.recogniser import CELLS, HEADS, LETTERS, Reading, Recogniser, logit_of, spelled
from fluxloom.recipes.recogniser_data import (
    CLEAR,
    KINDS,
    LABELS,
    SHADES,
    THINGS,
    UNCLEAR,
    UNSEEN,
    Pictures,
    PictureSpec,
    concepts,
    load_pictures,
    prepare,
    presence_target,
)
from fluxloom.train.model import Batch
from fluxloom.world.words import SIGN_WORDS

CALIBRATION_SEED, MEASUREMENT_SEED = 1_000_001, 1_000_002
PLAUSIBLE = 0.02  # calibration error is looked at where there is anything to be wrong about
SPOIL = 0.22


def unseen(
    spec: PictureSpec, seed: int, chunks: int, vae: Autoencoder | None, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Prepared chunks of a seed of their own; the first half of each has been through the autoencoder."""
    generator = torch.Generator(device).manual_seed(seed)
    for chunk in load_pictures(Pictures(spec, seed, chunks), workers):
        batch = prepare(chunk, vae, SPOIL, 0.5, generator)
        yield batch | {"image": batch["image"].float() / 127.5 - 1}


def fit_logistic(logit: Tensor, target: Tensor, ridge: float = 1.0) -> tuple[float, float]:
    """Scale and shift [n] -> () by Newton's method, so that sigmoid(scale * logit + shift) is the share of ones.

    A ridge of so many pictures holds them near 1 and 0, where a perfect judge would let them run away.
    """
    x = torch.stack((logit.double(), torch.ones_like(logit, dtype=torch.float64)), 1)
    rest = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    w = rest.clone()
    for _ in range(50):
        p = (x @ w).sigmoid()
        gradient = x.T @ (p - target.double()) + ridge * (w - rest)
        curve = (x * (p * (1 - p))[:, None]).T @ x + ridge * torch.eye(2, dtype=torch.float64, device=x.device)
        step = torch.linalg.solve(curve, gradient)
        w = w - step.clamp(-1, 1)
        if float(step.abs().max()) < 1e-8:
            break
    return float(w[0]), float(w[1])


@torch.inference_mode()
def calibrate(judge: Recogniser, batches: Iterator[Batch]) -> dict[str, list[float]]:
    """Scale and shift for the presence of things, for that of a sign, and for what is read on it."""
    things: list[tuple[Tensor, Tensor]] = []
    boards: list[tuple[Tensor, Tensor]] = []
    signs: list[tuple[float, float]] = []
    for batch in batches:
        scores = judge.network(batch["image"])
        target, asked = presence_target(batch)
        is_asked = asked[:, :-1] > 0
        things.append((scores.presence[:, :-1][is_asked].cpu(), target[:, :-1][is_asked].cpu()))
        boards.append((scores.presence[:, -1].cpu(), target[:, -1].cpu()))
        signed = torch.nonzero(batch["letters"][:, 0])[:, 0]
        read = spelled(judge.network.spell(batch["image"][signed], scores.box[signed]))
        texts = [text_of(letters) for letters in batch["letters"][signed]]
        signs += [(logit_of(p), float(text == true)) for (text, p), true in zip(read, texts, strict=True)]
    gathered = {"presence": things, "board": boards, "sign": [(torch.tensor([a]), torch.tensor([b])) for a, b in signs]}
    fitted = {}
    for name, pairs in gathered.items():
        logit, truth = (torch.cat([pair[k] for pair in pairs] or [torch.zeros(0)]) for k in (0, 1))
        fitted[name] = list(fit_logistic(logit, truth))
    return fitted


def text_of(letters: Tensor) -> str:
    return "".join(LETTERS[k - 1] for k in letters.tolist() if k)


@dataclass
class Tally:
    """Counts of right answers among all, by name."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, right: bool) -> None:
        self.right[name] += right
        self.asked[name] += 1

    def shares(self) -> dict[str, list[float]]:
        """name -> [share right, number asked], sorted by name."""
        return {name: [round(self.right[name] / n, 4), n] for name, n in sorted(self.asked.items())}


@torch.inference_mode()
def measure(judge: Recogniser, batches: Iterator[Batch]) -> dict[str, Any]:
    """Everything about the recogniser that a report should say, on true ("true") and round-tripped ("trip") pictures of
    the trained styles, and on pictures of the reserved one ("line")."""
    tallies: dict[str, Tally] = {}
    logits, targets = [], []
    for batch in batches:
        readings = judge.judge(batch["image"])
        target, asked = presence_target(batch)
        logits.append(judge.network(batch["image"]).presence[:, :-1][asked[:, :-1] > 0].cpu())
        targets.append(target[:, :-1][asked[:, :-1] > 0].cpu())
        rows = {name: value.cpu() for name, value in batch.items() if name != "image"}
        for i, reading in enumerate(readings):
            row = {name: value[i] for name, value in rows.items()}
            line = LABELS["style"][int(row["heads"][HEADS.index("style")])] == "line"
            kind = "line" if line else "trip" if row["trip"] else "true"
            mark(tallies.setdefault(kind, Tally()), reading, row)
    scale, shift = judge.card["calibration"]["presence"]
    logit, target = torch.cat(logits), torch.cat(targets)
    error = {
        "before": calibration_error(logit.sigmoid(), target),
        "after": calibration_error((scale * logit + shift).sigmoid(), target),
    }
    return {"calibration_error": error, **{name: tally.shares() for name, tally in sorted(tallies.items())}}


def calibration_error(p: Tensor, target: Tensor, bins: int = 10) -> float:
    """Expected calibration error over what is plausible or true: the mean gap between promise and share, by tenths."""
    looked = (p > PLAUSIBLE) | (target > 0)
    p, target = p[looked].double(), target[looked].double()
    place = (p * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, p - target)
    return round(float(gaps.abs().sum() / max(len(p), 1)), 4)


def mark(tally: Tally, reading: Reading, row: Mapping[str, Tensor]) -> None:
    """Compare what was read in one picture with its truth."""
    _mark_things(tally, reading, row)
    for name, label in zip(HEADS, row["heads"].tolist(), strict=True):
        if label != UNSEEN:
            tally.add(name, getattr(reading, name).label == LABELS[name][label])
    _mark_slices(tally, reading, row)
    true = text_of(row["letters"])
    tally.add("board", (reading.sign_board >= 0.5) == bool(true))
    if true:
        tally.add("sign word" if true in SIGN_WORDS else "sign letters", reading.sign == true)
        if reading.sign_p >= 0.5:
            tally.add("sign where sure", reading.sign == true)


def _mark_things(tally: Tally, reading: Reading, row: Mapping[str, Tensor]) -> None:
    names = [concepts()[k] if k >= 0 else "" for k in row["ids"].tolist()]
    state = row["state"].tolist()
    clear = {name: k for k, name in enumerate(names) if name and state[k] == CLEAR}
    found = {seen.concept: seen for seen in reading.things}
    for name in clear:
        tally.add("recall", name in found)
    for name in found:
        if name in clear or name not in names:
            tally.add("precision", name in clear)
    for k, name in enumerate(names):
        if name and state[k] == UNCLEAR:
            tally.add("unclear accepted", name in found)
            tally.add(f"unclear accepted, {KINDS[int(row['kind'])]}", name in found)
            tally.add("unclear, another seen", any(seen not in names for seen in found))
    for name, k in clear.items():
        if name in found:
            painted = "colour own" if row["colours"][k] == 0 else "colour painted"
            tally.add(painted, (found[name].colour or SHADES[0]) == SHADES[int(row["colours"][k])])
    all_clear = len(clear) == sum(map(bool, names))
    if all_clear and len(clear) == 1:
        tally.add("single surest", reading.top[0].concept in clear)
        tally.add("single right", set(found) == set(clear))
    if all_clear and len(clear) == 2:
        tally.add("both of two", set(clear) <= set(found))
        _mark_order(tally, found, clear, row["shares"])
    if all_clear and not clear:
        tally.add("empty right", not found)


def _mark_order(tally: Tally, found: Mapping[str, Any], clear: Mapping[str, int], shares: Tensor) -> None:
    middle = (torch.arange(CELLS) + 0.5) / CELLS
    plane = shares[1 : THINGS + 1].float()
    at = (plane.sum(1) * middle).sum(-1) / plane.sum((1, 2)).clamp_min(1e-6)
    (a, ka), (b, kb) = clear.items()
    apart = float(at[ka] - at[kb])
    if a in found and b in found and abs(apart) > 0.12:
        tally.add("left of right", (found[a].x > found[b].x) == (apart > 0))


def _mark_slices(tally: Tally, reading: Reading, row: Mapping[str, Tensor]) -> None:
    """Where labels look alike: season by place, time and weather by filter, and which are taken for which."""
    true = {name: LABELS[name][k] for name, k in zip(HEADS, row["heads"].tolist(), strict=True) if k != UNSEEN}
    for name, by in (
        ("season", "place"),
        ("time", "filter"),
        ("weather", "filter"),
        ("hue", "filter"),
        ("time", "place"),
    ):
        if true.get(name, "none") != "none":
            said = getattr(reading, name).label
            tally.add(f"{name} with {by} {true[by]}", said == true[name])
    if true["filter"] == "none":
        for name in ("time", "weather", "season", "hue"):
            if true.get(name, "none") != "none":
                tally.add(f"{name} {true[name]}", getattr(reading, name).label == true[name])
