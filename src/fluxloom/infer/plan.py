"""Whether a request on a model fits into a GPU's memory, how, and what it will take: arithmetic, before anything runs.

A request has five stages, each with its own networks: *read* (CLIP, T5), *see* (Redux), *encode* (pictures), *sample*
(the transformer, many times) and *decode*. :func:`fit` finds the fastest :class:`Plan` under a cap. What it may choose:

- parts stay on the device, or come for their stage and leave when another needs the room;
- the modulations of all steps are computed at once, and their weights (27 % of 12 B) wait on the host otherwise;
- some blocks, and T5's layers, stream from pinned host memory through two slots, each while another computes;
- only where nothing exact fits: the products of the blocks in 8 bits, the autoencoder in tiles. The plan says so.

NF4 is no choice: such files load, but there is no product in that form, so they would be 16 bits on the device.
:mod:`fluxloom.speed.offload` carries plans out. Sizes are bytes, GB are 10^9 bytes, times seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, product

import torch

from fluxloom.core.redux import ReduxSpec
from fluxloom.core.specs import AutoencoderSpec, ModelSpec, Size
from fluxloom.errors import BadInput
from fluxloom.infer.weigh import Weights, picture_flops, weigh
from fluxloom.infer.work import MACHINES, SEEN, Machine, Work, step_flops

# Seen on one H200 with torch 2.11, at caps of 8 to 24 GB, and the same at all: what the driver counts over what
# PyTorch reserves (the CUDA context, and the code of cuBLAS, cuDNN, Triton and FA3), what cuBLAS takes of PyTorch's
# memory, and how much more PyTorch reserves than lives where weights come and go: blocks of which parts stay empty.
CONTEXT, WORKSPACES, ROUNDING = 870_000_000, 100_000_000, 1.035
CONVOLUTIONS = 300_000_000  # workspaces of cuDNN: where decoding is fullest, peaks were 2 % under and 1 % over
HELD_BACK = 1.05  # seconds of a streamed step over the longer of computing and copying
SPARE = 0.95  # of a cap: the part that is planned with, as predictions err
TILE = 72  # latent cells of a tile of the autoencoder at most: two by two make 1024 x 1024
OVERLAP = 16  # latent cells that neighbouring tiles share at least
LINEARS = ("fp8", "int8")
# Widths of the model that a token holds at the fullest point of a pass. A single block of the fused sequence: x, its
# input, queries, keys and values, the MLP's (4), what it attended to, and what comes out. In 8 bits its first product
# is whole (7), and what it attended to stands beside the MLP's once more, half as wide. Core's own makes more copies.
# With LoRAs on the layers, whose hooks want products whole, what an update adds is there as well.
_WIDTHS = {"fused": 11, "low": 12, "hung": 16, "low, hung": 18, "plain": 21}
STAGES = ("read", "see", "encode", "sample", "decode")
_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a plan: bytes of weights that lie on the device, of what is computed, of all (as the driver sees
    it), and seconds, of which ``copying`` are for weights that come for it."""

    name: str
    weights: int
    activations: int
    peak: int
    seconds: float
    copying: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model lies in memory while a request runs.

    stays       parts that never leave the device, of ``towers``, ``redux``, ``autoencoder`` and ``transformer`` (its
                outer layers and the blocks that do not stream)
    linears     the form of the blocks' products; None: as the weights are
    streamed    numbers of the blocks that stream, double blocks first
    modulation  whether the modulations' weights wait on the host
    layers      whether T5's layers stream
    tile        latent cells of a tile of the autoencoder at most; None: whole pictures
    approximate what of this changes the numbers beyond rounding, in words
    host        bytes of pinned host memory
    words       the plan in sentences
    """

    model: str
    machine: str
    stays: frozenset[str]
    linears: str | None
    streamed: tuple[int, ...]
    modulation: bool
    layers: bool
    tile: int | None
    stages: tuple[Stage, ...]
    host: int
    approximate: tuple[str, ...] = ()
    cap: int | None = None
    words: tuple[str, ...] = field(default=(), compare=False)

    @property
    def peak(self) -> int:
        """Bytes that the process takes at most, as the driver reports it."""
        return max(stage.peak for stage in self.stages)

    @property
    def seconds(self) -> float:
        """From prompt to pictures."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def resident(self) -> bool:
        """Whether the transformer's weights keep their places: only then can passes be captured in CUDA graphs."""
        return not self.streamed and "transformer" in self.stays


def fit(
    spec: ModelSpec,
    vram: int | None = None,
    work: Work | None = None,
    *,
    machine: Machine = MACHINES["h200"],
    linears: str | None = None,
    dtype: str = "bfloat16",
) -> Plan:
    """The fastest plan whose peak stays under ``vram`` bytes (None: as if there were enough).

    Exact plans come first: 8 bits are taken where ``linears`` asks for them or where nothing else fits, tiles only
    where nothing else fits. Raises BadInput where no plan fits, with the least that would do, and for a form that the
    machine has not.
    """
    if linears is not None and linears not in LINEARS:
        raise BadInput(f"got linears {linears!r}, allowed {', '.join(LINEARS)}, try leaving it out")
    if linears is not None and linears not in machine.products:
        raise BadInput(f"got linears {linears!r}, which {machine.name} has no products for, try leaving it out")
    work = work or Work.typical(spec)
    forms = (linears,) if linears else (None, *(form for form in LINEARS if form in machine.products))
    whole = _Choice(linears=linears, stays=frozenset(_parts(spec)))
    if vram is None or not machine.upload:
        plans = [_plan(spec, work, machine, dtype, whole)]
    else:
        plans = [_fewest(spec, work, machine, dtype, choice, SPARE * vram) for choice in _choices(spec, forms)]
    fitting = [plan for plan in plans if vram is None or plan.peak <= SPARE * vram]
    if fitting:
        best = min(fitting, key=lambda plan: (len(_unasked(plan, linears)), plan.seconds, len(_sentences(plan))))
        best = replace(best, cap=vram)
        return replace(best, words=(*_summary(best, work), *_sentences(best, linears)))
    least = min(plan.peak for plan in plans)
    raise BadInput(
        f"got {gigabytes(vram or 0)} of memory for {spec.name} at {work.width}x{work.height}"
        f"{f' with {len(work.references)} references' if len(work.references) > 1 else ''}, allowed "
        f"{_above(least / SPARE)} and more, try {'a smaller size' if machine.upload else 'bfloat16'}"
    )


def foresee(
    plan: Plan, spec: ModelSpec, work: Work, machine: Machine = MACHINES["h200"], dtype: str = "bfloat16"
) -> Plan:
    """A plan as it is, for other work than it was made for.

    Raises BadInput where that takes more than the plan's cap.
    """
    choice = _Choice(
        linears=plan.linears, stays=plan.stays, streamed=len(plan.streamed), modulation=plan.modulation,
        layers=plan.layers, tiled=plan.tile is not None,
    )  # fmt: skip
    found = replace(_plan(spec, work, machine, dtype, choice), cap=plan.cap)
    if plan.cap is not None and found.peak > plan.cap:
        raise BadInput(
            f"got {work.width}x{work.height} with {len(work.references)} references, allowed what fits "
            f"{gigabytes(plan.cap)} as the weights lie (this takes {gigabytes(found.peak)}), try a smaller size"
        )
    return found


def parse_bytes(text: str) -> int:
    """``12GB`` (10^9 bytes each), ``12GiB`` (2^30), ``800MB``. Raises BadInput."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise BadInput(f"got memory {text[:20]!r}, allowed a number and a unit, try 12GB")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** _UNITS[unit.removesuffix("i")])


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.0f} MB"


def _above(size: float) -> str:
    """Bytes for people, rounded up: what is told to be enough is enough."""
    return f"{math.ceil(size / 1e8) / 10:.1f} GB" if size >= 10**8 else f"{math.ceil(size / 1e6)} MB"


# ---------------------------------------------------------------------------------------------------- choices


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What of a :class:`Plan` is decided, not computed."""

    linears: str | None
    stays: frozenset[str]
    streamed: int = 0
    modulation: bool = False
    layers: bool = False
    tiled: bool = False


def _parts(spec: ModelSpec) -> tuple[str, ...]:
    return ("towers", "autoencoder", "transformer", *(("redux",) if "redux" in spec.tasks else ()))


def _choices(spec: ModelSpec, forms: Sequence[str | None]) -> Iterator[_Choice]:
    parts = _parts(spec)
    subsets = chain.from_iterable(combinations(parts, k) for k in range(len(parts) + 1))
    for form, stays in product(forms, subsets):
        for modulation, layers, tiled in product((False, True), repeat=3):
            if not (layers and (spec.text is not None or "towers" in stays)):
                yield _Choice(linears=form, stays=frozenset(stays), modulation=modulation, layers=layers, tiled=tiled)


def _fewest(spec: ModelSpec, work: Work, machine: Machine, dtype: str, choice: _Choice, cap: float) -> Plan:
    """The plan with the fewest streamed blocks that fits; where none does, the one with the least peak."""

    def streaming(count: int) -> Plan:
        return _plan(spec, work, machine, dtype, replace(choice, streamed=count))

    plan = streaming(0)
    blocks = spec.transformer.depth + spec.transformer.depth_single_blocks
    if plan.peak <= cap:
        return plan
    low, high = min(3, blocks), blocks  # one or two would fill the slots, and never leave them
    if streaming(high).peak > cap:
        return min(plan, streaming(high), key=lambda one: one.peak)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if streaming(middle).peak <= cap else (middle + 1, high)
    return streaming(low)


def tiles(cells: int, most: int = TILE, overlap: int = OVERLAP) -> tuple[int, int]:
    """How many tiles cover a row of latent cells, and how many cells, ``most`` or fewer, each of them has."""
    if cells <= most:
        return 1, cells
    count = -(-(cells - overlap) // (most - overlap))
    return count, -(-(cells + (count - 1) * overlap) // count)


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """Numbers of ``count`` blocks that stream, as evenly as they can lie between the others: each is copied while
    those before it compute."""
    return tuple(i * blocks // count for i in range(count)) if count else ()


# ---------------------------------------------------------------------------------------------------- one plan


def _plan(spec: ModelSpec, work: Work, machine: Machine, dtype: str, choice: _Choice) -> Plan:
    walked = _walked(machine, dtype)
    weights = weigh(spec, dtype, choice.linears, walked)
    streamed = spread(choice.streamed, len(weights.blocks))
    parts = _resident(weights, choice, streamed)
    moving = [weights.blocks[i] for i in streamed]
    moving += weights.modulations if choice.modulation else []
    moving += weights.layers if choice.layers else []
    slots = 2 * max(moving, default=0)
    always = sum(size for part, size in parts.items() if part in choice.stays)
    owners = {"read": "towers", "see": "redux", "sample": "transformer"}
    kept = 0  # of a captured pass: its buffers stay for the next one
    acts = _activations(spec, work, machine, choice.linears, choice.tiled, getattr(torch, dtype).itemsize)
    if machine.upload and not choice.streamed and "transformer" in choice.stays:
        kept = acts["sample"]
    moves = bool(slots) or not choice.stays.issuperset(_parts(spec))
    stages = []
    for stage in STAGES:
        part = owners.get(stage, "autoencoder")
        if stage not in acts:
            continue
        own = 0 if part in choice.stays else parts[part]
        on_device = always + own + slots
        seconds, copying = _seconds(stage, spec, work, machine, dtype, choice, weights, own)
        live = acts[stage] + (kept if stage != "sample" or work.loras else 0)  # passes with LoRAs are not captured
        stages.append(
            Stage(
                name=stage, weights=on_device, activations=live,
                peak=_taken(on_device + live + work.loras, part == "autoencoder", machine, moves=moves),
                seconds=seconds, copying=copying,
            )
        )  # fmt: skip
    leaving = sum(size for part, size in parts.items() if part not in choice.stays)
    plan = Plan(
        model=spec.name, machine=machine.name, stays=choice.stays, linears=choice.linears, streamed=streamed,
        modulation=choice.modulation, layers=choice.layers, tile=TILE if choice.tiled else None,
        stages=tuple(stages), host=leaving + sum(moving),
    )  # fmt: skip
    return replace(plan, approximate=tuple(_unasked(plan, None)))


def _taken(live: int, pictures: bool, machine: Machine, moves: bool) -> int:
    """Bytes that a process takes for those that live. ``pictures``: with convolutions among them; ``moves``: where
    weights come and go."""
    if not machine.upload:
        return live
    whole = live + WORKSPACES + (CONVOLUTIONS if pictures else 0)
    return CONTEXT + (round(ROUNDING * whole) if moves else whole)


def _walked(machine: Machine, dtype: str) -> bool:
    """Whether the autoencoder computes in bfloat16, as it does on a GPU unless all is in float32."""
    return machine.upload > 0 and dtype == "bfloat16"


def _resident(weights: Weights, choice: _Choice, streamed: Sequence[int]) -> dict[str, int]:
    """Bytes of each part that lie on the device while it is there."""
    transformer = weights.outer + sum(weights.blocks) - sum(weights.blocks[i] for i in streamed)
    transformer += 0 if choice.modulation else sum(weights.modulations)
    layers = 0 if choice.layers else sum(weights.layers)
    return {
        "towers": weights.towers + layers,
        "redux": weights.redux,
        "autoencoder": weights.autoencoder,
        "transformer": transformer,
    }


def _activations(
    spec: ModelSpec, work: Work, machine: Machine, linears: str | None, tiled: bool, size: int
) -> dict[str, int]:
    """Bytes that are alive at once in each stage that the request has, beside weights; ``size``: bytes a number.

    The factors count what the functions of core and of the fused sequence hold at their fullest point; tests hold them
    to the modules themselves, run on the meta device.
    """
    shape, text = spec.transformer, work.text + SEEN * work.images
    how = "plain" if not machine.upload else _how(linears, work.loras)
    modulations = 12 * shape.depth + 3 * shape.depth_single_blocks + 2
    width = shape.hidden_size * size
    every_token = _WIDTHS[how] * width + shape.head_dim * 4  # and the angles of its position
    found = {
        "sample": work.rows * ((work.tokens + text) * every_token + (work.evaluations * modulations + text) * width)
    }
    if spec.text is None:
        t5 = spec.pair.t5  # biases of distances, and of the widest layer three products
        found["read"] = (t5.heads * work.text + 3 * t5.mlp + 5 * t5.width) * work.text * size
    else:
        found["read"] = 14 * spec.text.max_length * spec.text.width * 4
    if work.images:
        found["see"] = SEEN * (6 * ReduxSpec.out_dim + ReduxSpec.width) * size  # of the adapter, in the middle
    pictures, each = (*work.references, *work.encoded), 2 if machine.upload and size == 2 else 4
    if pictures:
        found["encode"] = max(_picture_bytes(spec.autoencoder, one, tiled, 5 * each) for one in pictures)
    found["decode"] = _picture_bytes(spec.autoencoder, (work.width, work.height), tiled, 6 * each)
    return found


def _how(linears: str | None, loras: int) -> str:
    if loras:
        return "hung" if linears is None else "low, hung"
    return "fused" if linears is None else "low"


def _picture_bytes(spec: AutoencoderSpec, size: Size, tiled: bool, layers: int) -> int:
    """Bytes of the autoencoder's finest level. ``layers``: bytes a pixel and channel. The encoder holds five tensors of
    the least width there, the decoder six (the level's input, which is twice as wide, and four of a residual block)."""
    cell = spec.downsampling
    width, height = (tiles(side // cell)[1] * cell if tiled else side for side in size)
    whole = 2 * 3 * size[0] * size[1] * 4 if tiled else 0  # the sum of the tiles, and of their shares
    return layers * spec.ch * width * height + whole


def _seconds(
    stage: str, spec: ModelSpec, work: Work, machine: Machine, dtype: str, choice: _Choice, weights: Weights, own: int
) -> tuple[float, float]:
    """Of a stage, and of those the ones for weights that come for it (``own`` bytes, once a picture or a request)."""

    def up(size: float) -> float:
        return size / (machine.upload * 1e9) if machine.upload else 0.0

    products, tera = machine.products[dtype], 1e12
    if stage == "read":
        computing = 2 * work.rows * weights.tower_numbers * work.text / (products * tera)
        layers = up(work.rows * sum(weights.layers)) if choice.layers else 0.0
        return up(own) + max(computing, layers), up(own) + layers
    if stage == "see":
        return up(own) + work.images * 2 * SEEN * weights.redux_numbers / (products * tera), up(own)
    if stage in ("encode", "decode"):
        sizes = (*work.references, *work.encoded) if stage == "encode" else ((work.width, work.height),) * work.pictures
        walked = _walked(machine, dtype)
        flops = sum(_picture_flops(spec.autoencoder, stage, one, choice.tiled, walked) for one in sizes)
        copies = up(own) * (work.pictures if stage == "decode" else 1)
        rate = machine.pictures if walked or not machine.upload else products
        return copies + flops / (rate * tera), copies
    linears, attention = step_flops(spec.transformer, work)
    rate = machine.products[choice.linears or dtype]
    step = (linears / rate + attention / machine.attention) / tera * machine.overhead
    copied = up(sum(weights.blocks[i] for i in spread(choice.streamed, len(weights.blocks))))
    passes = work.evaluations * work.pictures
    once = up(own) * work.pictures + (up(sum(weights.modulations)) if choice.modulation else 0.0)
    each = max(step, copied) * (HELD_BACK if copied else 1.0)
    return once + passes * each, once + passes * copied


def _picture_flops(spec: AutoencoderSpec, stage: str, size: Size, tiled: bool, walked: bool) -> float:
    if not tiled:
        return picture_flops(spec, stage, *size, walked)
    (columns, width), (rows, height) = (tiles(side // spec.downsampling) for side in size)
    one = picture_flops(spec, stage, width * spec.downsampling, height * spec.downsampling, walked)
    return columns * rows * one


# ---------------------------------------------------------------------------------------------------- in words


def _unasked(plan: Plan, linears: str | None) -> list[str]:
    """What of a plan changes the numbers and was not asked for."""
    lossy = [f"{plan.linears} products"] if plan.linears and plan.linears != linears else []
    return lossy + (["a tiled autoencoder"] if plan.tile else [])


def _summary(plan: Plan, work: Work) -> list[str]:
    fullest = max(plan.stages, key=lambda stage: stage.peak)
    cap = f" of {gigabytes(plan.cap)}" if plan.cap else ""
    many = f"{work.pictures} pictures" if work.pictures > 1 else "a picture"
    return [
        f"{gigabytes(plan.peak)}{cap} at the fullest (stage {fullest.name}), {plan.seconds:.3g} s for {many} of "
        f"{work.width}x{work.height} in {work.evaluations} passes, at the rates of {plan.machine}"
    ]


def _sentences(plan: Plan, linears: str | None = None) -> list[str]:
    names = {
        "towers": "the text encoders",
        "redux": "Redux",
        "autoencoder": "the autoencoder",
        "transformer": "the transformer",
    }
    stages = {"towers": "read", "redux": "see", "autoencoder": "decode", "transformer": "sample"}
    ran = {stage.name for stage in plan.stages}
    found = []
    if leaving := [names[part] for part in names if part not in plan.stays and stages[part] in ran]:
        found.append(f"come to the GPU for their stage, and then leave it: {', '.join(leaving)}")
    if plan.layers:
        found.append("T5 is streamed layer by layer while it reads")
    if plan.modulation:
        found.append("the modulations of all steps are computed at once; their weights wait on the host otherwise")
    if plan.streamed:
        found.append(f"{len(plan.streamed)} blocks are streamed from the host in every step, each while others compute")
    if plan.linears:
        why = "as asked" if plan.linears == linears else "since nothing exact fits"
        found.append(f"the products of the blocks are in {plan.linears} (lossy), {why}")
    if plan.tile:
        found.append(
            f"pictures pass the autoencoder in tiles of {plan.tile} cells, since they do not fit whole (approximate)"
        )
    if plan.host:
        found.append(f"{gigabytes(plan.host)} of host memory are pinned")
    return found or ["everything stays on the device"]
