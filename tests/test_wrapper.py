import copy
import gc
import io
import pickle
import random
import traceback
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wraploop import DataParallel, DistributedModel, ThreadedCPUParallel, shared
from wraploop.wrappers.noise import move_on, own_noise

WRAPPERS = {
    "threads": lambda model, **options: ThreadedCPUParallel(model, 2, **options),
    "devices": lambda model, **options: DataParallel(model, ["cpu", "cpu"], **options),
    "processes": DistributedModel,
    "stack": lambda model, **options: DistributedModel(
        ThreadedCPUParallel(model, 2, **options), **options
    ),
}


@pytest.fixture(params=WRAPPERS.values(), ids=list(WRAPPERS))
def wrap(request):
    return request.param


class Net(nn.Module):
    """Two layers, an attribute, and methods of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.gain = 1.0
        self.calls = 0

    def encode(self, x):
        return self.norm(self.first(x))

    def describe(self, text):
        return text.upper()

    def forward(self, x):
        self.calls += 1
        return self.last(self.encode(x)) * self.gain


def test_a_step_leaves_nothing_to_the_garbage_collector(wrap):
    def step():
        x = torch.randn(8, 3, requires_grad=True)
        out = model(x).square().mean()
        (slopes,) = torch.autograd.grad(out, x, create_graph=True)
        (out + slopes.square().mean()).backward()

    model = wrap(Net())
    for _ in range(8):  # of which some are looked at, on copies
        step()
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            step()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_names_and_keys_are_the_modules_own_at_any_depth(wrap):
    net = Net()
    wrapped = wrap(copy.deepcopy(net))
    outer, outer_wrapped = nn.Sequential(net), nn.Sequential(wrapped)

    assert list(wrapped.state_dict()) == list(net.state_dict())
    assert list(outer_wrapped.state_dict()) == list(outer.state_dict())
    assert [n for n, _ in wrapped.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert [n for n, _ in outer_wrapped.named_buffers()] == [n for n, _ in outer.named_buffers()]
    assert dict(wrapped.named_modules())["norm"] is wrapped.module.get_submodule("norm")


def test_a_state_loads_from_and_into_a_plain_module_at_any_depth(wrap):
    net, wrapped = Net(), wrap(Net())
    wrapped.load_state_dict(net.state_dict())
    torch.testing.assert_close(dict(wrapped.state_dict()), dict(net.state_dict()))

    outer = nn.Sequential(wrap(Net()))
    outer.load_state_dict(nn.Sequential(net).state_dict())
    torch.testing.assert_close(dict(outer[0].state_dict()), dict(net.state_dict()))
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapped.load_state_dict({})


def test_parameters_are_the_modules_own_objects(wrap):
    net = Net()
    wrapped = wrap(net)
    assert list(map(id, wrapped.parameters())) == list(map(id, net.parameters()))


def test_attributes_are_read_and_set_on_the_module(wrap):
    net = Net()
    wrapped = wrap(net)
    x = torch.randn(4, 3)
    assert wrapped.gain == 1.0
    assert wrapped.first is net.first
    before = wrapped(x)
    wrapped.gain = 2.0
    assert net.gain == 2.0
    torch.testing.assert_close(wrapped(x), 2 * before)
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing


def test_attributes_that_forward_sets_are_set_on_the_module(wrap):
    wrapped = wrap(Net())
    for _ in range(3):
        wrapped(torch.randn(5, 3))
    assert wrapped.calls == 3


def test_a_named_method_runs_like_forward_and_an_unnamed_one_refuses_tensors(wrap):
    net = Net().eval()
    x = torch.randn(5, 3)
    named, unnamed = wrap(net, methods=("encode",)), wrap(net)
    torch.testing.assert_close(named.encode(x), net.encode(x))
    assert unnamed.describe("a") == "A"
    with pytest.raises(TypeError, match=r"methods=\('encode',\)"):
        unnamed.encode(x)


def test_naming_a_method_that_is_not_there_is_refused(wrap):
    with pytest.raises(ValueError, match="no method 'decode'"):
        wrap(Net(), methods=("decode",))
    with pytest.raises(TypeError, match=r"wraps a torch.nn.Module"):
        wrap(lambda x: x)


def test_copies_are_independent_and_compute_the_same(wrap):
    wrapped = wrap(Net()).eval()
    x = torch.randn(5, 3)
    expected = wrapped(x)
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    copies = [
        copy.deepcopy(wrapped),
        pickle.loads(pickle.dumps(wrapped)),
        torch.load(file, weights_only=False),
    ]
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    for one in copies:
        torch.testing.assert_close(one(x), expected)
        one(x).sum().backward()
        assert all(parameter.grad is not None for parameter in one.parameters())
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_train_eval_and_casts_reach_the_module(wrap):
    wrapped = wrap(Net())
    wrapped.eval()
    assert not wrapped.module.norm.training
    assert wrapped.double()(torch.randn(4, 3).double()).dtype == torch.float64


def test_the_module_keeps_its_classes_and_forward_hooks(wrap):
    net = Net()
    wrapped = wrap(net)
    wrapped(torch.randn(4, 3))
    assert type(net.norm) is nn.BatchNorm1d
    assert net.norm.num_batches_tracked == 1


@pytest.fixture(params=["threads", "devices"])
def wrap_in_lanes(request):
    return WRAPPERS[request.param]


class Secretive:
    def __call__(self):
        pass

    def __repr__(self):
        return "Secretive()"


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.filterwarnings("ignore:.*jit.trace.*deprecated")
def test_tracing_is_refused_in_words_of_its_own(wrap):
    x = torch.randn(4, 3)
    model = wrap(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    with pytest.raises(RuntimeError, match=r"Trace wrapper.module"):
        torch.jit.trace(nn.Sequential(model), (x,))


def test_inputs_that_disagree_about_rows_are_refused(wrap_in_lanes):
    model = wrap_in_lanes(Pair())
    with pytest.raises(ValueError, match=r"\[0\]\[0\] of shape \(4, 2\) has 4.*shared\(tensor\)"):
        model(torch.ones(4, 2), torch.ones(3, 2))
    shifted = model(torch.ones(4, 2), shared(torch.ones(2)))
    assert shifted.tolist() == [[2.0, 2.0]] * 4


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: x.sum(0), ValueError, r"has shape \(3,\) where 2 rows went in"),
        (lambda x: object(), TypeError, "is a object, which cannot be put together"),
        (lambda x: x.sum().item(), ValueError, "differs between shards"),
        (lambda x: (x > 0).sum(), TypeError, "0-dimensional torch.int64"),
        (lambda x: Secretive(), ValueError, r"Secretive\(\), another object, which may hold"),
    ],
)
def test_outputs_that_cannot_be_put_together_are_refused(wrap_in_lanes, output, error, message):
    class Odd(nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(error, match=message):
        wrap_in_lanes(Odd())(torch.arange(12.0).view(4, 3))


def test_hooks_on_saving_and_loading_are_the_modules(wrap_in_lanes):
    called = []
    wrapper = wrap_in_lanes(nn.Linear(3, 2))
    wrapper.register_state_dict_post_hook(lambda *_: called.append("saved"))
    wrapper.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    wrapper.load_state_dict(wrapper.state_dict())
    assert called == ["saved", "loaded"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused(wrap_in_lanes):
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    inside = nn.Sequential(torch.jit.script(nn.ReLU()), nn.BatchNorm1d(3))
    for scripted in (torch.jit.script(plain), torch.jit.trace(plain, torch.randn(2, 3)), inside):
        with pytest.raises(TypeError, match="module of TorchScript"):
            wrap_in_lanes(scripted)(torch.randn(4, 3))


def test_a_lazy_module_is_refused_until_it_has_shapes(wrap_in_lanes):
    lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="has no shape yet"):
        wrap_in_lanes(lazy)(torch.randn(4, 3))


class Shown(dict):
    """A config that shows nested ones as its own class, made anew each time."""

    def values(self) -> Any:
        return [Shown(value) if isinstance(value, dict) else value for value in super().values()]


def test_a_container_that_makes_what_it_shows_is_not_taken_for_changed(wrap_in_lanes):
    module = nn.Linear(3, 3)
    vars(module)["config"] = Shown(inner={"a": 1})
    assert wrap_in_lanes(module)(torch.randn(4, 3)).shape == (4, 3)


def test_what_leaks_out_of_a_lane_into_the_loss_is_an_error(wrap_in_lanes):
    leaked = []

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            out = self.layer(x)
            leaked.append(out)
            return out

    model = wrap_in_lanes(Leaky())
    model(torch.randn(4, 3))
    (leaked[-1].sum() + leaked[-2].sum()).backward()
    with pytest.raises(RuntimeError, match="inside of a wrapped module"):
        model(torch.randn(4, 3))


def test_what_the_user_writes_to_a_buffer_stays_however_it_is_written(wrap):
    net = wrap(nn.BatchNorm1d(3))
    net(torch.randn(6, 3))
    net.num_batches_tracked.data.fill_(7)
    net.running_mean.detach().numpy()[:] = 5.0
    net(torch.randn(6, 3))
    assert net.num_batches_tracked == 8
    assert net.running_mean.min() > 4.0


def test_what_fails_in_shards_alone_is_explained(wrap_in_lanes):
    one_row = wrap_in_lanes(nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shapes") as raised:
        one_row(torch.ones(4))
    assert "has run without it" in "".join(traceback.format_exception(raised.value))


def test_noise_inside_is_reproducible_and_differs_between_lanes(wrap_in_lanes):
    def run():
        torch.manual_seed(0)
        model = wrap_in_lanes(nn.Dropout())
        return torch.cat([model(torch.ones(4, 64)) for _ in range(3)])

    first, second = run(), run()
    assert first.equal(second)
    assert len({tuple(row) for row in first.tolist()}) == len(first)


@pytest.mark.parametrize("draw", [lambda: torch.rand(1).item(), random.random, np.random.rand])
def test_each_rank_has_noise_of_its_own_whoever_draws_it(draw):
    drawn = []
    for rank in (0, 1, 0):
        with own_noise(rank, elsewhere=True) as noise:
            drawn.append(draw())
        assert noise.drew
    assert drawn[0] == drawn[2] != drawn[1]
    with own_noise(0, elsewhere=True) as noise:
        pass
    assert not noise.drew


@pytest.mark.parametrize("draws", [torch.rand, lambda _: random.random(), np.random.rand])
def test_only_what_a_model_draws_from_moves_on(draws):
    def numbers():
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        yield
        yield torch.rand(1).item(), random.random(), np.random.rand()

    plain, in_ranks = numbers(), numbers()
    next(plain)
    draws(1)
    expected = next(plain)
    next(in_ranks)
    with own_noise(1, elsewhere=True) as noise:
        draws(1)
        draws(1)
    move_on(noise.drawn_from)
    assert next(in_ranks) == expected


class DrawsLate(nn.Module):
    """Draws a number of Python's in its second call."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 1), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            random.random()
        return self.linear(x)


def test_lanes_refuse_numbers_of_pythons_in_later_calls_too(wrap_in_lanes):
    model = wrap_in_lanes(DrawsLate())
    model(torch.ones(4, 3))
    with pytest.raises(NotImplementedError, match="of Python or NumPy"):
        model(torch.ones(4, 3))


def test_a_model_without_noise_leaves_the_random_state_alone(wrap):
    model = wrap(Net())
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    model(torch.ones(4, 3)).sum().backward()
    assert torch.randn(3).equal(expected)


def test_lanes_around_processes_are_refused():
    inside = nn.Sequential(DistributedModel(nn.Linear(3, 1)))
    with pytest.raises(ValueError, match=r"DistributedModel in it \('0'\) in lanes"):
        ThreadedCPUParallel(inside)


def test_statistics_that_a_batch_norm_takes_outside_are_seen_by_the_next_forward(wrap):
    plain: Any = nn.BatchNorm1d(3).double()
    wrapped = wrap(copy.deepcopy(plain))
    x = 3 * torch.randn(8, 3).double() + 1
    for model in (plain, wrapped):
        model.eval()(x)
        model.train()
    plain(x)
    wrapped.module(x)
    for _ in range(3):
        torch.testing.assert_close(wrapped.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-14)
    plain.running_mean.data.add_(1.0)
    wrapped.module.running_mean.data.add_(1.0)
    torch.testing.assert_close(wrapped(x), plain(x), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_norm_of_half_precision_is_the_plain_one_but_for_rounding(dtype):
    plain: Any = nn.BatchNorm1d(3).to(dtype)
    inner: Any = copy.deepcopy(plain)
    wrapped = ThreadedCPUParallel(inner, threads=2)
    inputs = torch.randn(6, 3).to(dtype)
    for module in (plain, wrapped):
        module(inputs).float().pow(3).mean().backward()
    for mine, theirs in zip(inner.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(inner.running_var, plain.running_var, rtol=0.02, atol=0.02)


class Following(nn.Module):
    """Moves parameters in place in its forward, which lanes share."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(3, 4), nn.Linear(3, 4).requires_grad_(False)

    def forward(self, x):
        out = self.fast(x) * self.slow(x)
        with torch.no_grad():
            self.slow.weight.mul_(0.9).add_(self.fast.weight, alpha=0.1)
        return out


def test_lanes_refuse_a_forward_that_moves_parameters_in_place(wrap_in_lanes):
    with pytest.raises(NotImplementedError, match=r"writes to the parameter 'slow.weight'"):
        wrap_in_lanes(Following())(torch.randn(6, 3))


class Trained(nn.Linear):
    """Has a `train` of its own, as layers of the forward-forward algorithm."""

    def train(self, inputs=True, steps=1):  # type: ignore[override]
        return super().train(inputs) if isinstance(inputs, bool) else steps


def test_a_train_of_the_modules_own_is_kept(wrap):
    net = wrap(Trained(3, 2))
    assert net.train() is net
    assert net.train("sgd", steps=3) == 3
    with pytest.raises(TypeError, match="'train' was called with tensors"):
        net.train(torch.ones(4, 3))


def test_a_local_model_that_was_loaded_in_several_processes_does_not_train_alone(monkeypatch):
    saved = pickle.dumps(DistributedModel(nn.Linear(3, 1), batch="local"))
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    model = pickle.loads(saved)
    with pytest.raises(RuntimeError, match="in process 1 of 2, which is in no process"):
        model(torch.ones(2, 3))
    assert model.eval()(torch.ones(2, 3)).shape == (2, 1)


class Returning(nn.Module):
    """Returns what a function makes of its input and of its output."""

    def __init__(self, returns):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.returns = returns

    def forward(self, x):
        return self.returns(x, self.layer(x.to_dense()))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_are_refused_in_words_of_their_own(wrap_in_lanes, layout):
    x = torch.randn(6, 3)
    with pytest.raises(TypeError, match=f"An input is stored as {layout}"):
        wrap_in_lanes(Returning(lambda _, y: y))(x.to_sparse(layout=layout))
    with pytest.raises(TypeError, match=f"output of 'forward' is stored as {layout}"):
        wrap_in_lanes(Returning(lambda _, y: y.detach().to_sparse(layout=layout)))(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_in_words_of_their_own(wrap_in_lanes):
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
    with pytest.raises(TypeError, match="An input is nested"):
        wrap_in_lanes(nn.Linear(3, 2))(nested)
    with pytest.raises(TypeError, match="output of 'forward' is nested"):
        wrap_in_lanes(Returning(lambda x, y: torch.nested.nested_tensor([*y])))(torch.randn(6, 3))


@pytest.mark.parametrize(("rows", "message"), [(6, "couples rows"), (7, r"\(4, 4\).*\(3, 3\)")])
def test_a_table_of_rows_by_rows_is_refused(wrap_in_lanes, rows, message):
    with pytest.raises(ValueError, match=message):
        wrap_in_lanes(Returning(lambda _, y: y @ y.T))(torch.randn(rows, 3))


def test_a_plain_value_that_counts_the_rows_of_a_shard_is_refused(wrap_in_lanes):
    with pytest.raises(ValueError, match="is 3, and 6 on the whole batch"):
        wrap_in_lanes(Returning(lambda x, y: (y, x.shape)))(torch.randn(6, 3))


def test_what_is_set_on_an_input_comes_with_it(wrap):
    model = Returning(lambda x, y: y * 2 if hasattr(x, "is_doubled") else y)
    x = torch.randn(6, 3)
    x.is_doubled = True  # type: ignore
    torch.testing.assert_close(wrap(copy.deepcopy(model))(x), model(x))


class Tokens(nn.Module):
    """A masked language model that computes its loss, over the tokens that are not left out."""

    def __init__(self, drop):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Dropout(drop))
        self.last = nn.Linear(16, 50)

    def forward(self, tokens, labels):
        return nn.functional.cross_entropy(self.last(self.body(tokens)).mT, labels)


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_loss_that_is_off_by_a_ten_thousandth_is_seen_in_float32_and_beside_noise(
    wrap_in_lanes, drop
):
    torch.manual_seed(1)
    tokens = torch.randint(0, 50, (16, 32))
    labels = tokens.where(torch.rand(16, 32) < 0.15, -100)
    plain = Tokens(drop).eval()
    each = nn.functional.cross_entropy(
        plain.last(plain.body(tokens)).mT, labels, reduction="none"
    ).chunk(2)
    counts = [labels.ne(-100).sum() for labels in labels.chunk(2)]
    apart = sum(half.sum() / count for half, count in zip(each, counts, strict=True)) / 2
    assert 1e-5 < (apart / plain(tokens, labels) - 1).abs() < 1e-3
    with pytest.raises(ValueError, match="couples rows"):
        wrap_in_lanes(plain.train())(tokens, labels)


def test_a_network_that_makes_much_of_rounding_errors_is_not_taken_for_one_that_couples(
    wrap_in_lanes,
):
    torch.manual_seed(0)
    blocks = [(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(60)]
    plain = nn.Sequential(nn.Embedding(50, 32), *(layer for block in blocks for layer in block))
    tokens = torch.randint(0, 50, (40,))
    model = wrap_in_lanes(copy.deepcopy(plain))
    off = (plain(tokens) - model(tokens)).abs().max() / plain(tokens).abs().max()
    assert off > 5e-3  # by that much a coupling is looked for, but for what rounding does
