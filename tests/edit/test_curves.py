"""Drift curves: every line is where its numbers say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxloom.edit.curves import curves
from fluxloom.edit.drift import Drift
from fluxloom.errors import BadInput


def heights(sheet: Image.Image, chain: int) -> dict[int, float]:
    """Of the ink of a chain: in each column of the first panel, its mean row."""
    ink = [(27, 108, 168), (209, 73, 91)][chain]
    close = np.abs(np.asarray(sheet).astype(int) - ink).sum(-1) < 30
    close[:32] = False  # the names of the chains
    return {x: float(np.flatnonzero(column).mean()) for x, column in enumerate(close.T) if column.any()}


def rows(**chains: list[float | None]) -> list[dict[str, Any]]:
    return [{"chain": name, "psnr": value} for name, values in chains.items() for value in values]


def test_lines_run_over_the_turns() -> None:
    sheet = curves(rows(locked=[40, 40, 40], plain=[40, 30, 20]), ["psnr"])
    assert sheet.size == (400, 280)
    level, falling = heights(sheet, 0), heights(sheet, 1)
    assert max(level.values()) - min(level.values()) < 3
    left, right = min(falling), max(falling)
    assert right - left > 250
    assert falling[right] - falling[left] > 150  # down, over nearly all of the panel
    middle = falling[(left + right) // 2]
    assert middle == pytest.approx((falling[left] + falling[right]) / 2, abs=4)


def test_runs_are_thin_and_their_mean_is_thick() -> None:
    both = [{"run": run, "psnr": value} for run, values in enumerate(([40, 40], [20, 20])) for value in values]
    mean = heights(curves(both, ["psnr"]), 0)
    alone = heights(curves(rows(a=[30, 30], b=[40, 20]), ["psnr"]), 0)
    assert np.mean(list(mean.values())) == pytest.approx(np.mean(list(alone.values())), abs=3)


def test_turns_as_the_chain_gives_them_and_gaps() -> None:
    first = np.zeros((64, 64, 3), np.uint8)
    chain = Drift(first)
    for level in (1, 2):
        chain.add(first + np.uint8(level))
    turns = [turn.to_dict() for turn in chain.turns]
    assert curves(turns).size == (800, 280)
    assert heights(curves(turns), 0)  # ``total`` was found
    gap = heights(curves(rows(a=[40, None, 20]), ["psnr"]), 0)
    assert max(gap) - min(gap) > 250
    assert heights(curves(rows(a=[30]), ["psnr"]), 0)  # one turn is a dot
    assert curves(rows(a=[None]), ["psnr"]).size == (400, 280)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(BadInput, match="got no turns to draw"):
        curves([])
    with pytest.raises(BadInput, match="got meters lpips, allowed psnr, ssim"):
        curves(rows(a=[1]), ["lpips"])
