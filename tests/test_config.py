"""Configs, of Hydra and others: what they make, and what they cannot."""

import sys
from difflib import ndiff
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from wraploop import DataParallel, DistributedModel, ThreadedCPUParallel, wrap

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def compose(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    with hydra.initialize_config_dir(str(EXAMPLES / "configs"), version_base="1.3"):
        yield lambda *overrides: hydra.compose("digits", [*overrides])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("plain", [nn.Sequential]),
        ("threads", [ThreadedCPUParallel, nn.Sequential]),
        ("distributed", [DistributedModel, nn.Sequential]),
        ("stack", [DistributedModel, ThreadedCPUParallel, nn.Sequential]),
    ],
)
def test_hydra_makes_wrappers_around_what_it_makes(compose, name, kinds):
    config = compose(f"wrapper={name}")
    torch.manual_seed(0)
    plain = instantiate(config.model)
    torch.manual_seed(0)
    model = made = instantiate(config.wrapper)(instantiate(config.model))
    for kind in kinds[:-1]:
        assert type(made) is kind
        made = made.module
    assert type(made) is kinds[-1]
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model(images), plain(images))


def test_hydra_makes_wrappers_nested_in_one_another():
    text = """
    _target_: wraploop.DistributedModel
    module:
      _target_: wraploop.ThreadedCPUParallel
      threads: 3
      methods: [forward]
      module: {_target_: torch.nn.Linear, in_features: 3, out_features: 1}
    """
    model = instantiate(OmegaConf.create(yaml.safe_load(text)))
    assert isinstance(model, DistributedModel)
    assert isinstance(model.module, ThreadedCPUParallel)
    assert (model.module.threads, model.module.methods) == (3, ("forward",))
    assert model(torch.ones(4, 3)).shape == (4, 1)


def test_wrap_takes_the_containers_of_omegaconf():
    config = OmegaConf.create(
        {
            "none": None,
            "name": "DistributedModel",
            "options": {"name": "DataParallel", "device_ids": ["cpu", "cpu"]},
            "stack": ["DistributedModel", {"name": "ThreadedCPUParallel", "threads": "${two}"}],
            "two": 2,
        }
    )
    model = nn.Linear(3, 1)
    assert wrap(model, config.none) is model
    assert isinstance(wrap(model, config.name), DistributedModel)
    lanes = wrap(model, config.options)
    assert isinstance(lanes, DataParallel)
    assert lanes.devices == [torch.device("cpu")] * 2
    stack = wrap({"model": model}, config.stack)["model"]
    assert isinstance(stack, DistributedModel)
    assert isinstance(stack.module, ThreadedCPUParallel)
    assert stack.module.threads == 2


def test_one_process_and_several_differ_by_one_line_of_config():
    for plain, distributed in [
        ("plain.yaml", "distributed.yaml"),
        ("threads.yaml", "stack.yaml"),
    ]:
        before, after = ((EXAMPLES / name).read_text() for name in (plain, distributed))
        lines = ndiff(before.splitlines(), after.splitlines())
        assert [line[0] for line in lines if line[0] in "+-"] == ["-", "+"]
        for text in (before, after):
            wrap(nn.Linear(1, 1), yaml.safe_load(text)["wrapper"])


THERE_ARE = "There are ThreadedCPUParallel, DataParallel, DistributedModel"


@pytest.mark.parametrize("container", [lambda spec: spec, OmegaConf.create])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "os.system"}, f"no wrapper 'os.system'. {THERE_ARE}"),
        ({"name": "torch.nn.DataParallel"}, "no wrapper 'torch.nn.DataParallel'"),
        ({"name": "wraploop.DataParallel"}, "no wrapper 'wraploop.DataParallel'"),
        ({"name": "ModelWrapper"}, "no wrapper 'ModelWrapper'"),
        ({"name": ["os.system"]}, "no wrapper"),
        ({"name": {"_target_": "os.system"}}, "no wrapper"),
        ({"name": None}, "no wrapper None"),
        ({"_target_": "os.system", "command": "true"}, 'need a "name"'),
        ({"name": "DataParallel", "_target_": "os.system"}, "has no option '_target_'"),
        ({"name": "DataParallel", "module": "os"}, "has no option 'module'"),
        (["DataParallel", {"name": "os.system"}], "no wrapper 'os.system'"),
    ],
)
def test_a_config_makes_nothing_but_wrappers(container, spec, message, monkeypatch):
    monkeypatch.setattr("os.system", pytest.fail)
    with pytest.raises(ValueError, match=message):
        wrap(nn.Linear(1, 1), container(spec))


def test_the_examples_read_yaml_that_makes_nothing():
    sources = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert "yaml.safe_load(" in sources["command_line.py"]
    for name, text in sources.items():
        loads = [word for word in ("yaml.load", "unsafe_load", "full_load", "eval(", "exec(")]
        assert not [word for word in loads if word in text.replace(".eval()", "")], name
