import pytest
from torch import nn

from wraploop import DataParallel, DistributedModel, ThreadedCPUParallel, wrap


def test_a_wrapper_is_chosen_by_name_mapping_or_list_from_the_outside_in():
    model = nn.Linear(3, 1)
    assert wrap(model, None) is model
    assert isinstance(wrap(model, "DataParallel"), DataParallel)
    stack = wrap(model, ["DistributedModel", {"name": "ThreadedCPUParallel", "threads": 2}])
    assert isinstance(stack, DistributedModel)
    assert isinstance(stack.module, ThreadedCPUParallel)
    assert stack.module.module is model


def test_a_mapping_of_models_is_wrapped_model_by_model():
    models = wrap({"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}, "ThreadedCPUParallel")
    assert list(models) == ["generator", "critic"]
    assert all(isinstance(model, ThreadedCPUParallel) for model in models.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Threaded", "no wrapper 'Threaded'. There are ThreadedCPUParallel, DataParallel, Dist"),
        ({"threads": 2}, 'need a "name"'),
        (
            {"name": "DataParallel", "threads": 2},
            "DataParallel has no option 'threads'. It has dev",
        ),
        (["ThreadedCPUParallel", "x"], "no wrapper 'x'"),
    ],
)
def test_an_unknown_name_or_option_lists_what_there_is(spec, message):
    with pytest.raises(ValueError, match=message):
        wrap(nn.Linear(1, 1), spec)


@pytest.mark.parametrize(("model", "spec"), [(nn.Linear(1, 1), 3), ("model", None)])
def test_what_is_no_spec_or_no_model_is_refused(model, spec):
    with pytest.raises(TypeError, match=r"got"):
        wrap(model, spec)
