from pathlib import Path

import pytest

from tests.forked import run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("config", ["threads", "data_parallel"])
def test_the_gan_runs_under_every_config(config):
    done = run(EXAMPLES / "digits_gan.py", "--config", EXAMPLES / f"{config}.yaml", "--epochs", 1)
    assert done.returncode == 0, done.stderr


def test_the_gan_runs_in_three_processes_with_a_batch_that_does_not_divide():
    arguments = ("--wrapper", "DistributedModel", "--epochs", 1, "--batch-size", 512)
    done = run(EXAMPLES / "digits_gan.py", *arguments, processes=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GANStep") == 1  # rank 0 only


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--wrapper", "Threads"), "There is no wrapper 'Threads'. There are ThreadedCPUParallel"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml: No such file or directory"),
        (("--device", "cuda"), "unrecognized arguments: --device cuda"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(arguments, message):
    done = run(EXAMPLES / "digits_classifier.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
