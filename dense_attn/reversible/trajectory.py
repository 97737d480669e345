"""Running a chain from one end to the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from dense_attn import _progress
from dense_attn.reversible import ddim, pairs
from dense_attn.reversible.moments import Moment, move
from dense_attn.reversible.network import Network
from dense_attn.reversible.plan import Plan


def run(plan: Plan, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The latents at the other end of the chain, without gradients."""
    network = Network(plan, x)
    pair = pairs.start(plan, plan.chain, x, y)
    per_step = plan.chain.links_per_step
    steps = len(plan.chain.links) // per_step
    with _progress.bar(steps, plan.progress, shown=bool(plan.progress)) as advance:
        for at, link in enumerate(plan.chain.links):
            call = network.repeated if plan.exact and at == 0 else network
            with plan.memory:
                fed = pair.fed
            network.update(pair, call(fed, link.step), link.step)
            if at % per_step == per_step - 1:
                advance()
    with plan.memory:
        return pair.latents()


def run_plain(plan: Plan, moments: Sequence[Moment], x: Tensor) -> Tensor:
    """The latent at the end of plain steps, DDIM's or Euler's; differentiable by plain autograd."""
    network, steps = Network(plan, x), len(moments) - 1
    with _progress.bar(steps, plan.progress, shown=bool(plan.progress)) as advance:
        for step, (now, then) in enumerate(pairwise(moments)):
            with plan.memory:
                fed = x.to(plan.dtype)
            eps = network(fed, step)
            with plan.memory:
                x = ddim.apply(x, eps, None, *move(now, then), 1.0, plan.backend)
            advance()
    return x
