"""Crossing: a map over lanes as one node of the outer autograd graph.

Whole tensors go in by their moves, become leaves of each lane's own graph, outs are computed from
these by the lane's thread, and come out by their moves. The node's backward differentiates each
lane's graph with respect to its leaves, which is a map over the lanes again, with the adjoint
moves (see `border.py`):

    in    the outs' derivatives     (gather -> scatter, sum -> share),  and all that went in before
    out   the leaves' derivatives   (scatter -> gather, share -> sum)

Under `create_graph` it is run as such a crossing, over the same leaves, so derivatives of every
order are right. Otherwise it is run at once, with a plain `backward` in each lane.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .border import BATCHED, Move, adjoints
from .internals import is_batched, is_wanted, keeps_graph, version_of
from .lanes import LaneGroup


class Crossing:
    """One map over the lanes; see the module's docstring.

    Args:
        lanes: where it runs.
        wholes: what goes in.
        moves_in: how each of `wholes` goes in.
        leaves: `leaves[lane][i]`, what `wholes[i]` is in the lane: a leaf of the lane's graph.
        outs: `outs[lane][j]`, computed from the lane's leaves.
        moves_out: how each out comes out.

    Attributes:
        watched: which wholes may not be written to before a backward, being saved for it.
        on_written: called after a backward, which may have recomputed a forward and its writes.
        on_backward: told how many seconds a backward has taken.
    """

    def __init__(
        self,
        lanes: LaneGroup,
        wholes: Sequence[Tensor],
        moves_in: Sequence[Move],
        leaves: list[list[Tensor]],
        outs: list[list[Tensor | None]],
        moves_out: Sequence[Move],
    ) -> None:
        self.lanes = lanes
        self.wholes = list(wholes)
        self.versions = [version_of(whole) for whole in wholes]
        self.moves_in = list(moves_in)
        self.leaves = leaves
        self.outs: list[list[Tensor | None]] | None = outs
        self.moves_out = list(moves_out)
        self.watched: Sequence[int] = ()
        self.on_written: Callable[[], None] | None = None
        self.on_backward: Callable[[float], None] | None = None
        self.is_shared = False  # whether another crossing's graph reaches into this one's, or back

    def come_out(self, like: list[Tensor]) -> list[Tensor | None]:
        """The outs, whole, as differentiable functions of `wholes`.

        Args:
            like: as for `LaneGroup.come_out`.
        """
        outs = self._outs(last=False)
        parts = [[None if out is None else out.detach() for out in row] for row in outs]
        wholes = self.lanes.come_out(parts, self.moves_out, like)
        differentiable = [
            any(out is not None and out.requires_grad for out in column)
            for column in zip(*outs, strict=True)
        ]
        if not any(differentiable):
            return wholes
        return list(_Node.apply(self, wholes, differentiable, *self.wholes))

    def pull_back(
        self, grads: list[Tensor | None], wanted: list[bool], keep_graph: bool
    ) -> list[Tensor | None]:
        """The derivatives with respect to the `wanted` wholes, given those of the outs."""
        self._check_versions(self.watched)
        outs = self._outs(last=not keep_graph)
        given = [j for j, grad in enumerate(grads) if grad is not None]
        cotangents = self._cotangents(grads, given)
        # Restricted only where the caller restricts: reentrant checkpoints need a plain backward.
        is_restricted = not all(wanted)

        def work(lane: int) -> list[Tensor | None]:
            leaves = self.leaves[lane]
            pairs = _differentiable(outs[lane], given, cotangents[lane])
            if pairs and any(leaf.requires_grad for leaf in leaves):
                torch.autograd.backward(
                    [out for out, _ in pairs],
                    [cotangent for _, cotangent in pairs],
                    retain_graph=keep_graph or self.is_shared,
                    inputs=_chosen(leaves, wanted) if is_restricted else None,
                )
            return [_take_grad(leaf) for leaf in leaves]

        random_state = torch.get_rng_state()
        with self.lanes.turn():  # leaves are those of other calls too
            try:
                parts = self.lanes.run(work)
            except BaseException:
                for leaf in chain.from_iterable(self.leaves):
                    leaf.grad = None
                raise
        torch.set_rng_state(random_state)  # which checkpoints set and reset, lane beside lane
        if self.on_written:
            self.on_written()
        return self.lanes.come_out(parts, adjoints(self.moves_in), self.leaves[0])

    def pull_back_differentiably(
        self, grads: list[Tensor | None], wanted: list[bool]
    ) -> list[Tensor | None]:
        """As `pull_back`, as differentiable functions of `grads` and of `wholes`."""
        self._check_versions(range(len(self.wholes)))
        self.is_shared = True
        outs = self._outs(last=False)
        given = [j for j, grad in enumerate(grads) if grad is not None]
        asked = [i for i, is_wanted in enumerate(wanted) if is_wanted]
        cotangents = self._cotangents(grads, given)

        def work(lane: int) -> list[Tensor | None]:
            leaves = self.leaves[lane]
            pairs = _differentiable(outs[lane], given, cotangents[lane])
            into = [i for i in asked if leaves[i].requires_grad]
            found: dict[int, Tensor | None] = dict.fromkeys(asked)
            if pairs and into:
                derivatives = torch.autograd.grad(
                    [out for out, _ in pairs],
                    [leaves[i] for i in into],
                    [cotangent for _, cotangent in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
                found.update(zip(into, derivatives, strict=True))
            return list(found.values())

        adjoint = Crossing(
            self.lanes,
            [*(grad for grad in grads if grad is not None), *self.wholes],
            [*adjoints(self.moves_out[j] for j in given), *self.moves_in],
            [[*c, *leaves] for c, leaves in zip(cotangents, self.leaves, strict=True)],
            self.lanes.run(work),
            adjoints(self.moves_in[i] for i in asked),
        )
        adjoint.is_shared = True  # its graph reaches into this one's
        derivatives: list[Tensor | None] = [None] * len(wanted)
        for i, whole in zip(
            asked, adjoint.come_out([self.leaves[0][i] for i in asked]), strict=True
        ):
            derivatives[i] = whole
        return derivatives

    def _outs(self, last: bool) -> list[list[Tensor | None]]:
        """The outs, which are let go of if this is the last time that they are needed."""
        if self.outs is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time, or directly access saved "
                "tensors after they have already been freed. Specify retain_graph=True if you need "
                "to backward through the graph a second time."
            )
        outs = self.outs
        if last:
            self.outs = None
        return outs

    def _cotangents(self, grads: list[Tensor | None], given: list[int]) -> list[list[Tensor]]:
        """For each lane its part of the given derivatives, as leaves of its graph."""
        wholes = [grad for j in given if (grad := grads[j]) is not None]
        moves = adjoints(self.moves_out[j] for j in given)
        return [
            [
                self.lanes.go_in(whole, move, lane).requires_grad_(whole.requires_grad)
                for whole, move in zip(wholes, moves, strict=True)
            ]
            for lane in range(len(self.leaves))
        ]

    def _check_versions(self, watched: Iterable[int]) -> None:
        for i in watched:
            whole, expected = self.wholes[i], self.versions[i]
            if version_of(whole) != expected:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {tuple(whole.shape)} that went into a "
                    f"wrapped module is at version {version_of(whole)}; expected version {expected}"
                )


class _Node(Function):
    """The node of a crossing in the outer graph."""

    @staticmethod
    def forward(
        ctx: Any,
        crossing: Crossing,
        wholes: list[Tensor | None],
        differentiable: list[bool],
        *_: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.crossing = crossing
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(w for w, d in zip(wholes, differentiable, strict=True) if w is not None and not d)
        )
        return tuple(wholes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(ctx.next_functions))
        if any(grad is not None and is_batched(grad) for grad in grads):
            raise NotImplementedError(BATCHED)
        wanted = [is_wanted(node) for node, _ in ctx.next_functions]
        if torch.is_grad_enabled():
            found = ctx.crossing.pull_back_differentiably(list(grads), wanted)
        else:
            begun_s = time.perf_counter()
            found = ctx.crossing.pull_back(list(grads), wanted, keeps_graph())
            if ctx.crossing.on_backward:
                ctx.crossing.on_backward(time.perf_counter() - begun_s)
        return None, None, None, *found


def _differentiable(
    outs: list[Tensor | None], given: list[int], cotangents: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The given outs that have a graph, each with its derivative."""
    pairs = ((outs[j], cotangent) for j, cotangent in zip(given, cotangents, strict=True))
    return [(out, c) for out, c in pairs if out is not None and out.requires_grad]


def _chosen(leaves: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    chosen = [leaf for leaf, is_wanted in zip(leaves, wanted, strict=True) if is_wanted]
    return [leaf for leaf in chosen if leaf.requires_grad]


def _take_grad(leaf: Tensor) -> Tensor | None:
    grad, leaf.grad = leaf.grad, None
    return grad
