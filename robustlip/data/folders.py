"""Local copies: which folders are searched, and which files in them are a split."""

from __future__ import annotations

import os
import re
from pathlib import Path

from robustlip.errors import BadInput
from robustlip.files import is_folder

ENVIRONMENT = "ROBUSTLIP_DATA"
SUBSET = "_subset"
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def search_folders(data_dir: str | Path | None) -> list[Path]:
    """The folder of the argument, then the one of ROBUSTLIP_DATA. Raises BadInput for one that is not a folder."""
    folders = []
    for value, source in ((data_dir, "--data-dir"), (os.environ.get(ENVIRONMENT) or None, ENVIRONMENT)):
        if value is None:
            continue
        folder = Path(value).expanduser()
        if not is_folder(folder):
            raise BadInput(f"expected {source} to name a folder, got {str(value)!r}; create it or correct the path")
        folders.append(folder)
    return folders


def local_copies(name: str, data_dir: str | Path | None) -> list[tuple[Path, str]]:
    """Folders that may hold `name`, best first, each with the note that a table must carry.

    <dir>/<name> and, for a hub name 'owner/name', <dir>/owner/name and <dir>/name; then the same with '_subset', noted
    'subset'. A whole copy in a later folder is preferred to a subset in an earlier one.
    """
    stems = dict.fromkeys((name, name.rpartition("/")[2]))
    folders = search_folders(data_dir)
    whole = [(folder / stem, "") for folder in folders for stem in stems]
    subsets = [(folder / (stem + SUBSET), "subset") for folder in folders for stem in stems]
    return [(path, note) for path, note in (*whole, *subsets) if is_folder(path)]


def split_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of one split under `folder`, in order; [] when there is none.

    Layouts: <split>.parquet, or the hub's <config>/<split>-00000-of-00002.parquet at any depth. Raises BadInput when
    two configurations have that split, or when a shard is missing.
    """
    found = sorted(path for path in folder.rglob("*.parquet") if path.name == f"{split}.parquet" or path.name.startswith(f"{split}-"))
    parents = sorted({str(path.parent) for path in found})
    if len(parents) > 1:
        raise BadInput(
            f"expected one folder with the split {split!r} under {folder}, got {len(parents)} ({', '.join(parents)}); "
            f"name a parquet file instead"
        )
    shards = [match for path in found if (match := _SHARD.search(path.name))]
    if shards and {int(match[1]) for match in shards} != set(range(int(shards[0][2]))):
        raise BadInput(f"expected {int(shards[0][2])} parquet files of the split {split!r} in {parents[0]}, got {len(shards)}; copy the missing ones")
    return found


def splits_in(folder: Path) -> list[str]:
    """The names of the splits that have parquet files under `folder`."""
    return sorted({re.split(r"-\d+-of-|\.parquet$", path.name)[0] for path in folder.rglob("*.parquet")})
