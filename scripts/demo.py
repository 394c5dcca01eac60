"""The main job: examples/digits_gan.py under every wrapper, and a comparison of the runs.

Each run is a process of its own, or two under torchrun, with the same step file. Fails if after
50 steps a parameter is further than 1e-9 from that of the run without a wrapper.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from wraploop.images import image_grid
from wraploop.plots import save_figure

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TOLERANCE = 1e-9
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
HEADER = (
    *("wrapper", "processes", "threads each", "seconds/epoch", "critic loss", "generator loss"),
    *("differs after 50 steps", "at the end"),
)
GRACE_S = 35  # torchrun kills its workers after 30


@dataclass
class Run:
    """One training of the GAN, and how it is started."""

    name: str
    config: str
    launcher: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def list_runs():
    devices = torch.cuda.device_count()
    lanes = f"--config={EXAMPLES}/data_parallel.yaml"
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    if devices < 2:  # both processes on the CPU rather than on one device
        share["CUDA_VISIBLE_DEVICES"] = ""
    return [
        Run("no wrapper", f"--config={EXAMPLES}/plain.yaml"),
        Run("ThreadedCPUParallel", f"--config={EXAMPLES}/threads.yaml"),
        Run("DataParallel", "--wrapper=DataParallel" if devices else lanes),
        Run("DistributedModel", f"--config={EXAMPLES}/distributed.yaml", TORCHRUN, share),
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", metavar="N", type=int, default=6, help="ten passes each")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=ROOT / "demo")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)

    begun_s = time.perf_counter()
    runs, results = list_runs(), {}
    for index, run in enumerate(runs, start=1):
        say(f"{index} of {len(runs)}: {run.name}")
        out = options.out / f"{run.name.replace(' ', '_')}.pt"
        out.unlink(missing_ok=True)
        train(run, [f"--epochs={options.epochs}", f"--out={out}"])
        results[run.name] = torch.load(out)
    draw_digits(results, options.out / "digits.png")
    draw_losses(results, options.out / "losses.png")
    print_table(results)
    print(f"\ngenerated digits beside real ones: {options.out / 'digits.png'}")
    print(f"loss curves over each other:       {options.out / 'losses.png'}")
    print(f"all of it took {time.perf_counter() - begun_s:.0f} seconds")
    check(results)


def train(run, arguments):
    """Trains in a process of its own; if that is interrupted or fails, so is this."""
    command = [sys.executable, *run.launcher, str(EXAMPLES / "digits_gan.py"), run.config]
    quiet_bars = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [*command, *arguments],
        env={**os.environ, **quiet_bars, **run.environment},
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C comes from here alone
    )
    passing = threading.Event()
    passing.set()
    threading.Thread(target=pass_on, args=(process.stderr, passing), daemon=True).start()
    try:
        status = process.wait()
    except KeyboardInterrupt:
        passing.clear()  # what a launcher says when it is interrupted
        end(process)
        raise
    if status:
        fail(f"{run.name} ended with status {status}; its own words are above.")


def pass_on(stream, passing):
    """Copies a run's progress bars and errors to our own, as they come."""
    while text := os.read(stream.fileno(), 65536):
        if passing.is_set():
            sys.stderr.buffer.write(text)
            sys.stderr.flush()


def end(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


# The comparison


def difference(state, plain):
    """The largest difference of any parameter or buffer, relative to its largest entry."""
    return max(
        ((state[name] - value).abs().max() / value.abs().max()).item()
        for name, value in plain.items()
        if value.is_floating_point()
    )


def print_table(results):
    plain = results["no wrapper"]
    rows = [HEADER, *(row(name, result, plain) for name, result in results.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *cells in rows:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([f"{name:<{widths[0]}}", *aligned]))
    print(
        f"\n{len(plain['losses']['critic_loss'])} steps in float64; an epoch is ten passes over "
        "1,797 images, and the losses are those of the last.\nDifferences are the largest of any "
        "parameter or buffer from the run without a wrapper, relative to\nits largest entry; "
        "training amplifies rounding. The same step file in every run: examples/gan_step.py,\n"
        f"sha256 {plain['step_file_sha256']}"
    )


def row(name, result, plain):
    """One line of the table."""
    epoch = slice(-result["steps_per_epoch"], None)
    losses = [torch.tensor(each[epoch]).mean().item() for each in result["losses"].values()]
    differences = [
        "-" if result is plain else f"{difference(state, plain['states'][when]):.1e}"
        for when, state in result["states"].items()
    ]
    return (
        name,
        str(result["processes"]),
        str(result["threads"]),
        f"{result['seconds_per_epoch']:.2f}",
        *(f"{loss:.6f}" for loss in losses),
        *differences,
    )


def check(results):
    plain = results["no wrapper"]
    for name, result in results.items():
        if result["step_file_sha256"] != plain["step_file_sha256"]:
            fail(f"the step file changed before the run of {name}.")
        worst = difference(result["states"]["early"], plain["states"]["early"])
        if not worst < TOLERANCE:
            fail(f"{name} differs by {worst:.1e} after 50 steps; {TOLERANCE:.0e} is allowed.")


# Pictures


def draw_digits(results, path):
    digits: Any = load_digits()
    real = torch.tensor(digits.images[:64])[:, None] / 8 - 1
    panels = {"real digits": real} | {name: r["images"] for name, r in results.items()}
    figure = Figure(figsize=(4 * len(panels), 4.4), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(panels))
    for axis, (name, images) in zip(axes, panels.items(), strict=True):
        grid = image_grid((1 - images) / 2)
        axis.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(name if images is real else f"generated: {name}")
        axis.axis("off")
    save_figure(path, figure)


def draw_losses(results, path):
    figure = Figure(figsize=(13, 4.5), layout="constrained", dpi=100)
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("critic_loss", "generator_loss"), strict=True):
        for width, (run, result) in zip((8, 5, 2.5, 1), results.items(), strict=True):
            axis.plot(result["losses"][name], linewidth=width, label=run)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.legend()
    save_figure(path, figure)


def say(message):
    print(f"demo: {message}", file=sys.stderr, flush=True)


def fail(message):
    say(message)
    raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        say("interrupted")
        raise SystemExit(130) from None
