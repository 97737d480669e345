"""Samplers of DDIM and of flows that can be undone: exact inversion and cheap gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends import table
from dense_attn.reversible import backward, links, network, read_scheduler, schedule, trajectory
from dense_attn.reversible.moments import move
from dense_attn.reversible.network import eager
from dense_attn.reversible.plan import EpsFn, Memory, Plan
from dense_attn.reversible.strides import contiguous_strides, dense_strides, laid_out

PAIRED = ("edict", "bdia", "belm")
PLAIN = ("ddim", "euler")  # for sampling alone: of a noise schedule, of a flow
_MOST_AMPLIFIED = 100.0


class ReversibleSampler:
    """DDIM, or a rectified flow, that runs backwards: exact inversion and cheap gradients.

    A chain keeps a pair of latents. With `D` the DDIM step (of a flow, which `from_scheduler`
    makes, Euler's), `eps(x)` the network and q = 1 - mix, one step is

    - `"edict"`: `x <- D(x, eps(y))`, `y <- D(y, eps(x))`, then `x <- mix*x + q*y`,
      `y <- q*x + mix*y`; the order of the two couplings alternates. The pair: two latents of one
      time, equal at the start.
    - `"bdia"`: `x_prev = gamma*x_next - gamma*D(x_t -> next) + D(x_t -> prev)`. The pair: the
      latent at an end of the chain and its neighbour in time. Errors grow by 1/gamma a step on the
      way to the noise: gamma below 1 is for sampling, or for a handful of steps (growth up to 100).
    - `"belm"`: O-BELM, the leapfrog of second order, in floats alone; pairs as in `"bdia"`.
    - `"ddim"`, and `"euler"` of a flow: plain steps, `sample` alone; both latents returned are the
      one there is. Differentiable by plain autograd: any number of times, also in what eps_fn
      captures, in memory that grows with the number of steps.

    With exact=True the latents are integers times a table of scales: every step adds a rounded
    function of the *other* latent and is undone to the last bit, whatever the precision of the
    network, which must be deterministic: the first call is repeated once to see. Latents are
    returned in float64, which holds them exactly, so `invert(*sample(x))` starts from the very same
    bits and returns x to the grid's rounding (2^-26 for short chains). Latents are held, fed to
    eps_fn and returned contiguous: networks round by the order of memory, and equal bits are to
    give equal results. With exact=False latents stay in x's dtype and memory order, and a round
    trip loses digits (EDICT: as mix^(-2*steps)).

    EDICT parts a pair by mix^(-2*steps) on the way to the noise, by its own mathematics. A pair
    that `sample` returned comes back together; one of an image alone (y=None) parts for good: at
    mix 0.93, 50 steps are fine, while 200 leave the grid with most networks, or end in noise of no
    use. Invert a sampled pair, take fewer steps or a mix nearer 1.

    A call inside torch.compile breaks the graph and runs eagerly, its backward too; eps_fn may
    itself be compiled. torch.func's transforms and forward-mode differentiation are refused, for
    plain steps where `ddim_step` refuses them.

    Args:
        alphas_cumprod: 1-D tensor or sequence, indexed by timestep; the entries used are in (0, 1]
            and do not rise with the timesteps, the others may be anything.
        timesteps: descending integers, a tensor or a sequence; eps_fn is handed its elements.
        method: one of the rules above, but for `"euler"`.
        mix: EDICT's p, in (0, 1].
        gamma: BDIA's gamma, in (0, 1]; 1 for exact=True.
        alternate: whether the order of EDICT's couplings alternates.
        exact: inversion to the last bit, for `"edict"` and `"bdia"`; no matter to plain steps.
        final_alpha_cumprod: where the last step goes, alphas_cumprod[0] when None.
        dtype: of what eps_fn receives.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; a named one runs or
            raises.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; a chain whose
            integers would not fit.

    Source: Wallace et al., EDICT, CVPR 2023; Zhang et al., BDIA, ECCV 2024; Wang et al., BELM,
    NeurIPS 2024.

    Example:
        >>> import torch, dense_attn
        >>> alphas = torch.linspace(0.999, 0.01, 1000)
        >>> sampler = dense_attn.ReversibleSampler(alphas, range(981, 0, -20))
        >>> image = sampler.sample(lambda x, t: torch.tanh(x), torch.randn(1, 4, 8, 8))
        >>> noise = sampler.invert(lambda x, t: torch.tanh(x), *image)
        >>> all(map(torch.equal, sampler.sample(lambda x, t: torch.tanh(x), *noise), image))
        True
    """

    def __init__(
        self,
        alphas_cumprod: Tensor | Sequence[float],
        timesteps: Tensor | Sequence[int],
        *,
        method: str = "edict",
        mix: float = 0.93,
        gamma: float = 1.0,
        alternate: bool = True,
        exact: bool = True,
        final_alpha_cumprod: float | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        steps = schedule.from_alphas(alphas_cumprod, timesteps, final_alpha_cumprod)
        self._set_up(steps, method, mix, gamma, alternate, exact, dtype, backend)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: object,
        *,
        method: str = "edict",
        mix: float = 0.93,
        gamma: float = 1.0,
        alternate: bool = True,
        exact: bool = True,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> ReversibleSampler:
        """A sampler on the schedule that a scheduler of diffusers was set to.

        A flow's scheduler (FlowMatchEulerDiscreteScheduler and its like, or one with
        use_flow_sigmas) makes chains of a rectified flow: `x_next = x + (sigma_next - sigma)*v` in
        the place of the DDIM step, and eps_fn returns the velocity v, noise - data (data - noise
        with invert_sigmas); its t is the scheduler's, of 1000, where some networks take t / 1000.
        Shifts, sigmas given by hand and few steps are set_timesteps' own. Others (DDIM, DPM-Solver,
        Euler and their like) make DDIM's chains, on their sigmas where they have them: eps_fn
        receives and returns what it does for the constructor, whatever the scheduler scales.

        The schedule alone is taken, not the rule of a step: no noise added, no clipping, no higher
        order.

        Args:
            scheduler: an object with timesteps, num_inference_steps, and either alphas_cumprod
                or sigmas; set_timesteps was called. Nothing in it is changed.
            method: `"edict"`, `"bdia"`, `"belm"`, and, for `sample` alone, plain steps: `"ddim"`
                of a noise schedule, `"euler"` of a flow.
            mix, gamma, alternate, exact, dtype, backend: as for the constructor.

        Raises:
            ValueError, TypeError: an argument breaks the rule that the message names; the schedule
                is of neither kind.

        Source: Liu et al., Flow Straight and Fast, ICLR 2023.

        Example:
            >>> import torch, dense_attn
            >>> from types import SimpleNamespace
            >>> sigmas = torch.linspace(1, 0, 9)  # diffusers' schedulers hold these numbers too
            >>> flow = dict(sigmas=sigmas, timesteps=1000 * sigmas[:-1], num_inference_steps=8)
            >>> flow = SimpleNamespace(**flow, config=SimpleNamespace(use_flow_sigmas=True))
            >>> sampler = dense_attn.ReversibleSampler.from_scheduler(flow)
            >>> image = sampler.sample(lambda x, t: torch.tanh(x), torch.randn(1, 4, 8, 8))
            >>> noise = sampler.invert(lambda x, t: torch.tanh(x), *image)
            >>> all(map(torch.equal, sampler.sample(lambda x, t: torch.tanh(x), *noise), image))
            True
        """
        sampler = cls.__new__(cls)
        with _checks.renamed(read_scheduler.WORDS):
            steps = read_scheduler.read(scheduler)
            sampler._set_up(steps, method, mix, gamma, alternate, exact, dtype, backend)
        return sampler

    def _set_up(
        self,
        steps: schedule.Schedule,
        method: str,
        mix: float,
        gamma: float,
        alternate: bool,
        exact: bool,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        methods = (*PAIRED, "euler" if steps.flow else "ddim")
        self.method = _checks.choice("method", method, methods)
        self.mix, self.gamma = schedule.above_0("mix", mix), schedule.above_0("gamma", gamma)
        self.alternate = _checks.flag("alternate", alternate)
        self.exact = _checks.flag("exact", exact) and method not in PLAIN
        if dtype not in _checks.DTYPES:
            _checks.refuse("dtype", _checks.DTYPE_RULE, dtype, TypeError)
        self.dtype, self.backend = dtype, _checks.choice("backend", backend, ("auto", *table.ORDER))
        self.schedule, self.timesteps = steps, steps.timesteps
        numbers = self.mix, self.gamma, self.alternate, self.exact
        self._chain = links.build(self.method, steps, *numbers)

    @property
    def alpha_bars(self) -> list[float]:
        """alpha_bar at each timestep and where the last step goes; all 1 for a flow."""
        return [moment.signal for moment in self.schedule.moments]

    @eager
    def sample(
        self,
        eps_fn: EpsFn,
        x: Tensor,
        y: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """From noise to image latents.

        Args:
            eps_fn: `eps_fn(x, t) -> eps`, of a flow the velocity: x's shape, one of the four float
                dtypes; classifier-free guidance and autocast belong inside it or around the call.
                It may write to the x it is handed.
            x: the latent at the first timestep, any shape.
            y: the other latent of the pair; None makes EDICT start from (x, x) and the leapfrogs
                from a plain step; None for plain steps.
            progress: show a bar.

        Returns:
            The pair at the end: float64 with exact=True, x's dtype otherwise. Differentiable once
            in x, y and, where eps_fn is an nn.Module, in its parameters; memory does not grow with
            the number of steps, the chain is inverted on the way back. Gradients do not reach other
            tensors that eps_fn captures (a warning says so). Plain steps: plain autograd, whose
            memory grows with the steps and whose gradients reach such tensors.

        Raises:
            ValueError, TypeError: an argument breaks the rule that the message names, or eps_fn's
                result does; eps_fn gives two results for one input (exact=True).
            RuntimeError: eps_fn's result is not finite or leaves the grid (exact=True).
        """
        return self._run(eps_fn, x, y, progress, forward=True)

    @eager
    def invert(
        self,
        eps_fn: EpsFn,
        x: Tensor,
        y: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """From image latents to noise: what `sample` undoes, and undoes what `sample` did.

        With `"edict"` and y=None the pair parts by mix^(-2*steps): 50 steps are fine at mix 0.93,
        200 leave the grid with most networks; a pair that `sample` returned, fewer steps or a mix
        nearer 1 help.

        Args:
            eps_fn, progress: as in `sample`.
            x: the image latent, any shape.
            y: the other latent of the pair, as `sample` returned it; None as in `sample`.

        Returns:
            The pair at the noise end, as `sample` takes it; differentiable as that of `sample`.

        Raises:
            ValueError, TypeError, RuntimeError: as `sample`; the method cannot be inverted
                (`"ddim"`, `"euler"`).
        """
        if self.method in PLAIN:
            _checks.refuse("method", "be edict, bdia or belm for invert", repr(self.method))
        return self._run(eps_fn, x, y, progress, forward=False)

    def _run(
        self,
        eps_fn: EpsFn,
        x: Tensor,
        y: Tensor | None,
        progress: bool = False,
        *,
        forward: bool,
        parameters: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The latents at the other end; `parameters` says whether those of eps_fn get gradients."""
        _checks.function("eps_fn", eps_fn)
        shown = _checks.flag("progress", progress)
        _checks.readable("x", _checks.floats("x", x))
        if self.method not in PLAIN:
            network.refuse_transforms(x, y)
        x, y, memory = self._inputs(x, y)
        plan = Plan(
            backend=table.resolve(self.backend, "ReversibleSampler", x),
            chain=self._way(forward, lone=y is None),
            eps_fn=eps_fn,
            timesteps=self.timesteps,
            dtype=self.dtype,
            exact=self.exact,
            memory=memory,
            parameters=parameters,
            progress=f"{self.method} {'sample' if forward else 'invert'}" if shown else "",
        )
        if self.method in PLAIN:
            if y is not None:
                _checks.refuse("y", f"be None for method={self.method!r}", "a tensor")
            x = trajectory.run_plain(plan, self.schedule.moments, x)
            return x, x
        self._check_growth(plan, x, y, forward)
        return backward.run(plan, x, x if y is None else y)

    def _inputs(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, Memory]:
        """The latents in the memory order of the run, and the memory that it takes at least."""
        strides = contiguous_strides(x) if self.exact else dense_strides(x)
        each = torch.int64.itemsize if self.exact else x.element_size()
        memory = Memory(x, (1 if self.method in PLAIN else 2) * x.numel() * each)
        with memory:
            x = laid_out(x, strides)
            if y is not None:
                y = laid_out(_checks.like("y", y, x, "x"), strides)
        return x, y, memory

    def _way(self, forward: bool, *, lone: bool) -> links.Chain | None:
        """The chain in one direction, from a pair or from one latent in the place of both."""
        if self._chain is None:
            return None
        chain = self._chain if forward else self._chain.inverse()
        if self.method == "edict" or not lone:
            return chain
        step = 0 if forward else len(self.timesteps) - 1
        now, then = self.schedule.moments[step : step + 2]
        return chain.from_one(step, *(move(now, then) if forward else move(then, now)))

    def _check_growth(self, plan: Plan, x: Tensor, y: Tensor | None, forward: bool) -> None:
        """Refuse to invert a BDIA chain, also for a gradient, whose errors would grow too far."""
        growth = self.gamma ** (1 - len(self.timesteps))
        if self.method != "bdia" or growth <= _MOST_AMPLIFIED:
            return
        if not forward or backward.differentiable(plan, x, y):
            enough = f"errors grow at most {_MOST_AMPLIFIED:g} times, gamma^(1 - steps)"
            rule = f"be large enough for {'a gradient' if forward else 'invert'} that {enough}"
            _checks.refuse("gamma", rule, f"{self.gamma:g}, {growth:.3g} times")


@eager
def sample_for_latents(
    sampler: ReversibleSampler, eps_fn: EpsFn, x: Tensor, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sampler.sample`, differentiable in the latents alone and not in eps_fn's parameters."""
    return sampler._run(eps_fn, x, y, forward=True, parameters=False)
