r"""Mutual information does not see the geometry of a representation; the InfoNCE prior does. No training.

Views are points s, s' of the unit square, s uniform and s' a normal step of .05 away, drawn again until it is inside.
The representation z = T_k(s) turns every point around the centre by the angle :math:`k |s - 1/2|^2`. It can be undone
and keeps areas, so I(z; z') = I(s; s') for every k, while neighbours in the square come to lie far apart. Scored are
pairs (z, z') by InfoNCE among N candidates, with two critics:

* the true density ratio p(s'|s) / p(s'), which is free to undo the twist: its score estimates the mutual information;
* a Gaussian kernel of z - z' of the best width: the InfoNCE prior "partners are near one another".

Writes the table, `summary.json` and `mi_versus_infonce.png`. Options: ``--out DIR --seed N --device cpu --small``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from pyro_contrastive.factors import infonce_log_ratio

STEP = 0.05
TWISTS = (0.0, 2.0, 5.0, 10.0, 20.0)
WIDTHS = (0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)


def sample(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pairs of points, float64 ``(num, 2)`` each."""
    generator = np.random.default_rng(seed)
    s = generator.uniform(size=(num, 2))
    low, high = -s / STEP, (1 - s) / STEP
    partner = s + STEP * stats.truncnorm.rvs(low, high, random_state=generator)  # a step is drawn until it is inside
    return torch.from_numpy(s), torch.from_numpy(partner)


def twist(s: Tensor, k: float) -> Tensor:
    """Turn points around the centre by k times their squared distance from it, in radians; -k undoes it."""
    x, y = (s - 0.5).unbind(-1)
    angle = k * (x**2 + y**2)
    cos, sin = angle.cos(), angle.sin()
    return 0.5 + torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


def _inside(t: np.ndarray) -> np.ndarray:
    """Probability that a step from t stays in the unit interval."""
    return stats.norm.cdf((1 - t) / STEP) - stats.norm.cdf(-t / STEP)


def log_density_ratio(s: Tensor, partner: Tensor) -> Tensor:
    """Grid ``(N, M)`` of log p(s'|s) / p(s'), exact up to quadrature."""
    a, b = s.numpy(), partner.numpy()
    t = (np.arange(4_000) + 0.5) / 4_000  # midpoints: the marginal is an average over the first view's coordinate
    log_ratio = np.zeros((len(a), len(b)))
    for axis in range(2):
        marginal = np.array([(stats.norm.pdf(u, t, STEP) / _inside(t)).mean() for u in b[:, axis]])
        log_ratio += stats.norm.logpdf(b[:, axis], a[:, None, axis], STEP)
        log_ratio -= np.log(_inside(a[:, None, axis])) + np.log(marginal)
    return torch.from_numpy(log_ratio)


def score(log_f: Tensor) -> float:
    """InfoNCE estimate in nats, at most log N."""
    return float(infonce_log_ratio(log_f).mean())


def linear_r2(z: Tensor, s: Tensor) -> float:
    """Share of the variance of s that a linear map of z explains, both coordinates together."""
    design = np.column_stack([z.numpy(), np.ones(len(z))])
    residual = s.numpy() - design @ np.linalg.lstsq(design, s.numpy(), rcond=None)[0]
    return float(1 - residual.var(axis=0).sum() / s.numpy().var(axis=0).sum())


def measure(num: int, seed: int, twists: Sequence[float] = TWISTS) -> list[dict[str, float]]:
    """One row per twist: both scores, the best width of the kernel, and the linear R^2."""
    s, partner = sample(num, seed)
    rows = []
    for k in twists:
        z, z_partner = twist(s, k), twist(partner, k)
        squared = torch.cdist(z, z_partner).square()
        by_width = {width: score(-squared / (2 * width**2)) for width in WIDTHS}
        best = max(by_width, key=lambda width: by_width[width])
        free = log_density_ratio(twist(z, -k), twist(z_partner, -k))  # a function of the codes alone
        rows.append(
            {
                "twist": k,
                "mi": score(free),
                "infonce": by_width[best],
                "width": best,
                "r2": linear_r2(z, s),
                "true_mi": float(free.diagonal().mean()),  # without the bias of N candidates
            }
        )
    return rows


def draw(table: dict[str, np.ndarray], file: Path, seed: int) -> None:
    """The two scores over the twist, and what the twist does to the square."""
    from pyro_contrastive.diagnostics._style import BLUE, GREY, ORANGE, new_figure

    figure = new_figure((11.0, 2.9))
    axes = figure.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
    k = table["twist"].mean(0)
    for name, label, colour, marker in (
        ("mi", "true density ratio (mutual information)", BLUE, "o"),
        ("infonce", "Gaussian kernel (InfoNCE prior)", ORANGE, "s"),
    ):
        error = table[name].std(0, ddof=1) if len(table[name]) > 1 else None
        axes[0].errorbar(k, table[name].mean(0), error, color=colour, marker=marker, markersize=5, label=label)
    axes[0].set(xlabel="twist k", ylabel="InfoNCE score in nats", ylim=(0, 4.6))
    axes[0].legend(fontsize=8, frameon=False, loc="upper right")
    axes[0].spines[["top", "right"]].set_visible(False)
    s, partner = sample(900, seed)
    for panel, twisted in zip(axes[1:], (0.0, 5.0, 20.0), strict=True):
        z, other = twist(s, twisted), twist(partner, twisted)
        panel.scatter(*z.T, c=s[:, 0], cmap="viridis", s=5, linewidths=0)
        panel.plot(*torch.stack([z[:25], other[:25]]).movedim(-1, 0), color=GREY, linewidth=1.4)
        panel.set_title(f"k = {twisted:g}", fontsize=10)
        panel.set(aspect="equal", xticks=[], yticks=[], xlim=(-0.25, 1.25), ylim=(-0.25, 1.25))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    from _options import finish, parse

    args = parse(__doc__ or "")
    num, seeds = (200, 2) if args.small else (1_500, 5)
    runs = [measure(num, args.seed + i) for i in tqdm(range(seeds), desc="worlds")]
    table = {name: np.array([[row[name] for row in rows] for rows in runs]) for name in runs[0][0]}
    figures = {}
    for column, k in enumerate(TWISTS):
        for name in ("mi", "infonce", "width", "r2", "true_mi"):
            figures[f"k={k:g} {name}"] = float(table[name][:, column].mean())
            figures[f"k={k:g} {name}_sd"] = float(table[name][:, column].std(ddof=1))
    out = args.out or Path("runs/mi_versus_infonce")
    draw(table, out / "mi_versus_infonce.png", args.seed)
    finish(figures, out)
