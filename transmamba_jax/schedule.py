"""TransPoint schedules: where each layer switches from attention to the state space model.

A schedule is a tuple of non-negative ints, one TransPoint per layer, repeated over the layers when it is shorter than
the stack. Token t (0-based) of a layer with TransPoint P goes through attention when t < P, through the SSM when
t >= P. Source: arXiv 2503.24067, Table 6 (V1-V9, published for sequences of 8192 tokens) and §3.3.
"""

import itertools
import re
from collections.abc import Callable, Sequence

Schedule = tuple[int, ...]

_PAPER_LENGTH = 8192


def _scaled(seq_len: int, points: Sequence[int]) -> Schedule:
    """Scale TransPoints published for 8192 tokens to `seq_len` (integer division, so 8192 is exact)."""
    _check_count("seq_len", seq_len)
    return tuple(point * seq_len // _PAPER_LENGTH for point in points)


def _check_count(name: str, count: int, least: int = 1) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ValueError(f"{name} must be an int, found {count!r} of type {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, found {count}")


def transformer(seq_len: int) -> Schedule:
    """Attention everywhere: one TransPoint at the end of the sequence."""
    _check_count("seq_len", seq_len)
    return (seq_len,)


def mamba2() -> Schedule:
    """State space model everywhere."""
    return (0,)


def hybrid(seq_len: int, every: int = 8) -> Schedule:
    """Make a hybrid of layers: of each `every` layers the last one is attention over the whole sequence."""
    _check_count("seq_len", seq_len)
    _check_count("every", every)
    return (0,) * (every - 1) + (seq_len,)


def hybrid_first(seq_len: int, every: int = 8) -> Schedule:
    """Make a hybrid of layers: of each `every` layers the first one is attention over the whole sequence."""
    return hybrid(seq_len, every)[::-1]


def log_spaced(seq_len: int, period: int = 8) -> Schedule:
    """Scale-free form of V9: P_0 = 0 and P_i = T·2^(i - period + 1) for i = 1 .. period - 1."""
    _check_count("seq_len", seq_len)
    _check_count("period", period, 2)  # one end is all SSM, the other all attention
    return (0, *(seq_len >> (period - 1 - i) for i in range(1, period)))


def descending(seq_len: int, period: int = 8) -> Schedule:
    """Reverse `log_spaced`: attention in the first of each `period` layers, the SSM in the last."""
    return log_spaced(seq_len, period)[::-1]


def v1(seq_len: int) -> Schedule:
    """Table 6, V1: one TransPoint at a quarter."""
    return _scaled(seq_len, (2048,))


def v2(seq_len: int) -> Schedule:
    """Table 6, V2: one TransPoint at a half."""
    return _scaled(seq_len, (4096,))


def v3(seq_len: int) -> Schedule:
    """Table 6, V3: one TransPoint at three quarters."""
    return _scaled(seq_len, (6144,))


def v4(seq_len: int) -> Schedule:
    """Table 6, V4: three TransPoints around a half."""
    return _scaled(seq_len, (3072, 4096, 5120))


def v5(seq_len: int) -> Schedule:
    """Table 6, V5: three TransPoints around three eighths."""
    return _scaled(seq_len, (2048, 3072, 4096))


def v6(seq_len: int) -> Schedule:
    """Table 6, V6: three early TransPoints."""
    return _scaled(seq_len, (512, 1024, 2048))


def v7(seq_len: int) -> Schedule:
    """Table 6, V7: three TransPoints over a broad range."""
    return _scaled(seq_len, (2048, 4096, 6144))


def v8(seq_len: int) -> Schedule:
    """Table 6, V8: five TransPoints with both ends."""
    return _scaled(seq_len, (0, 1024, 2048, 6144, 8192))


def v9(seq_len: int) -> Schedule:
    """Table 6, V9, the paper's final schedule: (0, 128, 256, 512, 1024, 2048, 4096, 8192) at 8192 tokens."""
    return _scaled(seq_len, (0, 128, 256, 512, 1024, 2048, 4096, 8192))


def validate(transpoints: Sequence[int]) -> Schedule:
    """Return `transpoints` as a schedule.

    Raises:
        ValueError: it is empty, or an entry is negative or not an int.
    """
    if isinstance(transpoints, str | bytes) or not isinstance(transpoints, Sequence):
        raise ValueError(f"transpoints must be a sequence of ints, found {transpoints!r}")
    if len(transpoints) == 0:
        raise ValueError("transpoints must name at least one TransPoint, found an empty sequence")
    for index, point in enumerate(transpoints):
        if isinstance(point, bool) or not isinstance(point, int):
            raise ValueError(f"transpoints[{index}] must be an int, found {point!r} of type {type(point).__name__}")
        if point < 0:
            raise ValueError(f"transpoints[{index}] must be >= 0 (a number of tokens), found {point}")
        if point >= 2**31:
            raise ValueError(f"transpoints[{index}] must be below 2**31 (positions are int32), found {point}")
    return tuple(transpoints)


def expand(transpoints: Sequence[int], num_layers: int) -> Schedule:
    """Repeat a schedule over `num_layers` layers.

    Raises:
        ValueError: the schedule is invalid or longer than the stack, so that its tail would never be used.
    """
    points = validate(transpoints)
    if len(points) > num_layers:
        raise ValueError(
            f"transpoints has {len(points)} entries but the model has num_layers={num_layers}: "
            f"the last {len(points) - num_layers} would never be used; shorten the schedule or add layers"
        )
    return tuple(points[layer % len(points)] for layer in range(num_layers))


def smallest_period(points: Sequence[int]) -> int:
    """Smallest p that divides len(points) with points[i] == points[i % p] for every i."""
    length = len(points)
    for period in range(1, length + 1):
        if length % period == 0 and all(points[i] == points[i % period] for i in range(length)):
            return period
    raise ValueError("points must not be empty")


def table(transpoints: Sequence[int], num_layers: int, seq_len: int) -> str:
    """Draw a schedule: for each span between TransPoints, the layers that attend and how many they are.

    One line a span of positions, one column a layer: `A` attention, `s` state space model.
    """
    _check_count("seq_len", seq_len)
    points = expand(transpoints, num_layers)
    edges = sorted({0, seq_len, *(point for point in points if point < seq_len)})
    width = len(str(seq_len))
    heading = f"layers 0..{num_layers - 1}"
    columns = max(num_layers, len(heading))
    lines = [f"{'tokens':>{2 * width + 3}}  {heading:<{columns}}  attention layers"]
    for start, stop in itertools.pairwise(edges):
        kinds = "".join("A" if start < point else "s" for point in points)
        lines.append(f"{start:>{width}} - {stop:>{width}}  {kinds:<{columns}}  {kinds.count('A')}")
    return "\n".join(lines)


def _fixed(make: Callable[[int], Schedule]) -> Callable[[int, int], Schedule]:
    return lambda seq_len, _num_layers: make(seq_len)


def _fitted(make: Callable[[int, int], Schedule]) -> Callable[[int, int], Schedule]:
    """Shorten a period of 8 to the number of layers; one layer has no two ends, and gets the middle."""
    return lambda seq_len, layers: make(seq_len, min(layers, 8)) if layers > 1 else v2(seq_len)


NAMED: dict[str, Callable[[int, int], Schedule]] = {
    "transformer": _fixed(transformer),
    "mamba2": lambda _seq_len, _num_layers: mamba2(),
    "hybrid": _fitted(hybrid),
    "hybrid_first": _fitted(hybrid_first),
    "log_spaced": _fitted(log_spaced),
    "descending": _fitted(descending),
    **{function.__name__: _fixed(function) for function in (v1, v2, v3, v4, v5, v6, v7, v8, v9)},
}
"""Name -> function of the tokens of a row and the number of layers."""


def named(name: str, seq_len: int, num_layers: int = 8) -> Schedule:
    """Return the schedule called `name` for rows of `seq_len` tokens and a model of `num_layers` layers.

    `log_spaced`, `descending`, `hybrid` and `hybrid_first` fit any number of layers. Below 8 they keep both ends and
    the largest TransPoints: `log_spaced` of 4 layers is (0, T/4, T/2, T); of one layer it is (T/2,). The others are
    those of the paper: a model needs at least as many layers as they have TransPoints.

    Raises:
        ValueError: no schedule has that name, or it has more TransPoints than the model has layers; the message says
            which fit.
    """
    if name not in NAMED:
        raise ValueError(f"unknown schedule {name!r}; the names are {', '.join(NAMED)}")
    _check_count("num_layers", num_layers)
    points = NAMED[name](seq_len, num_layers)
    if len(points) > num_layers:
        fitting = [other for other, make in NAMED.items() if len(make(seq_len, num_layers)) <= num_layers]
        raise ValueError(
            f"{name} has {len(points)} TransPoints, one per layer in turn, and the model has {num_layers} layers; "
            f"those that fit are {', '.join(fitting)}"
        )
    return points


def choose(choice: str | Sequence[str | int], seq_len: int, num_layers: int) -> Schedule:
    """Return the schedule that an option asks for: a name, or TransPoints as integers or as text ("0 64 128").

    Raises:
        ValueError: it is neither, or as for `named` and `expand`.
    """
    words = choice.replace(",", " ").split() if isinstance(choice, str) else list(choice)
    if len(words) == 1 and not re.fullmatch(r"[+-]?\d+", str(words[0])):
        return named(str(words[0]), seq_len, num_layers)
    wrong = [str(word) for word in words if not re.fullmatch(r"[+-]?\d+", str(word))]
    if wrong:
        raise ValueError(
            f"a schedule is one name ({', '.join(NAMED)}) or a list of integers, found {', '.join(wrong)} in it"
        )
    points = validate([int(word) for word in words])
    expand(points, num_layers)
    return points


def misfit(transpoints: Sequence[int], seq_len: int) -> str | None:
    """Say how a schedule does not fit rows of `seq_len` tokens, or return None.

    It does not when it is a named one for rows of another length, or when TransPoints are beyond the row.
    """
    points, longest = tuple(transpoints), max(transpoints)
    if len(points) > 2 and longest not in (0, seq_len):
        names = [name for name, make in NAMED.items() if make(longest, len(points)) == points]
        if names:
            return f"is {names[-1]} for rows of {longest} tokens"
    beyond = [str(point) for point in points if point > seq_len]
    return f"has TransPoints beyond the row, {', '.join(beyond)}: those layers attend to all of it" if beyond else None
