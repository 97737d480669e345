"""Defaults that a program sets for torch, of dtype and device, change no bit of any result."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from cases import backends
from surroundings import SURROUNDINGS, assert_same, surrounded
from torch import Tensor

import dense_attn
from dense_attn import Layout, ReversibleSampler
from dense_attn.demo import picture
from dense_attn.demo import scene as scenes
from dense_attn.demo import step as layers_of
from dense_attn.verify import calls as verified_calls
from dense_attn.verify import layout_attention as verified
from dense_attn.verify import reversible as verified_chains
from dense_attn.verify import sega as verified_guidance

BOXES = [(0.0, 0.1, 1 / 3, 1.0), (0.3, 0.0, 0.7, 0.9), (0.123, 0.456, 0.789, 1.0)]
SPANS = [(1, 3), None, (4, 7)]
ALPHAS = [0.999 * 0.995**t for t in range(1000)]
TIMESTEPS = [800, 500, 200]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

Thunk = Callable[[], object]
every_surrounding = pytest.mark.parametrize("by", SURROUNDINGS, ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def with_gradients(results: object, *leaves: Tensor) -> tuple[object, ...]:
    floats = [x for x in results if x.requires_grad]
    return results, torch.autograd.grad(
        [x.double().square().sum() for x in floats], leaves, allow_unused=True
    )


def layouts(backend: str) -> Thunk:
    labels, masks = np.arange(48).reshape(6, 8) % 3, torch.rand(2, 7, 9) > 0.5

    def of(layout: Layout) -> list[Tensor]:
        strengths = [
            layout.strength(5, 6, weight=1.0, time=0.7),
            layout.strength(3, 4, weight=0.3, time=1, exponent=0),
        ]
        grids = [
            layout.query_regions(6, 8),
            layout.order(3, 5),
            layout.area(11, 7),
            layout.token_regions(9),
        ]
        return [layout.masks, *grids, *strengths]

    def run() -> object:
        drawn = [
            Layout.from_boxes(BOXES, (512, 512), SPANS),
            Layout.from_boxes(BOXES, (7, 5), SPANS),
        ]
        given = [
            Layout.from_label_map(labels, SPANS[:2]),
            Layout.from_label_map(torch.as_tensor(labels, device="cpu")),
        ]
        return [of(layout) for layout in [*drawn, given[0], Layout(masks, SPANS[:2])]], given[
            1
        ].area(4, 4)

    return run


def attention(backend: str) -> Thunk:
    layout = Layout.from_boxes(BOXES, (16, 16), SPANS)
    strength = layout.strength(4, 6, weight=1.0, time=0.7)
    inputs = [
        [randn(2, 2, n, 8, dtype=dtype).requires_grad_() for n in (24, 9, 9)] for dtype in DTYPES
    ]

    def run() -> object:
        words, results = (layout.query_regions(4, 6), layout.token_regions(9)), []
        for q, k, v in inputs:
            for modulation in ("range", "max", "bias", "mask"):
                for c in (0.3, strength):
                    options = {"modulation": modulation, "return_lse": True, "backend": backend}
                    out = dense_attn.layout_attention(
                        q, k, v, *words, c, q_order=layout.order(4, 6), **options
                    )
                    results.append(with_gradients(out, q, k, v))
            results.append(dense_attn.tile_lists(q, k, *words, backend=backend))
            bias = dense_attn.LayoutBias(*words, 0.3)
            turned = [x.movedim(1, 2) for x in (q, k, v)]  # [B, M, H, K]
            results.append(
                dense_attn.memory_efficient_attention(*turned, attn_bias=bias, backend=backend)
            )
        return results

    return run


NUMBERS = {
    "guidance_scale": 7.5,
    "edit_threshold": 0.9,
    "edit_weights": 1 / 3,
    "enabled": True,
    "edit_momentum_scale": 0.1,
    "edit_mom_beta": 0.4,
}
LISTS = {"edit_guidance_scale": [5.0, 0.3], "warm": [True, False], "reverse": [False, True]}
ALIKE = {"edit_guidance_scale": 5.0, "warm": True, "reverse": False}
RULES = ({"sum_channels": True}, {"edit_warmup_steps": [0, 1], "edit_cooldown_steps": [None, 2]})


def guidance(backend: str) -> Thunk:
    inputs = [randn(5, 1, 4, 6, 7, dtype=dtype).requires_grad_() for dtype in DTYPES]
    masked = {"user_mask": torch.rand(6, 7) > 0.5, "backend": backend, **NUMBERS}

    def run() -> object:
        results = []
        for x in inputs:
            step = dense_attn.sega_guidance(x[0], x[1], x[2:4], None, **masked, **LISTS)
            none = dense_attn.sega_guidance(
                x[0], x[1], [], x[4].detach(), backend=backend, **NUMBERS, **ALIKE
            )
            results += [with_gradients(step, x), none]
            for rule in RULES:
                loop = dense_attn.SemanticGuidance(edit_threshold=0.7, backend=backend, **rule)
                results.append([loop(step, x[0], x[1], [x[2], x[3]]) for step in range(3)])
        return results

    return run


def percentiles(backend: str) -> Thunk:
    inputs = [randn(5, 1, 4, 6, 7, dtype=dtype).requires_grad_() for dtype in DTYPES]

    def run() -> object:
        masks = [dense_attn.percentile_mask(x, 0.37, dim=(1, -1), backend=backend) for x in inputs]
        return masks, [with_gradients(mask[:1], x) for mask, x in zip(masks, inputs)]

    return run


def steps(backend: str) -> Thunk:
    inputs = [randn(3, 1, 4, 6, 7, dtype=dtype).requires_grad_() for dtype in DTYPES]
    alpha_bar = torch.tensor(0.3, dtype=torch.float64)

    def run() -> object:
        results = []
        for x in inputs:
            for step in (dense_attn.ddim_step, dense_attn.ddim_step_inverse):
                options = {"eps_uncond": x[2], "guidance_scale": 7.3, "backend": backend}
                results.append(with_gradients([step(x[0], x[1], alpha_bar, 0.7, **options)], x))
        return results

    return run


def chains(backend: str) -> Thunk:
    inputs = [randn(1, 3, 6, 7, dtype=dtype).requires_grad_() for dtype in DTYPES]
    table, final = (
        torch.tensor(ALPHAS, dtype=torch.float32),
        torch.tensor(0.9995, dtype=torch.float32),
    )
    methods = [
        {"method": "edict"},
        {"method": "edict", "exact": False, "mix": 0.91},
        {"method": "bdia"},
    ]
    methods += [{"method": "belm", "exact": False}, {"method": "ddim", "dtype": torch.bfloat16}]

    def network(x: Tensor, t: object) -> Tensor:
        return torch.tanh(0.3 * x) * (0.9 - 0.0003 * int(t))

    def run() -> object:
        results = []
        for x in inputs:
            for method in methods:
                sampler = ReversibleSampler(
                    ALPHAS, TIMESTEPS, final_alpha_cumprod=final, backend=backend, **method
                )
                sampled = sampler.sample(network, x)
                results.append(with_gradients(sampled, x))
                if method["method"] != "ddim":
                    results.append(sampler.invert(network, *(one.detach() for one in sampled)))
            results.append(
                ReversibleSampler(table, TIMESTEPS, backend=backend).invert(network, x.detach())
            )
        return results

    return run


def optimisation(backend: str) -> Thunk:
    inputs = [randn(2, 3, 8, 8, dtype=dtype) for dtype in DTYPES]

    def network(x: Tensor, t: int) -> Tensor:
        return torch.tanh(0.3 * x) * (0.9 - 0.0003 * t)

    def run() -> object:
        torch.manual_seed(3)
        sampler, results = ReversibleSampler(ALPHAS, TIMESTEPS, backend=backend), []
        arguments = sampler, network, torch.tanh, lambda image: (image - 0.3).square().mean()
        for x in inputs:
            for options in (
                {"saliency_fn": lambda image: image.mean(1) > 0.5},
                {"tie": False, "salient_weight": 0.3},
            ):
                options = {
                    "saliency_fn": dense_attn.spectral_residual_saliency,
                    "progress": False,
                    **options,
                }
                for generator in (None, torch.Generator().manual_seed(1)):
                    first = dense_attn.optimize_latents(
                        *arguments, x, steps=1, generator=generator, **options
                    )
                    results.append(first)
                results.append(
                    dense_attn.optimize_latents(
                        *arguments, x, steps=1, state=first.state, **options
                    )
                )
        return results

    return run


def saliency(backend: str) -> Thunk:
    images = [torch.rand(2, 3, 37, 90, dtype=torch.float64).to(dtype) for dtype in DTYPES]
    return lambda: [dense_attn.spectral_residual_saliency(image) for image in images]


def programs(backend: str) -> Thunk:
    """The demo's numbers and a part of the table of `verify`."""
    layers = tuple(layer for layer in layers_of.SD15_LAYERS if layer.grid == 8)

    def run() -> object:
        scene = scenes.load_scene()
        measured = [run.difference for run in layers_of.measure(scene.layout, layers, backend)]
        inputs = [layers_of.make_inputs(layer, seed=1, batch=1) for layer in layers]
        attended = picture.attention(scene, "cross")
        case = next(islice(verified_calls.calls(), 3, None)).cast(torch.float64)
        expected = verified.exact_and_plain(case, "range")
        rows = [case.run("range", backend), *expected]
        options = verified_guidance.PLAIN
        rows += [verified_guidance._guidance(backend, torch.float32, "guidance", options)]
        rows += [verified_chains._float_step(backend, torch.bfloat16, "float steps")]
        return (
            measured,
            inputs,
            attended,
            rows,
            dense_attn.backends(),
            verified.usable("ddim_step", torch.float16, ("cpu", "reference")),
        )

    return run


CASES = (
    *(layouts, attention, guidance, percentiles, steps, chains, optimisation),
    *(saliency, programs),
)
WITHOUT_BACKEND = (layouts, saliency)


CELLS = [
    pytest.param(
        case, *backend.values, marks=backend.marks, id=f"{case.__name__}-{backend.values[0]}"
    )
    for case in CASES
    for backend in backends("reference", "cpu")
    if case not in WITHOUT_BACKEND or backend.values == ("reference",)
]


@every_surrounding
@pytest.mark.parametrize(("case", "backend"), CELLS)
@pytest.mark.filterwarnings("ignore:the way back must lead")  # in bfloat16 without a grid
def test_results_are_those_of_float32(
    case: Callable[[str], Thunk], backend: str, by: torch.dtype | torch.device
) -> None:
    run = case(backend)
    expected = run()
    with surrounded(by):
        got = run()
    assert_same(got, expected)


def test_the_cases_reach_every_public_name() -> None:
    source, returned = Path(__file__).read_text(), {"OptimizeResult", "OffGridError"}
    assert [
        name
        for name in {*dense_attn.__all__} - returned
        if f".{name}" not in source and f" {name}(" not in source
    ] == []


@pytest.mark.parametrize("by", [torch.bfloat16, torch.device("meta")], ids=str)
def test_it_is_imported_under_them(by: torch.dtype | torch.device) -> None:
    which = (
        f"torch.set_default_device('{by}')"
        if isinstance(by, torch.device)
        else f"torch.set_default_dtype({by})"
    )
    code = f"import torch; {which}; from dense_attn.verify.reversible import ALPHAS_CUMPROD as a; "
    code += "print(a[-1].item())"
    assert float(forked.run(code).stdout) == verified_chains.ALPHAS_CUMPROD[-1].item()
