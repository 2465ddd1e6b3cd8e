"""The sources that `data.source` can name, and how a program adds its own.

Light to import: the module of a built-in source is loaded when the source is opened.
"""

import dataclasses
import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transmamba_jax.config import DataConfig

Opener = Callable[["DataConfig", str, str], Sequence[str | bytes | Sequence[int]]]
"""(config, the part of data.source after the colon, split) -> documents."""


@dataclasses.dataclass(frozen=True)
class _Source:
    form: str
    """Spelling in data.source."""
    opener: Opener | str
    """Function, or `module:function` of this package."""


_SOURCES = {
    "stdlib": _Source("stdlib", "tfds_source:open_stdlib"),
    "text": _Source("text:<glob>", "text_files:open_text"),
    "jsonl": _Source("jsonl:<glob>", "json_rows:open_jsonl"),
    "parquet": _Source("parquet:<glob>", "arrow_rows:open_parquet"),
    "hf": _Source("hf:<folder>", "arrow_rows:open_hf"),
    "tfds": _Source("tfds:<name>[/config][:version]", "tfds_source:open_tfds"),
    "array_record": _Source("array_record:<glob>", "records:open_records"),
    "synthetic": _Source("synthetic:<task>[?key=value&...]", "task_batches:open_task"),
    "documents": _Source("documents:<name>", "given:open_given"),
}
_BUILT_IN = frozenset(_SOURCES)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_WITH_FIELDS = frozenset({"jsonl", "parquet", "hf", "array_record"})


def register_source(name: str, opener: Opener) -> None:
    """Let `data.source: "name"` and `"name:anything"` mean the documents that `opener` returns.

    `opener(config, rest, split)` gets the `DataConfig`, the part of `data.source` after the colon ("" without one) and
    the split that is asked for (`data.train_split` or `data.eval_split`). It returns a sequence: `len(documents)` and
    `documents[i]`, a str, UTF-8 bytes or a list of token ids, the same for the same i every time. The pipeline
    shuffles, packs and resumes it as any other source. With `data.num_workers` > 0 it must be picklable, and each
    process of a run on several hosts has to register it. To refuse a split, raise a ValueError that says which ones
    there are.

        >>> from transmamba_jax.config import DataConfig
        >>> from transmamba_jax.data import load_tokenizer, register_source, train_batches
        >>> def open_squares(config, rest, split):
        ...     numbers = range(int(rest)) if split == "train" else range(int(rest), int(rest) + 10)
        ...     return [f"{n} squared is {n * n}" for n in numbers]
        >>> register_source("squares", open_squares)
        >>> config = DataConfig(source="squares:1000", seq_len=31, batch_size=4)
        >>> next(train_batches(config, load_tokenizer("bytes")))["tokens"].shape
        (4, 32)

    Raises:
        ValueError: `name` is that of a built-in source, or not an identifier.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"a source's name must be letters, digits and _, found {name!r}")
    if name in _BUILT_IN:
        raise ValueError(f"{name!r} is a built-in source ({', '.join(sorted(_BUILT_IN))}); register another name")
    _SOURCES[name] = _Source(f"{name}[:<anything>]", opener)


def check_form(source: str) -> None:
    """Refuse a `data.source` that is no name, or a built-in one in another form than it needs.

    A name that this process does not know is accepted: a config is read without the program that registered its source.

    Raises:
        ValueError: the message has every form and the nearest name.
    """
    name, _, rest = source.partition(":")
    if (name not in _BUILT_IN and _NAME.fullmatch(name) is None) or (
        name in _BUILT_IN and (rest != "") != (":" in _SOURCES[name].form)
    ):
        raise ValueError(_unknown(source))


def check_source(source: str) -> None:
    """Refuse a `data.source` that cannot be opened: `check_form`, and the name has to be known in this process.

    Raises:
        ValueError: the message has every form and the nearest name.
    """
    check_form(source)
    if source.partition(":")[0] not in _SOURCES:
        raise ValueError(_unknown(source))


def _unknown(source: str) -> str:
    name = source.partition(":")[0]
    near = [] if name in _SOURCES else difflib.get_close_matches(name, _SOURCES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if _NAME.fullmatch(name) and name not in _BUILT_IN:
        hint += (
            f"; if {name!r} is a source of your own, call transmamba_jax.register_source({name!r}, ...) in this "
            "process first"
        )
    return (
        f"data.source must be {', '.join(repr(each.form) for each in _SOURCES.values())}, or a name that was "
        f"registered in this process, found {source!r}{hint}"
    )


def is_registered(name: str) -> bool:
    """Return whether `data.source` may begin with `name`."""
    return name in _SOURCES


def has_fields(source: str) -> bool:
    """Return whether the rows of a `data.source` may have a prompt and a completion, or a chat."""
    return source.partition(":")[0] in _WITH_FIELDS


def find_opener(name: str) -> Opener:
    """Return the opener of a source that `check_source` has accepted."""
    opener = _SOURCES[name].opener
    if not isinstance(opener, str):
        return opener
    module, _, function = opener.partition(":")
    found: Opener = getattr(importlib.import_module(f"transmamba_jax.data.{module}"), function)
    return found
