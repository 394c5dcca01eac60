"""Replicas: a module tree of each lane's own, over the same parameters.

Lanes run one module at the same time, so each needs modules of its own: with its own leaf for
every parameter (an alias: same storage, its own place in autograd), its own buffers and its own
attributes.

    original             replica of lane 0         replica of lane 1
    Linear.weight ─────► alias (a leaf)            alias (a leaf)
    BatchNorm.mean ────► a copy                    a copy
    self.losses = [] ──► a copy                    a copy
    self.loss_fn ──────► the same object           the same object

Replicas are kept between calls, and made anew when the original is no longer what it was: the user
may set an attribute, add a submodule, replace or cast a parameter, call `train()`. What the forward
changes on its modules is found by `changes` and handed back to the original by `hand_back`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .batch import tensors_of
from .batchnorm import Global, GlobalBatchNorm, global_class, statistics_of
from .change import GONE, Change, without
from .commons import TOO_DEEP, Commons
from .containers import (
    Path,
    containers_at,
    containers_in,
    contents,
    items,
    leaves,
    mapped,
    put_into,
    same,
)
from .copies import Copies
from .internals import differing, is_alias, variables_behind, version_of
from .observers import Observation, Observer, is_observer
from .shard import current
from .tree import (
    EXECUTION,
    TABLES,
    Place,
    Ref,
    Spot,
    Tree,
    attributes,
    buffers_of,
    is_quiet,
    mark_rows,
    own_values,
    rows_axis,
    tensors_on,
)


class Replica:
    """A copy of the tree of `original`, with other tensors in it.

    Args:
        original: the module to copy.
        tree: what it is made of.
        leaves: what the copy has instead of each of the tree's parameters.
        buffers: what it has instead of each of the tree's buffers.
        rows: see below.
        sync: whether batch norms in the copy use the statistics of the whole batch.
        observes: whether what its forward hooks see is taken down.

    Attributes:
        module: the copy.
        observed: that.
        hooks: those that may keep what they see outside of the module.
        leaves: as given.
        tokens: what the outputs must depend on.
        rows: the spots in which forwards leave tensors with a row for each row of the batch, and
            along which axis.
        boundary: the name of the node through which outs may depend on the original's parameters.
    """

    boundary = ""
    tokens: Sequence[Tensor] = ()
    rows: dict[Spot, int]

    def __init__(
        self,
        original: nn.Module,
        tree: Tree,
        leaves: list[Tensor],
        buffers: list[Tensor],
        rows: dict[Spot, int],
        sync: bool,
        observes: bool,
    ) -> None:
        self.leaves = leaves
        self.rows = rows
        self._original = original
        self._is_checked = False
        self._is_changed = False
        self._carried: dict[Spot, tuple[Tensor, int]] = {}  # with versions
        self._put: dict[Place, list[Any]] = {}  # what that has made of attributes, as `attributes`
        self._tree = tree
        self._buffers = buffers
        self._sync = sync
        self._observes = observes
        self.observed: list[Observation] = []
        self.hooks: list[Callable[..., Any]] = []
        self.tables: list[dict[int, Any]] = []
        self._of_hooks: list[tuple[Any, Any]] = []
        self._hook_tables: list[dict[int, Any]] = []
        self._modules: list[tuple[nn.Module, nn.Module]] = []
        self._memo: dict[int, Any] = {}
        olds, news = [*tree.parameters, *tree.buffers], [*leaves, *buffers]
        self._memo.update((id(old), new) for old, new in zip(olds, news, strict=True))
        self._copies = Copies(self._memo, self._copy_module)
        self.module: nn.Module = self._copy_module(original)
        self._objects, self._containers = self._copies.objects, self._copies.containers
        self._note_containers()
        self._note_attributes()
        self._note_inside()
        self._weights: list[tuple[Any, Any]] = [  # of which a forward may replace the storage
            (parameter, copy._parameters[name])
            for module, copy in self._modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        pairs = list(zip(tree.parameters, leaves, strict=True))
        self._own_leaves = [leaf for whole, leaf in pairs if leaf.is_leaf and leaf is not whole]
        self._elsewhere = [(w, leaf) for w, leaf in pairs if leaf.device != w.device]
        self._before = self._versions()
        del self._copies  # a cycle, which would leave this replica to the garbage collector

    def _note_containers(self) -> None:
        """Notes what is in what has been copied: of the originals, and of copies too deep inside.

        The tree notices itself what changes in the modules that it knows, but for their containers.
        """
        known = set(map(Ref, self._tree.holders))
        objects = [(old, new) for old, new in self._objects if Ref(old) in known]
        self._holders = [*self._modules, *objects]
        inner = _not_of(self._modules, self._containers)
        in_tree = [(old, new) for old, new in self._modules if Ref(old) in known]
        copied = [vars(old) for old, _ in self._objects]
        copied += [vars(old) for old, _ in self._modules if Ref(old) not in known]
        copied += [old for old, _ in _not_of(in_tree, self._containers)]
        self._originals = [(container, items(container)) for container in copied]
        nested = [(type(old), new) for old, new in _not_of(self._objects, inner)]
        near = {id(old) for old, _ in (*objects, *self._of_hooks)}
        far = [(old, new) for old, new in self._objects if id(old) not in near]
        nested += [(type(old), vars(new)) for old, new in far]
        self._nested = [(kind, container, items(container)) for kind, container in nested]

    def _note_attributes(self) -> None:
        """Notes what copies have, to see what a forward sets; torch's own layers all at once."""
        made = [(old, new, attributes(new)) for old, new in self._holders]
        self._loud = [each for each in made if not is_quiet(each[1])]
        self._quiet = [each for each in made if is_quiet(each[1])]
        self._quiet_contents = [
            table.values() for _, copy, _ in self._quiet for table in (vars(copy), copy._buffers)
        ]
        self._quiet_made = [*chain.from_iterable(self._quiet_contents)]
        self._hook_counts = [*map(len, self._hook_tables)]
        copies = [copy for _, copy in self._modules]
        self._parts = [copy._modules for copy in copies if copy._modules or not is_quiet(copy)]
        self._parts_made = [part for table in self._parts for part in table.values()]

    def _note_inside(self) -> None:
        """Notes what is in containers inside those that are attributes, and their tensors."""
        self._inside: dict[Place, list[tuple[Any, list[Any]]]] = {}
        self._kept_in: dict[int, Place] = {}  # by id, a tensor that stands in a container
        for module, copy in self._holders:
            for name, value in own_values(copy).items():
                if inside := [c for c in containers_in(value) if c is not value]:
                    self._inside[Ref(module), name] = [(c, items(c)) for c in inside]
            for name, path, tensor in tensors_on(copy):
                if path:
                    self._kept_in[id(tensor)] = Ref(module), name

    def is_current(self) -> bool:
        """Whether what has been copied is what it was, here and in the original.

        Not here after a forward that has set something: by now the user may have reset it, and
        then the original is what it was.
        """
        if self._is_changed:
            return False
        return all(same(items(container), kept) for container, kept in self._originals)

    def refresh(self) -> None:
        """Takes over what changes from step to step: buffers, and values on another device.

        Raises:
            RuntimeError: a backward of the user's has run into the replica.
        """
        for leaf in self._own_leaves:
            if leaf.grad is not None:
                leaf.grad = None
                raise RuntimeError(_LEAKED)
        if self._elsewhere or self._buffers:
            with torch.inference_mode(False), torch.no_grad():
                self._take_over()

    def _take_over(self) -> None:
        for parameter, leaf in self._elsewhere:
            leaf.data.copy_(parameter)
        others = self._other_values()
        norms = [copy for _, copy in self._modules] if others else []
        uncounted = {id(part) for norm in norms for part in statistics_of(norm).values()}
        for i, copy in others.items():
            copy = copy.data if id(copy) in uncounted else copy  # as torch's batch norm writes
            copy.copy_(self._tree.buffers[i])  # alone: an earlier forward's graph may hold the copy
        self._before = self._versions()

    def _other_values(self) -> dict[int, Tensor]:
        """By number, the copies of buffers whose values are not the buffers'.

        Versions do not tell: writing by `.data`, by NumPy, or in torch's batch norm counts none.
        """
        pairs = enumerate(zip(self._buffers, self._tree.buffers, strict=True))
        copies = {i: copy for i, (copy, buffer) in pairs if not is_alias(copy, buffer)}
        buffers = [self._tree.buffers[i].to(copy.device) for i, copy in copies.items()]
        differ = differing(buffers, [*copies.values()])
        return {i: copy for (i, copy), other in zip(copies.items(), differ, strict=True) if other}

    def _copy_module(self, module: nn.Module) -> nn.Module:
        copy = object.__new__(_class_for(module, self._sync))
        self._memo[id(module)] = copy
        self._modules.append((module, copy))
        own = own_values(module)
        for name, value in module.__dict__.items():
            if name == EXECUTION:
                continue
            if name in ("_forward_hooks", "_forward_pre_hooks") and self._observes:
                copy.__dict__[name] = table = self._copy_hooks(module, value)
                self._hook_tables.append(table)
                continue
            is_own = name in own or name in TABLES
            copy.__dict__[name] = self._copies.own(value) if is_own else self._copies.of(value)
        if isinstance(copy, Global):
            copy.begin()
        return copy

    def _copy_hooks(self, module: nn.Module, hooks: dict[int, Any]) -> dict[int, Any]:
        """Forward hooks, the user's among them under observation."""
        copies = OrderedDict()
        for number, hook in hooks.items():
            before = len(self._copies.objects)
            inside = copies[number] = self._copies.of(hook)
            self._of_hooks += self._copies.objects[before:]
            if is_observer(hook, inside, self._tree.holders):
                self.hooks.append(hook)
                self.tables.append(hooks)
                copies[number] = Observer(inside, hook, module, self.observed)
        return copies

    def carry(self, parts: dict[Spot, Tensor]) -> None:
        """Puts this shard's parts of what earlier forwards have left in their spots.

        Args:
            parts: these, with their rows first.
        """
        self._carried, self._put = {}, {}
        found: dict[Place, dict[Path, Tensor]] = {}
        for spot, part in parts.items():
            module, name, path = spot
            axis = self.rows.get(spot)
            if axis is not None:
                part = part.movedim(0, axis).contiguous() if axis else part
                mark_rows(part, axis)  # for a wrapper inside
            self._carried[spot] = part, version_of(part)
            own = tuple(self._memo.get(id(key), key) for key in path)
            found.setdefault((module, name), {})[own] = part
        for (module, name), here in found.items():
            copy = self._memo[id(module.of)]
            table = buffers_of(copy) if name in buffers_of(copy) else copy.__dict__
            value = mapped(table[name], lambda path, leaf, here=here: here.get(path, leaf))
            table[name] = put_into(dict(containers_at(table[name])), value)
            self._put[module, name] = [table[name], *contents(table[name])]
        if any(path for _, _, path in parts):
            self._note_inside()

    def changes(self) -> dict[Place, Change]:
        """What the last forward has set on its modules, or written to their buffers.

        Raises:
            NotImplementedError: it has changed what cannot be handed back.
        """
        for kind, container, made in self._nested:
            if not same(items(container), made):
                raise NotImplementedError(TOO_DEEP.format(kind.__name__))
        if [*map(len, self._hook_tables)] != self._hook_counts:
            raise NotImplementedError(_MADE.format("registers or removes hooks"))
        if not same(chain.from_iterable(map(dict.values, self._parts)), self._parts_made):
            raise NotImplementedError(_MADE.format("makes, replaces or removes layers"))
        found: dict[Place, Change] = {}
        written = self._written() | {id(copy) for copy in self._other_values().values()}
        for module, copy in self._holders if written else ():
            found.update(_written_to(module, copy, written))
        carried = self._carried.values()
        written |= {id(part) for part, before in carried if version_of(part) != before}
        stirred = {place for kept, place in self._kept_in.items() if kept in written}
        stirred |= {spot[:2] for spot, (part, _) in self._carried.items() if id(part) in written}
        for place, inside in self._inside.items():
            if not all(same(items(container), kept) for container, kept in inside):
                stirred.add(place)
        watched = self._loud if self._are_quiet() else [*self._loud, *self._quiet]
        stands_for: dict[int, Any] = {}
        for module, copy, made in watched:
            now = attributes(copy)
            for name in now:
                place = Ref(module), name
                before = self._put.get(place, made.get(name))
                if before is None or place in stirred or not same(now[name], before):
                    self._is_changed = True
                    stands_for = stands_for or self._stands_for()
                    found[place] = self._changed(place, copy, before, written, stands_for)
            for name in made.keys() - now.keys():
                self._is_changed = True
                found[Ref(module), name] = Change(GONE)
        return found

    def _changed(
        self,
        place: Place,
        copy: Any,
        before: Iterable[Any] | None,
        written: set[int],
        stands_for: dict[int, Any],
    ) -> Change:
        """The change of an attribute.

        Args:
            place: the original's.
            copy: what has it here.
            before: what it was, and what that contained.
            written: the tensors that have been written to in place, by id.
            stands_for: see `_stands_for`.
        """
        _, name = place
        is_buffer = name in buffers_of(copy)
        value = buffers_of(copy)[name] if is_buffer else copy.__dict__[name]
        first = next(iter(before or ()), None)
        taken = without(
            value, lambda leaf: None if id(leaf) in written else stands_for.get(id(leaf))
        )
        pairs = zip(containers_at(taken), containers_at(value), strict=True)
        held = [(path, stands_for.get(id(container))) for (path, _), (_, container) in pairs]
        onto = {path: original for path, original in held if original is not None}
        tensors = tensors_of(taken)
        into = {
            i: stands_for[id(t)]
            for i, t in enumerate(tensors)
            if id(t) in written and not t.requires_grad
        }
        axes = {id(leaf): self._axis((*place, path)) for path, leaf in leaves(taken)}
        rows = tuple(axes.get(id(tensor)) for tensor in tensors)
        return Change(taken, first, is_buffer, rows=rows, onto=onto, into=into)

    def _axis(self, spot: Spot) -> int | None:
        """The axis along which what an earlier forward has left there counts rows, if it does."""
        return self.rows.get(spot) if spot in self._carried else None

    def _stands_for(self) -> dict[int, Any]:
        """By id, what there is of the original's for what is in the copy."""
        pairs = [*self._modules, *self._objects, *self._containers]
        pairs += zip(self._tree.parameters, self.leaves, strict=True)
        pairs += zip(self._tree.buffers, self._buffers, strict=True)
        carried = {holder for holder, _, _ in self._carried}
        there = {(h, n, p): tensor for h in carried for n, p, tensor in tensors_on(h.of)}
        pairs += [(there[spot], part) for spot, (part, _) in self._carried.items()]
        return {id(new): old for old, new in pairs}

    def commons(self) -> Commons:
        """What the copy has in common with the original, as it is now."""
        pairs = [*self._modules, *self._objects, *self._containers]
        carried = [part for part, _ in self._carried.values()]
        own = [*(new for _, new in pairs), *self.leaves, *self._buffers, *carried]
        return Commons((copy for _, copy in self._holders), own)

    def as_it_is(self, places: Iterable[Place]) -> dict[Place, Change]:
        """What is in `places` of buffers, as changes: another lane has written to its own."""
        found: dict[Place, Change] = {}
        for module, name in places:
            copy = self._memo[id(module.of)]
            value = buffers_of(copy).get(name, copy.__dict__.get(name))
            found[module, name] = Change(value, is_buffer=True, is_in_place=True)
        return found

    def _are_quiet(self) -> bool:
        """Whether nobody has set anything on the modules that set nothing on themselves."""
        return same(chain.from_iterable(self._quiet_contents), self._quiet_made)

    def take_observed(self) -> list[Observation]:
        """What forward hooks have seen in the last forward."""
        observed = list(self.observed)
        self.observed.clear()
        return observed

    def hand_back(self, changes: dict[Place, Change]) -> None:
        """Sets `changes` on the original's modules."""
        for (holder, name), change in changes.items():
            module = holder.of
            value = change.handed_back()
            for path, leaf in leaves(value):
                if isinstance(leaf, Tensor) and (axis := rows_axis(leaf)) is not None:
                    self.rows[holder, name, path] = axis
            if value is GONE:
                buffers_of(module).pop(name, None)
                module.__dict__.pop(name, None)
            elif change.is_in_place:
                target = buffers_of(module).get(name, module.__dict__.get(name))
                assert isinstance(target, Tensor)
                if value.data_ptr() != target.data_ptr():
                    # As torch's batch norm writes, but where an outer replica has to see it
                    is_uncounted = name in statistics_of(module) and current() is None
                    with torch.no_grad():
                        (target.data if is_uncounted else target).copy_(value)
            elif change.is_buffer:
                module._buffers[name] = value
            else:
                object.__setattr__(module, name, put_into(change.onto, value))

    def check_outs(self, outs: Iterable[Tensor]) -> None:
        """Checks once that outs depend on no parameters but through leaves.

        Raises:
            RuntimeError: they do, so that their gradients would be lost or doubled.
        """
        if self._is_checked:
            return
        self._is_checked = True
        leaves = {id(leaf) for leaf in self.leaves}
        for variable in variables_behind(outs, self.boundary):
            if isinstance(variable, nn.Parameter) and id(variable) not in leaves:
                names = [n for n, p in self._original.named_parameters() if p is variable]
                raise RuntimeError(_BYPASSED.format(*names, f"of shape {tuple(variable.shape)}"))

    def settle(self) -> None:
        """Takes what is now in the buffers for handed back, and weights with another storage."""
        for parameter, leaf in self._weights:
            if leaf.data_ptr() != parameter.data_ptr() and leaf.device == parameter.device:
                parameter.data = leaf.data
        self._before = self._versions()

    def hand_back_recomputed(self) -> None:
        """Hands back what a forward that checkpointing repeats has written to buffers."""
        written = self._written()
        if written:
            for module, copy in self._holders:
                self.hand_back(dict(_written_to(module, copy, written)))
            self.settle()

    def _written(self) -> set[int]:
        """Which tensors have been written to in place, as their versions say."""
        pairs = zip(self._buffers, self._versions(), self._before, strict=True)
        return {id(buffer) for buffer, version, before in pairs if version != before}

    def _versions(self) -> list[int]:
        return [version_of(buffer) for buffer in self._buffers]


def _class_for(module: nn.Module, sync: bool) -> type[nn.Module]:
    """The class that a copy of `module` has."""
    cls = (sync and global_class(type(module))) or type(module)
    if not parametrize.is_parametrized(module):
        return cls
    # `parametrize.cached()` would keep one weight for all copies
    own = {name: _uncached(name, getattr(cls, name).fset) for name in module.parametrizations}  # pyright: ignore
    bases: Any = (cls,)
    return type(cls.__name__, bases, {"__module__": cls.__module__, **own})


def _uncached(name: str, setter: Any) -> property:
    return property(lambda module: module.parametrizations[name](), setter)


def _not_of(
    holders: list[tuple[Any, Any]], containers: list[tuple[Any, Any]]
) -> list[tuple[Any, Any]]:
    """Those of `containers`, originals and copies, that are in no attribute of `holders`."""
    values = [value for _, copy in holders for value in vars(copy).values()]
    own = {id(container) for value in values for container in containers_in(value)}
    return [(old, new) for old, new in containers if id(new) not in own]


def _written_to(module: Any, copy: Any, written: set[int]) -> Iterator[tuple[Place, Change]]:
    agreed = statistics_of(copy) if isinstance(copy, GlobalBatchNorm) else {}
    for name, tensor in (*buffers_of(copy).items(), *copy.__dict__.items()):
        if id(tensor) in written:
            change = Change(tensor, is_buffer=True, is_in_place=True, is_agreed=name in agreed)
            yield (Ref(module), name), change


_MADE = (
    "The forward {}, which each shard would do on a copy of its own. Do it outside of the forward; "
    "if the forward does it once, when first called, call the model once before wrapping it."
)

_LEAKED = (
    "A backward has run into the inside of a wrapped module: a tensor made by its forward was used "
    "in the loss without having been returned (through a hook or a global, say). Gradients would "
    "have been lost. Return it from forward, or keep it in an attribute of the module."
)


_BYPASSED = (
    "The module's forward reaches a parameter ({}) by a way that a copy of the module does not "
    "follow (a global, a proxy or an object without `__dict__` that holds the module, a module of "
    "TorchScript, or one in a list that is not registered), so its gradient would be wrong. Make "
    "it a parameter of a submodule (nn.ModuleList for several), and do not script it."
)
