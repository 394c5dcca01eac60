"""How the cores are used in the end; times are given, not measured."""

import pytest

from wraploop.wrappers.tuning import Split, Tuner

CALLS = 19  # within which it must have chosen
PLAIN, LANES = Split(1, 2), Split(2, 1)  # of two cores


def calls_until_chosen(tuner, seconds, has_backward=lambda call: True, most=1000):
    for call in range(most):
        if tuner.chosen is not None:
            return call
        split = tuner.next()
        tuner.note("forward", split, seconds("forward", split, call))
        if has_backward(call):
            tuner.note("backward", split, seconds("backward", split, call))
    raise AssertionError(f"none chosen in {most} calls")


@pytest.mark.parametrize("cores", [2, 3, 4, 16])
@pytest.mark.parametrize("has_backward", [True, False])
def test_the_fastest_is_chosen_soon(cores, has_backward):
    some = cores // 2
    for fastest in {(1, cores), (1, 1), (some, cores // some), (cores, 1)}:
        tuner = Tuner(cores)
        took = calls_until_chosen(
            tuner, lambda _, split, __, f=fastest: 1.0 + (split != f), lambda _: has_backward
        )
        assert tuner.chosen == fastest
        assert took <= CALLS


def test_one_core_is_used_plainly_at_once():
    assert Tuner(1).chosen == (1, 1)


def test_forward_and_backward_count_together():
    seconds = {"forward": {LANES: 1.0}, "backward": {LANES: 7.0, PLAIN: 1.0}}
    tuner = Tuner(2)
    calls_until_chosen(tuner, lambda part, split, _: seconds[part].get(split, 8.0))
    assert tuner.chosen == LANES


def test_what_gains_little_is_not_worth_another_split():
    tuner = Tuner(2)
    calls_until_chosen(tuner, lambda _, split, __: 1.0 if split == PLAIN else 0.95)
    assert tuner.chosen == PLAIN


@pytest.mark.parametrize("hindered", [PLAIN, LANES, Split(1, 1)])
def test_few_slow_calls_change_nothing(hindered):
    def seconds(_, split, call):
        return (10.0 if split == hindered and call % 6 < 2 else 1.0) / split.lanes

    tuner = Tuner(2)
    calls_until_chosen(tuner, seconds)
    assert tuner.chosen == LANES


@pytest.mark.parametrize("every", [2, 3, 4])
def test_it_settles_where_not_every_call_has_a_backward(every):
    tuner = Tuner(2)
    calls_until_chosen(
        tuner, lambda _, split, __: 1.0 / split.lanes, lambda call: call % every == 0
    )
    assert tuner.chosen == LANES
