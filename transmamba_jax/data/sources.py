"""Open what `data.source` names as a random-access sequence of UTF-8 documents.

A source opens its files when the first document is asked for and is pickled without them, so that worker processes
get their own handles. Files in a bucket are copied into `data.cache_dir` first, once on every machine, as long as their
names, sizes and versions stay the same.
"""

from transmamba_jax.config import DataConfig
from transmamba_jax.data.cache_folder import cache_folder
from transmamba_jax.data.documents import Documents, GivenDocuments
from transmamba_jax.data.registry import check_source, find_opener
from transmamba_jax.runtime import storage
from transmamba_jax.runtime.checks import require
from transmamba_jax.runtime.paths import show_path

OF_FILES = frozenset({"text", "jsonl", "parquet", "hf", "array_record"})


def open_documents(config: DataConfig, split: str) -> Documents:
    """Return the documents of one split of the configured source.

    Raises:
        ValueError: the source or the split does not exist or is empty; the message lists the existing ones.
    """
    require(not config.mixture, "open_documents is for one source, found a mixture; take config.of_source(name)")
    check_source(config.source)
    name, _, rest = config.source.partition(":")
    source = f"split {split!r} of data.source '{show_path(config.source)}'"
    copied = copy_bucket(config, config.source)
    try:
        found = find_opener(name)(config, rest if copied is None else copied.pattern, split)
        documents = found if isinstance(found, Documents) else GivenDocuments(found, source, config)
        if len(documents) == 0:
            raise ValueError(f"{source} has no documents")
    except ValueError as error:
        if copied is None:
            raise
        raise ValueError(copied.told(str(error))) from None
    return documents


def copy_bucket(config: DataConfig, source: str) -> storage.CopiedPattern | None:
    """Copy the files of a source into the cache; None: they are not in a bucket.

    Raises:
        ValueError: there are none, or they cannot be copied.
    """
    name, _, rest = source.partition(":")
    if not storage.is_url(rest) or name not in OF_FILES:
        return None
    try:
        return storage.local_pattern(rest, cache_folder(config), folders=name == "hf")
    except ValueError as error:
        raise ValueError(f"data.source '{show_path(source)}': {error}") from None
