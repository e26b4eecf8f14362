"""Simulation-based calibration of amortised posteriors.

Draw a truth and its data from the model, ask the posterior, and find the rank of the truth among posterior draws: if
the posterior is right, every rank is equally likely for every quantity (Cook, Gelman & Rubin 2006; Talts et al. 2018,
arXiv 1804.06788). An amortised guide needs no refit, so that thousands of simulations take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_contrastive.diagnostics import quantities as q
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._draws import as_draw_of, batched, draw_pieces
from pyro_contrastive.diagnostics._run import evaluation
from pyro_contrastive.diagnostics.alignment import procrustes
from pyro_contrastive.diagnostics.calibration import rank_pit, uniformity_pvalue
from pyro_contrastive.ops.random import derived_seed

__all__ = ["SBC", "adjusted_pvalues", "sbc", "simulator"]

Simulate = Callable[[int, int], Any]


@dataclass(frozen=True, eq=False)
class SBC:
    """Ranks of the truth among posterior draws; M simulations.

    Attributes:
        ranks: By quantity, integers in 0..num_draws, shape (M,): how many draws are smaller (ties broken at random).
        pit: By quantity, (rank + u) / (num_draws + 1) in (0, 1), shape (M,).
        pvalues: By quantity, Kolmogorov-Smirnov p-values of uniform PIT values, one test at a time.
        num_draws: S, the draws behind each rank.
    """

    ranks: dict[str, NDArray[np.int64]]
    pit: dict[str, FloatArray]
    pvalues: dict[str, float]
    num_draws: int

    @property
    def adjusted_pvalues(self) -> dict[str, float]:
        """p-values for all quantities together: the chance that any falls below .05 is at most .05 if all is well."""
        return adjusted_pvalues(self.pvalues)

    def to_arviz(self) -> Any:
        """Lays the ranks out for ArviZ, as simuk does.

        Returns:
            `arviz.InferenceData` (0.x) or `xarray.DataTree` (1.x) with two groups, dimensions (chain, draw), chain = 1
            and draw = M: `prior_sbc` holds the integer ranks, `prior_sbc_pit` the PIT values. Draw the second:
            `plot_ecdf_pit(dt, group="prior_sbc_pit")`; of ranks ArviZ takes the largest *observed* one for S.
        """
        import arviz
        import xarray

        attrs = {"num_draws": self.num_draws, "arviz_version": arviz.__version__}
        groups: dict[str, Mapping[str, NDArray[Any]]] = {"prior_sbc": self.ranks, "prior_sbc_pit": self.pit}
        datasets: dict[str, Any] = {
            group: xarray.Dataset(
                {name: (("chain", "draw"), values[None]) for name, values in variables.items()},
                coords={"chain": [0], "draw": np.arange(len(next(iter(variables.values()))))},
                attrs=attrs,
            )
            for group, variables in groups.items()
        }
        if int(arviz.__version__.split(".")[0]) >= 1:
            return xarray.DataTree.from_dict(datasets)
        return arviz.InferenceData(**datasets)


def sbc(
    posterior: Any,
    simulate: Any,
    *,
    num_simulations: int = 1000,
    num_draws: int = 999,
    quantities: q.Quantities | None = None,
    num_alignment: int = 0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> SBC:
    """Simulation-based calibration of an amortised posterior.

    Batches are simulated, judged and forgotten: memory does not grow with the simulations but for the ranks.

    Args:
        posterior: A guide with `posterior(inputs)`, or a function of the inputs, that gives a distribution with batch
            shape (n,). Modules run in eval mode and without gradients. (A function may also fit anew: batch_size=1
            gives it one data set at a time, and `torch.enable_grad()` inside turns gradients on.)
        simulate: `simulate(n, seed)` that returns (inputs, truth) of n items, the truths in the posterior's frame with
            shape (n, ...); or a world of `data` (first views). For a Pyro model see `simulator`.
        num_simulations: M >= 1.
        num_draws: S >= 1 draws behind each rank.
        quantities: Functions f(z) or f(z, posterior) by name (module `quantities`); `default_quantities` without.
        num_alignment: Where > 0, the posterior's frame is known up to a rotation only: an orthogonal map is fitted to
            the mean directions of this many further simulations, which are not judged, and takes the truths to the
            frame of the posterior. It adds to every width a share of about d / num_alignment: give 100 d or more.
        seed: Seed of simulations, draws and ties, >= 0. The caller's random state is not touched.
        batch_size: Items simulated and encoded together, >= 1.
        progress: Whether to show a progress bar.

    Returns:
        Ranks, PIT values and p-values by quantity.

    Raises:
        TypeError: If `posterior`, `simulate` or a quantity cannot be called, or the posterior is no distribution.
        ValueError: If a number is out of range, shapes do not fit, or a quantity is NaN.

    Example:
        >>> from pyro_contrastive.distributions import VonMisesFisher
        >>> from pyro_contrastive.ops.random import seeded
        >>> def simulate(n, seed):  # a uniform direction m and its truth: m is a sufficient summary of the data
        ...     with seeded(seed):
        ...         m = torch.nn.functional.normalize(torch.randn(n, 3), dim=-1)
        ...         return m, VonMisesFisher(m, torch.full((n,), 9.0)).sample()
        >>> right = sbc(lambda m: VonMisesFisher(m, torch.full((len(m),), 9.0)), simulate, num_simulations=500)
        >>> sure = sbc(lambda m: VonMisesFisher(m, torch.full((len(m),), 36.0)), simulate, num_simulations=500)
        >>> right.pvalues["angle"] > 0.01, sure.pvalues["angle"] < 1e-6
        (True, True)
    """
    for name, number in (("num_simulations", num_simulations), ("num_draws", num_draws), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"`{name}` must be >= 1, got {number!r}")
    if num_alignment < 0:
        raise ValueError(f"`num_alignment` must be >= 0 (0: the frame is known), got {num_alignment!r}")
    law = _callable("posterior", posterior, "posterior")
    functions = None if quantities is None else q.bound(quantities)
    less: dict[str, list[Tensor]] = {}
    ties: dict[str, list[Tensor]] = {}
    with evaluation(posterior, seed=seed) as device:
        run = _Batches(law, simulate, device, batch_size, seed)
        rotation = _rotation(run, num_alignment) if num_alignment else None
        total = -(-num_simulations // batch_size)
        batches = tqdm(run(num_simulations, 0), "simulations", total, disable=not progress)
        for position, (judged, truth) in enumerate(batches):
            functions = functions or q.bound(q.default_quantities(truth.shape[-1]))
            if rotation is not None:
                truth = truth @ rotation.to(truth)
            true_values = {name: f(truth, judged) for name, f in functions.items()}
            below = {name: torch.zeros(len(truth), dtype=torch.long, device=truth.device) for name in functions}
            equal = {name: torch.zeros_like(count) for name, count in below.items()}
            for z in draw_pieces(judged, num_draws, derived_seed(seed, 2, position)):
                for name, f in functions.items():
                    values = f(z, judged)
                    below[name] += (values < true_values[name]).sum(0)
                    equal[name] += (values == true_values[name]).sum(0)
            for name in functions:
                less.setdefault(name, []).append(below[name])
                ties.setdefault(name, []).append(equal[name])
    rng = np.random.default_rng(derived_seed(seed, 3))
    ranks = {
        name: as_array(torch.cat(less[name])) + rng.integers(0, as_array(torch.cat(ties[name])), endpoint=True)
        for name in less
    }
    pit = {name: rank_pit(r, num_draws, seed=derived_seed(seed, 4, k)) for k, (name, r) in enumerate(ranks.items())}
    return SBC(ranks, pit, {name: uniformity_pvalue(values) for name, values in pit.items()}, num_draws)


class _Batches:
    """Simulated items with their posteriors, batch by batch; every batch has its own seed."""

    def __init__(self, law: Any, simulate: Any, device: torch.device, batch_size: int, seed: int) -> None:
        self.law, self.simulate, self.device = law, simulate, device
        self.batch_size, self.seed = batch_size, seed

    def __call__(self, num_items: int, stream: int) -> Any:
        """Yields (posterior, truth); streams 0 and 1 share nothing."""
        for position, start in enumerate(range(0, num_items, self.batch_size)):
            n = min(self.batch_size, num_items - start)
            inputs, truth = simulated(self.simulate, n, derived_seed(self.seed, 5, stream, position) >> 31)
            inputs = inputs.to(self.device) if isinstance(inputs, Tensor) else inputs
            judged = batched(self.law(inputs), n)
            truth = as_draw_of(judged, truth)
            if truth.shape != (n, *judged.event_shape):
                raise ValueError(
                    f"`simulate({n}, seed)` must return truths of shape {(n, *judged.event_shape)}, as a draw of the "
                    f"posterior, got {tuple(truth.shape)}"
                )
            yield judged, truth


def _rotation(run: _Batches, num_items: int) -> Tensor:
    """Orthogonal map from the frame of the truth to that of the posterior."""
    means, truths = [], []
    for law, truth in run(num_items, 1):
        direction = getattr(law, "mean_direction", None)
        means.append(torch.nn.functional.normalize(law.mean, dim=-1) if direction is None else direction)
        truths.append(truth)
    return torch.from_numpy(procrustes(torch.cat(truths), torch.cat(means)))


def _callable(name: str, given: Any, method: str) -> Any:
    bound = getattr(given, method, None)
    found = bound if callable(bound) else given
    if not callable(found):
        raise TypeError(f"`{name}` must be a function or have a method {method}(...), got {type(given).__name__}")
    return found


def simulated(simulate: Any, num_items: int, seed: int) -> tuple[Any, Any]:
    """Runs a simulation once and takes it apart.

    Args:
        simulate: See `sbc`.
        num_items: How many items, >= 1.
        seed: Its seed, in 0..2**32 - 1.

    Returns:
        (inputs, truth).

    Raises:
        TypeError: If it cannot be called.
        ValueError: If it returns something else.
    """
    batch = _callable("simulate", simulate, "sample")(num_items, seed)
    if hasattr(batch, "x1") and hasattr(batch, "z1"):
        return batch.x1, batch.z1
    if isinstance(batch, tuple) and len(batch) == 2:
        return batch
    raise ValueError(
        "`simulate(n, seed)` must return (inputs, truth), or a batch with the fields x1 and z1, "
        f"got {type(batch).__name__}"
    )


def simulator(model: Callable[..., Any], latent: str, observed: str | tuple[str, ...], *args: Any) -> Simulate:
    """Makes simulations for `sbc` out of a Pyro model that draws latents and data.

    Args:
        model: Pyro program, called as `model(n, *args)` for n independent items, with nothing observed.
        latent: Site of the truth, shape (n, ...).
        observed: Site of the data that the posterior is given, or several: then inputs are a tuple. Deterministic sites
            count.
        args: Further arguments of the model.

    Returns:
        `simulate(n, seed)` that returns (inputs, truth), in eval mode and without gradients.

    Raises:
        ValueError: When a simulation finds no site of that name.

    Example:
        >>> import pyro
        >>> def model(n):
        ...     with pyro.plate("items", n):
        ...         z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        ...         pyro.sample("x", pyro.distributions.Normal(z, 1.0))
        >>> simulate = simulator(model, "z", "x")
        >>> posterior = lambda x: pyro.distributions.Normal(x / 2, 0.5**0.5)
        >>> sbc(posterior, simulate, quantities={"z": lambda z: z}, num_simulations=300).pvalues["z"] > 0.01
        True
    """
    names = (observed,) if isinstance(observed, str) else tuple(observed)

    def simulate(num_items: int, seed: int) -> tuple[Any, Tensor]:
        with evaluation(model, seed=seed), poutine.block():
            sites = poutine.trace(model).get_trace(num_items, *args).nodes
        for name in (latent, *names):
            if name not in sites or sites[name]["type"] != "sample":
                known = [key for key, site in sites.items() if site["type"] == "sample"]
                raise ValueError(f"the model must have a sample site {name!r}, got {known}")
        inputs: Any = tuple(sites[name]["value"] for name in names)
        truth: Any = sites[latent]["value"]
        return inputs if not isinstance(observed, str) else inputs[0], truth

    return simulate


def adjusted_pvalues(pvalues: Mapping[str, float]) -> dict[str, float]:
    """p-values that hold for several tests together, by Holm's step-down method (Holm 1979).

    Rejecting where the adjusted value is below alpha raises any false alarm with probability alpha at most, however the
    tests depend on each other.

    Args:
        pvalues: p-values in [0, 1] by name.

    Returns:
        Adjusted p-values in [0, 1] by name.

    Example:
        >>> adjusted_pvalues({"a": 0.01, "b": 0.5, "c": 0.02})
        {'a': 0.03, 'b': 0.5, 'c': 0.04}
    """
    names = sorted(pvalues, key=lambda name: pvalues[name])
    scaled = [min((len(names) - k) * pvalues[name], 1.0) for k, name in enumerate(names)]
    found = dict(zip(names, np.maximum.accumulate(scaled or [0.0]).tolist(), strict=False))
    return {name: found[name] for name in pvalues}
