"""The illustrated world: openly licensed art in procedural scenes, with exact captions and exact edit pairs.

It is the data set of the embedded model and the ruler by which it is measured. A scene is plain frozen data; the
same scene gives the same pixels on every machine and, but for resolution, at every size.
"""

from __future__ import annotations

from fluxloom.world.atlas import RESERVED_STYLES, STYLES, Atlas, Concept, load_atlas
from fluxloom.world.captions import caption
from fluxloom.world.edits import EDIT_KINDS, Edit, EditPicture, render_edit, sample_edit
from fluxloom.world.mix import Mix, sample_scene
from fluxloom.world.render import Picture, render
from fluxloom.world.scene import Backdrop, Item, Scene, Sign
from fluxloom.world.split import heldout_reasons
from fluxloom.world.vocabulary import vocabulary_texts

__all__ = [
    "EDIT_KINDS", "RESERVED_STYLES", "STYLES", "Atlas", "Backdrop", "Concept", "Edit", "EditPicture", "Item", "Mix",
    "Picture", "Scene", "Sign", "caption", "heldout_reasons", "load_atlas", "render", "render_edit", "sample_edit",
    "sample_scene", "vocabulary_texts",
]  # fmt: skip
