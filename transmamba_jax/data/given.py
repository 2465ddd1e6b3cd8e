"""The source `documents:<name>`: documents that a program gave to `train` in this process."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transmamba_jax.config import DataConfig
from transmamba_jax.data.documents import GivenDocuments
from transmamba_jax.data.splits import SPLITS, RecordNumbers, records_of_split, require_name, too_few

_GIVEN: dict[str, Sequence[Any]] = {}


def give_documents(config: DataConfig, name: str, documents: Sequence[Any]) -> DataConfig:
    """Keep `documents` in this process and return a config whose source they are.

    Of every 20 documents, number 9 is held out for validation and number 19 for test.

    Raises:
        ValueError: `documents` is no sequence.
    """
    config = dataclasses.replace(config, source=f"documents:{name}", mixture=())
    GivenDocuments(documents, "documents", config)  # refuses what is none
    _GIVEN[name] = documents
    return config


@dataclasses.dataclass(frozen=True)
class _Chosen:
    documents: Sequence[Any]
    numbers: RecordNumbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self.documents[self.numbers[index]]


def open_given(config: DataConfig, name: str, split: str) -> GivenDocuments:
    """Return the documents of one split.

    Raises:
        ValueError: they were given in another process, or the split is empty.
    """
    if name not in _GIVEN:
        raise ValueError(
            f"data.source 'documents:{name}' stands for documents that a program gave to transmamba_jax.train; give "
            "them again with documents=..., or set data.source to files"
        )
    require_name("split", split, (*SPLITS, "all"), f"of data.source='documents:{name}'")
    documents = _GIVEN[name]
    chosen = _Chosen(documents, records_of_split(len(documents), split))
    if not len(chosen):
        counts = {each: len(records_of_split(len(documents), each)) for each in SPLITS}
        raise ValueError(too_few(config, split, "documents", counts))
    return GivenDocuments(chosen, f"split {split!r} of the documents", config)
