"""What an exponential family must know for the evidences of a shared latent."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pyro_contrastive.ops.tiles import Pairs, Tensors

__all__ = ["ExponentialFamily"]


class ExponentialFamily:
    r"""What a family must know. All methods take and give batches ``(*batch,)`` and are differentiable.

    Example:
        >>> import torch
        >>> from pyro_contrastive.distributions import VonMisesFisher
        >>> from pyro_contrastive.distributions.exponential import exponential_family
        >>> law = VonMisesFisher(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(2.0))
        >>> family = exponential_family(law)
        >>> eta = family.natural(law).requires_grad_()
        >>> torch.autograd.grad(family.log_partition(eta), eta)[0], family.mean(law)  # the same
        (tensor([0.0000, 0.5373, 0.0000]), tensor([0.0000, 0.5373, 0.0000]))
    """

    name: ClassVar[str]
    dim: int

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.dim == other.dim

    def __hash__(self) -> int:
        return hash((type(self), self.dim))

    def __repr__(self) -> str:
        return f"{self.name} laws of dimension {self.dim}"

    @property
    def numbers_per_pair(self) -> int:
        """Numbers that one cell of a grid of all pairs is computed from at a time: it sets the size of its tiles."""
        return 1

    def standard(self, like: Tensor) -> Any:
        """The prior that is meant when none is given, with the dtype and device of `like`."""
        raise NotImplementedError

    def natural(self, law: Any) -> Tensor:
        """Natural parameter of a law, ``(*batch, m)``."""
        raise NotImplementedError

    def mean(self, law: Any) -> Tensor:
        """Mean parameter E[t(z)], ``(*batch, m)``: the gradient of the log-partition at the natural parameter."""
        raise NotImplementedError

    def log_partition(self, natural: Tensor) -> Tensor:
        """Phi, ``(*batch,)`` in nats. Raises ValueError where it is infinite (a precision that is not positive)."""
        raise NotImplementedError

    def law(self, natural: Tensor) -> Any:
        """The distribution with that natural parameter, batch ``natural.shape[:-1]``. ValueError if there is none."""
        raise NotImplementedError

    def pairs(self, first: Any, second: Any, prior: Any) -> Pairs:
        r"""Log evidence of all pairs, :math:`\Phi(\eta_1+\eta_2-\eta_0) - \Phi(\eta_1) - \Phi(\eta_2) + \Phi(\eta_0)`.

        It is the log of the integral of ``first * second / prior``: no cancellation where laws are narrow.

        Args:
            first: law with batch ``(..., N)``, the rows.
            second: law with batch ``(..., M)``, the columns.
            prior: law with batch ``()``.

        Returns:
            The grid ``(..., N, M)`` in nats, unevaluated.
        """
        raise NotImplementedError

    def tilted(self, rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
        r"""Grid function of :math:`\Phi(\eta_j - \nu_i) - \Phi(\eta_j)`; rows nu, columns eta and its Phi."""
        (nu,), (eta, log_partition) = rows, columns
        return self.log_partition(eta.unsqueeze(-3) - nu.unsqueeze(-2)) - log_partition.mT

    def check_views(self, name: str, law: Any, prior: Any) -> None:
        """Raise ValueError if `law` cannot be a posterior under the prior; see :class:`DiagonalNormalFamily`."""
