"""`make hub`: a kernel of the Hub's layout, made from the tree, that loads and computes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import hub
import pytest
import torch

import dense_attn
from dense_attn._backends import cpu

LIBRARY = Path(dense_attn.__file__).parent / "_C.so"
pytestmark = pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason=f"{cpu.LOAD_ERROR}")
BY_KERNELS = """
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""
BY_ITS_LAYOUT = """
import importlib.util, json, platform
system = f"{platform.machine()}-{platform.system().lower()}"
folder = Path(sys.argv[1]) / "build" / f"torch-stable-abi211-cpu-{system}"
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
sys.modules[name] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
CALLS = """
q, k, v = torch.randn(3, 1, 2, 64, 40, generator=torch.Generator().manual_seed(0)).unbind(0)
words = (torch.arange(64) < 32).int() + 1
q.requires_grad_()
out = kernel.layout_attention(q, k, v, words, words, 0.5, backend="cpu")
(gradient,) = torch.autograd.grad(out.square().sum(), q)
masked, _ = kernel.percentile_mask(k.flatten(2), 0.9, backend="cpu")
theirs = [m for n, m in sys.modules.items() if n.split(".")[0] in (kernel.__name__, "dense_attn")]
files = {str(m.__file__) for m in theirs if getattr(m, "__file__", None)}
torch.save([out.detach(), gradient, masked, sorted(files)], sys.argv[2])
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout around the library that is here, whose ops have the library's own name."""
    folder = tmp_path_factory.mktemp("hub") / "hub"
    hub.write(folder, "dense_attn", LIBRARY)
    return folder


def here() -> list[torch.Tensor]:
    """The results that the kernel's are to have."""
    names = {"kernel": dense_attn, "sys": sys, "torch": torch}
    exec(CALLS.split("theirs =")[0], names)
    return [names["out"].detach(), names["gradient"], names["masked"]]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(BY_KERNELS, id="kernels"),
        pytest.param(BY_ITS_LAYOUT, id="layout", marks=pytest.mark.full),
    ],
)
def test_it_loads_and_computes_the_same_bits(way: str, written: Path, tmp_path: Path) -> None:
    """In a process of its own, in which nothing of the installed library is."""
    if way == BY_KERNELS and importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed")
    saved = tmp_path / "results.pt"
    program = (
        "import sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n" + way + CALLS
    )
    command = [sys.executable, "-B", "-c", program, str(written), str(saved)]
    offline = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *results, files = torch.load(saved)
    assert all(Path(file).is_relative_to(written) for file in files)
    assert len(files) > 20
    for ours, theirs in zip(here(), results):
        assert torch.equal(ours, theirs)


def test_what_is_written_fits_its_description(written: Path) -> None:
    variants = sorted(path.name for path in (written / "build").iterdir())
    assert len(variants) == 3
    assert variants[:2] == ["torch-cuda", "torch-rocm"]
    assert re.fullmatch(r"torch-stable-abi211-cpu-\w+-linux", variants[2])
    for variant in (written / "build").iterdir():
        about = json.loads((variant / "metadata.json").read_text("utf-8"))
        assert about["backend"]["type"] in variant.name
        assert about["id"].isidentifier()
        files = {path for path in variant.rglob("*") if path.is_file()}
        assert not any(path.suffix == ".pyc" for path in files)
        digests = {
            path.relative_to(variant).as_posix(): b64encode(sha256(path.read_bytes()).digest())
            for path in files - {variant / "metadata.json"}
        }
        named = about["digest"]["files"]
        assert named == {name: digest.decode() for name, digest in digests.items()}
        assert ("_C.so" in named) == (about["backend"]["type"] == "cpu")


def test_the_python_knows_no_installed_library(written: Path) -> None:
    """Every import of the library is relative, and reaches a module; no op has another's name."""
    package = written / "torch-ext" / "dense_attn"
    files = sorted(package.rglob("*.py"))
    assert len(files) > 60
    for path in files:
        text = path.read_text("utf-8")
        assert not re.search(r"^\s*(from|import) dense_attn", text, re.MULTILINE), path
        for dots, module in re.findall(r"^\s*from (\.+)([\w.]*) import", text, re.MULTILINE):
            base = path.parents[len(dots) - 1].joinpath(*module.split("."))
            assert base.is_dir() or base.with_suffix(".py").is_file(), (path, module)


def test_ops_have_the_kernels_name() -> None:
    text = 'torch.ops.dense_attn_triton.f; define("dense_attn"); _version_of("dense_attn")\n'
    text += 'f"dense_attn::{name}"; _NAME = "dense_attn_cuda"; advice = "install dense_attn"\n'
    own = hub.relative(text, "_backends/cpu.py", "_own")
    assert own == (
        'torch.ops._own_triton.f; define("_own"); _version_of("dense_attn")\n'
        'f"_own::{name}"; _NAME = "_own_cuda"; advice = "install dense_attn"\n'
    )
    assert re.fullmatch(r"[0-9a-f]{7}", hub.digest())


def run(monkeypatch: pytest.MonkeyPatch, out: Path, library: Path = LIBRARY) -> None:
    """The command, around a library that is there."""
    given = ["--out", str(out), "--library", str(library), "--ops", "dense_attn"]
    monkeypatch.setattr(sys, "argv", ["hub.py", *given])
    hub.main()


def contents(folder: Path) -> dict[str, bytes]:
    """All files, by their places."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_an_older_layout_is_replaced(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hub"
    out.mkdir()
    for _ in range(2):  # into an empty folder, and over what is there then
        run(monkeypatch, out)
        assert contents(out) == contents(written)
        (out / "torch-ext" / "old.py").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("name", ["notes.txt", "build.toml", ".git"])
def test_a_folder_with_something_else_is_left_as_it_is(
    name: str,
    tmp_path: Path,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Somebody's own, also beside a layout."""
    out = tmp_path / "own"
    if name == ".git":
        shutil.copytree(written, out)
    out.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = contents(out)
    for given in (out, out / name):
        with pytest.raises(SystemExit):
            run(monkeypatch, given)
        assert "--out must be empty, or hold nothing but" in capsys.readouterr().err
    assert contents(out) == before


def test_nothing_is_erased_for_a_library_that_is_not_there(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = shutil.copytree(written, tmp_path / "hub")
    with pytest.raises(SystemExit):
        run(monkeypatch, out, tmp_path / "none.so")
    assert "--library must be a file, got" in capsys.readouterr().err
    monkeypatch.setattr(hub, "write_variant", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # nor when writing fails midway
        run(monkeypatch, out)
    assert contents(out) == contents(written)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.long
@pytest.mark.full
def test_ops_of_its_own_stand_beside_the_installed_librarys(tmp_path: Path) -> None:
    """The whole of `make hub`, which compiles the CPU kernels."""
    out = tmp_path / "hub"
    subprocess.run([sys.executable, ".ci/hub.py", "--out", str(out)], cwd=hub.ROOT, check=True)
    ways = [BY_ITS_LAYOUT] + [BY_KERNELS] * (importlib.util.find_spec("kernels") is not None)
    for number, way in enumerate(ways):
        saved = tmp_path / f"{number}.pt"
        program = "import sys, torch, dense_attn\nfrom pathlib import Path\n" + way + CALLS
        subprocess.run([sys.executable, "-c", program, str(out), str(saved)], check=True)
        for ours, theirs in zip(here(), torch.load(saved)):
            assert torch.equal(ours, theirs)
