"""Adapters that are members load like models: a base is found or named, and the adapter added to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_makers import MAKERS
from safetensors.torch import load_file, save_file
from tiny import DEV as TOY
from tiny import VAE, autoencoder, inputs, randomise, relative, transformer
from torch import Tensor, nn

from fluxloom.core.clip import ClipText
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.specs import MODELS, ClipSpec, T5Spec
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, WeightsError
from fluxloom.infer.assemble import assemble, content
from fluxloom.infer.runtime import Runtime
from fluxloom.weights.download import Hub
from fluxloom.weights.hub import resolve

DEV = replace(TOY, axes_dim=(4, 14, 14))  # as they follow from the heads, where no configuration says them
CANNY, REDUX = "flux1-canny-dev-lora", "flux1-redux-dev"
CLIP = ClipSpec(width=DEV.vec_in_dim, layers=1, heads=1, mlp=24)
T5 = T5Spec(width=DEV.context_in_dim, layers=1, heads=1, head_dim=64, mlp=32)
TOWER = ReduxSpec(width=72, layers=1, heads=1, mlp=24, patch=14, side=42, out_dim=T5.width)


def write(module: nn.Module | dict[str, Tensor], path: Path) -> Path:
    state = module.state_dict() if isinstance(module, nn.Module) else module
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def control_lora(path: Path, seed: int = 1) -> Path:
    """In its publisher's names: every layer, with biases, norm scales and a first layer of twice the channels."""
    return write(MAKERS["control"](DEV, seed).state, path)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy dev in the official layout."""
    folder = tmp_path_factory.mktemp("dev")
    write(transformer(DEV, 5), folder / "flux1-dev.safetensors")
    write(autoencoder(VAE, 6), folder / "ae.safetensors")
    write(randomise(ClipText(CLIP), 7), folder / "clip_l.safetensors")
    write(randomise(T5Encoder(T5), 8), folder / "t5xxl_fp16.safetensors")
    return folder


def load(reference: Path, hub: Hub, base: Path | str | None = None, variant: str | None = None) -> Runtime:
    located = resolve(reference, hub=hub, base=base, variant=variant)
    return assemble(located, torch.device("cpu"), torch.float32, variant)


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """No hub: an empty cache, and offline."""
    return Hub(cache=tmp_path / "hub", offline=True)


# ---------------------------------------------------------------------------------------------- control LoRAs


def by_definition(seed: int, strength: float) -> Transformer:
    """The base, its first layer widened, the makers' dense differences added, and norms exchanged."""
    made, wide = MAKERS["control"](DEV, seed), replace(DEV, in_channels=128)
    state = transformer(DEV, 5).state_dict()
    state["img_in.weight"] = nn.functional.pad(state["img_in.weight"], (0, 64))
    state = {name: tensor + strength * made.deltas.get(name, torch.zeros(())) for name, tensor in state.items()}
    twin = Transformer(wide).eval().requires_grad_(False)
    twin.load_state_dict({**state, **{name: made.state[name] for name in state if name in made.state}})
    return twin


def test_a_control_lora_is_merged_into_the_base_that_is_named(dev: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    path = control_lora(tmp_path / "mine" / f"{CANNY}.safetensors")
    runtime = load(path, hub, base=dev)
    assert (runtime.spec.name, runtime.spec.control, runtime.spec.lora) == (CANNY, "canny", 0.85)
    assert runtime.spec.transformer == runtime.transformer.spec == replace(DEV, in_channels=128)
    arguments = inputs(runtime.spec.transformer, 0)
    found = runtime.transformer(**arguments)
    assert relative(found, by_definition(1, 0.85)(**arguments)) < 1e-5
    assert relative(found, by_definition(1, 1.0)(**arguments)) > 1e-3
    for base in ("flux1-dev.safetensors", str(dev / "flux1-dev.safetensors")):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(dev)
            assert load(path.absolute(), hub, base=base).content == runtime.content


def test_a_receipt_s_content_names_base_and_adapter(dev: Path, hub: Hub, tmp_path: Path) -> None:
    alone = content(resolve(dev, hub=hub))
    found = []
    for seed in (1, 2):
        path = control_lora(tmp_path / f"{seed}-canny-dev-lora.safetensors", seed)
        found.append(content(resolve(path, hub=hub, base=dev, variant=CANNY)))
    assert [one.split("+")[0] for one in found] == [alone, alone]
    assert found[0] != found[1]


def test_the_base_may_lie_beside_it_or_in_a_collection(
    dev: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = control_lora(tmp_path / f"{CANNY}.safetensors")
    with pytest.raises(Exception, match=r"flux1-dev\.safetensors.*not in the cache"):
        load(path, hub)
    monkeypatch.setenv("FLUXLOOM_MODELS", str(dev))
    want = load(path, hub).content
    assert load(tmp_path, hub, variant=CANNY).content == want  # the folder of the file
    monkeypatch.delenv("FLUXLOOM_MODELS")
    for file in dev.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert load(path, hub).content == want
    assert load(tmp_path, hub, variant=CANNY).content == want  # which holds several
    with pytest.raises(BadInput, match="several files"):
        load(tmp_path, hub)


def test_which_control_lora_it_is_must_be_told(dev: Path, hub: Hub, tmp_path: Path) -> None:
    path = control_lora(tmp_path / "mine.safetensors")
    with pytest.raises(BadInput, match=r"flux1-canny-dev-lora, flux1-depth-dev-lora.*--variant"):
        load(path, hub, base=dev)
    assert load(path, hub, base=dev, variant="flux1-depth-dev-lora").spec.control == "depth"


def test_other_loras_are_no_models(dev: Path, hub: Hub, tmp_path: Path) -> None:
    path = write(MAKERS["kohya"](DEV, 1).state, tmp_path / "style.safetensors")
    for base in (dev, None):
        with pytest.raises(BadInput, match=r"no model by itself.*--lora"):
            load(path, hub, base=base)
    with pytest.raises(WeightsError, match=r"64 input channels.*allowed 128"):
        load(path, hub, base=dev, variant=CANNY)


def test_a_base_that_does_not_do_is_refused(dev: Path, hub: Hub, tmp_path: Path) -> None:
    path = control_lora(tmp_path / f"{CANNY}.safetensors")
    fill = tmp_path / "fill"
    fill.mkdir()
    for file in dev.iterdir():
        (fill / file.name).symlink_to(file)
    (fill / "flux1-dev.safetensors").unlink()
    write(transformer(replace(DEV, in_channels=384), 5), fill / "flux1-fill-dev.safetensors")
    with pytest.raises(BadInput, match=r"in_channels 384.*allowed in_channels 64.*try flux1-dev"):
        load(path, hub, base=fill)
    with pytest.raises(BadInput, match=r"got base nano, which is no transformer of FLUX.1, allowed a whole model"):
        load(path, hub, base="nano")
    with pytest.raises(BadInput, match="which is no adapter"):
        load(dev / "flux1-dev.safetensors", hub, base="flux1-schnell")
    with pytest.raises(BadInput, match="which is no adapter"):
        resolve("flux1-schnell", hub=hub, base=dev)
    narrow = write({**load_file(path), "single_blocks.0.linear1.lora_A.weight": torch.ones(4, 5)}, path)
    with pytest.raises(WeightsError, match="misshapen"):
        load(narrow, hub, base=dev)


# ---------------------------------------------------------------------------------------------- Redux


@pytest.fixture
def redux(tmp_path: Path) -> Path:
    """A toy adapter and its tower as single files, as collections keep them. Without a configuration the tower's heads
    and the pictures' side follow from its width and its patches."""
    module = randomise(Redux(TOWER), 9)
    state = module.state_dict()
    tower = {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
    for name in ("adapters", "clip_vision"):
        (tmp_path / name).mkdir()
    probe = {"vision_model.head.probe": torch.zeros(1, 1, TOWER.width), "logit_scale": torch.zeros(())}
    write({**tower, **probe}, tmp_path / "clip_vision" / "sigclip_vision_patch14_384.safetensors")
    adapter = {name: tensor for name, tensor in state.items() if name.startswith("redux_")}
    return write(adapter, tmp_path / "adapters" / f"{REDUX}.safetensors")


def test_redux_is_tower_and_adapter_beside_the_base(dev: Path, hub: Hub, redux: Path) -> None:
    runtime = load(redux, hub, base=dev)
    assert runtime.spec.name == REDUX
    assert runtime.redux is not None
    assert runtime.redux.spec == TOWER
    seen = torch.randn(1, 3, TOWER.side, TOWER.side)
    assert torch.equal(runtime.redux(seen), randomise(Redux(TOWER), 9)(seen))
    assert runtime.content.startswith(content(resolve(dev, hub=hub)) + "+sha256:")


def test_redux_without_its_tower_or_for_another_base_is_refused(
    dev: Path, hub: Hub, redux: Path, tmp_path: Path
) -> None:
    wide = randomise(Redux(replace(TOWER, out_dim=48)), 9).state_dict()
    adapter = {name: tensor for name, tensor in wide.items() if name.startswith("redux_")}
    other = write(adapter, redux.with_name("other.safetensors"))
    with pytest.raises(WeightsError, match="gives 48 numbers a word beside T5 with 24"):
        load(other, hub, base=dev)
    cut = write({**load_file(redux), "redux_up.weight": torch.ones(72, 71)}, redux.with_name("cut.safetensors"))
    with pytest.raises(WeightsError, match="reads 71 numbers and a tower of 1 heads that gives 72"):
        load(cut, hub, base=dev)
    (tmp_path / "clip_vision" / "sigclip_vision_patch14_384.safetensors").unlink()
    with pytest.raises(Exception, match="image encoder"):
        load(redux, hub, base=dev)


def test_the_official_towers_facts_follow_from_its_shapes(tmp_path: Path) -> None:
    from fluxloom.weights.adapted import redux_spec
    from fluxloom.weights.checkpoint import Checkpoint, Entry
    from fluxloom.weights.identify import identify

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Redux(ReduxSpec()).state_dict().items()}

    def opened(prefix: str) -> Checkpoint:
        names = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        names |= {"vision_model.head.probe": (1, 1, 1_152)} if prefix == "vision" else {}
        return Checkpoint(
            {n: Entry(shape, "bfloat16", 0, lambda: torch.zeros(0)) for n, shape in names.items()}, (), {}
        )

    tower, adapter = opened("vision"), opened("redux")
    spec = redux_spec((tower, identify(tower)[0]), (adapter, identify(adapter)[0]))
    assert spec == ReduxSpec()
    assert MODELS[REDUX].base == "flux1-dev"
