"""Which number of lanes is chosen; times are given, not measured."""

import pytest

from wraploop.wrappers.tuning import Tuner

CALLS = 19  # within which it must have chosen


def calls_until_chosen(tuner, seconds, has_backward=lambda call: True, most=1000):
    for call in range(most):
        if tuner.chosen is not None:
            return call
        lanes = tuner.next()
        tuner.note("forward", lanes, seconds("forward", lanes, call))
        if has_backward(call):
            tuner.note("backward", lanes, seconds("backward", lanes, call))
    raise AssertionError(f"none chosen in {most} calls")


@pytest.mark.parametrize("most", [2, 3, 4, 16])
@pytest.mark.parametrize("has_backward", [True, False])
def test_the_fastest_is_chosen_soon(most, has_backward):
    for fastest in {1, most // 2, most}:
        tuner = Tuner(most)
        took = calls_until_chosen(
            tuner, lambda _, lanes, __, f=fastest: 1.0 + (lanes != f), lambda _: has_backward
        )
        assert tuner.chosen == fastest
        assert took <= CALLS


def test_forward_and_backward_count_together():
    seconds = {("forward", 1): 8.0, ("backward", 1): 1.0, ("forward", 2): 1.0, ("backward", 2): 7.0}
    tuner = Tuner(2)
    calls_until_chosen(tuner, lambda part, lanes, _: seconds[part, lanes])
    assert tuner.chosen == 2


def test_what_gains_little_is_not_worth_threads():
    tuner = Tuner(2)
    calls_until_chosen(tuner, lambda _, lanes, __: 1.0 if lanes == 1 else 0.95)
    assert tuner.chosen == 1


def test_few_slow_calls_change_nothing():
    for hindered in (1, 2):

        def seconds(_, lanes, call, hindered=hindered):
            return (10.0 if lanes == hindered and call % 6 < 2 else 1.0) / lanes

        tuner = Tuner(2)
        calls_until_chosen(tuner, seconds)
        assert tuner.chosen == 2


@pytest.mark.parametrize("every", [2, 3, 4])
def test_it_settles_where_not_every_call_has_a_backward(every):
    tuner = Tuner(2)
    calls_until_chosen(tuner, lambda _, lanes, __: 1.0 / lanes, lambda call: call % every == 0)
    assert tuner.chosen == 2
