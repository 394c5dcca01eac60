import ast
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.wires import CLAIMS, LAST, SIZES
from wraploop.processes.links import GIVEN_UP, GivenUpError, Incoming, Outgoing
from wraploop.processes.wire import Wire

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """What is wrong with each claim, by its name and the number of processes; and what they say."""
    folder = tmp_path_factory.mktemp("wires")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.wires", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, err = process.communicate(timeout=180)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    found: dict[tuple[str, int], dict[int, str]] = {}
    for size in SIZES:
        for rank in range(size):
            for line in (folder / f"{size}.{rank}").read_text().splitlines():
                claim, _, text = line.split("|", 2)
                found.setdefault((claim, size), {})[rank] = ast.literal_eval(text)
    return found, err


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("claim", [claim.__name__ for claim in CLAIMS])
def test_on_the_wire(claim, size, wrong):
    found, err = wrong
    assert found.get((claim, size)) == {rank: "" for rank in range(size)}, err


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("claim", [claim.__name__ for claim in LAST])
def test_at_the_end(claim, size, wrong):
    found, err = wrong
    assert found.get((claim, size)) == {rank: "" for rank in range(size - 1)}, err


def test_a_head_that_came_too_early_and_has_no_rest_is_not_waited_for():
    (own, theirs), (to, unread) = socket.socketpair(), socket.socketpair()
    wire = Wire(0, 2, [Outgoing(to, 1)], [Incoming(own, 1)])
    with theirs, unread:
        early = Outgoing(theirs, 0)
        early.put(GIVEN_UP, 2, [])
        early.push()
        begun_s = time.monotonic()
        for _ in range(2):
            with pytest.raises(GivenUpError):
                wire.gather([b"1"], 9.0)
        assert time.monotonic() - begun_s < 9
    wire.close()
