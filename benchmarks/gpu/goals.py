"""Goals of the races of `suite.py`: the roofline floor, ratios, and goals."""

from typing import Any

import jax

from transmamba_jax.runtime import hardware

Report = dict[str, Any]

PASSES = ("forward", "forward+backward")
MEASURED = {"NVIDIA H100 80GB HBM3": (798e12, 3.0e12), "NVIDIA H200": (788e12, 4.3e12)}
"""bfloat16 FLOP/s and bytes/s as measured on such machines; of others the data sheet says."""

PORTABLE = ("associative", "sequential")
TRITON = "mamba_ssm"
JLA = "jax-linear-attention"
CUDNN = "peer cudnn"
OVER_TRITON = 0.80
OVER_JLA = {64: 1.10, 96: 0.80, 128: 1.10}
"""By head dim."""

OF_FLOOR = {"forward": 0.40, "forward+backward": 0.30}
PORTABLE_OVER_TRITON = 1.5
OVER_CUDNN = 1.02


def floor_seconds(operator: str, kind: str, shape: tuple[int, ...], itemsize: int) -> float | None:
    """Return the time that traffic or matmuls of a fused kernel take at least; None: unknown device.

    SSD: chunks of 64. Causal attention: half of the pairs; its backward pass does five matmuls, the forward pass
    two.
    """
    device = jax.devices()[0].device_kind
    if device not in hardware.CHIPS or itemsize != 2:
        return None
    chip = hardware.CHIPS[device]
    flops_rate, bytes_rate = MEASURED.get(device, (chip.peak_flops, chip.bandwidth))
    batch, length, heads, p, n = shape
    if operator == "attention":
        costs = [(2 * length * n, itemsize * 4 * n), (5 * length * n, itemsize * 8 * n)]
    else:
        costs = [
            (2 * 64 * (n + p) + 4 * n * p, itemsize * (2 * p + 2 * n) + 4),
            (2 * 64 * (3 * n + 2 * p) + 10 * n * p, itemsize * (3 * p + 4 * n) + 8),
        ]
    passes = costs[: PASSES.index(kind) + 1]
    return batch * length * heads * sum(max(flops / flops_rate, moved / bytes_rate) for flops, moved in passes)


def ours(report: Report) -> dict[str, float]:
    """Times of this project's contenders in one race."""
    return {name: value for name, value in report["milliseconds"].items() if name in report["mine"]}


def ratios(report: Report) -> dict[str, float]:
    """Our fastest over each other's time, of one race."""
    times, own = report["milliseconds"], ours(report)
    return {name: min(own.values()) / value for name, value in times.items() if name not in own} if own else {}


def _of_race(report: Report) -> list[tuple[str, float, float, bool]]:
    """Goals that one race can decide: (what, limit, found, whether less is better)."""
    times, own, kind = report["milliseconds"], ours(report), report["pass"]
    if not own:
        return []
    best, found = min(own.values()), []
    if report["operator"] == "attention":
        return [("over cuDNN", OVER_CUDNN, best / times[CUDNN], True)] if CUDNN in times else []
    if report["floor"] is not None:
        found.append(("share of the floor's rate", OF_FLOOR[kind], report["floor"] / best, False))
    portable = [own[name] for name in PORTABLE if name in own]
    if TRITON in times and portable:
        found.append(("portable over Triton", PORTABLE_OVER_TRITON, min(portable) / times[TRITON], True))
    if TRITON in times and kind == "forward+backward":
        found.append(("over Triton", OVER_TRITON, best / times[TRITON], True))
    if JLA in times and kind == "forward+backward" and report["shape"][3] in OVER_JLA:
        found.append((f"over {JLA}", OVER_JLA[report["shape"][3]], best / times[JLA], True))
    return found


def goals(races: list[Report]) -> tuple[list[str], bool]:
    """Compare every race with the goals: lines, and whether all that could be decided are met."""
    lines, all_met, decided = [], True, set()
    for report in races:
        for what, limit, found, less in _of_race(report):
            met = found <= limit if less else found >= limit
            all_met &= met
            decided.add(what)
            race = f"{report['operator']} {report['pass']} {'x'.join(map(str, report['shape']))}"
            bound = f"at {'most' if less else 'least'} {limit:.2f}"
            lines.append(f"{'met' if met else 'NOT MET':>8}  {race}, {what}: {bound}, found {found:.2f}")
    wanted = ("over Triton", f"over {JLA}", "share of the floor's rate", "portable over Triton", "over cuDNN")
    lines += [f"{'open':>8}  {what}: no race decides it" for what in wanted if what not in decided]
    return lines, all_met
