"""What torch knows and does not tell: every use of its private parts, each with what holds without.

`tests/test_internals.py` notices when one of them goes.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_C: Any = torch._C
F = TypeVar("F", bound=Callable[..., Any])


def is_wanted(node: Any) -> bool:
    """Whether the running backward goes on into `node`; always, where torch does not say.

    Args:
        node: a node of the graph; None, where there is no graph, counts as wanted.
    """
    if node is None:
        return True
    try:
        return _C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # it raises for a leaf that autograd.grad asks for
        return True


def is_accumulated(node: Any) -> bool:
    """Whether what the running backward brings to the leaf of `node`, if it does, goes to `.grad`.

    What `torch.autograd.grad` asks for does not; nor what goes on through a node that is no leaf's.
    """
    if getattr(node, "variable", None) is None:
        return False
    try:
        return _C._will_engine_execute_node(node) or True
    except RuntimeError:
        return False
    except AttributeError:
        return True


def keeps_graph() -> bool:
    """Whether the running backward keeps its graph; as if it did, where torch does not say."""
    try:
        return _C._autograd._get_current_graph_task_keep_graph()
    except AttributeError:
        return True


_saved_tensors_hooks = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)


def has_saved_tensors_hooks() -> bool:
    """Whether this thread does something to tensors saved for backward.

    Where torch does not say, before 2.8, whether it checkpoints.
    """
    if _saved_tensors_hooks is None:
        return _is_run_by(_CHECKPOINT)
    return _saved_tensors_hooks(True) is not None


def as_it_is(saved: Any) -> Any:
    """The saved-tensor hook that does nothing."""
    return saved


def is_checkpointing() -> bool:
    """Whether tensors saved in this thread are kept otherwise than `as_it_is`."""
    if _saved_tensors_hooks is None:
        return _is_run_by(_CHECKPOINT, _LANES)
    hooks = _saved_tensors_hooks(True)
    return hooks is not None and hooks[0] is not as_it_is


_CHECKPOINT = "torch.utils.checkpoint"
_LANES = f"{__package__}.threads"  # whoever runs in one has none of the calling thread's hooks


def _is_run_by(module: str, before: str = "") -> bool:
    """Whether a function of `module` runs the caller, nearer than any of the module `before`."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__")
        if name in (module, before):
            return name == module
        frame = frame.f_back
    return False


def wake_engine() -> None:
    """Has the autograd engine made, which in a forked process two threads must not do at once."""
    with torch.inference_mode(False), torch.enable_grad():
        torch.zeros((), requires_grad=True).square()  # to save a tensor asks the engine


def function_modes() -> list[TorchFunctionMode]:
    """The torch-function modes of this thread, for another to enter."""
    modes = _get_current_function_mode_stack()
    return [DeviceContext(m.device) if isinstance(m, DeviceContext) else m for m in modes]


def version_of(tensor: Tensor) -> int:
    """How often `tensor` has been written to in place; always 0 in inference mode."""
    try:
        return tensor._version
    except RuntimeError:  # not asked for first: `is_inference` lets go of the interpreter lock
        return 0


def saved_buffers(module: nn.Module) -> list[str]:
    """The names of a module's own buffers that are in its state; all, where torch does not say."""
    others = getattr(module, "_non_persistent_buffers_set", ())
    return [name for name, _ in module.named_buffers(recurse=False) if name not in others]


def stored(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that `tensor` is stored as: itself, unless it is sparse."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one device are stored as the same values, NaN among them."""
    if a.layout is not b.layout or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(
        torch.equal(x, y) or (x.is_floating_point() and torch.allclose(x, y, 0, 0, True))
        for x, y in zip(stored(a), stored(b), strict=True)
    )


def is_alias(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors have their values in one place."""
    return a.layout is b.layout is torch.strided and a.data_ptr() == b.data_ptr()


def differing(some: list[Tensor], others: list[Tensor]) -> list[bool]:
    """For each of `some` whether its values are others than those of its like in `others`.

    Those on an accelerator, which has to be waited for, are looked at together first.
    """
    away = [i for i, tensor in enumerate(some) if not tensor.is_cpu]
    same = {away[i] for i in same_at_once([some[i] for i in away], [others[i] for i in away])}
    pairs = enumerate(zip(some, others, strict=True))
    return [i not in same and not same_values(a, b) for i, (a, b) in pairs]


def same_at_once(some: list[Tensor], others: list[Tensor]) -> list[int]:
    """Which of `some` are surely the same as their like, waiting for each device once."""
    kinds: dict[Any, list[int]] = {}
    for i, (a, b) in enumerate(zip(some, others, strict=True)):
        kind = (a.device, a.dtype, a.layout)
        is_dense = a.layout is torch.strided and a.is_floating_point() and a.numel()
        if is_dense and a.shape == b.shape and kind == (b.device, b.dtype, b.layout):
            kinds.setdefault(kind, []).append(i)
    found: list[int] = []
    for indices in kinds.values():
        here, there = [some[i] for i in indices], [others[i] for i in indices]
        off = torch._foreach_norm(torch._foreach_sub(here, there), math.inf)  # pyright: ignore
        are_off = torch.stack([*off]).tolist()  # NaN where both are infinite
        found += [i for i, is_off in zip(indices, are_off, strict=True) if not is_off]
    return found


def is_batched(tensor: Tensor) -> bool:
    """Whether `tensor` is many derivatives at once (`is_grads_batched`, `vectorize`)."""
    try:
        return _C._functorch.is_legacy_batchedtensor(tensor)
    except AttributeError:
        return False


def is_traced() -> bool:
    """Whether torch.jit.trace looks at this thread."""
    return _C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Whether calls of this thread are traced or transformed (compile, torch.func, forward AD).

    What transforms a call sees this thread only, so a module has to run in it, on whole tensors.
    """
    return (
        torch.compiler.is_compiling()
        or is_traced()
        or _C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


@contextmanager
def compiling(is_compiled: bool) -> Iterator[None]:
    """A block in which the compiler may look at parameters that are no leaves without a warning."""
    if not is_compiled:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


def own_attributes() -> frozenset[str]:
    """The attributes that every `torch.nn.Module` has, such as its tables of hooks."""
    of_the_class = [name for name, value in vars(nn.Module).items() if not callable(value)]
    return frozenset([*nn.Module().__dict__, *of_the_class])


def global_hooks() -> bool:
    """Whether there are forward hooks on all modules; no, where torch does not say."""
    tables = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(getattr(nn.modules.module, table, None) for table in tables)


def not_compiled(function: F) -> F:
    """`function`, which `torch.compile` leaves alone, with all that it calls.

    As `torch.compiler.disable`, which would import the compiler, and that takes seconds.
    """
    frames: Any = getattr(getattr(_C, "_dynamo", None), "eval_frame", None)
    set_compiler = getattr(frames, "set_eval_frame", None)
    if set_compiler is None:
        return function

    def alone(*args: Any, **kwargs: Any) -> Any:
        before = set_compiler(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_compiler(before)

    alone.__name__, alone.__doc__ = function.__name__, function.__doc__
    alone._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
    if hasattr(frames, "skip_code"):  # before torch 2.7
        frames.skip_code(alone.__code__)
    elif hasattr(frames, "set_code_exec_strategy"):
        skipped = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(alone.__code__, skipped)
    return alone  # pyright: ignore[reportReturnType]


def is_compiled(module: nn.Module) -> bool:
    """Whether a part of `module` is run by `torch.compile`."""
    return any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "dynamo_ctx")
        for part in module.modules()
    )


def foreach_add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """`a[i] + b[i]` for every `i`, in few calls of the operator."""
    return list(torch._foreach_add(a, b))  # pyright: ignore[reportPrivateImportUsage]


def batch_norm_sums(
    grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """For each channel the sum of `grad` times the normalised `x`, and of `grad`, in one pass."""
    sums = getattr(torch.ops.aten, "native_batch_norm_backward", None)
    if sums is not None and x.numel():  # of nothing: it divides by 0, which ends the process
        wanted = [False, True, True]
        _, with_n, alone = sums(grad, x, None, mean, variance, None, None, False, eps, wanted)
        return with_n, alone
    axes = [axis for axis in range(x.ndim) if axis != 1]
    n = torch.nn.functional.batch_norm(x, mean, variance, None, None, False, 0.0, eps)
    return (grad * n).sum(axes), grad.sum(axes)


def foreach_copy(into: list[Tensor], values: list[Tensor]) -> None:
    """Copies each of `values` into that of `into`, in few calls of the operator."""
    copy = getattr(torch, "_foreach_copy_", None)
    if copy is not None:
        copy(into, values)
        return
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of `flat`, one after the other, of the shapes of `like`, in few calls."""
    if views := _views():
        return list(views(flat, like))
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


@functools.cache
def _views() -> Any:
    """Torch's own `unflatten`, if it is right: torch 2.6 forgets the shape of empty tensors."""
    views = getattr(_C._nn, "unflatten_dense_tensors", None)
    with torch.inference_mode(False):
        empty = torch.empty(0, 2, device="cpu")
    return views if views and views(empty.view(0), [empty])[0].shape == empty.shape else None


def depends_on(outs: Iterable[Tensor], leaf: Tensor) -> bool:
    """Whether the graph of one of `outs` reaches `leaf`, a leaf, or the node that made it."""
    return any(
        node is leaf.grad_fn or getattr(node, "variable", None) is leaf for node in _nodes(outs)
    )


def variables_behind(outs: Iterable[Tensor], boundary: str) -> Iterator[Tensor]:
    """The leaves that the graph of `outs` reaches, but for those behind nodes called `boundary`."""
    for node in _nodes(outs, boundary):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable


def _nodes(outs: Iterable[Tensor], boundary: str = "") -> Iterator[Any]:
    nodes = [out.grad_fn for out in outs if out.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        if node.name() != boundary:
            new = {n for n, _ in node.next_functions if n is not None} - seen
            seen |= new
            nodes += new
