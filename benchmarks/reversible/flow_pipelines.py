"""The share of a flow pipeline's chain that passes outside of its network:
`python -m dense_attn.benchmarks.reversible.flow_pipelines --json FILE`.

EDICT, exact, to the noise of latents of an image of 1,024 pixels: SD3's [1, 16, 128, 128] and
FLUX's packed [1, 4096, 64], through transformers of their shapes that are narrower and of fewer
blocks. A real network takes many times as long, and what is outside of it as long as here, so the
share of these is above that of real ones. The rehearsal is what a chain costs before it begins.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dense_attn import _command, _files
from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers.inversion.rehearsed import Rehearsed
from dense_attn.integrations.diffusers.inversion.settings import Settings

from ..harness.header import describe_run
from .chain import Clock

BAR = 0.02  # of the time of a chain
SIDE = 128  # of the latents; two pixels each in a tiny pipeline
Row = dict[str, Any]


def sd3(side: int) -> Any:
    """SD3, of 4 blocks that are 512 wide."""
    import diffusers

    pipe = tiny_pipeline(diffusers.StableDiffusion3Pipeline)
    sizes = {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64}
    sizes |= {"pos_embed_max_size": side, "caption_projection_dim": 512, "sample_size": side}
    return with_transformer(pipe, sizes)


def flux(side: int) -> Any:
    """FLUX, of 2 and 2 blocks that are 512 wide."""
    import diffusers

    pipe = tiny_pipeline(diffusers.FluxPipeline)
    sizes = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 8}
    sizes |= {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24), "in_channels": 64}
    return with_transformer(pipe, sizes)


NETWORKS = {"sd3": sd3, "flux": flux}


def with_transformer(pipe: Any, sizes: dict[str, Any]) -> Any:
    """A pipeline with a transformer of other sizes, of weights of a seed."""
    kind = type(pipe.transformer)
    config = {**pipe.transformer.config, "_use_default_values": [], **sizes}
    torch.manual_seed(0)
    pipe.transformer = kind.from_config(config).eval().requires_grad_(False)
    return pipe


def measure(name: str, steps: int, rounds: int, side: int = SIDE) -> Row:
    """The row of a pipeline: medians over rounds, of which the first is not counted."""
    pipe = NETWORKS[name](side)
    call = {"max_sequence_length": 24}
    settings = Settings("a cat", "", None, steps, call=call, size=(2 * side, 2 * side))
    start = time.perf_counter()
    chain = Rehearsed(pipe, settings, 1, torch.Generator().manual_seed(0), guided=False)
    rehearsal = time.perf_counter() - start
    clock, seconds, pairs = Clock(pipe.transformer.forward), [], []
    pipe.transformer.forward = clock
    with torch.no_grad():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            pairs = clock.walk(lambda _, x: chain.sampler.invert(chain.eps, x), chain.latents)
            seconds.append(time.perf_counter() - start)
    return {
        "pipeline": name,
        "latents": list(chain.latents.shape),
        "steps": steps,
        "seconds": statistics.median(seconds[1:]),
        "share": statistics.median(clock.shares[1:]),
        "rehearsal_seconds": rehearsal,
        "finite": all(bool(x.isfinite().all()) for x in pairs),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 where a share misses the bar or latents are not finite."""
    parser = argparse.ArgumentParser(f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--steps", type=int, default=4, help="of the chain (4)")
    parser.add_argument("--rounds", type=int, default=3, help="counted ones (3)")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="small latents: times mean nothing")
    arguments = parser.parse_args(argv)
    if arguments.json is not None:
        _files.check(arguments.json)
    side = 8 if arguments.dry_run else SIDE
    rows = []
    for name in arguments.network or NETWORKS:
        rows.append(measure(name, arguments.steps, arguments.rounds, side))
        print(json.dumps(rows[-1]), flush=True)
    good = all(row["finite"] and row["share"] <= BAR for row in rows)
    print(f"outside of the network at most {BAR:.0%} of a chain's time: {'yes' if good else 'no'}")
    if arguments.json is not None:
        header = describe_run(quick=False) | {"dry_run": arguments.dry_run}
        _files.write(arguments.json, json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0 if good or arguments.dry_run else 1


if __name__ == "__main__":
    raise SystemExit(_command.run("flow_pipelines", main))
