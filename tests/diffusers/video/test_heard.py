"""A pipeline whose call is heard for its frames keeps its class, and so do copies of it."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from families import family
from pipelines import PROMPT
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout
from dense_attn.integrations.diffusers.calls import called

pytestmark = pytest.mark.usefixtures("one_thread")
REGIONS = [("cat", torch.ones(2, 8, 16, dtype=torch.bool))]  # of no call of nine frames
PROMPTS = [Region(REGIONS[0][1], "a cat")]
RULE = r"^regions must have masks of the video's 9 frames"
OPTIONS = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 1}
OPTIONS |= {"max_sequence_length": 24, "output_type": "latent", "return_dict": False}


def latents(pipe: object) -> Tensor:
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **OPTIONS)[0]


@pytest.mark.parametrize("regions", [REGIONS, PROMPTS])
def test_a_pipeline_keeps_its_class(regions: list) -> None:
    """Copies inside of the block, pickled too, are of it, and run as without one."""
    pipe = family("wan_2_2")
    kind, own, plain = type(pipe), type(pipe).__call__, latents(pipe)
    with apply_layout(pipe, PROMPT, regions):
        with pytest.raises(ValueError, match=RULE):
            latents(pipe)
        copied, other = copy.deepcopy(pipe), type(pipe)(**pipe.components)
        assert type(pipe) is type(copied) is type(other) is kind
        again = pickle.loads(pickle.dumps(pipe))
        assert type(pickle.loads(pickle.dumps(copied))) is type(again) is kind
        assert torch.equal(latents(copied), plain)
        assert torch.equal(latents(again), plain)
    assert kind.__call__ is own
    assert torch.equal(latents(copied), plain)


class Pipeline:
    """A stand-in for one, whose call says what it was given."""

    def __call__(self, prompt: str, num_frames: int = 9) -> tuple[str, int]:
        return prompt, num_frames


class Inherited(Pipeline):
    """One without a call of its own."""


@pytest.mark.parametrize("kind", [Pipeline, Inherited])
def test_blocks_that_end_in_any_order(kind: type) -> None:
    pipe, other, heard = kind(), kind(), []
    own = dict(vars(kind))
    first, second = ExitStack(), ExitStack()
    first.enter_context(called(pipe, lambda given: heard.append(given["num_frames"])))
    second.enter_context(called(other, lambda given: heard.append(given["prompt"])))
    assert (pipe("a"), other("b", 5)) == (("a", 9), ("b", 5))
    assert heard == [9, "b"]
    first.close()
    assert (pipe("a"), other("c")) == (("a", 9), ("c", 9))
    assert heard == [9, "b", "c"]
    second.close()
    assert dict(vars(kind)) == own


def test_what_others_wrap_inside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on when the block has ended, without a listener."""
    monkeypatch.setattr(Pipeline, "__call__", Pipeline.__call__)
    pipe, heard = Pipeline(), []
    with called(pipe, heard.append):
        inner = Pipeline.__call__
        Pipeline.__call__ = lambda self, prompt: ("around", *inner(self, prompt))
        assert pipe("a") == ("around", "a", 9)
    assert pipe("b") == ("around", "b", 9)
    assert [given["prompt"] for given in heard] == ["a"]
