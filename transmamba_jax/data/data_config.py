"""The `data` section of a config: a frozen dataclass with every default, checked once."""

import dataclasses
import math
from typing import Literal

from transmamba_jax.data import registry
from transmamba_jax.runtime.checks import INT32_MAX, at_least, at_most, check_types, require


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text to read, and the way from there to tokens and rows."""

    source: str = "stdlib"
    """`stdlib`, `text:<glob>`, `jsonl:<glob>`, `parquet:<glob>`, `hf:<folder>`, `tfds:<name>[/config][:version]`,
    `array_record:<glob>`, a task such as `synthetic:recall?keys=32`, or a registered source."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Sources to read in place of `source`, and the share of the rows that each gives: `{"jsonl:a/*": 3, "hf:b": 1}`.
    Shares are divided by their sum; a source that was read to its end begins again."""
    cache_dir: str | None = None
    """Folder of prepared data sets and indexes; None: $XDG_CACHE_HOME/transmamba_jax, by default in ~/.cache (a tfds:
    source: TFDS's own default)."""
    text_field: str = "text"
    """Field with the text of a row: jsonl, parquet, hf and tfds sources."""
    prompt_field: str | None = None
    """Field with the prompt of a row, to train on completions alone: jsonl, parquet, hf and array_record sources."""
    completion_field: str | None = None
    """Field with the completion, which follows the prompt without anything between them."""
    messages_field: str | None = None
    """Field with a chat, a list of {role, content}: what the assistant says is trained on, the rest is read."""
    chat_template: Literal["chatml", "plain"] = "chatml"
    """Text of a chat: `<|im_start|>role`, content and `<|im_end|>`, or `Role: content`, a line each."""
    on_error: Literal["raise", "skip"] = "raise"
    """A broken line or row of jsonl, parquet and hf sources is an error, or is skipped and counted."""
    train_split: str = "train"
    """Split that is trained on."""
    eval_split: str = "validation"
    """Split of the held-out loss."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a tokenizer.json."""
    end_of_document: str | None = None
    """Added token of a tokenizer.json that ends a document; None: the one that it puts behind a text itself, else one
    of a few known names."""
    seq_len: int = 512
    """Tokens of one row that the model reads (T)."""
    batch_size: int = 8
    """Rows of one optimizer step, over all processes and microbatches."""
    packing: Literal["concat", "first_fit"] = "concat"
    """Concatenate documents and cut rows, or place whole documents first-fit with segment ids."""
    shuffle: bool = True
    """Shuffle documents of the training split, in a new order each epoch."""
    seed: int = 0
    """Seed of the shuffling."""
    num_workers: int = 0
    """Worker processes that read ahead; 0: the training process reads."""
    streams: int = 0
    """Parts that the documents are read in, shared out among the processes; 0: as many as the checkpoint has that the
    run continues from, else one per process. A run may continue with any number of processes that divides it."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_types("data", self)
        at_least("data", self, 1, "seq_len", "batch_size")
        at_most("data", self, INT32_MAX, "seq_len", "batch_size")
        at_least("data", self, 0, "num_workers", "seed", "streams")
        require(
            self.end_of_document is None or self.tokenizer != "bytes",
            f"data.end_of_document is for a tokenizer.json: data.tokenizer='bytes' ends a document with byte 0, found "
            f"{self.end_of_document!r}",
        )
        require(
            (self.prompt_field is None) == (self.completion_field is None),
            f"data.prompt_field and data.completion_field go together, found {self.prompt_field!r} and "
            f"{self.completion_field!r}",
        )
        require(
            self.prompt_field is None or self.prompt_field != self.completion_field,
            f"data.prompt_field and data.completion_field must differ, found {self.prompt_field!r} twice",
        )
        require(
            None in (self.prompt_field, self.messages_field),
            f"give data.prompt_field or data.messages_field, found {self.prompt_field!r} and {self.messages_field!r}",
        )
        registry.check_form(self.source)
        self._check_mixture()
        require(
            not self.completions_only or any(map(registry.has_fields, self.sources)),
            f"data.prompt_field and data.messages_field are for rows with fields (jsonl, parquet, hf or array_record), "
            f"found {', '.join(self.sources)}",
        )

    def _check_mixture(self) -> None:
        names = self.sources
        require(len(set(names)) == len(names), f"data.mixture must name a source once, found {', '.join(names)}")
        for name, weight in self.mixture:
            registry.check_form(name)
            require(
                not name.startswith("synthetic:"),
                f"data.mixture must be of documents, found the task {name!r}; name it in data.source",
            )
            require(
                math.isfinite(weight) and weight > 0,
                f"data.mixture[{name!r}] must be a positive share, found {weight}; leave a source of no share out",
            )
        require(
            not self.mixture or self.source == DataConfig.source,
            f"give data.source or data.mixture, found {self.source!r} and {', '.join(names)}; --data.mixture without "
            f"values removes the mixture of a config, --data.source {DataConfig.source} its source",
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the sources that are read: those of the mixture, else `source`."""
        return tuple(name for name, _ in self.mixture) or (self.source,)

    def of_source(self, name: str) -> "DataConfig":
        """Return the config of one of `sources`; one whose rows have no fields is read as text."""
        if not self.mixture:
            return self
        one = dataclasses.replace(self, mixture=(), prompt_field=None, completion_field=None, messages_field=None)
        one = dataclasses.replace(one, source=name)
        names = ("prompt_field", "completion_field", "messages_field") if registry.has_fields(name) else ()
        return dataclasses.replace(one, **{each: getattr(self, each) for each in names})

    @property
    def completions_only(self) -> bool:
        """Tell whether completions, or what an assistant says, are trained on alone: rows have weights then."""
        return self.prompt_field is not None or self.messages_field is not None
