"""Weights that are not always on the device: parts that come for a stage and leave, pieces that stream through slots.

Carries out a :class:`fluxloom.infer.plan.Plan`, from outside: no module knows of it, and undoing it leaves no trace.
Weights never change while they are used, so that leaving copies nothing: the host keeps them, pinned where a GPU is to
copy them, and a module's tensors are pointed at the host, at a slot, or at a buffer of their own. Each copy runs beside
what computes. On a processor the same code runs, with copies of host memory to host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxloom.core.t5 import T5Encoder
from fluxloom.errors import Failure
from fluxloom.infer.executor import Executor, Given, Plain
from fluxloom.infer.plan import CONTEXT, Plan
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.weigh import is_modulation, streams
from fluxloom.speed.flat import starts
from fluxloom.speed.fused import modulation_layers
from fluxloom.speed.tiled import Tiled

_PAGE = 4096
_THREADS = 8  # that pack weights


class Packed:
    """Tensors in one flat buffer of host memory: their home, at which they point unless they are elsewhere."""

    @torch.inference_mode(False)  # what is pointed at outlives the pass
    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self.tensors = list(tensors)
        self.before = [tensor.device for tensor in self.tensors]
        *self.places, self.nbytes = starts(tensor.nbytes for tensor in self.tensors)
        self.home = _pages(self.nbytes)
        self._views: dict[int, list[Tensor]] = {}
        self._at_home = self.views(self.home)
        for tensor, view in zip(self.tensors, self._at_home, strict=True):
            view.copy_(tensor)  # before pages are pinned: threads get them side by side here, and one by one there
        self.pinned = device.type == "cuda" and _pin(self.home, device)
        for tensor, view in zip(self.tensors, self._at_home, strict=True):
            tensor.data = view

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as they lie in a buffer of at least ``nbytes`` bytes, with their strides."""
        out = []
        for tensor, place in zip(self.tensors, self.places, strict=True):
            flat = buffer[place : place + tensor.nbytes].view(tensor.dtype)
            out.append(flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride()))
        return out

    @torch.inference_mode(False)
    def point(self, buffer: Tensor | None) -> None:
        """Point the tensors into a buffer that holds them, or (None) home."""
        if buffer is None:
            views = self._at_home
        else:
            key = buffer.data_ptr()
            views = self._views.get(key) or self._views.setdefault(key, self.views(buffer))
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def forget(self) -> None:
        """Drop views of buffers, so that their memory can be given back."""
        self._views.clear()

    @torch.inference_mode(False)
    def restore(self) -> None:
        """Give each tensor memory of its own again, where it was before."""
        for tensor, view, device in zip(self.tensors, self._at_home, self.before, strict=True):
            tensor.data = view.to(device, copy=True)
        if self.pinned:
            torch.cuda.synchronize()  # copies from here may still be under way
            _cuda().cudaHostUnregister(self.home.data_ptr())
        self.tensors, self._at_home, self.pinned = [], [], False


def _pages(nbytes: int) -> Tensor:
    """Host memory that has its pages for itself, as two registered buffers may not share one."""
    whole = torch.empty(-(-nbytes // _PAGE) * _PAGE + _PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE
    return whole[start : start + -(-nbytes // _PAGE) * _PAGE]


def _pin(buffer: Tensor, device: torch.device) -> bool:
    """Let a GPU copy from a buffer by itself. By registering: PyTorch's own pinned buffers are rounded up to a power of
    two, which would make 17 GB of blocks 29."""
    with torch.cuda.device(device):
        failed = int(_cuda().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1))  # 1: for all contexts
    if failed:
        raise Failure(
            f"got no right to pin {buffer.nbytes / 1e9:.1f} GB of host memory, allowed as much as the weights that "
            "leave the GPU, try a larger --vram, or a machine with more memory"
        )
    return True


def _cuda() -> Any:
    return torch.cuda.cudart()


# ---------------------------------------------------------------------------------------------------- streaming


class Ring:
    """Slots of device memory, and the side stream that fills them while the main one computes.

    A slot is filled only after its last use is over, and used only after it is filled; both by events, the host waits
    for neither.
    """

    def __init__(self, device: torch.device, nbytes: int, slots: int = 2) -> None:
        self.device = device
        self.slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.holds: list[Packed | None] = [None] * slots
        self.busy = [False] * slots
        self.copies = 0
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.side is not None:
            self.filled = [torch.cuda.Event() for _ in range(slots)]
            self.over = [torch.cuda.Event() for _ in range(slots)]
            for event in self.over:
                event.record(torch.cuda.current_stream(device))

    def fetch(self, piece: Packed, wanted: Sequence[Packed]) -> int | None:
        """Begin to fill a slot with a piece, if it is not in one; returns the slot. Slots in use, and those that hold
        other wanted pieces, are left alone: None where there is no other."""
        if piece in self.holds:
            return self.holds.index(piece)
        free = [i for i, held in enumerate(self.holds) if not self.busy[i] and (held is None or held not in wanted)]
        if not free:
            return None
        slot = free[0]
        self.holds[slot] = piece
        self.copies += 1
        target = self.slots[slot][: piece.nbytes]
        if self.side is None:
            target.copy_(piece.home[: piece.nbytes])
            return slot
        self.side.wait_event(self.over[slot])
        with torch.cuda.stream(self.side):
            target.copy_(piece.home[: piece.nbytes], non_blocking=True)
        self.filled[slot].record(self.side)
        return slot

    def use(self, piece: Packed) -> None:
        """Point a piece's tensors at its slot; what is computed from here on waits until it is filled."""
        slot = self.fetch(piece, ())
        assert slot is not None, "more pieces in use at once than there are slots"
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.filled[slot])
        self.busy[slot] = True
        piece.point(self.slots[slot])

    def release(self, piece: Packed) -> None:
        """A piece's use is over, once what was asked for until now is computed."""
        piece.point(None)
        slot = self.holds.index(piece)
        self.busy[slot] = False
        if self.side is not None:
            self.over[slot].record(torch.cuda.current_stream(self.device))


class Streamed:
    """Modules of which some lend their weights through a ring, in the order in which they are used.

    Iterating yields all in order, each with its weights on the device; :meth:`hook` does the same for modules that are
    called. Those that come next are copied meanwhile. Another order costs time and nothing else.

    pieces  of each module what streams, or None where all of it is there
    again   whether the first follows the last, as in the next step
    """

    def __init__(
        self, modules: Sequence[nn.Module], pieces: Sequence[Packed | None], ring: Ring, again: bool = True
    ) -> None:
        self.modules, self.pieces, self.ring, self.again = list(modules), list(pieces), ring, again
        self.order = [i for i, piece in enumerate(pieces) if piece is not None]
        self.inside: int | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        for i, module in enumerate(self.modules):
            self.enter(i)
            try:
                yield module
            finally:
                self.leave(i)

    def enter(self, i: int) -> None:
        """Module i is about to compute."""
        if self.inside is not None:  # its pass was broken off
            self.leave(self.inside)
        piece = self.pieces[i]
        if piece is None:
            return
        self.inside = i
        self.ring.use(piece)
        self._ahead(i, len(self.ring.slots) - 1)

    def leave(self, i: int) -> None:
        """Module i has computed."""
        piece = self.pieces[i]
        if piece is None or self.inside != i:
            return
        self.inside = None
        self.ring.release(piece)
        self._ahead(i, len(self.ring.slots))

    def _ahead(self, i: int, count: int) -> None:
        """Copy the pieces that follow module i into the slots that are free."""
        at = self.order.index(i) + 1
        turn = self.order[at:] + (self.order[:at] if self.again else [])
        wanted = [piece for k in turn[:count] if (piece := self.pieces[k]) is not None]
        for piece in wanted:
            self.ring.fetch(piece, wanted)

    def hook(self) -> Callable[[], None]:
        """Enter and leave whenever a module is called; returns what ends that."""
        handles = []
        for i in self.order:
            module = self.modules[i]
            after = module.register_forward_hook(lambda *_, i=i: self.leave(i))

            def before(module: nn.Module, args: Any, i: int = i, after: Any = after) -> None:
                hooks = module._forward_hooks
                hooks[after.id] = hooks.pop(after.id)  # to the end: a LoRA's may ask for the weights once more
                self.enter(i)

            handles += [after, module.register_forward_pre_hook(before)]

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end


# ---------------------------------------------------------------------------------------------------- parts


class Leaving:
    """A part whose weights come to the device when it is asked for, and leave when another needs the room."""

    def __init__(self, packs: Sequence[Packed], device: torch.device) -> None:
        self.packs, self.device, self.here = list(packs), device, False

    @torch.inference_mode(False)
    def come(self) -> None:
        if self.here:
            return
        for pack in self.packs:
            buffer = torch.empty(pack.nbytes, dtype=torch.uint8, device=self.device)
            buffer.copy_(pack.home[: pack.nbytes], non_blocking=True)
            pack.point(buffer)
        self.here = True

    def leave(self) -> None:
        if not self.here:
            return
        for pack in self.packs:
            pack.point(None)
            pack.forget()
        self.here = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the driver gets it back: the next part comes in blocks of other sizes


class Offloaded:
    """A plan at work on a runtime, until :meth:`undo`.

    blocks  the transformer's blocks, lent in order; None: they are all there
    """

    def __init__(self, runtime: Runtime, plan: Plan, device: torch.device) -> None:
        self.runtime, self.plan, self.device = runtime, plan, device
        self.blocks: Streamed | None = None
        self.parts: dict[str, Leaving] = {}
        self._undo: list[Callable[[], object]] = []
        self._packs: list[Packed] = []
        self.ring: Ring | None = None

    def enter(self, part: str) -> None:
        """A part is about to compute: it comes, and the others that do not stay leave."""
        for name, other in self.parts.items():
            if name != part:
                other.leave()
        if part in self.parts:
            self.parts[part].come()

    def undo(self) -> None:
        """Put all weights back to where they were, and take everything off. Doing so twice is no mistake."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for part in self.parts.values():
            part.leave()
        while self._undo:
            self._undo.pop()()
        for pack in self._packs:
            pack.point(None)
            pack.forget()
            pack.restore()
        self._packs, self.parts, self.ring, self.blocks = [], {}, None, None

    # ------------------------------------------------------------------------------------------------ setting up

    def _pack(self, groups: Iterable[Iterable[Tensor]]) -> list[Packed]:
        """Each group in a buffer of its own; several at once, since one thread is slow to get and to pin its pages."""

        def packed(group: Iterable[Tensor]) -> Packed:
            pack = Packed(group, self.device)
            self._packs.append(pack)  # by itself: if another fails, this one is undone
            return pack

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(packed, groups))

    def _stream(self, modules: Sequence[nn.Module], chosen: Sequence[int], skip: Callable[[str], bool]) -> list[Any]:
        """What streams of each module, packed; None for those that are not chosen."""
        pieces: list[Packed | None] = [None] * len(modules)
        groups = [
            [t for name, t in _tensors(modules[i]).items() if streams(name, tuple(t.shape)) and not skip(name)]
            for i in chosen
        ]
        for i, piece in zip(chosen, self._pack(groups), strict=True):
            pieces[i] = piece
        return pieces

    def _place(self, name: str, modules: Sequence[nn.Module], streamed: set[int]) -> None:
        """Put a part, less what streams, where the plan wants it."""
        rest = [
            [tensor for tensor in group if id(tensor) not in streamed]
            for module in modules
            for group in _groups(module)
        ]
        if name not in self.plan.stays:
            self.parts[name] = Leaving(self._pack(filter(None, rest)), self.device)
            return
        for tensor in (tensor for tensors in rest for tensor in tensors):
            self._undo.append(partial(_move, tensor, tensor.device))
            _move(tensor, self.device)

    def _watch(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Let a part's stage begin whenever one of its modules is called."""
        for module in modules:
            handle = module.register_forward_pre_hook(lambda *_: self.enter(name))
            self._undo.append(handle.remove)


def apply(
    runtime: Runtime,
    plan: Plan,
    device: torch.device,
    executor: Callable[[Iterable[nn.Module] | None], Executor] | None = None,
) -> Offloaded:
    """Lay a runtime's weights out as a plan says, and let it compute on a device from now on.

    The runtime's weights may lie anywhere, best on the host; 8-bit linears are exchanged before. ``executor`` makes the
    executor from the blocks that are lent (None: they are all there); plain unless given, which computes modulations
    in every block, and so is slow where their weights wait on the host.

    Raises Failure where host memory cannot be pinned.
    """
    done = Offloaded(runtime, plan, device)
    try:
        _lay_out(done)
    except BaseException:
        done.undo()
        raise
    inner = Plain(runtime.transformer) if executor is None else executor(done.blocks)
    before = runtime.executor
    runtime.executor = _Staged(inner, done)
    done._undo.append(lambda: setattr(runtime, "executor", before))
    return done


class _Staged:
    """An executor whose transformer may have to come first."""

    def __init__(self, inner: Executor, offloaded: Offloaded) -> None:
        self.inner, self.offloaded = inner, offloaded
        self.name, self.lossy = inner.name, inner.lossy

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        self.offloaded.enter("transformer")
        return self.inner(img, t, given)


def _hold(done: Offloaded, cap: int) -> None:
    """Let PyTorch take no more than a cap leaves it: near it, what lies empty goes back before more is asked for."""
    with torch.cuda.device(done.device):  # what follows takes no device without a number
        number = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(number).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - CONTEXT) / total), number)
    done._undo.append(lambda: torch.cuda.set_per_process_memory_fraction(1.0, number))


def _lay_out(done: Offloaded) -> None:
    runtime, plan, device = done.runtime, done.plan, done.device
    if plan.cap is not None and device.type == "cuda":
        _hold(done, plan.cap)
    model = runtime.transformer
    towers = [part for part in vars(runtime.reader).values() if isinstance(part, nn.Module)]
    blocks = [*model.double_blocks, *model.single_blocks]
    of_blocks = done._stream(blocks, plan.streamed, is_modulation)
    lins = modulation_layers(model) if plan.modulation else []
    of_lins = done._stream(lins, range(len(lins)), lambda name: False)
    layers = _layers(towers) if plan.layers else []
    of_layers = done._stream(layers, range(len(layers)), lambda name: False)
    pieces = [piece for piece in (*of_blocks, *of_lins, *of_layers) if piece is not None]
    streamed = {id(tensor) for piece in pieces for tensor in piece.tensors}

    whole = runtime.autoencoder
    done._place("towers", towers, streamed)
    done._place("autoencoder", [whole], streamed)
    done._place("transformer", [model], streamed)
    done._place("redux", [runtime.redux] if runtime.redux is not None else [], streamed)
    done._watch("towers", towers)
    done._watch("autoencoder", [whole.encoder, whole.decoder])
    done._watch("redux", [runtime.redux] if runtime.redux is not None else [])
    if pieces:
        done.ring = ring = Ring(device, max(piece.nbytes for piece in pieces))
        for modules, own, again in ((blocks, of_blocks, True), (lins, of_lins, False), (layers, of_layers, False)):
            if any(piece is not None for piece in own):
                lent = Streamed(modules, own, ring, again)
                done._undo.append(lent.hook())
                if modules is blocks:
                    done.blocks = lent
    if plan.tile is not None:
        runtime.autoencoder = Tiled(whole)
        done._undo.append(lambda: setattr(runtime, "autoencoder", whole))
    owners: tuple[Any, Any] = (runtime, runtime.reader)
    for owner in owners:
        done._undo.append(partial(setattr, owner, "device", owner.device))
        owner.device = device


def _layers(towers: Iterable[nn.Module]) -> list[nn.Module]:
    """What of T5 can stream, in order."""
    t5 = next(tower for tower in towers if isinstance(tower, T5Encoder))
    return [t5.shared, *t5.encoder.block]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _groups(module: nn.Module) -> list[list[Tensor]]:
    """The tensors of a module in groups of the size of a layer: no buffer needs to be as large as all of it."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        return [list(_tensors(module).values())]
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [own, *(group for child in module.children() for group in _pieces(child))]


def _pieces(child: nn.Module) -> list[list[Tensor]]:
    if isinstance(child, nn.ModuleList):
        return [list(_tensors(one).values()) for one in child]
    return _groups(child)


@torch.inference_mode(False)
def _move(tensor: Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)
