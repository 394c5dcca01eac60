import json

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from tests import forked, sharding
from tests.sharding import Words
from wraploop import shard


@pytest.fixture(scope="module", params=[2, 3])
def read(request, tmp_path_factory):
    """What each of so many processes has read."""
    folder = tmp_path_factory.mktemp("sharding")
    done = forked.call(sharding.main, [(request.param, folder)], folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    return json.loads(json.dumps(sharding.read()))


def joined(parts):
    """The batch that `parts`, of all ranks, make up."""
    first = parts[0]
    if isinstance(first, list) and first and isinstance(first[-1], list) and is_words(first[-1]):
        return [[item for part in same for item in part] for same in zip(*parts, strict=True)]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list) and all(isinstance(p, list) and is_container(first) for p in parts):
        return [joined(list(same)) for same in zip(*parts, strict=True)]
    return [item for part in parts for item in part]


def is_words(value):
    return bool(value) and isinstance(value[0], str)


def is_container(value):
    """Whether `value` stands for several things with rows, and not for rows."""
    return bool(value) and all(isinstance(part, list) for part in value)


@pytest.mark.parametrize("name", sharding.LOADERS)
def test_the_processes_together_read_what_one_reads_in_order(read, alone, name):
    for epoch, batches in enumerate(alone[name]):
        for number, batch in enumerate(batches):
            parts = [rank[name][epoch][number] for rank in read]
            whole = joined(parts)
            assert whole == batch, (epoch, number, parts)
        assert {len(rank[name][epoch]) for rank in read} == {len(batches)}


def test_two_loaders_at_once_read_what_they_would_in_one_process(read, alone):
    for number, pair in enumerate(alone["two at once"]):
        assert pair[0] != pair[1]
        for which, batch in enumerate(pair):
            assert joined([rank["two at once"][number][which] for rank in read]) == batch


def test_the_rows_of_a_batch_are_shared_out_as_evenly_as_can_be(read):
    for name in ("in order", "shuffled", "own batch sampler"):
        for batches in zip(*(rank[name][0] for rank in read), strict=True):
            sizes = [len(batch["number"]) for batch in batches]
            assert sizes == sorted(sizes, reverse=True)
            assert max(sizes) - min(sizes) <= 1


def test_workers_draw_other_numbers_in_every_process(read):
    drawn = [value for rank in read for batch in rank["noise"] for _, value in batch]
    assert len(drawn) == len(set(drawn)) == 8


def test_reading_leaves_random_states_alone_but_rank_0s_which_goes_on_as_one_process_would(
    read, alone
):
    assert read[0]["drawn afterwards"] == alone["drawn afterwards"]
    for rank, found in list(enumerate(read))[1:]:
        torch.manual_seed(rank)
        assert found["drawn afterwards"] == float(torch.rand(()))


def test_a_sharded_loader_has_the_loaders_length_and_attributes():
    loader = shard(DataLoader(Words(10), batch_size=4))
    assert (len(loader), loader.batch_size) == (3, 4)


def test_a_loader_that_shards_already_is_refused():
    sampler = DistributedSampler(Words(10), num_replicas=2, rank=0)
    with pytest.raises(ValueError, match="DistributedSampler, which cuts the data"):
        shard(DataLoader(Words(10), sampler=sampler))
