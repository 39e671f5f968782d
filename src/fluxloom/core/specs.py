"""Frozen rows: every fact that tells one member of the family from another.

Nothing in the code branches on a model's name; it reads a field of its row. Sources: the official
repository (model configurations, defaults of its command line) and the model cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Size = tuple[int, int]  # (width, height) in pixels
RgbMap = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """Shape of the multimodal transformer. Defaults are FLUX.1 dev (11.9 B parameters)."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"got hidden_size {self.hidden_size}; need a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(f"got axes_dim {self.axes_dim}; need even numbers that add up to {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return round(self.hidden_size * self.mlp_ratio)


# Of FLUX.1's autoencoder, as ComfyUI prints them (latent_formats.py, class Flux). It applies them to estimates of the
# sampler, which it keeps normalised (process_latent_in), and takes the sum for colours in [-1, 1] (latent_preview.py).
_FLUX_RGB: RgbMap = (
    (-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433), (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115), (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180), (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499), (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)  # fmt: skip

# Of nano's, by least squares on 256 renders of the world (infer.preview.fit_rgb_map); on 64 others it leaves 3 to 5 %
# of the variance of a cell's mean colour unexplained (PSNR 25.8 dB).
_NANO_RGB: RgbMap = (
    (0.0005, 0.1096, 0.2091), (0.0123, 0.0112, 0.0006), (0.0939, 0.0706, 0.0177), (-0.0383, 0.0016, -0.0280),
    (-0.0137, 0.0070, -0.0340), (0.0248, 0.0154, -0.0163), (0.0305, -0.0265, 0.0136), (0.0001, -0.0363, 0.0181),
    (0.0424, 0.0059, 0.0112), (-0.0673, 0.0696, -0.0766), (-0.0618, 0.0517, 0.0173), (-0.0091, 0.0459, -0.0016),
    (0.0896, 0.0432, -0.0660), (-0.2352, -0.1941, -0.0367), (-0.0184, -0.0534, -0.0004), (0.1323, -0.0532, -0.0474),
    (0.0762, 0.0705, 0.1295),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """Shape of the VAE and the affine map from its latents to the model's: z = scale (z_vae - shift).

    ``rgb_map`` tells the colour of a latent cell well enough for previews: (R, G, B) in [-1, 1] is the sum of a row
    for each channel times its value in z, and a last row; () where nobody has fitted one. An estimate, so no part of
    what makes two autoencoders equal.
    """

    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    norm_groups: int = 32
    rgb_map: RgbMap = field(default=_FLUX_RGB, repr=False, compare=False)

    @property
    def downsampling(self) -> int:
        return 1 << (len(self.ch_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class TinyDecoderSpec:
    """Shape of a distilled decoder for previews; defaults are TAEF1 (1.2 M parameters), which reads the normalised
    latents of FLUX.1 (its published configuration: scaling 1, shift 0)."""

    z_channels: int = 16
    width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)  # at each resolution, coarsest first


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Shape of CLIP's text tower; defaults are ViT-L/14, whose pooled state FLUX.1 reads."""

    vocab_size: int = 49_408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3_072
    max_length: int = 77


@dataclass(frozen=True, kw_only=True)
class T5Spec:
    """Shape of a T5 v1.1 encoder; defaults are XXL (4.76 B parameters), whose last states FLUX.1 reads."""

    vocab_size: int = 32_128
    width: int = 4_096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp: int = 10_240
    buckets: int = 32  # of relative positions
    max_distance: int = 128


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """Both text encoders of the 12 B members."""

    clip: ClipSpec = ClipSpec()
    t5: T5Spec = T5Spec()


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """Shape of nano's own text tower; the 12 B members use a :class:`TextPair`."""

    vocab_size: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    max_length: int = 48


QUALITIES = ("draft", "standard", "best")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How a path is walked: so many ``steps`` of a solver, or with the ``tolerance`` of one that chooses its own (of
    which ``steps`` is the longest first one)."""

    steps: int
    solver: str = "euler"
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskDefaults:
    """What a request takes when its field is unset.

    ``guidance`` is the value embedded into the network (None: the network has no such input);
    ``true_cfg`` is classifier-free guidance with a second forward (1 = off). ``draft`` and ``best`` are the paces of
    those qualities; left out, half the steps, and twice as many: the error of Euler's method is of first order.
    """

    steps: int
    guidance: float | None
    true_cfg: float = 1.0
    solver: str = "euler"
    size: Size = (1024, 1024)
    draft: Pace | None = None
    best: Pace | None = None

    def pace(self, quality: str, solver: str | None = None) -> Pace:
        """That of one of :data:`QUALITIES`; the standard one is the row itself. ``solver``: who is to walk it, where
        that was said; steps that were chosen for one with a tolerance mean nothing to another."""
        rule = {"draft": (self.steps + 1) // 2, "standard": self.steps, "best": 2 * self.steps}
        said = {"draft": self.draft, "standard": None, "best": self.best}[quality]
        if said is None or (said.tolerance is not None and solver not in (None, said.solver)):
            return Pace(steps=rule[quality], solver=solver or self.solver)
        return said


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a member is published.

    file    the official single file of the transformer, or of the adapter
    sha256  of that file, as its publisher prints it; None where that was never printed (Krea's page shows dev's)
    page    where a gated repository's terms are accepted
    """

    repo: str
    file: str
    sha256: str | None = None
    gated: bool = True

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One member of the family, complete.

    text     its own text tower; None: the two encoders of ``pair``
    control  what its control picture shows: canny edges, or depth
    base     of an adapter (a LoRA, Redux): the member that it is added to
    lora     of a LoRA: the strength that it is meant for
    """

    name: str
    title: str
    transformer: TransformerSpec
    autoencoder: AutoencoderSpec = field(default_factory=AutoencoderSpec)
    text: TextSpec | None = None
    pair: TextPair = TextPair()
    source: Source | None = None
    control: str | None = None
    base: str | None = None
    lora: float | None = None
    tasks: Mapping[str, TaskDefaults]
    shift: bool = True
    text_length: int = 512
    size_multiple: int = 16
    min_side: int = 256
    max_area: int = 4 * 1024 * 1024
    preferred_sizes: tuple[Size, ...] = ()
    licence: str
    embedded: bool = False

    def task(self, name: str) -> TaskDefaults | None:
        return self.tasks.get(name)


# The 17 sizes Kontext was trained on, about one megapixel each.
KONTEXT_SIZES: tuple[Size, ...] = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip

_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"

# Of nano, by bench/quality.py: a draft takes 9 evaluations (an edit 6 or 7), the best 25 (an edit 15).
_DRAFT = Pace(steps=24, solver="adaptive", tolerance=0.03)
_FINE = Pace(steps=24, solver="adaptive", tolerance=0.002)

_NANO = ModelSpec(
    name="nano",
    title="fluxloom nano: the embedded member, dev and Kontext in one, for the illustrated world",
    transformer=TransformerSpec(
        hidden_size=384,
        num_heads=6,
        axes_dim=(8, 28, 28),
        depth=1,
        depth_single_blocks=9,
        context_in_dim=256,
        vec_in_dim=256,
    ),
    # 8 groups: 32 would be instance normalisation at this width (4 channels a group at official size).
    autoencoder=AutoencoderSpec(
        ch=32, num_res_blocks=1, norm_groups=8, scale_factor=0.6805, shift_factor=-0.0015, rgb_map=_NANO_RGB
    ),
    text=TextSpec(vocab_size=1536),
    tasks=MappingProxyType(
        {
            "generate": TaskDefaults(
                steps=16, guidance=3.5, solver="dpmpp_2m", size=(256, 256), draft=_DRAFT, best=_FINE
            ),
            "edit": TaskDefaults(steps=14, guidance=2.0, solver="dpmpp_2m", size=(256, 256), draft=_DRAFT, best=_FINE),
        }
    ),
    text_length=48,
    min_side=64,
    max_area=512 * 512,
    licence="Apache-2.0",
    embedded=True,
)

_BFL = "black-forest-labs"
# As printed in the official repository's documents and model cards.
_SHA = {
    "dev": "4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7",
    "schnell": "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a",
    "kontext": "843a26dc765d3105dba081c30bce7b14c65b0988f9e8d14e9fbc8856a6deebd5",
    "fill": "03e289f530df51d014f48e675a9ffa2141bc003259bf5f25d75b957e920a41ca",
    "canny": "996876670169591cb412b937fbd46ea14cbed6933aef17c48a2dcd9685c98cdb",
    "depth": "41360d1662f44ca45bc1b665fe6387e91802f53911001630d970a4f8be8dac21",
    "canny-lora": "8eaa21b9c43d5e7242844deb64b8cf22ae9010f813f955ca8c05f240b8a98f7e",
    "depth-lora": "1938b38ea0fdd98080fa3e48beb2bedfbc7ad102d8b65e6614de704a46d8b907",
    "redux": "a1b3bdcb4bdc58ce04874b9ca776d61fc3e914bb6beab41efb63e4e2694dca45",
}


def _member(name: str, title: str, tasks: Mapping[str, TaskDefaults], source: Source | None, **facts: Any) -> ModelSpec:
    """A row with what most members share."""
    shared = {"transformer": TransformerSpec(), "licence": _DEV_LICENCE}
    return ModelSpec(name=name, title=title, tasks=MappingProxyType(dict(tasks)), source=source, **{**shared, **facts})


# 50 is the default of the official command line for dev and Krea (for Kontext 30), 28 that of diffusers for all of
# them. Neither draft nor best has been measured on a 12 B member.
_BEST = Pace(steps=50)

MODELS: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _NANO,
            _member(
                "flux1-dev",
                "FLUX.1 [dev]: text to image",
                {"generate": TaskDefaults(steps=28, guidance=3.5, best=_BEST)},
                Source(repo=f"{_BFL}/FLUX.1-dev", file="flux1-dev.safetensors", sha256=_SHA["dev"]),
            ),
            _member(
                "flux1-krea-dev",
                "FLUX.1 Krea [dev]: text to image, less of a machine's taste",
                {"generate": TaskDefaults(steps=28, guidance=4.5, best=_BEST)},
                Source(repo=f"{_BFL}/FLUX.1-Krea-dev", file="flux1-krea-dev.safetensors"),
            ),
            _member(
                "flux1-schnell",
                "FLUX.1 [schnell]: text to image in one to four steps",
                # Distilled for one to four steps (its card): more are no better.
                {"generate": TaskDefaults(steps=4, guidance=None, best=Pace(steps=4))},
                Source(
                    repo=f"{_BFL}/FLUX.1-schnell", file="flux1-schnell.safetensors", sha256=_SHA["schnell"], gated=False
                ),
                transformer=TransformerSpec(guidance_embed=False),
                shift=False,
                text_length=256,
                licence="Apache-2.0",
            ),
            _member(
                "flux1-kontext-dev",
                "FLUX.1 Kontext [dev]: instruction editing in context",
                {
                    "generate": TaskDefaults(steps=28, guidance=2.5, best=_BEST),
                    "edit": TaskDefaults(steps=28, guidance=2.5, best=_BEST),
                },
                Source(repo=f"{_BFL}/FLUX.1-Kontext-dev", file="flux1-kontext-dev.safetensors", sha256=_SHA["kontext"]),
                preferred_sizes=KONTEXT_SIZES,
            ),
            _member(
                "flux1-fill-dev",
                "FLUX.1 Fill [dev]: inpainting and outpainting",
                {"fill": TaskDefaults(steps=50, guidance=30.0)},
                Source(repo=f"{_BFL}/FLUX.1-Fill-dev", file="flux1-fill-dev.safetensors", sha256=_SHA["fill"]),
                transformer=TransformerSpec(in_channels=384),
                size_multiple=32,
            ),
            *(
                _member(
                    f"flux1-{control}-dev{kind}",
                    f"FLUX.1 {control.title()} [dev]{', a LoRA for dev' if kind else ''}: text to image along {what}",
                    {"control": TaskDefaults(steps=50, guidance=guidance)},
                    Source(
                        repo=f"{_BFL}/FLUX.1-{control.title()}-dev{kind}",
                        file=f"flux1-{control}-dev{kind}.safetensors",
                        sha256=_SHA[f"{control}{kind}"],
                    ),
                    transformer=TransformerSpec(in_channels=128),
                    control=control,
                    base="flux1-dev" if kind else None,
                    lora=0.85 if kind else None,
                )
                for control, what, guidance in (("canny", "edges", 30.0), ("depth", "a depth map", 10.0))
                for kind in ("", "-lora")
            ),
            _member(
                "flux1-redux-dev",
                "FLUX.1 Redux [dev]: variations of a picture, an adapter for dev",
                {"redux": TaskDefaults(steps=50, guidance=2.5)},
                Source(repo=f"{_BFL}/FLUX.1-Redux-dev", file="flux1-redux-dev.safetensors", sha256=_SHA["redux"]),
                base="flux1-dev",
            ),
            _member(
                "tiny-1b",
                "a shape of 1.2 B parameters to distil into; nobody publishes weights for it",
                {"generate": TaskDefaults(steps=28, guidance=3.5), "edit": TaskDefaults(steps=28, guidance=2.5)},
                None,
                transformer=TransformerSpec(hidden_size=1_536, num_heads=12, depth=5, depth_single_blocks=21),
                preferred_sizes=KONTEXT_SIZES,
                licence="that of your weights",
            ),
        )
    }
)
