import copy
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wraploop import DataParallel, ThreadedCPUParallel, batch_mean
from wraploop.wrappers import lanes, shard, threads
from wraploop.wrappers.replica import Replica
from wraploop.wrappers.tuning import Tuner

SPANS: dict[str, list[tuple[str, float, float]]] = {"forward": [], "backward": []}


class Recorder(nn.Module):
    """An identity that notes in which thread, and from when to when, its passes run."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return _Noting.apply(x * self.weight)


class _Noting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        note(SPANS["forward"])
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        note(SPANS["backward"])
        return grads[0]


def note(spans):
    begun = time.perf_counter()
    time.sleep(0.1)
    spans.append((threading.current_thread().name, begun, time.perf_counter()))


def after_calls_that_are_probed(model, x):
    """Brings `model` to its fifth call; the first, second and fourth are made twice."""
    for _ in range(4):
        model(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: ThreadedCPUParallel(model, threads=3),
        lambda model: DataParallel(model, device_ids=["cpu"] * 3),
    ],
)
def test_lanes_overlap_in_forward_and_in_backward(wrap):
    model = wrap(nn.Sequential(Recorder()))
    after_calls_that_are_probed(model, torch.randn(6, 2))
    for passes in SPANS.values():
        passes.clear()
    model(torch.randn(6, 2)).sum().backward()

    for passes in SPANS.values():
        assert len({name for name, _, _ in passes}) == 3
        by_begin = sorted(passes, key=lambda span: span[1])
        assert all(later[1] < earlier[2] for earlier, later in pairwise(by_begin)), passes


def test_what_torch_keeps_per_thread_holds_in_every_lane():
    seen = []

    class Watcher(nn.Module):
        def forward(self, x):
            state = (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.empty(0).device.type,
            )
            seen.append(state)
            return x

    model = ThreadedCPUParallel(Watcher(), threads=2)
    x = torch.randn(4, 2)
    after_calls_that_are_probed(model, x)
    seen.clear()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        model(x)

    assert sorted(map(str, seen[:2])) == [str((False, False, False, torch.bfloat16, "cpu"))] * 2
    assert seen[2] == seen[3] == (False, True, False, torch.bfloat16, "cpu")
    assert seen[4] == seen[5] == (True, False, True, torch.bfloat16, "meta")


def test_checkpointing_around_a_wrapper_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model = ThreadedCPUParallel(copy.deepcopy(plain), threads=2)
    x = torch.randn(5, 3, dtype=torch.float64)
    for m in (plain, model):
        checkpoint(m, x, use_reentrant=False).square().sum().backward()
    expected = [p.grad for p in plain.parameters()]
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_the_first_failing_lane_is_raised_with_its_type_and_a_note():
    class Refusing(nn.Module):
        def forward(self, x):
            if (x > 0).all():
                raise KeyError("positive")
            return x

    model = ThreadedCPUParallel(Refusing(), threads=2)
    with pytest.raises(KeyError, match="positive") as caught:
        model(torch.tensor([[-1.0], [-1.0], [1.0]]))

    said = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any("shard 1 of 2, which has 1 rows" in text for text in said)
    assert model(torch.tensor([[-1.0], [-2.0]])).tolist() == [[-1.0], [-2.0]]


def test_a_lane_that_fails_before_a_batch_norm_does_not_leave_the_others_waiting():
    class Refusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            if (x > 0).all():
                raise KeyError("positive")
            return self.norm(x)

    model = ThreadedCPUParallel(Refusing(), threads=2)
    begun = time.perf_counter()
    with pytest.raises(KeyError, match="positive"):
        model(torch.tensor([[-1.0, -1.0], [-1.0, -2.0], [1.0, 1.0]]))
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm1d(2), nn.BatchNorm1d(1)],
        [batch_mean, lambda x: batch_mean(x[:, :1])],
    ],
)
def test_lanes_at_different_statistics_are_an_error_in_words_of_its_own(layers):
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            is_positive = bool((x > 0).all())
            return x + self.layers[is_positive](x[:, : 2 - is_positive])

    model = ThreadedCPUParallel(Choosing(), threads=2)
    with pytest.raises(ValueError, match="at different statistics of the whole batch"):
        model(torch.tensor([[-1.0, -1.0], [-1.0, -2.0], [1.0, 1.0], [2.0, 1.0]]))


@pytest.mark.parametrize("args", [(), (3,), ("three",), (3, "three")])
def test_an_error_says_in_which_shard_where_errors_have_no_notes(args):
    """As before Python 3.11; of two arguments some classes make their text, which stays."""

    class Old(Exception):
        @property
        def add_note(self):
            raise AttributeError

    error = Old(*args)
    shard.note(error, "in shard 0")
    assert ("in shard 0" in str(error)) == (len(args) < 2)
    assert all(str(arg) in str(error) for arg in args)


def test_auto_settles_on_a_number_of_threads_and_computes_the_same_meanwhile():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model = ThreadedCPUParallel(plain)
    x = torch.randn(6, 3, dtype=torch.float64)
    for _ in range(20):
        plain.zero_grad()
        plain(x).square().mean().backward()
        expected = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
        plain.zero_grad()
        model(x).square().mean().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)

    (tuner,) = vars(model)["_wraploop_execution"]._tuners.values()
    cores = torch.get_num_threads()
    assert tuner.chosen in {tuner.plain, (1, 1), (max(1, cores // 2), min(cores, 2)), (cores, 1)}


def test_auto_holds_against_plain_torch_only_what_plain_torch_would_cost(monkeypatch):
    """What a lane costs besides its work, here much, is spared where auto chooses no lanes."""
    slow_s, settle = 0.05, Replica.settle
    monkeypatch.setattr(Replica, "settle", lambda replica: (time.sleep(slow_s), settle(replica)))
    noted = {}
    note = Tuner.note

    def watch(tuner, part, split, seconds):
        noted.setdefault((part, split == tuner.plain), []).append(seconds)
        note(tuner, part, split, seconds)

    monkeypatch.setattr(Tuner, "note", watch)
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = ThreadedCPUParallel(nn.Linear(3, 1))
        for _ in range(6):
            model(torch.ones(4, 3)).sum().backward()
    finally:
        torch.set_num_threads(cores)
    assert 0 < min(noted["forward", True]) < slow_s < min(noted["forward", False])
    assert 0 < min(noted["backward", True])


def test_auto_computes_the_same_where_one_backward_follows_two_forwards():
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)]
    plain = nn.Sequential(*layers).double()
    model = ThreadedCPUParallel(copy.deepcopy(plain))
    for _ in range(20):
        a, b = torch.randn(2, 6, 3, dtype=torch.float64)
        for each in (plain, model):
            each.zero_grad()
            (each(a).square().mean() + each(b).mean()).backward()
        torch.testing.assert_close([*model.buffers()], [*plain.buffers()])
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        for mine, expected in pairs:
            torch.testing.assert_close(mine.grad, expected.grad)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "many"])
def test_a_number_of_threads_that_cannot_be_is_refused(threads):
    with pytest.raises(ValueError, match="positive integer"):
        ThreadedCPUParallel(nn.Linear(1, 1), threads=threads)


def test_checkpointing_over_dropout_in_a_lane_is_refused():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Dropout())

        def forward(self, x):
            return checkpoint(self.layers, x, use_reentrant=False)

    model = ThreadedCPUParallel(Checkpointed(), threads=2)
    with pytest.raises(NotImplementedError, match="checkpointed part"):
        model(torch.randn(4, 3))
    assert model.eval()(torch.randn(4, 3)).shape == (4, 4)


def test_what_an_error_leaves_behind_in_a_lanes_thread_does_not_touch_the_next_call():
    left = []

    def leave():  # as checkpointing of torch 2.6 does when what it runs fails
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
            yield

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            if fails and threading.current_thread() is not threading.main_thread():
                left.append(leave())
                next(left[0])
                raise ArithmeticError
            return self.linear(x.sin())

    fails = True
    plain = Failing().double()
    model = ThreadedCPUParallel(copy.deepcopy(plain), threads=2)
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(ArithmeticError):
        model(x)
    fails = False
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(model.linear.weight.grad, plain.linear.weight.grad)


def test_a_transform_of_a_batch_norm_inside_a_lane_is_refused():
    class Transforming(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x):
            return torch.func.vjp(lambda x: self.norm(x).sin(), x)[0]

    x = torch.randn(4, 3)
    with pytest.raises(NotImplementedError, match="Transform a call of the wrapped model"):
        ThreadedCPUParallel(Transforming(), threads=2)(x)
    apart = ThreadedCPUParallel(Transforming(), threads=2, sync_batchnorm=False)
    assert torch.equal(apart(x)[:2], Transforming()(x[:2]))


def test_a_forked_process_has_lanes_of_its_own():
    model = ThreadedCPUParallel(nn.Linear(3, 2), threads=3)
    model(torch.randn(6, 3)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        model(torch.randn(6, 3)).sum().backward()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


class FailingBackward(torch.autograd.Function):
    """An identity whose derivative is an error where there is one in `errors`."""

    errors: list[BaseException] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        for error in FailingBackward.errors:
            raise error
        return grads[0]


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(FailingBackward.apply(self.first(x)))


def gradients(model, x):
    return torch.autograd.grad(model(x).square().mean(), [*model.parameters()])


@pytest.mark.parametrize("error", [ValueError("once"), KeyboardInterrupt()])
def test_an_error_in_a_backward_leaves_the_next_step_right(error):
    plain, x = Failing().double(), torch.randn(8, 3).double()
    model = ThreadedCPUParallel(copy.deepcopy(plain), threads=2)
    loss = model(x).sum()
    FailingBackward.errors.append(error)
    try:
        with pytest.raises(type(error)):
            loss.backward()
    finally:
        FailingBackward.errors.clear()
    torch.testing.assert_close(gradients(model, x), gradients(plain, x), rtol=1e-10, atol=1e-14)


def test_threads_may_use_one_model_at_once():
    plain = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    model = ThreadedCPUParallel(copy.deepcopy(plain), threads=2)
    batches = [torch.randn(20, 3).double() for _ in range(4)]

    def use(x):
        return [gradients(model, x) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(use, batches)]
    for x, every in zip(batches, found, strict=True):
        expected = gradients(plain, x)
        for each in every:
            torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-14)


def test_a_models_threads_end_with_it():
    before = set(threading.enumerate())
    model = ThreadedCPUParallel(nn.Linear(3, 1), threads=3)
    model(torch.ones(6, 3)).sum().backward()
    started = set(threading.enumerate()) - before
    assert len(started) == 2

    del model
    gc.collect()
    for thread in started:
        thread.join(timeout=10.0)
        assert not thread.is_alive()


def test_threads_that_a_second_step_has_to_itself_end_after_it():
    shared = threads.Threads()
    before = set(threading.enumerate())
    shared.run([partial(shared.run, [threading.current_thread] * 3, None)], None)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10.0)
        assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # lost by Python
def test_an_interrupt_wherever_lanes_begin_and_end_leaves_the_next_step_right():
    plain = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    model = ThreadedCPUParallel(copy.deepcopy(plain), threads=2)
    x = torch.randn(8, 3).double()
    expected = gradients(plain, x)
    faulthandler.dump_traceback_later(60, exit=True)  # should lanes wait for each other
    try:
        for number in range(1, 1000):
            is_through = not _interrupted_at(number, lambda: gradients(model, x))
            torch.testing.assert_close(gradients(model, x), expected, rtol=1e-10, atol=1e-14)
            if is_through:
                return
    finally:
        faulthandler.cancel_dump_traceback_later()
    pytest.fail("there is no end of them")


def _interrupted_at(number, act):
    """Interrupts `act` at a call, by number, that is made in lanes' code; whether it did.

    Python looks for signals where a function begins, and after one that is not Python's.
    """
    left = number

    def interrupt(frame, event, _):
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename in files:
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    files = threads.__file__, lanes.__file__
    sys.setprofile(interrupt)
    with suppress(KeyboardInterrupt):
        act()
    sys.setprofile(None)
    return left <= 0
