"""The table of backends: reasons no machine of ours can give by itself, and nothing available that
a call refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from cases import why_skip

import dense_attn
from dense_attn._backends import contract, cpu, ops, table, triton

ALPHAS_CUMPROD = torch.linspace(0.999, 0.01, 20, dtype=torch.float64)
CALLS: dict[str, Callable[[torch.Tensor, str], object]] = {
    "layout_attention": lambda x, backend: dense_attn.layout_attention(
        x[None, None],
        x[None, None],
        x[None, None],
        *2 * (x.new_ones(4, dtype=torch.int32),),
        backend=backend,
    ),
    "percentile_mask": lambda x, backend: dense_attn.percentile_mask(x, 0.5, backend=backend),
    "sega_guidance": lambda x, backend: dense_attn.SemanticGuidance(backend=backend)(
        0, x[None], x[None], [x[None]]
    ),
    "ddim_step": lambda x, backend: dense_attn.ddim_step(x, x, 0.5, 0.6, backend=backend),
    "ReversibleSampler": lambda x, backend: dense_attn.ReversibleSampler(
        ALPHAS_CUMPROD, [10, 5], backend=backend
    ).sample(lambda y, t: 0.1 * y, x),
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a build of torch for GPUs, with Triton, and these capabilities on the machine."""

    def make(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setitem(table.NAMESPACES, "triton", SimpleNamespace(LOAD_ERROR=None))
        monkeypatch.setattr(triton, "DEVICE", "cuda")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: len(capabilities) > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_capability",
            lambda device: capabilities[torch.device(device).index],
        )

    return make


OLD = "needs a GPU of compute capability 8.0 or newer, got {}"


@pytest.mark.parametrize(
    ("capability", "reasons"), [((8, 0), []), ((12, 0), []), ((7, 5), ["7.5"])]
)
def test_old_gpus_are_named(
    capability: tuple[int, int], reasons: list[str], gpus: Callable
) -> None:
    gpus(capability)
    place = {"device": torch.device("cuda:0"), "is_cuda": True}
    x = SimpleNamespace(**place, shape=(1, 1, 1, 64), dtype=torch.float32)
    assert table.why_not("triton", "layout_attention", x) == [
        OLD.format(number) for number in reasons
    ]


@pytest.mark.parametrize(
    ("capabilities", "state"),
    [
        ((), "no GPU on this machine"),
        (((7, 5),), OLD.format("7.5")),
        (((7, 0), (7, 5)), OLD.format("7.0")),
        (((7, 5), (9, 0)), "available"),
        (((9, 0),), "available"),
    ],
)
def test_the_table_looks_for_a_gpu(
    capabilities: tuple[tuple[int, int], ...], state: str, gpus: Callable
) -> None:
    gpus(*capabilities)
    assert dense_attn.backends()["triton"] == dict.fromkeys(table.OPS, state)
    assert dense_attn.backends()["reference"] == dict.fromkeys(table.OPS, "available")


def test_the_table_names_a_gpu_that_cannot_be_asked(
    gpus: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was forked from one that had used it says so."""

    def refuse(_: object) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess\nand more")

    gpus((9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    reason = "the GPU cannot be used: Cannot re-initialize CUDA in forked subprocess"
    assert dense_attn.backends()["triton"]["ddim_step"] == reason


def test_a_call_on_the_cpu_asks_no_gpu(gpus: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the driver, and processes that are forked later could not use it."""
    gpus((9, 0))
    for name in ("is_available", "device_count", "get_device_capability"):
        monkeypatch.delattr(torch.cuda, name)
    assert table.resolve("auto", "percentile_mask", torch.zeros(2)) != "triton"


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="Triton's launchers load it")
def test_the_import_loads_no_compiler() -> None:
    """It takes seconds, and fails beside a Triton that is none."""
    assert (
        run("import sys, dense_attn; print('torch._dynamo' in sys.modules)", TRITON_INTERPRET="")
        == "False"
    )


def test_the_import_asks_no_gpu() -> None:
    names = ("is_available", "device_count", "init", "_lazy_init")
    asked = "; ".join(f"torch.cuda.{name} = None" for name in names)
    assert run(f"import torch; {asked}; import dense_attn; print('imported')") == "imported"


@pytest.mark.parametrize("op", table.OPS)
@pytest.mark.parametrize("backend", table.ORDER)
def test_what_is_available_runs(backend: str, op: str) -> None:
    if dense_attn.backends()[backend][op] == "available":
        dtype = torch.float16 if backend == "cuda" else torch.float32  # which its attention takes
        CALLS[op](torch.rand(4, 8, dtype=dtype, device=table.device_of(backend)), backend)
    else:
        with pytest.raises(RuntimeError, match="backend must be able to run"):
            CALLS[op](torch.rand(4, 8), backend)


def run(program: str, **environment: str) -> str:
    """The output of a program in a process of its own."""
    done = forked.run(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STATE = "import dense_attn; print(*set(dense_attn.backends()['{}'].values()), sep='; ')"


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
def test_an_unknown_instruction_set_is_named() -> None:
    """In the words of the call, which refuses it too."""
    state = run(STATE.format("cpu"), DENSE_ATTN_ISA="sse9")
    assert state.startswith("DENSE_ATTN_ISA must be one of ")
    assert state.endswith(", got sse9")
    program = "import torch, dense_attn\ntry: dense_attn.percentile_mask(torch.ones(1), 0.5, dim=0)"
    assert (
        run(
            f"{program}\nexcept RuntimeError as error: print(str(error).splitlines()[0])",
            DENSE_ATTN_ISA="sse9",
        )
        == state
    )


def test_a_flag_that_a_call_would_refuse_is_named() -> None:
    pytest.importorskip("triton")
    call = "dense_attn.backends()['triton']['layout_attention']"
    found = run(f"import dense_attn; print({call})", TRITON_INTERPRET="1", DENSE_ATTN_AUTOTUNE="ja")
    assert found == "DENSE_ATTN_AUTOTUNE must be 1 or 0, got 'ja'"


@pytest.mark.parametrize(
    ("value", "interprets"), [("1", True), ("True", True), ("0", False), ("", False)]
)
def test_the_interpreter_is_on_where_triton_says_so(value: str, interprets: bool) -> None:
    pytest.importorskip("triton")
    state = run(STATE.format("triton"), TRITON_INTERPRET=value, CUDA_VISIBLE_DEVICES="")
    on_cpu = torch.version.cuda is None and torch.version.hip is None
    reason = (
        "this build of torch knows no GPU, and TRITON_INTERPRET=1 is not set"
        if on_cpu
        else "no GPU on this machine"
    )
    assert state == ("available" if interprets else reason)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "__version__ = '3.5.1'",
            "needs Triton 3.6 or newer, got 3.5.1: pip install dense_attn[triton]",
        ),
        (
            "__version__ = '2.1'",
            "needs Triton 3.6 or newer, got 2.1: pip install dense_attn[triton]",
        ),
        ("__version__ = '3.10.0+git1'", "Triton does not load: "),
        (
            "raise OSError('libfoo.so: cannot open\\nand more')",
            "Triton does not load: libfoo.so: cannot open",
        ),
        ("", "Triton does not load: "),
    ],
)
def test_another_triton_does_not_take_the_library_along(
    source: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    state = run(STATE.format("triton"), PYTHONPATH=path, TRITON_INTERPRET="1")
    assert state.startswith(reason)
    assert "\n" not in state


def test_a_library_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "_backends" / "cpu.py"))
    assert cpu._load().startswith("the compiled library is missing: ")
    (tmp_path / "_C.so").write_bytes(b"no library")
    reason = cpu._load()
    assert reason.startswith("the compiled library does not load: ")
    assert "file too short" in reason or "invalid ELF header" in reason
    assert "\n" not in reason


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
def test_a_library_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of other arguments, which it would read wrongly, or without a kernel."""
    version, advice = "the compiled library is of another version", "install it again"
    monkeypatch.setitem(ops.OPS, "an_op_of_tomorrow", None)
    assert cpu._load() == f"{version}, without an_op_of_tomorrow: {advice}"
    monkeypatch.setattr(contract, "DIGEST", "of tomorrow")
    assert cpu._load() == f"{version}, with other arguments of its ops: {advice}"


def test_every_change_of_the_contract_is_another_version() -> None:
    """The digest that the build compiles in is that of the module, and names all of it."""
    path = Path(contract.__file__)
    source = path.read_text()
    for change in ("float scale,", '"bias"', "MAX_HEAD_DIM = 256", "STATS = 4"):
        assert source.count(change) >= 1
        changed: dict[str, object] = {"__name__": "changed"}
        exec(
            source.replace(change, change.replace("a", "o").replace("6", "7").replace("4", "5"), 1),
            changed,
        )
        assert changed["DIGEST"] != contract.DIGEST
