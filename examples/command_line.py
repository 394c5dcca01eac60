"""What the examples' command lines share: choosing a wrapper, plain errors, Ctrl-C.

`--wrapper ThreadedCPUParallel` chooses by name, `None` for no wrapper;
`--config examples/threads.yaml` by a line in a file, which may give options too.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from wraploop import processes, wrap


def parse(description: str | None, epochs: int, batch_size: int) -> argparse.Namespace:
    """The options; `wrapper` is what `wraploop.wrap` takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--wrapper", metavar="NAME", default="None", help="what runs the model")
    where.add_argument("--config", metavar="FILE", type=Path, help="YAML with a `wrapper` line")
    parser.add_argument("--epochs", metavar="N", type=int, default=epochs)
    parser.add_argument("--batch-size", metavar="ROWS", type=int, default=batch_size)
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--checkpoints", metavar="FOLDER", help="goes on from what is in it")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to leave the results")
    parser.error = refuse
    options = parser.parse_args()
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            refuse(f"--{name.replace('_', '-')} is at least 1")
    options.wrapper = None if options.wrapper == "None" else options.wrapper
    if options.config:
        options.wrapper = read_config(options.config)
    return options


def read_config(path: Path) -> Any:
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


def wrapped(models: Any, spec: Any) -> Any:
    """The models, run by the wrapper that `spec` names."""
    try:
        return wrap(models, spec)
    except (ValueError, TypeError) as error:
        refuse(" ".join(str(error).split()))


def refuse(message: str) -> NoReturn:
    """Ends the program for a mistake of its user: one line, from one process."""
    if processes.is_main_process():
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # torchrun ends all with the first, which should be the one that speaks
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
