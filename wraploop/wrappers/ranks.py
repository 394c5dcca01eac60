"""Ranks: the shards of a batch in processes, and the moves in and out of them.

A rank's shard is part of the one graph that its process has, so the moves of `border.py` are nodes
of that graph: `go_in` and `come_out`, each the other's backward. Coming out is where processes
speak. They must all do it: so what goes in yields a token too, which what comes out depends on, and
whose derivative, a zero, makes the backward of `go_in` run on every rank, even on one whose rows
used no parameter.

A parameter that no rank used has no gradient; one that some used has the sum, on every rank. Which
were used is said with the gradients.

Where the batch is not scattered (`local_runner.py`), each rank makes a loss L_r of its own rows,
and what is meant is L = sum of w_r L_r. A derivative on rank r is one of L_r; `weigh` turns it into
one of L, to be summed over ranks. The adjoint of `weigh` leaves things as they are, and the adjoint
of that is `weigh`.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from wraploop.processes.channel import fingerprint

from .at_step import reducer_for, sum_left, taken_part
from .border import BATCHED, Move, adjoints
from .internals import is_accumulated, is_batched, is_wanted
from .rank import Rank
from .reducer import Reducer

BOUNDARY = "_GoInBackward"  # the name of the node through which parameters go in

ALL_PASS_ALL = (
    "With DistributedModel every process passes the whole batch, the same in all: do not shard the "
    "loader, draw with the same seed in every process, and leave out no step in one alone."
)
_ALIKE_ONLY = (
    "With batch='local' a loss may use gradients of parameters only alike in every process, not "
    "together with its rows. Use batch='global'."
)


class _GoIn(Function):
    """Wholes to this rank's parts of them, and a token."""

    @staticmethod
    def forward(
        ctx: Any, rank: Rank, doing: str, moves: list[Move], borrow: bool, *wholes: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.rank, ctx.doing, ctx.moves, ctx.reducer = rank, doing, moves, None
        ctx.like = [whole.detach() for whole in wholes]
        ctx.set_materialize_grads(False)
        parts = [rank.take(w, move, borrow=borrow) for w, move in zip(wholes, moves, strict=True)]
        # A part that is a view could not be written to in place, which a module's first layer may.
        parts = [
            part.detach() if move == "share" else part.clone()
            for part, move in zip(parts, moves, strict=True)
        ]
        pairs = zip(parts, wholes, strict=True)
        ctx.mark_non_differentiable(*(part for part, whole in pairs if not whole.requires_grad))
        return (torch.zeros(()), *parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rank, is_plain = ctx.rank, not torch.is_grad_enabled()
        if ctx.reducer and rank.synced and not rank.unsynced and is_plain:
            return None, None, None, None, *ctx.reducer.sum(grads[1:], rank.loss_weight)
        nodes = [node for node, _ in ctx.next_functions if node is not None]
        is_awaited = rank.until_step and not (is_plain and all(map(is_accumulated, nodes)))
        if rank.synced or is_awaited:
            parts = weigh(grads[1:], rank.loss_weight)
            parts = parts if is_awaited else _with_unsynced(ctx, parts)
            # Where no part depends on anything, as with no rows, the wholes must all the same.
            token = ctx.token()
            depends = any(part is not None and part.requires_grad for part in parts)
            tokens = [] if depends or token is None else [token]
            wholes = come_out(rank, ctx.doing, parts, adjoints(ctx.moves), ctx.like, tokens)
        else:
            wholes = weigh(grads[1:], rank.loss_weight * rank.channel.world_size)
            leaves = (getattr(node, "variable", None) for node in nodes)
            rank.unsynced.update({id(leaf): leaf for leaf in leaves if leaf is not None})
        return None, None, None, None, *wholes


def _with_unsynced(ctx: Any, parts: list[Tensor | None]) -> list[Tensor | None]:
    """`parts`, and with them what backwards without sum over the ranks have left in `.grad`."""
    rank = ctx.rank
    if not rank.unsynced or torch.is_grad_enabled():
        return parts
    found = []
    for part, (node, _) in zip(parts, ctx.next_functions, strict=True):
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in rank.unsynced and is_wanted(node):
            left = taken_part(rank, rank.unsynced.pop(id(leaf)))
            part = left if part is None else part if left is None else part + left
        found.append(part)
    others = list(rank.unsynced.values())  # which take no part in this backward: frozen since
    if others:
        rank.unsynced.clear()
        sum_left(rank, others, reducer_for(rank, others))
    return found


class _Weigh(Function):
    """Parts times a weight; its adjoint leaves them as they are, see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, weight: float, is_adjoint: bool, *parts: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.weight, ctx.is_adjoint = weight, is_adjoint
        ctx.set_materialize_grads(False)
        return tuple(p if p is None else p.detach() if is_adjoint else p * weight for p in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_Weigh.apply(ctx.weight, not ctx.is_adjoint, *grads)


def weigh(parts: Sequence[Tensor | None], weight: float) -> list[Tensor | None]:
    """Derivatives of this rank's loss, as parts of those of the whole batch's loss."""
    if weight == 1:
        return list(parts)
    if weight == 0:  # the mean of no rows is not a number
        return [None] * len(parts)
    return list(_Weigh.apply(weight, False, *parts))


class _Depend(Function):
    """Tensors as they are, made to depend on tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: int, *tokens_and_parts: Tensor) -> tuple[Tensor, ...]:
        ctx.tokens = tokens
        ctx.set_materialize_grads(False)
        parts = tokens_and_parts[tokens:]
        found = [part.detach() for part in parts]
        pairs = zip(found, parts, strict=True)
        ctx.mark_non_differentiable(*(new for new, part in pairs if not part.requires_grad))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * (1 + ctx.tokens + len(grads))
        return None, *[torch.zeros(())] * ctx.tokens, *grads


def depending(parts: list[Tensor], tokens: list[Tensor]) -> list[Tensor]:
    """`parts`, whose backward runs that of what yielded `tokens`."""
    if not tokens or not any(part.requires_grad for part in parts):
        return parts
    return list(_Depend.apply(len(tokens), *tokens, *parts))


class _ComeOut(Function):
    """This rank's parts, and the tokens of what they were made from, to wholes."""

    @staticmethod
    def forward(
        ctx: Any,
        rank: Rank,
        doing: str,
        moves: list[Move],
        wholes: list[Tensor | None],
        differentiable: list[bool],
        tokens: int,
        *tokens_and_parts: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.rank, ctx.doing, ctx.moves, ctx.tokens = rank, doing, moves, tokens
        ctx.had = [part is not None for part in tokens_and_parts[tokens:]]
        ctx.set_materialize_grads(False)
        pairs = zip(wholes, differentiable, strict=True)
        ctx.mark_non_differentiable(*(w for w, d in pairs if w is not None and not d))
        return tuple(wholes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * (6 + ctx.tokens + len(grads))
        if any(grad is not None and is_batched(grad) for grad in grads):
            raise NotImplementedError(BATCHED)
        given = {i: grad for i, grad in enumerate(grads) if grad is not None}
        facts = [fingerprint(grad) for grad in given.values()]
        is_local = ctx.rank.is_local
        what = "derivative of a gradient" if is_local else "gradient of the loss"
        ctx.rank.channel.agree(what, facts, _ALIKE_ONLY if is_local else ALL_PASS_ALL)
        _, parts = go_in(
            ctx.rank,
            ctx.doing,
            list(given.values()),
            adjoints(ctx.moves[i] for i in given),
            borrow=False,
        )
        found: list[Tensor | None] = [None] * len(grads)
        for i, part in zip(given, parts, strict=True):
            found[i] = part if ctx.had[i] else None
        return None, None, None, None, None, None, *[torch.zeros(())] * ctx.tokens, *found


def go_in(
    rank: Rank, doing: str, wholes: Sequence[Tensor], moves: Sequence[Move], *, borrow: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's parts of `wholes`, and the token that what is made of them must depend on.

    Args:
        rank: this rank's shard.
        doing: what the backward is for, in errors.
        wholes: what goes in.
        moves: for each whole, "scatter" or "share".
        borrow: whether a rank without rows takes the first row, or zeros.

    Returns:
        The tokens (none if nothing is differentiable), and the parts.
    """
    if torch.is_grad_enabled() and any(whole.requires_grad for whole in wholes):
        token, *parts = _GoIn.apply(rank, doing, list(moves), borrow, *wholes)
        token.grad_fn.token = weakref.ref(token)
        return [token], parts
    return [], [rank.take(w, move, borrow=borrow) for w, move in zip(wholes, moves, strict=True)]


def parameters_in(rank: Rank, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a replica has for `parameters`, and tokens that its outputs must depend on."""
    moves: list[Move] = ["share"] * len(parameters)
    doing = f"the gradients of the parameters, of which {_described(parameters)}"
    tokens, leaves = go_in(rank, doing, parameters, moves, borrow=False)
    for token in tokens:
        node: Any = token.grad_fn
        like = [parameter.detach() for parameter in parameters]
        node.reducer = Reducer(rank, doing, like)
    return leaves, tokens


def _described(parameters: list[Tensor]) -> str:
    """What must be alike on every rank, or gradients are other parameters' or a part of them."""
    trained = [p.requires_grad for p in parameters]
    kinds = [
        (trains, tuple(p.shape), p.dtype) for trains, p in zip(trained, parameters, strict=True)
    ]
    return (
        f"{sum(trained)} of {len(trained)} require grad (#{zlib.crc32(repr(kinds).encode()):08x})"
    )


def come_out(
    rank: Rank,
    doing: str,
    parts: Sequence[Tensor | None],
    moves: Sequence[Move],
    like: list[Tensor],
    tokens: list[Tensor],
) -> list[Tensor | None]:
    """Wholes from the ranks' `parts`; see `Rank.put_together`.

    Args:
        rank: this rank's shard.
        doing: what this is for, in errors.
        parts: this rank's parts; None counts as zeros.
        moves: for each part, "gather", "sum" or "first".
        like: for each part a tensor of its dtype and, but for the rows, its shape.
        tokens: of what the parts were made from.
    """
    wholes, differentiable = rank.put_together(doing, parts, moves, like)
    if not (torch.is_grad_enabled() and any(differentiable)):
        return wholes
    node = (rank, doing, list(moves), wholes, differentiable, len(tokens), *tokens, *parts)
    return list(_ComeOut.apply(*node))
