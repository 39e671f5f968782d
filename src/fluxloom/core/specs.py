"""Frozen rows: every fact that tells one member of the family from another.

Nothing in the code branches on a model's name; it reads a field of its row. Sources: the official
repository (model configurations, defaults of its command line) and the model cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Size = tuple[int, int]  # (width, height) in pixels


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


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """Shape of the VAE and the affine map from its latents to the model's: z = scale (z_vae - shift)."""

    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    norm_groups: int = 32

    @property
    def downsampling(self) -> int:
        return 1 << (len(self.ch_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """Shape of nano's own text tower; the 12 B members use CLIP-L and T5 (their sizes are fixed)."""

    vocab_size: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    max_length: int = 48


@dataclass(frozen=True, kw_only=True)
class TaskDefaults:
    """What a request takes when its field is unset.

    ``guidance`` is the value embedded into the network (None: the network has no such input);
    ``true_cfg`` is classifier-free guidance with a second forward (1 = off).
    """

    steps: int
    guidance: float | None
    true_cfg: float = 1.0
    solver: str = "euler"
    size: Size = (1024, 1024)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One member of the family, complete."""

    name: str
    title: str
    transformer: TransformerSpec
    autoencoder: AutoencoderSpec = field(default_factory=AutoencoderSpec)
    text: TextSpec | None = None
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
    autoencoder=AutoencoderSpec(ch=32, num_res_blocks=1, norm_groups=8, scale_factor=0.6805, shift_factor=-0.0015),
    text=TextSpec(vocab_size=1536),
    tasks=MappingProxyType(
        {
            "generate": TaskDefaults(steps=16, guidance=3.5, solver="dpmpp_2m", size=(256, 256)),
            "edit": TaskDefaults(steps=14, guidance=2.0, solver="dpmpp_2m", size=(256, 256)),
        }
    ),
    text_length=48,
    min_side=64,
    max_area=512 * 512,
    licence="Apache-2.0",
    embedded=True,
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _NANO,
            ModelSpec(
                name="flux1-dev",
                title="FLUX.1 [dev]: text to image",
                transformer=TransformerSpec(),
                tasks=MappingProxyType({"generate": TaskDefaults(steps=28, guidance=3.5)}),
                licence=_DEV_LICENCE,
            ),
            ModelSpec(
                name="flux1-schnell",
                title="FLUX.1 [schnell]: text to image in one to four steps",
                transformer=TransformerSpec(guidance_embed=False),
                tasks=MappingProxyType({"generate": TaskDefaults(steps=4, guidance=None)}),
                shift=False,
                text_length=256,
                licence="Apache-2.0",
            ),
            ModelSpec(
                name="flux1-kontext-dev",
                title="FLUX.1 Kontext [dev]: instruction editing in context",
                transformer=TransformerSpec(),
                tasks=MappingProxyType(
                    {
                        "generate": TaskDefaults(steps=28, guidance=2.5),
                        "edit": TaskDefaults(steps=28, guidance=2.5),
                    }
                ),
                preferred_sizes=KONTEXT_SIZES,
                licence=_DEV_LICENCE,
            ),
            ModelSpec(
                name="flux1-fill-dev",
                title="FLUX.1 Fill [dev]: inpainting and outpainting",
                transformer=TransformerSpec(in_channels=384),
                tasks=MappingProxyType({"fill": TaskDefaults(steps=50, guidance=30.0)}),
                size_multiple=32,
                licence=_DEV_LICENCE,
            ),
            ModelSpec(
                name="flux1-canny-dev",
                title="FLUX.1 Canny [dev]: text to image along edges",
                transformer=TransformerSpec(in_channels=128),
                tasks=MappingProxyType({"control": TaskDefaults(steps=50, guidance=30.0)}),
                licence=_DEV_LICENCE,
            ),
            ModelSpec(
                name="flux1-depth-dev",
                title="FLUX.1 Depth [dev]: text to image along a depth map",
                transformer=TransformerSpec(in_channels=128),
                tasks=MappingProxyType({"control": TaskDefaults(steps=50, guidance=10.0)}),
                licence=_DEV_LICENCE,
            ),
        )
    }
)
