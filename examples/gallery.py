"""Draw the gallery of docs/plots.md: known worlds, their exact posteriors and deliberately wrong ones; no training.

``--out DIR --seed N --small``; without ``--out`` into docs/figures, where the page looks for them.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pyro_contrastive import diagnostics
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.kernels import expected_log_ratio
from pyro_contrastive.ops.random import seeded

NUM_ITEMS, NUM_DRAWS, NUM_CANDIDATES = 1_000, 499, 50
POSTERIORS = ("exact", "over-confident", "under-confident", "tilted")


def posterior(world: SphereWorld, batch: Any, kind: str, view: int = 1) -> VonMisesFisher:
    """The exact posterior of a view, or one that is wrong in a known way."""
    exact = world.posterior(batch, view)
    mean, kappa = exact.mean_direction, exact.concentration
    if kind == "tilted":  # the direction is off by as much as the posterior is wide
        with seeded(view):  # its own noise in each view: common noise would tell the pairs apart
            mean = exact.sample()
    return VonMisesFisher(mean, kappa * {"over-confident": 4.0, "under-confident": 0.25}.get(kind, 1.0))


def simulation(world: SphereWorld, kind: str) -> tuple[Any, Any]:
    """What `sbc` asks for: the posterior as a function of its input, and the simulator."""

    def simulate(count: int, seed: int) -> tuple[Any, Tensor]:
        batch = world.sample(count, seed)
        return batch, batch.z1

    return (lambda batch: posterior(world, batch, kind)), simulate


def save(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """A PNG with a palette, a third of the size of a full one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    image = Image.open(buffer).convert("RGB")
    few = image.quantize(255, dither=Image.Dither.NONE)
    red = (0xD5, 0x5E, 0x00)  # of missed truths: few pixels, which would lose their colour
    pixels = np.where(np.abs(np.array(image, dtype=int) - red).sum(axis=2) < 90, 255, np.array(few))
    small = Image.fromarray(pixels.astype(np.uint8))
    small.putpalette([*few.getpalette()[: 3 * 255], *red])
    small.save(path, optimize=True)
    print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")


def figure_of(drawn: Any) -> Figure:
    """The figure behind what ArviZ returns: a `PlotCollection` (1.x), axes or an array of axes (0.x)."""
    if hasattr(drawn, "viz"):
        return drawn.viz["figure"].item()
    return np.ravel(np.array(drawn, dtype=object))[0].figure


def grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure that pyplot does not know of, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def caps(out: Path, seed: int, _: int) -> None:
    """Posterior caps on the 2-sphere and on three axes of ten; the first also as a page that turns."""
    globe, wide = SphereWorld(dim=3, concentration=(8.0, 400.0)), SphereWorld(dim=10)
    figure, axes = grid(1, 2, (10.4, 4.9))
    for world, ax, count in ((globe, axes[0, 0], 24), (wide, axes[0, 1], 16)):
        batch = world.sample(count, seed)
        q = world.posterior(batch)
        view = (25.0, 30.0) if world.dim == 3 else None
        given = {"truth": batch.z1, "view": view}
        diagnostics.plot_sphere_caps(q.mean_direction, q.concentration, ax=ax, **given)
        if world.dim == 3:
            page = diagnostics.sphere_html(q.mean_direction, q.concentration, **given)
            (out / "gallery_caps.html").write_text(page, "utf-8")
    save(figure, out / "gallery_caps.png", dpi=90)


def calibration(out: Path, seed: int, num_items: int) -> None:
    """The grid over methods, rank histograms and TARP, and ArviZ's ECDF of the same PIT values."""
    world = SphereWorld(dim=10)
    batch = world.sample(num_items, seed)
    laws = {kind: posterior(world, batch, kind) for kind in POSTERIORS}
    pit = {kind: diagnostics.cap_pit(law, batch.z1) for kind, law in laws.items()}
    concentration = {kind: law.concentration for kind, law in laws.items()}
    axes = diagnostics.plot_calibration_grid(
        pit, concentration=concentration, true_concentration=batch.concentration1, figsize=(9.6, 10.4)
    )
    save(axes[0, 0].figure, out / "gallery_grid.png", dpi=88)

    ranks = {}
    for kind in ("exact", "over-confident"):
        law, simulate = simulation(world, kind)
        quantities = {"z_1": lambda z: z[..., 0], "angle": diagnostics.angle_to_mean}
        ranks[kind] = diagnostics.sbc(
            law, simulate, num_simulations=num_items, num_draws=NUM_DRAWS, quantities=quantities, seed=seed
        )
    tarp = {kind: diagnostics.tarp(laws[kind], batch.z1, num_draws=NUM_DRAWS, seed=seed) for kind in POSTERIORS[:3]}
    figure, axes = grid(1, 2, (10.4, 4.3))
    shown = {f"{name}, {kind}": result.pit[name] for kind, result in ranks.items() for name in ("z_1",)}
    diagnostics.plot_rank_histogram(shown, ax=axes[0, 0])
    diagnostics.plot_tarp(tarp, ax=axes[0, 1])
    save(figure, out / "gallery_ranks.png")
    mild = VonMisesFisher(laws["exact"].mean_direction, 1.3 * laws["exact"].concentration)
    angles = {"exact": pit["exact"], "concentration x 1.3": diagnostics.cap_pit(mild, batch.z1)}
    save(figure_of(diagnostics.plot_ecdf_pit(angles, figsize=(8.4, 3.6))), out / "gallery_ecdf_pit.png")


def checks(out: Path, seed: int, num_items: int) -> None:
    """Model checks on held-out pairs: reliability, comparison, risk and coverage."""
    world = SphereWorld(dim=10)
    batch = world.sample(num_items, seed)
    found, nearest = {}, []
    for kind in POSTERIORS:
        laws = posterior(world, batch, kind, 1), posterior(world, batch, kind, 2)
        logits = expected_log_ratio(*laws, world.pair_concentration)
        found[kind] = diagnostics.partner_check(logits, num_candidates=NUM_CANDIDATES, seed=seed)
        if kind == "exact":  # candidates in tens: is the likeliest one the partner?
            blocks = (logits[start : start + 10, start : start + 10] for start in range(0, len(logits), 10))
            nearest = [block.argmax(dim=1) == torch.arange(10) for block in blocks]
    figure, axes = grid(1, 2, (10.4, 4.8))
    diagnostics.plot_reliability({kind: found[kind] for kind in POSTERIORS[:3]}, ax=axes[0, 0])
    surest = diagnostics.selective_risk(batch.concentration1, torch.cat(nearest))
    diagnostics.plot_risk_coverage({"by concentration": surest}, ax=axes[0, 1])
    save(figure, out / "gallery_checks.png")
    save(diagnostics.plot_comparison(diagnostics.compare(found)).figure, out / "gallery_comparison.png")


def arviz_plots(out: Path, seed: int, _: int) -> None:
    """ArviZ's own: a forest of angles, and the k-hat of a posterior that is too narrow."""
    world = SphereWorld(dim=10)
    batch = world.sample(100, seed)
    exact, narrow = posterior(world, batch, "exact"), posterior(world, batch, "over-confident")
    with seeded(seed):
        z = narrow.sample((NUM_DRAWS,))
    khat = diagnostics.psis_khat(exact.log_prob(z) - narrow.log_prob(z))
    save(figure_of(diagnostics.plot_khat(khat, figsize=(5.2, 3.6))), out / "gallery_khat.png")


def main(argv: list[str] | None = None) -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = Path(__file__).parents[1] / "docs" / "figures"
    parser.add_argument("--out", type=Path, default=figures, metavar="DIR", help="default: docs/figures")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="few items only: shows that it runs")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for draw in (caps, calibration, checks, arviz_plots):
        draw(args.out, args.seed, 200 if args.small else NUM_ITEMS)


if __name__ == "__main__":
    main()
