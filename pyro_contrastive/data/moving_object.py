"""A video of a moving object whose dynamics are known: where it is, and where it goes, can be checked."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_contrastive.data.sphere_world import World
from pyro_contrastive.ops.random import derived_seed, seeded
from pyro_contrastive.priors import LinearDynamics

__all__ = ["MovingObject", "Video"]

_REACH = 3.0  # standard deviations of the position from the middle of a frame to its border


class Video(NamedTuple):
    """Clips of a :class:`MovingObject`.

    Attributes:
        frames: One tensor ``(N, 1, size, size)`` per time.
        position: Of the object, ``(N, T, 2)``, horizontal and vertical, in standard deviations from the middle.
        velocity: ``(N, T, 2)``, in standard deviations.
    """

    frames: tuple[Tensor, ...]
    position: Tensor
    velocity: Tensor


class MovingObject(World):
    r"""Clips of a bright blob that swings on a spring and is jostled, before a background of its own.

    Position and velocity along either axis of the image turn into one another,

    .. math::
        \begin{pmatrix} p_{t+1} \\ v_{t+1} \end{pmatrix} = \rho \begin{pmatrix} \cos\omega & \sin\omega \\
        -\sin\omega & \cos\omega \end{pmatrix} \begin{pmatrix} p_t \\ v_t \end{pmatrix} + \sqrt{1 - \rho^2}\,
        \epsilon_t, \qquad \epsilon_t \sim N(0, I),

    and are standard normal at all times. A frame shows the position only. :meth:`dynamics` gives the same law as a
    prior.

    Args:
        num_frames: T >= 2, frames per clip.
        size: Side of a frame in pixels, >= 8.
        angle: omega in radians per frame, in (0, pi).
        damping: rho, in (0, 1).
        background: Height of a smooth random texture that stays the same through a clip, >= 0; the blob has height 1.
        noise: Standard deviation of the noise of every pixel of every frame, >= 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> video = MovingObject(num_frames=4).sample(5, seed=0)
        >>> len(video.frames), video.frames[0].shape, video.velocity.shape
        (4, torch.Size([5, 1, 24, 24]), torch.Size([5, 4, 2]))
    """

    def __init__(
        self,
        num_frames: int = 8,
        *,
        size: int = 24,
        angle: float = 0.4,
        damping: float = 0.99,
        background: float = 0.05,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        if num_frames < 2 or size < 8:
            raise ValueError(f"`num_frames` must be >= 2 and `size` >= 8, got {num_frames!r} and {size!r}")
        if not 0 < angle < math.pi or not 0 < damping < 1:
            raise ValueError(f"`angle` must lie in (0, pi) and `damping` in (0, 1), got {angle!r} and {damping!r}")
        if not (0 <= background < math.inf and 0 <= noise < math.inf):
            raise ValueError(f"`background` and `noise` must be >= 0 and finite, got {background!r} and {noise!r}")
        self.num_frames = num_frames
        self.size = size
        self.damping = damping
        self.background = background
        self.noise = noise
        turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        # the state is both positions, then both velocities
        self.register_buffer("transition", torch.kron(damping * turn, torch.eye(2)))
        self.register_buffer("grid", torch.linspace(-_REACH, _REACH, size))

    transition: Tensor
    grid: Tensor

    def dynamics(self) -> LinearDynamics:
        """The law of the states, both positions and then both velocities, as a prior without parameters."""
        return LinearDynamics(
            4,
            self.num_frames,
            transition=self.transition,
            noise=math.sqrt(1 - self.damping**2),
            learn_transition=False,
            learn_noise=False,
        ).to(self.transition.device)

    @torch.no_grad()
    def sample(self, num_items: int, seed: int | None = None) -> Video:
        """Draw clips.

        Args:
            num_items: N >= 1.
            seed: Give the same seed for the same clips; the global random state is then left alone. None: draw from it.

        Raises:
            ValueError: If an argument is out of its range.
        """
        if num_items < 1:
            raise ValueError(f"`num_items` must be >= 1, got {num_items!r}")
        if seed is not None:
            with seeded(derived_seed(seed), self.grid.device):
                return self.sample(num_items)
        like = self.grid
        states = [like.new_empty(num_items, 4).normal_()]
        for _ in range(1, self.num_frames):
            kick = like.new_empty(num_items, 4).normal_()
            states.append(states[-1] @ self.transition.mT + math.sqrt(1 - self.damping**2) * kick)
        state = torch.stack(states, dim=1)
        frames = self.render(state[..., :2]) + self._texture(num_items).unsqueeze(1)
        frames = frames + self.noise * torch.empty_like(frames).normal_()
        return Video(tuple(frames.unsqueeze(2).unbind(1)), state[..., :2], state[..., 2:])

    def render(self, position: Tensor) -> Tensor:
        """Draw the blob, without background and noise.

        Args:
            position: ``(..., 2)``, horizontal and vertical.

        Returns:
            ``(..., size, size)``.
        """
        across, down = (torch.exp(-4 * (self.grid - position[..., i, None]).square()) for i in (0, 1))
        return down.unsqueeze(-1) * across.unsqueeze(-2)

    def _texture(self, num_clips: int) -> Tensor:
        coarse = self.grid.new_empty(num_clips, 1, 6, 6).normal_()
        smooth = nn.functional.interpolate(coarse, (self.size, self.size), mode="bicubic", align_corners=False)
        return self.background * smooth.squeeze(1)

    def views(self, batch: Video) -> tuple[Tensor, ...]:
        """The frames."""
        return batch.frames
