"""What the examples' command lines share: choosing a wrapper, plain errors, Ctrl-C.

    --wrapper ThreadedCPUParallel      by name; None for no wrapper
    --config examples/threads.yaml     or by a line of a YAML file
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from wraploop import processes, wrap


def parse(description: str | None, epochs: int, batch_size: int) -> argparse.Namespace:
    """The options; `wrapper` is what `wraploop.wrap` takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--wrapper", metavar="NAME", default="None", help="what runs the model")
    where.add_argument("--config", metavar="FILE", type=Path, help="YAML file with a `wrapper` line")
    parser.add_argument("--epochs", metavar="N", type=int, default=epochs)
    parser.add_argument("--batch-size", metavar="ROWS", type=int, default=batch_size)
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to leave the results")
    with open(os.devnull, "w") as nowhere:
        silence = contextlib.redirect_stderr(nowhere)
        with contextlib.nullcontext() if processes.is_main_process() else silence:
            options = parser.parse_args()
            for name in ("epochs", "batch_size"):
                if getattr(options, name) < 1:
                    parser.error(f"--{name.replace('_', '-')} is at least 1")
    options.wrapper = None if options.wrapper == "None" else options.wrapper
    if options.config:
        options.wrapper = read_config(options.config)
    return options


def read_config(path: Path):
    """What stands after `wrapper:` in a YAML file."""
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        refuse(f"--config {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        refuse(f"--config {path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(config, dict) or list(config) != ["wrapper"]:
        refuse(f"--config {path}: expected one key, `wrapper`, and got {config!r}")
    return config["wrapper"]


def wrapped(models, spec):
    """The models, run by the wrapper that `spec` names."""
    try:
        return wrap(models, spec)
    except (ValueError, TypeError) as error:
        refuse(" ".join(str(error).split()))


def refuse(message: str):
    """Ends the program for a mistake of its user: one line, once."""
    if processes.is_main_process():
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[], None]) -> None:
    """Runs `main`; Ctrl-C ends it at once, with one line, in whichever process it arrives."""
    interrupted = False

    def interrupt(*_):
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except BaseException:
        if not interrupted:
            raise
        if processes.is_main_process():
            print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(130)  # waits neither for threads nor for other processes
