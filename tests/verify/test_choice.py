"""The order of "auto" on GPUs that are not here: their facts are made up, the table is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dense_attn.__main__ import main
from dense_attn._backends import choice, cuda, table

GPU = "NVIDIA A100"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for verdicts of its own, and a GPU of a name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(choice, "_found", {})
    return tmp_path


def there(
    dtype: torch.dtype = torch.float16, device: str = "cuda:0", head_dim: int = 64
) -> SimpleNamespace:
    place = torch.device(device)
    is_cuda, is_cpu = place.type == "cuda", place.type == "cpu"
    shape = 1, 8, 64, head_dim
    return SimpleNamespace(device=place, is_cuda=is_cuda, is_cpu=is_cpu, dtype=dtype, shape=shape)


def first(keys: int | None, dtype: torch.dtype = torch.float16, device: str = "cuda:0") -> str:
    return choice.order("layout_attention", there(dtype, device), keys)[0]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_where_nothing_is_verified_the_table_says(device: str) -> None:
    assert [first(keys, device=device) for keys in (0, 77, 128, 129, 1 << 40, None)] == [
        *("cuda", "cuda", "cuda", "triton", "triton", "triton")
    ]
    assert first(77, torch.float32, device) == "triton"
    assert choice.order("ddim_step", there(device=device))[:2] == ("triton", "cuda")


@pytest.mark.parametrize(
    ("triton", "cuda", "few", "many"),
    [  # verdicts; the order for few keys, and for many
        (None, None, "cuda triton cpu reference", "triton cuda cpu reference"),
        (True, True, "cuda triton cpu reference", "triton cuda cpu reference"),
        (True, None, "triton cuda cpu reference", "triton cuda cpu reference"),
        (None, True, "cuda triton cpu reference", "cuda triton cpu reference"),
        (True, False, "triton cpu reference cuda", "triton cpu reference cuda"),
        (False, True, "cuda cpu reference triton", "cuda cpu reference triton"),
        (False, None, "cuda cpu reference triton", "cuda cpu reference triton"),
        (None, False, "triton cpu reference cuda", "triton cpu reference cuda"),
        (False, False, "cpu reference cuda triton", "cpu reference triton cuda"),
    ],
)
def test_the_order(triton: bool | None, cuda: bool | None, few: str, many: str) -> None:
    """Verified backends, then those that nobody has checked, then wrong ones."""
    for backend, passed in (("triton", triton), ("cuda", cuda)):
        if passed is not None:
            choice.remember(backend, GPU, passed)
    for keys, expected in ((77, few), (4096, many)):
        assert choice.order("layout_attention", there(), keys) == tuple(expected.split())
    for op in ("percentile_mask", "sega_guidance", "ddim_step", "ReversibleSampler"):
        assert choice.order(op, there()) == tuple(many.split())
    assert choice.order("layout_attention", there(torch.float32), 77) == tuple(many.split())


@pytest.mark.parametrize(
    "rule",
    [rule for rule in choice.RULES if rule.op != choice.GRADIENT],  # which goes with its forward
    ids=lambda rule: f"{rule.op}-{rule.head_dims}",
)
def test_no_rule_is_ahead_of_a_verdict(rule: choice.Rule) -> None:
    """Whatever a rule says, what no GPU has verified is behind what one has."""
    dtype = (*rule.dtypes, torch.float32)[0]
    x = there(dtype, head_dim=(rule.head_dims or (64,))[0])
    keys = rule.keys and rule.keys[0]
    assert rule.takes(x.dtype, x.shape[-1], keys)
    assert choice.order(rule.op, x, keys)[0] == rule.backend
    (other,) = {*choice.GPU_BACKENDS} - {rule.backend}
    choice.remember(other, GPU, True)
    assert choice.order(rule.op, x, keys)[:2] == (other, rule.backend)
    choice.remember(rule.backend, GPU, True)
    assert choice.order(rule.op, x, keys)[:2] == (rule.backend, other)
    choice.remember(rule.backend, GPU, False)
    assert choice.order(rule.op, x, keys)[-1] == rule.backend


def test_one_rule_takes_each_call() -> None:
    """The ends of classes and of keys meet, so that no call in half floats falls between them."""
    for head_dim in range(1, 257):
        for keys in (0, 1, 128, 129, 1 << 40):
            x = there(torch.bfloat16, head_dim=head_dim)
            rules = [rule for rule in choice.RULES if rule.op == choice.ATTENTION]
            found = [rule for rule in rules if rule.takes(torch.bfloat16, head_dim, keys)]
            assert len(found) == 2  # the last is of all others
            expected = "cuda" if keys <= 128 else "triton"
            assert found[0].backend == expected
            assert choice.order("layout_attention", x, keys)[0] == expected


@pytest.mark.parametrize("major", [8, 9, 10, 12])
@pytest.mark.parametrize("head_dim", [8, 160, 168, 256])
@pytest.mark.parametrize("by_triton", [False, True])
def test_gradients_go_where_the_table_says(
    major: int, head_dim: int, by_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(
        cuda, "_has_kernel", lambda library, name: by_triton or library == "dense_attn_cuda"
    )
    q = there(head_dim=head_dim)
    found = {
        rule.backend
        for rule in choice.RULES
        if rule.op == choice.GRADIENT
        and rule.takes(q.dtype, head_dim, 77)
        and _is_of(rule.gpus, major)
    }
    assert len(found) == 1
    expected = found if by_triton else {"cuda" if head_dim <= 160 else "reference"}
    assert {cuda.gradient_of_attention(q)} == expected


def _is_of(gpus: str, major: int) -> bool:
    return gpus == "all" or (f"{major}.x" in gpus) != gpus.startswith("not")


@pytest.mark.parametrize("change", ["gpu", "version", "triton", "cuda", "compiler"])
@pytest.mark.parametrize("backend", choice.GPU_BACKENDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_verdict_belongs_to_what_it_was_found_on(
    change: str, backend: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU, the library's version, its kernels; Triton's too where they make CUDA's gradients."""
    facts = {"version": "0.1.0", "triton": "kernels", "cuda": "sources", "compiler": "3.9.0"}
    versions = {"dense_attn": "version", "triton": "compiler"}
    gpu = GPU
    monkeypatch.setattr(choice.metadata, "version", lambda package: facts[versions[package]])
    monkeypatch.setattr(choice, "kernel_hashes", lambda: {"fwd.py": facts["triton"]})
    monkeypatch.setattr(cuda, "sources", lambda: facts["cuda"])
    monkeypatch.setattr(cuda, "takes_gradients_of_triton", lambda: gradients)

    def found() -> bool | None:
        for remembered in (choice._kernels, choice._version):
            remembered.cache_clear()
        return choice.verdict(backend, gpu)

    assert found() is None
    choice.remember(backend, GPU, True)
    assert found() is True
    assert choice.gpus(backend) == {GPU: True}
    if change == "gpu":
        gpu = "NVIDIA H100"
    else:
        facts[change] = "other"
    concerns = {
        "triton": {"gpu", "version", "triton", "compiler"},
        "cuda": {"gpu", "version", "cuda"},
    }
    if gradients:
        concerns["cuda"] |= {"triton", "compiler"}
    assert found() is (None if change in concerns[backend] else True)
    assert (choice.gpus(backend) == {}) == (change in concerns[backend] - {"gpu"})
    for remembered in (choice._kernels, choice._version):
        remembered.cache_clear()


def test_the_version_of_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice._version_of("dense_attn_that_is_not_there") == ""


@pytest.mark.parametrize("passed", [None, True, False])
@pytest.mark.parametrize("keys", [77, 4096])
def test_a_compiled_call_chooses_as_any_other(
    passed: bool | None, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing has asked for a verdict before: it is read while the call is traced."""
    monkeypatch.setattr(table, "missing", lambda backend, op: None)
    monkeypatch.setattr(table, "why_not", lambda backend, op, x, *_: [])
    for backend in choice.GPU_BACKENDS[:1] if passed is not None else ():
        choice.remember(backend, GPU, passed)
    given, names = there(), choice.ORDER

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + names.index(table.resolve("auto", "layout_attention", given, keys))

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    zero = torch.zeros(())
    assert choice._found == {}
    found = compiled(zero)
    assert choice._found == {(name, 0): passed if name == "triton" else None for name in names[:2]}
    choice._found.clear()
    assert torch.equal(found, call(zero))
    few_keys_are_for_cuda = keys == 77 and passed is not True
    expected = "cuda" if few_keys_are_for_cuda or passed is False else "triton"
    assert names[int(found)] == expected
    torch.compiler.reset()


def test_a_compiled_call_asks_the_driver_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too old for the CUDA library leaves the call to others, compiled or not."""
    monkeypatch.setattr(table, "missing", lambda backend, op: None)
    monkeypatch.setattr(table, "_too_old", lambda device: None)
    monkeypatch.setattr(table, "device_of", lambda backend: "cuda")
    monkeypatch.setattr(cuda, "_said", {"driver_error": "needs a driver"}.get)
    monkeypatch.setattr(cuda, "_driver_errors", [])
    given, names = there(), choice.ORDER

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + names.index(table.resolve("auto", "layout_attention", given, 77))

    found = torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(()))
    assert names[int(found)] == names[int(call(torch.zeros(())))] == "triton"
    torch.compiler.reset()


def test_a_call_has_any_number_of_dimensions() -> None:
    assert choice.order("ddim_step", torch.zeros(()))[0] == "triton"
    wide = there(head_dim=1000)
    assert choice.order("layout_attention", wide, 77)[0] == "triton"


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    choice.remember("cuda", GPU, True)
    assert first(4096) == "cuda"
    monkeypatch.setattr(choice, "verdict", lambda *_: 1 / 0)
    assert first(4096) == "cuda"


def test_a_call_on_the_cpu_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "verdict", lambda *_: 1 / 0)
    assert first(77, device="cpu") == "cuda"


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "missing", lambda backend, op: None)
    monkeypatch.setattr(table, "why_not", lambda backend, op, x, *_: ["no"] * (backend == "cuda"))
    assert table.resolve("auto", "layout_attention", there(), 77) == "triton"
    monkeypatch.setattr(table, "why_not", lambda backend, op, x, *_: [])
    assert table.resolve("auto", "layout_attention", there(), 77) == "cuda"
    choice.remember("triton", GPU, True)
    monkeypatch.setattr(choice, "_found", {})
    assert table.resolve("auto", "layout_attention", there(), 77) == "triton"


def test_info_says_what_ran(capsys: pytest.CaptureFixture) -> None:
    main(["info"])
    assert capsys.readouterr().out.count("not run on a GPU\n") == 2
    choice.remember("triton", GPU, True)
    main(["info"])
    out = capsys.readouterr().out
    assert f"triton     right on {GPU}\n" in out
    assert "cuda       not run on a GPU\n" in out
    for rule in choice.RULES:
        assert any(rule.op in line and line.endswith(rule.evidence) for line in out.splitlines())
    assert "161 to 256  0 to 128  all" in out
    assert "measured on" not in out  # nothing has been


def test_verify_remembers_the_backends_of_gpus(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from dense_attn.verify import run
    from dense_attn.verify.accuracy import Verdict

    def verdict(backend: str, error: float) -> Verdict:
        return Verdict(backend, "float16", "range", {"out": error}, control=2.0)

    def rows(*verdicts: Verdict) -> Callable[[object], list[Verdict]]:
        return lambda *_: list(verdicts)

    devices = {"triton": "cuda", "cuda": "cuda"}
    monkeypatch.setattr(table, "device_of", lambda backend: devices.get(backend, "cpu"))
    monkeypatch.setattr(run, "_attention", rows(verdict("triton", 0.5), verdict("cpu", 0.5)))
    monkeypatch.setattr(run.calls, "kernel_calls", lambda backends: iter(()))
    monkeypatch.setattr(run, "_others", rows(verdict("triton", 0.5), verdict("cuda", 1.5)))
    monkeypatch.setattr(run, "why_not", lambda *_: [])
    assert run.main() == 1
    assert "remembered: cuda FAILED on NVIDIA A100\n" in capsys.readouterr().out
    assert choice.gpus("triton") == {GPU: True}
    assert choice.gpus("cuda") == {GPU: False}
    assert choice.gpus("cpu") == {}


def test_a_backend_with_an_op_that_was_not_checked_is_not_right(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dense_attn.verify import run
    from dense_attn.verify.accuracy import Verdict

    reasons = {"layout_attention": ["a variable that means nothing"]}
    monkeypatch.setattr(run, "why_not", lambda backend, op, dtype: reasons.get(op, []))
    monkeypatch.setattr(table, "missing", lambda backend, op: None)
    monkeypatch.setattr(table, "device_of", lambda backend: "cuda")
    checked = Verdict("triton", "float16", "ddim_step", {"bits": 0.0}, control=2.0)
    run._remember([checked])
    assert choice.gpus("triton") == {}
    reasons.clear()
    run._remember([checked])
    assert choice.gpus("triton") == {GPU: True}
