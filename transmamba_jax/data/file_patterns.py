"""Find the files that a glob names: each real file once, and a reason where there is none.

The glob module follows a link to a folder as often as a path can hold it, so a link to a parent multiplies a corpus.
"""

import collections
import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from transmamba_jax.runtime.paths import expand_path, show_path


def find_files(kind: str, pattern: str) -> dict[str, str]:
    """Return the files that `kind:pattern` names, path -> name below the first wildcard, in the order of their paths.

    A file that is reached by several paths (links to files or folders, hard links, bind mounts) is returned once: under
    a path without a link where there is one, then under that with the fewest folders, then the first in order. The
    name is what splits are made by. A link to a folder that contains the corpus is not followed.

    Raises:
        ValueError: no file matches; the message says what is there and what to type.
    """
    address = re.match(r"([a-z][a-z0-9+.-]*)://", pattern)
    if address is not None:
        raise ValueError(_not_here(kind, pattern, address[1]))
    expanded = str(expand_path(pattern))
    root = fixed_part(expanded)
    paths = _one_path_each(_expand(expanded), root)
    if not paths:
        raise ValueError(_nothing_found(kind, pattern, expanded, root))
    return {path: os.path.relpath(path, root).replace(os.sep, "/") for path in paths}


def fixed_part(pattern: str) -> str:
    """Return the folder above the first wildcard: names below it decide the split, wherever the corpus lies."""
    parts = Path(pattern).parts
    fixed = parts[:-1]
    for position, part in enumerate(parts):
        if glob.has_magic(part):
            fixed = parts[:position]
            break
    return os.path.join(*fixed) if fixed else os.curdir


def _expand(pattern: str) -> list[str]:
    """Return what a glob matches, where `**` stands for every folder below, each real one once."""
    root = fixed_part(pattern)
    groups: list[list[str]] = [[]]
    for part in Path(pattern).parts:
        if part == "**":
            groups.append([])
        else:
            groups[-1].append(part)
    first, *others = groups
    paths = glob.glob(os.path.join(*first)) if first else [os.curdir]
    for position, group in enumerate(others, start=1):
        if not group and position < len(others):
            continue  # `**/**` is `**`
        folders = _folders_below(paths, root)
        tail = os.path.join(*(group or ["*"]))
        paths = [match for folder in folders for match in glob.glob(os.path.join(glob.escape(folder), tail))]
    return [str(Path(path)) for path in paths]  # without the "./" of a relative pattern


def _folders_below(tops: Iterable[str], root: str) -> list[str]:
    """Return the folders below `tops`, these too, without hidden ones: real folders first, then those behind links.

    Folders above `root` are left out: a link to one leads back here, and to its other folders.
    """
    seen = {_identity(str(folder)) for folder in Path(os.path.realpath(root)).parents}
    found = []
    pending = collections.deque(sorted((top for top in tops if os.path.isdir(top)), key=os.path.islink))
    while pending:
        for folder, names, _ in os.walk(pending.popleft()):
            identity = _identity(folder)
            if identity in seen:
                names.clear()
                continue
            seen.add(identity)
            found.append(folder)
            names[:] = sorted(name for name in names if not name.startswith("."))
            pending.extend(link for link in (os.path.join(folder, name) for name in names) if os.path.islink(link))
    return found


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _one_path_each(paths: Iterable[str], root: str) -> list[str]:
    """Return one path of every regular file, in order."""
    same: dict[tuple[int, int], list[str]] = {}
    for path in set(paths):
        if os.path.isfile(path):
            same.setdefault(_identity(path), []).append(path)

    def rank(path: str) -> tuple[bool, int, str]:
        real = os.path.join(os.path.realpath(root), os.path.relpath(path, root))
        return os.path.realpath(path) != real, len(Path(path).parts), path

    return sorted(min(names, key=rank) if len(names) > 1 else names[0] for names in same.values())


def _not_here(kind: str, pattern: str, scheme: str) -> str:
    path = "/" + pattern.removeprefix("file://").lstrip("/")
    way = f"write '{kind}:{show_path(path)}'" if scheme == "file" else "copy the files here, or mount the bucket"
    return (
        f"data.source '{kind}:{show_path(pattern)}' is an address, and files are read from folders of this machine, "
        f"gs:// and s3://; {way}"
    )


def _nothing_found(kind: str, pattern: str, expanded: str, root: str) -> str:
    source = f"data.source '{kind}:{show_path(pattern)}'"
    if os.path.isfile(expanded):  # a literal name that the wildcards in it do not match
        escaped = show_path(glob.escape(pattern))
        return (
            f"{source} matches no file: [, * and ? are wildcards. For the file of that name, write '{kind}:{escaped}'"
        )
    if os.path.isdir(expanded):
        return f"{source} is a folder; {_below(kind, pattern, expanded)}"
    folders = [path for path in _expand(expanded) if os.path.isdir(path)]
    if folders:
        return (
            f"{source} matches {len(folders)} folders and no file, the first is {show_path(sorted(folders)[0])}; "
            f"{_below(kind, pattern, *folders)}"
        )
    if not os.path.isdir(root):
        return (
            f"{source} matches no file: there is no folder {show_path(root)} (searched from {show_path(os.getcwd())})"
        )
    if "{" in pattern and "}" in pattern:
        return (
            f"{source} matches no file: braces are no wildcards; write * and ? in their place, or put files in a folder"
        )
    return (
        f"{source} matches no file (searched from {show_path(os.getcwd())}); {show_path(root)} and the folders in it "
        f"have {_endings([root])}"
    )


def _below(kind: str, pattern: str, *folders: str) -> str:
    """Say how to name the files below a folder, or that there are none."""
    counts = _count_endings(folders)
    if not counts:
        return "there is no file in it"
    ending = max(counts, key=lambda each: counts[each])
    return f"for the files in it ({_endings(folders)}) write '{kind}:{show_path(pattern).rstrip('/')}/**/*{ending}'"


def _endings(folders: Sequence[str]) -> str:
    counts = _count_endings(folders)
    shown = [f"{count} {show_path(ending) or 'without an ending'}" for ending, count in counts.most_common(5)]
    return ", ".join(shown) or "no file"


def _count_endings(folders: Sequence[str]) -> collections.Counter[str]:
    """Count the endings of up to 10,000 files: this is for a message."""
    counts: collections.Counter[str] = collections.Counter()
    for folder in _folders_below(folders, folders[0]):
        # isfile: a link that leads to itself is no file, where DirEntry.is_file raises.
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
        names = [name for name in names if os.path.isfile(os.path.join(folder, name))]
        counts.update(os.path.splitext(name)[1] for name in names)
        if counts.total() > 10_000:
            break
    return counts
