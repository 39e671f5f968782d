"""Random FLUX.1 dev at its full size (12 B parameters, 34 GB) on one GPU: loading, memory, numbers and speed, beside
diffusers.

    python bench/full_size.py make --folder /tmp/full
    python bench/full_size.py all --folder /tmp/full --out results.json

``all`` runs every piece in a process of its own, the most important first, and writes the file after each; JSON lines
tell how far it is. The files are read once before, so that all find them in the page cache. With ``--toy`` the same
at toy size, on the CPU too: for trying the script, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
PROMPT = "a red bicycle on the beach"
NAME = "flux1-dev"
# Dev's own values, and values that bfloat16 holds exactly, 1,000-fold too: diffusers rounds time and guidance to the
# dtype of the model before it embeds them, we embed float32. Under the latter both embed the same.
TIMES = {"as drawn": (0.7, 3.5), "exact in bfloat16": (0.5, 4.0)}

# Published configurations of black-forest-labs/FLUX.1-dev, and toys of the same classes.
TRANSFORMER = {
    False: {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56)},
    True: {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
           "joint_attention_dim": 24, "pooled_projection_dim": 64, "axes_dims_rope": (4, 14, 14)},
}  # fmt: skip
CLIP = {
    False: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    True: {"hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 1},
}
T5 = {
    False: {"d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64},
    True: {"d_model": 24, "d_kv": 64, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
CHANNELS = {False: (128, 256, 512, 512), True: (32, 64, 128, 128)}
SCHEDULER = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
             "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}  # fmt: skip
SIDE = {False: 1024, True: 256}  # of pictures; the autoencoder alone decodes half of it


def tell(row: Row) -> None:
    print(json.dumps(row), flush=True)


def device_of(toy: bool) -> str:
    return "cpu" if toy and not torch.cuda.is_available() else "cuda"


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------- making the model


def random_weights(model: Any, seed: int) -> Any:
    """Normal numbers of variance 1 / inputs, so that states keep their size through any depth; nothing is 0 or 1
    exactly, since a bias or a norm in the wrong place must be seen. T5 has no scale in its attention: its queries
    hold it, as its own initialisation has it."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    heads = getattr(model.config, "d_kv", 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                norm = name.endswith("weight")
                weight.normal_(0, 0.05 if norm else 0.02, generator=generator).add_(1 if norm else 0)
            elif "embedding" in name or "shared" in name or "attention_bias" in name:
                weight.normal_(0, 0.1, generator=generator)
            else:
                spread = weight[0].numel() ** -0.5
                weight.normal_(0, spread * (heads**-0.5 if ".q." in name else 1), generator=generator)
    return model.eval().requires_grad_(False)


def make(folder: Path, toy: bool) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    began = time.perf_counter()
    clip = CLIPTextConfig(vocab_size=49_408, max_position_embeddings=77, hidden_act="quick_gelu",
                          bos_token_id=49_406, eos_token_id=49_407, **CLIP[toy])  # fmt: skip
    t5 = T5Config(vocab_size=32_128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5[toy])
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device_of(toy)):
        parts: dict[str, Any] = {
            "transformer": FluxTransformer2DModel(guidance_embeds=True, in_channels=64, **TRANSFORMER[toy]),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=CHANNELS[toy], layers_per_block=2, latent_channels=16, norm_num_groups=32,
                scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(clip),
            "text_encoder_2": T5EncoderModel(t5),
        }  # fmt: skip
    torch.set_default_dtype(torch.float32)
    for seed, model in enumerate(parts.values()):
        random_weights(model, seed)
    wait(device_of(toy))
    tell({"make": "weights", "seconds": since(began), "GB": round(sum(map(size_of, parts.values())) / 1e9, 3)})
    began = time.perf_counter()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), tokenizer=None, tokenizer_2=None, **parts
    )
    sizes = {"transformer": "10GB", "text_encoder_2": "5GB"}  # of shards, as published; the others are one file each
    with ThreadPoolExecutor(4) as pool:
        saves = [
            pool.submit(part.save_pretrained, folder / name, max_shard_size=sizes.get(name, "5GB"))
            for name, part in parts.items()
        ]
        for done in saves:
            done.result()
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
    tell({"make": "files", "seconds": since(began), "GB": sum(f.stat().st_size for f in files(folder)) / 1e9})


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def size_of(module: Any) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def since(began: float) -> float:
    return round(time.perf_counter() - began, 3)


# ---------------------------------------------------------------------------------------------- memory and time


def memory(what: str) -> int:
    """Bytes, of /proc/self/status: VmRSS, VmHWM (its peak; mapped file pages count), RssAnon (they do not)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(what)


@contextlib.contextmanager
def watched() -> Iterator[Row]:
    """Host memory over what there was before: its peaks, and what stays."""
    row: Row = {}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of all pages begins anew
    before, anon = memory("VmRSS"), memory("RssAnon")
    peak, over = [anon], threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], memory("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield row
    finally:
        over.set()
        thread.join()
        row |= {
            "rss_before": before,
            "peak_hwm_over_before": memory("VmHWM") - before,
            "peak_anon_over_before": max(peak[0], memory("RssAnon")) - anon,
            "anon_stays_over_before": memory("RssAnon") - anon,
        }


def started(toy: bool, importing: Callable[[], object]) -> tuple[str, float]:
    """(device, seconds of imports beyond torch), with the device awake."""
    began = time.perf_counter()
    importing()
    seconds, device = since(began), device_of(toy)
    torch.ones(4, 4, device=device).bfloat16().aminmax()
    wait(device)
    return device, seconds


def measured(load: Callable[[], Any], modules: Callable[[Any], Iterable[Any]], device: str) -> Row:
    """Seconds and memory of one load; then those of a first pass over the weights, which files that were only mapped
    pay there."""
    with watched() as row:
        began = time.perf_counter()
        loaded = load()
        wait(device)
        row["seconds"] = since(began)
    parts = list(modules(loaded))
    stays = sum(map(size_of, parts))
    row |= {"weights_bytes": stays, "gpu_bytes": None, "gpu_peak_bytes": None}
    if device == "cuda":
        row |= {"gpu_bytes": torch.cuda.memory_allocated(), "gpu_peak_bytes": torch.cuda.max_memory_allocated()}
    began = time.perf_counter()
    for part in parts:
        for weight in part.parameters():
            weight.detach().aminmax()
    wait(device)
    row |= {"first_pass_seconds": since(began), "hwm_after_pass_over_before": memory("VmHWM") - row["rss_before"]}
    return row


# ---------------------------------------------------------------------------------------------- the pieces


def import_ours() -> None:
    import fluxloom
    import fluxloom.infer.assemble  # noqa: F401


def import_theirs() -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: F401
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401


def load_ours(folder: Path, device: str, executor: str = "auto") -> Any:
    import fluxloom

    return fluxloom.load(folder, device=device, variant=NAME, dtype="bfloat16", executor=executor)


def whole_ours(folder: Path, toy: bool) -> Iterator[Row]:
    device, imports = started(toy, import_ours)

    def modules(loom: Any) -> list[Any]:
        runtime = loom.pipeline.runtime
        return [runtime.transformer, runtime.autoencoder, runtime.reader.clip, runtime.reader.t5]

    row = measured(lambda: load_ours(folder, device), modules, device)
    yield {
        "imports_s": imports,
        "note": "the autoencoder read in float32 and, on a GPU, kept in bfloat16 as all else; checked to be finite",
        **row,
    }


def whole_theirs(folder: Path, toy: bool, mapped: bool = False) -> Iterator[Row]:
    device, imports = started(toy, import_theirs)

    def load() -> Any:
        from diffusers import FluxPipeline

        given = {"torch_dtype": torch.bfloat16, "tokenizer": None, "tokenizer_2": None}
        if mapped:
            return FluxPipeline.from_pretrained(folder, device_map=device, **given)
        return FluxPipeline.from_pretrained(folder, **given).to(device)

    parts = lambda pipe: [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]  # noqa: E731
    yield {"imports_s": imports, "note": "all in bfloat16", **measured(load, parts, device)}


def transformer_ours(folder: Path, toy: bool) -> Iterator[Row]:
    _, imports = started(toy, import_ours)

    def load() -> Any:
        from fluxloom.weights.checkpoint import open_checkpoint
        from fluxloom.weights.identify import identify
        from fluxloom.weights.stream import load_component

        checkpoint = open_checkpoint(folder / "transformer")
        return load_component(checkpoint, identify(checkpoint)[0])

    yield {"imports_s": imports, **ratios(measured(load, lambda model: [model], "cpu"))}


def transformer_theirs(folder: Path, toy: bool) -> Iterator[Row]:
    _, imports = started(toy, import_theirs)

    def load() -> Any:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)

    yield {"imports_s": imports, **ratios(measured(load, lambda model: [model], "cpu"))}


def ratios(row: Row) -> Row:
    """Peaks as parts of what stays."""
    names = ("peak_hwm_over_before", "hwm_after_pass_over_before", "peak_anon_over_before")
    return row | {f"{name}/stays": round(row[name] / row["weights_bytes"], 4) for name in names}


def difference(a: Any, b: Any) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def compared(what: str, ours: Any, theirs: Any, wide: Any = None) -> Row:
    """Of two answers, and of each to the same model in float32."""
    row = {"what": what, "ours_to_theirs": difference(ours, theirs), "size": float(theirs.double().std())}
    if wide is not None:
        row |= {"ours_to_float32": difference(ours, wide), "theirs_to_float32": difference(theirs, wide)}
    return row


def numbers(folder: Path, toy: bool) -> Iterator[Row]:
    device, imports = started(toy, lambda: (import_ours(), import_theirs()))
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    began = time.perf_counter()
    runtime = load_ours(folder, device, "plain").pipeline.runtime  # with the autoencoder in float32
    yield {"what": "loaded ours", "imports_s": imports, "seconds": since(began)}
    pieces: list[Callable[[], Iterator[Row]]] = [
        lambda: velocities(folder, runtime, device, toy),
        lambda: encoders(folder, runtime, device),
        lambda: decoded(folder, runtime, device, toy),
    ]
    for piece in pieces:
        with torch.inference_mode():
            yield from guarded(piece)
        gc.collect()


def guarded(piece: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a piece; its fault, if it ends in one, is a row too."""
    try:
        yield from piece()
    except Exception:  # whatever it is, the other pieces go on
        yield {"error": traceback.format_exc().strip().splitlines()[-6:]}


def velocities(folder: Path, runtime: Any, device: str, toy: bool) -> Iterator[Row]:
    """Both transformers on random tokens of a square picture, and the seconds of a forward pass of each."""
    from diffusers import FluxTransformer2DModel

    from fluxloom.core import shapes

    theirs = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16).to(device)
    side, spec = SIDE[toy] // 16, runtime.spec.transformer
    generator = torch.Generator(device).manual_seed(7)
    draw = lambda *shape: torch.randn(shape, device=device, generator=generator).bfloat16()  # noqa: E731
    img, txt = draw(1, side * side, spec.in_channels), draw(1, 512, spec.context_in_dim)
    pooled = draw(1, spec.vec_in_dim)
    img_ids, txt_ids = shapes.image_ids(2 * side, 2 * side).to(device), shapes.text_ids(512).to(device)

    def ask_ours(t: float, guidance: float) -> Any:
        t_B, guidance_B = (torch.tensor([value], device=device) for value in (t, guidance))
        return runtime.transformer(img, img_ids[None], txt, txt_ids[None], t_B, pooled, guidance_B)

    def ask_theirs(t: float, guidance: float, model: Any = theirs, dtype: torch.dtype = torch.bfloat16) -> Any:
        return model(
            hidden_states=img.to(dtype), encoder_hidden_states=txt.to(dtype), pooled_projections=pooled.to(dtype),
            timestep=torch.tensor([t], device=device), guidance=torch.tensor([guidance], device=device),
            img_ids=img_ids, txt_ids=txt_ids, return_dict=False,
        )[0]  # fmt: skip

    answers = {how: (ask_ours(*values), ask_theirs(*values)) for how, values in TIMES.items()}
    for how, (a, b) in answers.items():
        yield compared(f"velocity, {how} {TIMES[how]}, in bfloat16", a, b)
    yield {"what": "forward pass, eager, bfloat16", "tokens": [side * side, 512],
           **paces({"ours": ask_ours, "theirs": ask_theirs}, device)}  # fmt: skip
    wide = copy.deepcopy(theirs).float()
    for how, (a, b) in answers.items():
        exact = ask_theirs(*TIMES[how], model=wide, dtype=torch.float32)
        yield compared(f"velocity, {how} {TIMES[how]}, with float32", a, b, exact)


def paces(asked: dict[str, Callable[[float, float], Any]], device: str) -> Row:
    """Seconds of one forward pass, the least of four, in turns; all are warm."""
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(4):
        for name, ask in asked.items():
            wait(device)
            began = time.perf_counter()
            ask(0.7, 3.5)
            wait(device)
            seconds[name].append(since(began))
    return {f"{name}_s": min(taken) for name, taken in seconds.items()} | {"all_s": seconds}


def encoders(folder: Path, runtime: Any, device: str) -> Iterator[Row]:
    from transformers import CLIPTextModel, T5EncoderModel

    reader = runtime.reader
    for name, model, words, length in (("text_encoder", CLIPTextModel, reader.clip_words, 77),
                                       ("text_encoder_2", T5EncoderModel, reader.t5_words, 512)):  # fmt: skip
        theirs = model.from_pretrained(folder / name, dtype=torch.bfloat16).to(device).eval()
        ids = torch.tensor([words.encode(PROMPT, length)], device=device)
        t5 = model is T5EncoderModel
        ours = reader.t5(ids) if t5 else reader.clip(ids)[1]
        answers = [theirs(ids), copy.deepcopy(theirs).float()(ids)]
        b, wide = (answer.last_hidden_state if t5 else answer.pooler_output for answer in answers)
        yield compared("T5 states" if t5 else "CLIP's pooled state", ours, b, wide)


def decoded(folder: Path, runtime: Any, device: str, toy: bool) -> Iterator[Row]:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device)
    cells = SIDE[toy] // 16
    z = torch.randn(1, 16, cells, cells, device=device, generator=torch.Generator(device).manual_seed(8))
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    b = theirs.decode(z / scale + shift).sample
    yield compared(f"autoencoder, {8 * cells} px, in float32", runtime.autoencoder.decode(z), b)


def draws(folder: Path, toy: bool) -> Iterator[Row]:
    from fluxloom.infer.request import Request, Result

    device, imports = started(toy, import_ours)
    side = SIDE[toy]
    loom = load_ours(folder, device)
    fields = {"width": side, "height": side}
    loom.generate(PROMPT, seed=1, steps=1, **fields)
    began, marks = time.perf_counter(), []
    for event in loom.stream(Request(prompt=PROMPT, seed=1, steps=4, **fields)):
        wait(device)
        marks.append(since(began))
        result = event
    assert isinstance(result, Result)
    picture = np.asarray(result.image)
    assert picture.shape == (side, side, 3), picture.shape  # not finite latents are refused before
    gaps = [round(b - a, 4) for a, b in zip([0.0, *marks], marks, strict=False)]
    yield {
        "imports_s": imports, "step_s": gaps[:-1], "decode_and_receipt_s": gaps[-1], "whole_s": marks[-1],
        "size": list(result.image.size), "picture_std": float(picture.std()),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }  # fmt: skip


PIECES: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "whole/ours": whole_ours,
    "whole/theirs": whole_theirs,
    "whole/theirs device_map": lambda folder, toy: whole_theirs(folder, toy, mapped=True),
    "transformer/ours": transformer_ours,
    "transformer/theirs": transformer_theirs,
    "numbers": numbers,
    "draws": draws,
}
ORDER = ("whole/ours", "whole/theirs", "whole/ours", "whole/theirs", "whole/theirs device_map",
         "transformer/ours", "transformer/theirs", "transformer/ours", "transformer/theirs",
         "numbers", "draws")  # fmt: skip


# ---------------------------------------------------------------------------------------------- all of them


def run(piece: str, folder: Path, toy: bool, seconds: float) -> list[Row]:
    """The rows of a piece in a process of its own, ended when the seconds are over."""
    command = [sys.executable, __file__, "piece", piece, "--folder", str(folder), *(["--toy"] if toy else [])]
    began = time.perf_counter()
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        out, fault = ran.stdout, ran.stderr.strip().splitlines()[-6:] if ran.returncode else None
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        out, fault = text.decode() if isinstance(text, bytes) else text, [f"no time after {seconds:.0f} s"]
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [{"piece": piece, **row} for row in [*rows, *([{"error": fault}] if fault else [])]] + [
        {"piece": piece, "process_s": since(began)}
    ]


def warm(folder: Path) -> Row:
    """Read all weights once."""

    def read(path: Path) -> int:
        buffer, whole = bytearray(1 << 24), 0
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                whole += got
        return whole

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        size = sum(pool.map(read, files(folder)))
    return {"page_cache": "warm: every file read before", "GB": round(size / 1e9, 3), "seconds": since(began)}


def machine(toy: bool) -> Row:
    import fluxloom

    names = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    versions = {name: metadata.version(name) for name in names if list(metadata.distributions(name=name))}
    gpu = device_of(toy) == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "toy": toy,
        "versions": {"fluxloom": fluxloom.__version__, "python": platform.python_version(), **versions},
    }


def everything(folder: Path, toy: bool, out: Path, seconds: float, only: list[str]) -> None:
    end = time.perf_counter() + seconds
    results: Row = {**machine(toy), "cache": warm(folder), "rows": []}
    tell({key: value for key, value in results.items() if key != "rows"})
    for piece in ORDER:
        if only and not any(piece.startswith(name) for name in only):
            continue
        left = end - time.perf_counter()
        rows = run(piece, folder, toy, left) if left > 5 else [{"piece": piece, "error": ["skipped: no time left"]}]
        for row in rows:
            tell(row)
        results["rows"] += rows
        out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "all", "piece"])
    parser.add_argument("piece", nargs="?", choices=list(PIECES), help="one piece alone, in this process")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--seconds", type=float, default=265, help="with all: pieces beyond are ended or skipped")
    parser.add_argument("--only", nargs="*", default=[], help="with all: pieces whose names begin so")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.toy)
    elif given.what == "all":
        everything(given.folder, given.toy, given.out, given.seconds, given.only)
    elif given.piece is None:
        parser.error(f"got no piece, allowed {', '.join(PIECES)}, try numbers")
    else:
        for row in guarded(lambda: PIECES[given.piece](given.folder, given.toy)):
            tell(row)


if __name__ == "__main__":
    main()
