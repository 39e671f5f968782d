"""Control pictures: edges, or a depth map, of a picture whose layout is followed.

Each kind is a row of :data:`MAPS`; which one a model reads is ``ModelSpec.control``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxloom.errors import BadInput, Failure
from fluxloom.infer.pictures import to_tensor
from fluxloom.weights.load import digest

CANNY = (50, 200)  # thresholds of hysteresis, as in the official encoder
SUFFIX = ".onnx"
_SIDE = 518  # what depth models of the ViT/14 kind are run at where they leave it open
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which such models were normalised with


@dataclass(frozen=True)
class DepthModel:
    """A file that estimates depth, and what it hashes to."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> DepthModel:
        """Raises BadInput where there is no such file, or no .onnx file."""
        found = Path(path)
        if found.suffix.lower() != SUFFIX or not found.is_file():
            what = "which does not exist" if found.suffix.lower() == SUFFIX else f"which is no {SUFFIX} file"
            raise BadInput(f"got control_model {os.fspath(path)!r}, {what}, allowed a depth model as ONNX, try another")
        return cls(found, digest(found))

    def to_dict(self) -> dict[str, Any]:
        """As a receipt records it: no path, which is nobody else's business."""
        return {"file": self.path.name, "sha256": self.sha256}


def edges(picture: Image.Image, model: DepthModel | None = None) -> Tensor:
    """Canny's edges of an RGB picture: [1, 3, H, W], 1 on an edge and -1 elsewhere.

    On the values that the official encoder sees: it comes from [-1, 1] by cutting off, not by rounding, which
    lowers some by one.
    """
    assert model is None, "edges need no model; the request was checked"
    import cv2  # late: a tenth of a second, and wanted by nothing else here

    values = ((to_tensor(picture)[0] + 1) * 127.5).permute(1, 2, 0).to(torch.uint8).contiguous()
    found = torch.from_numpy(cv2.Canny(values.numpy(), *CANNY))
    return (found.float() / 127.5 - 1).expand(1, 3, -1, -1).contiguous()


def depth(picture: Image.Image, model: DepthModel | None = None) -> Tensor:
    """Estimated depth of an RGB picture: [1, 3, H, W] from -1 (far) to 1 (near).

    The estimate is resized as the official encoder does (bicubic, antialiased) and stretched over the whole range,
    since models differ in their units. Raises Failure where onnxruntime is missing or the model does not fit.
    """
    assert model is not None, "depth needs a model; the request was checked"
    found = _estimate(picture, model)
    map_ = F.interpolate(found[None, None], (picture.height, picture.width), mode="bicubic", antialias=True)
    low, high = map_.min(), map_.max()
    return (2 * (map_ - low) / (high - low).clamp_min(1e-6) - 1).expand(1, 3, -1, -1).contiguous()


Maker = Callable[[Image.Image, DepthModel | None], Tensor]

MAPS: Mapping[str, Maker] = MappingProxyType({"canny": edges, "depth": depth})
WITH_MODEL = frozenset({"depth"})  # kinds that a file has to be given for, unless the map itself is


def _estimate(picture: Image.Image, model: DepthModel) -> Tensor:
    """What the model says, [h, w] float32."""
    try:
        runtime = importlib.import_module("onnxruntime")  # late: large, and wanted by nothing else
    except ImportError as error:
        raise Failure(
            "got a picture to take depth from without onnxruntime, which runs depth models, allowed with it, "
            "try pip install onnxruntime, or a depth map with control_ready"
        ) from error
    name = model.path.name
    try:
        session = runtime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        _, _, height, width = (side if isinstance(side, int) else None for side in given.shape)
        seen = to_tensor(picture.resize((width or _SIDE, height or _SIDE), Image.Resampling.BICUBIC)) / 2 + 0.5
        values = (seen - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        out = np.asarray(session.run(None, {given.name: values.numpy()})[0], dtype=np.float32).squeeze()
    except Exception as error:  # its own kinds, and whatever a foreign file leads to
        raise Failure(
            f"got {name}, which cannot estimate depth here ({error}), allowed a depth model, try another"
        ) from error
    if out.ndim != 2 or not np.isfinite(out).all():
        raise Failure(f"got {name} answering with shape {out.shape}, allowed one finite map, try another depth model")
    return torch.from_numpy(out)
