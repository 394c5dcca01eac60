"""What a notebook's cell does, to start `launched.py` in two processes."""

from accelerate import notebook_launcher

if __name__ == "__main__":
    import launched  # which lies beside it

    notebook_launcher(
        launched.main, num_processes=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0"
    )
