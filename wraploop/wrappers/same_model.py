"""One model in several processes: it begins with rank 0's values, and they stay the same.

What is set between wrapping and the first call counts as rank 0 has it. From then on ranks compare
parameters and buffers, one at each call, each in its turn: the mean of a sample, and some of its
numbers as they are, others in the next turn. (Buffers that are whole numbers, or not saved, are
left out: they may count each rank's own rows, or hold what is made of them.) At each call they
compare what their layers are. Where the ranks'
processors differ parameters come apart by rounding errors, which a shared gradient does not let
grow: they add up as a walk at random does, to the square root of the calls. Buffers are each rank's
own work, and need to agree to four digits.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from wraploop.processes.channel import Channel, sample, weighted_mean
from wraploop.processes.packing import pack, view_of

from .containers import ATOMS
from .internals import saved_buffers, stored
from .tree import Ref, Tree

_FEW = 16  # numbers of a parameter that are compared as they are
_ROUNDING = 16  # times their last digit
_SPREADS = 5  # of the walk of one last digit a call: of so many numbers some go further than one
_CLOSE = 1e-4  # of ranks' buffers


class SameModel:
    """Keeps `module` the same on all ranks.

    Args:
        module: the module.
        advice: what to do if one of them differs, for the error.
    """

    def __init__(self, module: nn.Module, advice: str) -> None:
        self._module = module
        self._advice = advice
        self._tree: Tree | None = None
        self._names: list[tuple[str, nn.Module, str]] = []
        self._layers = 0.0
        self._sizes: dict[str, float] = {}  # of the largest that each has been: errors stay
        self._calls = 0
        self._left_out: set[tuple[Ref, str]] = set()

    @property
    def has_begun(self) -> bool:
        """Whether a turn has been taken, so that all ranks have had rank 0's values."""
        return self._calls > 0

    def begin(self, channel: Channel) -> None:
        """Gives every rank rank 0's values before the first turn, should they have been set anew.

        Raises:
            ValueError: as `check_same_model`.
        """
        if self.has_begun:
            return
        sums = [zlib.crc32(view_of(pack(part))) for part in _parts(self._module)]
        text = "begin with rank 0's values"
        said = channel.gather(text, struct.pack(f"<{len(sums)}I", *sums))
        if any(each != said[0] for each in said):
            check_same_model(self._module, channel)
            broadcast(self._module, channel)

    def agree(self, channel: Channel, tree: Tree) -> None:
        """Has the next exchange compare layers, and the parameter or buffer whose turn it is.

        Args:
            channel: the way to the other ranks.
            tree: the module's.
        """
        if tree is not self._tree:
            self._tree = tree
            found = _compared(self._module)
            self._names = [each for each in found if not self.leaves_out(*each[1:])]
            self._layers = float(zlib.crc32("\n".join(_layers(self._module)).encode()))
        channel.agree("kind of layers", [self._layers], _OTHER_LAYERS, 0.0)
        if self._names:
            turn, at = divmod(self._calls, len(self._names))
            what, owner, name = self._names[at]
            off = _ROUNDING + _SPREADS * math.sqrt(self._calls)
            least = _CLOSE if name in owner._buffers else 0.0
            tensor = getattr(owner, name)  # as it is now: buffers are often set anew
            for part in [] if tensor is None else stored(tensor):
                numbers = sample(part, turn)
                mean, step = weighted_mean(numbers), 1 + len(numbers) // _FEW
                facts = [mean, *numbers[turn % step :: step].tolist()]
                size = self._sizes[what] = max(mean, self._sizes.get(what, 0.0))
                rel_tol = max(off * _last_digit(part.dtype), least)
                channel.agree(what, facts, self._advice, rel_tol, rel_tol * size)

    def leave_out(self, owner: nn.Module, name: str) -> None:
        """Has a buffer be each rank's own: a state of its rows."""
        if not self.leaves_out(owner, name):
            self._left_out.add((Ref(owner), name))
            self._tree = None

    def leaves_out(self, owner: nn.Module, name: str) -> bool:
        """Whether a buffer is each rank's own."""
        return (Ref(owner), name) in self._left_out

    def end(self) -> None:
        """Ends a turn that all ranks have taken: others' turns would never again be alike."""
        self._calls += 1


@functools.cache
def _last_digit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def check_same_model(module: nn.Module, channel: Channel, options: Sequence[str] = ()) -> None:
    """Checks that all processes have modules with the same parameters, buffers and layers.

    Args:
        module: the module.
        channel: the way to the others.
        options: what else must be the same, as the error says it.

    Raises:
        ValueError: on every rank, naming the first rank that differs from rank 0, and where.
    """
    described = "\n".join([*options, *_described(module)])
    received = channel.exchange("compare models", _bytes(described))
    texts = [bytes(text.numpy()).decode().split("\n") for text in received]
    for rank, lines in enumerate(texts):
        if lines == texts[0]:
            continue
        longest = max(len(lines), len(texts[0]))
        pairs = zip(_padded(texts[0], longest), _padded(lines, longest), strict=True)
        first, mine = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"The processes' models differ. Rank 0 has {first}, where rank {rank} has {mine}. Make "
            "the same model in every process before wrapping it."
        )


def _compared(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """What is compared, as errors name it; the module that has it, and its name there."""
    for path, _ in module.named_parameters():
        owner, _, name = path.rpartition(".")
        yield f"parameter {path!r}", module.get_submodule(owner), name
    for owner, part in module.named_modules():
        for name in saved_buffers(part):  # others are caches, of as many rows as each rank has
            if getattr(part, name).is_floating_point():
                yield f"buffer {f'{owner}.{name}' if owner else name!r}", part, name


def _layers(module: nn.Module) -> list[str]:
    """What the layers are: their classes and, of torch's own, their settings."""
    found = []
    for name, layer in module.named_modules():
        own = vars(layer).items() if type(layer).__module__.startswith("torch.nn.") else ()
        settings = ", ".join(f"{key}={value}" for key, value in own if type(value) in ATOMS)
        found.append(f"layer {name!r} {type(layer).__qualname__}({settings})")
    return found


def _described(module: nn.Module) -> list[str]:
    tensors = [("parameter", *item) for item in module.named_parameters()]
    tensors += [("buffer", *item) for item in module.named_buffers()]
    return [
        *(
            f"{kind} {name!r} {tuple(t.shape)} {t.dtype}{_described_if_sparse(t)}"
            for kind, name, t in tensors
        ),
        *_layers(module),
    ]


def _described_if_sparse(tensor: Tensor) -> str:
    if tensor.layout is torch.strided:
        return ""
    return f" ({tensor.layout}, {tensor._nnz()} elements)"


def _padded(lines: list[str], length: int) -> list[str]:
    return lines + ["nothing"] * (length - len(lines))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode() or b"\n"), dtype=torch.uint8)


@torch.no_grad()
def broadcast(module: nn.Module, channel: Channel) -> None:
    """Gives every process rank 0's parameters and buffers."""
    for part in _parts(module):
        channel.broadcast(part)


def _parts(module: nn.Module) -> list[Tensor]:
    """The dense tensors that its parameters and buffers are stored as."""
    return [part for tensor in (*module.parameters(), *module.buffers()) for part in stored(tensor)]


_OTHER_LAYERS = (
    "(Their classes, train() or eval(), or a setting such as a dropout's p.) Change layers alike "
    "in every process."
)
