from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests import forked
from wraploop import DistributedModel
from wraploop.wrappers.at_step import AtStep


@pytest.fixture(scope="module")
def got(tmp_path_factory):
    """By step and option: how far off, how often gradients were sent, how often by default."""
    folder = tmp_path_factory.mktemp("reducing")
    done = forked.run(Path(__file__).with_name("reducing.py"), folder, processes=2)
    assert done.returncode == 0, done.stderr
    assert (folder / "0").read_text() == (folder / "1").read_text()
    lines = [line.split("|") for line in (folder / "0").read_text().splitlines()]
    return {name: (float(off), int(n), int(m), alike) for name, off, n, m, alike in lines}


def test_one_reduction_for_each_step_computes_the_same(got):
    found = {name: each for name, each in got.items() if name.endswith("reduce_at")}
    assert len(found) == 9
    for name, (off, _, _, alike) in found.items():
        assert off < 1e-10, name
        assert alike == "True", name


def test_one_reduction_for_each_step_is_what_is_sent(got):
    found = {name: each for name, each in got.items() if name.endswith("reduce_at")}
    several = [name for name in found if name.startswith(("two_backwards", "gan"))]
    assert several
    for name in several:
        _, often, by_default, _ = found[name]
        assert often < by_default, name


def test_rounded_gradients_are_near_and_the_same_on_all_ranks(got):
    found = {name: each for name, each in got.items() if name.endswith("reduce_dtype")}
    assert len(found) == 9
    for name, (off, _, _, alike) in found.items():
        assert 1e-12 < off < 2e-2, name
        assert alike == "True", name


def test_a_model_that_goes_while_an_optimizer_steps_leaves_its_hooks_alone():
    alone = SimpleNamespace(world_size=1, rank=0)
    made: list[AtStep] = [AtStep(alone, "first", None), AtStep(alone, "second", None)]  # pyright: ignore
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: made.clear()),
        register_optimizer_step_pre_hook(lambda *_: calls.append("last")),
    ]
    weight.grad = torch.ones(1)
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert calls == ["last"]
    assert weight.item() == pytest.approx(0.9)


@pytest.mark.parametrize("dtype", ["int32", "bf17"])
def test_what_is_no_floating_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="reduce_dtype must be a floating dtype"):
        DistributedModel(nn.Linear(1, 1), reduce_dtype=dtype)


def test_when_to_reduce_is_one_of_two():
    with pytest.raises(ValueError, match="reduce_at must be one of 'backward', 'step'"):
        DistributedModel(nn.Linear(1, 1), reduce_at="never")  # pyright: ignore
