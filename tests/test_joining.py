from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from wraploop.processes.joining import agreed_name


def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_nobody_goes_on_before_all_have_come():
    shared, within = store(), timedelta(seconds=30)
    each = [shared, *(TCPStore("127.0.0.1", shared.port) for _ in range(2))]
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(agreed_name, each[rank], rank, 3, within) for rank in (0, 2)]
        with pytest.raises(futures.TimeoutError):
            early[1].result(timeout=1)
        late = pool.submit(agreed_name, each[1], 1, 3, within)
        assert early[0].result() == early[1].result() == late.result()


@pytest.mark.parametrize(("rank", "whom"), [(0, "rank 1, 2"), (1, "rank 0")])
def test_who_does_not_come_is_named(rank, whom):
    with pytest.raises(TimeoutError, match=f"waited 1 s for {whom} to join. Every process must"):
        agreed_name(store(), rank, 3, timedelta(seconds=1))
