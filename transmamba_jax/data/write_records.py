"""Write the documents of any source into array_record files, which every host of a pod reads at random.

    python -m transmamba_jax.data.write_records --config tiny --data.source 'jsonl:books/*.jsonl.gz' --output records

A run reads them with --data.source 'array_record:records/*'. A prompt with its completion, or a chat, is written as
JSON of its fields; the run gets the same --data.prompt-field and so on.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from array_record.python import array_record_module
from tqdm import tqdm

from transmamba_jax.config_io import load_config
from transmamba_jax.data.documents import Documents
from transmamba_jax.data.sources import open_documents
from transmamba_jax.runtime import logs, storage
from transmamba_jax.runtime.checks import require
from transmamba_jax.runtime.paths import option_path, show_path


def write(documents: Documents, folder: Path, shards: int) -> list[Path]:
    """Write documents in order into `shards` files of a new folder, and return the files.

    Records are grouped one by one: a record is read without those beside it. An incomplete folder is removed.

    Raises:
        ValueError: a document cannot be read.
        OSError: the files cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [f"documents-{shard:05d}-of-{shards:05d}.array_record" for shard in range(shards)]
    try:
        with tqdm(total=len(documents), unit=" documents", unit_scale=True, delay=1.0, disable=None) as progress:
            for shard, name in enumerate(names):
                writer = array_record_module.ArrayRecordWriter(str(partial / name), "group_size:1")
                for index in range(shard * len(documents) // shards, (shard + 1) * len(documents) // shards):
                    writer.write(documents.record(index))
                    progress.update()
                writer.close()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [folder / name for name in names]


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="transmamba write-records",
        description="Write the documents of a config's data source into array_record files. Further arguments override "
        "the config, as for train.py: --data.source 'parquet:books/*.parquet'.",
        allow_abbrev=False,  # the config's options begin like these
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML experiment; its data section is read")
    parser.add_argument("--output", type=option_path, required=True, metavar="FOLDER", help="new folder to write into")
    parser.add_argument(
        "--split",
        default="all",
        metavar="NAME",
        help="split to write; a source with its own splits needs one (default: %(default)s)",
    )
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files to write (default: %(default)s)")
    options, overrides = parser.parse_known_args(arguments)
    try:
        require(options.shards >= 1, f"--shards must be >= 1, found {options.shards}")
        require(not options.output.exists(), f"--output {options.output} exists; name a new folder")
        require(
            os.fsencode(options.output).decode("utf-8", "replace") == str(options.output),
            f"--output {show_path(options.output)} must be UTF-8, array_record writes no file of another name",
        )
        config = load_config(options.config, overrides).data
        documents = open_documents(config, options.split)
        with storage.staged(options.output.parent) as folder:
            files = write(documents, folder / options.output.name, options.shards)
            size = sum(file.stat().st_size for file in files)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(
        f"{len(documents):,} documents, {size:,} bytes in {len(files)} files. Read them with --data.source "
        f"'array_record:{options.output}/*'"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
