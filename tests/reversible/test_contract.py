"""Refusals of ReversibleSampler: options, calls, a network's results, what leaves the grid."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import backends
from chains import ALPHAS, Network, refused, sampler

from dense_attn import OffGridError, ReversibleSampler

SHAPE = (2, 4, 5, 6)
on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))


BAD_SAMPLERS = [  # options, error, message
    ({"method": "euler"}, ValueError, "method must be one of edict, bdia, belm, ddim, got 'euler'"),
    ({"mix": 0.0}, ValueError, "mix must be in (0, 1], got 0.0"),
    ({"mix": 1.1}, ValueError, "mix must be in (0, 1], got 1.1"),
    ({"mix": "a"}, TypeError, "mix must be a number, got str"),
    ({"gamma": 0}, ValueError, "gamma must be in (0, 1], got 0"),
    ({"method": "bdia", "gamma": 0.5}, ValueError, "gamma must be 1 for exact=True, got 0.5"),
    ({"exact": 1}, TypeError, "exact must be a bool, got int"),
    ({"alternate": "no"}, TypeError, "alternate must be a bool, got str"),
    (
        {"method": "belm"},
        ValueError,
        "exact must be False for method='belm', which has no exact inverse on a grid",
    ),
    (
        {"dtype": torch.int32},
        TypeError,
        "dtype must be one of float32, bfloat16, float16, float64, got torch.int32",
    ),
    ({"dtype": "float32"}, TypeError, "dtype must be one of"),
    (
        {"backend": "opencl"},
        ValueError,
        "backend must be one of auto, cuda, triton, cpu, reference, got 'opencl'",
    ),
    ({"alphas_cumprod": [0.9, 0.0]}, ValueError, "alphas_cumprod must be in (0, 1], got 0.0"),
    (
        {"alphas_cumprod": torch.tensor([0.9, 1.5])},
        ValueError,
        "alphas_cumprod must be in (0, 1], got 1.5",
    ),
    ({"alphas_cumprod": [0.9, float("nan")]}, ValueError, "alphas_cumprod must be finite, got nan"),
    (
        {"alphas_cumprod": torch.ones(2, 2)},
        ValueError,
        "alphas_cumprod must be one-dimensional, of floats, got float32 ",
    ),
    (
        {"alphas_cumprod": torch.ones(2).long()},
        ValueError,
        "alphas_cumprod must be one-dimensional, of floats, got int64",
    ),
    ({"alphas_cumprod": []}, ValueError, "alphas_cumprod must have at least one element, got none"),
    (
        {"alphas_cumprod": 0.9},
        TypeError,
        "alphas_cumprod must be a tensor or a sequence, got float",
    ),
    (
        {"alphas_cumprod": {0.9: 0, 0.8: 1}},
        TypeError,
        "alphas_cumprod must be a tensor or a sequence, got dict",
    ),
    (
        {"alphas_cumprod": torch.ones(2).to_sparse()},
        TypeError,
        "alphas_cumprod must be a strided tensor, got",
    ),
    (
        {"alphas_cumprod": torch.ones(2, device="meta")},
        ValueError,
        "alphas_cumprod must hold values, got a meta tensor",
    ),
    (
        {"alphas_cumprod": [0.9, 1e-30], "timesteps": [1]},
        ValueError,
        "alphas_cumprod must be larger for exact=True",
    ),
    ({"timesteps": []}, ValueError, "timesteps must have at least one element, got none"),
    ({"timesteps": 3}, TypeError, "timesteps must be a tensor or a sequence, got int"),
    ({"timesteps": [1, 1]}, ValueError, "timesteps must descend to 0 or above, got [1, 1]"),
    ({"timesteps": [1, 2]}, ValueError, "timesteps must descend to 0 or above, got [1, 2]"),
    ({"timesteps": [1, -1]}, ValueError, "timesteps must descend to 0 or above, got [1, -1]"),
    ({"timesteps": [2, 1]}, ValueError, "timesteps must be below the 2 of alphas_cumprod, got 2"),
    ({"timesteps": [1.0]}, TypeError, "timesteps must be integers, got [1.0]"),
    ({"timesteps": torch.tensor([1.0])}, TypeError, "timesteps must be integers, got float32"),
    ({"timesteps": [True]}, TypeError, "timesteps must be integers, got [True]"),
    ({"timesteps": torch.tensor([True])}, TypeError, "timesteps must be integers, got bool"),
    ({"timesteps": {1: 0}}, TypeError, "timesteps must be a tensor or a sequence, got dict"),
    ({"timesteps": {1}}, TypeError, "timesteps must be a tensor or a sequence, got set"),
    (
        {"timesteps": torch.ones(1, dtype=torch.int64, device="meta")},
        ValueError,
        "timesteps must hold values, got a meta tensor",
    ),
    (
        {"timesteps": [torch.ones((), dtype=torch.int64, device="meta")]},
        ValueError,
        "timesteps must hold values, got a meta tensor",
    ),
    (
        {"final_alpha_cumprod": torch.ones((), device="meta")},
        ValueError,
        "final_alpha_cumprod must hold values, got a meta tensor",
    ),
    ({"timesteps": torch.tensor(1)}, ValueError, "timesteps must be one-dimensional, got ()"),
    ({"final_alpha_cumprod": 0.0}, ValueError, "final_alpha_cumprod must be in (0, 1], got 0.0"),
    (
        {"final_alpha_cumprod": "1"},
        TypeError,
        "final_alpha_cumprod must be a number or a 0-d tensor, got str",
    ),
    (
        {"method": "belm", "exact": False, "timesteps": [1, 0]},
        ValueError,
        (
            "alphas_cumprod must grow at every step, the last one included, for method='belm', "
            "got 0.9 after 0.9 at step 1"
        ),
    ),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_SAMPLERS, ids=[str(call[0])[:60] for call in BAD_SAMPLERS]
)
def test_a_bad_sampler_is_refused(options: dict, error: type[Exception], message: str) -> None:
    good = {"alphas_cumprod": [0.9, 0.8], "timesteps": [1]}
    ReversibleSampler(**good)
    refused(error, message, ReversibleSampler, **{**good, **options})


BAD_CALLS = [
    ({"eps_fn": None}, TypeError, "eps_fn must be callable, got NoneType"),
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"x": torch.ones(SHAPE, device="meta")}, ValueError, "x must hold values, got a meta tensor"),
    (
        {"x": torch.ones(SHAPE).to_sparse()},
        TypeError,
        "x must be a strided tensor, got torch.sparse_coo",
    ),
    ({"progress": 1}, TypeError, "progress must be a bool, got int"),
    (
        {"x": torch.ones(SHAPE).long()},
        TypeError,
        "x must be one of float32, bfloat16, float16, float64, got int64",
    ),
    ({"y": torch.ones(SHAPE).half()}, TypeError, "y must have x's dtype float32, got float16"),
    ({"y": torch.ones(4, 5, 6)}, ValueError, f"y must have x's shape {SHAPE}, got (4, 5, 6)"),
    ({"y": torch.ones(SHAPE, device="meta")}, ValueError, "y must be on x's device cpu, got meta"),
    (
        {"x": torch.full(SHAPE, torch.nan)},
        ValueError,
        "x must be finite and at most 3.96e+06 in size for exact=True, got nan",
    ),
    (
        {"y": torch.full(SHAPE, 5e6)},
        ValueError,
        "y must be finite and at most 3.96e+06 in size for exact=True, got 5e+06",
    ),
    ({"eps_fn": lambda x, t: None}, TypeError, "eps_fn's result must be a tensor, got NoneType"),
    ({"eps_fn": lambda x, t: (x,)}, TypeError, "eps_fn's result must be a tensor, got tuple"),
    (
        {"eps_fn": lambda x, t: x.long()},
        TypeError,
        "eps_fn's result must be one of float32, bfloat16, float16, float64",
    ),
    (
        {"eps_fn": lambda x, t: x[:1]},
        ValueError,
        f"eps_fn's result must have x's shape {SHAPE}, got (1, 4, 5, 6)",
    ),
    (
        {"eps_fn": lambda x, t: x.to("meta")},
        ValueError,
        "eps_fn's result must be on x's device cpu, got meta",
    ),
    (
        {"eps_fn": lambda x, t: torch.rand_like(x)},
        ValueError,
        "eps_fn must be deterministic for exact inversion, got two",
    ),
    (
        {"eps_fn": lambda x, t: x / 0},
        OffGridError,
        "eps_fn's result must be finite and keep the latents within the grid",
    ),
    (
        {"eps_fn": lambda x, t: x * torch.nan},
        OffGridError,
        "got nan grid steps at step 0 (timestep 751)",
    ),
    (
        {"eps_fn": lambda x, t: x * 9e6 if t < 400 else x},
        OffGridError,
        "grid steps at step 2 (timestep 251)",
    ),
]


@on_cpu
@pytest.mark.parametrize(("options", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_a_bad_call_is_refused(
    options: dict, error: type[Exception], message: str, backend: str
) -> None:
    good = {"eps_fn": lambda x, t: torch.tanh(x), "x": torch.ones(SHAPE), "y": torch.ones(SHAPE)}
    chain = sampler(4, backend=backend)
    chain.sample(**good)
    refused(error, message, chain.sample, **{**good, **options})


@on_cpu
@pytest.mark.parametrize(
    ("forward", "where"), [(True, "step 0 (timestep 751)"), (False, "step 3 (timestep 1)")]
)
def test_a_first_step_of_one_latent_that_is_not_finite(
    forward: bool, where: str, backend: str
) -> None:
    """The DDIM step that makes the other latent is one of the chain: its fault is the network's."""
    chain = sampler(4, method="bdia", backend=backend)
    call = chain.sample if forward else chain.invert
    for factor in (torch.nan, torch.inf, 1e30):
        message = (
            "eps_fn's result must be finite and keep the latents within the grid of 2^50 steps, got"
        )
        refused(
            OffGridError, message, call, lambda x, t, factor=factor: x * factor, torch.ones(SHAPE)
        )
        refused(
            OffGridError, where, call, lambda x, t, factor=factor: x * factor, torch.ones(SHAPE)
        )


@on_cpu
def test_a_pair_that_parts_beyond_the_grid_says_what_may_help(backend: str) -> None:
    chain, advice = (
        sampler(200, backend=backend),
        "a pair that was sampled, fewer steps or a mix nearer 1 may help",
    )
    refused(OffGridError, advice, chain.invert, Network(), torch.randn(SHAPE))
    refused(
        OffGridError, "eps_fn's result must be finite", chain.invert, Network(), torch.randn(SHAPE)
    )
    with pytest.raises(OffGridError) as refusal:
        chain.invert(lambda x, t: x * torch.nan, torch.randn(SHAPE))
    assert "may help" not in str(refusal.value)
    far = torch.full(SHAPE, 2.0**50 * chain._chain.end.scale, dtype=torch.float64)
    message = "x and y must be finite and keep the latents within the grid of 2^50 steps, got"
    refused(ValueError, message, chain.invert, Network(), far, -far)


@on_cpu
def test_chains_too_long_for_the_grid_run_in_floats(backend: str) -> None:
    """0.4^1000 is 0 in float64; floats keep no such scale."""
    options = {"mix": 0.4, "backend": backend}
    chain = ReversibleSampler(ALPHAS, range(999, -1, -1), **options, exact=False)
    assert chain.sample(lambda x, t: torch.tanh(x), torch.randn(3))[0].isfinite().all()
    refused(
        ValueError,
        "timesteps must be at most",
        ReversibleSampler,
        ALPHAS,
        range(999, -1, -1),
        **options,
    )


def test_what_ddim_cannot() -> None:
    chain, x = sampler(3, method="ddim"), torch.randn(SHAPE)
    refused(
        ValueError,
        "method must be edict, bdia or belm for invert, got 'ddim'",
        chain.invert,
        Network(),
        x,
    )
    refused(
        ValueError, "y must be None for method='ddim', got a tensor", chain.sample, Network(), x, x
    )


@pytest.mark.parametrize(("method", "per_step"), [("edict", 5), ("bdia", 5), ("ddim", 5)])
def test_progress(method: str, per_step: int, capsys: pytest.CaptureFixture) -> None:
    chain, x = sampler(5, method=method), torch.randn(SHAPE)
    chain.sample(Network(), x)
    assert capsys.readouterr().err == ""
    chain.sample(Network(), x, progress=True)
    shown = capsys.readouterr().err
    assert f"{method} sample" in shown
    assert f"{per_step}/{per_step}" in shown


def test_progress_without_tqdm(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    sampler(5).invert(Network(), torch.randn(SHAPE), progress=True)
    assert capsys.readouterr().err == "edict invert: 5 steps (a bar needs tqdm)\n"
