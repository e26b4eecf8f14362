r"""A video of a moving object: a prior that knows how things move recovers the state, plain InfoNCE does not.

Eight frames show a blob that swings and is jostled, before a faint texture that differs from clip to clip. One frame
shows where the blob is and nothing of where it goes. The encoder is the same network everywhere, without labels:

* dynamics: an RPM whose prior is the law of motion, and a smoothing guide; the state is the posterior's mean;
* InfoNCE, free critic: frames that follow one another are pairs, under the optimal prior (mutual information);
* InfoNCE, sphere: the same with points on the sphere of R^5 and a learned temperature.

Scored is the linear R^2 of position and velocity on fresh clips. The state of the dynamics is read from the four
numbers of its own time; for InfoNCE from the codes of all eight frames together, which favours it: a difference of two
codes may serve as the velocity. The ceiling is the posterior given the true positions.

Trains three seeds, about 8 minutes on one core; an interrupted run goes on. Writes the table, `summary.json`,
`moving_object.png` and checkpoints. Options: ``--out DIR --seed N --device auto|cpu|cuda --small --background H``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from pyro_contrastive import guides, models, nets, priors
from pyro_contrastive.data import MovingObject, Video
from pyro_contrastive.diagnostics import linear_r2
from pyro_contrastive.fit import fit
from pyro_contrastive.ops.random import seeded

METHODS = {"dynamics": "dynamics", "critic": "InfoNCE, free critic", "sphere": "InfoNCE, sphere"}
LEVELS = (0.5, 0.8, 0.95)
STATES = ("position", "velocity")


class Outcome(NamedTuple):
    """What a fitted encoder says of the test clips.

    Attributes:
        guide: The guide, in eval mode.
        states: Estimates of position and velocity, ``(N, T, 4)``: the best linear map of the codes.
        figures: R^2 of both; for the dynamics the share of states in their 50 / 80 / 95 % ellipsoids.
        errors: Standard deviations of the states, ``(N, T, 4)``; for the dynamics only.
    """

    guide: Any
    states: Tensor
    figures: dict[str, float]
    errors: Tensor | None


def make_pair(method: str, world: MovingObject, seed: int) -> tuple[nn.Module, nn.Module]:
    """Model and guide, the encoder the same for all."""
    with seeded(seed):
        encoder = nets.mlp([world.size**2, 128, 128])
        if method == "sphere":
            points = guides.Delta(encoder, 5)
            return models.MCInfoNCE(
                points, concentration=10.0, evidence="elbo", learn_concentration=True, symmetric=True
            ), points
        normal = guides.Normal(encoder, 4)
        if method == "critic":
            return models.RPM(normal, priors.optimal(4)), normal
        prior = world.dynamics()
        smoothed = guides.Smoothed(normal, prior)
        return models.RPM(smoothed, prior), smoothed


def codes(guide: Any, frames: tuple[Tensor, ...]) -> Tensor:
    """Mean of the posterior given each frame alone, ``(N, T, d)``."""
    return torch.stack([guide.posterior(x).mean for x in frames], 1)


def linear_map(x: Tensor, y: Tensor) -> Tensor:
    """Least squares of y on x and a constant, the constant last."""
    return torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution


@torch.no_grad()
def score(method: str, guide: Any, clips: Video) -> Outcome:
    """Read the states off the codes, and say how well."""
    guide.eval()
    truth = torch.cat([clips.position, clips.velocity], -1)
    if method != "dynamics":
        z = codes(guide, clips.frames).flatten(1)
        states = (torch.cat([z, torch.ones(len(z), 1)], 1) @ linear_map(z, truth.flatten(1))).view_as(truth)
        targets = (clips.position.flatten(1), clips.velocity.flatten(1))
        r2 = {name: linear_r2(z, target).r2 for name, target in zip(STATES, targets, strict=True)}
        return Outcome(guide, states, r2, None)
    laws = guide.smoothed(*clips.frames)
    z = torch.stack([law.mean for law in laws], 1).flatten(0, 1)
    covariance = torch.stack([law.covariance_matrix for law in laws], 1).flatten(0, 1)
    targets = (clips.position.flatten(0, 1), clips.velocity.flatten(0, 1))
    figures = {name: linear_r2(z, target).r2 for name, target in zip(STATES, targets, strict=True)}
    affine = linear_map(z, truth.flatten(0, 1))
    states = (z @ affine[:-1] + affine[-1]).view_as(truth)
    covariance = affine[:-1].mT @ covariance @ affine[:-1]
    miss = (truth - states).flatten(0, 1).unsqueeze(-1)
    distance = (miss.mT @ torch.linalg.solve(covariance, miss)).flatten()
    for level in LEVELS:
        figures[f"in {level:.0%}"] = float((distance <= stats.chi2(4).ppf(level)).float().mean())
    return Outcome(guide, states, figures, covariance.diagonal(dim1=-2, dim2=-1).sqrt().view_as(truth))


def ceiling(world: MovingObject) -> float:
    """R^2 of the velocity given all true positions: one minus the mean variance that is left."""
    steps = np.arange(world.num_frames)
    transition = world.transition.numpy().astype(float)
    powers = [np.linalg.matrix_power(transition, int(k)) for k in steps]
    blocks = [[powers[t - u] if t >= u else powers[u - t].T for u in steps] for t in steps]
    joint = np.array(blocks).transpose(0, 2, 1, 3)  # time, axis of the state, time, axis: covariance of all states
    pick = lambda a, b: joint[:, a][:, :, :, b].reshape(2 * len(steps), 2 * len(steps))  # noqa: E731
    p, v = slice(0, 2), slice(2, 4)
    left = pick(v, v) - pick(v, p) @ np.linalg.solve(pick(p, p), pick(p, v))
    return float(1 - np.trace(left) / len(left))


def draw(world: MovingObject, clips: Video, outcomes: dict[str, Outcome], file: Path) -> None:
    """A clip, what the encoders make of the plane, and a velocity over time."""
    from pyro_contrastive.diagnostics._style import BLUE, GREY, ORANGE, new_figure

    figure = new_figure((11.0, 3.1))
    clip, *planes, speed = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.35))
    one = int(clips.position.abs().amax((1, 2)).sub(1.6).abs().argmin())  # a clip that fills the frame
    reach = float(world.grid[-1])
    clip.imshow(torch.stack(clips.frames)[:, one, 0].amax(0), cmap="gray_r", extent=(-reach, reach, reach, -reach))
    clip.plot(*clips.position[one].T, color=ORANGE, marker="o", markersize=3, linewidth=1)
    clip.set_title("eight frames of a clip", fontsize=9)
    line = torch.linspace(-2, 2, 9)
    lattice = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    for panel, method, colour in zip(planes, ("dynamics", "sphere"), (BLUE, ORANGE), strict=True):
        guide = outcomes[method].guide
        with torch.no_grad():
            seen = guide.posterior(world.render(lattice.flatten(0, 1)).unsqueeze(1)).mean
            z = codes(guide, clips.frames).flatten(0, 1)
        affine = linear_map(z, clips.position.flatten(0, 1))
        placed = (seen @ affine[:-1] + affine[-1]).view_as(lattice)
        for lines in (lattice, lattice.transpose(0, 1)):
            panel.plot(*lines.movedim(-1, 0).transpose(1, 2), color=GREY, linewidth=0.6, alpha=0.6)
        for lines in (placed, placed.transpose(0, 1)):
            panel.plot(*lines.movedim(-1, 0).transpose(1, 2), color=colour, linewidth=1.3)
        panel.set_title(f"{METHODS[method]}: codes of the grid", fontsize=9)
        panel.set(xlim=(-reach, reach), ylim=(reach, -reach))
    for panel in (clip, *planes):
        panel.set(aspect="equal", xticks=[], yticks=[])
    time = np.arange(1, world.num_frames + 1)
    mean, spread = outcomes["dynamics"].states[one, :, 2], outcomes["dynamics"].errors[one, :, 2]
    speed.fill_between(time, mean - 1.96 * spread, mean + 1.96 * spread, color=BLUE, alpha=0.2, linewidth=0)
    speed.plot(time, mean, color=BLUE, label="dynamics, 95 %")
    speed.plot(time, outcomes["sphere"].states[one, :, 2], color=ORANGE, label="InfoNCE, sphere")
    speed.plot(time, clips.velocity[one, :, 0], "o", color=GREY, markersize=4, label="true")
    speed.set(xlabel="frame", xticks=time)
    speed.set_title("horizontal velocity", fontsize=9)
    speed.spines[["top", "right"]].set_visible(False)
    speed.legend(fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(args: Any) -> dict[str, float]:
    """Train, score and draw."""
    out = args.out or Path("runs/moving_object")
    world = MovingObject(background=args.background)
    clips = world.sample(200 if args.small else 2_000, seed=1_000_000)
    runs: dict[str, list[Outcome]] = {method: [] for method in METHODS}
    for seed in range(args.seed, args.seed + (1 if args.small else 3)):
        for method in METHODS:
            model, guide = make_pair(method, world, seed)
            # about the same CPU time for all
            steps, source, size = (
                (800, world, 128) if method == "dynamics" else (2_000, MovingObject(2, background=args.background), 256)
            )
            fit(
                model,
                guide,
                source.batches(16 if args.small else size, seed),
                steps=3 if args.small else steps,
                num_views=None,
                lr=2e-3,
                seed=seed,
                device=args.device,
                out=out / f"{method}-{seed}",
                config={"background": args.background, "small": args.small},
                progress=f"{METHODS[method]}, seed {seed}",
            )
            runs[method].append(score(method, guide.cpu(), clips))
    draw(world, clips, {method: outcomes[0] for method, outcomes in runs.items()}, out / "moving_object.png")
    figures = {"ceiling velocity": ceiling(world)}
    for method, outcomes in runs.items():
        for name in outcomes[0].figures:
            for i, outcome in enumerate(outcomes):
                figures[f"{method} {name}, seed {args.seed + i}"] = outcome.figures[name]
    return figures


if __name__ == "__main__":
    from _options import finish, make_parser

    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--background",
        type=float,
        default=0.05,
        metavar="H",
        help="of the texture; the blob has 1; default: %(default)s",
    )
    args = parser.parse_args()
    finish(main(args), args.out or Path("runs/moving_object"))
