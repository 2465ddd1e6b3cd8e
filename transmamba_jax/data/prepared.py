"""Find TFDS data sets that are prepared on disk, without importing TFDS and without the network.

TFDS's own look-up asks the network for a data set that it does not find, again and again for minutes, and reports some
known names as unknown where TensorFlow is missing. On disk a set is `root/name[/config]/version/dataset_info.json`.
"""

import dataclasses
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

from transmamba_jax.runtime.paths import expand_path

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SPEC = re.compile(r"(?P<name>\w+)(/(?P<config>[^:]+))?(:(?P<version>[^:/]+))?")


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """One prepared version of one data set."""

    name: str
    config: str | None
    version: str
    directory: Path

    def __str__(self) -> str:
        """The spelling of a tfds: source."""
        return f"{self.name}{'' if self.config is None else '/' + self.config}:{self.version}"


def default_root() -> Path:
    """Return the directory where TFDS keeps data sets."""
    return expand_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def find(spec: str, root: Path) -> PreparedSet:
    """Return the newest prepared set that `name[/config][:version]` names, in array_record.

    Raises:
        ValueError: `spec` is misspelt, nothing that fits is prepared under `root`, or it is in another format; the
            message says what was looked for and where, what is there, and the command that prepares it.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"data.source must be 'tfds:<name>[/config][:version]', found 'tfds:{spec}'")
    fits = [
        each
        for each in prepared_sets(root, match["name"])
        if match["config"] in (None, each.config) and match["version"] in (None, each.version)
    ]
    if not fits:
        raise ValueError(_missing(spec, root, prepared_sets(root)))
    configs = sorted({each.config or "" for each in fits})
    if len(configs) > 1:
        raise ValueError(f"'tfds:{spec}' has several prepared configs in {root}; name one of {', '.join(configs)}")
    newest = max(fits, key=lambda each: tuple(map(int, each.version.split("."))))
    try:
        info = _info(newest.directory)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"the description of {newest.directory} cannot be read: {error}") from None
    file_format = info.get("fileFormat", "tfrecord")  # TFDS left it out while it knew only one format
    if file_format != "array_record":
        raise ValueError(
            f"{newest.directory} is prepared in the format {file_format}, which cannot be read at random; array_record "
            f"is needed. {_command(spec, root)} (move the present one away first)"
        )
    return newest


def prepared_sets(root: Path, name: str = "*") -> list[PreparedSet]:
    """List what is prepared under `root`, of all data sets or of one, in order of name, config and version."""
    found = []
    for levels in ("*", "*/*", "*/*/*"):
        for path in root.glob(f"{name}/{levels}/dataset_info.json"):
            set_name, *config, version = path.parent.relative_to(root).parts
            if _VERSION.fullmatch(version):
                found.append(PreparedSet(set_name, "/".join(config) or None, version, path.parent))
    return sorted(found, key=str)


def is_complete(directory: Path) -> bool:
    """Tell whether a prepared set has its description and every shard that the description lists."""
    try:
        info = _info(directory)
    except (OSError, json.JSONDecodeError):
        return False
    shards = {split["name"]: len(split["shardLengths"]) for split in info["splits"]}
    return all(
        len(list(directory.glob(f"*-{name}.{info['fileFormat']}-?????-of-{count:05d}"))) == count
        for name, count in shards.items()
    )


def _info(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))


def _missing(spec: str, root: Path, there: list[PreparedSet]) -> str:
    names = {str(each): str(each).partition(":")[0] for each in there}
    wanted = spec.partition(":")[0]
    near = difflib.get_close_matches(wanted, names.values(), n=1) or [n for n in names.values() if n in wanted]
    found = f"prepared there: {', '.join(names)}" if names else "nothing is prepared there"
    if not root.is_dir():
        found = "that directory does not exist"
    suggestion = f"; did you mean 'tfds:{near[0]}'?" if near else ""
    return (
        f"the TFDS data set {spec!r} is not prepared under {root} (data.cache_dir, else TFDS_DATA_DIR, else "
        f"~/tensorflow_datasets); {found}{suggestion}. {_command(spec, root)}"
    )


def _command(spec: str, root: Path) -> str:
    return (
        f"Prepare it with: tfds build {spec} --file_format=array_record --data_dir={root} "
        f"(in any environment with tensorflow and the network; reading needs neither)"
    )
