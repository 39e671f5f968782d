"""The options that several commands share, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _drawing(*flags: str, help: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="What the model does", **more)


def _computing(*flags: str, help: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="How it computes", **more)


def _output(*flags: str, help: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Where it goes", **more)


SIZE = (
    "Width and height in pixels that the model works at; 256 is 256x256. Default: its own, at the aspect of the "
    "picture to start from. A locked edit has the size of its original."
)

MODEL = "A name of `fluxloom models`, owner/name[@revision][:file] on a hub, a folder or a file."
Model = Annotated[str, _drawing("--model", "-m", metavar="REF", help=MODEL)]
Variant = Annotated[
    str | None, _drawing("--variant", metavar="NAME", help="Which member a file is, where it does not tell.")
]
Base = Annotated[
    str | None, _drawing("--base", metavar="REF", help="Of an adapter: the model to add it to, instead of its own.")
]
Offline = Annotated[bool, _drawing("--offline", help="Take models as they are in the cache; ask no hub.")]
Template = Annotated[
    str | None,
    _drawing("--template", metavar="NAME", help="A name of `fluxloom templates`; what is typed is its subject."),
]
Slots = Annotated[list[str] | None, _drawing("--slot", metavar="NAME=VALUE", help="Fills the template; repeatable.")]
Templates = Annotated[Path | None, _drawing("--templates", metavar="FILE", help="Templates of your own (TOML).")]
Enhance = Annotated[
    str | None,
    _drawing("--enhance", metavar="NAME", help="Let rules, chat or a plug-in say what the prompt leaves open."),
]
Negative = Annotated[str, _drawing("--negative", help="What the picture should not show (with --true-cfg over 1).")]
Seed = Annotated[int | None, _drawing("--seed", "-s", help="Seed of the noise; picture k of n takes seed + k.")]
Number = Annotated[int, _drawing("-n", help="How many pictures.")]
Size = Annotated[str | None, _drawing("--size", metavar="WxH", help=SIZE)]
Quality = Annotated[
    str | None, _drawing("--quality", metavar="NAME", help="draft, standard or best: steps and solver, unless given.")
]
Steps = Annotated[int | None, _drawing("--steps", help="Steps of the solver.")]
Guidance = Annotated[float | None, _drawing("--guidance", help="Guidance value fed to the network.")]
TrueCfg = Annotated[float | None, _drawing("--true-cfg", help="Classifier-free guidance; 1 is off, and twice as fast.")]
Solver = Annotated[str | None, _drawing("--solver", help="euler, heun, midpoint, rk4, ab2, dpmpp_2m or adaptive.")]
Init = Annotated[Path | None, _drawing("--init", help="Picture to start from instead of pure noise.")]
Strength = Annotated[float | None, _drawing("--strength", help="How far to leave --init behind; 0.8 unless given.")]
Mask = Annotated[Path | None, _drawing("--mask", help="What of --init to repaint: white; black stays.")]
Lock = Annotated[
    str,
    _drawing(
        "--lock",
        metavar="auto|off|MASK",
        help="What is not edited stays as it is, to the byte. MASK: a picture, white where it may change.",
    ),
]
Within = Annotated[Path | None, _drawing("--mask", help="Edit only inside: white in a picture of the same size.")]
Box = Annotated[str | None, _drawing("--box", metavar="L,T,R,B", help="Edit only inside this box, in pixels.")]
Expand = Annotated[
    str | None, _drawing("--expand", metavar="L,T,R,B", help="Pixels of new canvas around --init, to be painted.")
]
Control = Annotated[Path | None, _drawing("--control", help="Picture whose edges or depth to follow.")]
ControlReady = Annotated[bool, _drawing("--control-ready", help="--control is itself of edges or depth.")]
ControlModel = Annotated[Path | None, _drawing("--control-model", help="Depth model (ONNX) for --control.")]
Images = Annotated[list[Path] | None, _drawing("--image", help="Picture that stands for words (Redux); repeatable.")]
BestOf = Annotated[
    int | None, _drawing("--best-of", min=1, help="Draw so many and keep the one that follows best and changes least.")
]
MaxDrift = Annotated[
    str | None,
    _drawing("--max-drift", metavar="LIMITS", help="Refuse what changes the rest by more: psnr=28,delta_e=3."),
]
Loras = Annotated[
    list[str] | None,
    _drawing("--lora", metavar="FILE[:WEIGHT]", help="A LoRA: FILE or FILE:WEIGHT; may be given several times."),
]
References = Annotated[
    list[Path] | None, _drawing("--reference", help="A further picture that the edit takes from; repeatable.")
]
Device = Annotated[
    str, _computing("--device", help="cpu, cuda or auto: a GPU where there is one, but a processor for nano.")
]
Dtype = Annotated[
    str | None, _computing("--dtype", help="float32 or bfloat16; default: float32 on a processor, bfloat16 on a GPU.")
]
Executor = Annotated[
    str, _computing("--executor", help="auto, plain, fused or captured (CUDA graphs): the same numbers up to rounding.")
]
Linears = Annotated[
    str | None, _computing("--linears", help="fp8 or int8: matrix products in 8 bits; faster, half the memory, lossy.")
]
Attention = Annotated[
    str, _computing("--attention", help="auto, cudnn, fa3, flash, efficient, torch, math or fa3-fp8 (lossy).")
]
Gpus = Annotated[int, _computing("--gpus", metavar="N", help="GPUs that compute each picture together.")]
Vram = Annotated[
    str | None,
    _computing("--vram", metavar="SIZE", help="Stay under this much memory of the GPU: 12GB; default: what is free."),
]
Threads = Annotated[int | None, _computing("--threads", help="Threads of the processor; default: one a core.")]
Out = Annotated[
    Path | None,
    _output("--out", "-o", help="File (.png, .jpg, .webp) or folder; default: here, named after prompt and seed."),
]
Session = Annotated[
    Path | None, _output("--session", metavar="DIR", help="Keep it as a step of this session, new or not.")
]
Force = Annotated[bool, _output("--force", help="Overwrite; otherwise the next free number is taken.")]
Receipt = Annotated[
    bool, _output("--receipt/--no-receipt", help="Write into the file how it was made, prompt and all.")
]
Preview = Annotated[bool, _output("--preview", help="Watch the picture grow, in a terminal.")]
PreviewDecoder = Annotated[
    Path | None,
    _output(
        "--preview-decoder", metavar="FILE", help="TAEF1, for sharper previews of 12 B members; implies --preview."
    ),
]
Quiet = Annotated[bool, _output("--quiet", "-q", help="No progress.")]
Json = Annotated[bool, _output("--json", help="One JSON object on standard output.")]
