"""Running a call on lanes: scatter, run, gather."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from .axes import Axes
from .batch import Nest, is_shared, shared, split
from .border import Move
from .call import Call
from .crossing import Crossing
from .internals import depends_on, version_of
from .lanes import LaneGroup, Lanes
from .noise import Noise
from .observers import Keepsakes
from .outputs import Ran, alike, carried_moves, carried_parts, move_in, written_to
from .probe import Expected, Probe, explained
from .replica import Replica
from .replicas import Replicas, alias
from .threads import Threads
from .tree import Place
from .tuning import Split, Tuner


class LaneRunner:
    """Runs calls of `module` on lanes, and keeps what that needs from call to call.

    Args:
        module: the module.
        sync_batchnorm: whether its batch norms use the statistics of the whole batch.
    """

    def __init__(self, module: nn.Module, sync_batchnorm: bool) -> None:
        self.module = module
        self._replicas = Replicas(module, sync_batchnorm, _aliases, alone=False, observes=True)
        self._probe = Probe(module) if sync_batchnorm else None
        self._sync_batchnorm = sync_batchnorm
        self._threads = Threads()
        self._busy = threading.Lock()
        self._beside: LaneRunner | None = None
        self._calls: Counter[tuple[str, bool]] = Counter()
        self._draws: defaultdict[tuple[str, bool], bool] = defaultdict(lambda: True)
        self._learned: dict[Place, list[int | None]] = {}  # see `Axes`
        self._tuners: dict[tuple[str, bool, bool], Tuner] = {}

    def tuner(self, call: Call, cores: int) -> Tuner:
        """What looks for the fastest way to use so many cores, for calls like `call`."""
        kind = (call.method, self.module.training, torch.is_grad_enabled())
        if kind not in self._tuners:
            self._tuners[kind] = Tuner(cores)
        return self._tuners[kind]

    def runs_plainly(self, module: nn.Module, method: str) -> bool:
        """Whether torch alone is fastest for calls of `module`'s `method`, as things are now."""
        tuner = self._tuners.get((method, module.training, torch.is_grad_enabled()))
        return tuner is not None and tuner.chosen == tuner.plain and module is self.module

    def run(self, call: Call, rows: int, lanes: Lanes, tuner: Tuner | None = None) -> Nest:
        """Makes `call`, whose batch has `rows` rows, with a lane for each of `lanes.devices`."""
        if not self._busy.acquire(blocking=False):  # replicas are for one call at a time
            if self._beside is None:
                self._beside = LaneRunner(self.module, self._sync_batchnorm)
            self._probe = self._beside._probe = None  # they would see what other threads write
            return self._beside.run(call, rows, lanes, tuner)
        try:
            return self._run_timed(call, rows, lanes, tuner)
        finally:
            self._busy.release()

    def _run_timed(self, call: Call, rows: int, lanes: Lanes, tuner: Tuner | None) -> Nest:
        count = len(lanes.devices)
        parts = split(rows, count)
        expected = self._probe.expect(call, parts) if count > 1 and self._probe else None
        group = LaneGroup(parts, lanes, self._threads)
        if tuner is None or tuner.chosen:
            return self._run(call, lanes, group, expected, None)
        used = Split(count, lanes.operator_threads or 0)

        def note(part: str, seconds: float) -> None:
            # Torch alone will be spared what one lane costs
            tuner.note(part, used, group.took_s if used == tuner.plain else seconds)

        begun_s = time.perf_counter()
        output = self._run(call, lanes, group, expected, partial(note, "backward"))
        note("forward", time.perf_counter() - begun_s)
        return output

    def _run(
        self,
        call: Call,
        lanes: Lanes,
        group: LaneGroup,
        expected: Expected | None,
        on_backward: Callable[[float], None] | None,
    ) -> Nest:
        with group.turn():  # no other thread's backward is under way
            tree, replicas = self._replicas.get(lanes.devices)

        # Scatter: the call's inputs, and what earlier calls have left in attributes
        inputs = [*call.inputs, *tree.carried.values()]
        moves: list[Move] = [move_in(x) for x in call.inputs]
        total = sum(group.sizes)
        moves += carried_moves(tree, replicas[0].rows, total)
        leaves = [
            [_leaf(group.go_in(x, move, lane), x) for x, move in zip(inputs, moves, strict=True)]
            for lane in range(len(replicas))
        ]
        taken = [[_taken(leaf, x) for leaf, x in zip(mine, inputs, strict=True)] for mine in leaves]
        count = len(call.inputs)
        for lane, (replica, mine) in enumerate(zip(replicas, taken, strict=True)):
            where = sum(group.sizes[:lane]), group.sizes[lane], total
            replica.carry(carried_parts(tree, replica.rows, mine[count:], *where))

        # Run
        given = [mine[:count] for mine in taken]
        with explained(expected):
            ran = self._ran(call, group, replicas, given, tree.is_compiled)
        axes = Axes(total, self._learned)
        if expected:
            axes.learn(expected.changes, ran[0].changes, group.sizes[0])
        ran = alike(ran, given, call, group.sizes, axes)

        # Gather
        parts = [
            list(mine.coming_out(call, group.sizes[lane], group.weights[lane]))
            for lane, mine in enumerate(ran)
        ]
        outs = [[tensor for tensor, _ in mine] for mine in parts]
        for replica, mine in zip(replicas, outs, strict=True):
            replica.check_outs(mine)
        kept = [
            i
            for i in range(len(inputs))
            if i < count or any(depends_on(outs[n], leaves[n][i]) for n in range(len(outs)))
        ]
        shares: list[Move] = ["share"] * len(tree.parameters)
        crossing = Crossing(
            group,
            [*(inputs[i] for i in kept), *tree.parameters],
            [*(moves[i] for i in kept), *shares],
            [
                [*(mine[i] for i in kept), *replica.leaves]
                for mine, replica in zip(leaves, replicas, strict=True)
            ],
            [[*mine] for mine in outs],
            [move for _, move in parts[0]],
        )
        crossing.watched = [i for i in range(count) if i not in ran[0].inputs]
        crossing.on_backward = on_backward
        crossing.on_written = replicas[0].hand_back_recomputed
        wholes = crossing.come_out(outs[0])
        output, edits = ran[0].whole(call, replicas[0], wholes, group.sizes[0])
        for replica in replicas:
            replica.settle()
        if expected and self._probe:
            expected.check(call, output, edits, ran[0])
        return output

    def _ran(
        self,
        call: Call,
        group: LaneGroup,
        replicas: list[Replica],
        taken: list[list[Tensor]],
        is_compiled: bool,
    ) -> list[Ran]:
        """What `call` leaves in each lane, with the inputs `taken`."""
        state = (call.method, self.module.training)
        self._calls[state] += 1
        looks = self._calls[state].bit_count() == 1  # as what is drawn may depend on the data
        watches = (looks or self._draws[state]) and not is_compiled
        noise = Noise(len(replicas), looks) if watches else None

        def work(lane: int) -> Ran:
            inputs, replica = taken[lane], replicas[lane]
            before = [version_of(tensor) for tensor in inputs]
            with noise.lane(lane) if noise else nullcontext():
                output, edits = call.on_shard(replica.module, inputs)
            written = written_to(inputs, before, call.inputs)
            return Ran(output, replica.changes(), written, replica.take_observed(), edits)

        random_state = torch.get_rng_state()
        hooks = [hook for replica in replicas for hook in replica.hooks]
        keepsakes = Keepsakes(hooks, replicas[0].tables)
        try:
            ran = group.run(work)
        except BaseException:
            self._replicas.forget()
            raise
        finally:
            keepsakes.restore()
        if noise:
            noise.end()
            self._draws[state] = noise.drawn
        elif not torch.equal(random_state, torch.get_rng_state()):
            if is_compiled:
                raise NotImplementedError(_COMPILED)
            self._draws[state] = True
        written = {p for mine in ran for p, change in mine.changes.items() if change.is_in_place}
        if not written:
            return ran
        return [
            mine._replace(changes={**replica.as_it_is(written - {*mine.changes}), **mine.changes})
            for mine, replica in zip(ran, replicas, strict=True)
        ]


_COMPILED = (
    "A compiled module draws random numbers (dropout) in lanes, which depend on chance. Compile "
    "what draws nothing, or use DistributedModel."
)


def _aliases(
    parameters: list[Tensor], device: torch.device | None
) -> tuple[list[Tensor], list[Tensor]]:
    return [alias(parameter, device) for parameter in parameters], []


def _leaf(part: Tensor, whole: Tensor) -> Tensor:
    """`part`, as a leaf of a lane's graph if `whole` takes part in the outer graph."""
    return part.requires_grad_(whole.requires_grad and torch.is_grad_enabled())


def _taken(leaf: Tensor, whole: Tensor) -> Tensor:
    """What the module takes for `leaf`: it may write to it in place, which nobody may to a leaf."""
    taken = leaf.clone() if leaf.requires_grad else leaf
    return shared(taken) if is_shared(whole) else taken
