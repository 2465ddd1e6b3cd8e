"""Read the text of a compiled program (HLO): its computations and operations, and the cost of running it.

`compiled.as_text()` of a jitted function, on any platform. The layout of an array names its memory: on a TPU `S(1)` is
VMEM and no `S` is HBM.
"""

import dataclasses
import json
import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Matmuls over query and key channels and over value channels that the kernels of jax's splash attention do for every
# pair of tokens; they carry no estimates.
_SPLASH = {"splash_mha_fwd": (1, 1), "splash_mha_dkv": (2, 2), "splash_mha_dq": (2, 1)}


class Array(NamedTuple):
    """An array of a program."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without the padding of tiles."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8

    @property
    def in_hbm(self) -> bool:
        """True in the main memory of a TPU."""
        return "S(" not in self.layout


class Operation(NamedTuple):
    """One line of a program."""

    name: str
    kind: str
    """`fusion`, `all-gather-start`, `custom-call`, ..."""
    results: list[Array]
    operands: list[str]
    """Names of the operations whose results it reads."""
    rest: str
    """The line from its operands on."""

    @property
    def calls(self) -> list[str]:
        """Names of the computations that it runs: of a fusion, a loop's body, a reduction, the first of branches."""
        return re.findall(r"\b(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", self.rest)


Computation = dict[str, Operation]
"""Operations by name, in order."""


class Cost(NamedTuple):
    """Number of runs of a kernel, and their FLOPs and bytes in all."""

    runs: int
    flops: float
    nbytes: float

    def plus(self, times: int, flops: float, nbytes: float) -> "Cost":
        """Add `times` runs of so many FLOPs and bytes each."""
        return Cost(self.runs + times, self.flops + times * flops, self.nbytes + times * nbytes)


@dataclasses.dataclass(frozen=True)
class Program:
    """Cost of a compiled program on one device, a loop's body as often as it runs."""

    collectives: dict[str, tuple[int, float]]
    """Kind -> number of runs, and the bytes of their results."""
    cycles: float
    """Clock cycles of the operations, as the TPU's compiler estimates them; kernels have none."""
    kernels: dict[str, Cost]
    """Cost of each Pallas kernel by name, by the estimates that kernels carry."""


def arrays(text: str) -> list[Array]:
    """Return the arrays that part of a program's text names, in order; tokens are none."""
    found = [
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in _ARRAY.findall(text)
    ]
    return [array for array in found if array.dtype == "pred" or re.search(r"\d", array.dtype)]


def computations(text: str) -> tuple[dict[str, Computation], Computation]:
    """Return the computations of a program by name, and the one that it begins with.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    found: dict[str, Computation] = {}
    current: Computation = {}
    entry: Computation | None = None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header is not None:
            current = found[header[2]] = {}
            entry = current if header[1] else entry
        operation = _operation(line)
        if operation is not None:
            current[operation.name] = operation
    if entry is None:
        raise ValueError(f"expected the text of a compiled program, found {text[:80]!r}")
    return found, entry


def _operation(line: str) -> Operation | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    text = line[match.end() :]
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    kind = re.match(r"\s*([\w\-]+)(?=\()", text[end:])
    if kind is None:
        raise ValueError(f"expected an operation, found {line[:80]!r}")
    begin = end + kind.end()
    operands = re.findall(r"%([\w.\-]+)", text[begin : _closing(text, begin)])
    return Operation(match[1], kind[1], arrays(text[:end]), operands, text[begin:])


def _closing(text: str, start: int) -> int:
    """Return the index after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"expected a closed bracket, found {text[start : start + 80]!r}")


def read_program(text: str) -> Program:
    """Add up the cost of a compiled program from its text.

    A loop's body counts as often as it runs: by the compiler's own count, or (the TPU's prints none) by the constant
    that its condition compares the counter with; where neither is there, once.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    named, entry = computations(text)
    collectives: dict[str, tuple[int, float]] = {}
    kernels: dict[str, Cost] = {}
    cycles = 0.0

    def visit(computation: Computation, times: int) -> None:
        nonlocal cycles
        for operation in computation.values():
            kind = operation.kind.removesuffix("-start")
            if kind in COLLECTIVES and not _moves_nothing(operation):
                count, size = collectives.get(kind, (0, 0.0))
                collectives[kind] = count + times, size + times * _result_bytes(operation)
            if estimated := re.search(r'"estimated_cycles":"(\d+)"', operation.rest):
                cycles += times * int(estimated[1])
            if 'custom_call_target="tpu_custom_call"' in operation.rest:
                name = re.sub(r"\.\d+$", "", operation.name)
                kernels[name] = kernels.get(name, Cost(0, 0.0, 0.0)).plus(times, *_kernel(name, operation))
            trips = _trips(operation, named) if operation.kind == "while" else 1
            for called in operation.calls:
                visit(named[called], times * trips)

    visit(entry, 1)
    return Program(collectives, cycles, kernels)


def _moves_nothing(operation: Operation) -> bool:
    """Tell whether a collective is among groups of one device, as a sum over no axis of the mesh is.

    Groups are written as a list of devices, as [groups,devices of one]<=..., or by axes of a mesh: jax 0.12 writes the
    third form (remove the others when it is required).
    """
    line = operation.rest
    if by_axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", by_axes[2])) == 1
    groups = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{(\d+(?:,\d+)*)\})", line)
    return groups is not None and (groups[1] or str(len(groups[2].split(",")))) == "1"


def _trips(loop: Operation, named: dict[str, Computation]) -> int:
    """Count the turns of a while loop that starts at 0, as `jax.lax.scan` makes them."""
    if known := re.search(r"known_trip_count\D*(\d+)", loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    operations = list(named[condition[1]].values()) if condition else []
    constants = [operation for operation in operations if operation.kind == "constant"]
    ends = [
        end[1]
        for constant in constants
        if [(array.dtype, array.shape) for array in constant.results] == [("s32", ())]
        and (end := re.match(r"\((\d+)\)", constant.rest))
    ]
    return int(ends[0]) if len(ends) == 1 and any("direction=LT" in each.rest for each in operations) else 1


def _kernel(name: str, operation: Operation) -> tuple[float, float]:
    """Return FLOPs and bytes of a Pallas kernel: its own estimate, or for causal attention ours."""
    if given := re.search(r'"cost_estimate":(\{[^{}]*\})', operation.rest):
        cost = json.loads(given[1])
        return float(cost["flops"]), float(cost["bytes_accessed"])
    operands = arrays(operation.rest.partition("operand_layout_constraints=")[2].partition("}}")[0])
    moved = float(sum(array.nbytes for array in (*operation.results, *operands)))
    matmuls = next((found for start, found in _SPLASH.items() if name.startswith(start)), None)
    if matmuls is None:
        return 0.0, moved
    q, _, v = [array.shape for array in operands if array.dtype in ("bf16", "f32")][:3]
    *pairs, width = q  # rows, heads, tokens
    return float(math.prod(pairs) * pairs[-1] * (matmuls[0] * width + matmuls[1] * v[-1])), moved


def _result_bytes(operation: Operation) -> float:
    """Count the bytes of an operation's result; of a `-start` pair (operand, result, ...) the second counts."""
    sizes = [float(array.nbytes) for array in operation.results]
    if operation.kind.endswith("-start") and len(sizes) > 1:
        return max(sizes) if operation.kind == "all-gather-start" else sizes[len(sizes) // 2]
    return sum(sizes)
