"""The transformer exported to inference engines for processors, neither of which is a dependency: one fixed shape."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxloom.bench.subject import Step
from fluxloom.core.transformer import Transformer
from fluxloom.infer.executor import Given

_NAMES = ("img", "img_ids", "txt", "txt_ids", "t", "pooled", "guidance")


class _Forward(nn.Module):
    """Tensors in, one tensor out, by position: what exporters take."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.transformer(*inputs)
        return out


def _inputs(img: Tensor, t: Sequence[float], given: Given) -> tuple[Tensor, ...]:
    fixed = (img, given.img_ids, given.txt, given.txt_ids, torch.tensor(t), given.pooled)
    return fixed if given.guidance is None else (*fixed, torch.tensor(given.guidance))


def onnx(transformer: Transformer, step: Step) -> Callable[..., Tensor]:
    """Through ONNX, on ONNX Runtime's processor provider."""
    runtime = import_module("onnxruntime")
    inputs = _inputs(step.img, step.t, step.given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transformer.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            torch.onnx.export(
                _Forward(transformer), inputs, str(path), input_names=list(_NAMES[: len(inputs)]), dynamo=True,
                external_data=True, verbose=False,
            )  # fmt: skip
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def velocity(img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        arrays = [x.contiguous().numpy() for x in _inputs(img, t, given)]
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return velocity


def openvino(transformer: Transformer, step: Step) -> Callable[..., Tensor]:
    """Through OpenVINO, which computes in bfloat16 where the processor has it unless the step is float32."""
    ov = import_module("openvino")
    inputs = _inputs(step.img, step.t, step.given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(_Forward(transformer.float()), example_input=tuple(x.float() for x in inputs))
    precision = "f32" if step.img.dtype is torch.float32 else "bf16"
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model: Any = ov.Core().compile_model(converted, "CPU", config)

    def velocity(img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        arrays = [x.float().contiguous().numpy() for x in _inputs(img, t, given)]
        return torch.from_numpy(model(arrays)[0])

    return velocity


MAKERS: Mapping[str, Callable[[Transformer, Step], Callable[..., Tensor]]] = {"onnx": onnx, "openvino": openvino}
