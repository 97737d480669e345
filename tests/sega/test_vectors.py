"""Guidance vectors that one run kept and another adds: the same step, and what is refused."""

from __future__ import annotations

import io

import pytest
import torch
from cases import backends
from torch import Tensor

from dense_attn import SemanticGuidance, sega_guidance

STEPS = 6
RULES = {  # none warm, one warm, two of three warm, all warm, one over, all over
    "edit_warmup_steps": [1, 2, 3],
    "edit_cooldown_steps": [4, 5, 5],
    "edit_weights": [1.0, 0.5, 2.0],
    "edit_threshold": [0.9, 0.5, 0.0],
    "reverse_editing_direction": [False, True, False],
    "edit_momentum_scale": 0.3,
}
every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))


def estimates(seed: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    uncond, text, *edits = torch.randn(5, batch, 4, 5, 7, generator=generator).to(dtype)
    return uncond, text, torch.stack(edits)


def run(guidance: SemanticGuidance, **options: object) -> list[Tensor]:
    return [guidance(step, *estimates(step, **options)) for step in range(STEPS)]


def plainly(guidance: SemanticGuidance, batch: int = 1, dtype: torch.dtype = torch.float32) -> list:
    """A run without concepts."""
    steps = [estimates(step, dtype, batch)[:2] for step in range(STEPS)]
    return [guidance(step, *pair) for step, pair in enumerate(steps)]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_run_that_vectors_are_of_gets_its_bits_from_them(
    dtype: torch.dtype, backend: str
) -> None:
    guidance = SemanticGuidance(**RULES, backend=backend)
    vectors = guidance.record()
    recorded = run(guidance, dtype=dtype)
    assert [step for step, _ in vectors] == list(range(STEPS))
    assert vectors[0][1] is None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {vector.dtype for _, vector in vectors[1:]} == {wide}
    applied = plainly(SemanticGuidance(apply=vectors, backend=backend), dtype=dtype)
    assert all(map(torch.equal, applied, recorded))
    without = run(SemanticGuidance(**RULES, backend=backend), dtype=dtype)
    apart = [i for i, pair in enumerate(zip(recorded, without)) if not torch.equal(*pair)]
    assert set(apart) <= {2}  # two concepts there, and one that warms up
    torch.testing.assert_close(recorded[2], without[2], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@every_backend
def test_a_vector_is_what_the_formula_adds(backend: str) -> None:
    """To the estimates of another image, also beside concepts of its own."""
    guidance = SemanticGuidance(**RULES, backend=backend)
    vectors = guidance.record()
    run(guidance)
    own = {"edit_warmup_steps": 0, "edit_threshold": 0.5}
    both = SemanticGuidance(**own, apply=vectors, backend=backend)
    alone = SemanticGuidance(**own, backend=backend)
    for step, (_, vector) in enumerate(vectors):
        other = estimates(100 + step)
        expected = alone(step, *other) + (0 if vector is None else vector)
        torch.testing.assert_close(both(step, *other), expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(both.momentum, alone.momentum)  # the concepts' own


def test_one_sample_is_for_a_batch_and_a_double_call_has_two_vectors() -> None:
    guidance = SemanticGuidance(edit_warmup_steps=0)
    vectors, steps = guidance.record("cpu"), [0, 1, 1, 2]
    for call, step in enumerate(steps):
        guidance(step, *estimates(call))
    assert [step for step, _ in vectors] == steps
    other = SemanticGuidance(apply=vectors)
    for call, step in enumerate(steps):
        uncond, text, _ = estimates(call, batch=3)
        eps = other(step, uncond, text)
        assert torch.equal(eps, uncond + 7.5 * (text - uncond) + vectors[call][1])


def test_one_run_is_recorded_and_no_graph_is_kept() -> None:
    guidance = SemanticGuidance(**RULES)
    vectors = guidance.record()
    uncond, text, edits = estimates(0)
    guidance(4, uncond, text, edits.requires_grad_()).sum().backward()
    assert edits.grad.count_nonzero() > 0
    assert not vectors[0][1].requires_grad
    run(guidance)
    assert len(vectors) == 1
    again = guidance.record()
    guidance.reset()
    run(guidance)
    run(guidance)
    assert len(again) == STEPS


def test_vectors_are_saved_and_changed_as_what_they_are() -> None:
    guidance, file = SemanticGuidance(**RULES), io.BytesIO()
    vectors = guidance.record()
    run(guidance)
    torch.save(vectors, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expected = plainly(SemanticGuidance(apply=vectors))
    assert all(map(torch.equal, plainly(SemanticGuidance(apply=loaded)), expected))
    none = [(step, None if vector is None else 0 * vector) for step, vector in vectors]
    plain = plainly(SemanticGuidance())
    assert all(map(torch.equal, plainly(SemanticGuidance(apply=none)), plain))
    assert not torch.equal(expected[-2], plain[-2])


@pytest.mark.parametrize(
    ("apply", "kind", "sentence"),
    [
        (torch.zeros(3), TypeError, "apply must be the list that record"),
        ([torch.zeros(3)], TypeError, "apply must be the list that record"),
        ([(True, None)], TypeError, "apply must be the list that record"),
        ([], ValueError, "apply must hold the vectors of a run, got none"),
        (
            [(0, None), (-1, None)],
            ValueError,
            r"apply\[1\] must be of a step of at least 0, got",
        ),
        ([(0, torch.zeros(2, dtype=torch.cfloat))], TypeError, r"apply\[0\] must be .*, got compl"),
        ([(0, torch.zeros(2, dtype=torch.int64))], TypeError, r"apply\[0\] must be .*, got int64"),
        ([(0, torch.zeros(2, dtype=torch.bool))], TypeError, r"apply\[0\] must be .*, got bool"),
        ([(0, torch.zeros(2, 2).to_sparse())], TypeError, r"apply\[0\] must be a strided tensor"),
        (
            [(0, torch.zeros(2, device="meta"))],
            ValueError,
            r"apply\[0\] must hold values, got a",
        ),
    ],
)
def test_wrong_vectors_are_refused(apply: object, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        SemanticGuidance(apply=apply)


@pytest.mark.parametrize("device", ["nonsense", "meta", 5.5, "cuda:99", "privateuseone"], ids=str)
def test_a_place_for_vectors_that_is_not_there_is_refused(device: object) -> None:
    guidance = SemanticGuidance()
    before = guidance.record()
    kind = TypeError if device == 5.5 else ValueError
    with pytest.raises(kind, match=f"device must be a device .*, got {device!r}"):
        guidance.record(device)
    guidance(0, *estimates(0))
    assert len(before) == 1  # what was asked for is recorded


@every_backend
def test_steered_by_nothing_an_estimate_keeps_its_bits(backend: str) -> None:
    """Also its -0.0 and inf, which a sum would change; vectors there are None."""
    odd = torch.full((1, 4, 5, 7), -0.0)
    odd[0, 0, 0, 0] = torch.inf
    uncond, _, edits = estimates(0)
    warm = SemanticGuidance(apply=[(0, None), (1, None)], backend=backend)
    vectors = warm.record()
    cold = SemanticGuidance(edit_warmup_steps=2, backend=backend)
    for step in range(2):
        for eps in (warm.steer(step, odd, uncond), cold.steer(step, odd, uncond, edits)):
            assert torch.equal(eps.view(torch.int32), odd.view(torch.int32))
    assert vectors == [(0, None), (1, None)]
    carried = SemanticGuidance(backend=backend)
    carried.momentum = torch.ones(1, 4, 5, 7)
    assert torch.equal(carried.steer(1, uncond, uncond), uncond + 0.1)  # is something


def test_vectors_of_another_run_are_refused_and_move_nothing() -> None:
    vector = torch.zeros(2, 4, 5, 7)
    guidance = SemanticGuidance(apply=[(0, vector), (1, vector[..., :6])])
    two, three = estimates(0, batch=2)[:2], estimates(0, batch=3)[:2]
    recorded = guidance.record()
    for step, pair, sentence in (
        (0, three, r"apply must hold vectors of the estimates' shape \(3, 4, 5, 7\)"),
        (1, two, "apply must hold vectors of the estimates' shape"),
        (2, two, "apply must hold a vector for each call of step 2, got 0, for steps 0 to 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            guidance(step, *pair)
    assert guidance.momentum is None
    assert not recorded


def test_the_public_step_is_the_reference_of_it() -> None:
    """The vector of a first step, where all are warm, is the difference of two public calls."""
    uncond, text, edits = (x.double() for x in estimates(0))
    options = {"guidance_scale": 2.0, "edit_guidance_scale": 5.0, "edit_threshold": 0.9}
    rules = {"warm": True, "enabled": True, "reverse": False, "edit_weights": 1.0}
    last = {"edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    eps, _ = sega_guidance(uncond, text, edits, None, **options, **rules, **last)
    guidance = SemanticGuidance(guidance_scale=2.0, edit_warmup_steps=0)
    vectors = guidance.record()
    guidance(0, uncond, text, edits)
    plain = uncond + 2.0 * (text - uncond)
    torch.testing.assert_close(vectors[0][1], eps - plain, rtol=0, atol=1e-12)
