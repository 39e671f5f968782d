"""What test_parallel.py runs in several processes: ``python ranks.py CASE``, in each of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from lora_makers import MAKERS
from pico import SPEC
from safetensors.torch import save_file
from tiny import DEV, relative, transformer
from torch import Tensor

from fluxloom.core.shapes import image_ids, text_ids
from fluxloom.core.transformer import Transformer
from fluxloom.infer.executor import Executor, Given, Plain
from fluxloom.infer.loras import Lora, Rack, resolve_loras
from fluxloom.speed import direct
from fluxloom.speed.attention import BACKENDS, Attend, backend_for
from fluxloom.speed.exchange import Exchange, shares
from fluxloom.speed.fused import Fused
from fluxloom.speed.graphs import Captured
from fluxloom.speed.ops import ops_for
from fluxloom.speed.parallel import Recorded, Spread
from fluxloom.speed.team import Team, join, together
from fluxloom.speed.twins import CODES

PLAIN = next(backend for backend in BACKENDS if backend.name == "torch")
TINY = replace(DEV, hidden_size=96, num_heads=6, axes_dim=(4, 6, 6))
TWELVE = replace(DEV, hidden_size=12 * 64, num_heads=12, axes_dim=(8, 28, 28))  # heads as wide as GPU kernels like


def exchange(team: Team) -> float:
    """Attention by exchange against attention of all tokens at once: batches, uneven shares, few queries."""
    worst = 0.0
    for batch, length, text in ((1, 8, 3), (2, 11, 4), (1, 13, 5), (3, 10, 4)):
        drawn = shares(length - text, team.size)
        tokens = tuple(map(sum, zip(shares(text, team.size), drawn, strict=True)))
        q, k, v = torch.randn(3, batch, length, 6, 4)
        own = slice(sum(tokens[: team.rank]), sum(tokens[: team.rank + 1]))
        attend = Exchange(PLAIN, team, tokens, drawn)
        wanted = PLAIN(q, k, v)[:, own]
        worst = max(worst, relative(attend(q[:, own], k[:, own], v[:, own]), wanted))
        last = slice(tokens[team.rank] - drawn[team.rank], None)
        worst = max(worst, relative(attend(q[:, own][:, last], k[:, own], v[:, own]), wanted[:, last]))
    return worst


class _OfCodes:
    """Attention that takes queries and keys in e4m3."""

    takes = CODES

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return PLAIN(q.float(), k.float(), v)


def rooms(team: Team) -> float:
    """The same of what was written where nothing need be copied: whole, for few queries, in e4m3, and with uneven
    shares; twice each, as the second time the places of the first may be used again."""
    worst = 0.0
    for (batch, attend, odd), made in product(
        ((1, PLAIN, 0), (2, PLAIN, 0), (2, _OfCodes(), 0), (2, PLAIN, 1)), (Exchange, direct.Direct)
    ):
        tokens = shares(5 * team.size + odd, team.size)
        exchange = made(attend, team, tokens, tuple(count - 2 for count in tokens))
        own = slice(sum(tokens[: team.rank]), sum(tokens[: team.rank + 1]))
        for _ in range(2):
            tensors = list(torch.randn(3, batch, sum(tokens), 6, 4))
            tensors = [x.to(exchange.takes or x.dtype) for x in tensors[:2]] + tensors[2:]
            wanted = attend(*tensors)
            places = exchange.room(tensors[2], 6, 4)
            for x, place in zip(tensors, places, strict=True):
                place.copy_(x[:, own].unflatten(2, (team.size, -1)))
            q, k, v = places
            worst = max(worst, relative(exchange(q, k, v), wanted[:, own]))
            worst = max(worst, relative(exchange(q[:, 2:], k, v), wanted[:, own][:, 2:]))
    return worst


def unseen(team: Team) -> list[object]:
    """One rank has no place for what the others are to see: all exchange otherwise, and rank 0 says why."""

    def full(nbytes: int) -> str:
        raise OSError("no space left on the disk")

    patch = pytest.MonkeyPatch()
    if team.rank == team.size - 1:
        patch.setattr(direct._Mapped, "offer", staticmethod(full))
    exchange = direct.Direct(PLAIN, team, (4,) * team.size, (3,) * team.size)
    q, k, v = torch.randn(3, 1, 4 * team.size, 6, 4)
    own = slice(4 * team.rank, 4 * (team.rank + 1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        places = exchange.room(v, 6, 4)
    for x, place in zip((q, k, v), places, strict=True):
        place.copy_(x[:, own].unflatten(2, (team.size, -1)))
    patch.undo()
    return [relative(exchange(*places), PLAIN(q, k, v)[:, own]), *(str(one.message) for one in said)]


def given(batch: int, text: int, seed: int, adapted: bool = False, rows: int = 7) -> tuple[Given, Tensor]:
    """``rows`` x 5 tokens to be drawn and a reference of 3 x 2, with what is given beside them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    ids = torch.cat((image_ids(2 * rows, 10), image_ids(6, 4, 1)))
    known = Given(
        txt=noise(text, TINY.context_in_dim),
        txt_ids=text_ids(text).expand(batch, -1, -1),
        img_ids=ids.expand(batch, -1, -1),
        pooled=noise(TINY.vec_in_dim),
        guidance=tuple(2.0 + k for k in range(batch)),
        targets=5 * rows,
        times=(1.0, 0.7),
        adapted=adapted,
    )
    return known, noise(5 * rows + 6, TINY.in_channels)


def spread_over(team: Team, model: Transformer, make: Callable[[Attend], Executor]) -> Spread:
    spec = replace(SPEC, transformer=model.spec)
    return Spread(team, Recorded(Rack(model, spec)), PLAIN, make)


def velocities(team: Team) -> float | None:
    """The executor of a team against core's own forward pass; two conditions in turn, batches, LoRAs."""
    model = transformer(TINY, 0)
    spread = spread_over(team, model, lambda attend: Fused(model, attend))
    if team.rank:
        return spread.serve()
    assert spread.name == f"{Fused(model).name} on {team.size} processes"
    plain, worst = Plain(transformer(TINY, 0)), 0.0
    one, two, even = given(1, 5, seed=1), given(2, 8, seed=2), given(2, 6, seed=3, rows=6)
    for (known, img), t in ((one, 1.0), (one, 0.7), (two, 0.5), (even, 0.7), (even, 0.3), (one, 0.2), (two, 0.2)):
        times = [t - 0.1 * k for k in range(len(img))]
        worst = max(worst, relative(spread(img, times, known), plain(img, times, known)[:, : known.targets]))
    spread.stop()
    return worst


def with_lora(team: Team, file: str) -> list[float] | None:
    """A LoRA hangs on all ranks for one member of a batch, for both, and comes off: three errors, then what it does."""
    model = transformer(TINY, 0)
    spread = spread_over(team, model, lambda attend: Fused(model, attend))
    if team.rank:
        return spread.serve()
    made = MAKERS["diffusers"](TINY, 1)
    save_file(made.state, file, {"format": "pt", **made.metadata})
    rack = Rack(transformer(TINY, 0), spread.rack.spec)
    plain, wanted, found = Plain(rack.transformer), resolve_loras([Lora(file, 0.8)], rack.spec), []
    for sets in ([wanted, ()], [wanted, wanted], [(), ()]):
        known, img = given(2, 8, seed=2, adapted=any(sets))
        rack.hang(sets)
        spread.rack.hang(sets)
        last = spread(img, [0.5, 0.2], known)
        found.append(relative(last, plain(img, [0.5, 0.2], known)[:, :35]))
        if len(found) == 2:
            acted = last
    spread.stop()
    return [*found, relative(acted, last)]


def on_gpus(team: Team, form: str, name: str = "auto") -> float | None:
    """The same on GPUs, with whatever attention and kernels there are; by copies and by NCCL."""
    dtype, home = getattr(torch, form), team.device
    model = transformer(TWELVE, 0).to(home, dtype)
    attend, worst = backend_for(torch.empty(0, device=home, dtype=dtype), TWELVE.head_dim, name), 0.0
    plain = Plain(transformer(TWELVE, 0).to(home))
    for team.near in (True, False):
        rack = Recorded(Rack(model, replace(SPEC, transformer=TWELVE)))
        spread = Spread(team, rack, attend, lambda exchange: Fused(model, exchange, ops_for(home)))
        if team.rank:
            spread.serve()
            continue
        for batch, t, rows in ((1, 1.0, 7), (2, 0.5, 7), (1, 1.0, 8), (2, 0.5, 8)):
            known, img = given(batch, 8, seed=2, rows=rows)
            exact = moved(known, home, torch.float32)
            want = plain(img.to(home), [t] * batch, exact)[:, : known.targets]
            got = spread(img.to(home, dtype), [t] * batch, moved(known, home, dtype))
            worst = max(worst, relative(got.float(), want))
        spread.stop()
    return None if team.rank else worst


def moved(known: Given, home: torch.device, dtype: torch.dtype) -> Given:
    """The same on a GPU; positions stay in float32."""
    return replace(
        known,
        txt=known.txt.to(home, dtype),
        pooled=known.pooled.to(home, dtype),
        txt_ids=known.txt_ids.to(home),
        img_ids=known.img_ids.to(home),
    )


def told(what: Callable[..., object], *given: object) -> str:
    """The error that is raised."""
    try:
        what(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


class _Broken:
    """An executor that fails on one rank."""

    name, lossy = "broken", False

    def __init__(self, inner: Executor, here: bool) -> None:
        self.inner, self.here = inner, here

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        if self.here and t[0] < 0.5:
            raise ValueError("no more memory here")
        return self.inner(img, t, given)


def failure(team: Team, rank: str) -> list[str] | None:
    """One rank fails in the middle; rank 0 says which, and why, and draws no more."""
    model = transformer(TINY, 0)
    spread = spread_over(team, model, lambda attend: _Broken(Fused(model, attend), team.rank == int(rank)))
    if team.rank:
        return spread.serve()
    known, img = given(1, 5, seed=1)
    spread(img, [0.6], known)
    return [told(spread, img, [t], known) for t in (0.4, 0.6)]


def early_failure(team: Team, rank: str) -> list[str] | None:
    """The same in the first pass of all, before any rank has seen another's memory."""
    model = transformer(TINY, 0)
    spread = spread_over(team, model, lambda attend: _Broken(Fused(model, attend), team.rank == int(rank)))
    if team.rank:
        return spread.serve()
    known, img = given(1, 6, seed=1, rows=6)
    return [told(spread, img, [0.4], known)]


def on_gpus_failure(team: Team, rank: str, how: str) -> list[str] | None:
    """The same with CUDA graphs that hold what waits for others: by copies, or by NCCL."""
    team.near = how == "direct"
    model = transformer(TWELVE, 0).to(team.device, torch.bfloat16)
    attend = backend_for(torch.empty(0, device=team.device, dtype=torch.bfloat16), TWELVE.head_dim)

    def make(exchange: Attend) -> Executor:
        return _Broken(Captured(Fused(model, exchange, ops_for(team.device))), team.rank == int(rank))

    spread = Spread(team, Recorded(Rack(model, replace(SPEC, transformer=TWELVE))), attend, make)
    if team.rank:
        return spread.serve()
    known, img = given(1, 8, seed=2)
    asked = moved(known, team.device, torch.bfloat16)
    img = img.to(team.device, torch.bfloat16)
    spread(img, [0.6], asked)
    return [told(spread, img, [t], asked) for t in (0.4, 0.6)]


def limits(team: Team) -> list[str] | None:
    """Too few tokens, and heads that do not divide, are refused before anything is sent."""
    model = transformer(TINY, 0)
    spread = spread_over(team, model, lambda attend: Fused(model, attend))
    if team.rank:
        return spread.serve()
    known, img = given(1, 1, seed=1)
    odd = transformer(replace(TINY, hidden_size=48, num_heads=3), 0)
    answers = [told(spread, img, [0.5], known), told(spread_over, team, odd, Plain)]
    spread.stop()
    return answers


def killed(team: Team) -> None:
    """The last rank vanishes while rank 0 waits for it."""
    if team.rank == team.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    team.hear()


CASES = {
    case.__name__: case
    for case in (
        exchange, rooms, unseen, velocities, with_lora, failure, early_failure, limits, killed,
        on_gpus, on_gpus_failure,
    )
}  # fmt: skip


def main(out: str, *cases: str) -> None:
    torch.set_num_threads(1)
    team, found = join(torch.device("cuda" if cases[0].startswith("on_gpus") else "cpu")), {}
    with together(team), torch.inference_mode():
        for case in cases:
            torch.manual_seed(0)
            name, *words = case.split("=")
            found[name] = CASES[name](team, *words)
    team.leave()
    Path(out, f"{team.rank}.json").write_text(json.dumps(found))
    sys.exit(3 if any(name.endswith("failure") for name in found) else 0)  # the launcher then waits for no one


if __name__ == "__main__":
    main(*sys.argv[1:])
