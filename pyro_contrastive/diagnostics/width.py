r"""Which width do held-out pairs support? One factor, and one power, on the concentrations of fitted posteriors.

Objectives that weight a divergence (VCL) leave the level of the widths to the weight. The exact evidence of held-out
pairs has no such weight: maximised over a common change of the concentrations, it says which level was right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics.calibration import direction_and_concentration
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import expected_log_ratio

__all__ = ["WidthCalibration", "calibrate_width"]

_REACH = math.log(30.0)  # how far the factor is looked for, either way
_POWERS = (0.0, 20.0)
_LARGEST = 1e6  # concentrations beyond say "a point"
_ELEMENTS = 2**19  # pairs that are evaluated at once


@dataclass(frozen=True, eq=False)
class WidthCalibration:
    r"""The change of all concentrations that held-out pairs prefer; see :func:`calibrate_width`.

    .. math::  \kappa' = \bar\kappa \, (\kappa / \bar\kappa)^{\text{power}} / \text{factor}^2

    Attributes:
        factor: On angular widths, > 0: 1 where the level was right, above where the posteriors were too narrow.
        factor_error: Standard error of its logarithm over batches of pairs.
        power: On relative concentrations, >= 0: 1 where the spread of the widths over items was right, above where they
            were too much alike, 0 where their differences say nothing. 1 if it was not fitted.
        power_error: Standard error over batches; 0 if it was not fitted.
        centre: Geometric mean concentration of the items it was fitted to.
        pair_concentration: Assumed concentration between the latents of two views.
        evidence: Held-out evidence before and after, nats per pair, shape (2,).
        gain_error: Standard error of the difference.
        at_limit: Whether the pairs prefer posteriors that are narrower or wider than was tried: there is no right width
            under these directions and this pair concentration.
        num_pairs: Pairs behind it.
    """

    factor: float
    factor_error: float
    power: float
    power_error: float
    centre: float
    pair_concentration: float
    evidence: FloatArray
    gain_error: float
    at_limit: bool
    num_pairs: int

    def concentration(self, concentration: Any) -> Tensor:
        """Calibrated concentrations.

        Args:
            concentration: Concentrations in von Mises-Fisher units, > 0, any shape.

        Returns:
            Of the same shape, float64.
        """
        kappa = torch.from_numpy(np.asarray(as_array(concentration), dtype=np.float64))
        return _moved(kappa, self.centre, torch.tensor([math.log(self.factor), self.power], dtype=torch.float64))

    def posterior(self, posterior: Any, *, num_samples: int = 256, seed: int = 0) -> VonMisesFisher:
        """Calibrated posterior, as a von Mises-Fisher law.

        Args:
            posterior: Distribution with batch shape (N,) and event shape (d,), of any family on the sphere.
            num_samples: Draws per item where the family has no concentration.
            seed: Of these.

        Returns:
            Law with the same mean directions, float64.
        """
        mean, kappa = direction_and_concentration(posterior, num_samples=num_samples, seed=seed)
        return VonMisesFisher(torch.from_numpy(mean), self.concentration(kappa))

    def summary(self) -> str:
        """What this means, in words.

        Returns:
            A few sentences.
        """
        premise = "both views show one latent"
        if math.isfinite(self.pair_concentration):
            premise = f"the latents of two views have concentration {self.pair_concentration:g} around each other"
        if self.at_limit:
            return (
                f"No factor within 1/30 and 30 is best for {self.num_pairs} held-out pairs: their mean directions are "
                f"closer, or farther, than they can be at any width if {premise}. The directions are distorted (learn "
                "the concentration of the training kernel), or the premise is wrong."
            )
        low, high = (self.factor * math.exp(sign * 2 * self.factor_error) for sign in (-1, 1))
        verdict = "right" if low <= 1 <= high else "too narrow" if self.factor > 1 else "too wide"
        text = (
            f"{self.num_pairs} held-out pairs want the widths times {self.factor:.2f} (95 %: {low:.2f} to {high:.2f}): "
            f"they are {verdict} if {premise}"
        )
        if self.power_error:
            text += f"; and their differences between items to the power {self.power:.1f} +- {2 * self.power_error:.1f}"
        return (
            f"{text}. The evidence gains {self.evidence[1] - self.evidence[0]:.2f} +- {2 * self.gain_error:.2f} nats."
        )


def calibrate_width(
    posterior1: Any,
    posterior2: Any,
    pair_concentration: float = math.inf,
    *,
    stretch: bool = True,
    batch_size: int = 256,
    num_samples: int = 256,
    seed: int = 0,
) -> WidthCalibration:
    r"""Find the common factor (and power) on the widths under which held-out pairs are most likely. No truth needed.

    Type-II maximum likelihood ("empirical Bayes"). Posteriors of any family are read as von Mises-Fisher laws of the
    same mean resultant length; for these the evidence of a pair, its latents integrated out, is exact
    (:func:`~pyro_contrastive.kernels.expected_log_ratio`). What is maximised is its softmax over a batch.

    It corrects widths, not directions: an encoder that was trained with a kernel of the wrong concentration has bent
    the sphere, alike for both views, and no pair can tell. The level is relative to `pair_concentration`, as always.
    The aggregate of the posteriors must be about uniform. Use pairs that were not trained on.

    Args:
        posterior1: Posteriors of the first views of held-out pairs, batch shape (N,), event shape (d,).
        posterior2: Of the second views.
        pair_concentration: kappa_pos > 0 between the latents of two views; infinite where they share one.
        stretch: Fit the power as well.
        batch_size: Pairs that are compared with each other, >= 2; what is left over is not used.
        num_samples: Draws per item, for families without a concentration.
        seed: Of these.

    Returns:
        The calibration, with :meth:`WidthCalibration.posterior` to apply it and :meth:`WidthCalibration.summary`.

    Raises:
        ValueError: If the posteriors do not belong together, are points, or fill fewer than two batches; for a
            concentration that is not positive.

    Example:
        >>> from pyro_contrastive.data import SphereWorld
        >>> world = SphereWorld(dim=3, pair_concentration=math.inf)
        >>> pairs = world.sample(512, seed=0)
        >>> narrow = [VonMisesFisher(q.mean_direction, 9 * q.concentration)
        ...           for q in (world.posterior(pairs, view) for view in (1, 2))]
        >>> found = calibrate_width(*narrow, stretch=False)
        >>> abs(found.factor - 3) < 3 * 3 * found.factor_error
        True
    """
    if not pair_concentration > 0:
        raise ValueError(f"`pair_concentration` must be > 0 (math.inf: one shared latent), got {pair_concentration!r}")
    if posterior1.batch_shape != posterior2.batch_shape or len(posterior1.batch_shape) != 1:
        raise ValueError(
            f"both posteriors need one batch shape (N,), got {tuple(posterior1.batch_shape)} and "
            f"{tuple(posterior2.batch_shape)}"
        )
    batches = posterior1.batch_shape[0] // batch_size if batch_size >= 2 else 0
    if batches < 2:
        raise ValueError(
            f"the width needs two batches of `batch_size` >= 2 pairs at least, got {posterior1.batch_shape[0]} pairs "
            f"and batch_size={batch_size!r}; use more pairs or smaller batches"
        )
    laws = []
    for view, law in enumerate((posterior1, posterior2)):
        mean, kappa = direction_and_concentration(law, num_samples=num_samples, seed=seed + view)
        if not np.all(np.isfinite(kappa) & (kappa > 0)):
            raise ValueError(
                "posteriors must have a width, got concentrations that are zero or infinite; point embeddings "
                "(guides.Delta) and uniform laws have none to change"
            )
        mean, kappa = mean[: batches * batch_size], kappa[: batches * batch_size]
        shape = (batches, batch_size)
        laws.append((torch.from_numpy(mean).unflatten(0, shape), torch.from_numpy(kappa).unflatten(0, shape)))
    centre = float(torch.cat([kappa for _, kappa in laws]).log().mean().exp())
    together = max(1, _ELEMENTS // batch_size**2)

    def evidence(values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Evidence of each batch, (B,), and its gradient to the parameters, (B, P)."""
        parameters = torch.tensor([values[0], values[1] if len(values) > 1 else 1.0], dtype=torch.float64)
        results, gradients = [], []
        for start in range(0, batches, together):
            part = slice(start, start + together)
            own = parameters.expand(len(laws[0][1][part]), 1, 2).clone().requires_grad_()  # one copy for each batch
            q1, q2 = (VonMisesFisher(mean[part], _moved(kappa[part], centre, own)) for mean, kappa in laws)
            value = infonce_log_ratio(expected_log_ratio(q1, q2, pair_concentration), symmetric=True).mean(-1)
            gradients.append(torch.autograd.grad(value.sum(), own)[0][:, 0, : len(values)].numpy())
            results.append(value.detach().numpy())
        return np.concatenate(results), np.concatenate(gradients)

    def loss(values: FloatArray) -> tuple[float, FloatArray]:
        value, gradient = evidence(values)
        return -float(value.mean()), -gradient.mean(0)

    start = np.array([0.0, 1.0][: 1 + stretch])
    bounds = [(-_REACH, _REACH), _POWERS][: 1 + stretch]
    options = {"ftol": 1e-7, "gtol": 1e-4}  # a ten-thousandth of a nat is far below the standard error
    found = optimize.minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    before, (after, gradient) = evidence(start)[0], evidence(found.x)
    errors = _errors(lambda values: evidence(values)[1].mean(0), found.x, gradient)
    gain = after - before
    return WidthCalibration(
        factor=float(math.exp(found.x[0])),
        factor_error=errors[0],
        power=float(found.x[1]) if stretch else 1.0,
        power_error=errors[1] if stretch else 0.0,
        centre=centre,
        pair_concentration=float(pair_concentration),
        evidence=np.array([before.mean(), after.mean()]),
        gain_error=float(gain.std(ddof=1) / math.sqrt(batches)),
        at_limit=bool(abs(found.x[0]) > 0.99 * _REACH),
        num_pairs=batches * batch_size,
    )


def _moved(kappa: Tensor, centre: float, parameters: Tensor) -> Tensor:
    """Concentrations under the log factor and the power, `parameters[..., :]`."""
    log_centre = math.log(centre)
    log_kappa = log_centre + parameters[..., 1] * (kappa.log() - log_centre) - 2 * parameters[..., 0]
    return log_kappa.clamp_max(math.log(_LARGEST)).exp()


def _errors(score: Callable[[FloatArray], FloatArray], at: FloatArray, each: FloatArray) -> list[float]:
    """Standard errors of a maximum of the mean of batches: the sandwich formula, with the scores of each batch."""
    meat = np.atleast_2d(np.cov(each.T)) / len(each)
    steps = 0.02 * np.eye(len(at))
    curvature = np.stack([(score(at + step) - score(at - step)) / 0.04 for step in steps])
    bread = np.linalg.pinv(curvature)
    return [float(value) for value in np.sqrt(np.diag(bread @ meat @ bread.T))]
