"""The hook at the softmax of attention layers, on single layers of diffusers'."""

from __future__ import annotations

import functools
import inspect
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from dense_attn.integrations.diffusers import _attention_hook as hook

attention_processor = pytest.importorskip("diffusers.models.attention_processor")
from diffusers.models import attention_dispatch  # noqa: E402
from diffusers.models.transformers.transformer_flux import (  # noqa: E402
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)

pytestmark = pytest.mark.usefixtures("one_thread")
REGISTRY = attention_dispatch._AttentionBackendRegistry._backends
X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


class Mark:
    """A mark that notes what it gets; the rows meant become zeros, or `factor` in all places."""

    def __init__(self, expected: hook.Expected | None, factor: float = 0.0) -> None:
        self._expected, self.factor = expected, factor
        self.calls: list[tuple] = []
        self.seen: list | None = None

    def expected(self) -> hook.Expected | None:
        return self._expected

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: object) -> Tensor:
        self.mask = mask
        if not torch.compiler.is_compiling():
            self.calls.append((q.shape, k.shape, scale))
        return torch.zeros_like(q) + self.factor

    def missed(self, seen: list) -> None:
        self.seen = seen


def unet_layer(processor: object = None, cross: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    return attention_processor.Attention(
        16, 16 if cross else None, heads=2, dim_head=8, bias=True, processor=processor
    ).eval()


def flux_layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return FluxAttention(16, heads=2, dim_head=8, bias=True, processor=FluxAttnProcessor()).eval()


LAYERS = {"sdpa": unet_layer, "dispatch": flux_layer}
every_point = pytest.mark.parametrize("layer", [make() for make in LAYERS.values()], ids=LAYERS)


def points() -> tuple:
    """The entries that stand at the two points now."""
    return dict(REGISTRY), attention_processor.F


def output(layer: torch.nn.Module, attention: float = 0.0) -> Tensor:
    """A layer's output in a row whose attention is one number; FLUX's is projected later."""
    row = torch.full((6, 16), attention)
    return row if isinstance(layer, FluxAttention) else layer.to_out[0](row)


@every_point
@torch.no_grad()
def test_the_rows_meant_are_exchanged_and_others_have_their_bits(layer: torch.nn.Module) -> None:
    plain = layer(X)
    for first, last in ((0, 3), (1, 3), (0, 1), (1, 2)):
        mark = Mark(hook.Expected(first, last, 6, 6))
        with hook.marked([(layer, mark)]):
            out = layer(X)
        assert mark.calls == [((last - first, 2, 6, 8), (last - first, 2, 6, 8), None)]
        for row in range(3):
            meant = first <= row < last
            assert torch.equal(out[row], output(layer) if meant else layer(X)[row])
    assert torch.equal(layer(X), plain)


@every_point
@torch.no_grad()
def test_everything_is_restored(layer: torch.nn.Module) -> None:
    before, kind, own = points(), type(layer.processor), set(vars(layer))
    mark = Mark(hook.Expected(0, 3, 6, 6))
    with hook.marked([(layer, mark)]):
        assert points() != before
        assert hook.is_marked(layer.processor)
        assert isinstance(layer.processor, kind)
        assert inspect.signature(layer.processor.__call__) == inspect.signature(kind().__call__)
    with pytest.raises(ZeroDivisionError), hook.marked([(layer, mark)]):
        raise ZeroDivisionError
    blocks = [hook.marked([(layer, Mark(None))]) for _ in range(3)]
    for block in blocks:
        block.__enter__()
    for block in (blocks[1], blocks[0], blocks[2]):
        assert points() != before
        block.__exit__(None, None, None)
    assert points() == before
    assert type(layer.processor) is kind
    assert set(vars(layer)) == own


@every_point
@torch.no_grad()
def test_the_block_entered_last_counts(layer: torch.nn.Module) -> None:
    outer, inner = Mark(hook.Expected(0, 3, 6, 6)), Mark(hook.Expected(0, 3, 6, 6))
    first, second = hook.marked([(layer, outer)]), hook.marked([(layer, inner)])
    first.__enter__()
    second.__enter__()
    layer(X)
    assert (len(outer.calls), len(inner.calls)) == (0, 1)
    first.__exit__(None, None, None)
    layer(X)
    assert (len(outer.calls), len(inner.calls)) == (0, 2)
    second.__exit__(None, None, None)
    layer(X)
    assert (len(outer.calls), len(inner.calls)) == (0, 2)


@every_point
@torch.no_grad()
def test_layers_without_a_mark_are_left_alone(layer: torch.nn.Module) -> None:
    """Softmaxes of other models, of unmarked calls and of other threads go on as they are."""
    other = flux_layer() if isinstance(layer, FluxAttention) else unet_layer()
    plain, found = layer(X), {}

    def beside(*_: object) -> None:
        """Another thread's layer of the same sizes, while this one's call is at hand."""
        thread = threading.Thread(target=lambda: found.update(out=other(X)))
        thread.start()
        thread.join()

    handle = layer.to_q.register_forward_pre_hook(beside)
    with hook.marked([(layer, Mark(hook.Expected(0, 3, 6, 6)))]):
        assert torch.equal(other(X), plain)
        assert torch.equal(layer(X)[0], output(layer))
    handle.remove()
    torch.testing.assert_close(found["out"].detach(), plain, rtol=0, atol=0)
    with hook.marked([(layer, Mark(None))]):
        assert torch.equal(layer(X), plain)


@every_point
@torch.no_grad()
def test_an_error_in_a_call_leaves_no_call_at_hand(layer: torch.nn.Module) -> None:
    class Broken(Mark):
        def attend(self, *_: object) -> Tensor:
            raise ZeroDivisionError

    with hook.marked([(layer, Broken(hook.Expected(0, 3, 6, 6)))]):
        with pytest.raises(ZeroDivisionError):
            layer(X)
        assert hook._slot().call is None


@torch.no_grad()
def test_what_another_library_does_meanwhile_stays() -> None:
    """It may have wrapped an entry before a block, and may wrap the block's own."""
    layer, calls = flux_layer(), []
    name = attention_dispatch.AttentionBackendName.NATIVE
    own = REGISTRY[name]

    def counting(inner: object) -> object:
        @functools.wraps(own)
        def attention(*args: object, **options: object) -> Tensor:
            calls.append(1)
            return inner(*args, **options)

        return attention

    plain, before = layer(X), counting(own)
    mark = Mark(hook.Expected(0, 1, 6, 6))
    try:
        REGISTRY[name] = before
        with hook.marked([(layer, mark)]):
            layer(X)
        assert REGISTRY[name] is before
        assert len(calls) == 1  # of the rows that are not meant
        with hook.marked([(layer, mark)]):
            meanwhile = REGISTRY[name] = counting(REGISTRY[name])
            layer(X)
        assert REGISTRY[name] is meanwhile
        assert len(calls) == 3
        assert torch.equal(layer(X), plain)
        with hook.marked([(layer, mark)]):
            assert torch.equal(layer(X)[0], output(layer))
            assert torch.equal(layer(X)[1:], plain[1:])
        assert len(mark.calls) == 4
    finally:
        REGISTRY[name] = own


@pytest.mark.parametrize("kind", ["SlicedAttnProcessor", "AttnProcessor"])
@torch.no_grad()
def test_processors_that_are_not_seen_have_the_other_rows(kind: str) -> None:
    make = getattr(attention_processor, kind)
    layer = unet_layer(make(1) if "Sliced" in kind else make(), cross=True)
    plain, mark = layer(X, TEXT), Mark(hook.Expected(1, 2, 6, 5))
    with hook.marked([(layer, mark)]):
        out = layer(X, TEXT)
    assert len(mark.calls) == 1
    torch.testing.assert_close(out[::2], plain[::2])
    assert torch.equal(out[1], output(layer))
    assert type(layer.processor) is make


@torch.no_grad()
def test_calls_of_an_ip_adapters_images_are_left_alone() -> None:
    """The text's softmax is exchanged, and the images' are what they were."""
    processor = attention_processor.IPAdapterAttnProcessor2_0(16, 16, num_tokens=(5,))
    layer, images = unet_layer(processor, cross=True), torch.randn(3, 5, 16)
    alone = unet_layer(processor, cross=True)
    plain = layer(X, (TEXT, [images]))
    text = alone.to_out[0](attended(alone, X, TEXT))
    mark = Mark(hook.Expected(0, 3, 6, 5))
    with hook.marked([(layer, mark)]):
        out = layer(X, (TEXT, [images]))
    assert len(mark.calls) == 1
    torch.testing.assert_close(plain - out + layer.to_out[0].bias, text, rtol=1e-4, atol=1e-5)


def attended(layer: torch.nn.Module, x: Tensor, text: Tensor) -> Tensor:
    tokens = layer.to_q(x), layer.to_k(text), layer.to_v(text)
    q, k, v = (token.unflatten(-1, (2, 8)).transpose(1, 2) for token in tokens)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_calls_of_an_ip_adapters_images_in_joint_attention() -> None:
    layer = FluxAttention(
        16, heads=2, dim_head=8, bias=True, added_kv_proj_dim=16, context_pre_only=False
    ).eval()
    layer.set_processor(FluxIPAdapterAttnProcessor(16, 16))
    given = {"encoder_hidden_states": TEXT, "ip_hidden_states": [torch.randn(3, 4, 16)]}
    plain, mark = layer(X, **given), Mark(hook.Expected(0, 3, 11, 11))
    with hook.marked([(layer, mark)]):
        out = layer(X, **given)
    assert len(mark.calls) == 1
    assert torch.equal(out[0][0], layer.to_out[0].bias.expand(6, 16))
    assert torch.equal(out[2], plain[2])


@torch.no_grad()
def test_perturbed_rows_are_left_alone() -> None:
    """PAG's layer gives its negative and its prompt's rows one softmax, the third ones none."""
    layer = unet_layer(attention_processor.PAGCFGIdentitySelfAttnProcessor2_0())
    plain, mark = layer(X), Mark(hook.Expected(1, 2, 6, 6))
    with hook.marked([(layer, mark)]):
        out = layer(X)
    assert len(mark.calls) == 1
    assert torch.equal(out[::2], plain[::2])
    assert torch.equal(out[1], output(layer))


@every_point
@torch.no_grad()
def test_a_softmax_of_other_sizes_is_told_of(layer: torch.nn.Module) -> None:
    plain = layer(X)
    for expected in (
        hook.Expected(0, 3, 7, 6),
        hook.Expected(0, 3, 6, 7),
        hook.Expected(0, 4, 6, 6),
    ):
        mark = Mark(expected)
        with hook.marked([(layer, mark)]):
            assert torch.equal(layer(X), plain)
        assert mark.seen == [(6, 6)]


@torch.no_grad()
def test_masks_are_those_of_the_rows() -> None:
    layer, mark = unet_layer(cross=True), Mark(hook.Expected(1, 2, 6, 5))
    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])[:, None] * -1e4
    with hook.marked([(layer, mark)]):
        out = layer(X, TEXT, attention_mask=mask)
    assert torch.equal(out[::2], layer(X, TEXT, attention_mask=mask)[::2])
    assert mark.mask.keys.tolist() == [[False, True, True, True, True]]


@torch.no_grad()
def test_what_a_layout_cannot_take_is_refused() -> None:
    sliced = unet_layer(attention_processor.SlicedAttnProcessor(1), cross=True)
    with (
        hook.marked([(sliced, Mark(hook.Expected(0, 3, 6, 5)))]),
        pytest.raises(ValueError, match=r"^attention_mask must be None while a layout"),
    ):
        sliced(X, TEXT, attention_mask=torch.zeros(3, 1, 5))
    call = hook._Call(Mark(None), hook.Expected(0, 3, 6, 6))
    for name in hook.UNTAKEN:
        with pytest.raises(ValueError, match=f"^pipe must attend without {name} while a layout"):
            call.attention(X, X, X, {name: 0.5}, lambda *_: X)


@pytest.mark.parametrize("point", LAYERS)
@torch.no_grad()
def test_compiled_layers(point: str) -> None:
    """One graph with a block and one without, whatever the marks' values; layers share them."""
    layers = [LAYERS[point]() for _ in range(2)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    plain = layers[0](X)
    run = torch.compile(lambda layer: layer(X), backend=counter, fullgraph=True)
    assert torch.equal(run(layers[0]), plain)
    plains = counter.frame_count
    for factor in (1.0, 2.0):
        marks = [(layer, Mark(hook.Expected(1, 3, 6, 6))) for layer in layers]
        for _, mark in marks:
            mark.factor = torch.tensor(factor)
        with hook.marked(marks):
            for layer in layers:
                out = run(layer)
                assert torch.equal(out[0], plain[0])
                torch.testing.assert_close(out[1], output(layer, factor))
    assert counter.frame_count == plains + 1
    assert torch.equal(run(layers[0]), plain)
    assert counter.frame_count == plains + 1
    assert hook._trace.call is None
