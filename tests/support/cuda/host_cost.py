"""The host's way to a launch of the CUDA library: `PYTHONPATH=tests/support python -m
cuda.host_cost [--json FILE]` prints the microseconds of every raw op, its launches left out, and
of the public ops around some.

On a CPU's tensors, with the checks, the choice of a kernel and the memory of results, but without
the switch to the tensors' device and its stream.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from cuda.compiled import compiled_backend

RUNTIME = compiled_backend()

import torch  # noqa: E402

import dense_attn  # noqa: E402
from dense_attn import _files  # noqa: E402
from dense_attn.benchmarks.harness.header import describe_run  # noqa: E402
from dense_attn.benchmarks.host_cost.recorded import Call, in_turn, one_thread  # noqa: E402

from .launch import launches_left_out  # noqa: E402

BOUND = 15  # microseconds a call
ROW, TILED = (f"layout_attention_fwd ({n} keys)" for n in (77, 256))


def calls() -> dict[str, Call]:
    """A small call of every raw op."""
    ops = torch.ops.dense_attn_cuda
    q, k, v = torch.randn(3, 1, 2, 77, 40, dtype=torch.bfloat16, device="cpu").unbind(0)
    long = torch.randn(1, 2, 256, 40, dtype=torch.bfloat16, device="cpu")
    words, long_words = (torch.ones(n, dtype=torch.int32, device="cpu") for n in (77, 256))
    row = (q, k, v, words, words, None, "range", 0.2, None, None, None, None, None)
    tiled = (long, long, long, long_words, long_words, *row[5:])
    x, eps, uncond = torch.randn(3, 1, 4, 8, 8, dtype=torch.float32, device="cpu").unbind(0)
    edits = torch.stack([x, eps])
    z = torch.ones(1, 4, 8, 8, dtype=torch.int64, device="cpu")
    lists = {"edit_guidance_scale": [5.0] * 2, "edit_threshold": [0.9] * 2, "weights": [1.0] * 2}
    lists |= {"partials": [0.0] * 2, "reverse": [False] * 2}
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.3, "edit_mom_beta": 0.4}
    numbers |= {"all_warm": True, "sum_channels": False, "user_mask": None}
    exact = 0.9, 0.93, True, 0.1, True, torch.float32
    return {
        ROW: lambda: ops.layout_attention_fwd(*row, 1.0, False, False),
        TILED: lambda: ops.layout_attention_fwd(*tiled, 1.0, True, True),
        "percentile_mask": lambda: ops.percentile_mask(x.view(4, 64), 0.9),
        "sega_guidance": lambda: ops.sega_guidance(x, eps, edits, x, **lists, **numbers),
        "ddim_step": lambda: ops.ddim_step(x, eps, uncond, 0.9, 0.3, 7.5),
        "leapfrog_step": lambda: ops.leapfrog_step(x, eps, uncond, 0.9, 0.3, 7.5),
        "edict_mix": lambda: ops.edict_mix(x, eps, uncond, 0.9, 0.3, 0.93, True),
        "edict_unmix": lambda: ops.edict_unmix(x, eps, uncond, 0.9, 0.3, 0.93, True),
        "exact_couple": lambda: ops.exact_couple(z, eps, 0.9, 0.3, torch.float16),
        "exact_leapfrog": lambda: ops.exact_leapfrog(z, z, eps, 0.9, 0.3, 0.1, torch.float16),
        "exact_mix": lambda: ops.exact_mix(z, z, eps, *exact),
        "exact_unmix": lambda: ops.exact_unmix(z, z, eps, *exact),
    }


def public_calls() -> dict[str, Call]:
    """The public ops that end in some of them, under the same names."""
    q, k, v = torch.randn(3, 1, 2, 77, 40, dtype=torch.bfloat16, device="cpu").unbind(0)
    long = torch.randn(1, 2, 256, 40, dtype=torch.bfloat16, device="cpu")
    words, long_words = (torch.ones(n, dtype=torch.int32, device="cpu") for n in (77, 256))
    x, eps, uncond = torch.randn(3, 1, 4, 8, 8, dtype=torch.float32, device="cpu").unbind(0)
    edits, on = torch.stack([x, eps]), [True] * 2
    lists = {"edit_guidance_scale": [5.0] * 2, "edit_threshold": [0.9] * 2, "warm": on}
    lists |= {"edit_weights": [1.0] * 2, "enabled": on, "reverse": [False] * 2}
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.3, "edit_mom_beta": 0.4}
    by = {"backend": "cuda"}
    guided = {"eps_uncond": uncond, "guidance_scale": 7.5}
    return {
        ROW: lambda: dense_attn.layout_attention(q, k, v, words, words, 1.0, **by),
        TILED: lambda: dense_attn.layout_attention(
            long, long, long, long_words, long_words, 1.0, return_lse=True, **by
        ),
        "percentile_mask": lambda: dense_attn.percentile_mask(x.view(4, 64), 0.9, dim=-1, **by),
        "sega_guidance": lambda: dense_attn.sega_guidance(
            x, eps, edits, x, **lists, **numbers, **by
        ),
        "ddim_step": lambda: dense_attn.ddim_step(x, eps, 0.5, 0.6, **guided, **by),
    }


def microseconds(named: dict[str, Call]) -> dict[str, float]:
    """The median of each call's rounds."""
    for call in named.values():
        call()
    medians = {name: statistics.median(in_turn(call)[0]) for name, call in named.items()}
    return {name: round(1e6 * seconds, 1) for name, seconds in medians.items()}


def main() -> None:
    """Print the medians, write them where asked."""
    parser = argparse.ArgumentParser("python -m cuda.host_cost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    arguments = parser.parse_args()
    with one_thread(), torch.no_grad(), launches_left_out(RUNTIME):
        raw, public = microseconds(calls()), microseconds(public_calls())
    for name, value in raw.items():
        around = f", with the public op {public[name]}" if name in public else ""
        above = "" if value <= BOUND else f", above {BOUND}"
        print(f"{name:<33}{value:>7.1f} us{above}{around}")
    if arguments.json:
        found = {"header": describe_run(False), "raw": raw, "public": public}
        _files.write(arguments.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
