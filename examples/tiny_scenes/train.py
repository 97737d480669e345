"""Trains the model: `python -m dense_attn.examples.tiny_scenes.train --steps 3600 --output run`,
again to go on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from dense_attn import _command, _files

from .model import TOKENS, load_pipeline, set_weights, untrained, weights_of
from .scenes import Scene, caption, draw_scene, left_out, render

RATE, WARM_UP, DECAY = 1.5e-3, 100, 0.997  # of learning, its first steps, of the average of weights
ALONE = 0.3  # captions whose phrases are encoded alone and put in, as DenseDiffusion does
EMPTY = 0.1  # captions left out, for classifier-free guidance
PARTLY = 0.5  # captions that leave something open, as those of photographs do
TOUCHING = 0.3  # scenes whose things touch
NOISY = 0.5  # times from the noisiest 40 %, where a scene is decided
KEPT_EVERY = 250  # steps


@dataclass
class Run:
    """What the processes of a training are told."""

    output: Path
    steps: int
    batch: int  # of one process
    processes: int
    device: str
    start: Path | None  # weights of an earlier training


def main(argv: list[str] | None = None) -> None:
    """Train, or go on where the last run ended, and write weights, losses and their plot."""
    parser = argparse.ArgumentParser(
        "python -m dense_attn.examples.tiny_scenes.train", description=__doc__
    )
    parser.add_argument(
        "--output", type=Path, default=Path("tiny_scenes_run"), help="folder (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=3600, help="of both together with what is done (%(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=32, help="scenes a process and step (%(default)s)"
    )
    parser.add_argument("--start", type=Path, help="weights to begin with (default: random ones)")
    parser.add_argument(
        "--processes", type=int, default=None, help="default: one a core, one on a GPU"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.start and (arguments.output / "checkpoint.pt").exists():
        parser.error(
            f"--start must begin in an empty folder, got the checkpoint of {arguments.output}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = arguments.processes or (1 if device == "cuda" else os.cpu_count())
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = Run(
        arguments.output, arguments.steps, arguments.batch, processes, device, arguments.start
    )
    if processes == 1:
        _work(0, run)
    else:
        (run.output / "meeting").unlink(missing_ok=True)
        torch.multiprocessing.spawn(_work, (run,), processes)
    _plot(run.output)
    print(f"wrote {run.output / 'weights.safetensors'} and {run.output / 'loss.png'}")


def _work(rank: int, run: Run) -> None:
    """One process: its own scenes, gradients shared with the others."""
    if run.processes > 1:
        torch.set_num_threads(1)
        meeting = f"file://{(run.output / 'meeting').absolute()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=run.processes)
    torch.manual_seed(0)  # the same weights everywhere
    pipe = (load_pipeline(run.start) if run.start else untrained()).to(run.device)
    pipe.unet.set_attn_processor(
        AttnProcessor()
    )  # the backward pass of torch's fused one is slow on a CPU
    parameters = [
        p
        for part in (pipe.unet, pipe.text_encoder)
        for p in part.train().requires_grad_(True).parameters()
    ]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in weights_of(pipe).items()}
    step, losses = _resume(run, pipe, optimiser, average)
    seed = 1_000_003 * step + rank
    rng = random.Random(seed)
    torch.manual_seed(seed)
    from tqdm import tqdm

    for now in tqdm(
        range(step, run.steps), initial=step, total=run.steps, disable=rank > 0, mininterval=10
    ):
        for group in optimiser.param_groups:
            group["lr"] = (
                RATE
                * min(1, (now + 1) / WARM_UP)
                * (0.5 + 0.5 * math.cos(math.pi * now / run.steps))
            )
        loss = _loss(pipe, [_draw(rng) for _ in range(run.batch)], rng)
        optimiser.zero_grad()
        loss.backward()
        _share(parameters, run.processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())
        keep = min(DECAY, (now + 1) / (now + 10))
        for name, value in weights_of(pipe).items():
            average[name].lerp_(value.detach(), 1 - keep) if value.is_floating_point() else average[
                name
            ].copy_(value)
        if rank == 0 and ((now + 1) % KEPT_EVERY == 0 or now + 1 == run.steps):
            _keep(run, pipe, optimiser, average, losses)


def _draw(rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3), (1, 3, 2))[0]
    return draw_scene(rng, count, unseen=False, touching=rng.random() < TOUCHING)


def _loss(pipe: StableDiffusionPipeline, scenes: list[Scene], rng: random.Random) -> Tensor:
    """The mean squared error of velocities."""
    device = pipe.device
    latents = pipe.vae.encode(render(scenes).to(device) * 2 - 1).latent_dist.sample()
    times = [
        rng.randrange(600, 1000) if rng.random() < NOISY else rng.randrange(1000) for _ in scenes
    ]
    times, noise = torch.tensor(times, device=device), torch.randn_like(latents)
    noisy = pipe.scheduler.add_noise(latents, noise, times)
    with torch.autocast(device.type, torch.bfloat16):
        text = encode(pipe, scenes, rng)
        velocity = pipe.unet(noisy, times, encoder_hidden_states=text).sample
    wanted = pipe.scheduler.get_velocity(latents, noise, times)
    return (velocity.float() - wanted).square().mean()


def encode(pipe: StableDiffusionPipeline, scenes: list[Scene], rng: random.Random) -> Tensor:
    """Captions [B, L, C]; some are empty, some do not say all, in some the phrases are encoded
    alone.
    """
    said = [([], "") if rng.random() < EMPTY else _say(rng, scene) for scene in scenes]
    apart = [b for b in range(len(scenes)) if rng.random() < ALONE]
    alone = [phrase for b in apart for phrase in said[b][0]]
    options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    tokens = pipe.tokenizer([caption(*words) for words in said] + alone, **options).input_ids.to(
        pipe.device
    )
    states = pipe.text_encoder(tokens)[0]
    text, encoded = states[: len(scenes)].clone(), iter(states[len(scenes) :])
    for b in apart:
        start = 1
        for phrase in said[b][0]:
            length = len(phrase.split())
            text[b, start : start + length] = next(encoded)[1 : 1 + length]
            start += length + 1  # and the "and" after it
    return text


def _say(rng: random.Random, scene: Scene) -> tuple[list[str], str]:
    return left_out(rng, scene) if rng.random() < PARTLY else (scene.phrases, scene.background)


def _share(parameters: list[Tensor], processes: int) -> None:
    """The mean of all processes' gradients."""
    if processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.div_(processes).split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def _keep(
    run: Run,
    pipe: StableDiffusionPipeline,
    optimiser: torch.optim.Optimizer,
    average: dict[str, Tensor],
    losses: list,
) -> None:
    """A checkpoint to go on from and the average's weights; a file is whole or is not there."""
    from safetensors.torch import save

    state = {
        "weights": weights_of(pipe),
        "average": average,
        "optimiser": optimiser.state_dict(),
        "losses": losses,
    }
    _files.write_by(run.output / "checkpoint.pt", partial(torch.save, state))
    halves = {
        name: value.half() if value.is_floating_point() else value
        for name, value in average.items()
    }
    _files.write(run.output / "weights.safetensors", save(halves))
    _files.write(run.output / "losses.json", json.dumps([round(loss, 5) for loss in losses]))


def _resume(
    run: Run,
    pipe: StableDiffusionPipeline,
    optimiser: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> tuple[int, list[float]]:
    """Steps that a checkpoint has done, and its losses."""
    path = run.output / "checkpoint.pt"
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location=run.device)
    set_weights(pipe, state["weights"])
    optimiser.load_state_dict(state["optimiser"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return len(state["losses"]), state["losses"]


def _plot(output: Path) -> None:
    from matplotlib.figure import Figure

    losses = torch.tensor(json.loads((output / "losses.json").read_text(encoding="utf-8")))
    window = max(1, len(losses) // 100)
    smooth = losses[: len(losses) // window * window].view(-1, window).mean(1)
    figure = Figure((6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(torch.arange(len(smooth)) * window, smooth)
    axes.set(xlabel="step", ylabel="mean squared error of velocities", yscale="log")
    _files.write_by(output / "loss.png", partial(figure.savefig, format="png", dpi=120))


if __name__ == "__main__":
    raise SystemExit(_command.run("train", main))
