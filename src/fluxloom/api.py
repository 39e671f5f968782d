"""What users hold: ``load()`` gives a Loom, which draws, edits and replays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.edit.lock import Lock
from fluxloom.errors import BadInput, UnknownModel
from fluxloom.infer.finish import Box, Finisher, Maker, boxed
from fluxloom.infer.pictures import read
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.plan import SPARE, Plan, fit, foresee, parse_bytes
from fluxloom.infer.preview import Preview, load_decoder
from fluxloom.infer.replay import Replay, replay
from fluxloom.infer.request import Picture, PromptWarning, Reference, Request, Result
from fluxloom.infer.runtime import Runtime, device_named, dtype_named
from fluxloom.infer.work import Work
from fluxloom.speed.recipe import Recipe, SpeedWarning, apply
from fluxloom.weights.load import ASSETS, CARD, read_card

if TYPE_CHECKING:
    from fluxloom.speed.team import Team


def load(
    reference: str | os.PathLike[str] = "nano",
    device: str = "auto",
    dtype: str | None = None,
    *,
    variant: str | None = None,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    preview_decoder: str | os.PathLike[str] | None = None,
    executor: str = "auto",
    linears: str | None = None,
    attention: str = "auto",
    gpus: int = 1,
    vram: str | None = None,
) -> Loom:
    """Load a model.

    reference  ``nano``, which comes with the package; a member such as ``flux1-kontext-dev``; ``owner/name`` on a hub,
               with ``@revision`` and ``:file`` if need be; a folder in the official or the diffusers layout; a single
               file. Of a folder that is itself named nano, the path: ``./nano``
    device     ``cpu``, ``cuda``, ``cuda:1`` ..., or ``auto``: a GPU where there is one; but a processor for nano, which
               takes seconds there, unless ``gpus`` or ``vram`` ask for a GPU
    dtype      ``float32`` or ``bfloat16`` for the transformer and the encoders of the 12 B members; float32 on the CPU
               and bfloat16 on a GPU unless given
    variant    which member a file is, where it does not tell (dev, Krea and Kontext have the same shapes)
    base       of an adapter (a control LoRA, Redux): a reference to the whole model that it is added to, instead of its
               publisher's
    preview_decoder    TAEF1, for sharp glances at members with the latents of FLUX.1: see :class:`Preview`
    executor, linears, attention    how it computes: see :class:`fluxloom.speed.recipe.Recipe`. ``linears="fp8"`` is
               faster and takes half the memory, and changes pictures a little (docs/performance.md)
    gpus       how many GPUs compute each picture together, one process each: `torchrun --nproc-per-node 2 ...` starts
               them, and `fluxloom generate --gpus 2` by itself. In all but the first this never returns: they lend
               their GPU until the first one ends
    vram       how much of a GPU's memory to stay under, such as ``12GB``; unless given, what is free. What does not fit
               beside a picture of the model's own size waits in host memory: :mod:`fluxloom.infer.plan`, ``Loom.plan``
    revision, offline, token, progress    of what comes from a hub: see :func:`fluxloom.weights.hub.resolve`;
               ``progress`` also counts the tensors of each component as they are loaded

    Raises UnknownModel for another reference, BadInput for another device or dtype, WeightsError where files are
    missing, damaged or do not fit, and Failure where a hub cannot be reached or refuses.
    """
    recipe = Recipe(executor, linears, attention)
    own = _own(reference)
    light = own is not None and own[0].embedded and gpus == 1 and vram is None
    where = device_named("cpu" if light and device == "auto" else device)
    precision = dtype_named(dtype or None, where)
    name = str(precision).removeprefix("torch.")
    cap = _cap(vram, where, gpus)
    whole = cap is None or cap >= _enough(name)

    def loaded(where: torch.device, team: Team | None = None) -> Loom:
        hub = {"revision": revision, "offline": offline, "token": token}
        place = where if whole else torch.device("cpu")
        runtime = _runtime(reference, own, place, precision, variant, progress, preview_decoder, base, hub)
        plan = None if whole else fit(runtime.spec, cap, linears=linears, dtype=name)
        apply(runtime, _planned(recipe, plan), team, plan, where)
        if plan is not None:
            spec = runtime.spec
            runtime.allows = lambda one: foresee(plan, spec, Work.of(one, spec), dtype=name)
        return Loom(Pipeline(runtime, MAKERS), plan).previewed(preview_decoder)

    if gpus == 1:
        return loaded(where)
    from fluxloom.speed.team import team_of

    with team_of(gpus, where) as team:
        return loaded(team.device, team)


class Loom:
    """A loaded model. Pictures go in as paths, PIL images or earlier results."""

    def __init__(self, pipeline: Pipeline, plan: Plan | None = None) -> None:
        self.pipeline, self.plan = pipeline, plan

    def previewed(self, decoder: str | os.PathLike[str] | None) -> Loom:
        """With TAEF1 of a file for glances (Preview.quick); None: as it is."""
        if decoder is not None:
            runtime = self.pipeline.runtime
            runtime.previewer = load_decoder(Path(decoder), runtime.spec, runtime.device)
        return self

    @property
    def spec(self) -> ModelSpec:
        """The row of the model: its shape, its defaults, its limits."""
        return self.pipeline.runtime.spec

    @overload
    def generate(self, prompt: str, *, n: None = None, **fields: Any) -> Result: ...
    @overload
    def generate(self, prompt: str, *, n: int, **fields: Any) -> list[Result]: ...
    def generate(self, prompt: str, *, n: int | None = None, **fields: Any) -> Result | list[Result]:
        """Draw a prompt: one result, or a list of ``n``. ``fields`` are those of :class:`Request`; ``loras`` may be
        paths, or :class:`fluxloom.infer.loras.Lora` with weights.

        Raises BadInput for what the model cannot do. What does not reach the model is told by a PromptWarning.
        """
        return self._draw(n, prompt=prompt, **fields)

    @overload
    def edit(self, picture: Picture, instruction: str, *, n: None = None, **fields: Any) -> Result: ...
    @overload
    def edit(self, picture: Picture, instruction: str, *, n: int, **fields: Any) -> list[Result]: ...
    def edit(
        self,
        picture: Picture,
        instruction: str,
        *,
        n: int | None = None,
        lock: Picture = "auto",
        box: Box | None = None,
        **fields: Any,
    ) -> Result | list[Result]:
        """Change a picture as an instruction in words says; otherwise as :meth:`generate`.

        lock   ``auto``: what the edit did not change stays the picture's own bytes, and the result has its size; edits
               of everything pass whole. A picture of the same size: only where that is white anything changes.
               ``off``: as the model drew it. The receipt reports (``finish``)
        mask   the model, too, is held to what is black there: as ``init`` and ``mask`` of a request, and locked by it
        box    (left, top, right, bottom) in pixels: the same for a rectangle
        """
        asked, finishers = within(picture, lock, fields.pop("mask", None), box)
        return self._draw(n, finishers, prompt=instruction, references=(Reference(picture),), **{**asked, **fields})

    def run(
        self,
        request: Request,
        observe: Callable[[Preview], None] | None = None,
        finishers: Sequence[Finisher] = (),
    ) -> list[Result]:
        """All results of a request; ``observe`` sees every step, and stops the work by raising. ``finishers``: what is
        done to each picture after it is drawn, :class:`fluxloom.edit.lock.Lock` for one."""
        return self.pipeline.run(request, observe, finishers)

    def stream(self, request: Request, finishers: Sequence[Finisher] = ()) -> Iterator[Preview | Result]:
        """Previews and results as they come; closing the iterator stops the work."""
        return self.pipeline.stream(request, finishers)

    def replay(
        self,
        path: str | os.PathLike[str],
        inputs: Sequence[Picture] = (),
        observe: Callable[[Preview], None] | None = None,
    ) -> Replay:
        """Draw the picture in a file again from its receipt and compare; see :func:`fluxloom.infer.replay.replay`."""
        return replay(self.pipeline, path, inputs, observe)

    def _draw(self, n: int | None, finishers: Sequence[Finisher] = (), **fields: Any) -> Result | list[Result]:
        unknown = sorted(fields.keys() - Request.__dataclass_fields__.keys())
        if unknown:
            names = list(Request.__dataclass_fields__)
            near = get_close_matches(unknown[0], names, n=1) or ["leaving it out"]
            raise BadInput(f"got {', '.join(unknown)}, allowed {', '.join(names)}, try {near[0]}")
        results = self.run(Request(n=1 if n is None else n, **fields), finishers=finishers)
        for note in results[0].warnings:
            warnings.warn(note, PromptWarning, stacklevel=3)
        return results[0] if n is None else results


def within(
    picture: Picture, lock: Picture, mask: Picture | None, box: Box | None
) -> tuple[dict[str, Any], tuple[Finisher, ...]]:
    """The fields of a request and the finishers that keep an edit of a picture in its place; see :meth:`Loom.edit`."""
    if mask is not None and box is not None:
        raise BadInput("got mask and box, allowed one of them, try the mask alone")
    asked: dict[str, Any] = {}
    if mask is not None or box is not None:
        asked = {"init": picture, "mask": mask}
    if box is not None:
        asked["mask"] = boxed((picture.image if isinstance(picture, Result) else read(picture)[1]).size, box)
    if isinstance(lock, str) and lock == "off":
        return asked, ()
    if isinstance(lock, str) and lock == "auto":
        return asked, (Lock(mask, box),)
    return asked, (Lock(lock),)


def _resized(settings: Mapping[str, Any], pictures: Sequence[Picture]) -> Finisher:
    from fluxloom.edit.batch import Scale

    return Scale(**settings)


# Of the finishers that receipts may name.
MAKERS: Mapping[str, Maker] = {"lock": Lock.remade, "resize": _resized}


def _own(reference: str | os.PathLike[str]) -> tuple[ModelSpec, Path] | None:
    """The row and the folder of a model with a card: one that comes with the package, or a folder like its."""
    name = os.fspath(reference)
    if not name:
        raise UnknownModel(f"got an empty model reference, allowed {', '.join(MODELS)}, a folder or a file, try nano")
    folder = Path(name)
    if isinstance(reference, str) and name in MODELS and MODELS[name].embedded:  # whatever lies in the current folder
        folder = ASSETS / name
    elif (folder / CARD).is_file():
        name = read_card(folder)["model"]
    else:
        return None
    if name not in MODELS:
        raise UnknownModel(f"got a card of model {name!r} in {folder}, allowed {', '.join(MODELS)}, try nano")
    return MODELS[name], folder


def _cap(vram: str | None, device: torch.device, gpus: int) -> int | None:
    """Bytes of a GPU to stay under: those asked for, or those that are free; None: no matter. Raises BadInput."""
    if vram is not None and (device.type != "cuda" or gpus > 1):
        where = f"{gpus} GPUs" if gpus > 1 else device.type
        raise BadInput(f"got vram {vram!r} for {where}, allowed for one GPU, try device='cuda', or without it")
    if device.type != "cuda" or gpus > 1:
        return None
    return int(torch.cuda.mem_get_info(device)[0]) if vram is None else parse_bytes(vram)


def _enough(dtype: str) -> int:
    """Bytes with which any member stays on the device whole."""
    return round(max(fit(row, None, dtype=dtype).peak for row in MODELS.values()) / SPARE)


def _planned(recipe: Recipe, plan: Plan | None) -> Recipe:
    """The recipe with the 8-bit products that a plan took because nothing exact fits: the user is told."""
    if plan is None or plan.linears == recipe.linears:
        return recipe
    warnings.warn(next(word for word in plan.words if "lossy" in word), SpeedWarning, stacklevel=4)
    return replace(recipe, linears=plan.linears)


def _runtime(
    reference: str | os.PathLike[str],
    own: tuple[ModelSpec, Path] | None,
    where: torch.device,
    dtype: torch.dtype,
    variant: str | None,
    progress: Callable[[str, int, int], None] | None,
    preview_decoder: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    hub: Mapping[str, Any],
) -> Runtime:
    """What a reference names, loaded; ``own``: of :func:`_own`, ``hub``: how to ask one."""
    if own is not None:
        if base is not None:
            raise BadInput(f"got base {os.fspath(base)} for {own[0].name}, allowed for adapters, try without it")
        return Runtime.from_folder(own[1], own[0], where, dtype)
    from fluxloom.infer.assemble import assemble
    from fluxloom.weights.hub import resolve
    from fluxloom.weights.tiny import load_tiny_decoder

    if preview_decoder is not None:
        load_tiny_decoder(Path(preview_decoder))  # a wrong file is found out before 34 GB are read
    located = resolve(reference, variant=variant, progress=progress, base=base, **hub)
    return assemble(located, where, dtype, variant, progress)
