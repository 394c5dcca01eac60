"""What `scripts/bench` runs; see benchmark/command.py.

The processes of the benchmark import this too, and should import no more than they need.
"""

import os

from benchmark import server

if __name__ == "__main__":
    # Idle threads sleep: where they spin, a busy machine makes plain torch 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    server.start()  # it imports torch while this does too

    from benchmark import command

    command.main()
