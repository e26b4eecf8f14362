r"""The likelihood of a whole matching of two sets of views, whatever the marginals of the views are.

The density of a pair relative to independent views is :math:`F(x, x')` only where the model's marginals are those of
the data. Otherwise it is :math:`F(x, x') / (m(x)\, m'(x'))` with unknown functions m and m' of one view each. Given the
two *sets* of views of a batch, the probability that view i belongs with view i for every i is

.. math::  \frac{\prod_i F_{ii}}{\mathrm{perm}\, F}, \qquad \mathrm{perm}\, F = \sum_\pi \prod_i F_{i \pi(i)},

and every m cancels: it is the conditional likelihood of the pairs given the marginals, and needs no estimate of them.
The softmax of contrastive losses is the same likelihood for one row, where only the m of that row cancels.

The permanent is replaced by its Bethe approximation (sum-product on the complete bipartite graph).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["balance_log_ratios", "matching_log_ratio"]


def _log_sum_of_others(values: Tensor, dim: int) -> Tensor:
    """Log of the sum of exp over all *other* entries of the row (or column), for every entry; no cancellation."""
    top = values.amax(dim, keepdim=True)
    weights = (values - top).exp()
    total = weights.sum(dim, keepdim=True)
    most = weights > 0.5 * total  # at most one entry per row, the only one whose difference from the sum cancels
    others = torch.where(most, weights.masked_fill(most, 0.0).sum(dim, keepdim=True), total - weights)
    return others.clamp_min(torch.finfo(values.dtype).tiny).log() + top


@torch.no_grad()
def _messages(log_f: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Log messages of the rows and of the columns, (..., N, N) each, at the fixed point of sum-product."""
    to_row = -log_f.logsumexp(-2, keepdim=True)
    to_column = torch.zeros_like(log_f)
    for _ in range(iterations):
        to_column = -_log_sum_of_others(log_f + to_row, -1)
        to_row = -_log_sum_of_others(log_f + to_column, -2)
    return to_column, to_row


def _check(log_f: Tensor, iterations: int) -> None:
    if log_f.dim() < 2 or log_f.shape[-1] != log_f.shape[-2] or log_f.shape[-1] < 3:
        raise ValueError(
            f"a matching needs the grid (..., N, N) of all pairs of a batch, N >= 3, got {tuple(log_f.shape)}; "
            "give as many second views as first ones, and a batch of some dozens for a useful estimate"
        )
    if iterations < 1:
        raise ValueError(f"`iterations` must be >= 1, got {iterations!r}; 10 suffice for most batches")


def matching_log_ratio(log_f: Tensor, *, iterations: int = 10) -> Tensor:
    r"""Log-likelihood of the true matching, split into one term per pair; blind to factors of one view.

    The sum over the batch is :math:`\sum_i \log F_{ii} - \log \mathrm{perm}_B F`, where :math:`\mathrm{perm}_B` is the
    Bethe permanent, minus its value for a grid that says nothing. Adding any function of the row, or of the column, to
    ``log_f`` changes nothing. Its gradient is that of a softmax loss with both softmaxes replaced by the marginal
    probabilities of the matching: one minus them on the diagonal, minus them elsewhere. The messages carry no gradient,
    because the Bethe free energy is stationary in them.

    **Use large batches.** A matching that is nearly certain as a whole has nothing to teach, and there the Bethe
    approximation is too sure as well. In worlds with 2.4 and 3.5 nats per pair the estimator is unbiased to
    measurement error from N = 128 on, and useless at N = 32 in the second (docs/identifiability.md has the figures):
    log N should exceed the information of a pair by more than a nat.

    Args:
        log_f: ``(..., N, N)`` log evidence of all pairs, in nats, each up to a term of its row and one of its column;
            true pairs on the diagonal. N >= 3.
        iterations: Rounds of sum-product, each about four passes over the grid.

    Returns:
        ``(..., N)`` nats per pair, 0 for a constant grid, at most about log N - 1.

    Raises:
        ValueError: If the grid is not square or smaller than 3, or `iterations` is not positive.

    References:
        Vontobel, "The Bethe permanent of a nonnegative matrix", IEEE Trans. Inf. Theory 59 (2013), arXiv 1107.4196;
        Gurvits, "Unleashing the power of Schrijver's permanental inequality with the help of the Bethe approximation",
        arXiv 1106.2844, for the bounds; Cox and Hinkley, Theoretical Statistics (1974), for conditional likelihoods.

    Example:
        >>> log_f = 3 * torch.eye(4)
        >>> shifted = log_f + torch.tensor([0.0, 1.0, 2.0, 3.0])  # a term of the second view alone
        >>> bool(torch.allclose(matching_log_ratio(shifted).sum(), matching_log_ratio(log_f).sum(), atol=1e-4))
        True
    """
    _check(log_f, iterations)
    size = log_f.shape[-1]
    to_column, to_row = _messages(log_f, iterations)
    rows = (log_f + to_row).logsumexp(-1)
    columns = (log_f + to_column).logsumexp(-2)
    pairs = softplus(log_f + to_column + to_row)
    log_bethe = rows + columns - 0.5 * (pairs.sum(-1) + pairs.sum(-2))
    constant = math.log(size) + (size - 1) * math.log1p(-1 / size)
    return log_f.diagonal(dim1=-2, dim2=-1) - log_bethe + constant


def balance_log_ratios(log_f: Tensor, *, iterations: int = 10) -> Tensor:
    r"""Turn log evidences with wrong marginals into log density ratios, by the batch's own marginals.

    Under independent views, the ratio p(x, x') / p(x) p(x') has mean 1 over x' for every x, and over x for every x'.
    The pairs off the diagonal are independent views, so the grid is scaled by one factor per row and one per column
    until the mean over each row's and each column's *other* entries is 1. (Scaling with the diagonal included, as plain
    Sinkhorn iterations do, is biased: true pairs are far more frequent there than among independent views.)

    The factors carry no gradient; for training use :func:`matching_log_ratio`.

    Args:
        log_f: ``(..., N, N)`` log evidence of all pairs, in nats, true pairs on the diagonal. N >= 3.
        iterations: Rounds of scaling.

    Returns:
        ``(..., N, N)`` log density ratios in nats, ``log_f`` plus a term per row and one per column. The noise of the
        terms falls with :math:`1/\sqrt N`, more slowly the more a pair says.

    Raises:
        ValueError: If the grid is not square or smaller than 3, or `iterations` is not positive.

    References:
        Sinkhorn and Knopp, Pacific J. Math. 21 (1967).

    Example:
        >>> log_f = torch.arange(25.0).sin().view(5, 5)
        >>> ratio = balance_log_ratios(log_f, iterations=30).exp().fill_diagonal_(0.0)
        >>> bool(torch.allclose(ratio.sum(0), torch.full((5,), 4.0)) and torch.allclose(ratio.sum(1), ratio.sum(0)))
        True
    """
    _check(log_f, iterations)
    with torch.no_grad():
        size = log_f.shape[-1]
        diagonal = torch.eye(size, dtype=torch.bool, device=log_f.device)
        others = log_f.masked_fill(diagonal, -math.inf)
        row = torch.zeros_like(log_f[..., :1])
        column = torch.zeros_like(log_f[..., :1, :])
        for _ in range(iterations):
            row = math.log(size - 1) - (others + column).logsumexp(-1, keepdim=True)
            column = math.log(size - 1) - (others + row).logsumexp(-2, keepdim=True)
    return log_f + row + column
