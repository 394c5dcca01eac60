"""Processes that are killed, told to end, or fail, and what becomes of training."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.loop import assert_same
from wraploop.checkpoint import newest, read

ROOT = Path(__file__).parents[1]
STEPS = 24  # of a run


def start(folder, faults, *, size=2, restarts=0, local=False):
    folder.mkdir(exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(faults))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    torchrun += ["--monitor-interval=0.1"]
    return subprocess.Popen(
        [*torchrun, str(ROOT / "tests" / "faulty.py"), str(folder), *["local"] * local],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, faults=(), **options):
    process = start(folder, list(faults), **options)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def end_of(folder):
    """What training has come to, random states included."""
    state = read(folder / "end")
    callbacks = state["callbacks"]
    kept = {name: callbacks[name] for name in callbacks if not name.startswith(("Fault", "Check"))}
    return {**state, "callbacks": kept}


def drawn(seed, size, count):
    """Kills at random: which rank, after which step, at once or while it saves."""
    draw = random.Random(seed)
    steps = sorted(draw.randrange(1, STEPS) for _ in range(count))
    return [
        {
            "kind": draw.choice(["kill", "kill soon"]),
            "rank": draw.randrange(size),
            "step": step,
            "within_s": draw.uniform(0, 0.05),
        }
        for step in steps
    ]


def happened(folder):
    return sum(1 for _ in folder.glob("fault_*"))


def end_through(folder, size=2, local=False):
    """What an undisturbed run comes to."""
    folder.mkdir()
    (folder / "faults.json").write_text("[]")
    done = forked.run(ROOT / "tests" / "faulty.py", folder, *["local"] * local, processes=size)
    assert done.returncode == 0, done.stderr
    return end_of(folder)


def tell(process, folder, number, pid=None):
    """Sends SIGTERM when a fault says that it is time; returns after how long all have ended."""
    while not (folder / f"fault_{number}").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    begun_s = time.monotonic()
    os.kill(pid() if pid else process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    return time.monotonic() - begun_s


def test_killed_it_comes_to_what_it_would_have_undisturbed(tmp_path):
    expected = end_through(tmp_path / "through")
    faults = [{"kind": "kill", "rank": 1, "step": 9}]
    status, _, err = run(tmp_path / "killed", faults, restarts=1)
    assert status == 0, err
    assert happened(tmp_path / "killed") == 1
    assert_same(end_of(tmp_path / "killed"), expected)


@pytest.mark.slow
def test_killed_and_told_to_end_it_comes_to_what_it_would_have_undisturbed(tmp_path):
    expected = end_through(tmp_path / "through")
    folder = tmp_path / "disturbed"
    faults = [
        {"kind": "kill", "rank": 1, "step": 9},
        {"kind": "tell", "rank": 1, "step": 13},
    ]
    assert tell(start(folder, faults, restarts=1), folder, 1) < 15
    latest = newest(folder / "checkpoints")
    assert latest is not None
    assert int(latest.name.removeprefix("step_")) >= 13  # it was saved when it was told
    status, _, err = run(folder, faults)
    assert status == 0, err
    assert happened(folder) == 2
    assert_same(end_of(folder), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "local"), [(2, False), (2, True), (3, False), (3, True)])
def test_it_does_so_whoever_is_killed_and_whenever(tmp_path, size, local, capsys):
    expected = end_through(tmp_path / "through", size=size, local=local)
    faults, folder = drawn(10 * size + local, size, 6), tmp_path / "killed"
    status, _, err = run(folder, faults, size=size, local=local, restarts=len(faults))
    assert status == 0, err
    assert happened(folder) == len(faults)
    assert_same(end_of(folder), expected)
    with capsys.disabled():
        print(f"\n{len(faults)} kills, {size} processes, {'local' if local else 'global'}: same")


@pytest.mark.slow
def test_one_process_that_is_told_to_end_takes_the_others_along(tmp_path):
    expected = end_through(tmp_path / "through")
    process = start(tmp_path / "told", [{"kind": "tell", "rank": 1, "step": 9}])
    assert tell(process, tmp_path / "told", 0, lambda: _child(process.pid)) < 15
    status, _, err = run(tmp_path / "told")
    assert status == 0, err
    assert_same(end_of(tmp_path / "told"), expected)


def _child(pid):
    """The process of the highest rank."""
    command = ["ps", "-o", "pid=", "--ppid", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True)
    return max(int(each) for each in listed.stdout.split())


ERRORS = {
    "raise": r"ValueError: which is the first error",
    "hang": r"rank 1 did not come; it is at .*faulty.py:\d+",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ERRORS)
def test_a_rank_that_fails_ends_all_with_its_error(tmp_path, kind):
    begun_s = time.monotonic()
    status, _, err = run(tmp_path, [{"kind": kind, "rank": 1, "step": 9}])
    ended_s = time.time() - float((tmp_path / "fault_0").read_text())
    assert status != 0
    assert ended_s < 20, time.monotonic() - begun_s
    assert re.search(ERRORS[kind], err), err
    assert newest(tmp_path / "checkpoints").name == "step_00000008"  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_nan_stops_every_rank_and_is_not_saved(tmp_path):
    status, out, err = run(tmp_path, [{"kind": "nan", "rank": 1, "step": 9}])
    assert status != 0 or out.count("stopped: ") == 2, (out, err)
    state = read(newest(tmp_path / "checkpoints"))  # type: ignore[arg-type]
    for weights in state["models"].values():
        assert all(torch.isfinite(each).all() for each in weights.values())


@pytest.mark.slow
def test_a_checkpoint_of_another_number_of_processes_goes_on(tmp_path):
    status, _, err = run(tmp_path, [{"kind": "kill", "rank": 0, "step": 15}])
    assert status != 0, err
    status, _, err = run(tmp_path, size=1)
    assert status == 0, err
    assert read(tmp_path / "end")["position"]["epoch"] == 4
