"""Ranks: the shards of a batch, one in each process, and the moves in and out of them.

A rank's shard is part of the one graph that its process has, so the moves of `border.py` are nodes
of that graph: `go_in` and `come_out`, each the other's backward. Coming out is where processes
speak. They must all do it: so what goes in yields a token too, which what comes out depends on, and
whose derivative, a zero, makes the backward of `go_in` run on every rank, even on one whose rows
used no parameter.

A parameter that no rank used has no gradient; one that some used has the sum, on every rank. Which
were used is said with the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .batch import split, zeros_like_rows
from .border import BATCHED, Move, adjoints, weighted_mean
from .channel import Channel, fingerprint
from .internals import is_batched
from .packing import pack, size_of, unpack, unpack_sparse
from .shard import Shard

_SMALL = 1 << 14  # bytes, up to which a sum is taken from everyone's terms in one exchange
_USED, _DIFFERENTIABLE, _SPARSE = 1, 2, 4


class Rank(Shard):
    """This process's shard of one batch.

    Args:
        channel: the way to the other processes.
        total: how many rows the batch has; for what is not batched, 0.
        name: what is run, for errors.

    Attributes:
        rows: how many rows are this rank's own.
        size: how many it runs: one, borrowed, if none is its own.
        weight: its share of all rows.
        drew: whether this rank's module drew random numbers; after coming out, whether any did.
    """

    drew = False

    def __init__(self, channel: Channel, total: int, name: str) -> None:
        self.channel = channel
        self.name = name
        self.parts = split(total, channel.world_size)
        own = self.parts[channel.rank]
        self.rows = own.stop - own.start
        self.size = max(1, self.rows)
        self.weight = self.rows / max(1, total)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' `tensor`."""
        doing = f"a statistic of the whole batch {tuple(tensor.shape)} in {self.name}"
        terms = self.channel.exchange(doing, pack(tensor))
        return _total([unpack(term, tensor.shape, tensor) for term in terms])

    def take(self, whole: Tensor, move: Move, *, borrow: bool) -> Tensor:
        """This rank's part of `whole`: its own rows ("scatter"), or all ("share").

        A rank with no rows gets one all the same, so that its graph exists: the first row if it
        may `borrow`, else a row of zeros.
        """
        if move == "share":
            return whole
        if self.rows:
            return whole.data[self.parts[self.channel.rank]]  # with a version of its own
        return whole.data[:1] if borrow else zeros_like_rows(whole, 1)

    @torch.no_grad()
    def put_together(
        self, doing: str, parts: Sequence[Tensor | None], moves: Sequence[Move], like: list[Tensor]
    ) -> tuple[list[Tensor | None], list[bool]]:
        """Whole tensors from all ranks' parts, not differentiable.

        Args:
            doing: what this is for.
            parts: this rank's; None counts as zeros.
            moves: for each part, "gather" or "sum"; "first" stays on its rank.
            like: for each part a tensor of its dtype and, but for the rows, its shape.

        Returns:
            The wholes, None where every rank's part is None; and which of them have a derivative.
        """
        apart = self._apart(moves, like)
        sent = [
            part[: self.rows] if move == "gather" else part
            for i, (part, move) in enumerate(zip(parts, moves, strict=True))
            if part is not None and i not in apart and not part.is_sparse
        ]
        own = torch.tensor([self.drew, *map(_flag, parts)], dtype=torch.uint8)
        doing = f"{doing} of {self.name}"
        received = self.channel.exchange(doing, torch.cat([own, *map(pack, sent)]))
        self.drew = any(said[0] for said in received)
        received = [said[1:] for said in received]
        flags = torch.stack([said[: len(parts)] for said in received])
        used, differentiable, sparse = (
            ((flags & bit) > 0).any(0).tolist() for bit in (_USED, _DIFFERENTIABLE, _SPARSE)
        )

        wholes: list[Tensor | None] = [
            _detached(part) if m == "first" else None for part, m in zip(parts, moves, strict=True)
        ]
        terms = [self._terms(rank, said, moves, like, apart) for rank, said in enumerate(received)]
        for i, (move, column) in enumerate(zip(moves, zip(*terms, strict=True), strict=True)):
            if sparse[i]:
                wholes[i] = self._sparse_sum(doing, parts[i], like[i])
            elif used[i] and i not in apart:
                wholes[i] = self._joined(column, move)
        sums = [i for i in apart if used[i] and not sparse[i] and moves[i] == "sum"]
        for i, total in self._sums({i: parts[i] for i in sums}, like):
            wholes[i] = total
        return wholes, differentiable

    def _joined(self, parts: Sequence[Tensor], move: Move) -> Tensor:
        if move == "gather":
            return torch.cat(list(parts))
        if move == "sum":
            return _total(parts)
        rows = [part.stop - part.start for part in self.parts]
        return weighted_mean(parts, [count / sum(rows) for count in rows])

    def _apart(self, moves: Sequence[Move], like: list[Tensor]) -> set[int]:
        """What is not sent to everyone: what stays here, and sums large enough to be reduced."""
        sums = [i for i, move in enumerate(moves) if move == "sum"]
        large = sum(size_of(like[i].shape, like[i]) for i in sums) > _SMALL
        return {i for i, move in enumerate(moves) if move == "first" or (move == "sum" and large)}

    def _terms(
        self, rank: int, said: Tensor, moves: Sequence[Move], like: list[Tensor], apart: set[int]
    ) -> list[Tensor]:
        """The parts that `rank` has sent; zeros for those that it has not."""
        terms = []
        start = len(moves)
        rows = self.parts[rank].stop - self.parts[rank].start
        for i, (move, model) in enumerate(zip(moves, like, strict=True)):
            shape = (rows, *model.shape[1:]) if move == "gather" else model.shape
            if i in apart:
                terms.append(model)
            elif said[i] & _USED and not said[i] & _SPARSE:
                end = start + size_of(shape, model)
                terms.append(unpack(said[start:end], shape, model))
                start = end
            else:
                terms.append(model.new_zeros(shape))
        return terms

    def _sparse_sum(self, doing: str, part: Tensor | None, like: Tensor) -> Tensor:
        """The sum of sparse parts, sparse."""
        nothing = torch.empty(0, dtype=torch.uint8)
        packed = self.channel.exchange(f"{doing}, sparse", nothing if part is None else pack(part))
        return _total([unpack_sparse(said, like) for said in packed if len(said)]).coalesce()

    def _sums(
        self, parts: dict[int, Tensor | None], like: list[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """The sums of large parts, all of one dtype at once."""
        kinds: dict[Any, list[int]] = {}
        for i in sorted(parts):
            kinds.setdefault((like[i].dtype, like[i].device), []).append(i)
        for indices in kinds.values():
            dense = [
                (torch.zeros_like(like[i]) if (part := parts[i]) is None else part).reshape(-1)
                for i in indices
            ]
            flat = self.channel.sum(torch.cat(dense))
            totals = flat.split([like[i].numel() for i in indices])
            yield from ((i, t.view_as(like[i])) for i, t in zip(indices, totals, strict=True))


class _GoIn(Function):
    """Wholes to this rank's parts of them, and a token."""

    @staticmethod
    def forward(
        ctx: Any, rank: Rank, doing: str, moves: list[Move], borrow: bool, *wholes: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.rank, ctx.doing, ctx.moves = rank, doing, moves
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
        moves = adjoints(ctx.moves)
        wholes = come_out(ctx.rank, ctx.doing, grads[1:], moves, ctx.like, [])
        return None, None, None, None, *wholes


BOUNDARY = "_GoInBackward"


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
        ctx.rank.channel.agree("gradient of the loss", facts)
        _, parts = go_in(
            ctx.rank,
            ctx.doing,
            list(given.values()),
            adjoints(ctx.moves[i] for i in given),
            borrow=False,
        )
        found: list[Tensor | None] = [None] * len(grads)
        for i, part in zip(given, parts, strict=True):
            found[i] = part
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
        return [token], parts
    return [], [rank.take(w, move, borrow=borrow) for w, move in zip(wholes, moves, strict=True)]


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


def _total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' terms, in the order of ranks."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _detached(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach()


def _flag(part: Tensor | None) -> int:
    if part is None:
        return 0
    flag = _USED | (_DIFFERENTIABLE if part.requires_grad else 0)
    return flag | (_SPARSE if part.is_sparse else 0)
