"""Offloading changes where weights lie, never a number, and undoing it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import photo
from tiny import VAE, randomise, shrink
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.clip import ClipText
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.specs import MODELS, ClipSpec, ModelSpec, T5Spec
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.transformer import Transformer
from fluxloom.errors import Failure
from fluxloom.infer.adapters import attach
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.plan import Plan
from fluxloom.infer.reading import pair_reader
from fluxloom.infer.request import Reference, Request
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.weigh import weigh
from fluxloom.speed import offload
from fluxloom.speed.fused import Fused, modulation_layers, modulations
from fluxloom.speed.linear8 import quantise
from fluxloom.speed.offload import Offloaded, Packed, Ring, Streamed
from fluxloom.speed.ops import ops_for
from fluxloom.weights.lora import Decomposed, Lora, LowRank, Part, Update, Weighted
from fluxloom.weights.vocabularies import bundled

CPU = torch.device("cpu")
CLIP = ClipSpec(width=20, layers=2, heads=2, mlp=24)
T5 = T5Spec(width=24, layers=3, heads=2, head_dim=12, mlp=32)
KONTEXT = MODELS["flux1-kontext-dev"]
SPEC: ModelSpec = replace(
    KONTEXT,
    transformer=replace(shrink(KONTEXT.transformer), depth=2, depth_single_blocks=3),
    autoencoder=VAE,
    pair=replace(KONTEXT.pair, clip=CLIP, t5=T5),
    text_length=12,
    min_side=16,
    preferred_sizes=((48, 32),),
)
BLOCKS = 5
ALL = frozenset({"towers", "autoencoder", "transformer", "redux"})


def make_runtime(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Runtime:
    """A whole toy of the 12 B members: their classes, at toy widths."""
    parts: list[Any] = [Transformer(SPEC.transformer), Autoencoder(VAE), ClipText(CLIP), T5Encoder(T5)]
    for seed, module in enumerate(parts):
        randomise(module, seed)
    reader = pair_reader(SPEC, parts[2], parts[3], (bundled("clip"), bundled("t5")))
    return Runtime(SPEC, parts[0], parts[1], reader, "toy", device, dtype)


@pytest.fixture
def runtime() -> Runtime:
    return make_runtime()


def plan(**facts: Any) -> Plan:
    plain: dict[str, Any] = {"stays": ALL, "streamed": (), "modulation": False, "layers": False, "tile": None}
    return Plan(model="toy", machine="here", linears=None, stages=(), host=0, **{**plain, **facts})


def fused(runtime: Runtime) -> Any:
    ops = ops_for(runtime.device)
    return lambda blocks: Fused(runtime.transformer, ops=ops, blocks=blocks, attend=_attend)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def edited(runtime: Runtime, prompt: str = "make it red") -> list[bytes]:
    """Two pictures of an edit under true CFG: every stage, and each of them more than once."""
    request = Request(
        prompt=prompt, references=(Reference(photo()),), width=48, height=32, steps=2, seed=3, n=2, true_cfg=2.0
    )
    return [result.image.tobytes() for result in Pipeline(runtime).run(request)]


def modules_of(runtime: Runtime) -> list[nn.Module]:
    return [runtime.transformer, runtime.autoencoder, runtime.reader.clip, runtime.reader.t5]  # type: ignore[attr-defined]


def facts_of(runtime: Runtime) -> list[Any]:
    """Everything that offloading touches: hooks, places and owners of weights, and their numbers."""
    out: list[Any] = [runtime.device, runtime.executor, runtime.autoencoder, vars(runtime.reader)["device"]]
    for module in modules_of(runtime):
        out += [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
        for name, tensor in module.state_dict().items():
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            out.append((name, tensor.device, whole, tensor.stride(), tensor.double().sum().item()))
    return out


# ------------------------------------------------------------------------------------------------ streaming


def some_layers(count: int) -> list[nn.Module]:
    return [randomise(nn.Linear(8, 8 + i), i) for i in range(count)]


@given(count=st.integers(1, 9), streamed=st.sets(st.integers(0, 8)), again=st.booleans(), passes=st.integers(1, 3))
@settings(max_examples=60)
def test_every_module_comes_with_its_own_weights(count: int, streamed: set[int], again: bool, passes: int) -> None:
    layers = some_layers(count)
    wanted = [layer.weight.clone() for layer in layers]  # type: ignore[operator]
    pieces = [Packed(layer.parameters(), CPU) if i in streamed else None for i, layer in enumerate(layers)]
    ring = Ring(CPU, max((piece.nbytes for piece in pieces if piece), default=0))
    lent = Streamed(layers, pieces, ring, again)
    slots = [(slot.data_ptr(), slot.data_ptr() + slot.nbytes) for slot in ring.slots]
    for _ in range(passes):
        for i, module in enumerate(lent):
            weight: Any = module.weight
            assert torch.equal(weight, wanted[i])
            assert any(first <= weight.data_ptr() < last for first, last in slots) == (pieces[i] is not None)
        for i, layer in enumerate(layers):  # between its turns each is at home, and right
            assert torch.equal(layer.weight, wanted[i])  # type: ignore[arg-type]
    order = len(lent.order)
    if order > 2:  # each is copied once a pass; at the end of the last, two of the next may be there, or still be
        assert (order - (not again)) * passes <= ring.copies <= order * passes + 2
    else:
        assert ring.copies == order


def test_the_next_is_copied_while_one_computes() -> None:
    layers = some_layers(5)
    pieces = [Packed(layer.parameters(), CPU) for layer in layers]
    ring = Ring(CPU, max(piece.nbytes for piece in pieces))
    for i, _ in enumerate(Streamed(layers, pieces, ring)):
        assert {pieces[i], pieces[(i + 1) % 5]} == set(ring.holds)


def test_a_broken_off_pass_costs_nothing_but_time() -> None:
    layers = some_layers(4)
    x = torch.ones(1, 8)
    wanted = [layer(x) for layer in layers]
    pieces = [Packed(layer.parameters(), CPU) for layer in layers]
    lent = Streamed(layers, pieces, Ring(CPU, max(piece.nbytes for piece in pieces)))
    end = lent.hook()
    with pytest.raises(RuntimeError):
        layers[2](torch.ones(1, 3))
    for i in (0, 3, 3, 1):
        assert torch.equal(layers[i](x), wanted[i])
    for module in lent:
        if module is layers[1]:
            break
    assert all(torch.equal(module(x), wanted[i]) for i, module in enumerate(layers))
    end()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_tensors_keep_their_form_in_a_flat_buffer() -> None:
    wide = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.tensor([1, -2], dtype=torch.int8), wide]
    tensors.append(torch.randn(4, 4).to(torch.float8_e4m3fn))
    before = [tensor.clone() for tensor in tensors]
    pack = Packed(tensors, CPU)
    buffer = torch.empty(pack.nbytes, dtype=torch.uint8).copy_(pack.home[: pack.nbytes])
    for place in (buffer, None):
        pack.point(place)
        for tensor, old in zip(tensors, before, strict=True):
            assert torch.equal(tensor.float(), old.float())
            assert (tensor.dtype, tensor.stride()) == (old.dtype, old.stride())
            start = (pack.home if place is None else place).data_ptr()
            assert (tensor.data_ptr() - start) % 256 == 0
    pack.restore()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


# ------------------------------------------------------------------------------------------------ whole plans


PLANS = {
    "all stays": {},
    "towers leave": {"stays": ALL - {"towers"}},
    "everything leaves": {"stays": frozenset()},
    "modulations wait": {"modulation": True},
    "all blocks stream": {"streamed": tuple(range(BLOCKS))},
    "some blocks stream": {"streamed": (0, 2, 3), "modulation": True},
    "T5 streams": {"stays": ALL - {"towers"}, "layers": True},
    "all of it": {"stays": frozenset(), "layers": True, "modulation": True, "streamed": (0, 1, 3, 4)},
}


@pytest.mark.parametrize("executor", ["plain", "fused"])
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_changes_no_pixel_and_is_undone(name: str, executor: str, runtime: Runtime) -> None:
    build = fused(runtime) if executor == "fused" else None
    if build is not None:
        runtime.executor = build(None)
    wanted, before = edited(runtime), facts_of(runtime)
    done = offload.apply(runtime, plan(**PLANS[name]), CPU, build)
    vars(runtime.reader)["_states"].clear()
    assert edited(runtime) == wanted
    vars(runtime.reader)["_states"].clear()
    assert edited(runtime) == wanted
    done.undo()
    assert facts_of(runtime) == before
    assert edited(runtime) == wanted
    done.undo()
    assert facts_of(runtime) == before


def test_parts_lie_on_the_device_for_their_stage_alone(runtime: Runtime) -> None:
    done = offload.apply(runtime, plan(stays=frozenset({"autoencoder"})), CPU, fused(runtime))
    assert set(done.parts) == {"towers", "transformer", "redux"}

    def here() -> set[str]:
        return {name for name, part in done.parts.items() if part.here}

    seen: list[set[str]] = []
    for module in (runtime.reader.t5, runtime.transformer.txt_in, runtime.autoencoder.decoder):  # type: ignore[attr-defined]
        module.register_forward_hook(lambda *_: seen.append(here()))
    assert here() == set()
    edited(runtime)
    reading, sampling, nothing = {"towers"}, {"transformer"}, set[str]()
    assert seen == [reading, reading, sampling, nothing, nothing]


def test_the_bytes_of_a_plan_are_those_that_move(runtime: Runtime) -> None:
    facts = plan(stays=frozenset(), modulation=True, streamed=(0, 4), layers=True)
    done = offload.apply(runtime, facts, CPU, fused(runtime))
    weights = weigh(SPEC, "float32", None)

    def aligned(pieces: list[Packed | None]) -> list[int]:
        return [sum(tensor.nbytes for tensor in piece.tensors) for piece in pieces if piece is not None]

    assert done.blocks is not None
    assert aligned(done.blocks.pieces) == [weights.blocks[i] for i in (0, 4)]
    assert done.ring is not None
    moving = [*aligned(done.blocks.pieces), *weights.modulations, *weights.layers]
    leaving = sum(aligned([pack for part in done.parts.values() for pack in part.packs]))
    whole = sum(tensor.nbytes for module in modules_of(runtime) for tensor in module.state_dict().values())
    assert leaving + sum(moving) == whole
    assert done.ring.slots[0].nbytes >= max(moving)
    assert [id(one) for one in modulation_layers(runtime.transformer)] == _called(runtime.transformer)


def _called(transformer: Transformer) -> list[int]:
    """The layers that the fused sequence computes modulations with, in its order."""
    found: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: found.append(id(module))) for module in transformer.modules()
    ]
    modulations(transformer, torch.zeros(1, transformer.spec.hidden_size))
    for hook in hooks:
        hook.remove()
    return found


def test_nano_streams_too() -> None:
    import fluxloom

    runtime = fluxloom.load("nano").pipeline.runtime
    request = Request(prompt="a red bicycle", width=64, height=64, steps=2, seed=1, true_cfg=1.0)
    runtime.executor = fused(runtime)(None)
    (wanted,) = Pipeline(runtime).run(request)
    facts = plan(stays=frozenset(), streamed=tuple(range(10)), modulation=True)
    done = offload.apply(runtime, facts, CPU, fused(runtime))
    (result,) = Pipeline(runtime).run(request)
    assert result.image.tobytes() == wanted.image.tobytes()
    assert done.ring is not None
    assert done.ring.copies >= 20


def test_codes_of_8_bits_stream(runtime: Runtime) -> None:
    quantise(runtime.transformer, "int8")
    runtime.executor = fused(runtime)(None)
    wanted = edited(runtime)
    facts = plan(stays=frozenset(), streamed=tuple(range(BLOCKS)), modulation=True)
    done = offload.apply(runtime, facts, CPU, fused(runtime))
    assert edited(runtime) == wanted
    assert done.blocks is not None
    assert {t.dtype for piece in done.blocks.pieces if piece for t in piece.tensors} == {torch.int8}
    moved = [sum(t.nbytes for t in piece.tensors) for piece in done.blocks.pieces if piece]
    assert moved == weigh(SPEC, "float32", "int8").blocks


def updates(runtime: Runtime) -> Weighted:
    """A LoRA on products and modulations of blocks, one of them decomposed by columns (DoRA), and on a norm."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    names = ("double_blocks.0.img_mod.lin", "double_blocks.1.txt_mlp.0", "single_blocks.2.linear2")
    for name in names:
        rows, columns = runtime.transformer.get_submodule(name).weight.shape  # type: ignore[union-attr, operator]
        a, b = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        change: Any = LowRank(a, b, 0.05)
        if name != names[1]:
            change = Decomposed(change, torch.rand(1, columns, generator=generator) + 0.5)
        found[f"{name}.weight"] = Update(f"{name}.weight", (rows, columns), (Part(0, rows, change),))
    return Weighted(Lora(found, SPEC.transformer, "own"))


@pytest.mark.parametrize("executor", ["plain", "fused"])
def test_loras_act_on_what_streams(executor: str, runtime: Runtime) -> None:
    build = fused(runtime) if executor == "fused" else None
    runtime.executor = build(None) if build else runtime.executor
    bare = edited(runtime)
    with attach(runtime.transformer, [updates(runtime)]):
        _forget(runtime)
        wanted = edited(runtime)
    assert wanted != bare
    facts = plan(stays=frozenset(), streamed=tuple(range(BLOCKS)), modulation=True)
    done = offload.apply(runtime, facts, CPU, build)
    with attach(runtime.transformer, [updates(runtime)]):
        lin = runtime.transformer.get_submodule("double_blocks.0.img_mod.lin")
        lent: list[bool] = []
        late = lin.register_forward_hook(lambda *_: lent.append(in_a_slot(done, lin.weight)))  # type: ignore[arg-type]
        assert edited(runtime) == wanted
        late.remove()
        assert lent
        assert all(lent)  # whoever hangs on a layer finds its weights where it computes
    _forget(runtime)
    assert edited(runtime) == bare
    done.undo()
    assert edited(runtime) == bare


def in_a_slot(done: Offloaded, tensor: Tensor) -> bool:
    assert done.ring is not None
    return any(0 <= tensor.data_ptr() - slot.data_ptr() < slot.nbytes for slot in done.ring.slots)


def _forget(runtime: Runtime) -> None:
    """What hangs beside a rack's knowledge needs a request of its own: nothing of the last one is used again."""
    runtime.executor = runtime.executor if not isinstance(runtime.executor, Fused) else fused(runtime)(None)
    vars(runtime)["_lately"].clear()


def test_redux_comes_to_see() -> None:
    spec = ReduxSpec(width=16, layers=1, heads=2, mlp=16, patch=14, side=56, out_dim=24)
    runtime = make_runtime()
    runtime.redux = randomise(Redux(spec), 7)  # type: ignore[assignment]
    wanted = runtime.see(photo())
    done = offload.apply(runtime, plan(stays=ALL - {"redux"}), CPU)
    assert torch.equal(runtime.see(photo()), wanted)
    assert done.parts["redux"].here
    runtime.encode(photo())
    assert not done.parts["redux"].here


def test_half_a_plan_is_none(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts_of(runtime)

    def no_room(*_: Any) -> Iterator[None]:
        raise Failure("got no room")

    monkeypatch.setattr(offload, "Ring", no_room)
    with pytest.raises(Failure):
        offload.apply(runtime, plan(stays=frozenset(), streamed=(1, 2)), CPU)
    assert facts_of(runtime) == before


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_on_a_gpu_no_pixel_changes_either(name: str) -> None:
    gpu = torch.device("cuda")
    resident = make_runtime(gpu, torch.bfloat16)
    resident.executor = fused(resident)(None)
    wanted = [edited(resident, prompt) for prompt in ("make it red", "make it snow")]
    runtime = make_runtime(CPU, torch.bfloat16)
    done = offload.apply(runtime, plan(**PLANS[name]), gpu, fused_on(runtime, gpu))
    assert [edited(runtime, prompt) for prompt in ("make it red", "make it snow")] == wanted
    done.undo()
    assert all(tensor.device == CPU for module in modules_of(runtime) for tensor in module.state_dict().values())


@pytest.mark.gpu
def test_a_cap_holds_pytorch_until_it_is_undone() -> None:
    gpu = torch.device("cuda")
    runtime = make_runtime(CPU, torch.bfloat16)
    done = offload.apply(runtime, replace(plan(stays=frozenset()), cap=2 * 10**9), gpu)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(3 * 10**9, dtype=torch.uint8, device=gpu)
    done.undo()
    torch.empty(3 * 10**9, dtype=torch.uint8, device=gpu)


def fused_on(runtime: Runtime, device: torch.device) -> Any:
    return lambda blocks: Fused(runtime.transformer, ops=ops_for(device), blocks=blocks, attend=_attend)


@pytest.mark.gpu
def test_no_slot_is_overwritten_while_it_is_used() -> None:
    gpu = torch.device("cuda")
    layers = [nn.Linear(4096, 4096, bias=False).requires_grad_(False) for _ in range(7)]
    for i, layer in enumerate(layers):
        layer.weight.fill_((i + 1) / 4096)
    pieces = [Packed(layer.parameters(), gpu) for layer in layers]
    ring = Ring(gpu, pieces[0].nbytes)
    x = torch.ones(8192, 4096, device=gpu)  # long enough that the copies would overtake
    sums = [module(x).mean() for _ in range(4) for module in Streamed(layers, pieces, ring)]
    assert torch.stack(sums).cpu().tolist() == pytest.approx([i + 1.0 for i in range(7)] * 4, rel=1e-3)
    for piece in pieces:
        piece.restore()
