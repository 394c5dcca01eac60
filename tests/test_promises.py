"""The promise of every wrapper: the step against it is the step against the plain model."""

import pytest

from tests.promise import Wrap, at_most, differences, expected, snapshots
from tests.ranks import CONFIGURATIONS, LOCAL, failures
from tests.steps import STEPS
from wraploop import DataParallel, ThreadedCPUParallel

IN_PROCESS: dict[str, Wrap] = {
    "threads2": lambda m, methods: ThreadedCPUParallel(m, threads=2, methods=methods),
    "threads3": lambda m, methods: ThreadedCPUParallel(m, threads=3, methods=methods),
    "threads5": lambda m, methods: ThreadedCPUParallel(m, threads=5, methods=methods),
    "devices2": lambda m, methods: DataParallel(m, device_ids=["cpu"] * 2, methods=methods),
}
TIMEOUT_S = 30
KEPT = [name for name, step in STEPS.items() if not step.refused]
REFUSED = [name for name, step in STEPS.items() if step.refused]

# Every step under one wrapper of each kind; under the others every seventh, or all with --all.
QUICK = ("threads2", "DistributedModel-2")


def sampled(configurations, names):
    return [
        pytest.param(c, names[::7] if sample else names, id=f"{c}{'-sample' * sample}", marks=marks)
        for c in configurations
        for sample, marks in ([(0, ())] if c in QUICK else [(1, ()), (0, pytest.mark.slow)])
    ]


def each(configurations, names):
    return [
        pytest.param(c, name, id=f"{c}-{name}", marks=() if quick else pytest.mark.slow)
        for c in configurations
        for number, name in enumerate(names)
        for quick in [c in QUICK or number % 7 == 0]
    ]


@pytest.mark.parametrize(("configuration", "names"), sampled(CONFIGURATIONS, list(STEPS)))
def test_in_processes_every_step_is_the_plain_step(configuration, names, tmp_path):
    found = failures(configuration, tmp_path, names)
    report = "\n".join(f"--- {name}: {wrong}" for name, wrong in found.items())
    assert not found, f"{len(found)} of {len(names)} steps: {', '.join(found)}\n{report}"


QUICK_LOCAL = ("mean-local-3", "sum-local-2")


@pytest.mark.parametrize(
    "configuration",
    [pytest.param(c, marks=() if c in QUICK_LOCAL else pytest.mark.slow) for c in LOCAL],
)
def test_with_rows_of_its_own_in_each_process_every_separable_step_is_the_plain_step(
    configuration, tmp_path
):
    reduction, _, _ = configuration.partition("-")
    names = [name for name in KEPT if STEPS[name].local == reduction]
    found = failures(configuration, tmp_path, names)
    report = "\n".join(f"--- {name}: {wrong}" for name, wrong in found.items())
    assert not found, f"{len(found)} of {len(names)} steps: {', '.join(found)}\n{report}"


@pytest.mark.parametrize(("wrapper", "name"), each(IN_PROCESS, KEPT))
def test_the_step_against_the_wrapper_is_the_plain_step(wrapper, name):
    step = STEPS[name]
    expected(name)
    with at_most(TIMEOUT_S, f"{name} under {wrapper}"):
        wrong = differences(step, snapshots(step, IN_PROCESS[wrapper]))
    assert not wrong, wrong


@pytest.mark.parametrize(("wrapper", "name"), each(IN_PROCESS, REFUSED))
def test_what_cannot_be_the_plain_step_is_refused(wrapper, name):
    step = STEPS[name]
    expected(name)
    with at_most(TIMEOUT_S, f"{name} under {wrapper}"):
        with pytest.raises(Exception, match=step.refused):
            snapshots(step, IN_PROCESS[wrapper])
