"""From a trained Pyro model/guide pair to ArviZ: `InferenceData` on ArviZ 0.x, `DataTree` on ArviZ 1.x.

The pair may be ours or anybody's: two callables with the same arguments, trained by SVI in any way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pyro_contrastive.diagnostics._collect import Collector, checked_pair, checked_views
from pyro_contrastive.diagnostics._container import build, describe
from pyro_contrastive.diagnostics._recorder import DRAW
from pyro_contrastive.diagnostics._run import evaluation

__all__ = ["to_arviz"]


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    views: Sequence[torch.Tensor] = (),
    *,
    num_samples: int = 100,
    seed: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, str | int | float] | None = None,
    view_names: Sequence[str] | None = None,
    store_views: bool | None = None,
    sbc: Mapping[str, ArrayLike] | None = None,
    prior: bool = True,
    predictive: bool = True,
    vectorize: bool = True,
    progress: bool = False,
) -> Any:
    """Draws from a trained pair and lays everything out for ArviZ.

    | group | variables |
    | --- | --- |
    | posterior | every latent site of the guide, (chain, draw, item, axis) for points on a sphere; deterministic \
sites; for the spherical site "z1" also `angle1`, the angle in radians of each draw to `mean_direction1`, \
`log_density1` of each draw under the guide, `hpd_level1`, the mass of the smallest region that reaches the draw, and \
`concentration1` of the law it came from, where the family has one |
    | prior | the same sites drawn from the model alone, with `angle1` to the same direction (an InfoNCE model draws \
them from the recognition law, which is its prior in the mean over the items) |
    | posterior_predictive | replications of every observed site; latent sites of the model that the guide leaves out; \
`partner`: which candidate of the batch is drawn as the partner of each item, where the model has a method \
`partner_logits(*views) -> (N, N)` |
    | prior_predictive | replications of every observed site under the prior |
    | log_likelihood | every observed site and factor by name, unscaled. The rows of a contrastive factor share the \
batch, so pointwise leave-one-out (`arviz.loo`) is not valid for them |
    | sample_stats | `log_p`, `log_q`, `elbo` as scaled in training; per item where every site lies in the plate of \
the items |
    | observed_data | observed sites; `partner`: item i belongs to item i |
    | constant_data | the views, or `index` when they are large; tensors among `kwargs`; `mean_direction1`; `site`, \
the latent of each view; `pair_concentration` (`model.concentration`) and the `pyro.param`s, without network weights |
    | prior_sbc | the PIT values of `sbc`, laid out for `arviz.plot_ecdf_pit` (1.x) |

    The modules run in eval mode, without gradients and with their own random stream; modes, random states and
    parameter store of the caller are left as they were. Many draws are made in one pass where that gives the same
    densities as a draw made alone (the first and the last are compared); otherwise, and for large batches, one after
    the other. The attribute `posterior_draws` says which, and why. A subsampling plate keeps one choice of rows.

    Args:
        model: Pyro program or module, called as `model(*views, **kwargs)`.
        guide: Pyro program or module with the same arguments.
        views: The positional arguments, tensors with the items in the leading dimension, on the device of the pair.
        num_samples: Number of posterior (and prior) draws, >= 1.
        seed: Seed of the draws; None uses the caller's current random state without advancing it.
        kwargs: Keyword arguments of both programs, of any type and shape.
        coords: Labels of dimensions, for example `{"item": file_names}`.
        dims: Names of the dimensions of a variable without (chain, draw), for example `{"w": ["feature"]}`. By
            default they are "item", "axis", names of plates, and otherwise `w_dim_0` as in ArviZ.
        attrs: Further attributes of the result and of each group.
        view_names: Names of the views in constant_data, default x1, x2, ...
        store_views: Whether constant_data holds the views; None stores up to 2**20 numbers.
        sbc: PIT values in [0, 1] by test quantity, each of shape (number of simulations,), see `calibration`.
        prior: Whether to draw from the prior as well. Where the model cannot run without its guide the group is left
            out and the attribute `prior_skipped` says why.
        predictive: Whether to replicate observed sites given the posterior draws.
        vectorize: False makes one draw after the other in any case.
        progress: Whether to show progress bars.

    Returns:
        `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x) with chain = 1 and draw = `num_samples`; both have
        `.to_netcdf(path)`. A "/" in a site's name becomes ".".

    Raises:
        TypeError: If `views` is not a sequence of tensors, or the model or guide is not callable.
        ValueError: If `num_samples` < 1, if the views differ in length, if the guide has no latent site or a NaN among
            its draws, or if names in `view_names`, `coords` or `dims` do not match.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", pyro.distributions.Normal(w * x, 1.0), obs=y)
        >>> guide, x = AutoNormal(model), torch.linspace(-1, 1, 5)
        >>> data = to_arviz(model, guide, (x,), kwargs={"y": 2 * x}, num_samples=10)
        >>> data["posterior_predictive"]["y"].dims
        ('chain', 'draw', 'item')
    """
    checked_pair(model, guide)
    views = checked_views(views, num_samples, view_names)
    collector = Collector(
        model,
        guide,
        num_samples,
        kwargs=kwargs or {},
        prior=prior,
        predictive=predictive,
        vectorize=vectorize,
        dims=dims or {},
        view_names=view_names,
        store_views=store_views,
    )
    with evaluation(model, guide, seed=seed):
        made = collector.collect(views, progress=progress)
    if sbc:
        made.groups["prior_sbc"] = {name: (DRAW, np.asarray(pit, dtype=np.float64)[None]) for name, pit in sbc.items()}
    info = describe(seed="state of the caller" if seed is None else seed, **made.attrs)
    return build(made.groups, coords or {}, {**info, **(attrs or {})}, made.coords)
