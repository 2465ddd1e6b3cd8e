"""The training loop. The order of its parts is fixed: what is checked, saved and logged relies on it.

Resuming is exact: parameters, optimizer state, counters, random key and data position are saved together, metrics
lines beyond the restored step are taken back, and an evaluation that was due but interrupted is run first.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from transmamba_jax import config_io, data, sharding
from transmamba_jax.checkpoint import Checkpointer, SaveError
from transmamba_jax.checkpoint import manifest as manifests
from transmamba_jax.config import Config, KernelsConfig
from transmamba_jax.data import registry
from transmamba_jax.evaluate import EvaluationStopped, Evaluator
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import hosts, storage
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.training import (
    bucket_lock,
    completion,
    given_model,
    kernels,
    parameter_groups,
    resume,
    run_lock,
    schedule_sampling,
    starting_points,
)
from transmamba_jax.training.console import Console
from transmamba_jax.training.metrics import MetricsWriter, Record
from transmamba_jax.training.preemption import EXIT_PREEMPTED, Preemption
from transmamba_jax.training.step import Step, TrainState, compile_train_step
from transmamba_jax.training.step_log import StepLog
from transmamba_jax.training.writers import check_installed, open_writers

EXIT_NOT_SAVED = 74
"""Exit code of a run whose last state, or another file that it needs, could not be saved: EX_IOERR."""


def train(config: Config, model: nn.Module | None = None, documents: Sequence[Any] | None = None) -> int:
    """Train to `train.steps`, continuing the run in the work directory, and return the exit code of a command.

    0: the run is complete and its report is written. EXIT_PREEMPTED: a signal asked it to stop and it saved; the same
    call continues from there. EXIT_NOT_SAVED: it reached one of these ends, but its last state could not be saved.

    Args:
        config: the experiment.
        model: a module with the methods of `TransMamba`: `__call__(tokens, segment_ids)`, `hidden` and `logits`, and
            a parameter `embedding` or `lm_head` that `logits` uses. None: `TransMamba` with the kernels of
            `config.kernels`, of the run's first start or of this device's calibration.
            Only a `TransMamba` writes samples at the end.
        documents: texts, UTF-8 bytes or token ids (a list or an array), in place of `data.source`; to resume, give them
            again. Of every 20 documents, number 9 is held out for validation and number 19 for test.

    Raises:
        ValueError: the configuration cannot run here, or is not that of the run in the work directory; or another run
            is using that directory, or has taken it over.
        OSError: a file cannot be read or written, other than for a checkpoint or a line of metrics.
        NonFiniteError: the run diverged; nothing was saved since.
    """
    config = dataclasses.replace(config, workdir=str(expand_path(config.workdir)))
    storage.require_checkpoints(expand_path(config.workdir), "workdir")
    if model is None and config.train.given_model is not None:
        raise ValueError(f"the run trains {config.train.given_model}: give that model to tm.train(config, model=...)")
    if model is not None:
        given_model.require_hashable(model)
        named = dataclasses.replace(config.train, given_model=given_model.own_name(model))
        config = dataclasses.replace(config, train=named)
    if documents is not None:
        config = dataclasses.replace(config, data=data.give_documents(config.data, config.workdir, documents))
    for source in config.data.sources:
        registry.check_source(source)
    with Preemption() as preemption, contextlib.ExitStack() as cleanup:
        opened = _open_run(config, model, preemption, cleanup)
        if opened is None:
            hosts.log_first("stopped before the first step; the same command starts the run")
            return EXIT_PREEMPTED
        run, state, start = opened
        # 3. Steps, then the report.
        state, step = run.train(state, start)
        if run.checkpointer.newest != step:
            run.console.say(f"step {step} is NOT saved; the checkpoints are {run.saved_steps()}")
            return EXIT_NOT_SAVED
        if run.any_process.now(preemption.requested):
            run.console.say(f"stopped at step {step}; the same command continues from there")
            return EXIT_PREEMPTED
        run.checkpointer.wait()
        completion.complete(
            config=run.config,
            workdir=run.workdir,
            model=run.model,
            tokenizer=run.tokenizer,
            state=state,
            step=step,
            console=run.console,
            trained=step > start,
            writer=run.writer,
        )
        return 0


def _open_run(
    config: Config, model: nn.Module | None, preemption: Preemption, cleanup: contextlib.ExitStack
) -> tuple["_Run", TrainState, int] | None:
    """Check and open everything that a run needs; return it with the state and the step that it starts from.

    None: a signal asked to stop while the run waited for the lock of its work directory.
    """
    # 1. What can be refused cheaply is refused first, everywhere: other hosts, devices, the earlier run, the data.
    mesh = _agreed_mesh(config)
    cleanup.enter_context(jax.set_mesh(mesh))
    workdir = expand_path(config.workdir)
    lock = None
    with hosts.collective_errors():
        if hosts.is_first():
            lock = cleanup.enter_context(run_lock.hold(workdir, stopped=lambda: preemption.requested))
    if hosts.broadcast_from_first(lock is None):
        return None
    hosts.require_same({f"workdir {workdir}, which all processes share": run_lock.shown(workdir)})
    chosen = kernels.choose(config.model, config.kernels, workdir) if model is None else config.kernels
    model = TransMamba(config.model, chosen) if model is None else model
    with hosts.collective_errors():
        check_installed(config)
        config = starting_points.with_origin(config, workdir)
        schedule_sampling.programs(config, model)
        resume.compare_with_earlier_run(config, model, mesh, workdir)
        tokenizer, batches = _open_data(config, mesh)
        cleanup.callback(batches.close)
        evaluator = Evaluator(model, config, tokenizer, mesh) if config.eval.every > 0 else None
        others = _evaluators(config, model, evaluator)

    # 2. The state: the newest checkpoint's, or a new one. Then where numbers go: one process writes and prints.
    checkpointer = Checkpointer(workdir / "checkpoints", config.checkpoint)
    cleanup.push(lambda kind, *_: checkpointer.close(failing=kind is not None))
    state, start = resume.newest_state(checkpointer, batches, config, model, mesh, tokenizer)
    writer = None
    with hosts.collective_errors(OSError):
        if hosts.is_first():
            writer = cleanup.enter_context(MetricsWriter(workdir, start, open_writers(config, workdir, start)))
    run = _Run(
        config=config,
        workdir=workdir,
        lock=lock,
        model=model,
        kernels=chosen,
        mesh=mesh,
        tokenizer=tokenizer,
        batches=batches,
        checkpointer=checkpointer,
        preemption=preemption,
        any_process=hosts.AnyProcess(mesh),
        writer=writer,
        console=cleanup.enter_context(Console(start, config.train.steps)),
        evaluator=evaluator,
        others=others,
        row_share=hosts.row_share(mesh, config.data.batch_size),
    )
    return run, state, start


def _evaluators(config: Config, model: nn.Module, evaluator: Evaluator | None) -> dict[str, Evaluator]:
    """Return an evaluator for each of `eval.schedules`."""
    if evaluator is None or not config.eval.schedules:
        return {}
    schedule_sampling.require_transmamba(model, "eval.schedules")
    points = schedule_sampling.resolve(config, config.eval.schedules, "eval.schedules")
    return {name: evaluator.under(choice) for name, choice in zip(config.eval.schedules, points, strict=True)}


def _agreed_mesh(config: Config) -> Mesh:
    """Return the mesh of this run, on which the processes agree as on all else."""
    hosts.require_same({**hosts.machine_facts(), **hosts.config_facts(config)}, config.hosts.timeout)
    for warning in config.warnings():
        hosts.log_first(f"warning: {warning}")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(config, mesh)
    return mesh


def _open_data(config: Config, mesh: Mesh) -> tuple[data.Tokenizer, data.BatchIterator]:
    """Return the tokenizer and the rows of the batches that this process reads."""
    tokenizer = data.open_tokenizer(config.data)
    data.check_vocabulary(tokenizer, config.model.vocab_size)
    part, parts = hosts.row_share(mesh, config.data.batch_size)
    return tokenizer, data.train_batches(config.data, tokenizer, part, parts)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run: everything that stays the same from step to step."""

    config: Config
    workdir: Path
    lock: run_lock.RunLock | bucket_lock.BucketLock | None
    """Of the first process."""
    model: nn.Module
    kernels: KernelsConfig
    mesh: Mesh
    tokenizer: data.Tokenizer
    batches: data.BatchIterator
    checkpointer: Checkpointer
    preemption: Preemption
    any_process: hosts.AnyProcess
    writer: MetricsWriter | None
    """Of the first process."""
    console: Console
    evaluator: Evaluator | None
    """None: nothing is evaluated."""
    others: dict[str, Evaluator]
    """Of each of `eval.schedules`."""
    row_share: tuple[int, int]
    """(part, parts): the share of a batch's rows that this process reads."""

    def train(self, state: TrainState, start: int) -> tuple[TrainState, int]:
        """Go from `start` to the last step, or to where a signal asks to stop; return the state and its step."""
        steps = self.config.train.steps
        log = StepLog(self.config, self.console, self.write)

        # A stop during the evaluation of the restored step left it undone.
        missing = hosts.broadcast_from_first(self.writer is not None and not self.writer.has(start, "eval/loss"))
        loss = None
        if start > 0 and self._evaluation_due(start) and missing:
            loss = self._evaluate(state, start)
            self._note_loss(start, loss)
        if start < steps and not self.any_process.now(self.preemption.requested):
            train_steps = self._compile(state, log)
            self._keep_config()  # now: what a kernel refuses leaves the earlier run's config as it was
        elif start >= steps or not (self.workdir / "config.yaml").exists():
            self._keep_config()

        step, measured = start, (start, loss)
        while step < steps and not self.any_process.lagged(self.preemption.requested):
            # a. The batch is read and the step is queued; the device works while the host continues.
            with self._saved_first(state, step, log):
                read = next(self.batches)
            rows = schedule_sampling.with_transpoints(self.config, read, step, *self.row_share)
            facts = self.batches.facts()
            batch = sharding.place_batch(rows, self.mesh)
            train_step = train_steps[schedule_sampling.of_step(self.config, step)]
            with jax.transfer_guard("disallow"):  # an accidental copy from or to the host would stall the devices
                state, metrics = train_step(state, batch)
            step += 1

            # b. The metrics of the step before are fetched: they are ready, so nobody waits. A diverged run ends here.
            log.push(step, metrics, state, facts)
            if not self.checkpointer.saving:
                self._settle(step)

            # c. Evaluation, then the checkpoint: it knows its held-out loss, and every line up to its step is on disk.
            if self._evaluation_due(step) or self._checkpoint_due(step):
                nonfinite_steps = log.flush(state)
                log.clock.pause()
                with self._saved_first(state, step, log):
                    loss = self._evaluate(state, step) if self._evaluation_due(step) else None
                measured = step, loss
                # A periodic checkpoint in the middle of bad steps would push out one from before them.
                if step == steps or (self._checkpoint_due(step) and nonfinite_steps == 0):
                    self._save(state, step, loss)
                log.clock.resume()

        # d. Asked to stop, wherever that was, or the last save failed: the state of the last complete step is kept.
        self._settle(step)
        if self.checkpointer.newest != step:
            log.flush(state)
            self._save(state, step, measured[1] if measured[0] == step else None)
            self._settle(step)
        return state, step

    @contextlib.contextmanager
    def _saved_first(self, state: TrainState, step: int, log: StepLog) -> Iterator[None]:
        """Save the state before an error of the data or of an evaluation ends the run.

        With several processes nothing is saved: the others do not know of the error.
        """
        try:
            yield
        except (ValueError, OSError):
            if step > 0 and jax.process_count() == 1 and self.checkpointer.newest != step and log.flush(state) == 0:
                self._save(state, step, None)
                self._settle(step)
            raise

    def _note_loss(self, step: int, loss: float | None) -> None:
        """Write a held-out loss that was measured after the save into the checkpoint, for `checkpoint.keep_best`."""
        if loss is not None and hosts.is_first():
            try:
                manifests.set_loss(self.workdir / "checkpoints" / str(step), loss)
            except (OSError, ValueError) as error:
                self.console.alarm(f"checkpoint {step} does not know its held-out loss: {error}")

    def _keep_config(self) -> None:
        """Write what the next start compares itself with: config.yaml and kernels.json."""
        with hosts.collective_errors():
            if self.lock is not None:
                self.lock.check()
        with hosts.collective_errors(OSError):
            if hosts.is_first():
                text = config_io.to_yaml(self.config)
                storage.replace_text(self.workdir / "config.yaml", text, "config.yaml.new")
                kernels.save(self.kernels, self.workdir)

    def write(self, record: Record) -> None:
        """Append a line to metrics.jsonl, from the process that has it; a line that does not fit waits for the next."""
        if self.writer is not None:
            try:
                self.writer.write(record)
            except OSError as error:
                self.console.alarm(f"metrics of step {record['step']} wait for the next line: {error}")

    def _flush_metrics(self, step: int) -> None:
        """Store every line up to the step of a checkpoint before it: a resumed run does not write them again."""
        if self.writer is not None:
            try:
                self.writer.flush()
            except OSError as error:
                self.console.alarm(f"metrics up to step {step} are not written: {error}")

    def saved_steps(self) -> str:
        """List the complete checkpoints, for a message."""
        try:
            return str(self.checkpointer.steps())
        except OSError as error:
            return f"not known: {error}"

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def _checkpoint_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _compile(self, state: TrainState, log: StepLog) -> Sequence[Step]:
        """Compile the step of every schedule before any data is consumed, so that a stop during it loses nothing."""
        self.console.say(parameter_groups.describe(self.config, state.params, state.opt_state))
        self.console.say(f"compiling for {jax.device_count()} x {jax.devices()[0].device_kind}")
        begin = time.perf_counter()
        programs = schedule_sampling.programs(self.config, self.model)
        compiled = [compile_train_step(config, model, self.mesh) for config, model in programs]
        log.start(compile_seconds=time.perf_counter() - begin)
        return compiled

    def _evaluate(self, state: TrainState, step: int) -> float | None:
        """Measure, log and return the held-out loss; None when a signal stopped it before, or nothing is evaluated."""
        if self.evaluator is None:
            return None
        should_stop = lambda: self.any_process.lagged(self.preemption.requested)
        result = None
        try:
            result = self.evaluator(state.params, should_stop)
            others = {name: evaluator(state.params, should_stop) for name, evaluator in self.others.items()}
        except EvaluationStopped:  # nothing is written, and the next start measures all of it again
            return None if result is None else result.loss
        record = {"step": step, **result.metrics()}
        for name, other in others.items():
            record |= {key.replace("eval/", f"eval/{name}/", 1): value for key, value in other.metrics().items()}
        self.write(record)
        self.console.say(f"step {step}  held-out loss {result.loss:.4f}  bits per byte {result.bits_per_byte:.4f}")
        for name, other in others.items():
            self.console.say(
                f"step {step}  under {name}: loss {other.loss:.4f}  bits per byte {other.bits_per_byte:.4f}"
            )
        return result.loss

    def _save(self, state: TrainState, step: int, eval_loss: float | None) -> None:
        """Start to save; what breaks is an alarm, and the next step that is due tries again."""
        self._settle(step)
        with hosts.collective_errors():
            if self.lock is not None:
                self.lock.check()
        self._flush_metrics(step)
        texts = config_io.checkpoint_yaml(self.config), self.tokenizer.to_json()
        try:
            self.checkpointer.save(step, state, self.batches.get_state(), *texts, eval_loss)
        except SaveError as error:
            self._alarm(step, error)

    def _settle(self, step: int) -> None:
        """Wait for the save under way, and raise the alarm where it failed."""
        try:
            self.checkpointer.wait()
        except SaveError as error:
            self._alarm(step, error)

    def _alarm(self, step: int, error: SaveError) -> None:
        failed = self.checkpointer.failed_saves
        self.console.alarm(f"{error}. Failed saves: {failed}. The checkpoints are {self.saved_steps()}")
        self.write({"step": step, "checkpoint/failed_saves": failed})
