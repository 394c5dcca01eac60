"""Running a call on rows that are this process's own, and stay so: its loss is a loss of them.

    rank 0    rows 0..3 ── model ── loss 0 ── backward ──┐
    rank 1    rows 4..6 ── model ── loss 1 ── backward ──┴── w_0 g_0 + w_1 g_1

If every loss is a mean over its rows, the mean over all rows is the sum of w_r times loss r, where
w_r is the rank's share of all rows; if losses are sums, every w_r is 1. Parameters go in as they do
where the batch is scattered, with the weight at that border: see `ranks.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from operator import and_, or_
from typing import Literal

import torch
from torch import Tensor, nn

from wraploop.processes.channel import Channel, fingerprint

from .at_step import AtStep, ReduceAt
from .axes import signature
from .batch import Nest, is_shared, tensors_of, zeros_like_rows
from .border import Move
from .call import Call
from .change import Change
from .internals import compiling
from .noise import RandomFingerprint
from .outputs import Ran
from .rank import Rank
from .ranks import BOUNDARY, depending, parameters_in
from .recent import keep
from .replicas import Replicas
from .same_model import SameModel
from .shard import running
from .tree import Place, Ref, Spot, Tree, current_tree, mark_rows, rows_axis, tensors_on

_MOST_SPLITS = 4
_TOLD = struct.Struct("<Qddd")  # rows, fingerprints of the batch and of the random state, drew?
_FEW_NUMBERS, _FEW_INDICES = 4, 64  # of which two processes may have the same by chance
_GRAPH, _ROWS, _OTHER_SHAPE, _FEATURES = 1, 2, 4, 8  # what is so of a buffer that is set
_SET = struct.Struct("<Bd")  # that, and a number that equal values share

Reduction = Literal["mean", "sum"]


class LocalRunner:
    """Runs calls of `module` on this process's rows, and keeps what that needs between calls.

    Args:
        module: the module.
        sync_batchnorm: whether its batch norms use the statistics of the whole batch.
        channel: the way to the other processes.
        reduction: whether losses are means over rows, or sums.
        reduce_dtype: what gradients are sent as; None is as they are.
        reduce_at: when they are brought together.
    """

    def __init__(
        self,
        module: nn.Module,
        sync_batchnorm: bool,
        channel: Channel,
        reduction: Reduction,
        reduce_dtype: torch.dtype | None,
        reduce_at: ReduceAt,
    ) -> None:
        self.module = module
        self._synced = reduce_at == "backward"
        self._reduce_dtype = reduce_dtype
        self._sync_batchnorm = sync_batchnorm
        self.channel = channel
        self._reduction = reduction
        self._name = type(module).__name__
        at_step = reduce_at == "step"
        self._at_step = AtStep(channel, self._name, reduce_dtype) if at_step else None
        self._unsynced: dict[int, Tensor] = self._at_step.left if self._at_step else {}
        self._replicas: dict[tuple[tuple[int, ...], bool] | None, Replicas] = {}
        self._random = RandomFingerprint()
        self._same = SameModel(module, _DIVERGED)
        self._rows: dict[Spot, int] = {}
        self._unclear: set[Place] = set()  # attributes that may be states, or statistics
        self._tree: Tree | None = None
        self._has_buffers = False
        self._sizes: set[int] = set()  # of the axes of parameters

    def run(self, call: Call, rows: int | None) -> Nest:
        """Makes `call` on this rank's `rows` rows; None if nothing in it has rows."""
        name = f"{self._name}.{call.method}"
        tree = self._current_tree()
        meets = self._meets(call, tree)
        counts = [1 if rows is None else rows] * self.channel.world_size
        if meets:
            counts = self._counts(call, name, rows, tree)
        own = counts[self.channel.rank]
        weight = own / max(1, sum(counts)) if self._reduction == "mean" else float(own > 0)
        rank = Rank(
            self.channel,
            counts,
            name,
            loss_weight=weight,
            is_local=True,
            synced=self._synced,
            unsynced=self._unsynced,
            until_step=self._at_step is not None,
            reduce_dtype=self._reduce_dtype,
        )
        try:
            return self._run(call, rank, meets, tree)
        except BaseException as error:
            self._replicas.clear()
            if meets:
                rank.tell(error, f"{rank.rows} rows")
            raise

    def _current_tree(self) -> Tree:
        tree = current_tree(self._tree, self.module, self._rows)
        if tree is not self._tree:
            self._tree = tree
            self._has_buffers = any(True for _ in self.module.buffers())
            self._sizes = set(chain.from_iterable(p.shape for p in tree.parameters))
        return tree

    def _run(self, call: Call, rank: Rank, meets: bool, tree: Tree) -> Nest:
        _, (replica,) = self._replicas_for(rank, meets).get([None], tree)
        for holder in tree.holders if self._rows else []:  # for a wrapper inside
            for name, path, tensor in tensors_on(holder):
                if (axis := self._rows.get((Ref(holder), name, path))) is not None:
                    mark_rows(tensor, axis)
        with running(rank if meets else None), compiling(tree.is_compiled):
            inputs = [_some_rows(x) for x in call.inputs]
            output, edits = call.on_shard(replica.module, inputs)
        ran = Ran(output, replica.changes(), {}, [], edits)
        tensors = tensors_of(ran.nest)
        replica.boundary = BOUNDARY
        replica.check_outs(tensors)
        wholes: list[Tensor | None] = [*depending(tensors, [*replica.tokens])]
        if rank.rows == 0:
            wholes = [None if x is None else x[:0] if x.ndim and len(x) == 1 else x for x in wholes]
        _keep_marks(tensors, wholes)
        if meets:  # else what it sets stays this rank's own
            self._leave_states_out(rank, ran, call)
            self._average_buffers(rank, ran, wholes)
        output, _ = ran.whole(call, replica, wholes, rank.size)
        replica.settle()
        return output

    def _meets(self, call: Call, tree: Tree) -> bool:
        """Whether all processes must make `call`: to begin alike, to learn, or share statistics."""
        begins = bool(tree.parameters) and not self._same.has_begun
        if self.module.training and (self._has_buffers or begins):
            return True
        used = chain(tree.parameters, call.inputs)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in used)

    def _counts(self, call: Call, name: str, rows: int | None, tree: Tree) -> list[int]:
        """How many rows each rank has.

        Raises:
            ValueError: the processes pass the same batch, or draw the same numbers.
            PeerError: they do different things, or their parameters differ.
        """
        self._same.begin(self.channel)
        self._same.agree(self.channel, tree)
        drew = self._random.has_changed()
        own = 1 if rows is None else rows, _fingerprint_of_batch(call.inputs), self._random.now
        mode = "training" if self.module.training else "evaluation, not under torch.no_grad()"
        accumulating = "" if self._synced else ", no_sync"
        doing = f"run {name} ({mode}{accumulating})"
        said = self.channel.gather(doing, _TOLD.pack(*own, drew))
        self._same.end()
        told = [*map(_TOLD.unpack, said)]
        counts, batches, randoms, drawn = zip(*told, strict=True)
        full = [rank for rank, count in enumerate(counts) if count]  # the same on every rank
        if len(full) > 1 and len({batches[rank] for rank in full}) == 1:
            raise ValueError(_SAME_BATCH.format(counts[full[0]], name))
        if all(drawn) and len(set(randoms)) == 1:
            raise ValueError(_SAME_NOISE.format(name))
        return list(counts)

    def _replicas_for(self, rank: Rank, meets: bool) -> Replicas:
        key = (tuple(rank.counts), rank.synced) if meets else None
        replicas = self._replicas.get(key)
        if replicas is None:
            replicas = Replicas(
                self.module,
                self._sync_batchnorm,
                lambda parameters, _: parameters_in(rank, parameters),
                alone=True,
                observes=False,
                rows=self._rows,
            )
        keep(self._replicas, key, replicas, _MOST_SPLITS)
        return replicas

    def _leave_states_out(self, rank: Rank, ran: Ran, call: Call) -> None:
        """Has buffers that hold a state of a rank's own rows be each rank's own.

        One that is set to what has a graph is that, and one that gets its shape from the rows: on
        all ranks, since on some a statistic may have as many numbers as there are rows.

        Raises:
            ValueError: all ranks have as many rows as there are features.
        """
        for place, change in ran.changes.items():
            if not change.is_buffer:
                self._leave_attribute_out(place, change, rank.size, call)
        found = [
            (holder.of, name, change.value, change.kept_shape)
            for (holder, name), change in ran.changes.items()
            if change.is_buffer and not change.is_in_place and isinstance(change.value, Tensor)
            if change.value.is_floating_point() and not self._same.leaves_out(holder.of, name)
        ]
        if not found:
            return
        own, is_size = b"", self._has_features(rank.size, call)
        for _, _, value, kept_shape in found:
            bits = _GRAPH * value.requires_grad | _ROWS * (rank.size in value.shape)
            bits |= _OTHER_SHAPE * (not kept_shape) | _FEATURES * is_size
            own += _SET.pack(bits, fingerprint(value))
        names = [name for _, name, *_ in found]
        doing = f"look at the buffers {names} of {rank.name}"
        said = rank.channel.gather(doing, own)
        columns = zip(*map(_SET.iter_unpack, said), strict=True)
        for (owner, name, *_), column in zip(found, columns, strict=True):
            bits, values = zip(*column, strict=True)
            some, every = reduce(or_, bits), reduce(and_, bits)
            has_rows = every & _ROWS and some & _OTHER_SHAPE
            if len({*values}) == 1:  # a table
                has_rows = 0
            is_clear = not some & _FEATURES or len({*rank.counts}) > 1
            if has_rows and not (is_clear or some & _GRAPH):
                where = f"the buffer {name!r} of {type(owner).__name__}"
                raise ValueError(_UNCLEAR.format(where, rank.rows, _NO_BUFFER))
            if has_rows or some & _GRAPH:
                self._same.leave_out(owner, name)

    def _leave_attribute_out(self, place: Place, change: Change, rows: int, call: Call) -> None:
        """The same for an attribute: a later call may write to it in place."""
        owner, name = place[0].of, place[1]
        for i, leaf in enumerate(tensors_of(change.value)):
            if self._same.leaves_out(owner, name):
                return
            if i in change.into and place in self._unclear:
                where = f"{name!r} of {type(owner).__name__}"
                raise ValueError(_UNCLEAR.format(where, rows, _SET_ANEW))
            if i not in change.into and rows in leaf.shape:
                if self._has_features(rows, call):
                    self._unclear.add(place)
                else:
                    self._same.leave_out(owner, name)

    def _has_features(self, count: int, call: Call) -> bool:
        """Whether an axis of a parameter, or of an input but for its rows, has so many numbers."""
        return count in self._sizes or any(count in tensor.shape[1:] for tensor in call.inputs)

    def _average_buffers(self, rank: Rank, ran: Ran, wholes: list[Tensor | None]) -> None:
        """Puts in `wholes` the mean over ranks of buffers, and of what is written to in place."""
        at = len(tensors_of(ran.output))
        places, values, names = [], [], []
        for (holder, name), change in ran.changes.items():
            is_own = self._same.leaves_out(holder.of, name)
            for i, leaf in enumerate(tensors_of(change.value)):
                is_shared = (change.is_buffer or i in change.into) and not is_own
                if is_shared and not change.is_agreed and leaf.is_floating_point():
                    places.append(at)
                    names.append(name)
                    values.append(leaf.detach())
                at += 1
        if values:
            moves: list[Move] = ["mean"] * len(values)
            means, _ = rank.put_together(f"the buffers {names}", values, moves, values)
            for place, mean in zip(places, means, strict=True):
                wholes[place] = mean

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Has gradients stay each rank's own in the block."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before


def _some_rows(tensor: Tensor) -> Tensor:
    """`tensor`, with a row of zeros if it has none, so that the module has something to run."""
    if is_shared(tensor) or tensor.size(0):
        return tensor
    return torch.cat([tensor, zeros_like_rows(tensor, 1)])


def _keep_marks(tensors: list[Tensor], wholes: list[Tensor | None]) -> None:
    """Has what stands for `tensors` be marked as these are, by a wrapper inside."""
    for tensor, whole in zip(tensors, wholes, strict=True):
        axis = rows_axis(tensor)
        if axis is not None and whole is not None:
            mark_rows(whole, axis)


def _fingerprint_of_batch(inputs: list[Tensor]) -> float:
    """A number that processes share if they pass the same batch; NaN if all might by chance."""
    fewest = {x: _FEW_NUMBERS if x.is_floating_point() else _FEW_INDICES for x in inputs}
    dense = [x for x in inputs if x.layout is torch.strided and not (is_shared(x) or x.is_nested)]
    telling = [x for x in dense if x.numel() >= fewest[x]]
    known = [number for number in map(signature, telling) if not math.isnan(number)]
    return sum(known) if known else math.nan


_DIVERGED = (
    "It was set, loaded or updated on one process alone (a step more, another learning rate), or "
    "set after the first call from numbers that each process draws for itself, or updated "
    "otherwise: by a gradient that was not brought together (of a use through `wrapper.module`, or "
    "in the loss), or as a process's own loss had it (a scheduler, a line search, `.grad` read "
    "before the step with reduce_at='step')."
)

_UNCLEAR = (
    "The forward gives {} a shape in which {} is both the number of rows and a number of features, "
    "so that it may be a state of those rows or a statistic of the whole batch. Give a statistic "
    "its shape before the first call, and {}."
)
_NO_BUFFER = "keep a state in an attribute that is no buffer"
_SET_ANEW = "set a state anew, rather than write to it"

_SAME_BATCH = (
    "Every process has passed the same {} rows to {}. With batch='local' each passes rows of its "
    "own: iterate `wraploop.shard(loader)`, or use batch='global', where each passes all. If they "
    "are drawn at random: making a DistributedModel with batch='global' after this one has put the "
    "random states in step again; make this one last."
)

_SAME_NOISE = (
    "Every process has drawn the same random numbers before {}. With batch='local' each needs its "
    "own. Making a DistributedModel with batch='local' gives it those, and making one with "
    "batch='global' takes them away: make this one last and do not seed after that, or seed each "
    "process with a number of its own."
)
