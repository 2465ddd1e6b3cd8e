"""Configuration: frozen dataclasses with every default, checked once. config_io.py reads and writes them."""

import dataclasses
import math
from typing import Literal

from transmamba_jax import schedule
from transmamba_jax.data.data_config import DataConfig
from transmamba_jax.model_config import KernelsConfig, ModelConfig
from transmamba_jax.runtime.checks import at_least, at_most, check_types, divisors, require


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """Update rule; muon treats the layers' matrices and leaves the rest to AdamW."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    final_learning_rate: float = 3e-5
    """Learning rate at the last step."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices that muon treats; follows the same schedule."""
    learning_rate_scale: float = 1.0
    """Factor of every learning rate: peak and final, of AdamW and of muon."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay; wsd (warm-up, stable, decay): stable, then linear decay over decay_fraction of
    the steps; or constant at the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    restart_step: int = 0
    """Step after which the schedule starts again: warm-up, then decay over the steps that are left. To extend a
    finished run of N steps, set it to N and raise train.steps. 0: never."""
    decay_fraction: float = 0.2
    """Share of the steps that the wsd schedule decays over."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on A_log, D, the Δ bias, convolution biases or norms."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    """Factors of the learning rate, weight decay included, by shell patterns over parameter paths: pattern and factor,
    such as embedding 0.1, in YAML {embedding: 0.1}. Of several patterns that match, the last counts."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_types("optimizer", self)
        patterns = [pattern for pattern, _ in self.lr_multipliers]
        twice = next((pattern for pattern in patterns if patterns.count(pattern) > 1), None)
        require(twice is None, f"optimizer.lr_multipliers has the pattern {twice!r} more than once; give it once")
        for pattern, factor in self.lr_multipliers:
            require(
                math.isfinite(factor) and factor > 0,
                f"optimizer.lr_multipliers[{pattern!r}] must be positive, found {factor}; train.freeze keeps "
                "parameters as they are",
            )
        for name in ("learning_rate", "muon_learning_rate", "learning_rate_scale", "eps"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"optimizer.{name} must be positive, found {value}")
        for name in ("final_learning_rate", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"optimizer.{name} must be >= 0, found {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} must be in [0, 1), found {value}")
        require(
            0 < self.decay_fraction <= 1, f"optimizer.decay_fraction must be in (0, 1], found {self.decay_fraction}"
        )
        at_least("optimizer", self, 0, "warmup_steps", "restart_step")
        require(
            self.schedule == "constant" or self.final_learning_rate <= self.learning_rate,
            f"optimizer.final_learning_rate={self.final_learning_rate} must not exceed "
            f"optimizer.learning_rate={self.learning_rate}; lower it with --optimizer.final-learning-rate, or scale "
            "all rates with --optimizer.learning-rate-scale",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps of the whole run, resumed or not."""
    init_from: str | None = None
    """Parameters that a new run starts from: a run, a checkpoint (PATH@STEP; the newest without @STEP), an exported
    folder, or a folder of Mamba-2 safetensors. Optimizer, step and data start again. A resumed run does not read it."""
    init_partial: bool = False
    """Take from init_from what fits, with the rows of the embedding that two vocabularies share; the rest keeps its
    initial values."""
    seed: int = 0
    """Seed of the parameters and of the samples."""
    accumulation: int = 1
    """Microbatches of one step; the gradient equals that of the whole batch."""
    freeze: tuple[str, ...] = ()
    """Shell patterns over parameter paths, such as embedding and layers/mlp/*: these parameters do not move and have
    no optimizer state."""
    loss_chunk: int | None = None
    """Tokens of a device whose logits exist at one time in the loss. None: 8192, or fewer on a CPU, whose caches then
    hold them."""
    given_model: str | None = None
    """Set by tm.train where a program gives a TransMamba with an attention function or a class of its own: a checkpoint
    does not hold these, and commands do not read it as if it were plain."""
    schedule_sampling: Literal["none", "pool", "rows"] = "none"
    """Train under random schedules. none: model.transpoints; pool: each step runs one of schedule_pool; rows: each row
    draws its TransPoints, at the cost of both branches everywhere."""
    schedule_pool: tuple[str, ...] = ()
    """Schedules to draw from: names (v9, transformer, ...) or TransPoints ("0 64 128"). Without any, `rows` draws for
    every layer from 0, the powers of two, and data.seq_len."""
    schedule_sampling_steps: int = 0
    """Steps under random schedules, counted from the first; those after run model.transpoints, as fine-tuning for it.
    0: all steps are under random schedules."""
    schedule_distillation: float = 0.0
    """Share s of self-distillation. Above 0, each step also runs schedule_teacher, and the step's schedule learns from
    its soft targets: (teacher's loss + (1 - s) · loss + s · KL) / 2. 0: none; 1: soft targets alone."""
    schedule_teacher: str = "transformer"
    """Schedule whose predictions are the soft targets: a name or TransPoints."""
    log_every: int = 10
    """Steps between training lines in metrics.jsonl."""
    max_nonfinite_steps: int = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    tensorboard: bool = True
    """Write metrics as TensorBoard events, too."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the metrics, too (extra `wandb`); WANDB_MODE=offline sends nothing."""
    mlflow: str | None = None
    """Experiment of MLflow that gets the metrics, too (extra `mlflow`); MLFLOW_TRACKING_URI says where."""
    sample_tokens: int = 256
    """Tokens of each sample written at the end; 0: none."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_types("train", self)
        at_least("train", self, 1, "steps", "accumulation", "log_every", "max_nonfinite_steps")
        at_most("train", self, 2**32 - 1, "seed")
        at_least("train", self, 0, "seed", "sample_tokens", "schedule_sampling_steps")
        if self.loss_chunk is not None:
            at_least("train", self, 1, "loss_chunk")
        require(
            0 <= self.schedule_distillation <= 1,
            f"train.schedule_distillation must be in [0, 1], found {self.schedule_distillation}",
        )
        require(
            self.schedule_sampling != "pool" or len(self.schedule_pool) > 0,
            "train.schedule_sampling=pool needs train.schedule_pool: names or lists of TransPoints, found none",
        )
        require(
            self.schedule_sampling != "none" or not self.schedule_pool,
            "train.schedule_pool is for train.schedule_sampling pool or rows, found none; set it or drop the pool",
        )
        require(
            self.schedule_sampling != "none" or self.schedule_sampling_steps == 0,
            f"train.schedule_sampling_steps={self.schedule_sampling_steps} is for train.schedule_sampling pool or "
            "rows, found none; set it or leave the steps out",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices per axis of the mesh; -1 (at most once) takes the remaining devices."""

    data: int = -1
    """Copies of the parameters; rows are split over them."""
    fsdp: int = 1
    """Parts that parameters and optimizer state are cut into; rows are split over them too."""
    context: int = 1
    """Parts that the tokens of a row are split into."""
    tensor: int = 1
    """Parts that heads, the MLP's width and the vocabulary are split into."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_types("mesh", self)
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name} must be >= 1, or -1 for what is left, found {size}")
        require(list(sizes.values()).count(-1) <= 1, f"at most one axis of mesh may be -1, found {sizes}")


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Addresses by which processes on several hosts find one another; a Cloud TPU slice and Slurm need none of it."""

    coordinator: str | None = None
    """HOST:PORT of the first process; None: from the environment."""
    num_processes: int | None = None
    """Number of processes, one per host; None: from the environment; 1: a single process in any environment."""
    process_id: int | None = None
    """Index of this process, from 0; None: from the environment."""
    timeout: int = 300
    """Seconds that the processes wait for one another at the start."""
    heartbeat: int = 100
    """Seconds after which a process that is silent is taken for dead and the others end."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_types("hosts", self)
        at_least("hosts", self, 1, "timeout", "heartbeat")
        processes = math.inf if self.num_processes is None else self.num_processes
        require(processes >= 1, f"hosts.num_processes must be >= 1, found {self.num_processes}")
        require(
            self.process_id is None or 0 <= self.process_id < processes,
            "hosts.process_id must be from 0 to hosts.num_processes - 1, "
            f"found {self.process_id} of {self.num_processes}",
        )
        port = "" if self.coordinator is None else self.coordinator.rpartition(":")[2]
        require(
            self.coordinator is None or port.isdecimal(),
            f"hosts.coordinator must be HOST:PORT, found {self.coordinator!r}",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep_latest: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out loss that are kept besides, of those whose step was evaluated: let
    checkpoint.every and eval.every be multiples of one another; 0: none."""
    partial: bool = False
    """Load what matches from a checkpoint of another configuration, and list the rest, which is initialised."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_types("checkpoint", self)
        at_least("checkpoint", self, 0, "every", "keep_best")
        at_least("checkpoint", self, 1, "keep_latest")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training."""

    every: int = 500
    """Steps between evaluations; 0: never, not even at the end."""
    schedules: tuple[str, ...] = ()
    """Schedules that the held-out windows are read under besides model.transpoints: names, or TransPoints ("0 64 128").
    Their figures are eval/<schedule>/loss and so on."""
    windows: int = 128
    """Rows that the held-out loss is measured over, evenly spread over the split; 0: all."""
    batch_size: int = 8
    """Rows of one evaluation batch."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_types("eval", self)
        at_least("eval", self, 0, "every", "windows")
        at_least("eval", self, 1, "batch_size")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig = ModelConfig()
    kernels: KernelsConfig = KernelsConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    workdir: str = "runs/default"
    """Folder of the resolved config, metrics, checkpoints and the report; an earlier run there is resumed."""

    def __post_init__(self) -> None:
        """Check the rules between sections."""
        check_types("config", self)
        require(
            self.data.batch_size % self.train.accumulation == 0,
            f"train.accumulation={self.train.accumulation} must divide data.batch_size={self.data.batch_size}; "
            f"use one of {divisors(self.data.batch_size)}",
        )
        require(
            self.optimizer.restart_step == 0 or self.optimizer.restart_step < self.train.steps,
            f"optimizer.restart_step={self.optimizer.restart_step} must be below train.steps={self.train.steps}, or 0",
        )

        require(
            self.model.ablation == "none" or self.train.sample_tokens == 0,
            f"train.sample_tokens must be 0 with model.ablation={self.model.ablation}, which cannot decode, "
            f"found {self.train.sample_tokens}",
        )

    def warnings(self) -> list[str]:
        """Describe options of a config that can run and will not do what they ask for."""
        return [*self._schedule_warnings(), *self._checkpoint_warnings()]

    def _schedule_warnings(self) -> list[str]:
        misfit = schedule.misfit(self.model.transpoints, self.data.seq_len)
        if misfit is None:
            return []
        return [
            f"model.transpoints={', '.join(map(str, self.model.transpoints))} {misfit}, and "
            f"data.seq_len={self.data.seq_len}; a name, such as --model.transpoints log_spaced, is scaled to it"
        ]

    def _checkpoint_warnings(self) -> list[str]:
        save, measure = self.checkpoint.every, self.eval.every
        if not (self.checkpoint.keep_best and measure and 0 < save < self.train.steps):
            return []
        if math.lcm(save, measure) < self.train.steps:
            return []
        return [
            f"checkpoint.keep_best={self.checkpoint.keep_best} will keep none: no step before the last has both a "
            f"checkpoint (checkpoint.every={save}) and an evaluation (eval.every={measure}); make one a multiple of "
            "the other"
        ]
