"""How processes start, and how they end. What is launched has no rank in it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TORCHRUN = ("-m", "torch.distributed.run")
ACCELERATE = ("-m", "accelerate.commands.launch")
ACCELERATE_GIVEN = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
WITHIN_S = 15


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, as in a terminal
    )


def results(started):
    """The numbers that each process has printed, by rank, and what stands in stderr."""
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    found = printed(out)
    assert sorted(rank for rank, _, _ in found) == list(range(len(found))), out
    assert all(world_size == len(found) for _, world_size, _ in found), out
    return [numbers for _, _, numbers in sorted(found)], err


def printed(out):
    """What processes have printed, if in the midst of a line of another's too."""
    return [json.loads(text) for text in re.findall(r"\[\d+, \d+, \[.*?\]\]", out)]


def assert_gives_the_same(started, alone):
    ranks, err = results(started)
    assert len(ranks) == 2
    for numbers in ranks:
        torch.testing.assert_close(numbers, alone, rtol=1e-10, atol=1e-12)
    assert err == ""


def test_one_script_gives_the_same_under_python_torchrun_and_in_a_notebook():
    script = TESTS / "launched.py"
    started = [
        start(script),
        start(*TORCHRUN, "--nproc-per-node", 2, script),
        start(TESTS / "in_a_notebook.py"),
    ]
    (alone,), err = results(started[0])
    assert err == ""
    for several in started[1:]:
        assert_gives_the_same(several, alone)


@pytest.mark.slow
def test_one_script_gives_the_same_under_accelerate_launch():
    script = TESTS / "launched.py"
    options = ("--multi_gpu", "--num_processes", 2, "--main_process_port", 0)
    several = start(*ACCELERATE, *options, *ACCELERATE_GIVEN, script)
    (alone,), _ = results(start(script))
    assert_gives_the_same(several, alone)


@pytest.mark.slow
def test_two_nodes_meet_at_an_address():
    meet = ("--nnodes", 2, "--rdzv-backend", "static", "--master-port", _free_port())
    nodes = [
        start(*TORCHRUN, *meet, "--node-rank", i, "--nproc-per-node", n, TESTS / "launched.py")
        for i, n in enumerate((2, 1))
    ]
    (alone,), _ = results(start(TESTS / "launched.py"))
    found = []
    for node in nodes:
        out, err = node.communicate(timeout=120)
        assert (node.returncode, err) == (0, "")
        found += printed(out)
    assert sorted((rank, world_size) for rank, world_size, _ in found) == [(0, 3), (1, 3), (2, 3)]
    for _, _, numbers in found:
        torch.testing.assert_close(numbers, alone, rtol=1e-10, atol=1e-12)


def _free_port():
    """One that the system has just given, and so is unlikely to give again."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclass
class Ended:
    code: int
    seconds: float
    err: str
    """stderr without torchrun's own, which comes after"""
    summary: str
    """torchrun's own"""


def end(what, count, sent=None):
    """Starts `ending.py`, and says how it ended, after a signal if one is to be sent."""
    started = start(*TORCHRUN, "--nproc-per-node", count, TESTS / "ending.py", what)
    assert started.stdout
    ranks = [int(started.stdout.readline()) for _ in range(count)]
    begun_s = time.monotonic()
    if sent:
        os.killpg(started.pid, sent)
    _, err = started.communicate(timeout=60)
    seconds = time.monotonic() - begun_s
    for process in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not re.search("Warning|Exception ignored|destroy_process_group", err)
    lines = err.splitlines()
    own = [line for line in lines if line.startswith("[rank")]
    return Ended(started.returncode, seconds, "\n".join(own), err.split(own[-1])[-1] if own else "")


def assert_ends_with_the_traceback_of(rank, ended):
    tracebacks = ended.err.split(f"[rank{rank}]: Traceback (most recent call last):\n")
    assert len(tracebacks) == 2, ended.err
    own = tracebacks[1].splitlines()
    assert all(line.startswith(f"[rank{rank}]: ") for line in own), ended.err
    assert "ending.py" in tracebacks[1]
    assert "raise self._error" not in tracebacks[1]  # a frame of the hook
    return tracebacks[0].splitlines(), own[-1]


def test_an_exception_in_one_process_ends_all_and_its_traceback_is_last():
    ended = end("one", 2)
    assert ended.code == 1
    assert ended.seconds < WITHIN_S
    before, last = assert_ends_with_the_traceback_of(1, ended)
    assert last == "[rank1]: KeyError: 'sample 17'"
    assert before == [
        "[rank0]: PeerError: Rank 1 failed, so rank 0 cannot go on: KeyError: 'sample 17'"
    ]
    cause = ended.summary.split("Root Cause")[1]
    assert re.search(r"rank +: 1 .*ending\.py.*KeyError: 'sample 17'", cause, re.S)


@pytest.mark.slow
def test_ctrl_c_ends_all_with_one_traceback():
    ended = end("none", 2, signal.SIGINT)
    assert ended.code
    assert ended.seconds < WITHIN_S
    first = int(ended.err.split("]: Traceback")[0][-1])
    before, last = assert_ends_with_the_traceback_of(first, ended)
    assert last == f"[rank{first}]: KeyboardInterrupt"
    (line,) = before
    assert re.match(r"\[rank\d\]: (KeyboardInterrupt|PeerError: .*KeyboardInterrupt)", line)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_terminating_torchrun_ends_all_without_a_word(count):
    ended = end("none", count, signal.SIGTERM)
    assert ended.code
    assert ended.seconds < WITHIN_S
    assert ended.err == ""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_an_exception_ends_processes_that_are_busy_too(count):
    ended = end("busy", count)
    assert ended.code == 1
    assert ended.seconds < WITHIN_S
    before, last = assert_ends_with_the_traceback_of(count - 1, ended)
    assert last == f"[rank{count - 1}]: KeyError: 'sample 17'"
    assert before == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_an_exception_in_all_processes_is_a_whole_traceback_of_each(count):
    ended = end("all", count)
    assert ended.code == 1
    assert ended.seconds < WITHIN_S
    assert ended.err.count("Traceback (most recent call last)") == count
    last = re.findall(r"\[rank(\d)\]: KeyError: 'sample 17'", ended.err)[-1]
    assert re.search(rf"rank +: {last} ", ended.summary.split("Root Cause")[1])


@pytest.mark.slow
def test_an_exception_in_one_of_three_processes_is_a_line_from_each_other():
    before, last = assert_ends_with_the_traceback_of(2, end("one", 3))
    assert last == "[rank2]: KeyError: 'sample 17'"
    assert sorted(line[:17] for line in before) == ["[rank0]: PeerErro", "[rank1]: PeerErro"]
