"""What `scripts/predict` runs; see benchmark/scaling.py for the model of a step."""

from benchmark import server

if __name__ == "__main__":
    server.start()  # it imports torch while this does too

    from benchmark import prediction

    prediction.main()
