"""What a learner is at one moment: all that training needs to go on exactly from there.

models       by name, under the plain model's keys; a loss function that has a state is one too
gradients    by model, those that are there: a phase may add them up over steps
trains       by model, which parameters do; only a fit that goes on puts them back
optimizers   by name, with their kind
callbacks    by class, what their `state_dict` returns
position     where the fit is, if there was one, and its phases' states
processes    a list, by rank: the random state, and that of the data
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from wraploop import processes
from wraploop.callback import Callback
from wraploop.draws import draws_of, put_draws
from wraploop.named import plain_key

if TYPE_CHECKING:
    from wraploop.learner import Learner

State = dict[str, Any]


def state_of(learner: Learner) -> State:
    """The state of a learner; every process has to ask for it. Tensors in it are the learner's."""
    position = learner.position
    return {
        "models": {name: _plain_keys(each.state_dict()) for name, each in _modules(learner)},
        "gradients": {name: _gradients(each) for name, each in _modules(learner)},
        "unsaved_buffers": {name: _unsaved_buffers(each) for name, each in _modules(learner)},
        "trains": {name: _trains(each) for name, each in _modules(learner)},
        "optimizers": {
            name: {"kind": type(each).__name__, "state": each.state_dict()}
            for name, each in learner.optimizers.items()
        },
        "callbacks": {name: each.state_dict() for name, each in _callbacks(learner).items()},
        "position": position and position.state_dict(),
        "processes": processes.gather(
            position.draws() if position else {"now": draws_of()}, "a learner's random states"
        ),
    }


def put_state(learner: Learner, state: Mapping[str, Any]) -> None:
    """Takes over what `state_of` has returned, except where the fit is; on every process.

    Callbacks that are not in it start afresh.

    Raises:
        ValueError: no learner's state, other models or optimizers; nothing has been changed then.
        RuntimeError: weights do not fit; nothing has been changed then.
    """
    missing = {"models", "optimizers", "callbacks"} - state.keys()
    if missing:
        raise ValueError(
            f"Expected what Learner.state_dict() returns, and got no {', '.join(sorted(missing))}. "
            "The state of a model alone is loaded by learner.model.load_state_dict(state)."
        )
    _check_models(learner, state["models"])
    _check_optimizers(learner, state["optimizers"])
    for name, model in _modules(learner):
        keys = {plain_key(key): key for key in model.state_dict()}
        model.load_state_dict({keys[key]: each for key, each in state["models"][name].items()})
        _put_gradients(model, state["gradients"][name])
        _put_unsaved_buffers(model, state["unsaved_buffers"][name])
    for name, optimizer in learner.optimizers.items():
        _put_optimizer(optimizer, state["optimizers"][name]["state"])
    for name, callback in _callbacks(learner).items():
        if name in state["callbacks"]:
            # some take their state apart, as torch's CyclicLR, and a resumption puts it twice
            callback.load_state_dict(copy.deepcopy(state["callbacks"][name]))
        else:
            callback.attach(learner)
    are_alike = processes.draw_alike()
    put_draws(own_draws(state, are_alike)["now"])
    part_if_new(state, are_alike)


def put_trains(learner: Learner, state: Mapping[str, Any]) -> None:
    """Has the parameters train that trained."""
    for name, model in _modules(learner):
        for key, parameter in _plain_keys(dict(model.named_parameters())).items():
            parameter.requires_grad_(state["trains"][name][key])


def own_draws(state: Mapping[str, Any], are_alike: bool) -> State:
    """What this process drew from; rank 0 where all draw alike, or there was no such process."""
    saved, rank = state["processes"], processes.rank()
    return saved[0] if are_alike or rank >= len(saved) else saved[rank]


def part_if_new(state: Mapping[str, Any], are_alike: bool) -> None:
    """Has each process draw its own numbers, where those that were saved did otherwise.

    Args:
        state: the state.
        are_alike: whether the processes drew the same numbers before it was put, and shall.
    """
    is_new = len(state["processes"]) != processes.world_size()
    if not are_alike and (is_new or processes.draw_alike()):
        processes.part_random_states()


def _modules(learner: Learner) -> list[tuple[str, nn.Module]]:
    """The models by name, and the loss function, if it has a state."""
    loss_fn: Any = learner.loss_fn
    has_state = isinstance(loss_fn, nn.Module) and loss_fn.state_dict()
    return [*learner.models.items(), *([("loss_fn", loss_fn)] if has_state else [])]


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are in no `state_dict`."""
    saved = model.state_dict()
    return {key: each for key, each in model.named_buffers() if key not in saved}


@torch.no_grad()
def _put_unsaved_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for key, buffer in _unsaved_buffers(model).items():
        if key in saved and saved[key].shape == buffer.shape:
            buffer.copy_(saved[key])


def _trains(model: nn.Module) -> dict[str, bool]:
    named = _plain_keys(dict(model.named_parameters()))
    return {key: each.requires_grad for key, each in named.items()}


def _put_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    optimizer.load_state_dict(dict(saved))
    mine = optimizer.state_dict()["state"]
    for index, values in saved["state"].items():  # torch gives them the parameter's dtype
        for key, value in values.items() if isinstance(values, Mapping) else ():
            now = mine[index].get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and value.dtype != now.dtype:
                mine[index][key] = value.to(now.device, copy=True)


def _plain_keys(named: Mapping[str, Any]) -> State:
    return {plain_key(key): value for key, value in named.items()}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    named = _plain_keys(dict(model.named_parameters()))
    return {key: each.grad for key, each in named.items() if each.grad is not None}


def _put_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    for key, parameter in _plain_keys(dict(model.named_parameters())).items():
        saved = gradients.get(key)
        parameter.grad = None if saved is None else saved.to(parameter.device)


def _check_models(learner: Learner, saved: Mapping[str, Any]) -> None:
    mine = dict(_modules(learner))
    if saved.keys() != mine.keys():
        raise ValueError(
            f"The checkpoint is of models {', '.join(saved)}, and the learner's are "
            f"{', '.join(mine)}."
        )
    for name, model in mine.items():
        wrong = _differences(_plain_keys(model.state_dict()), saved[name])
        if wrong:
            raise RuntimeError(f"The checkpoint of {name} does not fit: {'; '.join(wrong)}.")


def _differences(mine: State, theirs: Mapping[str, Any]) -> list[str]:
    wrong = [f"it has no {key}" for key in mine if key not in theirs]
    wrong += [f"the model has no {key}" for key in theirs if key not in mine]
    for key in (key for key in mine if key in theirs and not is_lazy(mine[key])):
        shapes = [tuple(getattr(each[key], "shape", ())) for each in (theirs, mine)]
        if shapes[0] != shapes[1]:
            wrong.append(f"size mismatch for {key}: {shapes[0]}, and the model has {shapes[1]}")
    return wrong


def _check_optimizers(learner: Learner, saved: Mapping[str, Any]) -> None:
    mine = {
        name: _shape(type(o).__name__, o.state_dict()) for name, o in learner.optimizers.items()
    }
    theirs = {name: _shape(each["kind"], each["state"]) for name, each in saved.items()}
    if mine and mine != theirs:  # who has none evaluates
        raise ValueError(f"The checkpoint is of optimizers {theirs}, and the learner's are {mine}.")


def _shape(kind: str, state: Mapping[str, Any]) -> str:
    groups = [str(len(group["params"])) for group in state["param_groups"]]
    return f"{kind} of {' + '.join(groups)} parameters"


def _callbacks(learner: Learner) -> dict[str, Callback]:
    """The callbacks by class, and numbered where there are several of one."""
    found: dict[str, Callback] = {}
    counts: Counter[str] = Counter()
    for callback in learner.callbacks.listed:
        kind = type(callback.unwrapped).__name__
        counts[kind] += 1
        found[f"{kind}-{counts[kind]}" if counts[kind] > 1 else kind] = callback
    return found
