"""What `scripts/bench` runs; see benchmark/command.py.

The processes of the benchmark import this too, and should import no more than they need.
"""

from benchmark import server

if __name__ == "__main__":
    server.start()  # it imports torch while this does too

    from benchmark import command

    command.main()
