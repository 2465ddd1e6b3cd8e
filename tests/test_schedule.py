"""Schedules against the paper's table and their own rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transmamba_jax import schedule

TABLE_6 = {
    "v1": (2048,),
    "v2": (4096,),
    "v3": (6144,),
    "v4": (3072, 4096, 5120),
    "v5": (2048, 3072, 4096),
    "v6": (512, 1024, 2048),
    "v7": (2048, 4096, 6144),
    "v8": (0, 1024, 2048, 6144, 8192),
    "v9": (0, 128, 256, 512, 1024, 2048, 4096, 8192),
    "transformer": (8192,),
    "mamba2": (0,),
    "hybrid": (0, 0, 0, 0, 0, 0, 0, 8192),
    "log_spaced": (0, 128, 256, 512, 1024, 2048, 4096, 8192),
    "descending": (8192, 4096, 2048, 1024, 512, 256, 128, 0),
    "hybrid_first": (8192, 0, 0, 0, 0, 0, 0, 0),
}
ANY_DEPTH = ("log_spaced", "descending", "hybrid", "hybrid_first")


def test_named_schedules_at_the_papers_length() -> None:
    assert {name: schedule.named(name, 8192) for name in schedule.NAMED} == TABLE_6


def test_v9_scales_with_the_sequence() -> None:
    assert schedule.v9(1024) == (0, 16, 32, 64, 128, 256, 512, 1024)
    assert schedule.log_spaced(64, period=4) == (0, 16, 32, 64)


@pytest.mark.parametrize(
    ("name", "layers", "points"),
    [
        ("log_spaced", 4, (0, 16, 32, 64)),
        ("log_spaced", 2, (0, 64)),
        ("log_spaced", 1, (32,)),
        ("log_spaced", 12, (0, 1, 2, 4, 8, 16, 32, 64)),
        ("descending", 3, (64, 32, 0)),
        ("hybrid", 3, (0, 0, 64)),
        ("hybrid_first", 3, (64, 0, 0)),
        ("transformer", 3, (64,)),
        ("v8", 5, (0, 8, 16, 48, 64)),
    ],
)
def test_a_named_schedule_fits_the_layers(name: str, layers: int, points: tuple[int, ...]) -> None:
    assert schedule.named(name, 64, layers) == points


@given(st.sampled_from(ANY_DEPTH), st.integers(2, 40), st.integers(1, 5000))
def test_schedules_for_any_depth_keep_both_ends(name: str, layers: int, seq_len: int) -> None:
    points = schedule.expand(schedule.named(name, seq_len, layers), layers)
    assert {0, seq_len} <= set(points) <= set(range(seq_len + 1))


@pytest.mark.parametrize("choice", ["0 3 9", "0,3,9", ["0", "3", "9"], (0, 3, 9)])
def test_a_choice_is_a_list_of_integers(choice) -> None:
    assert schedule.choose(choice, 64, 4) == (0, 3, 9)


@pytest.mark.parametrize("choice", ["v9", ["v9"], ("v9",)])
def test_or_a_name(choice) -> None:
    assert schedule.choose(choice, 64, 8) == schedule.v9(64)


@pytest.mark.parametrize(
    ("points", "seq_len", "message"),
    [
        ((0, 16, 32, 64), 64, None),
        ((0, 16, 32, 64), 128, "is log_spaced for rows of 64 tokens"),
        ((64, 32, 16, 0), 32, "is descending for rows of 64 tokens"),
        (schedule.v9(8192), 512, "is v9 for rows of 8192 tokens"),
        (schedule.v7(8192), 8192, None),
        (schedule.v7(8192), 4096, "has TransPoints beyond the row, 6144: those layers attend to all of it"),
        ((0,), 8, None),
        ((0, 0, 0), 8, None),
        ((5,), 8, None),
        ((0, 3, 5), 8, None),
    ],
)
def test_a_schedule_for_rows_of_another_length_is_recognised(points, seq_len: int, message: str | None) -> None:
    assert schedule.misfit(points, seq_len) == message


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_smallest_period_is_a_period_and_smallest(points: list[int]) -> None:
    period = schedule.smallest_period(tuple(points))
    periods = [
        p for p in range(1, len(points) + 1) if len(points) % p == 0 and points == points[:p] * (len(points) // p)
    ]
    assert period == min(periods)


def test_expand_repeats_over_the_layers() -> None:
    assert schedule.expand((0, 4, 8), 7) == (0, 4, 8, 0, 4, 8, 0)


def test_table_counts_attention_layers_along_the_sequence() -> None:
    lines = schedule.table(schedule.v9(8192), 8, 8192).splitlines()
    assert lines[1].split() == ["0", "-", "128", "sAAAAAAA", "7"]
    assert [line.split()[-1] for line in lines[1:]] == ["7", "6", "5", "4", "3", "2", "1"]
    assert schedule.table((0,), 2, 16).splitlines()[1].split() == ["0", "-", "16", "ss", "0"]
    assert schedule.table((99,), 2, 16).splitlines()[1].split() == ["0", "-", "16", "AA", "2"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.named("v10", 8), "unknown schedule 'v10'; the names are transformer, mamba2"),
        (
            lambda: schedule.named("v9", 64, 4),
            "v9 has 8 TransPoints, one per layer in turn, and the model has 4 layers; those that fit are transformer, "
            "mamba2, hybrid, hybrid_first, log_spaced, descending, v1, v2, v3, v4, v5, v6, v7$",
        ),
        (lambda: schedule.named("v1", 8, 0), "num_layers must be at least 1, found 0"),
        (lambda: schedule.choose("v9 8", 8, 8), r"one name \(transformer, .*\) or a list of integers, found v9 in it"),
        (lambda: schedule.choose([], 8, 8), "at least one TransPoint"),
        (lambda: schedule.choose("0 1 2", 8, 2), "3 entries but the model has num_layers=2"),
        (lambda: schedule.choose("-1", 8, 2), r"transpoints\[0\] must be >= 0"),
        (lambda: schedule.transformer(0), "seq_len must be at least 1, found 0"),
        (lambda: schedule.v9(3.5), "seq_len must be an int, found 3.5 of type float"),
        (lambda: schedule.hybrid(8, every=2.0), r"every must be an int, found 2\.0"),
        (lambda: schedule.log_spaced(8, period=1), "period must be at least 2"),
        (lambda: schedule.hybrid(8, every=0), "every must be at least 1, found 0"),
        (lambda: schedule.validate([0, -3]), r"transpoints\[1\] must be >= 0 .*found -3"),
        (lambda: schedule.validate([True]), r"transpoints\[0\] must be an int, found True"),
        (lambda: schedule.validate("12"), "sequence of ints, found '12'"),
        (lambda: schedule.validate(()), "at least one TransPoint"),
        (lambda: schedule.expand((0, 1, 2), 2), "3 entries but the model has num_layers=2"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_schedules_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
