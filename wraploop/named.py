"""Models, optimizers and data by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from typing import Any, TypeAlias
from warnings import warn

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from wraploop.given import first_make
from wraploop.phases import Phase, checked_phase, no_loss_fn, standard_phases
from wraploop.running import Batches

Models: TypeAlias = nn.Module | Mapping[str, nn.Module]
OptimizerLike: TypeAlias = Optimizer | Callable[[list[nn.Parameter]], Optimizer]
Optimizers: TypeAlias = OptimizerLike | Mapping[str, OptimizerLike]


class Named(Mapping[str, Any]):
    """Things of one kind by name: `models.critic` is `models["critic"]`.

    Raises:
        ValueError: a name that cannot be an attribute, or is one already.
        AttributeError: asked for, or given, a name that there is not.
        TypeError: called, as if it were the only thing of its kind.

    Examples:
        >>> rates = Named("rate", {"generator": 1e-4, "critic": 4e-4})
        >>> rates.critic, rates["generator"], list(rates)
        (0.0004, 0.0001, ['generator', 'critic'])
    """

    def __init__(self, kind: str, things: Mapping[str, Any]) -> None:
        for name in things:
            if not str(name).isidentifier() or name.startswith("_") or hasattr(Named, name):
                raise ValueError(f"Cannot name a {kind} {name!r}: choose another identifier.")
        vars(self).update(things, _kind=kind, _names=tuple(things))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name if name.startswith("_") else self._unknown(name))

    def __setattr__(self, name: str, thing: Any) -> None:
        if name not in self._names:
            raise AttributeError(self._unknown(name))
        vars(self)[name] = thing

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(self._unknown(name))
        return vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses to be taken for one of its members."""
        raise TypeError(
            f"There are several {self._kind}s, {', '.join(self)}: name the one to call, "
            f"as in `learner.{self._kind}.{self._names[0]}(...)`, in a phase of your own."
        )

    def __repr__(self) -> str:
        return f"Named({self._kind!r}, {dict(self)})"

    def _unknown(self, name: str) -> str:
        return f"There is no {self._kind} {name!r}; there are {', '.join(self)}."


def by_name(things: Any, alone: str) -> dict[str, Any]:
    """The things by name; one that is alone is called `alone`."""
    return dict(things) if isinstance(things, Named) else {alone: things}


def loss_fn(given: Any) -> Callable[..., Any]:
    """The loss function; without one, what says so when it is called.

    Raises:
        TypeError: it cannot be called, or is the class of one.
    """
    if given is None:
        return no_loss_fn
    if isinstance(given, type) or not callable(given):
        raise TypeError(f"Expected a loss function, and got {given!r}.{first_make(given)}")
    return given


def models(model: Models) -> nn.Module | Named:
    """The one model, or several by name.

    Raises:
        TypeError: one is not a module.
        ValueError: there are none, or one has an impossible name.
    """
    several = isinstance(model, (Mapping, nn.ModuleDict))
    found = Named("model", dict(model.items())) if several else model
    for name, each in by_name(found, "model").items():
        if not isinstance(each, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module as {name!r}, and got {each!r}.")
    if isinstance(found, Named) and not found:
        raise ValueError("Expected a model, or models by name, and got none.")
    return found


def plain_key(key: str) -> str:
    """A parameter's key without what `torch.compile` puts into it."""
    return key.replace("_orig_mod.", "")


def params(model: nn.Module | Named) -> Any:
    """The parameters of the one model, or of each by name."""
    lists = {name: list(each.parameters()) for name, each in by_name(model, "model").items()}
    return Named("model", lists) if isinstance(model, Named) else lists["model"]


def optimizers(model: nn.Module | Named, optimizer: Optimizers | None) -> Optimizer | Named | None:
    """The one optimizer, or one for each model that has one, by name; factories are called.

    Raises:
        TypeError: something is neither an optimizer nor a factory of one.
        ValueError: an unknown name, a model without parameters, or an optimizer without its.
    """
    if optimizer is None:  # to evaluate needs none
        return None
    params = {name: list(each.parameters()) for name, each in by_name(model, "model").items()}
    if isinstance(optimizer, Optimizer) or not isinstance(model, Named):
        return _optimizer(
            " or ".join(params), [p for each in params.values() for p in each], optimizer
        )
    given = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(params, optimizer)
    unknown = [name for name in given if name not in params]
    if unknown:
        raise ValueError(f"Optimizers for {unknown}, but the models are {list(params)}.")
    return Named("optimizer", {name: _optimizer(name, params[name], given[name]) for name in given})


def _optimizer(name: str, params: list[nn.Parameter], given: Any) -> Optimizer:
    if not params:
        raise ValueError(f"Nothing to optimize: {name} has no parameters. Give it no optimizer.")
    optimizer = given(params) if callable(given) and not isinstance(given, Optimizer) else given
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected for {name} an optimizer or a factory of one, as is "
            f"`functools.partial(torch.optim.Adam, lr=1e-3)`, and got {optimizer!r}. "
            "A mapping of optimizers goes with a mapping of models."
        )
    if not _holds_any(optimizer, params):
        raise ValueError(_HOLDS_NONE.format(type(optimizer).__name__, name))
    return optimizer


def check_held(model: nn.Module | Named, optimizer: Any) -> None:
    """Checks that optimizers still are those of the models: others may have been put in place.

    Raises:
        ValueError: that of a model, or the one of all, holds none of the parameters; or there is
            none.
    """
    if optimizer is None:
        raise ValueError(NO_OPTIMIZER)
    models, given = by_name(model, "model"), by_name(optimizer, "model")
    for name, one in given.items():
        its = [models[name]] if name in models else models.values() if len(given) == 1 else []
        params = (p for each in its for p in each.parameters())  # of which one is enough
        first = next(params, None)
        if first is None or not hasattr(one, "param_groups"):
            continue
        if not _holds_any(one, chain([first], params)):
            raise ValueError(_HOLDS_NONE.format(type(one).__name__, name))


def _holds_any(optimizer: Any, params: Iterable[nn.Parameter]) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in held for p in params)


NO_OPTIMIZER = (
    "The learner has no optimizer to train with: give one, or a factory of one, to "
    "Learner(optimizer=...). Without, it can evaluate."
)

_HOLDS_NONE = (
    "The {} given for {} holds none of its parameters. Make it from the parameters of the model "
    "that the learner gets, or give a factory."
)


def data(data: Batches | Mapping[str, Batches] | None) -> dict[str, Batches]:
    """Batches by name: a tuple is `(training, validation)`, one iterable is for training.

    Raises:
        TypeError: some are not iterable, or a dataset, which has no batches.
        ValueError: a tuple of another length.
    """
    if isinstance(data, tuple):
        if len(data) not in (1, 2):
            raise ValueError(
                f"A tuple of data is (training, validation), and got {len(data)} items. "
                "Give batches themselves as a list, other kinds of data by name, in a mapping."
            )
        data = dict(zip(("training", "validation"), data, strict=False))
    elif not isinstance(data, Mapping):
        data = {} if data is None else {"training": data}
    for name, batches in data.items():
        if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
            raise TypeError(f"Expected batches as {name} data, an iterable, and got {batches!r}.")
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise TypeError(
                f"Expected batches as {name} data, and got {batches!r}, which has samples: give "
                "DataLoader(dataset, batch_size=...), or batch_size=None if each item is a batch."
            )
    return dict(data)


def planned(
    phases: Iterable[Phase | tuple[Phase, Batches]], data: Mapping[str, Batches]
) -> list[tuple[Phase, Batches]]:
    """Phases with the batches that they run over; the standard ones if there are none.

    Raises:
        TypeError: `phases` is one phase, not a list.
    """
    kind = phases if isinstance(phases, type) else type(phases)
    if issubclass(kind, (Phase, str)) or not isinstance(phases, Iterable):
        write = f": write [{kind.__name__}()]" if issubclass(kind, Phase) else ""
        raise TypeError(f"Expected a list of phases, and got {phases!r}{write}.")
    pairs = [p if isinstance(p, tuple) else (p, batches(p, data)) for p in phases]
    if pairs:
        return [(checked_phase(phase), over) for phase, over in pairs]
    phases = standard_phases(data)
    unused = data.keys() - {phase.data for phase in phases}
    for name in unused if "validation" not in data else ():
        if "validation".startswith(str(name).lower()):
            warn(
                f"The data {name!r} is not used: ValidationPhase runs over 'validation'. Rename "
                "it, or give the phases: `fit(epochs, [TrainingPhase(), (phase, batches)])`.",
                stacklevel=2,
            )
    return [(phase, batches(phase, data)) for phase in phases]


def batches(phase: Phase, data: Mapping[str, Batches]) -> Batches:
    """The batches that a phase runs over unless it is given others.

    Raises:
        ValueError: there are none under the name in `phase.data`.
    """
    if checked_phase(phase).data not in data:
        near = get_close_matches(phase.data, map(str, data), n=1)
        meant = f" Is one of {near[0]!r} and {phase.data!r} misspelt?" if near else ""
        raise ValueError(
            f"{phase.name} has no batches: it runs over {phase.data!r} data, and there is "
            f"{', '.join(map(repr, data)) or 'none'}.{meant} Give some to Learner(data=...) or "
            "to the call: `epoch(phase, batches)`, `fit(epochs, [(phase, batches)])`."
        )
    return data[phase.data]
