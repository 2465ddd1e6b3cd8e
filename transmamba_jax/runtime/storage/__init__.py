"""Files of work directories and data, in folders of this machine or in buckets.

`runtime.paths.expand_path` turns the text of an option into a path: a `pathlib.Path`, or a `BucketPath` with the same
methods. What a path has no method for is here, and does on each kind of storage what that kind has: a bucket has no
rename, no lock of the kernel and no end of a file to write to.
"""

from transmamba_jax.runtime.storage.appended import AppendedFile, append_to
from transmamba_jax.runtime.storage.copies import CopiedPattern, is_url, local_copy, local_pattern, staged
from transmamba_jax.runtime.storage.files import (
    copy,
    delete,
    files_below,
    free_bytes,
    is_remote,
    local_folder,
    map_files,
    replace_text,
    require_checkpoints,
)

__all__ = [
    "AppendedFile",
    "CopiedPattern",
    "append_to",
    "copy",
    "delete",
    "files_below",
    "free_bytes",
    "is_remote",
    "is_url",
    "local_copy",
    "local_folder",
    "local_pattern",
    "map_files",
    "replace_text",
    "require_checkpoints",
    "staged",
]
