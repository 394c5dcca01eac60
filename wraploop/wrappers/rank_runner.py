"""Running a call on this process's shard: scatter, run, gather."""

from __future__ import annotations

import zlib
from itertools import chain, islice

import torch
from torch import Tensor, nn

from wraploop.processes.channel import Channel, fingerprint
from wraploop.processes.packing import pack, unpack

from .at_step import AtStep, ReduceAt
from .axes import Axes, axes_agreed, signature
from .batch import Nest, leaves_of, shared, split
from .border import Move
from .call import Call
from .change import Change
from .forms import check_alike, check_left, layout, plain_values
from .internals import compiling, depends_on, version_of
from .noise import move_on, own_noise
from .observers import Keepsakes, Observation
from .outputs import PUT, Ran, carried_moves, carried_parts, move_in, written_to
from .probe import Probe, explained
from .rank import Rank
from .ranks import ALL_PASS_ALL, BOUNDARY, come_out, go_in, parameters_in
from .replicas import Replicas
from .same_model import SameModel
from .shard import running
from .tree import Place


class RankRunner:
    """Runs calls of `module` on this process's shard, and keeps what that needs between calls.

    Args:
        module: the module.
        sync_batchnorm: whether its batch norms use the statistics of the whole batch.
        channel: the way to the other processes.
        reduce_dtype: what gradients are sent as; None is as they are.
        reduce_at: when they are brought together.
    """

    def __init__(
        self,
        module: nn.Module,
        sync_batchnorm: bool,
        channel: Channel,
        reduce_dtype: torch.dtype | None,
        reduce_at: ReduceAt,
    ) -> None:
        self.module = module
        self.channel = channel
        self._name = type(module).__name__
        self._reduce_dtype = reduce_dtype
        at_step = reduce_at == "step"
        self._at_step = AtStep(channel, self._name, reduce_dtype) if at_step else None
        self._probe = Probe(module) if sync_batchnorm else None
        self._same = SameModel(module, _DIVERGED)
        self._draws_elsewhere: dict[tuple[str, bool], bool] = {}
        self._learned: dict[Place, list[int | None]] = {}  # see `Axes`
        self._replicas = Replicas(module, sync_batchnorm, self._go_in, alone=True, observes=True)

    def run(self, call: Call, rows: int) -> Nest:
        """Makes `call`, whose batch has `rows` rows: this rank's shard of it."""
        shards = split(rows, self.channel.world_size)
        counts = [shard.stop - shard.start for shard in shards]
        rank = Rank(self.channel, counts, f"{self._name}.{call.method}")
        try:
            return self._run(call, rank, rows, shards)
        except BaseException as error:
            self._replicas.forget()
            rank.tell(error, f"{rank.rows} of {rows} rows")
            raise

    def _run(self, call: Call, rank: Rank, total: int, shards: list[slice]) -> Nest:
        self._same.begin(self.channel)
        expected = self._probe.expect(call, shards) if self._probe else None

        # Scatter: the call's inputs, and what earlier calls have left in attributes
        inputs = call.inputs
        moves: list[Move] = [move_in(x) for x in inputs]
        facts = [*map(fingerprint, inputs), *_numbers_in(call)]
        self.channel.agree("batch", facts, ALL_PASS_ALL)
        tree, (replica,) = self._replicas.get([None])
        self._same.agree(self.channel, tree)
        tokens, parts = go_in(rank, "the gradients of the inputs", inputs, moves, borrow=True)
        taken = [shared(p) if m == "share" else p for p, m in zip(parts, moves, strict=True)]
        carried_in = zip(
            tree.carried.items(), carried_moves(tree, replica.rows, total), strict=True
        )
        carried = [
            (spot, *go_in(rank, f"the gradient of {spot[1]}", [whole], [move], borrow=True))
            for (spot, whole), move in carried_in
        ]
        where = shards[self.channel.rank].start, rank.rows, total
        own_parts = [part for _, _, (part,) in carried]
        replica.carry(carried_parts(tree, replica.rows, own_parts, *where))

        # Run
        keepsakes = Keepsakes(replica.hooks, replica.tables)
        before = [version_of(part) for part in taken]
        state = (call.method, self.module.training)
        own = own_noise(self.channel.rank, elsewhere=self._draws_elsewhere.get(state, True))
        with explained(expected), running(rank), own as noise, compiling(tree.is_compiled):
            output, edits = call.on_shard(replica.module, taken)
        keepsakes.restore()
        rank.drawn_from, self._draws_elsewhere[state] = noise.drawn_from, noise.drew_elsewhere
        axes, changes = Axes(total, self._learned), replica.changes()
        if expected:
            axes.learn(expected.changes, changes, rank.rows)
        ran = Ran(
            output,
            self._agreed(changes, axes, taken, rank),
            written_to(taken, before, inputs),
            self._joined(replica.take_observed(), rank.size),
            edits,
        )
        check_alike([output], f"The output of {call.method!r}")
        check_alike([edits], PUT)

        # Gather
        out = list(ran.coming_out(call, rank.size, rank.weight))
        tensors = [tensor for tensor, _ in out]
        replica.boundary = BOUNDARY
        replica.check_outs(tensors)
        used = [t for _, ts, (part,) in carried for t in ts if depends_on(tensors, part)]
        wholes = come_out(
            rank,
            self._description(call, ran, [x for x, move in out if move != "first"]),
            tensors,
            [move for _, move in out],
            tensors,
            [*replica.tokens, *tokens, *used],
        )
        self._same.end()
        move_on(rank.drawn_from)  # on every rank
        output, edits = ran.whole(call, replica, wholes, rank.size)
        replica.settle()
        if expected:
            try:
                expected.check(call, output, edits, ran)
            except ValueError as error:
                raise ValueError(f"{error} {_OR_DIVERGED}") from error
        return output

    def _agreed(
        self, changes: dict[Place, Change], axes: Axes, taken: list[Tensor], rank: Rank
    ) -> dict[Place, Change]:
        """`changes`, with what has rows on every rank marked as such."""
        check_left(changes)
        loud = {place: c for place, c in changes.items() if not axes.is_of_all(place, c)}
        own = [axes.said(place, change, rank.size) for place, change in loud.items()]
        pairs = list(chain.from_iterable(own))
        if not pairs:
            return changes
        numbers = [*chain.from_iterable(pairs), *map(signature, taken)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        names = [f"{type(holder.of).__name__}.{name}" for holder, name in loud]
        said = self.channel.exchange(f"look at attributes {names}", pack(mine))
        if any(len(packed) != 8 * len(mine) for packed in said):
            raise ValueError("The forward has set other attributes on other processes.")
        every = [unpack(packed, mine.shape, mine).tolist() for packed in said]
        n = 2 * len(pairs)
        each = [[(int(e[i]), e[i + 1]) for i in range(0, n, 2)] for e in every]
        found = iter(axes_agreed(each, [e[n:] for e in every]))
        rows = {place: tuple(islice(found, len(o))) for place, o in zip(loud, own, strict=True)}
        return {
            place: change._replace(rows=rows.get(place, ())) for place, change in changes.items()
        }

    def _joined(self, observed: list[Observation], rows: int) -> list[Observation]:
        """`observed`, with what some rank's part does not join marked as such."""
        if not observed:
            return observed
        mine = torch.tensor([each.joins(rows) for each in observed], dtype=torch.uint8)
        said = self.channel.exchange("look at what hooks see", mine)
        if any(len(flags) != len(mine) for flags in said):
            raise ValueError("Forward hooks have seen other layers on other processes.")
        pairs = zip(observed, torch.stack(said).all(0).tolist(), strict=True)
        return [each._replace(is_apart=not joins) for each, joins in pairs]

    def _go_in(
        self, parameters: list[Tensor], _: torch.device | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the replica has for `parameters`, and tokens."""
        rank = Rank(
            self.channel,
            [0] * self.channel.world_size,
            self._name,
            synced=self._at_step is None,
            unsynced=self._at_step and self._at_step.left,
            until_step=self._at_step is not None,
            reduce_dtype=self._reduce_dtype,
        )
        return parameters_in(rank, parameters)

    def _description(self, call: Call, ran: Ran, tensors: list[Tensor]) -> str:
        """What this rank has run, to be the same on every rank."""
        mode = "training" if self.module.training else "evaluation"
        grad = "" if torch.is_grad_enabled() else ", no grad"
        shapes = [tuple(x.shape) for x in call.inputs]
        returned = [(tuple(t.shape[1:]), str(t.dtype)) for t in tensors]
        changed = [(place[1], change.value) for place, change in ran.changes.items()]
        changed += [(f"argument {i}", edit) for i, edit in ran.edits.items()]
        values = [f"{name}{at}" for name, value in changed for at in layout(value)]
        left = f", having set {values}" if values else ""
        returned_as = layout(ran.output)
        beside = f", and returned {returned_as}" if returned_as else ""
        passed = _passed(call)
        given = f" passed as {passed}" if passed else ""
        return f"the outputs {returned} ({mode}{grad}) for inputs {shapes}{given}{left}{beside}"


def _passed(call: Call) -> list[str]:
    """Where the tensors stand that are passed, and the strings; nothing if it is one tensor.

    Each rank may name a device of its own.
    """
    args, kwargs = call.arguments
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        return []
    leaves = chain(leaves_of(args), leaves_of(kwargs))
    return [
        f"{path} {leaf!r}" if isinstance(leaf, str) and not _is_device(leaf) else path
        for path, leaf in leaves
        if isinstance(leaf, (Tensor, str))
    ]


def _is_device(text: str) -> bool:
    try:
        return bool(torch.device(text))
    except RuntimeError:
        return False


def _numbers_in(call: Call) -> list[float]:
    """What is to be agreed on of the numbers and flags that are passed: floats but for rounding."""
    values = plain_values(call.arguments)
    whole = [value for value in values if isinstance(value, int) or value is None]
    facts = [value for value in values if isinstance(value, float)]
    return [float(zlib.crc32(repr(whole).encode())), *facts] if whole else facts


_DIVERGED = (
    "It was set, loaded or updated on one process alone, or from numbers that each draws for "
    "itself: change parameters and buffers alike on all."
)

_OR_DIVERGED = (
    "Or a rank has other parameters or buffers than the others: change them alike on all."
)
