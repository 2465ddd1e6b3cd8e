"""Bytes that a program compiled for a TPU moves to and from its memory (HBM), read from the program's text.

A layout names the memory of an array: `S(1)` is VMEM, no `S` is HBM. Of every operation, results and operands in HBM
count once; of an operand that it only cuts slices out of, those count. What stays in VMEM counts nothing, prefetches
from HBM into it count where they are started. Bytes are those of elements, without the padding of tiles.
"""

from collections.abc import Iterator

from transmamba_jax.compile_only.program import Computation, Operation, computations

_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-done", "slice-done", "after-all"}
_SLICES = {"slice", "dynamic-slice", "slice-start"}
_LOOPS = {"while", "conditional", "call"}


def _read(program: dict[str, Computation], where: Computation, operation: Operation, place: int, size: int) -> int:
    """Bytes that an operation reads of its operand at a place, of `size` bytes."""
    if operation.kind in _SLICES and place == 0:
        return operation.results[-2 if operation.kind == "slice-start" else 0].nbytes
    name = operation.name
    if operation.kind == "fusion":
        (called,) = operation.calls
        where = program[called]
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
    program, entry = computations(text)
    for operation in entry.values():
        if operation.kind in _LOOPS:
            raise ValueError(f"expected a program without loops and branches, found {operation.kind} {operation.name}")
        if operation.kind in _FREE or "ConcatBitcast" in operation.rest:
            continue
        if operation.kind == "copy-start":  # (destination, source, semaphore)
            moved = sum(array.nbytes for array in operation.results[:2] if array.in_hbm)
        else:
            # (sources, slice, semaphore) of a slice that is started: only the slice is new.
            results = operation.results[-2:-1] if operation.kind == "slice-start" else operation.results
            moved = sum(array.nbytes for array in results if array.in_hbm)
            for place, name in enumerate(operation.operands):
                for array in entry[name].results:
                    if array.in_hbm:
                        moved += _read(program, entry, operation, place, array.nbytes)
        if moved:
            yield operation, moved
