import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROUNDS = 2
WAYS = ("plain", "ddp", "local")


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "scripts/bench.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    named = ("--ways", ",".join(WAYS), "--rounds", str(ROUNDS), "--out", folder)
    done = run("small-mlp", *named)
    assert done.returncode == 0, done.stderr
    return folder


def test_each_way_has_a_row_and_each_turn(out):
    rows = rows_of(out / "steps.csv")
    assert [(row["model"], row["way"]) for row in rows] == [("small-mlp", way) for way in WAYS]
    assert [row["processes"] for row in rows] == ["1", "2", "2"]
    assert len(rows_of(out / "rounds.csv")) == ROUNDS * len(WAYS)
    assert (out / "steps.png").stat().st_size > 0


@pytest.mark.parametrize(("column", "reference"), [("over_plain", "plain"), ("over_ddp", "ddp")])
def test_a_ratio_is_the_median_of_those_within_the_rounds(out, column, reference):
    ms = {way: [] for way in WAYS}
    for turn in rows_of(out / "rounds.csv"):
        ms[turn["way"]].append(float(turn["step_ms"]))
    for row in rows_of(out / "steps.csv"):
        pairs = zip(ms[reference], ms[row["way"]], strict=True)
        ratio = statistics.median(theirs / mine for theirs, mine in pairs)
        assert float(row[column]) == pytest.approx(ratio)
        assert float(row[f"{column}_q1"]) <= ratio * 1.001 <= float(row[f"{column}_q3"]) * 1.002


def test_the_short_table_has_the_same_ratios(out):
    lines = [line[2:-2].split(" | ") for line in (out / "steps.md").read_text().splitlines()]
    columns = {name: [line[i] for line in lines[2:]] for i, name in enumerate(lines[0][:7])}
    (local,) = (row for row in rows_of(out / "steps.csv") if row["way"] == "local")
    assert columns["model"] == ["small-mlp", "geometric mean"]
    assert columns["`local` over DDP"] == [f"{float(local['over_ddp']):.2f}"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counters are Linux's")
def test_processes_send_at_least_the_gradients_and_take_memory(out):
    gradients = 4 * (32 * 64 + 64 + 64 * 10 + 10)
    for row in rows_of(out / "steps.csv"):
        assert float(row["peak_mib"]) > 0
        if row["processes"] == "2":
            assert float(row["sent_bytes"]) >= 2 * gradients
