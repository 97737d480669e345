"""How the optimisation of latents stops, with which latents, and what it shows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from tiny_chain import Network, decode, latents, loss, sampler
from torch import Tensor

from dense_attn import optimize_latents


def failing(kind: str, at: int) -> Callable[[Tensor], Tensor]:
    """A loss (or its gradient) that is not finite in the call of a step's first image."""
    calls = []

    def loss_fn(image: Tensor) -> Tensor:
        calls.append(image)
        if len(calls) != 2 * at + 1:
            return loss(image)
        if kind == "gradient":
            return loss(image) + (image - image.detach()).abs().sqrt().sum()
        return loss(image) * float(kind)

    return loss_fn


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_what_is_not_finite_stops_with_the_last_good_latents(kind: str, at: int) -> None:
    network, x = Network(), latents()
    options = {"noise": None, "progress": False}
    with pytest.warns(UserWarning, match="loss_fn must") as caught:
        result = optimize_latents(
            sampler(), network, decode, failing(kind, at), x, steps=9, **options
        )
    # The loss of step `at` is finite where its gradient is not.
    good = at if kind == "gradient" else max(0, at - 1)
    before = optimize_latents(sampler(), network, decode, loss, x, steps=good, **options)
    assert torch.equal(result.latents, before.latents)
    assert len(result.losses) == (at + 1 if kind == "gradient" else at)
    rule = (
        "have finite gradients, got nan"
        if kind == "gradient"
        else f"return finite values, got {kind}"
    )
    assert (
        result.message == f"loss_fn must {rule} at step {at}; returned the latents of step {good}"
    )
    assert [str(warning.message) for warning in caught] == [result.message]
    resumed = optimize_latents(
        sampler(), network, decode, loss, x, steps=5 - good, state=result.state, **options
    )
    whole = optimize_latents(sampler(), network, decode, loss, x, steps=5, **options)
    assert torch.equal(resumed.latents, whole.latents)
    assert resumed.losses == whole.losses


def test_a_resumed_run_remembers_the_last_good_latents() -> None:
    network, x = Network(), latents()
    first = optimize_latents(sampler(), network, decode, loss, x, steps=3, progress=False)
    with pytest.warns(UserWarning, match="got nan at step 3; returned the latents of step 2"):
        result = optimize_latents(
            sampler(),
            network,
            decode,
            failing("nan", 0),
            x,
            steps=3,
            state=first.state,
            progress=False,
        )
    assert result.losses == first.losses
    assert torch.equal(result.latents, first.state["previous"]["latents"][0])


@pytest.mark.parametrize(("method", "tie"), [("edict", True), ("edict", False), ("bdia", True)])
@pytest.mark.parametrize(
    "last", range(15, 30)
)  # on the way to the image, from its first call on, and on the way back
def test_a_network_that_fails_in_an_exact_chain_stops_it_too(
    method: str, tie: bool, last: int
) -> None:
    network, calls = Network(), []

    def breaking(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return network(x, t) * (math.nan if len(calls) > last else 1.0)

    run = sampler(method, exact=True)
    with pytest.warns(
        UserWarning, match=r"eps_fn's result must be finite .* at step \d; returned the latents of"
    ):
        result = optimize_latents(
            run, breaking, decode, loss, latents(), steps=9, tie=tie, progress=False
        )
    assert 0 < len(result.losses) < 9
    assert all(
        x.isfinite().all()
        for x in (result.latents if isinstance(result.latents, tuple) else [result.latents])
    )


def test_a_second_latent_that_leaves_the_grid_stops_it_too() -> None:
    arguments = (sampler(exact=True), Network(), decode, loss, latents())
    options = {"tie": False, "progress": False}
    state = optimize_latents(*arguments, steps=1, **options).state
    state["latents"] = [state["latents"][0], torch.full_like(state["latents"][1], 1e20)]
    with pytest.warns(
        UserWarning,
        match=r"y must be finite .* got 1e\+20 at step 1; returned the latents of step 0",
    ):
        result = optimize_latents(*arguments, steps=1, state=state, **options)
    assert all(map(torch.equal, result.latents, state["previous"]["latents"]))


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("renormalize", [True, False])
def test_an_update_that_overflows_stops_with_the_latents_before_it(
    renormalize: bool, done: int
) -> None:
    arguments = (sampler(), Network(), decode, loss, latents(dtype=torch.float32))
    options = {"renormalize": renormalize, "progress": False}
    before = optimize_latents(*arguments, steps=done, **options)
    rule = rf"the updated latents must be finite, got \S+ at step {done}"
    text = f"{rule}; returned the latents of step {done}"
    with pytest.warns(UserWarning, match=text):
        result = optimize_latents(*arguments, steps=3, state=before.state, noise=3e38, **options)
    assert torch.equal(result.latents, before.latents)
    assert len(result.losses) == done + 1
    rest = optimize_latents(*arguments, steps=2, state=result.state, **options)
    assert torch.equal(
        rest.latents, optimize_latents(*arguments, steps=2, state=before.state, **options).latents
    )


def test_noise_beyond_the_grid_is_refused_as_it_is_without_optimisation() -> None:
    with pytest.raises(
        ValueError, match=r"x must be finite and at most \S+ in size for exact=True, got 1e\+20"
    ):
        optimize_latents(
            sampler(exact=True),
            Network(),
            decode,
            loss,
            torch.full((1, 3, 8, 8), 1e20),
            steps=1,
            progress=False,
        )


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("where", ["loss", "update"])
def test_an_interrupt_returns_what_is_done(
    where: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x, calls = Network(), latents(), []
    randn = torch.randn

    def interrupted(of: str, function: Callable, last: int) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            calls.append(of)
            if of == where and calls.count(of) == last:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    options = {"generator": torch.Generator().manual_seed(1), "progress": False}
    loss_fn = interrupted("loss", loss, 2 * at + 2)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", interrupted("update", randn, at + 1))
        with pytest.warns(
            UserWarning, match=f"interrupted in step {at}; returned the latents of step {at}"
        ):
            result = optimize_latents(sampler(), network, decode, loss_fn, x, steps=5, **options)
    rest = optimize_latents(
        sampler(), network, decode, loss, x, steps=4 - at, state=result.state, progress=False
    )
    options["generator"].manual_seed(1)
    whole = optimize_latents(sampler(), network, decode, loss, x, steps=4, **options)
    assert result.losses == whole.losses[:at]
    assert torch.equal(rest.latents, whole.latents)


def test_the_bar_shows_the_loss(capfd: pytest.CaptureFixture) -> None:
    arguments = (sampler(), Network(), decode, loss, latents())
    result = optimize_latents(*arguments, steps=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "latent optimisation: 100%" in err
    assert "2/2" in err
    assert f"loss={result.losses[-1]:.3g}"[:8] in err
    optimize_latents(*arguments, steps=2, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["there", "back"])
def test_an_error_of_the_network_with_a_chains_words_goes_on(where: str) -> None:
    """Errors that stop the loop are told from others by type, not by text."""
    network, calls = Network(), []

    def breaking(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        if len(calls) == {"there": 2, "back": 9}[where]:
            raise RuntimeError("eps_fn's result must be finite")
        return network(x, t)

    arguments = (sampler(exact=True), breaking, decode, loss, latents())
    with pytest.raises(RuntimeError, match=r"^eps_fn's result must be finite$"):
        optimize_latents(*arguments, steps=1, progress=False)


@pytest.mark.parametrize("exact", [True, False])
def test_warnings_of_functions_are_shown(exact: bool) -> None:
    """But no warning of captured parameters comes, as they are to get no gradient."""
    network = Network()

    def warned(x: Tensor, t: int) -> Tensor:
        if torch.is_grad_enabled():  # on the way back
            warnings.warn("eps_fn must be an nn.Module, says the function", stacklevel=1)
        return network(x, t)

    arguments = (decode, loss, latents())
    with pytest.warns(UserWarning, match="says the function") as caught:
        optimize_latents(sampler(exact=exact), warned, *arguments, steps=1, progress=False)
    assert {str(one.message) for one in caught} == {
        "eps_fn must be an nn.Module, says the function"
    }
