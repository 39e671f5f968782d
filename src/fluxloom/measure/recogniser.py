"""The independent recogniser: what a picture of the illustrated world shows, judged by a network of its own.

It knows the world only by the words on its card and never takes part in training nano. Of every concept it tells with
a calibrated probability whether the thing is *really, recognisably* there: it has been shown melted, shuffled and
blended things and learned to refuse them. What a sign says is spelled letter by letter, without a list of words.

Legend: B pictures, N concepts, C channels, H = W = 256 pixels, h = w = 16 cells, T columns of the reading strip.
The blocks are those of ConvNeXt (Liu et al. 2022, arXiv:2201.03545); letters are read by CTC (Graves et al. 2006).
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fluxloom.errors import BadInput, WeightsError
from fluxloom.infer.pictures import resize, to_tensor
from fluxloom.weights.load import ASSETS, build, load_folder, read_card, verified

SIDE = 256  # pixels; what it reads, whatever it is given
CELLS = 16
LETTERS = string.ascii_uppercase  # CTC's blank is class 0, so letter i is class i + 1
STRIP = (32, 160)  # pixels of the reading strip; a board is drawn at one scale, so letters are 15 pixels high
MARGIN = 1.18  # height of the strip over that of the board
HEADS = ("place", "time", "weather", "season", "style", "filter", "hue")
OWN = "own"  # the first of the colours: not repainted
NONE = "none"
FOLDER = ASSETS / "recogniser"


@dataclass(frozen=True)
class Seen:
    """One thing found in a picture; places and sizes are shares of the picture's side, or of its area."""

    concept: str
    p: float  # calibrated probability that this thing is really, recognisably there
    x: float
    y: float  # centre, from the left and from the top
    area: float
    colour: str | None  # the colour it was repainted to, or None: its own colours (its natural colour among them)
    colour_p: float


@dataclass(frozen=True)
class Guess:
    label: str  # "none" where the picture has none (time in space, weather under water)
    p: float


@dataclass(frozen=True)
class Reading:
    """What one picture shows."""

    things: tuple[Seen, ...]  # every concept with p at or above the card's threshold, surest first
    top: tuple[Seen, ...]  # the five surest, whatever their p
    place: Guess
    time: Guess
    weather: Guess
    season: Guess
    style: Guess
    filter: Guess
    hue: Guess
    sign: str  # the letters read; "" for no sign, or nothing legible
    sign_p: float  # calibrated probability that exactly this is written
    sign_board: float  # probability that there is a sign at all


@dataclass(frozen=True, kw_only=True)
class RecogniserSpec:
    """Sizes of the network, and how many labels each of its heads tells apart."""

    concepts: int
    colours: int
    heads: Mapping[str, int]
    widths: tuple[int, ...] = (48, 96, 176)  # at 64, 32 and 16 cells a side
    depths: tuple[int, ...] = (2, 3, 4)
    pooled: int = 96
    letters: int = 64


class Block(nn.Module):
    """ConvNeXt block: a wide look at each channel, then a mix of channels at each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.look(x).permute(0, 2, 3, 1)
        h = self.down(F.silu(self.up(self.norm(h))))
        out: Tensor = x + h.permute(0, 3, 1, 2)
        return out


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, h, w], in the precision of what comes in (autocast would widen it)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).to(x.dtype)


class Body(nn.Module):
    """Pictures [B, 3, 256, 256] to features [B, C, 16, 16]."""

    def __init__(self, spec: RecogniserSpec) -> None:
        super().__init__()
        first = spec.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first // 2, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1),
            ChannelNorm(first),
        )
        steps: list[nn.Module] = []
        for width, depth, wider in zip(spec.widths, spec.depths, (*spec.widths[1:], None), strict=True):
            steps += [Block(width) for _ in range(depth)]
            steps.append(ChannelNorm(width))
            if wider:
                steps.append(nn.Conv2d(width, wider, 2, stride=2))
        self.blocks = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.stem(x))
        return out


class Reader(nn.Module):
    """Strips [B, 3, 32, 160] to scores [B, T, 27] of the blank and the letters in each of T = 80 columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        plan = ((3, width // 2, 2), (width // 2, width, (2, 1)), (width, width, (2, 1)), (width, width, 1))
        layers: list[nn.Module] = []
        for before, after, stride in plan:
            layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), ChannelNorm(after), nn.SiLU()]
        self.look = nn.Sequential(*layers)
        self.column = nn.Linear(4 * width, 2 * width)
        self.around = nn.Conv1d(2 * width, 2 * width, 5, padding=2, groups=2 * width)
        self.out = nn.Linear(2 * width, 1 + len(LETTERS))

    def forward(self, strip: Tensor) -> Tensor:
        flat = strip.flatten(1)
        strip = (strip - flat.mean(1)[:, None, None, None]) / (flat.std(1)[:, None, None, None] + 0.05)
        h = self.column(self.look(strip).permute(0, 3, 1, 2).flatten(2))
        h = h + self.around(F.silu(h).transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.out(F.silu(h))
        return out


@dataclass(frozen=True)
class Scores:
    """What the network says of B pictures, as logits but for the box.

    Classes of a cell: the N concepts, then nothing, unclear, sign.
    """

    cells: Tensor  # [B, N + 3, 16, 16]
    presence: Tensor  # [B, N + 1]: every concept, then a sign
    colour: Tensor  # [B, N, colours], of the thing if it is there
    heads: dict[str, Tensor]  # [B, labels]
    box: Tensor  # [B, 4]: left, top, right, bottom of the sign's board, shares of the side


class Network(nn.Module):
    """A dense map of what lies where, and judgements that look at each thing as a whole.

    Whether a concept is there is read from the features averaged over the very cells that claim it, so that a whole
    can be refused whose parts look right.
    """

    def __init__(self, spec: RecogniserSpec) -> None:
        super().__init__()
        self.spec = spec
        width, n = spec.widths[-1], spec.concepts
        self.body = Body(spec)
        self.cells = nn.Linear(width, n + 3)
        self.whole = nn.Linear(width, spec.pooled)
        self.verdict = nn.Linear(spec.pooled, n + 1)
        self.trust = nn.Parameter(torch.ones(n + 1))
        self.shade = nn.Sequential(nn.Linear(width, spec.pooled), nn.SiLU(), nn.Linear(spec.pooled, spec.colours))
        self.around = nn.Sequential(nn.Linear(2 * width, spec.pooled), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(spec.pooled, count) for name, count in spec.heads.items()})
        self.edges = nn.Linear(width, 4)
        self.reader = Reader(spec.letters)

    def initialise(self) -> None:
        """First weights for training: every block begins near the identity, no thing is expected anywhere."""
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.trunc_normal_(module.down.weight, std=0.5 / math.sqrt(module.down.in_features) / 4)
        nn.init.zeros_(self.verdict.weight)
        nn.init.zeros_(self.verdict.bias)

    def forward(self, x: Tensor) -> Scores:
        """Pictures [B, 3, 256, 256] in [-1, 1]."""
        features = self.body(x)
        tokens = features.flatten(2).transpose(1, 2)  # [B, cells, C]
        cells = self.cells(tokens).float()
        shares = cells.softmax(-1)
        n = self.spec.concepts
        claimed = torch.cat((shares[..., :n], shares[..., -1:]), -1)  # [B, cells, N + 1]
        weight = (claimed / (claimed.sum(1, keepdim=True) + 1e-6)).detach()
        sure = (weight * claimed).sum(1)
        whole = torch.einsum("bln,blc->bnc", weight, F.silu(self.whole(tokens)).float())
        verdict = (whole * self.verdict.weight.float()).sum(-1) + self.verdict.bias.float()
        # A claim of one half on its cells is an open question; the verdict on the whole moves it either way.
        presence = verdict + self.trust * (torch.log(sure + 1e-4) - torch.log1p(1e-4 - sure.clamp(max=0.9999)))
        colour = torch.einsum("bln,blk->bnk", weight[..., :n], self.shade(tokens).float())
        around = self.around(torch.cat((tokens.mean(1), tokens.amax(1)), -1))
        return Scores(
            cells=cells.transpose(1, 2).unflatten(2, features.shape[2:]),
            presence=presence,
            colour=colour,
            heads={name: head(around).float() for name, head in self.heads.items()},
            box=self._box(tokens, weight[..., -1]),
        )

    def _box(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """[B, 4]: every cell of the sign guesses the board's edges from where it lies; their weighted mean."""
        middle = (torch.arange(CELLS, device=tokens.device) + 0.5) / CELLS
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        centre = torch.stack((x, y, x, y), -1).flatten(0, 1)
        edges: Tensor = self.edges(tokens).float() + centre
        return (weight[..., None] * edges).sum(1)  # no product of matrices, which autocast would make coarse

    def spell(self, x: Tensor, box: Tensor) -> Tensor:
        """Log probabilities [B, T, 27] of blank and letters along the boards [B, 4] of pictures x."""
        out: Tensor = self.reader(strips(x, box)).float().log_softmax(-1)
        return out


def strips(x: Tensor, box: Tensor) -> Tensor:
    """The boards [B, 4] of pictures as [B, 3, 32, 160]: centred, all at one height, mid-grey beyond their ends."""
    left, top, right, bottom = box.float().unbind(1)
    high = (bottom - top).clamp_min(0.02) * MARGIN
    wide = high * STRIP[1] / STRIP[0]
    v = ((torch.arange(STRIP[0], device=x.device) + 0.5) / STRIP[0] - 0.5)[None, :, None]
    u = ((torch.arange(STRIP[1], device=x.device) + 0.5) / STRIP[1] - 0.5)[None, None, :]
    gx = ((left + right) / 2)[:, None, None] + wide[:, None, None] * u
    gy = ((top + bottom) / 2)[:, None, None] + high[:, None, None] * v
    grid = torch.stack(torch.broadcast_tensors(gx, gy), -1) * 2 - 1
    cut = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (gx > left[:, None, None] - 0.01) & (gx < right[:, None, None] + 0.01)
    return cut * inside[:, None]


def spelled(scores: Tensor) -> list[tuple[str, float]]:
    """The most likely letters of log probabilities [B, T, 27], and the probability that they are the whole text."""
    out = []
    for columns in scores.float().cpu():
        best = [k for k, _ in groupby(columns.argmax(-1).tolist())]
        letters = [k for k in best if k]
        loss = F.ctc_loss(
            columns[:, None], torch.tensor([letters], dtype=torch.long).reshape(1, -1),
            torch.tensor([len(columns)]), torch.tensor([len(letters)]), reduction="sum",
        )  # fmt: skip
        out.append(("".join(LETTERS[k - 1] for k in letters), math.exp(-float(loss))))
    return out


def calibrated(logit: float, scale: float, shift: float) -> float:
    """A probability from a logit by the two numbers that were fitted on held-out pictures."""
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, scale * logit + shift))))


def logit_of(p: float) -> float:
    """Finite for 0 and 1, too."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


class Recogniser:
    """The recogniser with its weights, its words and its calibration."""

    def __init__(self, network: Network, card: Mapping[str, Any], content: str = "") -> None:
        self.network = network.eval()
        self.card = card
        self._content = content
        self.concepts: Sequence[str] = card["concepts"]
        self.colours: Sequence[str] = card["colours"]
        self.labels: Mapping[str, Sequence[str]] = card["heads"]
        self.threshold = float(card["threshold"])

    @classmethod
    def load(cls, folder: Path | None = None, device: str = "cpu") -> Recogniser:
        """The embedded recogniser, or that of a folder. Raises WeightsError where its files are missing or changed."""
        folder = FOLDER if folder is None else folder
        card = read_card(folder)
        content = verified(folder)
        missing = [
            key for key in ("concepts", "colours", "heads", "sizes", "calibration", "threshold") if key not in card
        ]
        if missing:
            raise WeightsError(f"got a card in {folder} without {', '.join(missing)}, allowed that of a recogniser")
        state = load_folder(folder)
        return cls(build(lambda: Network(spec_of(card)), state).to(device), card, content)

    @property
    def content(self) -> str:
        """``sha256:...`` of its files, for reports."""
        return self._content

    @torch.inference_mode()
    def read(self, pictures: Sequence[Image.Image]) -> list[Reading]:
        """What each picture shows. RGB of any size; anything but 256 x 256 is resized to it."""
        return [reading for some in _portions(pictures, 32) for reading in self._read(some)]

    def _read(self, batch: Sequence[Image.Image]) -> list[Reading]:
        device = next(self.network.parameters()).device
        x = torch.cat([to_tensor(_square(picture)) for picture in batch]).to(device)
        return self.judge(x)

    def judge(self, x: Tensor) -> list[Reading]:
        """The same for pictures [B, 3, 256, 256] in [-1, 1] on the network's device."""
        scores = self.network(x)
        letters = spelled(self.network.spell(x, scores.box))
        presence = scores.presence.cpu()
        claims = scores.cells.softmax(1)[:, : len(self.concepts)].cpu()
        colour = scores.colour.softmax(-1).cpu()
        guesses = {name: values.softmax(-1).cpu() for name, values in scores.heads.items()}
        out = []
        for i, (text, text_p) in enumerate(letters):
            p = [self._p("presence", float(logit)) for logit in presence[i]]
            order = sorted(range(len(self.concepts)), key=lambda k: -p[k])
            seen = [self._seen(k, p[k], claims[i, k], colour[i, k]) for k in order[: max(5, self._count(p))]]
            board = self._p("board", float(presence[i, -1]))
            heads = {name: self._guess(name, values[i]) for name, values in guesses.items()}
            legible = board >= 0.5 and text != ""
            out.append(
                Reading(
                    things=tuple(s for s in seen if s.p >= self.threshold),
                    top=tuple(seen[:5]),
                    sign=text if legible else "",
                    sign_p=self._p("sign", logit_of(text_p)) if legible else 0.0,
                    sign_board=board,
                    **heads,
                )
            )
        return out

    def _p(self, what: str, logit: float) -> float:
        scale, shift = self.card["calibration"][what]
        return calibrated(logit, scale, shift)

    def _count(self, p: Sequence[float]) -> int:
        return sum(value >= self.threshold for value in p[: len(self.concepts)])

    def _seen(self, k: int, p: float, claim: Tensor, colour: Tensor) -> Seen:
        mass = claim.sum() + 1e-9
        middle = (torch.arange(CELLS) + 0.5) / CELLS
        best = int(colour.argmax())
        name = self.colours[best]
        return Seen(
            concept=self.concepts[k],
            p=p,
            x=float((claim.sum(0) * middle).sum() / mass),
            y=float((claim.sum(1) * middle).sum() / mass),
            area=float(mass / CELLS**2),
            colour=None if name == OWN else name,
            colour_p=float(colour[best]),
        )

    def _guess(self, name: str, values: Tensor) -> Guess:
        best = int(values.argmax())
        return Guess(self.labels[name][best], float(values[best]))


def spec_of(card: Mapping[str, Any]) -> RecogniserSpec:
    """The sizes of the network that a card describes."""
    sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["sizes"].items()}
    heads = {name: len(labels) for name, labels in card["heads"].items()}
    return RecogniserSpec(concepts=len(card["concepts"]), colours=len(card["colours"]), heads=heads, **sizes)


def _square(picture: Image.Image) -> Image.Image:
    if not isinstance(picture, Image.Image):
        raise BadInput(f"got {type(picture).__name__} to read, allowed PIL pictures, try PIL.Image.open")
    return resize(picture.convert("RGB"), SIDE, SIDE)


def _portions(pictures: Sequence[Image.Image], size: int) -> list[Sequence[Image.Image]]:
    cuts = [*range(0, len(pictures), size), len(pictures)]
    return [pictures[a:b] for a, b in pairwise(cuts)]
