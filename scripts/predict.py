"""What `scripts/predict` runs; see benchmark/scaling.py for the model of a step."""

import os

from benchmark import server

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    server.start()  # it imports torch while this does too

    from benchmark import prediction

    prediction.main()
