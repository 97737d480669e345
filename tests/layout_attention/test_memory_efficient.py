"""xformers' shapes and names: what a LayoutBias is as a tensor, in slices, and in a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn import LayoutBias, layout_attention, memory_efficient_attention

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 12, 9, 16
EVERY = torch.ones(1, dtype=torch.int32)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k and v in xformers' shape."""
    generator = torch.Generator().manual_seed(0)
    sizes = QUERIES, KEYS, KEYS
    return tuple(torch.randn(BATCH, n, HEADS, WIDTH, generator=generator).to(dtype) for n in sizes)


def bias_of(modulation: str, dtype: torch.dtype = torch.float64) -> LayoutBias:
    """Words of each sample, of three regions of which every query meets one, and strengths."""
    generator = torch.Generator().manual_seed(1)
    q_regions = 1 << torch.randint(0, 3, (BATCH, QUERIES), generator=generator).int()
    k_regions = torch.randint(0, 8, (BATCH, KEYS), generator=generator).int()
    k_regions[:, :3] = torch.tensor([1, 2, 4])  # no row sees nothing
    strength = torch.rand(BATCH, HEADS, QUERIES, generator=generator, dtype=dtype)
    return LayoutBias(q_regions, k_regions, strength, modulation=modulation)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), bias)
    return out.transpose(1, 2)


@pytest.mark.parametrize("modulation", ["bias", "mask"])
def test_the_tensor_of_a_bias_has_the_same_result_and_gradients(modulation: str) -> None:
    """To float64's rounding of sums of a few terms of size 1."""
    given, bias = inputs(), bias_of(modulation)
    shape = (BATCH, HEADS, QUERIES, KEYS)
    results = []
    for attend in (
        lambda *qkv: memory_efficient_attention(*qkv, attn_bias=bias),
        lambda *qkv: sdpa(*qkv, bias.materialize(shape, torch.float64)),
    ):
        leaves = [x.clone().requires_grad_() for x in given]
        out = attend(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, right in zip(*results):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("modulation", ["range", "max", "bias", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_layout_attention(modulation: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    bias = bias_of(modulation, torch.float32)
    out = memory_efficient_attention(q, k, v, bias, 0.0, 0.3)
    words = bias.q_regions, bias.k_regions, bias.strength
    views = (x.transpose(1, 2) for x in (q, k, v))
    right = layout_attention(*views, *words, modulation=modulation, scale=0.3)
    assert torch.equal(out, right.transpose(1, 2))
    assert out.is_contiguous()
    assert out.dtype == dtype


def test_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from dense_attn.layout_attention import memory_efficient

    seen: list[Tensor] = []

    def attend(*tensors: Tensor, **_: object) -> Tensor:
        seen.extend(tensors[:3])
        return tensors[0]

    monkeypatch.setattr(memory_efficient, "layout_attention", attend)
    given = inputs()
    memory_efficient_attention(*given, attn_bias=bias_of("range"))
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in given]


@pytest.mark.parametrize("modulation", ["bias", "mask"])
@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(3, 8)),
        (..., slice(2, 7)),
        (slice(1, 2), slice(0, 2), ..., slice(0, 5)),
        slice(0, 1),
        (slice(None), slice(None), slice(None, None, 2), slice(1, None, 3)),
    ],
)
def test_slices_are_those_of_the_tensor(modulation: str, index: object) -> None:
    bias = bias_of(modulation)
    whole = bias.materialize((BATCH, HEADS, QUERIES, KEYS), torch.float64)
    part = bias[index]
    expected = whole[index]
    assert torch.equal(part.materialize(expected.shape, torch.float64), expected)


def test_a_slice_of_queries_is_a_part_of_the_result() -> None:
    """Under every rule: a query's row knows of no other query."""
    q, k, v = inputs()
    for modulation in ("range", "max", "bias", "mask"):
        bias = bias_of(modulation)
        whole = memory_efficient_attention(q, k, v, attn_bias=bias)
        part = memory_efficient_attention(q[:, 4:9], k, v, attn_bias=bias[:, :, 4:9])
        torch.testing.assert_close(part, whole[:, 4:9], rtol=0, atol=1e-14)


def test_the_shape_says_what_is_shared() -> None:
    words = torch.ones(QUERIES, dtype=torch.int32)
    bias = LayoutBias(words, words[:KEYS])
    assert bias.shape == (1, 1, QUERIES, KEYS)
    assert bias_of("range").shape == (BATCH, HEADS, QUERIES, KEYS)
    assert bias[1:2, 2:3].shape == (1, 1, QUERIES, KEYS)  # which all samples and heads share
    assert bias.materialize is not None
    assert bias_of("bias").to("meta").device.type == "meta"
    assert "range" in repr(bias)


def test_materialize_takes_shapes_without_heads() -> None:
    words = torch.tensor([1, 2], dtype=torch.int32)
    bias = LayoutBias(words, words, 0.25, modulation="bias")
    expected = torch.eye(2) * 0.25
    assert torch.equal(bias.materialize((2, 2)), expected)
    assert torch.equal(bias.materialize((3, 2, 2)), expected.expand(3, 2, 2))
    assert bias.materialize((2, 2), torch.bfloat16, "meta").device.type == "meta"


def test_inputs_without_heads_have_one() -> None:
    q, k, v = (x[:, :, 0] for x in inputs())
    words = bias_of("bias")[:, :1]
    out = memory_efficient_attention(q, k, v, attn_bias=words)
    right = memory_efficient_attention(*(x[:, :, None] for x in (q, k, v)), attn_bias=words)
    assert torch.equal(out, right[:, :, 0])


def test_without_a_bias_it_is_plain_attention() -> None:
    q, k, v = inputs()
    out = memory_efficient_attention(q, k, v)
    zeros = torch.zeros(QUERIES, KEYS, dtype=torch.float64)
    torch.testing.assert_close(out, sdpa(q, k, v, zeros), rtol=0, atol=1e-14)
    grouped = memory_efficient_attention(q, k[:, :, :1], v[:, :, :1])
    everyone = (x[:, :, :1].expand(x.shape) for x in (k, v))
    torch.testing.assert_close(grouped, sdpa(q, *everyone, zeros), rtol=0, atol=1e-14)


def test_without_a_bias_a_named_backend_runs_or_raises() -> None:
    q, k, v = inputs()
    out = memory_efficient_attention(q, k, v, backend="reference")
    words = (torch.zeros(n, dtype=torch.int32) for n in (QUERIES, KEYS))
    none = LayoutBias(*words, 0.0, modulation="bias")
    assert torch.equal(out, memory_efficient_attention(q, k, v, none, backend="reference"))
    plain = memory_efficient_attention(q, k, v)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match="cuda"):
        memory_efficient_attention(q, k, v, backend="cuda")


def test_tile_lists_are_made_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU has any: what makes them is put in, and counted."""
    from dense_attn.layout_attention import memory_efficient

    made: list[str] = []
    monkeypatch.setattr(memory_efficient, "tile_lists", lambda *_, backend: made.append(backend))
    bias, (q, k, _) = bias_of("range"), inputs()
    for _ in range(2):
        assert bias.tile_lists(q, k, "auto") is None
    bias.tile_lists(q.float(), k.float(), "auto")
    assert len(made) == 2


class LowerTriangularMask:
    """A bias of xformers' by its name."""


def refusal(**changed: object) -> str:
    q, k, v = inputs()
    given = {"query": q, "key": k, "value": v, "attn_bias": bias_of("range")} | changed
    with pytest.raises((ValueError, TypeError)) as refused:
        memory_efficient_attention(**given)
    return str(refused.value)


def test_calls_are_refused_in_one_sentence() -> None:
    q = inputs()[0]
    assert refusal(p=0.1) == "p must be 0: there is no dropout, got 0.1"
    assert refusal(op=len).startswith("op must be None: backend names the kernels, got ")
    said = "output_dtype must be None: the result has query's, got torch.float32"
    assert refusal(output_dtype=torch.float32) == said
    assert refusal(attn_bias=LowerTriangularMask()).endswith("got LowerTriangularMask")
    assert refusal(attn_bias=torch.zeros(1)).endswith("got Tensor")
    assert refusal(query=q[None]).startswith("query must have the shape [B, tokens, H, K]")
    assert refusal(query=q[0]).startswith("query, key and value must have heads all")
    assert refusal(query=None) == "query must be a tensor, got NoneType"
    assert refusal(attn_bias=bias_of("range")[:, :, 1:]).startswith("q_regions must have shape")


def test_xformers_keywords_are_taken() -> None:
    given, bias = inputs(), bias_of("range")
    out = memory_efficient_attention(*given, attn_bias=bias, p=0.0, op=None, output_dtype=None)
    assert torch.equal(out, memory_efficient_attention(*given, bias))


@pytest.mark.parametrize(
    "changed",
    [
        {"backend": "nonsense"},
        {"backend": ["auto"]},
        {"scale": float("nan")},
        {"scale": "a"},
        {"key": inputs()[1][:1]},
        {"key": inputs()[1][:, :, :2], "value": inputs()[2][:, :, :2]},
        {"value": inputs()[2][..., :8]},
        {"value": inputs()[2].float()},
        {"query": inputs()[0].int()},
    ],
    ids=["backend", "backends", "nan", "word", "samples", "heads", "width", "dtype", "ints"],
)
def test_calls_without_a_bias_are_refused_as_those_with_one(changed: dict[str, object]) -> None:
    q, k = (torch.zeros(n, dtype=torch.int32) for n in (QUERIES, KEYS))
    said = refusal(attn_bias=None, **changed)
    assert " must " in said
    assert said == refusal(attn_bias=LayoutBias(q, k, 0.0), **changed)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ((EVERY.long(), EVERY), "q_regions must be int32, got int64"),
        ((EVERY, EVERY[None, None]), "k_regions must have shape [tokens]"),
        ((EVERY, EVERY, torch.ones(2)), "strength must broadcast to [B, H, 1], got (2,)"),
        ((EVERY, EVERY, "1"), "strength must be a number or a tensor, got str"),
        ((EVERY.expand(2, 1), EVERY.expand(3, 1)), "k_regions must have 1 or 2 samples, got 3"),
    ],
)
def test_biases_are_refused_in_one_sentence(given: tuple, rule: str) -> None:
    with pytest.raises((ValueError, TypeError)) as refused:
        LayoutBias(*given)
    assert rule in str(refused.value)


def test_what_a_bias_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match='modulation must be "bias" or "mask"'):
        bias_of("range").materialize((BATCH, HEADS, QUERIES, KEYS))
    with pytest.raises(ValueError, match="shape must be one to which"):
        bias_of("bias").materialize((BATCH, HEADS, QUERIES, KEYS + 1))
    with pytest.raises(ValueError, match="index must be slices of samples, heads"):
        bias_of("bias")[0]
    with pytest.raises(ValueError, match="modulation must be one of"):
        LayoutBias(EVERY, EVERY, modulation="causal")


def test_it_compiles_without_a_graph_break() -> None:
    given = inputs(torch.float32)
    bias = bias_of("range", torch.float32)

    def attend(*qkv: Tensor) -> Tensor:
        return memory_efficient_attention(*qkv, attn_bias=bias)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), attend(*given))
