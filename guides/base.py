"""What every recognition family shares: the encoder, one pass per view and step, and the Pyro guide."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_contrastive.encoding import Precision, encode
from pyro_contrastive.modules import Module
from pyro_contrastive.nets import feature_size

__all__ = ["INITIAL_RESULTANT_LENGTH", "RecognitionGuide"]

INITIAL_RESULTANT_LENGTH = 0.6  # of an untrained posterior, in every family: neither uniform nor a point


class _Pass:
    """Posteriors of the guide's current pass, so that the model does not encode the same views a second time.

    Encoding twice would update batch-norm statistics twice and give model and guide different dropout masks. An entry
    is valid for the very tensor that was encoded, unmodified, with the same parameters, modes and autograd state, and
    until a gradient has flowed back through it.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[weakref.ref[Tensor], int, Any]] = []
        self.stamp: Any = None

    def __deepcopy__(self, memo: dict) -> _Pass:
        return _Pass()

    def __reduce__(self) -> tuple:
        return (_Pass, ())

    def clear(self) -> None:
        self.entries = []

    @staticmethod
    def _version(tensor: Tensor) -> int:
        return 0 if tensor.is_inference() else tensor._version

    def _stamp(self, module: nn.Module) -> Any:
        parts = list(module.modules())  # one walk; `parameters()` would be another, and this runs thrice a step
        return (
            tuple(
                (id(p), p.data_ptr(), self._version(p)) for m in parts for p in m._parameters.values() if p is not None
            ),
            tuple(m.training for m in parts),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cuda"),
            torch.is_autocast_enabled("cpu"),
        )

    def begin(self, module: nn.Module) -> None:
        self.entries, self.stamp = [], self._stamp(module)

    def store(self, x: Tensor, posterior: Any, features: Tensor) -> None:
        self.entries.append((weakref.ref(x), self._version(x), posterior))
        if features.requires_grad:
            here = weakref.ref(self)

            def used(_: Tensor) -> None:  # the graph behind the entry is spent
                cache = here()
                if cache is not None:
                    cache.clear()

            features.register_hook(used)

    def find(self, x: Tensor, module: nn.Module) -> Any:
        if not self.entries:
            return None
        if self.stamp != self._stamp(module):
            self.clear()
            return None
        for i, (reference, version, posterior) in enumerate(self.entries):
            if reference() is x and version == self._version(x):
                # to the end of the queue: one tensor given for two views has two posteriors, asked for in this order
                self.entries.append(self.entries.pop(i))
                return posterior
        return None


def _without_labels(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The views among the arguments that a guide shares with its model."""
    vectors = [x for x in arguments if x.dim() == 1]
    if len(vectors) == len(arguments):
        return arguments  # one number per item is a view, too
    for x in vectors:
        if x.is_floating_point() or x.is_complex():
            raise ValueError(f"labels must be integers (N,), got {x.dtype} {tuple(x.shape)}; views have more axes")
    return tuple(x for x in arguments if x.dim() != 1)


class RecognitionGuide(Module):
    """Amortised recognition law R(z | x): an encoder, heads, and the Pyro guide that samples one latent per view.

    Subclasses build their heads in ``__init__`` and implement :meth:`_posterior`.

    Args:
        encoder: any module ``x -> (N, features)``.
        dim: d >= 2; latents live on the sphere of R^d.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise the features over the batch before the heads (`torch.nn.BatchNorm1d` without learned
            parameters). Features behind a rectifier are all positive, so without it all directions start near one
            another, and from d = 32 on a fit may never get them apart. Needs two items or more in training mode.

    Attributes:
        chunk_size: items that the encoder sees at a time, None (default) for all of a batch. The features are then
            standardised, and the loss is taken, over the whole batch, with the memory of one chunk; see
            :func:`~pyro_contrastive.encoding.encode`.
        precision: of the encoder, ``"float32"`` (default), ``"bfloat16"`` or ``"float16"``; everything behind it stays
            in float32. ``fit(..., chunk_size=..., precision=...)`` sets both for one run.

    Raises:
        TypeError: for an encoder that is not a module.
        ValueError: for ``dim`` < 2, or a width that cannot be read off or is < 1.
    """

    _least_dim: ClassVar[int] = 2
    chunk_size: int | None = None
    precision: Precision = "float32"

    def __init__(self, encoder: nn.Module, dim: int, *, features: int | None = None, batch_norm: bool = True) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"`encoder` must be a torch.nn.Module, got {type(encoder).__name__}")
        if not isinstance(dim, int) or dim < self._least_dim:
            space = "the sphere S^(dim-1) of R^dim" if self._least_dim > 1 else "latents in R^dim"
            raise ValueError(f"`dim` must be an integer >= {self._least_dim} ({space}), got {dim!r}")
        self.encoder = encoder
        self.dim = dim
        if features is None:
            features = feature_size(encoder)
        elif not isinstance(features, int) or features < 1:
            raise ValueError(f"`features` must be an integer >= 1, the width of the encoder's output, got {features!r}")
        self.features = features
        self.batch_norm = nn.BatchNorm1d(features, affine=False) if batch_norm else None
        self._pass = _Pass()

    def _posterior(self, features: Tensor) -> Any:
        """The recognition law for encoder features ``(N, features)``; whatever it returns is kept for the pass."""
        raise NotImplementedError

    def _encode(self, x: Tensor) -> Tensor:
        features = encode(self.encoder, x, chunk_size=self.chunk_size, precision=self.precision)
        if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[-1] != self.features:
            if not isinstance(features, Tensor):
                got, way_out = type(features).__name__, "wrap it in a module that returns the features only"
            elif features.dim() == 2:
                got, way_out = str(tuple(features.shape)), f"pass features={features.shape[-1]} to the guide"
            else:
                got, way_out = str(tuple(features.shape)), "pool or flatten all but the leading axis at its end"
            raise ValueError(f"the encoder must return a tensor of shape (N, {self.features}), got {got}; {way_out}")
        return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features

    def _recognise(self, features: Tensor) -> Any:
        """The recognition law, its heads in full precision: only the encoder runs under ``torch.autocast``."""
        with torch.autocast(features.device.type, enabled=False):
            if self.batch_norm is not None:
                if self.training and len(features) == 1:
                    raise ValueError(
                        "standardising features over the batch needs at least 2, got 1; use a larger batch to train, "
                        "guide.eval() to recognise single items, or build the guide with batch_norm=False"
                    )
                features = self.batch_norm(features)
            return self._posterior(features)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Posterior over the latent of every input.

        Args:
            x: ``(N, ...)``, whatever the encoder takes.

        Returns:
            A distribution with batch shape ``(N,)`` and event shape ``(dim,)``. When a model calls this during the
            same inference step as the guide, it gets the guide's own posterior and the encoder is not run again.

        Raises:
            ValueError: if the encoder returns another shape than ``(N, features)``, or NaN.
        """
        if am_i_wrapped():  # inside a Pyro handler: maybe the guide has just encoded this very tensor
            found = self._pass.find(x, self)
            if found is not None:
                return found
        return self._recognise(self._encode(x))

    def posteriors(self, *views: Tensor) -> list[TorchDistribution]:
        """Encode the views of one inference step: a model that asks for ``posterior(x)`` of one of them finds it done.

        A Pyro guide other than this module's own calls it, so that the encoder runs once per view and step there too.

        Args:
            views: tensors with one leading dimension N, paired by rows.

        Returns:
            One posterior per view, in order; see :meth:`posterior`.

        Raises:
            ValueError: without views, for empty ones or ones of different lengths, for a lazy encoder without an input.
        """
        sizes = {len(x) for x in views}
        if len(sizes) != 1:
            raise ValueError(f"views must share one leading dimension N, got {[tuple(x.shape) for x in views]}")
        if sizes == {0}:
            raise ValueError("views must hold at least one item, got none")
        encoder = self._modules["encoder"]  # the attribute would make Pyro register its parameters
        assert encoder is not None
        if any(is_lazy(p) for m in encoder.modules() for p in m._parameters.values() if p is not None):
            raise ValueError(
                "the encoder has lazy parameters that no input has shaped yet, which Pyro cannot register; "
                "call guide.posterior(x) once before training"
            )
        self._pass.begin(self)
        posteriors = []
        for x in views:
            features = self._encode(x)
            posteriors.append(self._recognise(features))
            self._pass.store(x, posteriors[-1], features)
        return posteriors

    def forward(self, *views: Tensor) -> None:
        """The Pyro guide: sites "z1", "z2", ... , one per view, in the plate "pairs".

        Args:
            views: tensors with one leading dimension N, paired by rows. A vector ``(N,)`` of integers among views with
                more axes holds labels, for the model: it is not encoded.

        Raises:
            ValueError: see :meth:`posteriors`; for a vector of other numbers among views with more axes.
        """
        views = _without_labels(views)
        posteriors = self.posteriors(*views)
        with pyro.plate("pairs", len(views[0]), dim=-1):
            for j, posterior in enumerate(posteriors, start=1):
                pyro.sample(f"z{j}", posterior)
