"""What buckets do with memory and with gradients that are not there; see `test_promises.py`."""

import pytest
import torch

from wraploop.processes.arena import own_arena
from wraploop.wrappers.reducer import Bucket, Memory

LONG = 1 << 19  # doubles: four times what is kept for the next step


@pytest.fixture(params=["bytes", "arena"])
def new(request):
    if request.param == "bytes":
        return bytearray
    arena = own_arena()
    if arena is None:
        pytest.skip("this system has no arenas")
    return arena.block


def test_memory_is_used_again_once_nothing_refers_to_it(new):
    memory = Memory(LONG, torch.zeros(1, dtype=torch.float64), new)
    first = memory.empty()
    where = first.data_ptr()
    del first
    assert memory.empty().data_ptr() == where


def test_memory_that_a_view_refers_to_is_left_alone(new):
    memory = Memory(LONG, torch.zeros(1, dtype=torch.float64), new)
    kept = [memory.empty().fill_(i)[i : i + 3].view(1, 3) for i in range(4)]
    leaf = torch.zeros(LONG, dtype=torch.float64, requires_grad=True)
    leaf.grad = memory.empty().fill_(7.0)
    memory.empty().fill_(-1.0)
    assert [part.tolist() for part in kept] == [[[i] * 3] for i in range(4)]
    assert leaf.grad.eq(7).all()


def test_a_bucket_holds_every_gradient_times_the_weight_in_its_place():
    torch.manual_seed(0)
    shapes = [(3, 2), (), (700, 700), (0, 4), (5,), (300, 300), (1,)]
    like = [torch.empty(shape, dtype=torch.float64) for shape in shapes]
    matrices = [
        torch.randn(shape[::-1]).double().T if len(shape) == 2 else None for shape in shapes
    ]
    parts = [
        torch.randn(()).double() if shape == () else m
        for m, shape in zip(matrices, shapes, strict=True)
    ]
    for weight in (1.0, 0.25):
        flat, places = Bucket(range(len(like)), like).filled(parts, weight)
        for part, model, place in zip(parts, like, places, strict=True):
            expected = torch.zeros_like(model) if part is None else part * weight
            assert place.equal(expected)
        assert flat.numel() == sum(tensor.numel() for tensor in like)
        flat.fill_(3.0)
        assert all(place.eq(3).all() for place in places)
