r"""What ``arviz.loo`` says about rows of a batch-coupled likelihood, against exact refits and against new pairs.

Part one is a Bayesian bilinear critic of 12 weights, logits :math:`\sum_k \theta_k x_{ik} y_{jk}` with a normal prior,
on 32 pairs. Its posterior is sampled without approximation (importance sampling from Student's t around the mode, for a
log-concave posterior), so that leaving a pair out *exactly*, one refit per pair, is affordable. Part two fits
MCInfoNCE to 128 pairs until it knows them by heart. Figures are mean log probabilities of the partner, nats per pair.
Options: ``--out DIR --seed N --device auto|cpu|cuda --small``.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
from numpy.typing import NDArray
from scipy import special, stats
from tqdm import trange

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.fit import fit

Array = NDArray[np.float64]
PAIRS, WEIGHTS, NOISE = 32, 12, 1.0


def pairs(num: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draw pairs that share one latent, each with its own noise."""
    z = generator.normal(size=(num, WEIGHTS))
    x, y = (z + NOISE * generator.normal(size=z.shape) for _ in range(2))
    return x, y


def log_softmax(theta: Array, x: Array, y: Array) -> Array:
    """Log probability of candidate j for row i under each draw, (S, N, N)."""
    grid = (x[:, None] * y).reshape(-1, x.shape[-1])
    return special.log_softmax((theta @ grid.T).reshape(-1, len(x), len(y)), axis=-1)


def log_without(log_p: Array) -> Array:
    r"""Log of likelihood(all pairs) / likelihood(all but pair i) for each draw, (S, N).

    Pair i is its row *and* a candidate of all other rows:
    :math:`\log p_i(i) + \sum_{j \ne i} \log(1 - p_j(i))`.
    """
    own = np.diagonal(log_p, axis1=1, axis2=2)
    others = np.log1p(-np.exp(np.minimum(log_p, -1e-12)))
    return own + others.sum(axis=1) - np.diagonal(others, axis1=1, axis2=2)


def posterior(x: Array, y: Array, num: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Weights drawn around the mode of the posterior, (S, p), and the logarithms of their importance weights."""
    grid, theta = x[:, None] * y, np.zeros(x.shape[-1])
    own = np.diagonal(grid).T
    for _ in range(30):  # Newton: the log posterior is concave
        p = special.softmax(grid @ theta, axis=1)
        mean = np.einsum("ij,ijk->ik", p, grid)
        precision = np.einsum("ij,ijk,ijl->kl", p, grid, grid) - mean.T @ mean + np.eye(len(theta))
        theta = theta + np.linalg.solve(precision, (own - mean).sum(axis=0) - theta)
    proposal = stats.multivariate_t(theta, np.linalg.inv(precision), df=10, seed=generator)
    draws = proposal.rvs(num).reshape(num, len(theta))
    log_p = log_softmax(draws, x, y)
    log_density = np.diagonal(log_p, axis1=1, axis2=2).sum(axis=1) - 0.5 * (draws**2).sum(axis=1)
    return draws, log_density - proposal.logpdf(draws)


def log_mean(values: Array, log_weight: Array) -> Array:
    """Log of the weighted mean of exp(values) over draws."""
    shape = log_weight.shape + (1,) * (values.ndim - log_weight.ndim)
    log_weight = (log_weight - special.logsumexp(log_weight, axis=0)).reshape(shape)
    return special.logsumexp(values + log_weight, axis=0)


def arviz_loo(rows: Array) -> tuple[Array, Array, float]:
    """Pointwise elpd and k-hat of ``arviz.loo`` from log likelihoods (S, N), and its standard error of the sum."""
    import arviz

    draws = {"log_likelihood": {"partner": rows[None]}, "posterior": {"one": np.zeros((1, len(rows)))}}
    data = arviz.from_dict(draws) if int(arviz.__version__[0]) else arviz.from_dict(**draws)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large k-hat: it is counted here
        found = arviz.loo(data, pointwise=True)
    pointwise = found.loo_i if hasattr(found, "loo_i") else found.elpd_i  # ArviZ 0.x and 1.x
    return np.asarray(pointwise), np.asarray(found.pareto_k), float(found.se)


def bilinear(num_sets: int, num_draws: int, seed: int) -> dict[str, float]:
    """Part one, averages over data sets with their standard errors."""
    names = ("training", "arviz_loo", "coupled", "refit", "new_pairs", "khat", "ess", "z")
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in trange(num_sets, desc="data sets", disable=None):
        generator = np.random.default_rng([seed, number])
        x, y = pairs(PAIRS, generator)
        draws, log_weight = posterior(x, y, 4 * num_draws, generator)
        weight = special.softmax(log_weight)
        draws = draws[generator.choice(len(draws), num_draws, p=weight)]  # equal weights, as a sampler's
        log_p = log_softmax(draws, x, y)
        rows = np.diagonal(log_p, axis1=1, axis2=2)
        loo, khat, error = arviz_loo(rows)
        refit = []
        for i in range(PAIRS):
            keep = np.arange(PAIRS) != i
            others, log_weight = posterior(x[keep], y[keep], num_draws, generator)
            logits = (others * x[i]) @ y.T  # among all candidates, its partner included
            refit.append(log_mean(special.log_softmax(logits, axis=1)[:, i], log_weight))
        new = [log_mean(np.diagonal(log_softmax(draws, *pairs(PAIRS, generator)), axis1=1, axis2=2),
                        np.zeros(num_draws)).mean() for _ in range(10)]  # fmt: skip
        figures = {
            "training": log_mean(rows, np.zeros(num_draws)).mean(),
            "arviz_loo": loo.mean(),
            "coupled": log_mean(rows, -log_without(log_p)).mean(),
            "refit": np.mean(refit),
            "new_pairs": np.mean(new),
            "khat": np.mean(khat > 0.7),
            "ess": 1 / (weight**2).sum() / len(weight),
            "z": (loo.sum() - np.sum(refit)) / error,
        }
        for name in names:
            found[name].append(float(figures[name]))
    summary = {f"bilinear_{name}": float(np.mean(found[name])) for name in names}
    excess = {name: np.subtract(found[name], found["refit"]) for name in ("arviz_loo", "coupled", "new_pairs")}
    for name, gap in excess.items():
        summary[f"bilinear_{name}_minus_refit"] = float(gap.mean())
        summary[f"bilinear_{name}_minus_refit_se"] = float(stats.sem(gap))
    return summary


def by_heart(steps: int, num_draws: int, seed: int, device: str) -> dict[str, float]:
    """Part two: the score of the training pairs, what ``arviz.loo`` makes of it, and the score of new pairs."""
    pyro.set_rng_seed(seed)
    world, num = SphereWorld(dim=10), 128
    train, test = world.sample(num, seed), world.sample(20 * num, seed + 1)
    guide: Any = guides.VonMisesFisher(nets.mlp([world.observed_dim, 128, 128]), dim=world.dim)
    model: Any = models.MCInfoNCE(guide, concentration=20.0, evidence="elbo")
    batches = iter(lambda: (train.x1, train.x2), None)
    fit(model, guide, batches, steps=steps, lr=2e-3, device=device)
    model, guide = model.cpu(), guide.cpu()
    result = diagnostics.to_arviz(model, guide, (train.x1, train.x2), num_samples=num_draws, seed=seed, prior=False)
    rows = result["log_likelihood"]["positive"].values[0] - math.log(num)  # the factor is log N above log p
    loo, khat, _ = arviz_loo(rows)
    exact = models.MCInfoNCE(guide, concentration=20.0)
    seen, new = (diagnostics.partner_check(exact, guide, (b.x1, b.x2), num_candidates=num) for b in (train, test))
    return {
        "by_heart_training": float(log_mean(rows, np.zeros(len(rows))).mean()),
        "by_heart_arviz_loo": float(loo.mean()),
        "by_heart_khat": float(np.mean(khat > 0.7)),
        "by_heart_training_check": seen.log_score,
        "by_heart_new_pairs": new.log_score,
        "by_heart_new_pairs_se": new.log_score_se,
        "by_heart_chance": -math.log(num),
    }


if __name__ == "__main__":
    from _options import finish, parse

    args = parse(__doc__ or "")
    num_sets, num_draws, steps = (2, 500, 30) if args.small else (50, 4_000, 3_000)
    figures = bilinear(num_sets, num_draws, args.seed)
    finish(figures | by_heart(steps, num_draws // 4, args.seed, args.device), args.out)
