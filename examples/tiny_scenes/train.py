"""The training: `python -m dense_attn.examples.tiny_scenes.train`, again to go on."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from dense_attn import _command, _files

from .model import PARTS, TOKENS, load_pipeline, set_weights, untrained, weights_of
from .scenes import Scene, caption, draw_scene, left_out, render

RATE, WARM_UP, DECAY = 1.5e-3, 100, 0.997  # of learning, its first steps, of the average of weights
ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.01}
ALONE = 0.3  # captions whose phrases are encoded alone and put in, as DenseDiffusion does
EMPTY = 0.1  # captions left out, for classifier-free guidance
PARTLY = 0.5  # captions that leave something open, as those of photographs do
TOUCHING = 0.3  # scenes whose things touch
NOISY = 0.5  # times from the noisiest 40 %, where a scene is decided
KEPT_EVERY = 250  # steps


@dataclass(frozen=True)
class Recipe:
    """A model's own part of its training, in functions of a module, which other processes find."""

    program: str  # the module to run
    make: Callable[[Path | None], DiffusionPipeline]  # with the weights of a file, or random ones
    parts: tuple[str, ...]  # of the pipeline, that are trained
    optimisers: Callable[[list[Tensor]], list[torch.optim.Optimizer]]
    loss: Callable[[DiffusionPipeline, list[Scene], random.Random, float], Tensor]
    steps: int


@dataclass
class Run:
    """The settings that the processes of a training share."""

    recipe: Recipe
    output: Path
    steps: int
    batch: int  # of one process
    processes: int
    device: str
    start: Path | None  # weights of an earlier training


def main(argv: list[str] | None = None) -> None:
    """Train the first model."""
    train(RECIPE, argv)


def train(recipe: Recipe, argv: list[str] | None = None) -> None:
    """Train, or go on where the last run ended, and write weights, losses and their plot."""
    run = _parse(recipe, argv)
    run.output.mkdir(parents=True, exist_ok=True)
    if run.processes == 1:
        _work(0, run)
    else:
        (run.output / "meeting").unlink(missing_ok=True)
        torch.multiprocessing.spawn(_work, (run,), run.processes)
    _plot(run.output)
    print(f"wrote {run.output / 'weights.safetensors'} and {run.output / 'loss.png'}")


def _parse(recipe: Recipe, argv: list[str] | None) -> Run:
    folder = recipe.program.split(".")[-2] + "_run"
    parser = argparse.ArgumentParser(f"python -m {recipe.program}", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path(folder), help="folder (%(default)s)")
    steps = "of both together with what is done (%(default)s)"
    add("--steps", type=int, default=recipe.steps, help=steps)
    add("--batch", type=int, default=32, help="scenes a process and step (%(default)s)")
    add("--start", type=Path, help="weights to begin with (default: random ones)")
    add("--processes", type=int, default=None, help="default: one a core, one on a GPU")
    given = parser.parse_args(argv)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if given.start and (given.output / "checkpoint.pt").exists():
        got = f"the checkpoint of {given.output}"
        parser.error(f"--start must begin in an empty folder, got {got}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = given.processes or (1 if device == "cuda" else os.cpu_count())
    return Run(recipe, given.output, given.steps, given.batch, processes, device, given.start)


def _work(rank: int, run: Run) -> None:
    """One process: its own scenes, gradients shared with the others."""
    if run.processes > 1:
        torch.set_num_threads(1)
        meeting = f"file://{(run.output / 'meeting').absolute()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=run.processes)
    torch.manual_seed(0)  # the same weights everywhere
    training = Training(run)
    step = len(training.losses)
    seed = 1_000_003 * step + rank
    rng = random.Random(seed)
    torch.manual_seed(seed)
    from tqdm import tqdm

    shown = {"initial": step, "total": run.steps, "disable": rank > 0, "mininterval": 10}
    for now in tqdm(range(step, run.steps), **shown):
        drawn = [_draw(rng) for _ in range(run.batch)]
        training.update(now, run.recipe.loss(training.pipe, drawn, rng, now / run.steps))
        if rank == 0 and ((now + 1) % KEPT_EVERY == 0 or now + 1 == run.steps):
            training.keep()


class Training:
    """The model in one process, its optimiser, its average, and what is kept of them in files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.pipe = run.recipe.make(run.start).to(run.device)
        trained = (getattr(self.pipe, part) for part in run.recipe.parts)
        self.parameters = [
            p for part in trained for p in part.train().requires_grad_(True).parameters()
        ]
        self.optimisers = run.recipe.optimisers(self.parameters)
        self.rates = [optimiser.defaults["lr"] for optimiser in self.optimisers]
        self.average = {name: value.detach().clone() for name, value in self._weights().items()}
        self.losses: list[float] = []  # one a step
        self._resume()

    def update(self, step: int, loss: Tensor) -> None:
        """One step of the optimiser, of all processes together, and of the average."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.run.steps)
        pace = min(1, (step + 1) / WARM_UP) * cosine
        for optimiser, rate in zip(self.optimisers, self.rates):
            optimiser.param_groups[0]["lr"] = rate * pace
            optimiser.zero_grad()
        loss.backward()
        _share(self.parameters, self.run.processes)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.losses.append(loss.item())
        keep = min(DECAY, (step + 1) / (step + 10))
        for name, value in self._weights().items():
            if value.is_floating_point():
                self.average[name].lerp_(value.detach(), 1 - keep)
            else:
                self.average[name].copy_(value)

    def _weights(self) -> dict[str, Tensor]:
        return weights_of(self.pipe, self.run.recipe.parts)

    def keep(self) -> None:
        """Write a checkpoint and the average's weights; a file is whole or is not there."""
        from safetensors.torch import save

        output = self.run.output
        state = {
            "weights": self._weights(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "losses": self.losses,
        }
        _files.write_by(output / "checkpoint.pt", partial(torch.save, state))
        halves = {
            name: value.half() if value.is_floating_point() else value
            for name, value in self.average.items()
        }
        _files.write(output / "weights.safetensors", save(halves))
        losses = [round(loss, 5) for loss in self.losses]
        _files.write(output / "losses.json", json.dumps(losses))

    def _resume(self) -> None:
        """Go on from a checkpoint where there is one."""
        path = self.run.output / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.run.device)
        set_weights(self.pipe, state["weights"], self.run.recipe.parts)
        for optimiser, own in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(own)
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.losses = state["losses"]


def _draw(rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3), (1, 3, 2))[0]
    return draw_scene(rng, count, unseen=False, touching=rng.random() < TOUCHING)


def _make(start: Path | None) -> StableDiffusionPipeline:
    pipe = load_pipeline(start) if start else untrained()
    # the backward pass of torch's fused attention is slow on a CPU
    pipe.unet.set_attn_processor(AttnProcessor())
    return pipe


def _optimisers(parameters: list[Tensor]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, RATE, **ADAM)]


def _loss(
    pipe: StableDiffusionPipeline, scenes: list[Scene], rng: random.Random, done: float
) -> Tensor:
    """The mean squared error of velocities."""
    device = pipe.device
    latents = pipe.vae.encode(render(scenes).to(device) * 2 - 1).latent_dist.sample()
    times = [
        rng.randrange(600, 1000) if rng.random() < NOISY else rng.randrange(1000) for _ in scenes
    ]
    times, noise = torch.tensor(times, dtype=torch.int64, device=device), torch.randn_like(latents)
    noisy = pipe.scheduler.add_noise(latents, noise, times)
    with torch.autocast(device.type, torch.bfloat16):
        text = encode(pipe, scenes, rng)
        velocity = pipe.unet(noisy, times, encoder_hidden_states=text).sample
    wanted = pipe.scheduler.get_velocity(latents, noise, times)
    return (velocity.float() - wanted).square().mean()


def encode(pipe: StableDiffusionPipeline, scenes: list[Scene], rng: random.Random) -> Tensor:
    """The states [B, L, C] of captions, of which some are empty or do not say all."""
    said = captions(pipe, scenes, rng)
    return said.joined(pipe.text_encoder(said.tokens)[0])


@dataclass
class Captions:
    """The captions of a batch, and the phrases of some of them, which are encoded alone."""

    tokens: Tensor  # of the captions, then of the phrases
    alone: list[list[str]]  # of each caption

    def joined(self, states: Tensor) -> Tensor:
        """The captions' states [B, L, C], those of phrases put in, as DenseDiffusion does."""
        text, encoded = states[: len(self.alone)].clone(), iter(states[len(self.alone) :])
        for b, phrases in enumerate(self.alone):
            start = 1
            for phrase in phrases:
                length = len(phrase.split())
                text[b, start : start + length] = next(encoded)[1 : 1 + length]
                start += length + 1  # and the "and" after it
        return text


def captions(
    pipe: DiffusionPipeline, scenes: list[Scene], rng: random.Random, easy: bool = False
) -> Captions:
    """Captions of scenes; some are empty and, unless easy, leave something out or are in parts."""
    partly, alone = (0.0, 0.0) if easy else (PARTLY, ALONE)
    said = [([], "") if rng.random() < EMPTY else _say(rng, scene, partly) for scene in scenes]
    apart = [phrases if rng.random() < alone else [] for phrases, _ in said]
    texts = [caption(*words) for words in said] + [phrase for own in apart for phrase in own]
    options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    return Captions(pipe.tokenizer(texts, **options).input_ids.to(pipe.device), apart)


def _say(rng: random.Random, scene: Scene, partly: float) -> tuple[list[str], str]:
    return left_out(rng, scene) if rng.random() < partly else (scene.phrases, scene.background)


def _share(parameters: list[Tensor], processes: int) -> None:
    """The mean of all processes' gradients."""
    if processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.div_(processes).split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def _plot(output: Path) -> None:
    from matplotlib.figure import Figure

    losses = np.array(json.loads((output / "losses.json").read_text(encoding="utf-8")))
    window = max(1, len(losses) // 100)
    smooth = losses[: len(losses) // window * window].reshape(-1, window).mean(1)
    figure = Figure((6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(len(smooth)) * window, smooth)
    axes.set(xlabel="step", ylabel="mean squared error of velocities", yscale="log")
    _files.write_by(output / "loss.png", partial(figure.savefig, format="png", dpi=120))


RECIPE = Recipe(
    "dense_attn.examples.tiny_scenes.train", _make, PARTS, _optimisers, _loss, steps=3600
)


if __name__ == "__main__":
    raise SystemExit(_command.run("train", main))
