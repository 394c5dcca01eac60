import re
from pathlib import Path

import pytest

from tests import forked

EXPECTED = {
    "another batch": ("PeerError Rank 1 has another batch",) * 2,
    "another flag": ("PeerError Rank 1 has another batch",) * 2,
    "another shape": (
        "PeerError Rank 1 failed.*shapes cannot be mult",
        "RuntimeError mat1 and mat2",
    ),
    "another mode": (r"PeerError The processes do different things.*\(evaluation\)",) * 2,
    "another mode, own rows": (r"PeerError .*\(evaluation, not under torch.no_grad\(\)\)",) * 2,
    "another loss": ("PeerError Rank 1 has another gradient of the loss",) * 2,
    "no backward": ("PeerError The processes do different .*gradient of the loss.*the batch",) * 2,
    "an error in forward": ("PeerError Rank 1 failed.*KeyError", "KeyError"),
    "another exchange": ("PeerError The processes do different .*add numbers up.*the batch",) * 2,
    "another exchange, own rows": (
        "PeerError The processes do different .*add numbers up.*run Linear.forward",
    )
    * 2,
    "another of many values": (r"PeerError .*\[1\]\[900\] 3'.*\[1\]\[900\] 2'",) * 2,
    "another order of outputs": (r"""returned \["\['a'\]", .*returned \["\['b'\]", """,) * 2,
    "another attribute": ("PeerError .*'of rank 0'.*'of rank 1'",) * 2,
    "another name": ("PeerError The processes do .*'tanh'.*'relu'",) * 2,
    "another order of inputs": ("PeerError .*'abs'.*'tanh'.*'tanh'.*'abs'",) * 2,
    "another sum": (r"PeerError .*add numbers up \(whether 0 has.*\(whether 1 has",) * 2,
    "another value returned": (r"PeerError .*returned .*'\[1\] 3'.*returned .*'\[1\] 2'",) * 2,
    "a fork": ("ChildProcessError This process, a DataLoader's worker say, was forked",) * 2,
    "a sparse output": ("TypeError The output of 'forward' is stored as torch.sparse_coo",) * 2,
    "the same rows": ("ValueError Every process has passed the same 6 rows.*shard",) * 2,
    "the same noise": ("ValueError Every process has drawn the same random numbers",) * 2,
    "another parameter": ("PeerError Rank 1 has another parameter '(weight|bias)'",) * 2,
    "another parameter, whole batch": ("PeerError Rank 1 has another parameter 'weight'",) * 2,
    "another parameter, between looks": ("PeerError Rank 1 has another parameter 'weight'",) * 2,
    "a step left out": ("PeerError Rank 1 has another parameter '(weight|bias)'",) * 2,
    "another row": ("PeerError Rank 1 has another parameter 'weight'",) * 2,
    "another buffer": ("PeerError Rank 1 has another buffer 'running_mean'",) * 2,
    "another buffer, own rows": ("PeerError Rank 1 has another buffer 'running_mean'",) * 2,
    "another frozen": (r"PeerError The processes do different .*6 of 6 require.*4 of 6 require",)
    * 2,
    "another frozen, own rows": (
        r"PeerError The processes do different .*4 of 4 require.*2 of 4 require",
    )
    * 2,
    "another layer": ("PeerError Rank 1 has another kind of layers",) * 2,
    "another layer, own rows": ("PeerError Rank 1 has another kind of layers",) * 2,
    "another order of steps": (r"PeerError .*have left, 2 of 4 \(#\w+\)",) * 2,
    "another of two models": (
        r"PeerError .*rank 0: begin .*, model \d.*rank 1: begin .*, model \d",
    )
    * 2,
    "another graph": ("PeerError The processes do different ",) * 2,
    "another graph, own rows": (r"PeerError The processes do different .*in buckets",) * 2,
    "wrapped twice": ("ValueError The model is a DistributedModel already",) * 2,
    "another dtype": ("PeerError ",) * 2,
    "another option": ("ValueError .*reduction='mean', where rank 1 has .*reduction='sum'",) * 2,
    "another model": (r"ValueError .*weight' \(1, 3\).*rank 1 has parameter 'weight' \(1, 4\)",)
    * 2,
    "another dropout": (r"ValueError .*Dropout\(.*p=0.0.*rank 1 has .*Dropout\(.*p=0.1",) * 2,
}


@pytest.fixture(scope="module")
def got():
    done = run(2)
    assert "ValueError: which ends the script" in done.stderr, done.stderr
    return by_fault(done)


def run(processes):
    return forked.run(Path(__file__).with_name("faults.py"), processes=processes)


def by_fault(done):
    """What each rank got, and in how many seconds, by fault."""
    found: dict[str, dict[int, tuple[float, str]]] = {}
    for line in done.stdout.splitlines():
        rank, name, seconds, text = line.split("|", 3)
        found.setdefault(name, {})[int(rank)] = (float(seconds), text)
    return found


def test_a_fault_is_an_error_on_every_rank_at_once_and_the_next_step_is_right(got):
    for name, messages in EXPECTED.items():
        for rank, message in enumerate(messages):
            seconds, text = got[name][rank]
            assert re.search(message, text), (name, rank, text)
            assert seconds < 5, (name, rank)
            for after in (f"after {name}", f"after {name}, own rows"):
                assert got[after][rank][1] == "nothing", (after, rank)


def test_running_statistics_are_the_same_where_batch_norms_normalise_apart(got):
    assert [text for _, text in got["statistics apart"].values()] == ["nothing"] * 2


def test_rounding_errors_are_no_fault(got):
    assert [text for _, text in got["other rounding"].values()] == ["nothing"] * 2


def test_one_rank_may_evaluate_alone_what_sets_a_buffer(got):
    assert [text for _, text in got["an evaluation alone"].values()] == ["nothing"] * 2


def test_each_rank_may_name_a_device_of_its_own(got):
    assert [text for _, text in got["a device of its own"].values()] == ["nothing"] * 2


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_time_limit(got):
    seconds, text = got["no coming"][0]
    assert re.search(r"Rank 0 has waited 3.*rank 1 did not come; it is at .*faults.py:\d+", text)
    assert 2 < seconds < 8
    seconds, text = got["no adding up"][0]
    assert re.search("Rank 0 has waited 3.*at: add numbers up.*rank 1 did not come", text)
    assert 2 < seconds < 8


def test_an_exception_that_ends_one_process_is_told_to_the_others(got):
    _, text = got["an end"][0]
    assert re.search("PeerError Rank 1 failed.*ValueError: which ends the script", text), text


def test_what_is_wrong_on_two_of_three_is_an_error_on_all():
    found = by_fault(run(3))
    for name, message in {
        "no rows, and the same": "ValueError Every process has passed the same 4 rows",
        "after no rows": "nothing",
        "in step again": "ValueError .*the same 4 rows.*batch='global' after this one",
        "and drew": "ValueError .*the same random numbers.*batch='global' takes them away",
    }.items():
        texts = [text for _, text in found[name].values()]
        assert len(texts) == 3
        assert all(re.match(message, text) for text in texts), (name, texts)
