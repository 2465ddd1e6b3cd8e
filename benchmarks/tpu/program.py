"""Bytes that a program compiled for a TPU moves to and from its memory (HBM), read from the program's text.

A layout names where an array lies: `S(1)` is VMEM, no `S` is HBM. Of every operation, results and operands in HBM count
once; of an operand that it only cuts slices out of, those count. What stays in VMEM counts nothing, prefetches from HBM
into it count where they are started. Bytes are those of elements, without the padding of tiles.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-done", "slice-done", "after-all"}
_SLICES = {"slice", "dynamic-slice", "slice-start"}
_LOOPS = {"while", "conditional", "call"}


class Array(NamedTuple):
    """An array of a program."""

    size: int
    """Bytes."""
    in_hbm: bool


class Operation(NamedTuple):
    """One line of a program."""

    name: str
    kind: str
    results: list[Array]
    operands: list[str]
    rest: str
    """The line from its operands on."""

    @property
    def called(self) -> str | None:
        """The computation of a fusion."""
        match = re.search(r"calls=%([\w.\-]+)", self.rest) if self.kind == "fusion" else None
        return match and match[1]


Computation = dict[str, Operation]


def _arrays(text: str) -> list[Array]:
    return [
        Array(math.prod(map(int, dims.split(","))) * _BYTES[kind] if dims else _BYTES[kind], "S(" not in layout)
        for kind, dims, layout in _ARRAY.findall(text)
        if kind in _BYTES
    ]


def _bracket(text: str, start: int) -> int:
    """Return the place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"expected a closed bracket, found {text[start : start + 80]!r}")


def _operation(line: str) -> Operation | None:
    match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
    if match is None:
        return None
    text = line[match.end() :]
    end = _bracket(text, 0) if text[0] == "(" else text.index(" ")
    kind = re.match(r"\s*([\w\-]+)(?=\()", text[end:])
    if kind is None:
        raise ValueError(f"expected an operation, found {line[:80]!r}")
    begin = end + kind.end()
    close = _bracket(text, begin)
    operands = re.findall(r"%([\w.\-]+)", text[begin:close])
    return Operation(match[1], kind[1], _arrays(text[:end]), operands, text[begin:])


def _computations(text: str) -> tuple[dict[str, Computation], Computation]:
    """Return the computations of a program by name, and the one that it begins with."""
    found: dict[str, Computation] = {}
    current: Computation = {}
    entry: Computation | None = None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if header is not None:
            current = found[header[2]] = {}
            entry = current if header[1] else entry
        operation = _operation(line)
        if operation is not None:
            current[operation.name] = operation
    if entry is None:
        raise ValueError(f"expected the text of a compiled program, found {text[:80]!r}")
    return found, entry


def _read(program: dict[str, Computation], where: Computation, operation: Operation, place: int, size: int) -> int:
    """Bytes that an operation reads of its operand at a place, of `size` bytes."""
    if operation.kind in _SLICES and place == 0:
        return operation.results[-2 if operation.kind == "slice-start" else 0].size
    name = operation.name
    if operation.called is not None:
        where = program[operation.called]
        name = next(op.name for op in where.values() if op.kind == "parameter" and op.rest.startswith(f"({place})"))
    elif operation.kind != "bitcast":
        return size
    users = ((user, at) for user in where.values() for at, operand in enumerate(user.operands) if operand == name)
    return min(size, sum(_read(program, where, user, at, size) for user, at in users))


def traffic(text: str) -> Iterator[tuple[Operation, int]]:
    """Give the operations of a compiled program that move bytes to or from HBM, each with how many.

    Raises:
        ValueError: the text has another form, or a loop or branch, of which it says not how often it runs.
    """
    program, entry = _computations(text)
    for operation in entry.values():
        if operation.kind in _LOOPS:
            raise ValueError(f"expected a program without loops and branches, found {operation.kind} {operation.name}")
        if operation.kind in _FREE or "ConcatBitcast" in operation.rest:
            continue
        if operation.kind == "copy-start":  # (destination, source, semaphore)
            moved = sum(array.size for array in operation.results[:2] if array.in_hbm)
        else:
            # (sources, slice, semaphore) of a slice that is started: only the slice is new.
            results = operation.results[-2:-1] if operation.kind == "slice-start" else operation.results
            moved = sum(array.size for array in results if array.in_hbm)
            for place, name in enumerate(operation.operands):
                for array in entry[name].results:
                    if array.in_hbm:
                        moved += _read(program, entry, operation, place, array.size)
        if moved:
            yield operation, moved
