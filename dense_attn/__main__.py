"""The command line: `python -m dense_attn info | verify | bench | demo | app`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dense_attn
from dense_attn import _command, _kernel_report
from dense_attn._backends import choice, cpu, cuda, table
from dense_attn._command import UserError
from dense_attn.demo import run

EXTRAS = {  # pyproject.toml's, which an installation need not have beside it
    "triton": ("triton",),
    "diffusers": ("accelerate", "diffusers", "transformers"),
    "app": ("accelerate", "diffusers", "gradio", "pillow", "transformers"),
    "bench": ("matplotlib", "pillow", "pytest", "pytest-benchmark", "tqdm", "xformers"),
    "test": ("diffusers", "expecttest", "hypothesis", "pillow", "pytest", "transformers"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 well, 1 a check failed, 2 it cannot be done, 130 Ctrl-C, 141 nobody reads.
    """
    argv = sys.argv[1:] if argv is None else argv
    return _command.run(" ".join(["dense_attn", *argv[:1]]), lambda: _run(argv))


def _run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "threads", None) is not None:
        torch.set_num_threads(arguments.threads)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dense_attn", description=dense_attn.__doc__)
    names = "info | verify | bench | demo | app"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    _add_info(commands)
    _add_verify(commands)
    _add_bench(commands)
    _add_demo(commands)
    _add_app(commands)
    return parser


def _add_info(commands: Any) -> None:
    shows = "versions, CPU features, backends and the reasons of those that are missing"
    info = commands.add_parser("info", help=shows)
    kernels = "the Triton kernels as compiled, and where they have run"
    info.add_argument("--kernels", action="store_true", help=kernels)
    info.set_defaults(run=_info)


def _add_verify(commands: Any) -> None:
    checks = "check every available backend against the reference on this machine"
    verify = commands.add_parser("verify", help=checks)
    _add_threads(verify)
    backend = "only this; may be repeated"
    verify.add_argument("--backend", action="append", choices=table.ORDER, help=backend)
    emulated = "instead the Triton kernels as compiled for sm_90 or TARGET, emulated on the CPU"
    emulated += " (in a checkout; minutes)"
    verify.add_argument(
        "--emulated",
        nargs="?",
        const="sm_90",
        choices=("sm_80", "sm_90"),
        metavar="TARGET",
        help=emulated,
    )
    verify.set_defaults(run=_verify)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="run the benchmark suite")
    add = bench.add_argument
    device = "what is measured (%(default)s)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=device)
    dry = "a GPU's rows on the smallest sizes, without a GPU"
    add("--dry-run", action="store_true", help=dry)
    quick = "the rows of a minute, of a GPU those of three"
    add("--quick", action="store_true", help=quick)
    for option in ("--workload", "--family", "--contender"):
        only = "only this; may be repeated"
        add(option, action="append", default=[], metavar="NAME", help=only)
    add("--seconds", metavar="N", help="begin no row after this time")
    _add_shape(bench)
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw the results (.png or .svg)")
    bench.set_defaults(run=_bench)


DEMO = """Runs the 32 attention layers of a Stable Diffusion 1.5 denoising step at 512 x 512 with a
layout, once as the official code of DenseDiffusion does it and once with this library, and draws
what happened; then lets a small trained model paint under layouts, into a second picture."""


def _add_demo(commands: Any) -> None:
    short = "the attention layers of a Stable Diffusion 1.5 step under a layout, measured and drawn"
    demo = commands.add_parser("demo", help=short, description=DEMO)
    add = demo.add_argument
    label_map = "label map: one grey value, palette entry or colour per region"
    label_map += ", 0 or black = background (default: a scene of four regions)"
    add("--layout", type=Path, metavar="IMAGE", help=label_map)
    shows = "what each region shows, by rising label; commas may part them"
    add("--phrases", nargs="+", type=_command.said, metavar="PHRASE", help=shows)
    output = "the picture (%(default)s)"
    add("--output", type=Path, default=Path("demo.png"), metavar="FILE", help=output)
    grids = "token grids to run, of %(choices)s (default: all; the official code needs 4 GB for 64)"
    add("--grids", type=int, nargs="+", choices=run.GRIDS, metavar="N", help=grids)
    add("--backend", choices=("auto", *table.ORDER), default="auto", help="(%(default)s)")
    _add_threads(demo)
    demo.set_defaults(run=_run_demo)


def _add_app(commands: Any) -> None:
    app = commands.add_parser("app", help="a page in the browser to paint layouts on")
    model = "a diffusers pipeline (default: the small model that is shipped)"
    app.add_argument("--model", type=_command.said, metavar="ID_OR_PATH", help=model)
    host = "where it listens (%(default)s: this machine alone)"
    app.add_argument("--host", default="127.0.0.1", help=host)
    port = "its port (default: the first free one from 7860 on)"
    app.add_argument("--port", type=_port, metavar="N", help=port)
    app.add_argument("--show", action="store_true", help="open it in a browser")
    _add_threads(app)
    app.set_defaults(run=_app)


def _add_threads(command: argparse.ArgumentParser) -> None:
    threads = "CPU threads (default: torch's own choice)"
    command.add_argument("--threads", type=_positive, metavar="N", help=threads)


def _add_shape(bench: argparse.ArgumentParser) -> None:
    """The options of a user's own shapes, which the benchmark reads and checks."""
    add = bench.add_argument
    shape = "layout attention on a shape of your own; may be repeated"
    add("--shape", action="append", default=[], metavar="B,H,M,N,D[,dtype]", help=shape)
    modulation = "of these shapes: range (default), max, bias or mask"
    add("--modulation", metavar="NAME", help=modulation)
    regions = "stripes of their layout (default: a real label map)"
    add("--regions", metavar="N", help=regions)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be in 1..65535, got {text!r}")
    return int(text)


def _info(arguments: argparse.Namespace) -> int:
    if arguments.kernels:
        print("\n".join(_kernel_report.report()))
        return 0
    versions = f"dense_attn {dense_attn.__version__}, torch {torch.__version__}"
    versions += f", numpy {np.__version__}, python {platform.python_version()}"
    print(f"{versions}, {platform.system()} {platform.machine()}")
    compiled = "not loaded" if cpu.LOAD_ERROR is not None else torch.ops.dense_attn.cpu_isa()
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    uses = f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    print(f"CPU: {cores}, {uses}, dense_attn's kernels: {compiled}")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"GPU: {', '.join(devices) or 'none'}")
    print('\nbackends, in the order in which "auto" tries them')
    for backend, ops in table.backends().items():
        for op, state in ops.items():
            print(f"  {backend:<10} {op:<18} {state}")
    print("\n".join(["", *_gpu_kernels()]))
    print("\noptional packages")
    brought: dict[str, str] = {}  # by the first extra that names it
    for extra, packages in EXTRAS.items():
        for package in packages:
            brought.setdefault(package, extra)
    for package, extra in brought.items():
        print(f"  {package:<17} {_version(package) or f'missing: pip install dense_attn[{extra}]'}")
    return 0


def _gpu_kernels() -> list[str]:
    """Lines on the backends of GPUs: where they ran, and which of them "auto" takes first."""
    lines = ["kernels of GPUs, as python -m dense_attn verify has found them"]
    for backend in ("triton", "cuda"):
        found = [
            f"{'right' if passed else 'WRONG'} on {gpu}"
            for gpu, passed in choice.gpus(backend).items()
        ]
        lines.append(f"  {backend:<10} {', '.join(found) or 'not run on a GPU'}")
    lines += ["", 'what "auto" takes first of two that are both right there, or both not run']
    rows = [rule.cells for rule in choice.RULES]
    lines += [f"  {line}" for line in _kernel_report.grid([choice.COLUMNS, *rows])]
    if cuda.LOAD_ERROR is None:
        lines.append(
            f"  the gradient of layout_attention on cuda is that of {cuda.gradient_of_attention()}"
        )
    return lines


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _verify(arguments: argparse.Namespace) -> int:
    from dense_attn.verify import run as verification

    if arguments.emulated:
        return verification.emulated(arguments.emulated)
    return verification.main(arguments.backend)


def _bench(arguments: argparse.Namespace) -> int:
    try:
        from dense_attn.benchmarks import run
    except ImportError as error:
        need = f"the benchmarks need {error.name}: pip install dense_attn[bench]"
        raise UserError(need) from None
    flags = ["--quick"] * arguments.quick + ["--dry-run"] * arguments.dry_run
    if arguments.device != "cpu":
        flags.append(f"--device={arguments.device}")
    for option in ("workload", "family", "contender", "shape"):
        flags += [f"--{option}={value}" for value in getattr(arguments, option)]
    for option in ("json", "plot", "modulation", "regions", "seconds"):
        value = getattr(arguments, option)
        if value is not None:
            flags.append(f"--{option}={value}")
    return run.main(flags)


def _app(arguments: argparse.Namespace) -> int:
    for package in ("diffusers", "gradio"):
        if find_spec(package) is None:
            raise UserError(f"the page needs {package}: pip install dense_attn[app]")
    from dense_attn.examples.app import serve

    return serve.main(arguments.model, arguments.host, arguments.port, arguments.show)


def _run_demo(arguments: argparse.Namespace) -> int:
    phrases = arguments.phrases and [
        part.strip() for text in arguments.phrases for part in text.split(",")
    ]
    run.main(arguments.layout, arguments.output, phrases, arguments.grids, arguments.backend)
    return 0


if __name__ == "__main__":
    sys.exit(main())
