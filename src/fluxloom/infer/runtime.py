"""The only state of inference: modules, where and how precisely they compute, and what has read the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fluxloom.core import shapes
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.redux import Redux
from fluxloom.core.specs import ModelSpec, TextSpec
from fluxloom.core.text import TextStates, TextTower, Tokenizer
from fluxloom.core.tiny_decoder import TinyDecoder
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, Failure, WeightsError
from fluxloom.infer import pictures
from fluxloom.infer.conditions import Row
from fluxloom.infer.executor import Executor, Given, Plain
from fluxloom.infer.loras import Rack, ResolvedLora
from fluxloom.infer.reading import OwnTower, Reader
from fluxloom.infer.receipt import processor, system
from fluxloom.infer.request import Resolved
from fluxloom.infer.sample import Evaluate
from fluxloom.weights.load import VOCABULARY, build, load_folder, part, verified

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LATELY = 8  # requests of different sizes that are drawn in step: each finds what it gave before


@dataclass
class Runtime:
    """One loaded model. The transformer computes in ``dtype``; the autoencoder, whose cost is small, in float32; the
    reader in the dtype of its weights.

    allows  raises BadInput for a request that does not fit as the weights lie; None: whatever the model can do
    """

    spec: ModelSpec
    transformer: Transformer
    autoencoder: Autoencoder
    reader: Reader
    content: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    redux: Redux | None = None
    previewer: TinyDecoder | None = None
    allows: Callable[[Resolved], object] | None = None
    executor: Executor = field(init=False, repr=False)
    loras: Rack = field(init=False, repr=False)
    _lately: dict[Any, Given] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.executor = Plain(self.transformer)
        self.loras = Rack(self.transformer, self.spec)
        self.transformer.to(self.device, self.dtype)
        self.autoencoder.to(self.device)
        if self.redux is not None:
            self.redux.to(self.device)
        self.reader.place(self.device, self.dtype)

    @classmethod
    def from_folder(cls, folder: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Runtime:
        """Load a model folder: card, shards, vocabulary. Raises WeightsError where anything does not fit."""
        content = verified(folder)
        state = load_folder(folder)
        text = spec.text
        if text is None:
            raise WeightsError(f"got {folder} for {spec.name}, allowed members with their own text tower, try nano")
        modules = ("transformer", "autoencoder", "text")
        unknown = [key for key in state if key.partition(".")[0] not in modules]
        if unknown:
            raise WeightsError(
                f"got weights {', '.join(unknown[:8])} in {folder}, allowed those of {', '.join(modules)}, try another"
            )
        return cls(
            spec=spec,
            transformer=build(lambda: Transformer(spec.transformer), part(state, "transformer")),
            autoencoder=build(lambda: Autoencoder(spec.autoencoder), part(state, "autoencoder")),
            reader=OwnTower(spec.name, build(lambda: TextTower(text), part(state, "text")), _tokenizer(folder, text)),
            content=content,
            device=device,
            dtype=dtype,
        )

    def read(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> TextStates:
        """Text states [1, L, C] of a prompt, on the device and in the dtype; see :class:`reading.Reader`."""
        return self.reader.read(prompt, prompt_t5=prompt_t5, text_length=text_length)

    def notes(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> list[str]:
        """What of a prompt does not reach the model, in sentences for the user."""
        return self.reader.notes(prompt, prompt_t5=prompt_t5, text_length=text_length)

    @torch.inference_mode()
    def encode(self, picture: Image.Image | Tensor) -> Tensor:
        """Normalised latent [1, C, h, w], float32 on the CPU, of an RGB picture, or of one as a tensor [1, 3, H, W]."""
        x = picture if isinstance(picture, Tensor) else pictures.to_tensor(picture)
        z: Tensor = self.autoencoder.encode(x.to(self.device))
        return z.cpu()

    @torch.inference_mode()
    def see(self, picture: Image.Image) -> Tensor:
        """Text tokens [1, L, C] of an RGB picture, which is squeezed into a square (official). Raises WeightsError
        where the model was loaded without what reads pictures."""
        if self.redux is None:
            raise WeightsError(f"got a picture to read for {self.spec.name}, loaded without Redux, try loading it with")
        square = picture.resize((self.redux.spec.side,) * 2, Image.Resampling.BICUBIC)
        tokens: Tensor = self.redux(pictures.to_tensor(square).to(self.device, self.redux.redux_up.weight.dtype))
        return tokens

    @torch.inference_mode()
    def decode(self, x_1LC: Tensor, hw: tuple[int, int]) -> Image.Image:
        """The RGB picture of packed latents. Raises Failure where they are not finite."""
        if not torch.isfinite(x_1LC).all():
            raise Failure("got numbers from the model that are not finite, allowed finite ones, try dtype float32")
        return pictures.to_picture(self.autoencoder.decode(shapes.unpack(x_1LC, *hw)))

    def velocity(self, x: Tensor, t: float, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """Velocities [B, L, C] in x's dtype, one a row, all rows in one forward pass."""
        return self.velocities((Evaluate(x, t, tuple(rows)),))[0]

    @torch.inference_mode()
    def velocities(
        self, asked: Sequence[Evaluate], together: tuple[ResolvedLora, ...] | None = None
    ) -> list[tuple[Tensor, ...]]:
        """What :meth:`velocity` answers to each of several evaluations of equal shape, in one forward pass of all.

        Each row is under its own LoRAs. ``together``: see :meth:`loras.Rack.hang`.
        """
        parts = [(event, row) for event in asked for row in event.rows]
        batch, length = asked[0].x.shape[:2]
        rows = tuple(row for _, row in parts)
        self.loras.hang([row.loras for row in rows for _ in range(batch)], together)
        img = torch.cat([event.x.to(self.dtype) for event, _ in parts])
        channels = [row.channels for row in rows if row.channels is not None]
        if channels:
            img = torch.cat((img, self._spread(channels, batch).to(self.dtype)), dim=-1)
        contexts = [row.context for row in rows if row.context is not None]
        if contexts:
            img = torch.cat((img, self._spread(contexts, batch).to(self.dtype)), dim=1)
        times = [event.t for event, _ in parts for _ in range(batch)]
        v = self.executor(img, times, self._given(rows, batch, length))
        answers = iter(torch.split(v[:, :length].to(asked[0].x.dtype), batch))
        return [tuple(islice(answers, len(event.rows))) for event in asked]

    def _given(self, rows: tuple[Row, ...], batch: int, targets: int) -> Given:
        """What rows say, for a whole batch; of the same rows, the same object as before."""
        key = (rows, batch, self.loras.hanging)
        given = self._lately.pop(key, None)
        if given is None:
            txt = self._spread([row.text.tokens for row in rows], batch)
            guidance = [row.guidance for row in rows for _ in range(batch) if row.guidance is not None]
            given = Given(
                txt=txt,
                txt_ids=shapes.text_ids(txt.shape[1]).to(self.device).expand(len(txt), -1, -1),
                img_ids=self._spread([row.ids[None] for row in rows], batch),
                pooled=self._spread([row.text.pooled for row in rows], batch),
                guidance=tuple(guidance) or None,
                targets=targets,
                times=tuple(dict.fromkeys(t for row in rows for t in row.times)),
                adapted=bool(self.loras.hanging),
            )
        self._lately[key] = given  # the last asked for comes last
        while len(self._lately) > _LATELY:
            del self._lately[next(iter(self._lately))]
        return given

    def _spread(self, tensors: list[Tensor], batch: int) -> Tensor:
        """[1, ...] of each row to [rows * B, ...], on the device."""
        return torch.cat([one.to(self.device).expand(batch, *one.shape[1:]) for one in tensors])

    def machine(self) -> dict[str, Any]:
        """Where and how this runtime computes, for receipts."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "executor": self.executor.name,
            **({"lossy": True} if self.executor.lossy else {}),
            "threads": torch.get_num_threads(),
            "processor": torch.cuda.get_device_name(self.device) if on_gpu else processor(),
            "system": system(),
        }


def _tokenizer(folder: Path, spec: TextSpec) -> Tokenizer:
    path = folder / VOCABULARY
    try:
        words = path.read_text("utf-8").splitlines()
        tokenizer = Tokenizer(words, spec.max_length)
    except (OSError, ValueError) as error:
        raise WeightsError(f"got no usable {path} ({error}), try fetching it anew") from error
    if len(words) != spec.vocab_size or len(set(words)) != spec.vocab_size:
        raise WeightsError(f"got {len(set(words))} different words in {path}, allowed {spec.vocab_size}, try another")
    return tokenizer


def device_named(name: str) -> torch.device:
    """The device of a name, or of ``auto``. Raises BadInput for what is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"got device {name!r}, allowed cpu, cuda or auto, try auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"got device {name!r}, allowed one of {torch.cuda.device_count()} GPUs here, try auto")
    return device


def dtype_named(name: str | None, device: torch.device) -> torch.dtype:
    """By name; None: float32 on a processor, bfloat16 on a GPU. Raises BadInput."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise BadInput(f"got dtype {name!r}, allowed {', '.join(DTYPES)}, try float32")
    return DTYPES[name]
