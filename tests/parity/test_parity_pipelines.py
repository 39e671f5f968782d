"""From a request to the last latent, for every variant, beside the pipelines of diffusers with the same weights, noise
and text states. Everything but the towers is the real thing: checking, pictures, masks, encoder, rows, loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
from mutations import TOLERANCE, WIDE
from pipelines import HEIGHT, SIZES, WIDTH, Scene, mask, picture, read
from tiny import relative
from torch import Tensor

from fluxloom.core import shapes
from fluxloom.infer import canvas, conditions, sample
from fluxloom.infer.conditions import Known
from fluxloom.infer.request import Reference

Break = Callable[[pytest.MonkeyPatch, Scene], dict[str, Any]]

photo = picture(100, 70, seed=3)
NEGATIVE = read("a dog")


def text() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-dev")
    return scene, scene.diffusers("text")


def schnell() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-schnell")
    return scene, scene.diffusers("text")


def true_cfg() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-dev", negative="a dog", true_cfg=3.0)
    negative = {"negative_prompt_embeds": NEGATIVE.tokens, "negative_pooled_prompt_embeds": NEGATIVE.pooled}
    return scene, scene.diffusers("text", true_cfg_scale=3.0, **negative)


def image_to_image() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-dev", init=photo, strength=0.75, width=WIDTH, height=HEIGHT)
    return scene, scene.diffusers("image", image=photo.resize((WIDTH, HEIGHT), 1), strength=0.75)


def kontext() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-kontext-dev", references=(Reference(photo),), width=80, height=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.KONTEXT, "PREFERRED_KONTEXT_RESOLUTIONS", SIZES)
        return scene, scene.diffusers("kontext", image=photo, width=80, height=80, max_area=80 * 80)


def kontext_true_cfg() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-kontext-dev", references=(Reference(photo),), negative="a dog", true_cfg=2.0)
    negative = {"negative_prompt_embeds": NEGATIVE.tokens, "negative_pooled_prompt_embeds": NEGATIVE.pooled}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.KONTEXT, "PREFERRED_KONTEXT_RESOLUTIONS", SIZES)
        more = {"image": photo, "max_area": WIDTH * HEIGHT, "true_cfg_scale": 2.0}
        return scene, scene.diffusers("kontext", **more, **negative)


def fill() -> tuple[Scene, Tensor]:
    """With a mask of black and white: diffusers makes every mask so; the official code and we do not."""
    scene = Scene.of("flux1-fill-dev", init=picture(), mask=mask())
    return scene, scene.diffusers("fill", image=picture(), mask_image=mask())


def fill_from_the_picture() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-fill-dev", init=picture(), mask=mask(), strength=0.5)
    return scene, scene.diffusers("fill", image=picture(), mask_image=mask(), strength=0.5)


def control() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-depth-dev", control=photo, control_ready=True, width=WIDTH, height=HEIGHT)
    return scene, scene.diffusers("control", control_image=photo.resize((WIDTH, HEIGHT), 1))


def inpaint() -> tuple[Scene, Tensor]:
    """On a model that was never taught to: what is known keeps to the straight line between noise and picture. The mask
    lies on latent cells: of others diffusers takes one pixel a cell, and we the most repainted."""
    scene = Scene.of("flux1-dev", init=picture(), mask=mask("aligned"))
    return scene, scene.diffusers("inpaint", image=picture(), mask_image=mask("aligned"), strength=1.0)


def inpaint_from_the_picture() -> tuple[Scene, Tensor]:
    scene = Scene.of("flux1-dev", init=picture(), mask=mask("aligned"), strength=0.5)
    return scene, scene.diffusers("inpaint", image=picture(), mask_image=mask("aligned"), strength=0.5)


def redux() -> tuple[Scene, Tensor]:
    ours, *theirs = pipelines.redux()
    scene = Scene.of("flux1-redux-dev", references=(Reference(photo, "image"),), width=WIDTH, height=HEIGHT)
    scene.redux = ours
    return scene, scene.diffusers("text", **pipelines.diffusers_prior(ours, *theirs, photo))


TRIPS = (
    text, schnell, true_cfg, image_to_image, kontext, kontext_true_cfg, fill, fill_from_the_picture, control, inpaint,
    inpaint_from_the_picture, redux,
)  # fmt: skip


@pytest.mark.parametrize("trip", TRIPS, ids=lambda trip: trip.__name__)
def test_the_last_latent_is_that_of_the_pipeline(trip: Callable[[], tuple[Scene, Tensor]]) -> None:
    scene, theirs = trip()
    found = scene.ours()
    assert relative(found, theirs) < TOLERANCE
    assert relative(found, scene.conditions().start(0)) > 0.1, "it must have gone somewhere"


# ---------------------------------------------------------------------------------------------- mistakes on purpose


def _patched(target: Any, name: str, change: Callable[..., Any]) -> Break:
    """A mistake that replaces a function by something made from it."""

    def spoil(patch: pytest.MonkeyPatch, _: Scene) -> dict[str, Any]:
        true = getattr(target, name)
        patch.setattr(target, name, lambda *args, **kwargs: change(true, *args, **kwargs))
        return {}

    return spoil


def _asked(**fields: Any) -> Break:
    """A mistake that asks for something else."""
    return lambda patch, scene: fields


def _context_first(patch: pytest.MonkeyPatch, scene: Scene) -> dict[str, Any]:
    def roll(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        img, ids, *rest = args
        return (img.roll(-24, 1), ids.roll(-24, 1), *rest)

    scene.model.register_forward_pre_hook(roll)
    return {}


def _channels_before_noise(patch: pytest.MonkeyPatch, scene: Scene) -> dict[str, Any]:
    def swap(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].roll(-64, -1), *args[1:])

    scene.model.register_forward_pre_hook(swap)
    return {}


def _mask_before_picture(true: Any, *args: Any) -> Tensor:
    made: Tensor = true(*args)
    return torch.cat((made[..., 64:], made[..., :64]), dim=-1)


def _mask_by_columns(true: Any, mask_11HW: Tensor) -> Tensor:
    cells = mask_11HW.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).permute(0, 5, 3, 1, 2, 4)
    return shapes.pack(cells.reshape(1, 64, HEIGHT // 8, WIDTH // 8))


def _rows_exchanged(true: Any, velocities: Any, scale: float) -> Any:
    return true(velocities[::-1], scale)


MISTAKES: dict[str, tuple[Callable[[], tuple[Scene, Tensor]], Break]] = {
    "guidance of another task": (text, _asked(guidance=1.0)),
    "no shift": (text, _asked(shift=False)),
    "a shift where there is none": (schnell, _asked(shift=True)),
    "another seed": (text, _asked(seed=6)),
    "noise drawn packed": (text, _patched(shapes, "pack", lambda true, z: true(z).flip(1))),
    "the negative prompt left out": (true_cfg, _asked(negative="")),
    "rows exchanged": (true_cfg, _patched(sample, "guided", _rows_exchanged)),
    "one step later": (image_to_image, _asked(strength=0.5)),
    "init picture left out": (image_to_image, _asked(init=picture(seed=9))),
    "reference on plane 0": (
        kontext, _patched(shapes, "image_ids", lambda true, h, w: true(h, w) - torch.tensor([h * w != 100, 0, 0]))
    ),
    "context before noise": (kontext_true_cfg, _context_first),
    "reference at the size to draw": (kontext, lambda patch, scene: _unpreferred(scene)),
    "mask inverted": (fill, _patched(canvas, "mask_tokens", lambda true, mask: true(1 - mask))),
    "mask before picture": (fill, _patched(conditions, "_beside", _mask_before_picture)),
    "mask by columns": (fill, _patched(canvas, "mask_tokens", _mask_by_columns)),
    "picture not masked": (fill, _patched(canvas.Canvas, "masked", lambda true, laid: laid.picture)),
    "picture masked to black": (
        fill, _patched(canvas.Canvas, "masked", lambda true, laid: (laid.picture + 1) * (1 - laid.mask) - 1)
    ),
    "channels before noise": (fill, _channels_before_noise),
    "control before noise": (control, _channels_before_noise),
    "control upside down": (control, _patched(conditions, "_control", lambda true, *args: true(*args).flip(2))),
    "guidance of dev for control": (control, _asked(guidance=3.5)),
    "all of it repainted": (inpaint, _patched(Known, "hold", lambda true, known, velocity: velocity)),
    "the other part repainted": (
        inpaint, _patched(canvas, "mask_cells", lambda true, mask: 1 - true(mask))
    ),
    "picture left out of words": (redux, _patched(conditions, "_after", lambda true, text, seen: text)),
    "picture at half its weight": (redux, _asked(references=(Reference(photo, "image", 0.5),))),
    "picture cropped": (redux, _asked(references=(Reference(photo.crop((15, 0, 85, 70)), "image"),))),
}  # fmt: skip


def _unpreferred(scene: Scene) -> dict[str, Any]:
    scene.spec = pipelines.replace(scene.spec, preferred_sizes=())
    return {}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trip, spoil = MISTAKES[name]
    scene, theirs = trip()
    fields = spoil(monkeypatch, scene)
    assert relative(scene.ours(**fields), theirs) > WIDE
