"""Runs somebody's trained model or guide without leaving a trace in their process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import StateDict, normalize_param_name
from pyro.util import get_rng_state, set_rng_state
from torch import nn

from pyro_contrastive.diagnostics._arrays import derived_seed

__all__ = ["evaluation", "modules_of"]


def modules_of(*programs: Callable[..., object]) -> list[nn.Module]:
    """Finds the modules that Pyro programs run: the program itself, or those its function refers to.

    A plain function is searched through its closure and the globals it names, a bound method through its object as
    well; functions found there are searched in turn when they come from the same file.

    Args:
        programs: Modules, plain functions or bound methods.

    Returns:
        The distinct modules, in the order found.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    queue: list[object] = list(programs)
    while queue:
        item = queue.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        elif inspect.ismethod(item):
            owner = item.__self__
            queue += [item.__func__, owner, *getattr(owner, "__dict__", {}).values()]
        elif isinstance(item, functools.partial):
            queue += [item.func, *item.args, *item.keywords.values()]
        elif inspect.isfunction(item):
            closure = inspect.getclosurevars(item)
            queue += [
                value
                for value in [*closure.nonlocals.values(), *closure.globals.values()]
                if isinstance(value, nn.Module) or getattr(value, "__module__", None) == item.__module__
            ]
    return list(found.values())


@contextmanager
def evaluation(*programs: Callable[..., object], seed: int | None = None) -> Iterator[torch.device]:
    """Evaluates trained programs: no gradients, eval mode, own random stream, untouched parameter store.

    Inside the block every module of the programs is in eval mode. Modules use their own parameters, however they were
    trained, even when Pyro's store holds those of another model under the same names; `pyro.param` statements read the
    store as usual. (Parameters that were only loaded into the store reach a module when it is next called: call it
    once before.) On leaving, the modes of all submodules, the random states (torch on every device, NumPy, Python) and
    the parameter store are what they were.

    Args:
        programs: The model and guide (modules, functions, bound methods).
        seed: Seed of the random stream inside; None goes on from the caller's current state, without advancing it.

    Yields:
        The device of the first parameter found (CPU when there is none).
    """
    modules = modules_of(*programs)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    modes = {module: module.training for top in modules for module in top.modules()}
    store = pyro.get_param_store()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    random_state = get_rng_state()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(store.scope(_own_state(modules)))
        try:
            for module in modules:
                module.eval()
            if seed is not None:
                pyro.set_rng_seed(derived_seed(seed, "evaluation"))
            yield parameters[0].device if parameters else torch.device("cpu")
        finally:
            for module, training in modes.items():
                module.training = training
            set_rng_state(random_state)


def _own_state(modules: list[nn.Module]) -> StateDict:
    """State of Pyro's store without entries that would overwrite the modules' parameters by those of a namesake."""
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    names = {
        ".".join(part for part in (getattr(module, "_pyro_name", ""), name.removesuffix("_unconstrained")) if part)
        for module in modules
        if isinstance(module, PyroModule)
        for name, _ in module.named_parameters()
    }
    state = pyro.get_param_store().get_state()
    foreign = [
        name for name, value in state["params"].items() if id(value) not in own and normalize_param_name(name) in names
    ]
    for name in foreign:
        del state["params"][name], state["constraints"][name]
    return state
