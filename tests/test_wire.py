import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wires import CLAIMS, LAST, SIZES

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
