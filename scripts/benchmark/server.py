"""The server that processes are forked from, which has imported torch and computed nothing.

So each is as good as fresh, and starts at once.
"""

import multiprocessing
from multiprocessing import forkserver

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed", "wraploop.gan"])


def start() -> None:
    """Starts it, if it does not run; it ends with this process."""
    forkserver.ensure_running()
