"""The base of this package's Pyro modules, which run in both of Pyro's ways to store parameters."""

from __future__ import annotations

from pyro.nn import PyroModule
from torch import nn

__all__ = ["Module", "keep_parameters_local"]


def keep_parameters_local(module: nn.Module) -> None:
    """Let modules that were built under Pyro's default run under ``module_local_params`` as well.

    Pyro creates the store of a module's context in its constructor, and only if the setting is on just then; under the
    default the store stays empty and unused.

    Args:
        module: a module, whose Pyro modules are changed in place.
    """
    for part in module.modules():
        if isinstance(part, PyroModule) and not hasattr(part._pyro_context, "param_state"):
            part._pyro_context.param_state = {"params": {}, "constraints": {}}


class Module(PyroModule):
    """A `PyroModule` that may be built in or outside ``pyro.settings.context(module_local_params=True)``.

    Example:
        >>> import pyro, torch
        >>> module = Module()
        >>> module.head = nn.Linear(2, 2)
        >>> module.forward = lambda x: module.head(x)
        >>> with pyro.settings.context(module_local_params=True):
        ...     module(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    def __init__(self) -> None:
        super().__init__()
        keep_parameters_local(self)
