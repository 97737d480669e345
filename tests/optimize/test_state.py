"""The result and the state of an optimisation of latents, also after an exception."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_chain import ALPHAS, TIMESTEPS, Network, decode, latents, loss, sampler
from torch import Tensor

from dense_attn import OptimizeResult, ReversibleSampler, optimize_latents

OPTIONS = {"generator": None, "progress": False}


class UsersError(Exception):
    """The error of a user's function."""


class OwnResultError(Exception):
    """Has a result of its own, which nobody may set."""

    @property
    def result(self) -> str:
        return "own"


class OtherResultError(Exception):
    """Has a result of its own, which anybody may set."""

    result = "own"


class NotedError(Exception):
    """Takes no notes, with an error that is no AttributeError."""

    __notes__ = ()


def raising(function: Callable, last: int, error: BaseException) -> Callable:
    """The function, which raises in its call after so many."""
    calls: list[int] = []

    def call(*arguments: object) -> object:
        calls.append(1)
        if len(calls) > last:
            raise error
        return function(*arguments)

    return call


def seeded(seed: int = 7) -> dict[str, object]:
    return {"generator": torch.Generator().manual_seed(seed), "progress": False}


@pytest.mark.parametrize(
    "where", ["eps_fn", "eps_fn on the way back", "decode_fn", "loss_fn", "saliency_fn"]
)
def test_an_exception_keeps_what_is_done(where: str) -> None:
    network, error = Network(), UsersError("no space")
    functions = {"eps_fn": network, "decode_fn": decode, "loss_fn": loss}
    functions["saliency_fn"] = lambda image: image.mean(1) > 0.5
    # Two steps: of the image 6 calls of the network, of the way back 6; images 2, losses 4.
    last = {
        "eps_fn": 26,
        "eps_fn on the way back": 33,
        "decode_fn": 5,
        "loss_fn": 9,
        "saliency_fn": 5,
    }[where]
    x, name = latents(), where.split()[0]
    broken = functions | {name: raising(functions[name], last, error)}
    with pytest.raises(UsersError) as caught:
        optimize_latents(sampler(), x=x, steps=5, **broken, **seeded())
    assert caught.value is error
    result = error.result
    assert isinstance(result, OptimizeResult)
    assert (len(result.losses), result.state["step"]) == (2, 2)
    assert (
        result.message
        == "optimize_latents was stopped by UsersError in step 2; these are the latents of step 2"
    )
    done = optimize_latents(sampler(), x=x, steps=2, **functions, **seeded())
    assert torch.equal(result.latents, done.latents)
    rest = optimize_latents(sampler(), x=x, steps=3, state=result.state, **functions, **OPTIONS)
    whole = optimize_latents(sampler(), x=x, steps=5, **functions, **seeded())
    assert rest.losses == whole.losses
    assert torch.equal(rest.latents, whole.latents)
    if sys.version_info >= (3, 11):
        (note,) = error.__notes__
        assert "in step 2" in note
        assert "result.state" in note


def test_an_exception_in_the_first_step_is_left_alone() -> None:
    error = UsersError()
    with pytest.raises(UsersError):
        optimize_latents(
            sampler(), Network(), decode, raising(loss, 1, error), latents(), **OPTIONS
        )
    assert not hasattr(error, "result")
    assert not hasattr(error, "__notes__")


def test_a_refusal_later_on_keeps_it_too() -> None:
    def loss_fn(image: Tensor) -> Tensor:
        return loss(image) if next(calls) < 3 else image

    calls = iter(range(9))
    with pytest.raises(ValueError, match="loss_fn must return a scalar tensor") as caught:
        optimize_latents(sampler(), Network(), decode, loss_fn, latents(), **OPTIONS)
    assert len(caught.value.result.losses) == 1


@pytest.mark.parametrize("kind", [OwnResultError, OtherResultError])
def test_an_exception_with_a_result_of_its_own_is_raised_as_it_is(kind: type[Exception]) -> None:
    error = kind()
    with pytest.raises(kind) as caught:
        optimize_latents(
            sampler(), Network(), decode, raising(loss, 3, error), latents(), **OPTIONS
        )
    assert caught.value is error
    assert error.result == "own"
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), NotedError()], ids=repr)
def test_exceptions_of_any_kind_keep_what_is_done(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        optimize_latents(
            sampler(), Network(), decode, raising(loss, 3, error), latents(), **OPTIONS
        )
    assert caught.value is error
    assert len(error.result.losses) == 1


def test_a_run_inside_of_a_run_leaves_the_outer_ones_result() -> None:
    def loss_fn(image: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 5:
            optimize_latents(*arguments, raising(loss, 3, error), latents(), **OPTIONS)
        return loss(image)

    calls: list[int] = []
    arguments, error = (sampler(), Network(), decode), UsersError()
    with pytest.raises(UsersError):
        optimize_latents(*arguments, loss_fn, latents(), **OPTIONS)
    assert len(error.result.losses) == 2


def test_tensors_in_the_place_of_a_samplers_numbers_are_refused() -> None:
    arguments = (sampler(), Network(), decode, loss, latents())
    state = optimize_latents(*arguments, steps=1, **OPTIONS).state
    for wrong in (
        {"mix": torch.ones(2)},
        {"timesteps": [torch.ones(2)] * 3},
        {"alpha_bars": torch.ones(4)},
    ):
        given = {**state, "sampler": {**state["sampler"], **wrong}}
        with pytest.raises(ValueError, match="sampler must be that of state, with"):
            optimize_latents(*arguments, steps=1, state=given, **OPTIONS)


def test_an_exception_while_resumed_keeps_all_steps() -> None:
    first = optimize_latents(sampler(), Network(), decode, loss, latents(), steps=2, **OPTIONS)
    error = UsersError()
    broken = raising(loss, 3, error)
    with pytest.raises(UsersError):
        optimize_latents(
            sampler(), Network(), decode, broken, latents(), state=first.state, **OPTIONS
        )
    assert error.result.losses[:2] == first.losses
    assert len(error.result.losses) == 3


@pytest.mark.parametrize("tie", [True, False])
def test_the_state_goes_through_a_file(tie: bool, tmp_path: Path) -> None:
    network, x = Network(), latents()
    arguments = (sampler(), network, decode, loss, x)
    part = optimize_latents(*arguments, steps=2, tie=tie, **seeded())
    torch.save(part.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    rest = optimize_latents(*arguments, steps=1, tie=tie, state=state, **OPTIONS)
    whole = optimize_latents(*arguments, steps=3, tie=tie, **seeded())
    assert torch.equal(torch.stack([*rest.latents]), torch.stack([*whole.latents]))
    assert rest.losses == whole.losses


def test_the_result_is_short_to_look_at() -> None:
    arguments = (sampler(), Network(), decode, loss)
    result = optimize_latents(*arguments, latents(), steps=3, **OPTIONS)
    first, last = result.losses[0], result.losses[-1]
    losses = f"loss {first:.4g} to {last:.4g}"
    assert repr(result) == f"OptimizeResult(3 steps, {losses}, latents (2, 3, 8, 8) in float64)"
    none = optimize_latents(*arguments, latents(1, torch.float32), steps=0, tie=False, **OPTIONS)
    assert repr(none) == "OptimizeResult(0 steps, 2 latents (1, 3, 8, 8) in float32)"
    broken = raising(loss, 3, KeyboardInterrupt())
    with pytest.warns(UserWarning, match="interrupted"):
        stopped = optimize_latents(sampler(), Network(), decode, broken, latents(), **OPTIONS)
    text = "optimize_latents was interrupted in step 1; returned the latents of step 1"
    assert repr(stopped).startswith(
        f"OptimizeResult(1 step, loss {stopped.losses[0]:.4g}, latents (2, 3, 8, 8) in"
    )
    assert repr(stopped).endswith(f", {text!r})")


def others() -> dict[str, tuple[str, ReversibleSampler]]:
    """Other samplers than `sampler()`, by what is said of them."""
    bars, final = ALPHAS.clone(), 0.9995
    bars[500] *= 0.98
    options = {"exact": False, "dtype": torch.float64, "mix": 0.93, "backend": "reference"}
    rule = "sampler must be that of state, with {}, got {}"
    return {
        "method": (rule.format("method edict", "ddim"), sampler("ddim")),
        "mix": (rule.format("mix 0.93", "0.95"), sampler(mix=0.95)),
        "alternate": (rule.format("alternate True", "False"), sampler(alternate=False)),
        "exact": (rule.format("exact False", "True"), sampler(exact=True)),
        "count": (
            rule.format("3 timesteps", "2"),
            ReversibleSampler(ALPHAS, [750, 250], **options),
        ),
        "timesteps": (
            rule.format("timesteps[1] 500", "501"),
            ReversibleSampler(ALPHAS, [750, 501, 250], **options),
        ),
        "schedule": (
            rule.format(f"alpha_bars[1] {ALPHAS[500].item()}", bars[500].item()),
            ReversibleSampler(bars, TIMESTEPS, **options),
        ),
        "final": (
            rule.format(f"alpha_bars[3] {ALPHAS[0].item()}", final),
            ReversibleSampler(ALPHAS, TIMESTEPS, final_alpha_cumprod=final, **options),
        ),
    }


@pytest.mark.parametrize("what", others())
def test_another_sampler_is_refused(what: str) -> None:
    sentence, other = others()[what]
    arguments = (Network(), decode, loss, latents())
    state = optimize_latents(sampler(), *arguments, steps=1, **OPTIONS).state
    with pytest.raises(ValueError, match="sampler must be that of state") as caught:
        optimize_latents(other, *arguments, steps=1, state=state, **OPTIONS)
    assert str(caught.value) == sentence


def test_the_same_sampler_in_other_words_goes_on() -> None:
    """Arguments that its method ignores, another backend or dtype, a schedule in float32."""
    arguments = (Network(), decode, loss, latents())
    options = {"exact": False, "mix": 0.93}
    state = optimize_latents(sampler(), *arguments, steps=1, **OPTIONS).state
    for other in (
        sampler(gamma=0.5),
        sampler(backend="auto"),
        ReversibleSampler(ALPHAS.float(), torch.tensor(TIMESTEPS), **options),
    ):
        assert len(optimize_latents(other, *arguments, steps=1, state=state, **OPTIONS).losses) == 2
    state = optimize_latents(sampler("bdia"), *arguments, steps=1, **OPTIONS).state
    other = sampler("bdia", mix=0.5, alternate=False)
    assert len(optimize_latents(other, *arguments, steps=1, state=state, **OPTIONS).losses) == 2
