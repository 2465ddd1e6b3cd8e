"""The sources `tfds:<name>` and `stdlib`: a text feature of a data set that TFDS prepared in array_record.

Only this module and `stdlib_dataset` know TFDS. Records are read and parsed here: TFDS's own reader asks for a record
by a list of one number, which takes time in proportion to the records of the file, and decodes every feature.
"""

from collections.abc import Sequence
from pathlib import Path

from transmamba_jax.config import DataConfig
from transmamba_jax.data import prepared
from transmamba_jax.data.cache_folder import cache_folder
from transmamba_jax.data.documents import Documents
from transmamba_jax.data.records import RecordRange, Records
from transmamba_jax.data.splits import SPLITS, require_name
from transmamba_jax.runtime.paths import show_path


class TfdsDocuments(Records):
    """One text feature of one split of a prepared data set."""

    def __init__(self, directory: Path, split: str, field: str):
        """Find the records of the split.

        Raises:
            ValueError: the data set has no such split or no such text feature, or lacks shards of the split.
        """
        import tensorflow_datasets as tfds  # a second of import that the other sources do not need

        self._directory, self._split, self._field = directory, split, field
        builder = tfds.builder_from_directory(directory)
        splits, features, shown = builder.info.splits, builder.info.features, show_path(directory)
        for part in split.split("+"):
            name = part.partition("[")[0].strip()
            require_name("split", name, list(splits), f"of {shown}")
            _require_shards(name, splits[name].filepaths)
        require_name("data.text_field", field, sorted(features), f"in {shown}")
        if not isinstance(features[field], tfds.features.Text):
            texts = [name for name in sorted(features) if isinstance(features[name], tfds.features.Text)]
            raise ValueError(
                f"data.text_field {field!r} is not text in {shown}, it is {type(features[field]).__name__}; text there "
                f"is {', '.join(texts) or 'nothing'}"
            )
        ranges = [RecordRange(each.filename, each.skip, each.take) for each in splits[split].file_instructions]
        super().__init__(ranges, range(sum(each.count for each in ranges)))

    def where(self, index: int) -> str:
        """Name the example and the directory."""
        return f"example {index} of split {self._split!r} in {show_path(self._directory)}"

    def _read(self, index: int) -> bytes:
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(super()._read(index))
        return example.features.feature[self._field].bytes_list.value[0]


def open_stdlib(config: DataConfig, _: str, split: str) -> Documents:
    """Return one split of the Python standard library's sources, which are prepared in `data.cache_dir` first.

    Raises:
        ValueError: the split is unknown, or the cache cannot be written.
    """
    require_name("split", split, SPLITS, "of data.source='stdlib'")
    from transmamba_jax.data import stdlib_dataset  # imports TFDS

    cache = cache_folder(config)
    try:
        directory = stdlib_dataset.prepare(cache)
    except OSError as error:
        raise ValueError(
            f"data.source 'stdlib' cannot be prepared in data.cache_dir '{show_path(cache)}': {error}"
        ) from error
    return TfdsDocuments(directory, split, "text")


def open_tfds(config: DataConfig, spec: str, split: str) -> Documents:
    """Return one split of a prepared data set, read from `data.cache_dir`, else TFDS's own folder.

    Raises:
        ValueError: it is not prepared there, or not in array_record, or has no such split or text feature.
    """
    root = prepared.default_root() if config.cache_dir is None else cache_folder(config)
    return TfdsDocuments(prepared.find(spec, root).directory, split, config.text_field)


def _require_shards(split: str, shards: Sequence[Path]) -> None:
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        raise ValueError(
            f"split {split!r} of the prepared data set in {show_path(missing[0].parent)} has "
            f"{len(shards) - len(missing)} of its {len(shards)} files, the first that is missing is {missing[0].name}; "
            "copy it there, or prepare the set again with tfds build"
        )
