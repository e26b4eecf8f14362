"""A pair as importance weights see it: draws of the guide, and log densities of model and guide item by item."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._passes import is_latent

__all__ = ["Program"]


class Program:
    """A model and guide with one log density per item, and the exchange of latents between two draws.

    Args:
        model: Pyro program.
        guide: Pyro program with the same arguments.
        views: The arguments.
        num_items: N.
    """

    def __init__(self, model: Any, guide: Any, views: tuple[Any, ...], num_items: int) -> None:
        self.model, self.guide, self.views, self.num_items = model, guide, views, num_items

    def draw(self) -> poutine.Trace:
        """One draw of the guide.

        Returns:
            Its trace.

        Raises:
            ValueError: If the guide has no latent site.
        """
        trace = poutine.trace(self.guide).get_trace(*self.views)
        if not _latents(trace):
            raise ValueError("`guide` must have at least one latent sample site, got none")
        return trace

    def log_q(self, trace: poutine.Trace) -> FloatArray:
        """Log density of a draw under the guide; what belongs to no item is shared out evenly.

        Args:
            trace: From `draw`.

        Returns:
            Per item, shape (N,), in nats.
        """
        return self._sum(trace)

    def log_p(self, trace: poutine.Trace) -> FloatArray:
        """Log density of a draw and the data under the model.

        Args:
            trace: From `draw`.

        Returns:
            Per item, shape (N,), in nats.

        Raises:
            ValueError: If the guide left out a latent site of the model.
        """
        found = poutine.trace(poutine.replay(self.model, trace=trace)).get_trace(*self.views)
        missing = [name for name, _ in _latents(found) if name not in trace]
        if missing:
            raise ValueError(f"`guide` must sample every latent site of the model, got none for {missing}")
        return self._sum(found)

    def coupled(self, one: poutine.Trace, other: poutine.Trace) -> bool:
        """Whether the terms of an item change with the latents of the others.

        Args:
            one: A draw.
            other: Another one.

        Returns:
            True if they do.
        """
        odd = np.arange(self.num_items) % 2 == 1
        mixed = self.log_p(self.exchanged(one, other, odd))
        apart = np.where(odd, self.log_p(other), self.log_p(one))
        return not np.allclose(mixed, apart, rtol=1e-4, atol=1e-4, equal_nan=True)

    def exchanged(self, into: poutine.Trace, source: poutine.Trace, where: NDArray[np.bool_]) -> poutine.Trace:
        """A copy of one draw that has the latents of some items from another.

        Args:
            into: The draw that is copied.
            source: Where the latents of the chosen items come from.
            where: Which items, shape (N,).

        Returns:
            The trace, with its densities not computed yet.

        Raises:
            ValueError: If a latent site has no value per item.
        """
        mixed = into.copy()
        for name, site in _latents(into):
            value = site["value"]
            dim = value.dim() - site["fn"].event_dim - 1
            if dim < 0 or value.shape[dim] != self.num_items:
                raise ValueError(
                    f"latent site {name!r} of the guide must have one value per item, got shape {tuple(value.shape)} "
                    f"for {self.num_items} items; k-hat per item is for local latents: condition on the global ones "
                    "(poutine.condition on model and guide)"
                )
            mask = torch.from_numpy(where).to(value.device).view(-1, *[1] * site["fn"].event_dim)
            other: Any = source.nodes[name]["value"]
            mixed.nodes[name] = site = mixed.nodes[name].copy()
            site["value"] = torch.where(mask, other, value)
        return mixed

    def _sum(self, trace: poutine.Trace) -> FloatArray:
        trace.compute_log_prob()
        total = np.zeros(self.num_items)
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                term = as_array(site["log_prob"]).astype(np.float64)
                total += term if term.shape == total.shape else term.sum() / self.num_items
        return total


def _latents(trace: poutine.Trace) -> list[tuple[str, Any]]:
    """Sites that carry a latent value."""
    return [(name, site) for name, site in trace.nodes.items() if is_latent(site)]
