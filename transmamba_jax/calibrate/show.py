"""Records as text."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from transmamba_jax.calibrate.trials import title
from transmamba_jax.runtime import calibration
from transmamba_jax.runtime.calibration import Operation, Record, Result


def show(files: Iterable[Path]) -> Iterator[str]:
    """Yield the lines of every record; one that cannot be read is one line."""
    for file in files:
        try:
            yield from table(calibration.read(file))
        except ValueError as error:
            yield str(error)
        yield ""


def table(record: Record) -> Iterator[str]:
    """Yield the lines of a record: its key, what is chosen, the times, and the outcomes that are not times."""
    key = record.key
    shapes = ", ".join(f"{name} {value}" for name, value in key["shapes"].items())
    yield record.source
    yield f"  {key['device']}; driver {key['driver']}; jax {key['jax']}; transmamba_jax {key['transmamba_jax']}"
    yield f"  {shapes}; {record.rows} rows; made {record.made} UTC"
    operations: tuple[Operation, ...] = ("forward", "forward+backward", "state")
    for operator in ("ssd", "attention"):
        for operation in operations:
            yield from _times(record, operator, operation)
    for result in record.results:
        if result.outcome != "passed":
            yield f"  {title(result)}: {result.outcome}: {result.message}"


def _times(record: Record, operator: str, operation: Operation) -> Iterator[str]:
    timed = [result for result in record.results if result.operator == operator and operation in result.seconds]
    timed = [result for result in timed if result.outcome == "passed"]
    lengths = sorted({length for result in timed for length in result.seconds[operation]})
    if not lengths:
        return
    yield f"  {operator} {operation}, ms by tokens of a row; * the fastest"
    yield f"    {'':<32}" + "".join(f"{length:>12}" for length in lengths)
    fastest = {length: min(result.seconds[operation][length] for result in timed) for length in lengths}
    order = sorted(timed, key=lambda result: result.seconds[operation][lengths[-1]])
    for result in order:
        yield f"    {title(result).removeprefix(operator + ' '):<32}" + "".join(
            _cell(result, operation, length, fastest[length]) for length in lengths
        )


def _cell(result: Result, operation: Operation, length: int, fastest: float) -> str:
    seconds = result.seconds[operation][length]
    return f"{1e3 * seconds:.3f}{'*' if seconds == fastest else ' '}".rjust(12)
