"""Whether it is still the same face, or the same thing: pictures as unit vectors whose cosine tells."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from fluxloom.errors import BadInput, Failure
from fluxloom.infer.pictures import resize, to_tensor
from fluxloom.measure.recogniser import SIDE, Recogniser

Vector = NDArray[np.float32]
Points = NDArray[np.floating[Any]]
Detector = Callable[[NDArray[np.uint8]], Points | None]  # RGB [H, W, 3] to five points (x, y), or None: no face

FACE = 112  # pixels a side of an aligned face
# Where ArcFace models expect the eye on the left of the picture, the other eye, the tip of the nose, the corners of the
# mouth from left to right (Deng et al. 2019, arXiv:1801.07698; the template that its authors align with).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
_LEAST = 1.0  # cells of 256 that must claim a thing: on renders without it 95 of 100 have under 0.05 in all


class Identity(Protocol):
    """Who or what a picture shows."""

    def embed(self, picture: Image.Image) -> Vector | None:
        """A unit vector, or None where there is nobody."""


def similarity(identity: Identity, before: Image.Image, after: Image.Image) -> float | None:
    """Cosine between two pictures; None where the first shows nobody, 0 where only the second does not."""
    first = identity.embed(before)
    if first is None:
        return None
    second = identity.embed(after)
    return 0.0 if second is None else float(first @ second)


# ---------------------------------------------------------------------------------------------- faces


class FaceIdentity:
    """The largest face of a picture, by any ArcFace model as an ONNX file (AuraFace's glintr100.onnx, say): RGB
    [1, 3, 112, 112] in [-1, 1] to a vector, mostly of 512 numbers.

    detector  an ONNX file of OpenCV's FaceDetectorYN (YuNet), or a function that finds five points; without one, every
              picture is taken for an aligned face

    Raises BadInput for files that are none, Failure where onnxruntime is missing or a model does not fit.
    """

    def __init__(
        self, model: str | os.PathLike[str], detector: Detector | str | os.PathLike[str] | None = None
    ) -> None:
        path = _existing(model, "a face model")
        try:
            runtime = importlib.import_module("onnxruntime")  # late: large, and wanted by little else
        except ImportError as error:
            raise Failure(
                "got a face model without onnxruntime, which runs it, allowed with it, try pip install onnxruntime"
            ) from error
        try:
            self._session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # its own kinds, and whatever a foreign file leads to
            raise Failure(
                f"got {path.name}, which cannot be run ({error}), allowed a face model, try another"
            ) from error
        self._name = path.name
        self._detect = detector if detector is None or callable(detector) else yunet(detector)

    def embed(self, picture: Image.Image) -> Vector | None:
        pixels = np.array(picture.convert("RGB"))
        if self._detect is None:
            face = np.array(resize(picture.convert("RGB"), FACE, FACE))
        else:
            points = self._detect(pixels)
            if points is None:
                return None
            face = aligned(pixels, np.asarray(points, dtype=np.float64))
        values = (face.astype(np.float32) - 127.5) / 127.5
        try:
            (given,) = self._session.get_inputs()
            out = self._session.run(None, {given.name: values.transpose(2, 0, 1)[None]})[0]
        except Exception as error:
            raise Failure(
                f"got {self._name}, which cannot read a face ({error}), allowed a face model, try another"
            ) from error
        return self._unit(np.asarray(out, dtype=np.float32))

    def _unit(self, out: Vector) -> Vector:
        length = float(np.linalg.norm(out))
        if out.ndim != 2 or len(out) != 1 or not np.isfinite(length) or length == 0:
            raise Failure(
                f"got {self._name} answering with shape {out.shape}, allowed one finite vector, try another face model"
            )
        return np.asarray(out[0] / length)


def aligned(picture: NDArray[np.uint8], points: Points) -> NDArray[np.uint8]:
    """The face [112, 112, 3] whose five points lie where ArcFace wants them, as nearly as shift, turn and scale can."""
    if points.shape != TEMPLATE.shape or not np.isfinite(points).all():
        raise BadInput(f"got points {list(points.shape)}, allowed five finite (x, y), try another detector")
    # Least squares for (x', y') = (a x - b y + c, b x + a y + d): the similarity of Umeyama 1991 that never mirrors.
    x, y = points.T
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate((np.stack((x, -y, one, zero), 1), np.stack((y, x, zero, one), 1)))
    a, b, c, d = np.linalg.lstsq(rows, TEMPLATE.T.ravel(), rcond=None)[0]
    matrix = np.array([[a, -b, c], [b, a, d]])
    return np.asarray(cv2.warpAffine(picture, matrix, (FACE, FACE), flags=cv2.INTER_LINEAR), dtype=np.uint8)


def yunet(model: str | os.PathLike[str]) -> Detector:
    """A detector from an ONNX file of YuNet: the five points of the largest face, in the order of the template."""
    path = _existing(model, "a face detector")
    try:
        found = cv2.FaceDetectorYN.create(str(path), "", (320, 320))
    except cv2.error as error:
        raise Failure(
            f"got {path.name}, which OpenCV cannot read ({error.err}), allowed YuNet as ONNX, try another"
        ) from error

    def detect(picture: NDArray[np.uint8]) -> Points | None:
        found.setInputSize((picture.shape[1], picture.shape[0]))
        faces: Any = found.detect(np.ascontiguousarray(picture[..., ::-1]))[1]  # OpenCV's order: blue first
        if faces is None or not len(faces):
            return None
        largest = max(faces, key=lambda face: face[2] * face[3])  # left, top, width, height, five points, score
        return np.asarray(largest[4:14].reshape(5, 2))

    return detect


def _existing(model: str | os.PathLike[str], what: str) -> Path:
    path = Path(model)
    if not path.is_file():
        raise BadInput(f"got {os.fspath(model)!r}, which does not exist, allowed {what} as ONNX, try another path")
    return path


# ---------------------------------------------------------------------------------------------- the illustrated world


class WorldIdentity:
    """A thing of the illustrated world, by the recogniser's features averaged over the cells that claim it.

    concept  the thing that is followed; left out, the surest one of each picture, whichever that is

    What it says, on renders with ``concept`` given (medians of 40; 5th and 95th centile): 0.99 by night, 0.92
    [0.69, 0.97] for the same thing in another scene, 0.84 in another style of drawing, 0.82 in another colour; where
    another character stands in its place it is not found, and even its features are at 0.26 [0.13, 0.53].
    """

    def __init__(self, recogniser: Recogniser, concept: str | None = None) -> None:
        known = list(recogniser.concepts)
        if concept is not None and concept not in known:
            near = get_close_matches(concept, known, n=3, cutoff=0.3) or known[:3]
            raise BadInput(f"got concept {concept!r}, allowed {len(known)} of the recogniser, try {', '.join(near)}")
        self._recogniser = recogniser
        self._chosen = None if concept is None else known.index(concept)

    @torch.inference_mode()
    def embed(self, picture: Image.Image) -> Vector | None:
        network = self._recogniser.network
        x = to_tensor(resize(picture.convert("RGB"), SIDE, SIDE)).to(next(network.parameters()).device)
        features = network.body(x).flatten(2)[0].T  # [cells, C]
        claims = network.cells(features).float().softmax(-1)[:, : len(self._recogniser.concepts)]
        total = claims.sum(0)
        chosen = int(total.argmax()) if self._chosen is None else self._chosen
        if total[chosen] < _LEAST:
            return None
        mean = (claims[:, chosen, None] * features).sum(0) / total[chosen]
        return np.asarray(F.normalize(mean, dim=0).cpu().numpy(), dtype=np.float32)
