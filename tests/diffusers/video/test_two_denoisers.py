"""A pipeline whose second denoiser has the last steps, as Wan 2.2's."""

from __future__ import annotations

import pytest
import torch
from families import classes, family, run, video
from pipelines import PROMPT, REGIONS, close, diffusers, state_of

from dense_attn.integrations.diffusers import apply_layout
from dense_attn.integrations.diffusers.state import LayoutState

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "wan_2_2"


def denoisers() -> list[torch.nn.Module]:
    return [family(NAME).transformer, family(NAME).transformer_2]


def states() -> list[tuple]:
    pipe = family(NAME)
    seconds = pipe.transformer_2.attn_processors.values()
    hooks = len(pipe.transformer_2._forward_pre_hooks)
    return [state_of(pipe), [id(processor) for processor in seconds], hooks]


def test_steps_are_counted_over_both(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    """Each denoiser's own layers are modulated, at the time of the run's steps."""
    seen: list[tuple[int, int, int]] = []
    before_call = LayoutState.before_call

    def spy(state: LayoutState, denoiser: torch.nn.Module, *given: object) -> object:
        out = before_call(state, denoiser, *given)
        on = int(state.first != state.last)
        seen.append((denoisers().index(denoiser), state.steps.index, on))
        return out

    monkeypatch.setattr(LayoutState, "before_call", spy)
    run(NAME, PROMPT, steps=2)  # which leaves attributes of its own
    pipe, before = family(NAME), states()
    with apply_layout(pipe, PROMPT, REGIONS, active=0.75, exponent=1.0):
        assert states() != before
        run(NAME, PROMPT, steps=4)
    assert states() == before
    # the negative prompt's calls come second
    one, two = ([(0, i, 1), (0, i, 0)] for i in (0, 1))
    assert seen == [*one, *two, (1, 2, 1), (1, 2, 0), (1, 3, 0), (1, 3, 0)]
    layers = sum(hasattr(module, "processor") for module in pipe.transformer.modules())
    assert len(calls) == 3 * layers
    sigmas = pipe.scheduler.timesteps[:3] / 1000
    strengths = torch.tensor([call[5].max() for call in calls]).view(3, layers)
    torch.testing.assert_close(
        strengths / strengths[:1], (sigmas / sigmas[0])[:, None] + 0 * strengths
    )


@pytest.mark.parametrize("second", [0, 1])
def test_a_denoiser_of_all_steps(second: int) -> None:
    """Where the second has no steps, or all of them, the run is that of one denoiser."""
    pipe = family(NAME)
    parts = dict(pipe.components) | {"transformer": denoisers()[second], "transformer_2": None}
    alone = diffusers.WanPipeline(**parts)
    alone.set_progress_bar_config(disable=True)
    given = video.SHAPES | {"num_inference_steps": 2, "output_type": "latent"}

    def latents(of: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return of(PROMPT, **given, generator=generator).frames

    with apply_layout(alone, PROMPT, REGIONS, active=1.0):
        right = latents(alone)
    parts = dict(pipe.components) | {"transformer": None} if second else dict(pipe.components)
    both = diffusers.WanPipeline(**parts, boundary_ratio=1.001 if second else 0.0)
    both.set_progress_bar_config(disable=True)
    assert not close(right, latents(both))
    with apply_layout(both, PROMPT, REGIONS, active=1.0):
        assert torch.equal(latents(both), right)


def test_an_inner_block_counts_in_both() -> None:
    pipe, other = family(NAME), [("dog", REGIONS[0][1])]
    with apply_layout(pipe, PROMPT, other, active=1.0):
        right = run(NAME, PROMPT, steps=4)
    with apply_layout(pipe, PROMPT, REGIONS, active=1.0):
        outer = run(NAME, PROMPT, steps=4)
        with apply_layout(pipe, PROMPT, other, active=1.0):
            assert torch.equal(run(NAME, PROMPT, steps=4), right)
        assert torch.equal(run(NAME, PROMPT, steps=4), outer)
    assert not close(outer, right)


def test_denoisers_of_two_patches_are_refused() -> None:
    pipe, before = family(NAME), states()
    own, wider = pipe.transformer_2, classes.changed(pipe.transformer_2, patch_size=(1, 4, 4))
    pipe.register_modules(transformer_2=wider)
    try:
        rule = r"^pipe must have two denoisers of one kind and patch, WanTransformer3DModel, got "
        with pytest.raises(ValueError, match=rule), apply_layout(pipe, PROMPT, REGIONS):
            pytest.fail("the block must not run")
    finally:
        pipe.register_modules(transformer_2=own)
    assert states() == before


def test_a_layer_of_the_second_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the second's layers get of another number are refused with its name."""
    pipe, layer = family(NAME), family(NAME).transformer_2.blocks[1].attn1
    forward = layer.forward

    def half(hidden_states: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        args = (*args[:2], tuple(x[:, : x.shape[1] // 2] for x in args[2]), *args[3:])
        out = forward(hidden_states[:, ::2], *args, **options)
        return out.repeat_interleave(2, 1)

    monkeypatch.setattr(layer, "forward", half)
    with (
        apply_layout(pipe, PROMPT, REGIONS, active=1.0),
        pytest.warns(UserWarning, match=r"leaves transformer_2\.blocks\.1\.attn1, and layers"),
    ):
        run(NAME, PROMPT, steps=4)
