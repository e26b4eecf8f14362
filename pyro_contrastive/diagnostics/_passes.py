"""Runs a Pyro model and guide for many draws: in one pass where the programs allow it, else one draw at a time.

Nothing here knows ArviZ; the result of a run is a Pyro trace whose values carry the draws in the leftmost dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample

__all__ = [
    "Programs",
    "Run",
    "brief",
    "given_values",
    "is_deterministic",
    "is_latent",
    "is_observation",
    "is_scored",
    "per_draw",
    "unobserved",
    "Site",
    "Trace",
]

Trace = Any  # Pyro declares every entry of a node as optional, which says nothing here
Site = Any

_PLATE = "_draws"
_GRID_NUMBERS = 2**23  # numbers in the N x N grids of all draws of one pass, 32 MB of float32


def is_deterministic(site: Site) -> bool:
    """Whether a site is a `pyro.deterministic` statement."""
    return site["type"] == "sample" and bool((site["infer"] or {}).get("_deterministic"))


def is_latent(site: Site) -> bool:
    """Whether a site carries a latent value: not observed, no auxiliary of an autoguide, no subsampling, no factor."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not (site["infer"] or {}).get("was_observed")
        and not (site["infer"] or {}).get("is_auxiliary")
        and not (site_is_subsample(site) or site_is_factor(site))
        and isinstance(site["value"], torch.Tensor)
        and site["value"].numel() > 0
    )


def is_observation(site: Site) -> bool:
    """Whether a site holds data, or a replication of data under `unobserved`; factors have no value and are none."""
    return (
        site["type"] == "sample"
        and (site["is_observed"] or bool((site["infer"] or {}).get("was_observed")))
        and not (is_deterministic(site) or site_is_subsample(site) or site_is_factor(site))
        and isinstance(site["value"], torch.Tensor)
    )


def is_scored(site: Site) -> bool:
    """Whether a site contributes to the log density of its program."""
    return site["type"] == "sample" and not (site_is_subsample(site) or is_deterministic(site))


class unobserved(Messenger):  # noqa: N801 (used as a handler)
    """Draws what was observed; unlike `poutine.uncondition`, leaves factors and deterministic sites alone."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not (is_deterministic(msg) or site_is_factor(msg)):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            msg["infer"] = {**(msg["infer"] or {}), "was_observed": True}


class _OneSubsample(Messenger):
    """Every run sees the same rows of a subsampling plate, so that row i of all draws is about one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.rows:
            msg["value"], msg["done"] = self.rows[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]


@dataclass(frozen=True)
class Run:
    """One pass of a program.

    Attributes:
        trace: Its trace, with log densities.
        size: Draws in it; 0 for a plain run, whose values have no dimension for draws.
        like: The plain run of the same program, which says how the values of one draw are shaped.
    """

    trace: Trace
    size: int
    like: Trace


def per_draw(value: torch.Tensor, shape: Sequence[int], size: int) -> torch.Tensor:
    """Brings a value of a vectorized pass to one row per draw.

    Args:
        value: Tensor with the draws leftmost and padding of size one behind, or without a dimension for draws.
        shape: Shape of the value of one draw.
        size: Number of draws, >= 0; 0 says that `value` is of a plain run.

    Returns:
        Tensor of shape (max(size, 1), *shape).

    Raises:
        ValueError: If the number of values fits neither case.
    """
    rows, numel = max(size, 1), int(torch.Size(shape).numel())
    if size and value.numel() == rows * numel and value.ndim and (value.shape[0] == rows):
        return value.reshape(rows, *shape)
    if value.numel() == numel:
        return value.reshape(1, *shape).expand(rows, *shape)
    if value.ndim <= len(shape) and torch.broadcast_shapes(value.shape, torch.Size(shape)) == torch.Size(shape):
        return value.expand(rows, *shape)
    raise ValueError(f"a value of shape {tuple(value.shape)} is not {rows} draws of shape {tuple(shape)}")


@dataclass
class Programs:
    """Runs programs that share their arguments.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        vectorize: Whether to try many draws in one pass.
        reasons: Why draws are made one after the other, by kind of draw; a kind made together is not in it.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    vectorize: bool = True
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trusted: set[str] = set()
        self.start(self.args)

    def start(self, args: tuple[Any, ...]) -> None:
        """Takes new arguments; what was learned about the programs stays."""
        self.args, self.rows, self.nesting = args, _OneSubsample(), 0

    def run(self, program: Callable[..., Any], *, size: int = 0, given: Trace | None = None) -> Trace:
        """Runs a program once and scores it.

        Args:
            program: Called with the arguments of the pair.
            size: Draws in one pass; 0 runs it plainly.
            given: Values to use instead of draws.

        Returns:
            The trace, with `unscaled_log_prob` and `log_prob` at every sample site.
        """
        # the plate is entered outermost, so that its dimension is the leftmost
        plate = pyro.plate(_PLATE, size, dim=-1 - self.nesting) if size else nullcontext()
        program = program if given is None else poutine.replay(program, trace=given)
        with self.rows, plate:
            trace = poutine.trace(program).get_trace(*self.args, **self.kwargs)
        trace.compute_log_prob()
        return trace

    def measure(self, *traces: Trace) -> None:
        """Finds how many dimensions the plates of plain runs take, which decides where that of the draws goes."""
        for trace in traces:
            for site in trace.nodes.values():
                if site["type"] == "sample" and not site_is_subsample(site):
                    plates = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
                    batch = 0 if is_deterministic(site) else len(getattr(site["fn"], "batch_shape", ()))
                    self.nesting = max(self.nesting, batch, *plates)

    def given(self, values: Mapping[str, torch.Tensor], like: Trace, where: slice, size: int) -> Trace:
        """Some of the draws of given sites, for a pass.

        Args:
            values: All draws by site, (draws, *shape of the value).
            like: A plain run.
            where: Which draws.
            size: Number of them; 0 for a plain run.

        Returns:
            A trace for `poutine.replay`.
        """
        chosen = {}
        for name, draws in values.items():
            site = like.nodes[name]
            pad = self.nesting - (site["value"].ndim - site["fn"].event_dim)
            chosen[name] = draws[where].reshape(size, *(1,) * pad, *draws.shape[1:]) if size else draws[where][0]
        return given_values(chosen, like)

    def draws_per_pass(self, num_samples: int, *traces: Trace) -> int:
        """How many draws to make together; a contrastive model keeps an N x N grid for each of them."""
        largest = max(
            (
                frame.size
                for trace in traces
                for site in trace.nodes.values()
                if site["type"] == "sample"
                for frame in site["cond_indep_stack"]
                if frame.vectorized
            ),
            default=1,
        )
        return max(1, min(num_samples, _GRID_NUMBERS // largest**2))

    def passes(
        self,
        kind: str,
        num_samples: int,
        size: int,
        one_pass: Callable[[int, slice], list[tuple[Callable[..., Any], Run]]],
    ) -> Iterator[list[Run]]:
        """Makes draws pass by pass, and falls back to plain runs when a pass of many draws cannot be trusted.

        Args:
            kind: What is drawn, "posterior" or "prior": each is trusted or not by itself.
            num_samples: Draws in all.
            size: Draws per pass; 1 means plain runs.
            one_pass: Given the number of draws (0 for a plain run) and their positions, runs the programs and returns
                each with its run.

        Yields:
            The runs of one pass.
        """
        if not self.vectorize:
            self.reasons.setdefault(kind, "asked for")
        elif size == 1:
            self.reasons.setdefault(kind, "one draw is enough work for a pass")
        start = 0
        while start < num_samples:
            if kind in self.reasons:
                yield [run for _, run in one_pass(0, slice(start, start + 1))]
                start += 1
                continue
            count = min(size, num_samples - start)
            try:
                made = one_pass(count, slice(start, start + count))
                fault = "" if kind in self.trusted else self._fault(made)
            except Exception as error:  # whatever somebody's program raises when it meets one more dimension
                fault = brief(error)
            if fault:
                self.reasons[kind] = fault
                continue
            self.trusted.add(kind)
            yield [run for _, run in made]
            start += count

    def how(self, kind: str) -> str:
        """How draws of a kind were made, for an attribute."""
        reason = self.reasons.get(kind)
        return "many in one pass" if reason is None else f"one after the other: {reason}"

    def _fault(self, made: Sequence[tuple[Callable[..., Any], Run]]) -> str:
        """Compares the first and the last draw of a pass with plain runs on the same values."""
        for program, run in made:
            for position in {0, run.size - 1}:
                alone = self.run(program, given=one_draw(run, position))
                for name, site in alone.nodes.items():
                    if site["type"] != "sample" or site_is_subsample(site):
                        continue
                    for key in ("value", "unscaled_log_prob"):
                        one, other = site[key], run.trace.nodes[name][key]
                        if not isinstance(one, torch.Tensor) or not one.is_floating_point():
                            continue
                        if site_is_factor(site) and key == "value":
                            continue
                        other = per_draw(other, one.shape, run.size)[position]
                        if not torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True):
                            return f"the {key.replace('_', ' ')} of site {name} changes when its draw is made alone"
        return ""


def brief(error: BaseException) -> str:
    """The first line of an error, for an attribute."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def one_draw(run: Run, position: int) -> Trace:
    """The latent values of one draw of a pass, to be replayed in a plain run."""
    return given_values(
        {
            name: per_draw(run.trace.nodes[name]["value"], site["value"].shape, run.size)[position]
            for name, site in run.like.nodes.items()
            if site["type"] == "sample" and not (site["is_observed"] or site_is_subsample(site))
        },
        run.trace,
    )


def given_values(values: Mapping[str, torch.Tensor], like: Trace | None = None) -> Trace:
    """A trace that holds nothing but values, for `poutine.replay`."""
    trace = poutine.Trace()
    for name, value in values.items():
        infer = dict(like.nodes[name]["infer"] or {}) if like is not None and name in like.nodes else {}
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer=infer)
    return trace
