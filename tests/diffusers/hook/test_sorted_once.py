"""Keys of a masked call, which are sorted once for all layers and steps that share the mask.

A look at values, which the CPU takes and a GPU does not, is left out where that is said.
"""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from families import family, made_of, run
from pipelines import close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dense_attn import layout_attention, tile_lists
from dense_attn.integrations.diffusers import Region, apply_layout, layers
from dense_attn.layout_attention import keys

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 40
PROMPT, LEFT, RIGHT = "a cat dog", (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


class Sorts(TorchDispatchMode):
    """Counts the operators that sort, and those that take the words of keys in another turn."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = str(func).split(".")[1]
        ints = [x for x in args if isinstance(x, Tensor) and x.dtype == torch.int32]
        if "sort" in name or (name == "gather" and ints):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at values, as on a GPU: every mask has an order."""
    monkeypatch.setattr(keys, "_seen", lambda x: False)


@pytest.fixture
def layer() -> layers.Layer:
    words = (torch.arange(TOKENS) % 3)[None].int()
    strength = torch.rand(1, 1, TOKENS)
    order = layers.order_of(layers.Side(words, strength[0]))
    return layers.Layer(words, words, strength, order, order, strength)


@pytest.fixture
def attend(layer: layers.Layer) -> Callable[[Tensor], int]:
    """A layer's call under a mask, compared with the plain call's bits; how often it sorts."""
    options = SimpleNamespace(modulation="bias", backend="auto")
    q, k, v = torch.randn(3, 2, 1, TOKENS, 16).unbind(0)

    def attention(mask: Tensor) -> int:
        tensors, words = (q[: len(mask)], k[: len(mask)], v[: len(mask)]), layer.q_words
        with Sorts() as sorts:
            out = layer.attention(*tensors, options=options, scale=None, k_mask=mask)
        how = {"modulation": "bias", "k_mask": mask, "q_order": layer.q_order}
        how |= {"k_order": layer.k_order}
        assert torch.equal(out, layout_attention(*tensors, words, words, layer.now, **how))
        return sorts.counts.total()

    return attention


def added(there: Tensor) -> Tensor:
    """A mask of floats that removes keys and adds to others' scores."""
    return torch.where(there, torch.linspace(-1, 1, TOKENS), -torch.inf)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("form", [torch.clone, added])
def test_layers_of_one_mask_sort_once(form: Callable, attend: Callable) -> None:
    """Rows of it too; again where it has changed in place, and for another mask."""
    mask = form(torch.rand(2, TOKENS) < 0.5)
    first = attend(mask)
    assert first > 2
    assert attend(mask) == attend(mask[:]) == 0
    assert attend(mask[:1]) > 0
    assert attend(mask[1:]) > 0
    assert attend(mask[:1]) == attend(mask[1:]) == 0
    mask[:, 3] = form(torch.tensor([True]).expand(TOKENS))[3]
    assert attend(mask) == first
    assert attend(mask.clone()) == first


@pytest.mark.usefixtures("unseen")
def test_a_mask_whose_changes_are_not_counted(attend: Callable) -> None:
    with torch.inference_mode():
        mask = torch.rand(2, TOKENS) < 0.5
        assert attend(mask) == attend(mask) > 0
        mask[:, :7] = False
        attend(mask)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("form", [torch.clone, added])
def test_a_mask_that_inference_has_seen_first(form: Callable, layer: layers.Layer) -> None:
    """A gradient's call keeps nothing that was made in inference mode."""
    options = SimpleNamespace(modulation="bias", backend="auto")
    mask = form(torch.arange(TOKENS)[None] % 5 > 0)
    x = torch.randn(3, 1, 2, TOKENS, 16, requires_grad=True)
    run = functools.partial(layer.attention, options=options, scale=None, k_mask=mask)
    with torch.inference_mode():
        first = run(*x.unbind(0))
    out = run(*x.unbind(0))
    assert torch.equal(out, first)
    out.square().sum().backward()
    assert x.grad.abs().max() > 0


def test_a_mask_that_is_learned_keeps_its_gradient(layer: layers.Layer) -> None:
    options = SimpleNamespace(modulation="bias", backend="reference")
    mask = torch.zeros(1, TOKENS, requires_grad=True)
    for _ in range(2):
        x = torch.randn(3, 1, 1, TOKENS, 16).unbind(0)
        out = layer.attention(*x, options=options, scale=None, k_mask=mask)
        (grad,) = torch.autograd.grad(out.square().sum(), mask)
        assert grad.abs().max() > 0


@pytest.mark.usefixtures("unseen")
def test_orders_live_no_longer_than_their_mask(attend: Callable, layer: layers.Layer) -> None:
    mask = torch.rand(2, TOKENS) < 0.5
    attend(mask[:])
    gone = weakref.ref(mask)
    assert mask in keys._masks.owners
    del mask
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("unseen")
def test_a_key_mask_is_a_mask_of_lists_too() -> None:
    q, k, v = torch.randn(3, 2, 1, TOKENS, 16).unbind(0)
    words, mask = (torch.arange(TOKENS) % 3).int(), torch.rand(2, TOKENS) < 0.5
    made = keys.kept(mask, q, k)
    tile_lists(q, k, words, words, k_mask=made)
    for modulation in ("range", "mask"):
        out = layout_attention(q, k, v, words, words, 0.5, modulation=modulation, k_mask=made)
        exact = layout_attention(q, k, v, words, words, 0.5, modulation=modulation, k_mask=mask)
        assert torch.equal(out, exact)


REGIONS = {
    "phrases": [("cat", LEFT)],
    "prompts": [Region(LEFT, "a cat"), Region(RIGHT, "a very small dog")],
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("qwen", "phrases", 0),
        ("qwen", "prompts", 0),
        ("chroma", "phrases", 0),
        ("chroma", "prompts", 0),
        ("hunyuan_image", "phrases", 0),
        ("z_image", "prompts", 0),
        ("z_image", "phrases", 3),  # whose steps make their masks anew: one, and twice its order
    ],
)
def test_a_runs_later_steps(name: str, kind: str, more: int) -> None:
    """All layers of all steps have the keys of the first one's masks, where these stay."""
    counts = []
    for steps in (1, 3):
        with apply_layout(family(name), PROMPT, REGIONS[kind], active=1.0), Sorts() as sorts:
            assert torch.isfinite(run(name, PROMPT, steps=steps)).all()
        counts.append(sorts.counts["sort"] + sorts.counts["argsort"])
    assert counts[0] > 0
    assert counts[1] - counts[0] == 2 * more


@pytest.mark.parametrize("kind", REGIONS)
def test_a_block_that_inference_has_seen_first(kind: str) -> None:
    """A run with gradients in it has layers of its own, and but for rounding the same result."""
    pipe, given = family("wan"), made_of("wan")[1] | {"output_type": "latent"}
    network = pipe.transformer.proj_out.weight
    run_of = functools.partial(inspect.unwrap(type(pipe).__call__), pipe, PROMPT, **given)

    def made() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return run_of(num_inference_steps=1, generator=generator).frames

    with apply_layout(pipe, PROMPT, REGIONS[kind], active=1.0):
        with torch.inference_mode():
            first = made()
        with torch.enable_grad():
            out = made()
            (grad,) = torch.autograd.grad(out.square().sum(), network)
    assert close(out, first)
    assert grad.abs().max() > 0
