"""The command line: `python -m dense_attn info | verify | bench | demo`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import dense_attn
from dense_attn import _command, _kernel_report
from dense_attn._backends import cpu, table
from dense_attn.demo import run
from dense_attn.demo.scene import UserError

EXTRAS = {  # pyproject.toml's, which an installation need not have beside it
    "triton": ("triton",),
    "diffusers": ("accelerate", "diffusers", "transformers"),
    "bench": ("matplotlib", "pillow", "pytest", "pytest-benchmark", "tqdm", "xformers"),
    "test": ("diffusers", "expecttest", "hypothesis", "pillow", "pytest", "transformers"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code (0 well, 1 a check failed, 2 it cannot be done, 130 Ctrl-C,
    141 nobody reads).
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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="info | verify | bench | demo"
    )

    info = commands.add_parser(
        "info", help="versions, CPU features, backends and the reasons of those that are missing"
    )
    info.add_argument(
        "--kernels",
        action="store_true",
        help="the Triton kernels as compiled, and where they have run",
    )
    info.set_defaults(run=_info)

    verify = commands.add_parser(
        "verify", help="check every available backend against the reference on this machine"
    )
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="run the benchmark suite")
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what is measured (%(default)s)"
    )
    bench.add_argument(
        "--dry-run", action="store_true", help="a GPU's rows on the smallest sizes, without a GPU"
    )
    bench.add_argument(
        "--quick", action="store_true", help="the rows of a minute, of a GPU those of three"
    )
    for option in ("--workload", "--family"):
        bench.add_argument(
            option, action="append", default=[], metavar="NAME", help="only this; may be repeated"
        )
    _add_shape(bench)
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the results (.png or .svg)")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser(
        "demo",
        help="the attention layers of a Stable Diffusion 1.5 step under a layout, measured and drawn",
        description="Runs the 32 attention layers of a Stable Diffusion 1.5 denoising step at 512 x 512 with a layout, "
        "once as the official code of DenseDiffusion does it and once with this library, and draws what happened; then "
        "lets a small trained model paint under layouts, into a second picture.",
    )
    label_map = (
        "label map: one grey value, palette entry or colour per region, 0 or black = background"
    )
    demo.add_argument(
        "--layout",
        type=Path,
        metavar="IMAGE",
        help=f"{label_map} (default: a scene of four regions)",
    )
    shows = "what each region shows, by rising label; commas may part them"
    demo.add_argument("--phrases", nargs="+", type=_command.said, metavar="PHRASE", help=shows)
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE",
        help="the picture (%(default)s)",
    )
    grids = "token grids to run, of %(choices)s (default: all; the official code needs 4 GB for 64)"
    demo.add_argument("--grids", type=int, nargs="+", choices=run.GRIDS, metavar="N", help=grids)
    demo.add_argument(
        "--backend", choices=("auto", *table.ORDER), default="auto", help="(%(default)s)"
    )
    demo.set_defaults(run=_run_demo)

    for command in (verify, demo):
        command.add_argument(
            "--threads",
            type=_positive,
            metavar="N",
            help="CPU threads (default: torch's own choice)",
        )
    return parser


def _add_shape(bench: argparse.ArgumentParser) -> None:
    """The options of a user's own shapes, which the benchmark reads and checks."""
    shape = "layout attention on a shape of your own; may be repeated"
    bench.add_argument(
        "--shape", action="append", default=[], metavar="B,H,M,N,D[,dtype]", help=shape
    )
    bench.add_argument(
        "--modulation", metavar="NAME", help="of these shapes: range (default), max, bias or mask"
    )
    bench.add_argument(
        "--regions", metavar="N", help="stripes of their layout (default: a real label map)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _info(arguments: argparse.Namespace) -> int:
    if arguments.kernels:
        print("\n".join(_kernel_report.report()))
        return 0
    print(f"dense_attn {dense_attn.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
          f"python {platform.python_version()}, {platform.system()} {platform.machine()}")  # fmt: skip
    compiled = "not loaded" if cpu.LOAD_ERROR is not None else torch.ops.dense_attn.cpu_isa()
    print(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch uses "
          f"{torch.backends.cpu.get_cpu_capability()}, dense_attn's kernels: {compiled}")  # fmt: skip
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"GPU: {', '.join(devices) or 'none'}")
    print('\nbackends, in the order in which "auto" tries them')
    for backend, ops in table.backends().items():
        for op, state in ops.items():
            print(f"  {backend:<10} {op:<18} {state}")
    print("\noptional packages")
    brought: dict[str, str] = {}  # by the first extra that names it
    for extra, packages in EXTRAS.items():
        for package in packages:
            brought.setdefault(package, extra)
    for package, extra in brought.items():
        print(f"  {package:<17} {_version(package) or f'missing: pip install dense_attn[{extra}]'}")
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _verify(arguments: argparse.Namespace) -> int:
    from dense_attn.verify import attention, families

    for backend in table.ORDER:
        reasons = attention.why_not(backend, "layout_attention")
        if reasons and table.missing(backend, "layout_attention") is None:
            print(f"{backend}: not checked, {'; '.join(reasons)}")
    failed = attention.main() + families.main()
    print("\n" + (f"{failed} rows FAILED" if failed else "every row passed"))
    return 1 if failed else 0


def _bench(arguments: argparse.Namespace) -> int:
    try:
        from dense_attn.benchmarks import run
    except ImportError as error:
        raise UserError(
            f"the benchmarks need {error.name}: pip install dense_attn[bench]"
        ) from None
    options = [("--workload", name) for name in arguments.workload]
    options += [("--family", name) for name in arguments.family]
    options += [("--device", arguments.device)] * (arguments.device != "cpu")
    options += [
        (option, path)
        for option, path in (("--json", arguments.json), ("--plot", arguments.plot))
        if path
    ]
    flags = ["--quick"] * arguments.quick + ["--dry-run"] * arguments.dry_run
    flags += [
        f"--shape={text}" for text in arguments.shape
    ]  # a minus sign would be taken for an option
    flags += [
        f"--{name}={text}"
        for name in ("modulation", "regions")
        if (text := getattr(arguments, name)) is not None
    ]
    return run.main([*flags, *(str(text) for pair in options for text in pair)])


def _run_demo(arguments: argparse.Namespace) -> int:
    phrases = arguments.phrases and [
        part.strip() for text in arguments.phrases for part in text.split(",")
    ]
    run.main(arguments.layout, arguments.output, phrases, arguments.grids, arguments.backend)
    return 0


if __name__ == "__main__":
    sys.exit(main())
