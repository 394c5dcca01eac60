import pytest

from wraploop.events import (
    BackwardBegin,
    BackwardEnd,
    Cancel,
    CancelEpoch,
    CancelFit,
    CancelStep,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    StepBegin,
    StepEnd,
    graver,
)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (FitBegin, FitEnd),
        (EpochBegin, EpochEnd),
        (StepBegin, StepEnd),
        (BackwardBegin, BackwardEnd),
    ],
)
def test_what_begins_names_its_end(begin, end):
    assert begin.end is end
    assert end.end is None


def test_the_beginning_of_the_loss_has_no_end():
    assert LossBegin.end is None
    assert issubclass(LossBegin, Event)


def test_a_cancellation_carries_its_reason():
    cancel = CancelFit("the loss is NaN")
    assert str(cancel) == cancel.reason == "the loss is NaN"
    assert cancel.source is None
    assert isinstance(cancel, Cancel)


def test_a_cancelled_fit_must_have_a_reason():
    with pytest.raises(TypeError, match="reason"):
        CancelFit()  # pyright: ignore[reportCallIssue]


def test_an_error_is_graver_than_a_cancellation_and_larger_cancellations_than_smaller():
    ranked = [CancelStep(), CancelEpoch(), CancelFit("done"), ValueError("wrong")]
    for index, lesser in enumerate(ranked):
        for greater in ranked[index + 1 :]:
            assert graver(lesser, greater) is greater
            assert graver(greater, lesser) is greater


def test_of_equals_the_first_is_graver():
    first, second = ValueError("first"), KeyError("second")
    assert graver(first, second) is first
    assert graver(None, second) is second
