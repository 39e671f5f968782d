"""LoRAs of a request: they act, add up, share a batch, leave no trace, are read once, and replay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_makers import MAKERS
from pico import SPEC, photo
from torch import Tensor

from fluxloom.api import load
from fluxloom.core.specs import MODELS, TransformerSpec
from fluxloom.errors import BadInput, ReceiptError, WeightsError
from fluxloom.infer import adapters
from fluxloom.infer import loras as module
from fluxloom.infer.loras import Lora, resolve_loras
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import Receipt
from fluxloom.infer.replay import replay
from fluxloom.infer.request import Reference, Request, Result, resolve
from fluxloom.infer.runtime import Runtime
from fluxloom.weights.lora import Lora as Updates
from fluxloom.weights.lora import LowRank, Part, Update, merge, tensor_shapes
from fluxloom.weights.lora_file import load_lora, save_lora
from fluxloom.weights.lora_write import write_lora

Make = Callable[..., Path]
NORM = "double_blocks.0.img_attn.norm.query_norm.scale"


def updates(spec: TransformerSpec, seed: int, rank: int = 2) -> Updates:
    """A random change of every matrix."""
    generator = torch.Generator().manual_seed(seed)

    def low_rank(rows: int, columns: int) -> LowRank:
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        return LowRank(a / columns**0.5, 0.3 * b)

    found = {
        name: Update(name, shape, (Part(0, shape[0], low_rank(*shape)),))
        for name, shape in tensor_shapes(spec).items()
        if len(shape) == 2
    }
    return Updates(found, spec, "made", keys=len(found))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(name: str = "style", seed: int = 1, spec: TransformerSpec = SPEC.transformer, **more: Tensor) -> Path:
        state = {**write_lora(updates(spec, seed), "official"), **more}
        return save_lora(state, tmp_path / f"{name}.safetensors", {"format": "pt"})

    return made


@pytest.fixture
def pipeline(folder: Path) -> Iterator[Pipeline]:
    """One of its own: what hangs on it must not be met by other tests."""
    found = Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.float32))
    yield found
    found.runtime.loras.clear()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in found.runtime.transformer.modules())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []

    def counted(path: Path, *rest: Any) -> Any:
        names.append(path.name)
        return load_lora(path, *rest)

    monkeypatch.setattr(module, "load_lora", counted)
    return names


def draw(pipeline: Pipeline, *loras: Any, **fields: Any) -> Result:
    return pipeline.run(Request(**{"prompt": "a red cat", "seed": 1, "loras": loras, **fields}))[0]


def bits(result: Result) -> bytes:
    return result.image.tobytes()


def apart(one: Result, other: Result) -> int:
    first, second = (np.asarray(result.image).astype(int) for result in (one, other))
    return int(np.abs(first - second).max())


# ---------------------------------------------------------------------------------------------- what they do


def test_a_picture_with_a_lora_is_that_of_merged_weights(pipeline: Pipeline, make: Make) -> None:
    path, plain = make(), draw(pipeline)
    tuned = draw(pipeline, Lora(path, 0.7))
    assert apart(tuned, plain) > 10
    assert bits(draw(pipeline)) == bits(plain)  # no trace
    undo = merge(pipeline.runtime.transformer, [load_lora(path, SPEC.transformer, 0.7)])
    assert apart(draw(pipeline), tuned) <= 1
    undo()


def test_two_at_once_are_the_merged_pair(pipeline: Pipeline, make: Make) -> None:
    first, second = make("first", 1), make("second", 2)
    both = draw(pipeline, Lora(first, 0.5), Lora(second, -0.4))
    pair = [load_lora(path, SPEC.transformer, weight) for path, weight in ((first, 0.5), (second, -0.4))]
    undo = merge(pipeline.runtime.transformer, pair)
    assert apart(draw(pipeline), both) <= 1
    undo()
    assert min(apart(both, draw(pipeline, Lora(path, 0.5))) for path in (first, second)) > 10


def test_a_path_stands_for_weight_one_and_zero_for_nothing(pipeline: Pipeline, make: Make) -> None:
    path = make()
    assert bits(draw(pipeline, path)) == bits(draw(pipeline, str(path))) == bits(draw(pipeline, Lora(path)))
    assert bits(draw(pipeline, Lora(path, 0))) == bits(draw(pipeline))
    with_others = draw(pipeline, loras=[Lora(path, 0.5), Lora(make("second", 2), 0)])
    assert bits(with_others) == bits(draw(pipeline, Lora(path, 0.5)))


def test_blocks_scale_the_weight_and_the_last_match_counts(pipeline: Pipeline, make: Make) -> None:
    path = make()
    nothing = draw(pipeline, Lora(path, 1, {"": 0.0}))
    assert bits(nothing) == bits(draw(pipeline))
    half = draw(pipeline, Lora(path, 1, {"": 0.5}))
    assert apart(half, draw(pipeline, Lora(path, 0.5))) <= 1
    single = draw(pipeline, Lora(path, 1, {"": 0, 1: 1.0}))
    assert bits(single) == bits(draw(pipeline, Lora(path, 1, {"": 0, r"single_blocks\.0": 1.0})))
    assert apart(single, nothing) > 5
    assert bits(draw(pipeline, Lora(path, 1, {1: 1.0, "": 0}))) == bits(nothing)
    # The same file twice is one LoRA each where the places differ.
    parts = draw(pipeline, Lora(path, 1, {"": 0, 1: 1.0}), Lora(path, 1, {1: 0}))
    assert apart(parts, draw(pipeline, path)) <= 1


def test_swapping_back_is_bit_exact(pipeline: Pipeline, make: Make) -> None:
    first, second = Lora(make("first", 1)), Lora(make("second", 2), 0.5)
    sets = [(first,), (), (second,), (first, second), (second, first), (first,)]
    once = [bits(draw(pipeline, *loras)) for loras in sets]
    again = [bits(draw(pipeline, *loras)) for loras in reversed(sets)]
    assert once == again[::-1]
    assert once[0] == once[-1]
    assert len(set(once[:4])) == 4


def test_edits_and_negative_prompts_are_under_them_too(pipeline: Pipeline, make: Make) -> None:
    path = make()
    asked = {"prompt": "make it blue", "references": (Reference(photo()),), "negative": "snow", "true_cfg": 3.0}
    tuned = draw(pipeline, path, **asked)
    assert apart(tuned, draw(pipeline, **asked)) > 10
    undo = merge(pipeline.runtime.transformer, [load_lora(path, SPEC.transformer)])
    assert apart(draw(pipeline, **asked), tuned) <= 1  # both rows of it
    undo()


def test_nano(tmp_path: Path, make: Make) -> None:
    pipeline = load("nano").pipeline
    path = make("nano", 1, pipeline.runtime.spec.transformer)
    asked: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "true_cfg": 1.0}
    plain, tuned = draw(pipeline, **asked), draw(pipeline, Lora(path, 0.3), **asked)
    assert apart(tuned, plain) > 5
    assert bits(draw(pipeline, **asked)) == bits(plain)
    assert replay(pipeline, tuned.save(tmp_path / "a.png")).verdict == "bit-exact"
    undo = merge(pipeline.runtime.transformer, [load_lora(path, pipeline.runtime.spec.transformer, 0.3)])
    assert apart(draw(pipeline, **asked), tuned) <= 1
    undo()


def test_in_16_bits(folder: Path, make: Make) -> None:
    half = Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.bfloat16))
    plain = draw(half)
    assert apart(draw(half, make()), plain) > 10
    assert bits(draw(half)) == bits(plain)


# ---------------------------------------------------------------------------------------------- batches


@pytest.fixture
def forwards(pipeline: Pipeline) -> Iterator[list[int]]:
    """Batch sizes of every pass through the transformer."""
    sizes: list[int] = []
    hook = pipeline.runtime.transformer.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    yield sizes
    hook.remove()


def test_a_batch_with_loras_of_each_is_each_alone(pipeline: Pipeline, make: Make, forwards: list[int]) -> None:
    first, second = make("first", 1), make("second", 2)
    sets = [(), (first,), (Lora(second, 0.4),), (Lora(first, 0.5), second), (second, Lora(first, 0.5))]
    requests = [Request(prompt="a cat", seed=7, loras=loras) for loras in sets]
    alone = [pipeline.run(request)[0] for request in requests]
    forwards.clear()
    together = [results[0] for results in pipeline.run_many(requests, len(sets))]
    assert forwards == [2 * len(sets)] * 3  # they share every pass
    assert max(apart(*pair) for pair in zip(alone, together, strict=True)) <= 2
    assert min(apart(alone[i], alone[j]) for i in range(4) for j in range(i)) > 10
    forwards.clear()
    assert bits(pipeline.run(requests[0])[0]) == bits(alone[0])
    for request, one in zip(requests, pipeline.run_many(requests, 1), strict=True):
        assert bits(one[0]) == bits(pipeline.run(request)[0])


def test_a_batch_under_the_same_loras_has_no_shares(pipeline: Pipeline, make: Make) -> None:
    path = make()
    requests = [Request(prompt=prompt, seed=1, loras=(path,)) for prompt in ("a cat", "a dog")]
    list(pipeline.run_many(requests, 2))
    attached = pipeline.runtime.loras._attached
    assert attached is not None
    assert attached.shares is None
    list(pipeline.run_many([*requests, Request(prompt="a cat", seed=1)], 3))
    shares = pipeline.runtime.loras._attached.shares  # type: ignore[union-attr]
    assert shares is not None
    assert shares.flatten().tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # two rows each


def test_sizes_mixed_in_a_batch_cost_no_swapping(
    pipeline: Pipeline, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def attach(transformer: Any, found: Any) -> Any:
        counted.append(len(found))
        return module_attach(transformer, found)

    module_attach = module.attach
    monkeypatch.setattr(module, "attach", attach)
    first, second = make("first", 1), make("second", 2)
    requests = [
        Request(prompt="a cat", seed=1, loras=(first,)),
        Request(prompt="a cat", seed=1, loras=(second,), width=48),
        Request(prompt="a cat", seed=1),
    ]
    together = [results[0] for results in pipeline.run_many(requests, 3)]
    assert counted == [2]
    assert max(apart(one, pipeline.run(request)[0]) for one, request in zip(together, requests, strict=True)) <= 2
    counted.clear()
    for _ in range(3):
        draw(pipeline, first)
    assert counted == [1]


def test_who_exchanges_norms_has_passes_of_its_own(pipeline: Pipeline, make: Make, forwards: list[int]) -> None:
    scale, before = torch.full((16,), 3.0), pipeline.runtime.transformer.get_parameter(NORM).clone()
    norms = make("norms", 3, **{f"diffusion_model.{NORM}": scale})
    other = make("other", 2)
    sets = [(norms,), (other,), (), (norms,), (norms, other)]
    requests = [Request(prompt="a cat", seed=7 + k, loras=loras) for k, loras in enumerate(sets)]
    alone = [pipeline.run(request)[0] for request in requests]
    forwards.clear()
    together = [results[0] for results in pipeline.run_many(requests, 5)]
    assert forwards == [4] * 3 + [4] * 3 + [2] * 3  # those with norms, those without, and the pair
    assert max(apart(*pair) for pair in zip(alone, together, strict=True)) <= 2
    draw(pipeline)
    assert torch.equal(pipeline.runtime.transformer.get_parameter(NORM), before)
    assert float((before - scale).abs().min()) > 0.1


# ---------------------------------------------------------------------------------------------- files


def test_a_file_is_read_once_and_again_when_it_has_changed(
    pipeline: Pipeline, make: Make, reads: list[str], tmp_path: Path
) -> None:
    path, second = make("first", 1), make("second", 2)
    one = draw(pipeline, path)
    draw(pipeline)
    draw(pipeline, Lora(path, 0.5, {"single": 0}), second)
    shutil.copyfile(path, tmp_path / "copy.safetensors")
    assert bits(draw(pipeline, tmp_path / "copy.safetensors")) == bits(one)
    assert reads == ["first.safetensors", "second.safetensors"]
    make("first", 3)
    assert apart(draw(pipeline, path), one) > 10
    assert reads[2:] == ["first.safetensors"]


def test_what_was_resolved_needs_its_file_no_longer(pipeline: Pipeline, make: Make) -> None:
    path = make()
    first = draw(pipeline, path)
    events = pipeline.stream(Request(prompt="a red cat", seed=1, loras=(path,)))
    path.unlink()
    *_, last = events
    assert isinstance(last, Result)
    assert bits(last) == bits(first)


def test_few_are_kept(pipeline: Pipeline, make: Make, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LORAS", 2)
    paths = [make(str(k), k) for k in range(3)]
    for k in (0, 1, 0, 2, 0, 1):
        draw(pipeline, paths[k])
    assert reads == [f"{k}.safetensors" for k in (0, 1, 2, 1)]


def test_folders_of_peft_count_with_their_configuration(pipeline: Pipeline, make: Make, tmp_path: Path) -> None:
    folders = []
    for alpha in (2, 8):
        folder = tmp_path / f"alpha {alpha}"
        folder.mkdir()
        path = "transformer.transformer_blocks.0.attn.to_out.0"
        state = {f"{path}.lora_A.weight": torch.ones(2, 32), f"{path}.lora_B.weight": torch.ones(32, 2)}
        save_lora(state, folder / "adapter_model.safetensors", {})
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
        folders.append(folder)
    weak, strong = (draw(pipeline, folder) for folder in folders)
    assert apart(weak, strong) > 1
    (entry,) = strong.receipt.data["request"]["loras"]
    assert entry["file"] == "alpha 8"
    assert entry["config"] != weak.receipt.data["request"]["loras"][0]["config"]
    assert replay(pipeline, strong.save(tmp_path / "a.png")).verdict == "bit-exact"
    (folders[1] / "adapter_config.json").unlink()
    with pytest.raises(ReceiptError, match="LoRA alpha 8"):
        replay(pipeline, tmp_path / "a.png")


def test_updates_of_text_encoders_are_told_of(pipeline: Pipeline, make: Make) -> None:
    more = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}
    result = draw(pipeline, make("told", 1, **more))
    total = 3 * len(updates(SPEC.transformer, 1).updates) + 1  # two factors and alpha
    assert result.warnings == (
        f"1 of {total} tensors of LoRA told.safetensors are for text encoders, to which LoRAs are not applied",
    )
    assert draw(pipeline).warnings == ()


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda path: str(path), "got str as loras, allowed a list of LoRAs, try"),
        (lambda path: Lora(path), "got Lora as loras"),
        (lambda path: (3,), "got int as a LoRA, allowed a path or a Lora, try"),
        (lambda path: (Lora(3),), "got Lora as a LoRA"),  # type: ignore[arg-type]
        (lambda path: (path,) * 17, "got 17 LoRAs, allowed 16, try"),
        (lambda path: (path, Lora(path, 0.5)), "got LoRA style.safetensors twice, allowed once, try"),
        (lambda path: (Lora(path, 100.5),), "got LoRA weight 100.5, allowed -100 to 100, try 100"),
        (lambda path: (Lora(path, -1e9),), "allowed -100 to 100, try -100"),
        (lambda path: (Lora(path, float("nan")),), "got LoRA weight nan"),
        (lambda path: (Lora(path, "1"),), "got LoRA weight '1', allowed a number"),  # type: ignore[arg-type]
        (lambda path: (Lora(path, 1, {2: 1.0}),), "got block '2' of a LoRA, allowed numbers 0 to 1 and"),
        (lambda path: (Lora(path, 1, {True: 1.0}),), "got block 'True'"),
        (lambda path: (Lora(path, 1, {"doble": 1.0}),), "got block 'doble'"),
        (lambda path: (Lora(path, 1, {"(": 1.0}),), r"got block '\('"),
        (lambda path: (Lora(path, 1, {"a*" * 101: 1.0}),), "got block 'a"),
        (lambda path: (Lora(path, 1, {"single": 101}),), "got LoRA weight 101, allowed -100 to 100"),
        (lambda path: (Lora(path, 1, [1.0]),), "got list as blocks of a LoRA, allowed a mapping"),  # type: ignore[arg-type]
        (lambda path: (path.parent / "none.safetensors",), "none.safetensors', which is not there, allowed"),
        (lambda path: (path.parent,), "a folder without a LoRA"),
    ],
)
def test_refused_when_asked_for(given: Callable[[Path], Any], message: str, make: Make) -> None:
    with pytest.raises(BadInput, match=message):
        resolve(Request(prompt="a cat", loras=given(make())), SPEC)


def test_limits_themselves_are_allowed(make: Make) -> None:
    paths = [Lora(make(str(k), k), -100, {0: 100, "single": -100}) for k in range(16)]
    assert len(resolve_loras(paths, SPEC)) == 16


def test_files_that_do_not_fit_are_refused_before_the_first_step(pipeline: Pipeline, make: Make) -> None:
    zero = {key: torch.zeros_like(t) for key, t in write_lora(updates(SPEC.transformer, 1), "official").items()}
    path = make()
    empty = save_lora(zero, path.parent / "zero.safetensors", {})
    foreign = make("foreign", 1, replace(SPEC.transformer, hidden_size=48, axes_dim=(8, 8, 8)))
    no_lora = save_lora({"a": torch.ones(1)}, path.parent / "none.safetensors", {})
    cut = path.parent / "cut.safetensors"
    cut.write_bytes(b"\x08\0\0\0\0\0\0\0{")
    control = save_lora(MAKERS["control"](SPEC.transformer, 1).state, path.parent / "control.safetensors", {})
    bad = {
        empty: "got LoRA zero.safetensors: .* without effect",
        foreign: "got LoRA foreign.safetensors: .* misshapen tensors",
        no_lora: "got LoRA none.safetensors: no tensor of a LoRA for FLUX.1",
        cut: "got LoRA cut.safetensors",
        control: r"control.safetensors, which takes 128 input channels .* try flux1-canny-dev-lora or",
    }
    for file, message in bad.items():
        request = Request(prompt="a cat", seed=1, loras=(path, file))
        for ask in (pipeline.stream, lambda request: pipeline.run_many([request], 2)):
            with pytest.raises((WeightsError, BadInput), match=message):
                ask(request)
    assert MODELS["flux1-canny-dev-lora"].lora is not None
    assert bits(draw(pipeline, path)) != bits(draw(pipeline))


def test_a_failure_on_the_way_leaves_nothing_hanging(
    pipeline: Pipeline, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, path = draw(pipeline), make()
    hang, hung = adapters._Layer.hang, []

    def fails(self: Any) -> None:
        if len(hung) == 3:
            raise MemoryError
        hung.append(hang(self))

    with monkeypatch.context() as patch:
        patch.setattr(adapters._Layer, "hang", fails)
        with pytest.raises(MemoryError):
            draw(pipeline, path)
    assert bits(draw(pipeline)) == bits(plain)
    assert apart(draw(pipeline, path), plain) > 10


# ---------------------------------------------------------------------------------------------- receipts


def forged(result: Result, change: Callable[[dict[str, Any]], None]) -> Result:
    data = json.loads(json.dumps(result.receipt.data))
    change(data)
    return Result(result.image, Receipt(data))


def test_receipts_tell_of_them_and_replay_finds_them(pipeline: Pipeline, make: Make, tmp_path: Path) -> None:
    first, second = make("first", 1), make("second", 2)
    result = draw(pipeline, Lora(first, 0.5, {"single": 0.25, 1: 2, "double": 0.5}), second)
    entries = result.receipt.data["request"]["loras"]
    assert entries[0] == {
        "file": "first.safetensors",
        "sha256": module.digest(first),
        "weight": 0.5,
        "blocks": [["single", 0.25], [1, 2.0], ["double", 0.5]],
    }
    assert (entries[1]["file"], entries[1]["weight"], entries[1]["blocks"]) == ("second.safetensors", 1.0, [])
    picture = result.save(tmp_path / "a.png")
    first.rename(tmp_path / "renamed.safetensors")
    (tmp_path / "first.safetensors").write_bytes(b"")  # another of that name
    again = replay(pipeline, picture)
    assert (again.verdict, again.causes) == ("bit-exact", ())
    assert again.result.receipt.data["request"]["loras"][1] == entries[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    second.rename(elsewhere / "second.safetensors")
    with pytest.raises(
        ReceiptError, match=r"made with the LoRA second.safetensors \(sha256 .*, which is not beside it"
    ):
        replay(pipeline, picture)
    assert replay(pipeline, picture, [photo(), elsewhere / "second.safetensors"]).verdict == "bit-exact"


def test_a_lossy_parent_is_drawn_again_with_its_lora(pipeline: Pipeline, make: Make, tmp_path: Path) -> None:
    parent = draw(pipeline, make())
    parent.save(tmp_path / "parent.jpg")
    child = draw(pipeline, prompt="make it blue", references=(Reference(parent),))
    assert replay(pipeline, child.save(tmp_path / "child.png")).verdict == "bit-exact"


def test_receipts_of_before_still_replay(pipeline: Pipeline, tmp_path: Path) -> None:
    result = draw(pipeline)
    assert result.receipt.data["request"]["loras"] == []
    old = forged(result, lambda data: data["request"].pop("loras"))
    assert replay(pipeline, old.save(tmp_path / "a.png")).verdict == "bit-exact"


@pytest.mark.parametrize("entry", [3, {}, {"file": "style.safetensors"}, "blocks"])
def test_damaged_entries(pipeline: Pipeline, make: Make, tmp_path: Path, entry: object) -> None:
    result = draw(pipeline, make())

    def change(data: dict[str, Any]) -> None:
        if entry == "blocks":
            data["request"]["loras"][0]["blocks"] = [1, 2, 3]
        else:
            data["request"]["loras"] = [entry]

    with pytest.raises(ReceiptError, match="without all its parts"):
        replay(pipeline, forged(result, change).save(tmp_path / "a.png"))
