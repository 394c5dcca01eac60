"""Run by `test_wire.py`: processes on a wire, what is claimed of it, and what is wrong with that.

Each claim is a function that all ranks call at the same time. It raises an error where it is wrong.
"""

import faulthandler
import gc
import itertools
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from wraploop.processes import Channel, PeerError, arena, channel, connecting
from wraploop.processes.collectives import Collectives
from wraploop.processes.wire import _PIECE, _PIECE_IN_PLACE, Wire
from wraploop.wrappers.distributed import DistributedModel

SIZES = (2, 3, 4)
LONG_S = 12.0  # as good as for ever
LATE_S = 0.1
QUICK_S = 5.0  # what is much less than LONG_S on a busy machine
HANG_S = 30
LARGE = 12 << 20  # bytes: more than the system takes from a sender that nobody reads

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.complex128, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
]


def connected(group=None):
    found = connecting.connect(Collectives(group), LONG_S)
    assert isinstance(found, Wire)
    return found


def message(rank, length):
    return bytes([rank + 1]) * length


def assert_gathers(wire, length, timeout_s=LONG_S):
    found = wire.gather([message(wire.rank, length)], timeout_s)
    expected = [message(rank, length) for rank in range(wire.world_size)]
    assert [bytes(each) for each in found] == expected


def numbers(rank, length, dtype=torch.float32):
    """Small, so that sums are exact."""
    found = (torch.arange(length) * (rank + 3)) % 7 - (0 if dtype == torch.uint8 else 3)
    return found.to(dtype) * 1j if dtype.is_complex else found.to(dtype)


def near(wire, values, after=0):
    """`values` in the wire's arena, behind so many others."""
    block = wire.arena.block((after + len(values)) * values.element_size())
    room = torch.frombuffer(block, dtype=values.dtype, count=after + len(values))[after:]
    return room.copy_(values)


def assert_sums(wire, length, dtype=torch.float32, timeout_s=LONG_S, place=lambda wire, x: x):
    flat = place(wire, numbers(wire.rank, length, dtype))
    wire.sum(flat, timeout_s)
    expected = numbers(0, length, dtype)
    for rank in range(1, wire.world_size):
        expected += numbers(rank, length, dtype)
    assert torch.equal(flat, expected), (length, dtype)


def assert_goes_on(wire):
    """That what comes after an error is right on every rank."""
    dist.barrier()
    assert_sums(wire, 1001)
    assert_gathers(wire, 17)
    assert_sums(wire, 5, torch.int64)
    dist.barrier()


@contextmanager
def refused(*kinds, match=None):
    begun_s = time.monotonic()
    with pytest.raises(kinds or (TimeoutError, ConnectionError), match=match):
        yield
    assert time.monotonic() - begun_s < QUICK_S


def everyone_gets_everyones_message_of_any_length(wire):
    draw = random.Random(0)  # the same on every rank
    lengths = [[0] * 4, [1 << 20] * 4, [0, 1, 1 << 20, 7], [1 << 20, 0, 3, 1 << 16]]
    lengths += [[draw.choice([0, 1, 17, 4096, 70_000]) for _ in range(4)] for _ in range(40)]
    for each in lengths:
        own = message(wire.rank, each[wire.rank])
        parts = [own[:1], bytearray(own[1:5]), memoryview(own[5:])]
        found = wire.gather(parts, LONG_S)
        expected = [message(rank, each[rank]) for rank in range(wire.world_size)]
        assert [bytes(f) for f in found] == expected


def a_sum_is_right_for_every_dtype_and_length(wire):
    short = [0, 1, wire.world_size - 1, wire.world_size, wire.world_size + 1, 1001]
    for dtype, length in itertools.product(DTYPES, short):
        assert_sums(wire, length, dtype)
    for over in (-1, 1):
        assert_sums(wire, _PIECE // 4 + over, torch.float32)


def a_sum_has_the_same_bits_on_every_rank(wire):
    draw = torch.Generator().manual_seed(wire.rank)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        flat = torch.randn(1001, generator=draw).to(dtype)
        wire.sum(flat, LONG_S)
        found = wire.gather([flat.view(torch.uint8).numpy().tobytes()], LONG_S)
        assert all(each == found[0] for each in found)


def what_lies_in_arenas_is_summed_there_and_nothing_of_it_is_sent(wire):
    pieces, wire._sum_piece = wire._sum_piece, None
    short = [1, wire.world_size - 1, wire.world_size, wire.world_size + 1, 1001]
    for dtype, length in itertools.product(DTYPES, short):
        assert_sums(wire, length, dtype, place=lambda w, x: near(w, x, after=w.rank * 77))
    long = wire.world_size * 2 * _PIECE_IN_PLACE // 8
    for over in (-1, 0, 1):
        assert_sums(wire, long + over, torch.float64, place=lambda w, x: near(w, x, after=3000))
    wire._sum_piece = pieces


def a_sum_in_arenas_has_the_same_bits_on_every_rank(wire):
    draw = torch.Generator().manual_seed(wire.rank)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        flat = near(wire, torch.randn(1001, generator=draw).to(dtype))
        wire.sum(flat, LONG_S)
        found = wire.gather([flat.view(torch.uint8).numpy().tobytes()], LONG_S)
        assert all(each == found[0] for each in found)


def a_channels_memory_is_in_the_arena(wire):
    speaking = Channel(None, LONG_S)
    speaking.exchange("count", b"1")
    flat = torch.frombuffer(speaking.memory(4004), dtype=torch.float32, count=1001)
    assert wire.arena.place_of(flat) is not None
    assert speaking.sum(flat.fill_(1.0)).eq(wire.world_size).all()


def what_lies_elsewhere_on_one_rank_is_sent_by_all(wire):
    for rank in range(wire.world_size):
        assert_sums(wire, 1001, place=near if wire.rank == rank else lambda wire, x: x)
        assert_sums(wire, 1001, place=near if wire.rank != rank else lambda wire, x: x)


def sums_in_arenas_that_do_not_fit_are_an_error_on_every_rank(wire):
    with refused(ConnectionError, match="another number of bytes"):
        wire.sum(near(wire, torch.ones(1000 + 8 * (wire.rank == 0))), LONG_S)
    assert_goes_on(wire)
    before = _held(wire)
    _last_is_late(wire, lambda s: assert_sums(wire, LARGE // 4, timeout_s=s, place=near))
    gc.collect()  # the errors' frames
    assert _held(wire) <= before  # who is late has read nothing that had gone, which takes it again


def what_others_may_still_read_is_kept_when_a_sum_is_given_up(wire):
    flat = near(wire, torch.ones(1001))
    gather, calls = wire._gather, []

    def gather_or_fail(*given):
        calls.append(given)
        if len(calls) == 3:  # all have added up, and read each other's sums
            raise Interrupted("by hand")
        return gather(*given)

    if wire.rank == 0:
        wire._gather = gather_or_fail
    with refused(Interrupted if wire.rank == 0 else ConnectionError):
        wire.sum(flat, LONG_S)
    vars(wire).pop("_gather", None)
    where = flat.data_ptr()
    del flat
    assert where in wire.arena._blocks
    assert_goes_on(wire)  # so they read it no more
    gc.collect()  # the errors' frames
    assert where not in wire.arena._blocks


def an_interrupt_of_a_sum_in_arenas_is_an_error_and_never_wrong_numbers(wire):
    room = near(wire, numbers(wire.rank, 300_000))  # once: Python loses what a finalizer raises
    _interrupt_at_any_time(wire, 300_000, lambda _, values: room.copy_(values))


def _held(wire):
    """How many bytes of the arena's file there are."""
    return os.fstat(wire.arena._file).st_blocks * 512


def memory_goes_back_to_the_system_and_not_from_a_forked_child(wire):
    before = _held(wire)
    flat = near(wire, torch.ones(LARGE // 4))
    assert _held(wire) >= before + LARGE
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            flat.zero_()
            del flat
            gc.collect()
            mine = arena.own_arena()
            assert mine
            assert mine.name["file"] != wire.arena.name["file"]
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert flat.eq(1).all()
    assert _held(wire) >= before + LARGE
    del flat
    assert _held(wire) <= before


def memory_takes_no_file_and_does_not_go_with_what_was_there_before(wire):
    files = len(os.listdir("/proc/self/fd"))
    before = [wire.arena.block(4004) for _ in range(9)]
    assert len(os.listdir("/proc/self/fd")) == files
    found = []
    going = [weakref.ref(b, lambda _: found.append(near(wire, torch.ones(1001)))) for b in before]
    before.clear()
    assert len(found) == len(going)
    assert all(wire.arena.place_of(flat) is not None and flat.eq(1).all() for flat in found)
    assert_sums(wire, 1001, place=lambda _, x: found[0].copy_(x))


def processes_that_cannot_read_each_others_arenas_send(wire):
    neighbour = arena.Neighbour

    def of_another_machine(name):
        return neighbour({**name, "token": "00" * 16})

    if wire.rank == 0:
        connecting.Neighbour = of_another_machine
    try:
        again = connected()
    finally:
        connecting.Neighbour = neighbour
    assert again.arena is None
    assert not again.neighbours
    assert_goes_on(again)
    again.close()


def _last_is_late(wire, act):
    """All but the last rank give `act` up; then the last comes, and gets an error or is right."""
    if wire.rank < wire.world_size - 1:
        with refused():
            act(LATE_S)
        dist.barrier()
    else:
        dist.barrier()
        with suppress(TimeoutError, ConnectionError):
            act(LATE_S)
    assert_goes_on(wire)


def who_comes_late_takes_nothing_that_was_meant_for_another_operation(wire):
    for length in (3, LARGE // 4):
        _last_is_late(wire, lambda timeout_s, n=length: assert_gathers(wire, n, timeout_s))
        _last_is_late(wire, lambda timeout_s, n=length: assert_sums(wire, n, timeout_s=timeout_s))


def what_was_sent_half_belongs_to_nobody_after_it_is_given_up(wire):
    if wire.rank == 0:
        own = bytearray(message(0, LARGE))
        with refused(TimeoutError):
            wire.gather([own], LATE_S)
        own[:] = bytes(LARGE)
        flat = numbers(0, LARGE // 4)
        with refused(TimeoutError):
            wire.sum(flat, LATE_S)
        flat.fill_(torch.nan)
        dist.barrier()
    else:
        dist.barrier()
        with suppress(TimeoutError, ConnectionError):
            assert_gathers(wire, LARGE, LATE_S)
        with suppress(TimeoutError, ConnectionError):
            assert_sums(wire, LARGE // 4, timeout_s=LATE_S)
    assert_goes_on(wire)


def ranks_that_do_different_things_all_get_an_error_at_once(wire):
    with refused(ConnectionError):  # a gather, where the others sum
        (assert_sums if wire.rank else assert_gathers)(wire, 8)
    assert_goes_on(wire)
    with refused(ConnectionError):  # another number of numbers
        wire.sum(torch.ones(1000 + 1000 * (wire.rank == 0)), LONG_S)
    assert_goes_on(wire)
    flat = torch.ones(10) if wire.rank else torch.ones(10, dtype=torch.float64)
    with refused(ConnectionError):
        wire.sum(flat, LONG_S)
    assert_goes_on(wire)


def who_waits_hears_at_once_why_another_gives_up(wire):
    if wire.rank == 0:
        with refused(TimeoutError, match=f"rank {1 % wire.world_size} does not come"):
            assert_gathers(wire, 3, 0.0)
        dist.barrier()
    else:
        dist.barrier()
        with suppress(ConnectionError):
            assert_gathers(wire, 3)  # who has all may take it
    assert_goes_on(wire)
    if wire.rank == 0:
        with refused(TimeoutError):
            wire.sum(torch.ones(10), 0.0)
        dist.barrier()
    else:
        dist.barrier()
        with refused(ConnectionError, match="has given this up"):
            wire.sum(torch.ones(10), LONG_S)
    assert_goes_on(wire)


class Interrupted(BaseException):
    """As a KeyboardInterrupt."""


@contextmanager
def _interrupted(after_s):
    def interrupt(number, frame):
        raise Interrupted("by hand")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def an_interrupt_while_it_waits_leaves_the_next_operation_right(wire):
    for act in (assert_gathers, assert_sums):
        if wire.rank == 0:
            with refused(Interrupted), _interrupted(LATE_S):
                act(wire, 1001)
            dist.barrier()
        else:
            dist.barrier()
            with suppress(ConnectionError):
                act(wire, 1001)
        assert_goes_on(wire)


def an_interrupt_at_any_time_is_an_error_and_never_wrong_numbers(wire):
    _interrupt_at_any_time(wire, 100_000, lambda _, values: values)


def _interrupt_at_any_time(wire, length, place):
    for after_s in (0.001, 0.004, 0.013):
        again = connected()
        try:
            with _interrupted(after_s) if wire.rank == 0 else nullcontext():
                while True:
                    assert_gathers(again, 100_000)
                    assert_sums(again, length, place=place)
        except (Interrupted, ConnectionError):
            pass
        with suppress(TimeoutError, ConnectionError):
            assert_gathers(again, 100_000, LATE_S)  # as who tells the others
        again.close()
        dist.barrier()


def a_handlers_own_timeout_error_is_not_taken_for_the_networks(wire):
    def handler(number, frame):
        raise TimeoutError("of the handler")

    before = signal.signal(signal.SIGALRM, handler)
    again = connected()
    try:
        if wire.rank == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with refused(TimeoutError, match="of the handler"):
                while True:
                    assert_sums(again, 100_000)
        else:
            with refused(ConnectionError):
                while True:
                    assert_sums(again, 100_000)
    finally:
        signal.signal(signal.SIGALRM, before)
        again.close()  # for who has all of the last sum, and waits in the next
    dist.barrier()


def threads_take_turns(wire):
    wrong = []

    def speak():
        for length in (0, 3, 50_000, 10, 200_000) * 4:
            found = [bytes(m) for m in wire.gather([message(wire.rank, length)], LONG_S)]
            if any(m != message(rank, len(m)) for rank, m in enumerate(found)):
                wrong.append(found)

    threads = [threading.Thread(target=speak) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_goes_on(wire)


def a_forked_child_has_none_of_the_connections(wire):
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            links = [*wire._outgoing, *wire._incoming]
            assert all(link.connection.fileno() == -1 for link in links)
            with refused(ConnectionError, match="closed"):
                wire.gather([b""], LONG_S)
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_goes_on(wire)


def several_groups_speak_at_once(wire):
    n = wire.world_size
    pairs = [dist.new_group([a, b]) for a, b in itertools.combinations(range(n), 2)]
    for turn in range(2):
        for (a, b), group in zip(itertools.combinations(range(n), 2), pairs, strict=True):
            if wire.rank in (a, b):
                said = Channel(group, LONG_S).exchange("count", message(wire.rank, turn))
                assert [bytes(s.numpy()) for s in said] == [message(r, turn) for r in (a, b)]
                assert Channel(group).sum(torch.ones(3)).tolist() == [2.0] * 3
        user = torch.ones(2)
        dist.all_reduce(user)
        assert user.tolist() == [n] * 2
        assert_gathers(wire, turn)


def a_model_of_a_part_of_the_processes_waits_for_no_other(wire):
    group = dist.new_group([0, 1])
    if wire.rank < 2:
        model = DistributedModel(nn.Linear(3, 1), process_group=group, timeout_s=LONG_S)
        model(torch.ones(4, 3)).sum().backward()


def processes_that_cannot_reach_each_other_use_torchs_collectives(wire):
    addresses, within_s = connecting._addresses, connecting._CALL_WITHIN_S
    connecting._CALL_WITHIN_S = 0.1
    if wire.rank == 0:
        connecting._addresses = lambda: ["192.0.2.77"]
    try:
        group = dist.new_group()
        for length in (0, 5, 100_000):
            said = Channel(group, LONG_S).exchange("count", message(wire.rank, length))
            expected = [message(rank, length) for rank in range(wire.world_size)]
            assert [bytes(s.numpy()) for s in said] == expected
            flat = Channel(group).sum(numbers(wire.rank, length))
            assert torch.equal(flat, sum(numbers(r, length) for r in range(wire.world_size)))  # type: ignore[arg-type]
        assert channel._wires[group] is None
    finally:
        connecting._addresses, connecting._CALL_WITHIN_S = addresses, within_s


def a_stranger_who_calls_is_not_taken(wire):
    call, within_s = connecting._call, connecting._HELLO_WITHIN_S
    strangers = []

    def call_after_strangers(peer, hello, *others):
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n" * 4, bytes(16) + hello[16:], hello[:16]):
            stranger = socket.create_connection(("127.0.0.1", peer["port"]), LONG_S)
            stranger.sendall(said)
            strangers.append(stranger)
        astray = hello[:16] + connecting._HELLO.pack(b"", wire.rank, 77)[16:]
        strangers.append(socket.create_connection(("127.0.0.1", peer["port"]), LONG_S))
        strangers[-1].sendall(astray)
        return call(peer, hello, *others)

    connecting._HELLO_WITHIN_S = 0.1
    if wire.rank == 0:
        connecting._call = call_after_strangers
    try:
        again = connected()
    finally:
        connecting._call, connecting._HELLO_WITHIN_S = call, within_s
    assert_goes_on(again)
    for stranger in strangers:
        with suppress(ConnectionError):
            assert stranger.recv(1) == b""
        stranger.close()
    again.close()


def who_gave_up_its_first_call_is_taken_at_its_second(wire):
    received, calls = connecting._received, []

    def received_late(connection, size, within_s):
        calls.append(size)
        said = received(connection, size, within_s)
        return b"" if wire.rank == 0 and size == connecting._SECRET and len(calls) < 3 else said

    connecting._received = received_late
    try:
        again = connected()
    finally:
        connecting._received = received
    assert_goes_on(again)
    again.close()


def a_group_that_is_started_anew_has_a_wire_of_its_own(wire):
    assert Channel(None, LONG_S).exchange("count", b"1")
    before = channel._wires[dist.group.WORLD]
    dist.barrier()
    dist.destroy_process_group()
    _start(wire.rank, wire.world_size, FOLDER / f"again{wire.world_size}")
    assert dist.group.WORLD not in channel._wires
    assert len(Channel(None, LONG_S).exchange("count", b"1")) == wire.world_size
    assert channel._wires[dist.group.WORLD] is not before


def a_failure_is_heard_by_all_and_the_next_exchange_is_right(wire):
    if wire.rank == 0:
        assert Channel().fail(ValueError("of rank 0"))
    else:
        with refused(PeerError, match="ValueError: of rank 0"):
            Channel().exchange("count", b"1")
    assert len(Channel(None, LONG_S).exchange("count", b"1")) == wire.world_size


def what_a_rank_said_arrives_although_it_has_ended(wire):
    assert_gathers(wire, 1 << 20)
    if wire.rank == wire.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for act in (assert_gathers, assert_sums):
        with refused(ConnectionError):
            act(wire, 8)


def a_rank_that_is_killed_in_a_large_sum_in_arenas_is_an_error_on_all_others(wire):
    a_rank_that_is_killed_in_a_large_sum_is_an_error_on_all_others(
        wire, near(wire, torch.ones(LARGE // 4))
    )


def a_rank_that_is_killed_in_a_large_sum_is_an_error_on_all_others(wire, flat=None):
    heard = FOLDER / f"heard{wire.world_size}"
    last = wire.world_size - 1
    if wire.rank == last:
        if os.fork() == 0:  # which has its connections no more
            while not heard.exists() and os.getppid():
                time.sleep(0.02)
            os._exit(0)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with refused(ConnectionError):
        while True:
            wire.sum(torch.ones(LARGE // 4) if flat is None else flat, LONG_S)
    heard.touch()


CLAIMS = [
    everyone_gets_everyones_message_of_any_length,
    a_sum_is_right_for_every_dtype_and_length,
    a_sum_has_the_same_bits_on_every_rank,
    what_lies_in_arenas_is_summed_there_and_nothing_of_it_is_sent,
    a_sum_in_arenas_has_the_same_bits_on_every_rank,
    a_channels_memory_is_in_the_arena,
    what_lies_elsewhere_on_one_rank_is_sent_by_all,
    sums_in_arenas_that_do_not_fit_are_an_error_on_every_rank,
    what_others_may_still_read_is_kept_when_a_sum_is_given_up,
    an_interrupt_of_a_sum_in_arenas_is_an_error_and_never_wrong_numbers,
    memory_goes_back_to_the_system_and_not_from_a_forked_child,
    memory_takes_no_file_and_does_not_go_with_what_was_there_before,
    processes_that_cannot_read_each_others_arenas_send,
    who_comes_late_takes_nothing_that_was_meant_for_another_operation,
    what_was_sent_half_belongs_to_nobody_after_it_is_given_up,
    ranks_that_do_different_things_all_get_an_error_at_once,
    who_waits_hears_at_once_why_another_gives_up,
    an_interrupt_while_it_waits_leaves_the_next_operation_right,
    an_interrupt_at_any_time_is_an_error_and_never_wrong_numbers,
    a_handlers_own_timeout_error_is_not_taken_for_the_networks,
    threads_take_turns,
    a_forked_child_has_none_of_the_connections,
    several_groups_speak_at_once,
    a_model_of_a_part_of_the_processes_waits_for_no_other,
    processes_that_cannot_reach_each_other_use_torchs_collectives,
    a_stranger_who_calls_is_not_taken,
    who_gave_up_its_first_call_is_taken_at_its_second,
    a_group_that_is_started_anew_has_a_wire_of_its_own,
    a_failure_is_heard_by_all_and_the_next_exchange_is_right,
]
LAST = [  # which end a process
    what_a_rank_said_arrives_although_it_has_ended,
    a_rank_that_is_killed_in_a_large_sum_is_an_error_on_all_others,
    a_rank_that_is_killed_in_a_large_sum_in_arenas_is_an_error_on_all_others,
]
FOLDER = Path(sys.argv[-1])


def _start(rank, world_size, meet):
    dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=world_size)


def _become(rank, world_size, claims):
    """Calls each claim, and writes down what is wrong with it."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    _start(rank, world_size, FOLDER / f"meet{world_size}{claims[0].__name__}")
    wire = connected()
    with open(FOLDER / f"{world_size}.{rank}", "a") as said:
        for claim in claims:
            begun_s = time.monotonic()
            try:
                claim(wire)
                wrong = ""
            except BaseException:
                wrong = traceback.format_exc()
            said.write(f"{claim.__name__}|{time.monotonic() - begun_s:.1f}|{wrong!r}\n")
            said.flush()
            if wrong:
                return  # the others hear of it: see their reports
    gc.collect()
    if claims is CLAIMS:
        dist.destroy_process_group()


def main():
    torch.set_num_threads(1)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most > 2000:  # sockets of numbers that select cannot take
        resource.setrlimit(resource.RLIMIT_NOFILE, (2000, most))
        for _ in range(1100):
            os.open(os.devnull, os.O_RDONLY)
    for world_size, claims in itertools.product(SIZES, [CLAIMS, *([last] for last in LAST)]):
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    _become(rank, world_size, claims)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
