"""The recogniser's mechanics, on a tiny network with random weights and a world of three things."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from fluxloom.errors import BadInput, WeightsError
from fluxloom.measure import recogniser
from fluxloom.measure.recogniser import LETTERS, Network, Recogniser, RecogniserSpec, spec_of, spelled, strips
from fluxloom.weights.load import SHARDS, save_card, save_compact

WORDS = {
    "concepts": ["cat", "dog", "car"],
    "colours": ["own", "red", "blue"],
    "heads": {name: ["none", f"first {name}", f"second {name}"] for name in recogniser.HEADS},
    "sizes": {"widths": [8, 16, 24], "depths": [1, 1, 1], "pooled": 16, "letters": 16},
    "threshold": 0.5,
    "calibration": {"presence": [1.0, 0.0], "board": [1.0, 30.0], "sign": [1.0, 0.0]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recogniser")
    torch.manual_seed(0)
    save_compact(Network(spec_of(WORDS)).state_dict(), folder, default="int8")
    save_card(folder, "recogniser", WORDS)
    return folder


@pytest.fixture(scope="module")
def judge(folder: Path) -> Recogniser:
    return Recogniser.load(folder)


def picture(seed: int = 0, size: tuple[int, int] = (256, 256)) -> Image.Image:
    values = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy()).resize(size)


def test_a_reading_speaks_the_words_of_the_card(judge: Recogniser) -> None:
    readings = judge.read([picture(k) for k in range(3)])
    assert len(readings) == 3
    for reading in readings:
        assert {seen.concept for seen in reading.top} == set(WORDS["concepts"])  # five, had it as many
        assert [seen.p for seen in reading.top] == sorted((seen.p for seen in reading.top), reverse=True)
        assert reading.things == tuple(seen for seen in reading.top if seen.p >= 0.5)
        for seen in reading.top:
            assert all(0 <= value <= 1 for value in (seen.p, seen.x, seen.y, seen.area, seen.colour_p))
            assert seen.colour in (None, "red", "blue")
        for name in recogniser.HEADS:
            assert getattr(reading, name).label in WORDS["heads"][name]
            assert 1 / 3 <= getattr(reading, name).p <= 1
        assert reading.sign_board > 0.99
        assert 0 <= reading.sign_p <= 1
        assert set(reading.sign) <= set(LETTERS)


def test_no_sign_means_nothing_read(judge: Recogniser) -> None:
    unsigned = {**judge.card, "calibration": {**judge.card["calibration"], "board": [1.0, -30.0]}}
    [reading] = Recogniser(judge.network, unsigned).read([picture()])
    assert (reading.sign, reading.sign_p) == ("", 0.0)
    assert reading.sign_board < 0.01


def test_calibration_and_threshold_decide_what_is_there(judge: Recogniser) -> None:
    def read(shift: float, threshold: float) -> recogniser.Reading:
        card = {
            **judge.card,
            "threshold": threshold,
            "calibration": {**judge.card["calibration"], "presence": [0.0, shift]},
        }
        [reading] = Recogniser(judge.network, card).read([picture()])
        return reading

    assert [seen.p for seen in read(0.0, 0.5).things] == [0.5] * 3
    assert read(-1.0, 0.5).things == ()
    assert len(read(-1.0, 0.25).things) == 3


def test_other_sizes_and_modes_are_brought_to_its_own(judge: Recogniser) -> None:
    large = picture(size=(512, 384))
    assert judge.read([large]) == judge.read([large.resize((256, 256), Image.Resampling.LANCZOS)])
    grey = picture().convert("L")
    assert judge.read([grey]) == judge.read([grey.convert("RGB")])


def test_reading_is_deterministic_and_nearly_blind_to_company(judge: Recogniser) -> None:
    batch = [picture(k) for k in range(3)]
    assert judge.read(batch) == judge.read(batch)
    alone = [judge.read([one])[0] for one in batch]
    for one, other in zip(alone, judge.read(batch), strict=True):
        assert [s.concept for s in one.top] == [s.concept for s in other.top]
        assert [s.p for s in one.top] == pytest.approx([s.p for s in other.top], abs=1e-5)
    assert judge.read([]) == []


def test_only_pictures_are_read(judge: Recogniser) -> None:
    with pytest.raises(BadInput, match=r"got str to read, allowed PIL pictures"):
        judge.read(["cat.png"])  # type: ignore[list-item]


def test_damaged_and_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert Recogniser.load(tmp_path).content == Recogniser.load(folder).content
    assert Recogniser.load(folder).content.startswith("sha256:")
    [shard] = tmp_path.glob(SHARDS)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WeightsError, match="damaged file"):
        Recogniser.load(tmp_path)
    card = json.loads((folder / "card.json").read_text("utf-8"))
    shard.write_bytes(whole)
    (tmp_path / "card.json").write_text(json.dumps({k: v for k, v in card.items() if k != "colours"}), "utf-8")
    with pytest.raises(WeightsError, match="without colours"):
        Recogniser.load(tmp_path)


def test_the_sizes_of_a_card_are_those_of_the_network() -> None:
    spec = RecogniserSpec(concepts=3, colours=3, heads=dict.fromkeys(recogniser.HEADS, 3), widths=(8, 16, 24))
    sizes = {key: value for key, value in asdict(spec).items() if key in WORDS["sizes"]}
    assert spec_of({**WORDS, "sizes": json.loads(json.dumps(sizes))}) == spec


# -------------------------------------------------------------------------------------------------- spelling


def columns(text: str, sure: float = 8.0) -> torch.Tensor:
    """Log probabilities [1, T, 27] in which each column favours one letter, or with "-" the blank."""
    scores = torch.zeros(1, len(text), 27)
    for t, letter in enumerate(text):
        scores[0, t, 0 if letter == "-" else LETTERS.index(letter) + 1] = sure
    return scores.log_softmax(-1)


@pytest.mark.parametrize(
    ("path", "text"), [("--AA-BB-B", "ABB"), ("ZO-O", "ZOO"), ("----", ""), ("WWOOWW", "WOW"), ("A", "A")]
)
def test_spelling_merges_repeats_and_drops_blanks(path: str, text: str) -> None:
    [(read, p)] = spelled(columns(path))
    assert read == text
    assert 0.9 < p <= 1


def test_the_probability_of_a_spelling_counts_every_path() -> None:
    scores = torch.randn(1, 2, 27, generator=torch.Generator().manual_seed(0))
    scores[..., 5] += 3
    scores = scores.log_softmax(-1)
    [(read, p)] = spelled(scores)
    first, second = scores[0].exp().unbind()
    assert read == LETTERS[4]
    assert p == pytest.approx(float(first[5] * second[5] + first[5] * second[0] + first[0] * second[5]), rel=1e-5)


def test_strips_follow_the_board() -> None:
    x = torch.full((1, 3, 256, 256), -1.0)
    x[:, :, 64:96, 32:128] = 1.0
    strip = strips(x, torch.tensor([[32 / 256, 64 / 256, 128 / 256, 96 / 256]]))
    assert strip.shape == (1, 3, *recogniser.STRIP)
    middle = strip[0, 0, recogniser.STRIP[0] // 2]
    # The board is three times as wide as high; beyond its ends, and a little of its surroundings, lies mid-grey.
    assert float((middle > 0.9).sum()) == pytest.approx(3 * 32 / recogniser.MARGIN, abs=2)
    assert float(middle[0]) == float(middle[-1]) == 0
    assert strip[0, 0, 0, 80] < 0 < strip[0, 0, 6, 80]


def test_probabilities_from_logits_are_safe_at_the_ends() -> None:
    assert recogniser.calibrated(1e9, 2.0, 0.0) == pytest.approx(1.0)
    assert recogniser.calibrated(-1e9, 2.0, 0.0) == pytest.approx(0.0)
    assert recogniser.calibrated(0.3, 1.0, 0.0) == pytest.approx(1 / (1 + math.exp(-0.3)))
    assert recogniser.calibrated(recogniser.logit_of(0.3), 1.0, 0.0) == pytest.approx(0.3)
    assert math.isfinite(recogniser.logit_of(0.0))
    assert math.isfinite(recogniser.logit_of(1.0))
