"""Run a study: a grid of small runs that answers a question, with a table and plots.

python -m transmamba_jax.study FILE           run what has no result yet, then write the report
python -m transmamba_jax.study report DIR     write the report of the study in DIR again; --publish FOLDER keeps it
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from transmamba_jax.runtime import compile_cache, hardware, host_memory, logs, storage
from transmamba_jax.runtime.checks import require
from transmamba_jax.runtime.paths import option_path
from transmamba_jax.study.spec import Cell, Stage, Study, find_study, keep_file, load_study

if TYPE_CHECKING:
    from transmamba_jax.study.runner import Selection

_DESCRIPTION = "Run the cells of a study that have no result yet, then write its table, plots and page."


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, write the report; return the exit code.

    0: complete. 2: the study or an option is wrong. 75: the same command continues.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with logs.safe_output():
        try:
            if arguments[:1] == ["report"]:
                return _report(arguments[1:])
            options = _parser().parse_args(arguments)
            require(
                options.out is None or not storage.is_remote(options.out),
                f"--out must be a folder of this machine, found {options.out}",
            )
            study = load_study(options.file, options.quick)
            return _run(study, options.out or Path("runs/studies") / (study.name + "-quick" * study.quick), options)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"transmamba study: {error}", file=sys.stderr)
            return 2
    return 0


def _report(arguments: Sequence[str]) -> int:
    from transmamba_jax.study import report

    parser = argparse.ArgumentParser(prog="transmamba study report", description="Write the report of a study again.")
    parser.add_argument("folder", type=option_path, metavar="DIR", help="folder of the study's results")
    parser.add_argument(
        "--publish",
        type=option_path,
        metavar="FOLDER",
        help="copy study, results, table, plots and page there, without checkpoints, such as docs/results/s1_recall",
    )
    parser.add_argument("--against", metavar="ARM", help="print the differences of every arm to this one, seed by seed")
    options = parser.parse_args(arguments)
    study = find_study(options.folder)
    if options.against is not None:
        print("\n".join(report.differences(study, options.folder, options.against)))
    elif options.publish is None:
        print(report.write_report(study, options.folder))
    else:
        print(report.publish(study, options.folder, options.publish))
    return 0


def _run(study: Study, out: Path, options: argparse.Namespace) -> int:
    host_memory.keep_freed()
    compile_cache.keep_programs()
    hardware.require_devices()
    from transmamba_jax.study import report, results, runner  # these import JAX, orbax and Grain

    shard, shards = options.shard
    selection = runner.Selection(options.only, shard, shards, options.stage)
    if options.finished is not None or not options.list:
        runner.check_results(study, out, options.retry_failed)  # first: results stand beside the file that they are of
        keep_file(options.file, study, out)
    if options.finished is not None:
        logs.write_line(f"{runner.take_results(study, out, options.finished)} cells taken from {options.finished}")
    if options.list:
        _list(study, out, selection)
        return 0
    hours = study.budget_hours if options.budget_hours is None else options.budget_hours
    if options.jobs > 1:
        if shards > 1:
            raise ValueError("--jobs divides the cells itself, found --shard too; give one of them")
        code = _run_jobs(study, out, options, hours)
    else:
        code = runner.run_study(study, out, selection, options.retry_failed, hours)
    if shards == 1 and options.stage is None and results.read_results(study, out):
        print(report.write_report(study, out))
    return code


def _run_jobs(study: Study, out: Path, options: argparse.Namespace, hours: float) -> int:
    """Run each stage as `jobs` processes, each of which runs a shard, and show a bar over all cells."""
    from transmamba_jax.study import results, runner

    end = time.perf_counter() + 3600 * hours
    for stage in ("search", "report") if options.stage is None else (options.stage,):
        command = [sys.executable, "-m", "transmamba_jax.study", str(options.file), "--out", str(out), "--stage", stage]
        command += ["--budget-hours", f"{max(end - time.perf_counter(), 0) / 3600:.9f}"]
        command += ["--only", options.only, *["--quick"] * study.quick, *["--retry-failed"] * options.retry_failed]
        shards = [[*command, "--shard", f"{number}/{options.jobs}"] for number in range(options.jobs)]
        children = [subprocess.Popen(shard) for shard in shards]
        _divide_cores([child.pid for child in children])
        cells = runner.selected_cells(study, out, stage, runner.Selection(options.only))
        with (
            _ended_together(children),
            tqdm(total=len(cells), desc=stage, unit="cell", dynamic_ncols=True, disable=None) as bar,
        ):
            while any(child.poll() is None for child in children):
                bar.update(sum(results.read_result(out, cell) is not None for cell in cells) - bar.n)
                time.sleep(1)
        codes = [child.returncode for child in children]
        if any(codes):  # a request to stop, the budget, or an error: the reported cells wait
            return next(code for code in codes if code)
    return 0


@contextlib.contextmanager
def _ended_together(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand a request to stop on to the children, and wait for them: none goes on behind a command that ended."""
    from transmamba_jax.training.preemption import EXIT_PREEMPTED  # imports JAX

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.signal(number, lambda *_: sys.exit(EXIT_PREEMPTED)))
        try:
            yield
        finally:
            for child in children:  # a terminal's Ctrl-C has reached them too; SIGTERM after it changes nothing
                if child.poll() is None:
                    child.terminate()
            for child in children:
                child.wait()


def _divide_cores(processes: Sequence[int]) -> None:
    """Give each process cores of its own where there are enough: small cells do not fill several."""
    cores = hardware.usable_cores()
    share = len(cores) // len(processes)
    if sys.platform == "linux" and share:
        for number, process in enumerate(processes):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process, cores[number * share : (number + 1) * share])


def _list(study: Study, out: Path, selection: "Selection") -> None:
    """Print the selected cells with their estimated times, and the sum of the remaining ones."""
    from transmamba_jax.study import results, runner

    left = 0.0
    stages: tuple[Stage, ...] = ("search", "report")
    cells: list[Cell] = [cell for stage in stages for cell in runner.selected_cells(study, out, stage, selection)]
    for cell, seconds in zip(cells, runner.estimate(study, out, cells), strict=True):
        record = results.read_result(out, cell)
        state = "to run" if record is None else "failed" if record["error"] else "finished"
        left += seconds if record is None else 0.0
        print(f"{state:<9} {seconds:>6.0f} s  {cell.name}")
    chosen = len(results.choose_rates(study, out))
    later = (len(study.arms()) - chosen) * len(study.seeds)
    print(f"{len(cells)} cells, {left / 3600:.2f} h to run; {later} reported cells follow when their rates are chosen")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, found {text!r}")
    return int(index), int(count)


def _hours(text: str) -> float:
    hours = float(text)
    if not (math.isfinite(hours) and hours >= 0):
        raise argparse.ArgumentTypeError(f"must be hours, 0 or more, found {text!r}")
    return hours


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transmamba study", usage="%(prog)s [report] FILE [options]", description=_DESCRIPTION
    )
    parser.add_argument(
        "file", type=option_path, metavar="FILE", help="YAML file of the study, such as configs/studies/s1_recall.yaml"
    )
    parser.add_argument(
        "--out", type=option_path, metavar="DIR", help="folder of the results (default: runs/studies/<name>)"
    )
    parser.add_argument("--quick", action="store_true", help="run the two-minute variant, which proves no claim")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells whose names match, such as 'mamba2/*'")
    parser.add_argument("--list", action="store_true", help="list the cells with estimated times and run nothing")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that run cells side by side (default: 1)"
    )
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="run the I-th of N parts of the cells, I from 0"
    )
    parser.add_argument(
        "--finished",
        type=option_path,
        metavar="FILE",
        help="results.jsonl of an earlier part, whose finished cells are not run again",
    )
    parser.add_argument("--stage", choices=("search", "report"), help="run the search or the reported cells alone")
    parser.add_argument(
        "--budget-hours", type=_hours, metavar="H", help="begin no further cell after H hours (default: the study's)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run cells that failed again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
