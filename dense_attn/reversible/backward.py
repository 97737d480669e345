"""The gradient through a whole chain, in memory that does not grow with the number of steps."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from dense_attn import reference
from dense_attn.reversible import pairs, trajectory
from dense_attn.reversible.links import Link
from dense_attn.reversible.network import Network
from dense_attn.reversible.pairs import slots
from dense_attn.reversible.plan import Plan
from dense_attn.reversible.strides import laid_out

_ONE_DERIVATIVE = "ReversibleSampler must be differentiated once, got a second derivative"


def differentiable(plan: Plan, *tensors: Tensor | None) -> bool:
    """Whether the results of a run are to have a gradient."""
    tensors = (*tensors, *_parameters(plan))
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def run(plan: Plan, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The latents at the other end of the chain; differentiable."""
    if not plan.chain.links and not plan.exact:
        return slots(plan.chain.end, *slots(plan.chain.start, x, y))
    if not differentiable(plan, x, y):
        with torch.no_grad():
            return trajectory.run(plan, x, y)
    return _Run.apply(plan, x, y, *_parameters(plan))


def _parameters(plan: Plan) -> list[Tensor]:
    """The parameters of eps_fn that are to get a gradient."""
    if not plan.parameters or not isinstance(plan.eps_fn, nn.Module):
        return []
    return [p for p in plan.eps_fn.parameters() if p.requires_grad]


class _Run(torch.autograd.Function):
    """A whole chain: its ends are saved, what lies between is found again on the way back."""

    @staticmethod
    def forward(ctx, plan: Plan, x: Tensor, y: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        ctx.plan, ctx.network = plan, Network(plan, x)
        latents = trajectory.run(plan, x, y)
        ctx.save_for_backward(x, y, *latents, *params)
        return latents

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        x, y, end_x, end_y, *params = ctx.saved_tensors
        with torch.no_grad():
            way_back = _WayBack(ctx.plan, ctx.network, params, end_x, end_y, grad_x, grad_y)
            way_back.walk()
            way_back.pair.missed(x, y)
        grads = [grad.to(like.dtype) for grad, like in zip(way_back.latents(), (x, y))]
        grads += [
            grad if grad is not None else torch.zeros_like(p)
            for grad, p in zip(way_back.of_params, params)
        ]
        if torch.is_grad_enabled():
            grads = _Once.apply(len(grads), *grads, grad_x, grad_y, x, y, *params)
        return None, *grads


class _WayBack:
    """The chain inverted link by link, each network call run again with its gradient."""

    def __init__(
        self,
        plan: Plan,
        network: Network,
        params: list[Tensor],
        x: Tensor,
        y: Tensor,
        grad_x: Tensor,
        grad_y: Tensor,
    ) -> None:
        self.plan, self.network, self.params = plan, network, params
        self.of_params: list[Tensor | None] = [None] * len(params)
        self.inverse = plan.chain.inverse()
        self.pair = pairs.start(plan, self.inverse, x, y)
        wide = reference.accumulation_dtype(x.dtype)
        grads = (laid_out(grad.to(wide), network.strides) for grad in (grad_x, grad_y))
        self.x, self.y = slots(plan.chain.end, *grads)
        # whether a call that records gives what a call without gradients gives
        self.same_bits = not plan.exact

    def walk(self) -> None:
        for at, link in enumerate(reversed(self.plan.chain.links)):
            with self.plan.memory:
                self._through_mix(link.then)
                fed = self.pair.fed.detach()
            quiet = None
            if self.plan.exact and (at == 0 or not self.same_bits):
                quiet = (self.network.repeated if at == 0 else self.network)(fed, link.step)
            eps, grad_fed = self._through_network(fed, link, recorded=at == 0)
            if quiet is not None:
                self.same_bits = torch.equal(quiet, eps)
                eps = quiet
            with self.plan.memory:
                self._through_link(link, grad_fed)
            self.network.update(self.pair, eps, link.step)
        self._through_mix(self.plan.chain.first)

    def latents(self) -> tuple[Tensor, Tensor]:
        return slots(self.plan.chain.start, self.x, self.y)

    def _through_network(self, fed: Tensor, link: Link, recorded: bool) -> tuple[Tensor, Tensor]:
        """eps and the gradient of the fed latent; those of the parameters are added up."""
        with torch.enable_grad():
            fed.requires_grad_()
            eps = self.network(fed, link.step)
        if recorded and self.plan.parameters:
            _warn_of_captured(eps, {fed, *self.params})
        updated = self.x if link.update_x else self.y
        if not eps.requires_grad:
            return eps, torch.zeros_like(fed)
        grad_fed, *grads = torch.autograd.grad(
            eps, (fed, *self.params), (link.eps * updated).to(eps.dtype), allow_unused=True
        )
        for i, grad in enumerate(grads):
            if grad is not None:
                self.of_params[i] = grad if self.of_params[i] is None else self.of_params[i] + grad
        if grad_fed is None:
            return eps.detach(), torch.zeros_like(fed)
        return eps.detach(), laid_out(grad_fed, self.network.strides)

    def _through_link(self, link: Link, grad_fed: Tensor) -> None:
        updated, fed = (self.x, self.y) if link.update_x else (self.y, self.x)
        fed = self.plan.kernels.leapfrog_step(fed, updated, grad_fed, 1.0, link.other, 1.0)
        updated = link.keep * updated
        self.x, self.y = (updated, fed) if link.update_x else (fed, updated)

    def _through_mix(self, direction: str) -> None:
        """The transpose of the mix x <- p x + q y, y <- q x + p y, or of its inverse."""
        if not direction:
            return
        p, q, combine = self.plan.chain.mix, 1 - self.plan.chain.mix, self.plan.kernels.ddim_step
        if direction == "mix":
            x = combine(self.x, self.y, None, 1.0, q, 1.0)
            self.x, self.y = p * x, combine(x, self.y, None, q, p, 1.0)
        else:
            y = combine(self.y, self.x, None, 1.0, -q / p, 1.0)
            self.x, self.y = combine(self.x, y, None, 1 / p, -q / p, 1.0), y / p


def _warn_of_captured(eps: Tensor, known: set[Tensor]) -> None:
    """Warn when eps depends on tensors that get no gradient, as eps_fn is no module with them."""
    seen, waiting, lost = set(), [eps.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        lost += hasattr(node, "variable") and all(node.variable is not tensor for tensor in known)
        waiting += [following for following, _ in node.next_functions]
    if lost:
        rule = "eps_fn must be an nn.Module to hand gradients to its parameters"
        got = f"got {lost} tensors that it captures, which get none"
        advice = "(requires_grad_(False) says that they need none)"
        warnings.warn(f"{rule}, {got} {advice}", stacklevel=2)


class _Once(torch.autograd.Function):
    """Gradients as functions of what they depend on: a second derivative is refused, not 0."""

    @staticmethod
    def forward(ctx, num_grads: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN001
        return tuple(tensor.clone() for tensor in tensors[:num_grads])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> None:  # noqa: ANN001
        raise RuntimeError(_ONE_DERIVATIVE)
