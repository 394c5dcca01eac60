"""How a model can be trained: what wraps it, in how many processes, with how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from wraploop import DistributedModel, ThreadedCPUParallel

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plain(model: nn.Module) -> nn.Module:
    """The model itself."""
    return model


@dataclass(frozen=True)
class Way:
    """One way to train a model; it crosses to other processes by pickling.

    Args:
        name: what it is called on the command line.
        about: what it is, in a line.
        wrap: what is done to each network.
        processes: how many make a step together.
        rows: whether each process gets the "whole" batch, or its "own" rows of it.
        loop: what makes the steps: "torch", a loop by hand, or a learner with "GANTraining".
        norms: whether it is only of interest for models with batch norm.
        threads: that each process's operators may use.
        apart: whether no process reads another's memory, as on machines of their own.
        mute: whether nothing is sent, see `muting`.
    """

    name: str
    about: str
    wrap: Callable[[nn.Module], nn.Module]
    processes: int = 1
    rows: Literal["whole", "own"] = "whole"
    loop: Literal["torch", "GANTraining"] = "torch"
    norms: bool = False
    threads: int = field(default=CORES)
    apart: bool = False
    mute: bool = False


def in_threads(name: str, threads: int | Literal["auto"]) -> Way:
    """`ThreadedCPUParallel` in this process."""
    about = f"ThreadedCPUParallel(model, threads={threads!r})"
    return Way(name, about, partial(ThreadedCPUParallel, threads=threads))


def ddp(name: str, processes: int, view: bool) -> Way:
    """torch's own, with buckets of the default size."""
    wrap = partial(DistributedDataParallel, gradient_as_bucket_view=view)
    about = f"DistributedDataParallel(model, gradient_as_bucket_view={view})"
    return Way(name, about, wrap, processes, "own", threads=max(1, CORES // processes))


def distributed(
    name: str, processes: int, batch: Literal["global", "local"], sync_batchnorm: bool = True
) -> Way:
    """`DistributedModel`."""
    wrap = partial(DistributedModel, batch=batch, sync_batchnorm=sync_batchnorm)
    options = f"batch={batch!r}" + ("" if sync_batchnorm else ", sync_batchnorm=False")
    rows = "own" if batch == "local" else "whole"
    threads = max(1, CORES // processes)
    about = f"DistributedModel(model, {options})"
    return Way(name, about, wrap, processes, rows, norms=not sync_batchnorm, threads=threads)


def reduced(name: str, **options: Any) -> Way:
    """`DistributedModel` with rows of its own, and gradients brought together otherwise."""
    way = distributed(name, 2, "local")
    said = ", ".join(f"{key}={value!r}" for key, value in options.items())
    about = f"DistributedModel(model, batch='local', {said})"
    return replace(way, about=about, wrap=partial(way.wrap, **options))


def by_phase(way: Way) -> Way:
    """The same under a learner that runs `GANTraining`, rather than the tutorial's step."""
    about = f"Learner with GANTraining: {way.about}"
    return Way(
        *(f"gan-{way.name}", about, way.wrap, way.processes, way.rows),
        *("GANTraining", way.norms, way.threads),
    )


def muted(way: Way) -> Way:
    """The same way, which sends nothing: as fast as it would be if that cost nothing."""
    wrap = partial(_without_sending, way.wrap)
    about = f"{way.about}, sending nothing"
    return replace(way, name=f"{way.name}-mute", about=about, wrap=wrap, mute=True)


def _without_sending(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    wrapped = wrap(model)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, noop_hook)
    return wrapped


_WAYS = (
    Way("plain", "torch alone, all cores inside operators", plain),
    in_threads("threads", "auto"),
    in_threads("threads=2", 2),
    ddp("ddp", 2, view=False),
    ddp("ddp-view", 2, view=True),
    distributed("local", 2, "local"),
    distributed("local-own-bn", 2, "local", sync_batchnorm=False),
    distributed("global", 2, "global"),
)
_GAN_WAYS = tuple(by_phase(way) for way in _WAYS if not way.name.startswith(("ddp", "threads=2")))
_IF_ASKED = (
    *(muted(way) for way in (*_WAYS, *_GAN_WAYS) if way.processes > 1),
    reduced("local-bf16", reduce_dtype="bfloat16"),
    reduced("local-at-step", reduce_at="step"),
)
WAYS: dict[str, Way] = {way.name: way for way in (*_WAYS, *_GAN_WAYS, *_IF_ASKED)}
USUAL = [way.name for way in (*_WAYS, *_GAN_WAYS)]


def ways_of(is_gan: bool, norms: bool, names: list[str]) -> list[Way]:
    """Those of the ways that make sense for a model."""
    ways = [WAYS[name] for name in names]
    ways = [way for way in ways if norms or not way.norms]
    return [way for way in ways if is_gan or way.loop == "torch"]
