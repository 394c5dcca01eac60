"""What wrappers take from torch's private parts is still there and still means the same."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wraploop.wrappers import internals
from wraploop.wrappers.threads import Threads


class Asking(torch.autograd.Function):
    asked: dict[str, object]

    @staticmethod
    def forward(ctx, x, y):
        return x * y

    @staticmethod
    def backward(ctx, *grads):
        Asking.asked = {
            "wanted": [internals.is_wanted(node) for node, _ in ctx.next_functions],
            "kept": internals.keeps_graph(),
            "batched": internals.is_batched(grads[0]),
        }
        return grads[0], grads[0]


def ask(run):
    leaf, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    x, y = leaf * 1, other * 1
    run(Asking.apply(x, y).sum(), x, leaf)
    return Asking.asked


def test_a_backward_says_where_it_goes_and_whether_it_keeps_its_graph():
    assert ask(lambda out, x, leaf: out.backward())["wanted"] == [True, True]
    only_x = ask(lambda out, x, leaf: torch.autograd.grad(out, x))
    assert only_x == {"wanted": [True, False], "kept": False, "batched": False}
    assert ask(lambda out, x, leaf: out.backward(retain_graph=True))["kept"] is True
    assert ask(lambda out, x, leaf: out.backward())["kept"] is False


@pytest.mark.skipif(internals._saved_tensors_hooks is None, reason="torch does not say so, < 2.8")
def test_saved_tensor_hooks_are_seen():
    assert not internals.has_saved_tensors_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert internals.has_saved_tensors_hooks()
        assert internals.is_checkpointing()
    with torch.autograd.graph.saved_tensors_hooks(internals.as_it_is, internals.as_it_is):
        assert not internals.is_checkpointing()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_seen_where_torch_does_not_say(monkeypatch, reentrant):
    monkeypatch.setattr(internals, "_saved_tensors_hooks", None)
    seen = []

    def look():
        seen.append((internals.has_saved_tensors_hooks(), internals.is_checkpointing()))

    def forward(x):
        look()
        Threads().run([look, look], None)  # of which the first runs in this thread
        return x * 2

    look()
    x = torch.ones(1, requires_grad=True)
    checkpoint(forward, x, use_reentrant=reentrant)
    assert seen[:2] == [(False, False), (True, True)]
    assert sorted(seen[2:]) == [(False, False), (True, False)]


def test_modes_are_seen():
    assert internals.function_modes() == []
    with torch.device("meta"):
        assert len(internals.function_modes()) == 1


def test_transforms_are_seen():
    seen = []

    def look(x):
        seen.append(internals.is_transformed())
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [False, True, True]


def test_graphs_are_walked_to_their_leaves():
    layer = nn.Linear(2, 1)
    out = layer(torch.ones(1, 2)).tanh()
    assert internals.depends_on([out], layer.weight)
    assert not internals.depends_on([out.detach(), out * 0], torch.ones(1, requires_grad=True))
    assert set(map(id, internals.variables_behind([out], ""))) == set(map(id, layer.parameters()))
    assert not list(internals.variables_behind([out], "AddmmBackward0"))


def test_versions_count_what_is_written_in_place_but_for_inference():
    tensor = torch.ones(2)
    before = internals.version_of(tensor)
    tensor.add_(1)
    assert internals.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert internals.version_of(torch.ones(2).add_(1)) == 0


def test_sums_of_lists_are_sums():
    total = internals.foreach_add([torch.ones(2), torch.zeros(1)], [torch.ones(2), torch.ones(1)])
    assert [t.tolist() for t in total] == [[2.0, 2.0], [1.0]]


def test_torch_compile_leaves_alone_what_is_not_compiled_and_what_it_calls():
    seen = []

    def called(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    @internals.not_compiled
    def alone(x):
        return called(x)

    assert torch.compile(lambda x: alone(x * 2), backend="eager")(torch.ones(1)).item() == 3
    assert seen == [False]


def test_a_backward_says_what_goes_to_grad():
    def asked(run):
        found = []

        class Look(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, *grads):
                found.extend(internals.is_accumulated(node) for node, _ in ctx.next_functions)
                return grads[0]

        leaf = torch.ones(2, requires_grad=True)
        run(Look.apply(leaf).sum(), leaf)
        run(Look.apply(leaf * 1).sum(), leaf)
        return found

    assert asked(lambda out, leaf: out.backward()) == [True, False]
    assert asked(lambda out, leaf: torch.autograd.grad(out, leaf)) == [False, False]


def test_lists_are_copied_and_views_made_with_torchs_private_parts_and_without(monkeypatch):
    like = [torch.empty(2, 3), torch.empty(()), torch.empty(4)]
    values = [torch.randn(tensor.shape) for tensor in like]
    for is_there in (True, False):
        if not is_there:
            monkeypatch.delattr(torch, "_foreach_copy_")
            monkeypatch.delattr("torch._C._nn.unflatten_dense_tensors")
        flat = torch.zeros(11)
        internals.foreach_copy(internals.unflatten(flat, like), values)
        assert flat.equal(torch.cat([value.reshape(-1) for value in values]))


def test_tensors_that_differ_are_found_one_by_one_and_all_at_once():
    nan, inf = math.nan, math.inf
    some = [torch.tensor(x) for x in ([1.0, nan], [inf, 2.0], [1.0, 2.0], [1.0, nan], [3, 4], [])]
    others = [torch.tensor(x) for x in ([1.0, nan], [inf, 2.0], [1.0, 3.0], [nan, 1.0], [3, 5], [])]
    assert internals.differing(some, others) == [False, False, True, True, True, False]
    assert internals.same_at_once(some, others) == []  # what is surely the same
    assert internals.same_at_once(some, some) == [2]
    two, three = torch.ones(2), torch.ones(3)
    assert internals.same_at_once([two, two, three], [two, three, three.clone()]) == [0, 2]
    sparse = torch.eye(3).to_sparse()
    assert internals.differing([sparse, sparse], [sparse.clone(), 2 * sparse]) == [False, True]


def test_sums_of_a_batch_norm_are_those_of_the_formula(monkeypatch):
    x, grad = torch.randn(4, 3, 5).double() + 10, torch.randn(4, 3, 5).double()
    variance, mean = torch.var_mean(x, [0, 2], correction=0)
    n = (x - mean.view(1, 3, 1)) / (variance + 0.1).sqrt().view(1, 3, 1)
    for is_there in (True, False):
        if not is_there:
            monkeypatch.delattr("torch.ops.aten.native_batch_norm_backward")
            monkeypatch.setattr(type(torch.ops.aten), "__getattr__", lambda *_: None)
        with_n, alone = internals.batch_norm_sums(grad, x, mean, variance, 0.1)
        torch.testing.assert_close(with_n, (grad * n).sum([0, 2]))
        torch.testing.assert_close(alone, grad.sum([0, 2]))


def test_buffers_that_are_not_saved_are_known(monkeypatch):
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("cache", torch.ones(3), persistent=False)
    saved = ["running_mean", "running_var", "num_batches_tracked"]
    assert internals.saved_buffers(norm) == saved
    monkeypatch.delattr(norm, "_non_persistent_buffers_set")
    assert internals.saved_buffers(norm) == [*saved, "cache"]
