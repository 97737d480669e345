"""apply_region_prompts beside attention couple and a dense mask, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui.scene import (
    KINDS,
    LENGTHS,
    POSITIVE,
    REGION_TEXTS,
    estimate,
    made,
    noise,
    regions,
    sigma_of,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn.integrations.comfyui import apply_region_prompts
from dense_attn.integrations.diffusers.prompts.sharing import members, with_base

pytestmark = pytest.mark.usefixtures("installed")
EDGES = (0, 5, 8, 12)  # where the texts begin and end


def split_heads(x: Tensor, count: int, split: bool) -> Tensor:
    return x if split else x.unflatten(-1, (-1, count)).transpose(1, 2)


def dense(shares_of: Any, sizes: dict[int, tuple[int, int]]) -> Any:
    """An override with the formula: for each text an attention of its own, and their sum."""

    def override(
        func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **how: Any
    ) -> Tensor:
        split = bool(how.get("skip_reshape"))
        width = q.shape[-1] if split else q.shape[-1] // heads
        q, k, v = (split_heads(x, width, split) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        image = q.shape[2] if q.shape[2] in sizes else q.shape[2] - EDGES[-1]
        if k.shape[2] == q.shape[2] == image:  # the image's own layers
            out = scaled_dot_product_attention(q, k, v, scale=how.get("scale"))
            return out.transpose(1, 2).flatten(2)
        shares = shares_of(sizes[image])  # [texts, image tokens]
        joint = q.shape[2] > image
        out = 0
        for one, begin, end in zip(shares, EDGES, EDGES[1:]):
            seen = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
            seen[:, begin:end] = True
            if joint:
                seen[EDGES[-1] :, EDGES[-1] :] = True
            part = scaled_dot_product_attention(q, k, v, seen, scale=how.get("scale"))
            weights = torch.cat([torch.zeros(EDGES[-1] * joint), one]).double()
            out = out + part * weights[:, None]
        if joint:  # a text sees itself and the image of its shares, all of them those of the first
            everyone = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
            for one, begin, end in zip(shares, EDGES, EDGES[1:]):
                everyone[begin:end, begin:end] = True
                everyone[begin:end, EDGES[-1] :] = one > 0
            part = scaled_dot_product_attention(q, k, v, everyone, scale=how.get("scale"))
            out = torch.cat([part[:, :, : EDGES[-1]], out[:, :, EDGES[-1] :]], 2)
        return out.transpose(1, 2).flatten(2)

    return override


def right(kind: str, x: Tensor, base_ratio: float, masks: list[Tensor]) -> Tensor:
    """The model's estimate by the formula."""
    model = made(kind)
    rows, columns = x.shape[-2:]
    grids = {"UNetModel": [(rows, columns), (-(-rows // 2), -(-columns // 2))]}
    frames = x.shape[2] if x.dim() == 5 else 1
    sizes = {
        frames * h * w: (h, w) for h, w in grids.get(kind, [(-(-rows // 2), -(-columns // 2))])
    }

    def shares_of(size: tuple[int, int]) -> Tensor:
        own = members(torch.stack(masks), torch.ones(len(masks)), size, True)
        return with_base(own, base_ratio, [True] * len(masks)).repeat(1, frames)

    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = dense(shares_of, sizes)
    context = torch.cat([POSITIVE[0][0], *(one[0][0] for one in REGION_TEXTS)], 1)
    return model.model.apply_model(
        x,
        sigma_of(model).expand(len(x)),
        c_crossattn=context.expand(len(x), -1, -1),
        transformer_options=dict(options),
    )


SOFT = torch.linspace(0, 1, 40).expand(40, 40).contiguous()


@pytest.mark.parametrize("base_ratio", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["boxes", "soft", "faint"])
def test_the_image_sees_its_regions_texts(kind: str, base_ratio: float, name: str) -> None:
    """To float64's rounding, through two layers of attention; shares are float32."""
    boxes = [one.mask for one in regions()]
    faint = [0.4 * mask for mask in boxes]  # nowhere above a half
    masks = {"boxes": boxes, "soft": [SOFT, 0.9 - 0.7 * SOFT], "faint": faint}[name]
    x = noise(kind)
    model = apply_region_prompts(made(kind), regions(*masks), base_ratio=base_ratio)
    out = estimate(model, x)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, right(kind, x, base_ratio, masks), rtol=0, atol=1e-6)
    assert (out - estimate(made(kind), x)).abs().max() > 1e-3
    assert sum(LENGTHS) == EDGES[-1]
