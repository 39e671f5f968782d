"""Linear layers whose products are of 8 bits: e4m3 or int8 codes, a scale a row of the weight and a scale a token.

A product of codes is scaled once, after its sum over the input: sum_i (c_xi c_wi) s_x s_w. Tokens are quantised as they
come, by the kernel that makes them where it can (:data:`fluxloom.speed.twins.Low`). On Gaussian numbers the relative
error of the result is 3.7 % for e4m3 and 1.2 % for int8 (tests/speed/test_linear8.py). Real activations have outliers,
which cost int8 more: its codes are equally far apart.

fp8 runs through ``torch._scaled_mm`` with scales by row (Hopper, Ada and later), int8 through ``torch._int_mm`` (Turing
and later). On anything else the same numbers are computed from the codes in float32: for tests, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, Failure
from fluxloom.speed.ops import ops_for
from fluxloom.speed.twins import Low, stored

# Parts of names that stay as they are: what enters and leaves the model, and what steers it. Of 12 B they are 27 % of
# the weights, which are looked at once a request, and 0.03 % of the arithmetic of a step.
_ENDS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
KEEP = frozenset((*_ENDS, "img_mod", "txt_mod", "modulation"))
_CAPABLE = {"fp8": (8, 9), "int8": (7, 5)}  # compute capability from which a GPU multiplies such codes
_FEW = 17  # torch._int_mm takes no fewer rows


def capable(form: str, device: torch.device) -> bool:
    """Whether a GPU multiplies codes of this form, rather than having them turned into floats first."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABLE[form]


def supported(form: str, device: torch.device) -> tuple[str, str]:
    """The form to use on a device where one is asked for, and why it is another one, in a sentence, or nothing.

    Raises BadInput for an unknown form, and for a GPU that multiplies no codes at all.
    """
    stored(form)
    if device.type != "cuda" or capable(form, device):
        return form, ""
    name = torch.cuda.get_device_name(device)
    if capable("int8", device):
        return "int8", f"{name} multiplies no {form} numbers (compute capability 8.9 and later do): int8 was taken"
    raise BadInput(
        f"got linears {form!r} on {name}, allowed with compute capability 7.5 or later, try leaving them out"
    )


class Linear8(nn.Module):
    """A linear layer [.., I] -> [.., O] whose weight is codes [O, I] and float32 scales [O].

    form   a key of :data:`fluxloom.speed.twins.FORMS`
    dtype  of the output: that of the layer that this was made of, and whatever ``.to(dtype)`` says after; codes and
           scales keep theirs

    A layer of nn.Linear takes tensors; this one takes them too, and codes with scales [B, L, I], [B, L, 1].
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, form: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = form, dtype
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, form: str, device: torch.device | None = None) -> Linear8:
        """A layer in 8 bits, where it lies, computed on a ``device``; the original is left as it is.

        Raises BadInput for an unknown form, and Failure for weights that are not finite.
        """
        home = linear.weight.device
        codes, scale = (x.to(home) for x in _quantised(linear.weight.detach().to(device or home), form))
        if not torch.isfinite(scale).all():
            raise Failure("got weights that are not finite, allowed finite ones, try loading the model anew")
        bias = None if (own := getattr(linear, "bias", None)) is None else own.detach()
        return cls(codes, scale[:, 0].contiguous(), bias, form, linear.weight.dtype)

    def part(self, start: int, stop: int) -> Linear8:
        """The layer of some of the outputs alone, from the same memory."""
        rows = slice(start, stop)
        bias = None if self.bias is None else self.bias[rows]
        return Linear8(self.codes[rows], self.scale[rows], bias, self.form, self.dtype)

    def forward(self, x: Tensor | Low) -> Tensor:
        """Outputs [.., O]. Raises ValueError for codes of another form."""
        codes, scale = _quantised(x, self.form) if isinstance(x, Tensor) else x
        if codes.dtype != self.codes.dtype:
            raise ValueError(f"got codes {codes.dtype}, allowed {self.codes.dtype}, try quantised(x, {self.form!r})")
        flat, rows = codes.reshape(-1, self.in_features), scale.reshape(-1, 1)
        if not capable(self.form, flat.device) or self.in_features % 16 or self.out_features % 16:
            out = self._plain(flat, rows)
        elif self.form == "fp8":
            out = self._scaled_mm(flat, rows)
        else:
            out = self._int_mm(flat, rows)
        return out.view(*codes.shape[:-1], self.out_features)

    def _plain(self, codes: Tensor, rows: Tensor) -> Tensor:
        y = F.linear(codes.float(), self.codes.float()) * rows * self.scale
        return (y if self.bias is None else y + self.bias.float()).to(self.dtype)

    def _scaled_mm(self, codes: Tensor, rows: Tensor) -> Tensor:
        """Scales by row give bf16, and take a bias of bf16 along. The faster sums keep about 14 bits inside the tensor
        cores (DeepSeek-V3 report, 2024, section 3.3.2); a code has 4."""
        inside = self.bias if self.bias is not None and self.bias.dtype == torch.bfloat16 else None
        if rows.data_ptr() % 16:  # of tokens behind a text of odd length: cuBLAS takes no such scales (pytorch#159957)
            rows = rows.clone()
        y = torch._scaled_mm(
            codes,
            self.codes.t(),
            scale_a=rows,
            scale_b=self.scale[None],
            bias=inside,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        if self.bias is not None and inside is None:
            y = y + self.bias
        return y.to(self.dtype)

    def _int_mm(self, codes: Tensor, rows: Tensor) -> Tensor:
        few = len(codes) < _FEW
        sums = torch._int_mm(F.pad(codes, (0, 0, 0, _FEW - len(codes))) if few else codes, self.codes.t())
        ops = ops_for(codes.device)
        return cast(Tensor, ops.rescaled(sums[: len(codes)], rows, self.scale, self.bias, self.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8:
        """Where ``.to``, ``.cuda`` and the like come to: they move codes and scales, and convert neither."""

        def moved(tensor: Tensor) -> Tensor:
            there = fn(tensor)
            return there if tensor is self.bias or there.dtype == tensor.dtype else tensor.to(there.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, form={self.form}"


def quantise(
    transformer: Transformer, form: str, keep: Collection[str] = KEEP, device: torch.device | None = None
) -> int:
    """Rewrite the linear layers of a transformer in place, one by one, computing on a ``device``, by default theirs;
    returns how many. Loading anew undoes it.

    ``keep``: parts of names (of ``double_blocks.0.img_mod.lin`` there are four) that stay as they are. Raises BadInput
    for an unknown form, Failure where this was done before, or where something (a LoRA) hangs on a layer.
    """
    stored(form)
    if any(isinstance(module, Linear8) for module in transformer.modules()):
        raise Failure("got linear layers of 8 bits, allowed those of a model as loaded, try loading it anew")
    found = list(_linears(transformer, keep))
    if hung := next((name for name, _, layer in found if layer._forward_hooks or layer._forward_pre_hooks), None):
        raise Failure(f"got {hung} with a LoRA on it, allowed layers by themselves, try quantising before")
    for name, parent, layer in found:
        try:
            setattr(parent, name.rpartition(".")[2], Linear8.of(layer, form, device))
        except Failure as error:
            raise Failure(f"{name}: {error}") from None
    return len(found)


def _quantised(x: Tensor, form: str) -> Low:
    """Codes and scales of rows [.., I], by what computes best where they lie. Raises BadInput for an unknown form."""
    stored(form)
    codes, scale = cast(Low, ops_for(x.device).quantised(x.reshape(1, -1, x.shape[-1]), form))
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def _linears(transformer: Transformer, keep: Collection[str]) -> Iterator[tuple[str, nn.Module, nn.Linear]]:
    """Name, parent and layer of each that does not stay."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and not set(keep) & set(name.split(".")):
            yield name, transformer.get_submodule(name.rpartition(".")[0]), module
