"""Properties by definition, on random problems, of the reference and of every kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from case_tensors import SIGN_BIT
from cases import MODULATIONS, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn import layout_attention, reference

every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu"))
properties = settings(max_examples=25, deadline=None, derandomize=True, database=None)
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, q_regions, k_regions
STRENGTHS = st.floats(-1, 2.5, width=32)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    batch, num_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seqlen_q, seqlen_k = draw(st.integers(1, 70)), draw(st.integers(1, 130))
    head_dim = draw(st.sampled_from([1, 7, 16, 40]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q, k, v = (
        torch.randn(batch, num_heads, n, head_dim, dtype=dtype, generator=generator)
        for n in (seqlen_q, seqlen_k, seqlen_k)
    )
    num_regions = draw(st.integers(0, 5))
    q_regions, k_regions = (
        torch.randint(0, 2**num_regions, (n,), dtype=torch.int32, generator=generator)
        for n in (seqlen_q, seqlen_k)
    )
    return q, k, v, q_regions, k_regions


def assert_equal_to_rounding(result: Tensor, expected: Tensor) -> None:
    """Two ways to the same number differ by a few roundings of it."""
    assert result.shape == expected.shape
    where = expected.isfinite()
    assert torch.equal(where, result.isfinite())
    allowed = (
        64
        * torch.finfo(result.dtype).eps
        * max(1.0, expected[where].abs().max().item() if where.any() else 1.0)
    )
    error = (result - expected)[where].abs()
    assert not error.numel() or error.max() <= allowed, (
        f"off by {error.max():.3g}, allowed {allowed:.3g}"
    )


def attend(
    problem: Problem, strength: float | Tensor, modulation: str, backend: str, **options: object
) -> tuple:
    return layout_attention(
        *problem, strength, modulation=modulation, backend=backend, return_lse=True, **options
    )


def test_the_reference_is_the_definition() -> None:
    """maths.md 1.1 written out in numpy, the formula as the papers have it."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, n, 8)) for n in (11, 13, 13))
    q_regions, k_regions = (rng.integers(0, 8, n, dtype=np.int32) for n in (11, 13))
    c = rng.uniform(-0.5, 1.8, (11, 1))
    s = q @ k.swapaxes(2, 3) * 8**-0.5
    matched = (q_regions[:, None] & k_regions[None, :]) != 0
    top, bottom = s.max(-1, keepdims=True), s.min(-1, keepdims=True)
    modulated = {
        "range": s + c * matched * (top - s) - c * ~matched * (s - bottom),
        "max": s + c * matched * top,
        "bias": s + c * matched,
        "mask": np.where(matched, s, -np.inf),
    }
    for modulation, scores in modulated.items():
        total = np.exp(scores).sum(-1)
        out, lse = reference.layout_attention(
            *(torch.from_numpy(x) for x in (q, k, v, q_regions, k_regions, c[:, 0])),
            modulation=modulation,
        )
        expected = np.exp(scores) @ v / np.where(total == 0, 1, total)[..., None]
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-14)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(lse.numpy(), np.log(total), rtol=1e-12, atol=1e-14)


@every_backend
@given(problem=problems(), modulation=st.sampled_from(["range", "max", "bias"]))
@properties
def test_no_strength_is_plain_attention(backend: str, problem: Problem, modulation: str) -> None:
    out, _ = attend(problem, 0.0, modulation, backend)
    assert_equal_to_rounding(out, scaled_dot_product_attention(*problem[:3]))


@every_backend
@given(problem=problems(), strength=STRENGTHS, word=st.sampled_from([0, 1, SIGN_BIT, -1]))
@properties
def test_uniform_regions_are_a_temperature(
    backend: str, problem: Problem, strength: float, word: int
) -> None:
    q, k, v, q_regions, k_regions = problem
    q_regions, k_regions = torch.full_like(q_regions, word), torch.full_like(k_regions, word)
    scale = q.shape[-1] ** -0.5
    out, _ = attend((q, k, v, q_regions, k_regions), strength, "range", backend)
    assert_equal_to_rounding(
        out, scaled_dot_product_attention(q, k, v, scale=scale * (1 - strength))
    )


@every_backend
@given(problem=problems(), strength=STRENGTHS)
@properties
def test_a_full_mask_is_plain_attention(backend: str, problem: Problem, strength: float) -> None:
    q, k, v, q_regions, k_regions = problem
    out, _ = attend((q, k, v, q_regions | 1, k_regions | 1), strength, "mask", backend)
    assert_equal_to_rounding(out, scaled_dot_product_attention(q, k, v))


@every_backend
@given(
    problem=problems(),
    strength=STRENGTHS,
    modulation=st.sampled_from(MODULATIONS),
    seed=st.integers(0, 99),
)
@properties
def test_the_order_of_the_keys_changes_nothing(
    backend: str, problem: Problem, strength: float, modulation: str, seed: int
) -> None:
    q, k, v, q_regions, k_regions = problem
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed))
    expected = attend(problem, strength, modulation, backend)
    permuted = attend(
        (q, k[:, :, order], v[:, :, order], q_regions, k_regions[order]),
        strength,
        modulation,
        backend,
    )
    for result, other in zip(permuted, expected):
        assert_equal_to_rounding(result, other)


@every_backend
@given(
    problem=problems(),
    strength=STRENGTHS,
    modulation=st.sampled_from(MODULATIONS),
    seed=st.integers(0, 99),
)
@properties
def test_the_order_of_visits_changes_nothing(
    backend: str, problem: Problem, strength: float, modulation: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    orders = {
        f"{name}_order": torch.randperm(problem[index].shape[2], generator=generator).int()
        for name, index in (("q", 0), ("k", 1))
    }
    expected = attend(problem, strength, modulation, backend)
    for result, other in zip(attend(problem, strength, modulation, backend, **orders), expected):
        assert_equal_to_rounding(result, other)


@every_backend
@given(
    problem=problems(),
    strength=STRENGTHS,
    modulation=st.sampled_from(["bias", "mask"]),
    share=st.floats(0, 1),
)
@properties
def test_parts_of_the_keys_merge_into_the_whole(
    backend: str, problem: Problem, strength: float, modulation: str, share: float
) -> None:
    q, k, v, q_regions, k_regions = problem
    cut = round(share * k.shape[2])
    parts = [
        attend(
            (q, k[:, :, part], v[:, :, part], q_regions, k_regions[part]),
            strength,
            modulation,
            backend,
        )
        for part in (slice(None, cut), slice(cut, None))
    ]
    out, lse = attend(problem, strength, modulation, backend)
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    assert_equal_to_rounding(merged, lse)
    weights = [
        (part_lse - merged).exp().nan_to_num(0) for _, part_lse in parts
    ]  # a row without keys weighs nothing
    assert_equal_to_rounding(
        sum(weight[..., None] * part for weight, (part, _) in zip(weights, parts)), out
    )


@every_backend
@given(problem=problems(), strength=STRENGTHS)
@properties
def test_range_is_a_temperature_and_a_gap(backend: str, problem: Problem, strength: float) -> None:
    """maths.md 1.2: softmax((1-c)*s + c*(max-min)*R), and c*min in the lse."""
    q, k = problem[:2]
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.mT) * scale
    bottom = scores.amin(-1)
    gap = strength * (scores.amax(-1) - bottom)  # [B, H, M]
    expected, expected_lse = attend(problem, gap, "bias", backend, scale=scale * (1 - strength))
    out, lse = attend(problem, strength, "range", backend)
    assert_equal_to_rounding(out, expected)
    assert_equal_to_rounding(lse, expected_lse + strength * bottom)


@every_backend
@given(problem=problems(), strength=STRENGTHS, modulation=st.sampled_from(MODULATIONS))
@properties
def test_the_output_is_a_mean_of_the_values(
    backend: str, problem: Problem, strength: float, modulation: str
) -> None:
    q, _, v, q_regions, k_regions = problem
    out, _ = attend(problem, strength, modulation, backend)
    low, high = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    margin = 64 * torch.finfo(q.dtype).eps * v.abs().max()
    if modulation == "mask":
        without = (q_regions[:, None] & k_regions[None]).eq(0).all(1)
        assert out[:, :, without].eq(0).all()
        out = out[:, :, ~without]
    assert (out >= low - margin).all()
    assert (out <= high + margin).all()


@every_backend
@given(
    problem=problems(),
    strength=STRENGTHS,
    modulation=st.sampled_from(MODULATIONS),
    turn=st.integers(1, 31),
)
@properties
def test_the_names_of_the_regions_change_nothing(
    backend: str, problem: Problem, strength: float, modulation: str, turn: int
) -> None:
    def renamed(words: Tensor) -> Tensor:
        words = words.long()
        return ((words << turn) | (words >> (32 - turn))).to(
            torch.int32
        )  # bits leave on the left, return on the right

    expected = attend(problem, strength, modulation, backend)
    turned = attend(
        (*problem[:3], renamed(problem[3]), renamed(problem[4])), strength, modulation, backend
    )
    for result, other in zip(turned, expected):
        assert torch.equal(result, other)


@every_backend
@given(
    problem=problems(),
    strength=STRENGTHS,
    modulation=st.sampled_from(MODULATIONS),
    row=st.integers(0, 69),
)
@properties
def test_a_row_depends_on_itself_alone(
    backend: str, problem: Problem, strength: float, modulation: str, row: int
) -> None:
    q, k, v, q_regions, k_regions = problem
    row %= q.shape[2]
    whole = attend(problem, strength, modulation, backend)
    alone = attend(
        (q[:, :, row : row + 1], k, v, q_regions[row : row + 1], k_regions),
        strength,
        modulation,
        backend,
    )
    for result, other in zip(alone, whole):
        assert_equal_to_rounding(result, other[:, :, row : row + 1])


@every_backend
@properties
@given(problems(), st.integers(1, 8))
def test_numbers_that_are_none_stay_behind_the_mask(
    backend: str, problem: Problem, last: int
) -> None:
    """NaN and infinity in keys that a row does not see: the row is the same to the bit, others of
    its tile too.
    """
    q, k, v, q_regions, k_regions = problem
    clean = attend(problem, 1.0, "mask", backend)
    dirty = k.clone()
    dirty[:, :, -last:] = torch.tensor((torch.nan, torch.inf)).repeat(4)[
        : dirty[0, 0, -last:].shape[0], None
    ]
    got = attend((q, dirty, v, q_regions, k_regions), 1.0, "mask", backend)
    unseen = ~((q_regions[:, None] & k_regions[-last:]) != 0).any(1)
    for result, expected in zip(got, clean):
        assert torch.equal(result[:, :, unseen], expected[:, :, unseen])
