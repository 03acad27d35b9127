"""Local copies of data sets: the folders that are searched, and the files in them that belong to a split.

Splits are named as on the hub: `test.parquet`, `test-00000-of-00002.parquet` (or with a hash of 16 hexadecimal digits appended), or the
files `0000.parquet`, `0001.parquet`, … of a folder `test`. The files lie in the folder of the data set, in its folder `data`, or in the folder of a
configuration. Files with other names do not belong to a split, and a split with missing files is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from robustlip.errors import BadInput, first_line
from robustlip.files import is_folder

ENVIRONMENT = "ROBUSTLIP_DATA"
SUBSET = "_subset"
PARQUET = (".parquet",)
DEPTH = 3  # depth of subfolders that are searched
MAX_ENTRIES = 100_000  # files and folders in all of them
_DATA = "data"
_SPLIT = r"(?P<split>\w+(?:\.\w+)*)"
_SHARD = re.compile(_SPLIT + r"-(?P<at>[0-9]{5})-of-(?P<of>[0-9]{5})(?P<hash>-[0-9a-f]{16})?")
_WHOLE = re.compile(_SPLIT)
_PART = re.compile(r"[0-9]{4}")


def search_folders(data_dir: str | Path | None) -> list[Path]:
    """The folder of the argument, then the folder of ROBUSTLIP_DATA. Raises BadInput if one of them is not a folder."""
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
    """Folders that may contain `name`, in the order of preference, each with the note for tables.

    <dir>/<name> and, for a hub name 'owner/name', <dir>/owner/name and <dir>/name; then the same with '_subset', with the note
    'subset'. A complete copy in a later folder is preferred to a subset in an earlier one.
    """
    stems = dict.fromkeys((name, name.rpartition("/")[2]))
    folders = search_folders(data_dir)
    whole = [(folder / stem, "") for folder in folders for stem in stems]
    subsets = [(folder / (stem + SUBSET), "subset") for folder in folders for stem in stems]
    return [(path, note) for path, note in (*whole, *subsets) if is_folder(path)]


def walk(folder: Path, depth: int = DEPTH) -> Iterator[tuple[tuple[str, ...], Path]]:
    """(names of the folders in between, file) for all files below `folder`, sorted by path. Links are followed; each folder is visited once.

    Raises BadInput for a folder that cannot be listed, and for more than MAX_ENTRIES files and folders.
    """
    seen: set[str] = set()
    count = 0

    def enter(at: Path, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
        nonlocal count
        real = os.path.realpath(at)
        if real in seen:
            return
        seen.add(real)
        entries: list[str] = []
        try:
            with os.scandir(at) as found:
                for entry in found:
                    entries.append(entry.name)
                    count += 1
                    if count > MAX_ENTRIES:
                        raise BadInput(f"expected the folder of one data set, got more than {MAX_ENTRIES} files in {str(folder)!r}; name its folder")
        except OSError as error:
            raise BadInput(f"expected a folder that can be read, got {str(at)!r} ({first_line(error, 80)}); correct its permissions") from None
        for name in sorted(entries):
            path = at / name
            if path.is_file():
                yield names, path
            elif len(names) < depth and not name.startswith(".") and path.is_dir():
                yield from enter(path, (*names, name))

    yield from enter(folder, ())


@dataclass
class Split:
    """The files whose names belong to one split of one configuration."""

    whole: list[Path] = field(default_factory=list)
    shards: list[tuple[Path, int, int, bool]] = field(default_factory=list)  # file, number, total, whether it has a hash
    parts: list[tuple[Path, int]] = field(default_factory=list)

    def files(self, name: str) -> list[Path]:
        """All files in order. Raises BadInput unless they form one complete copy."""
        layouts = [kind for kind in (self.whole, self.shards, self.parts) if kind]
        parents = sorted({str(path.parent) for path in (*self.whole, *(s[0] for s in self.shards), *(p[0] for p in self.parts))})
        if len(layouts) > 1 or len(parents) > 1 or len(self.whole) > 1:
            raise BadInput(
                f"expected one copy of the {name}, got files of several in {', '.join(parents)[:300]}; remove one, or name a parquet file instead"
            )
        if self.whole:
            return self.whole
        if self.parts:
            numbers = [number for _, number in self.parts]
            if sorted(numbers) != list(range(len(numbers))):
                missing = min(set(range(max(numbers) + 1)) - set(numbers), default=0)
                raise BadInput(f"expected the files of the {name} numbered from 0000 in {parents[0]}, got none with {missing:04d}; copy it")
            return [path for path, _ in sorted(self.parts, key=lambda part: part[1])]
        totals = {total for _, _, total, _ in self.shards}
        if len(totals) > 1 or len({hashed for *_, hashed in self.shards}) > 1:
            raise BadInput(
                f"expected one set of files of the {name} in {parents[0]}, got two (of {' and of '.join(map(str, sorted(totals)))}, "
                f"with or without a hash); remove one"
            )
        total, numbers = totals.pop(), [number for _, number, _, _ in self.shards]
        if len(set(numbers)) < len(numbers):
            twice = next(n for n in numbers if numbers.count(n) > 1)
            raise BadInput(f"expected each file of the {name} once in {parents[0]}, got number {twice:05d} twice; remove the old ones")
        if sorted(numbers) != list(range(total)):
            raise BadInput(f"expected {total} parquet files of the {name} in {parents[0]}, got {len(numbers)}; copy the missing ones")
        return [path for path, *_ in sorted(self.shards, key=lambda shard: shard[1])]


def configurations(folder: Path, endings: tuple[str, ...] = PARQUET) -> dict[str, dict[str, Split]]:
    """configuration ('' for the folder itself) → split → its files, according to their names."""
    found: dict[str, dict[str, Split]] = {}

    def split_of(names: tuple[str, ...], name: str) -> Split:
        kept = names[1:] if names[:1] == (_DATA,) else names
        kept = kept[:-1] if kept[-1:] == (_DATA,) else kept
        return found.setdefault("/".join(kept), {}).setdefault(name, Split())

    for names, path in walk(folder):
        ending = next((e for e in endings if path.name.endswith(e)), None)
        if ending is None:
            continue
        stem = path.name[: -len(ending)]
        if match := _SHARD.fullmatch(stem):
            split_of(names, match["split"]).shards.append((path, int(match["at"]), int(match["of"]), match["hash"] is not None))
        elif _PART.fullmatch(stem):
            if names and _WHOLE.fullmatch(names[-1]):
                split_of(names[:-1], names[-1]).parts.append((path, int(stem)))
        elif match := _WHOLE.fullmatch(stem):
            split_of(names, match["split"]).whole.append(path)
    return found


def splits_of(folder: Path, subset: str | None = None, split: str | None = None, endings: tuple[str, ...] = PARQUET) -> dict[str, Split]:
    """The splits of one configuration under `folder`: the one named by `subset`, or the only one (that has `split`), or 'default'.

    {} if there is none. Raises BadInput, with their names, if there are several.
    """
    found = configurations(folder, endings)
    if subset is not None:
        if found and subset not in found:
            names = ", ".join(sorted(name or "(the folder itself)" for name in found))
            raise BadInput(f"expected a configuration among {names[:300]} in {str(folder)!r}, got {subset!r}; name one of them")
        return found.get(subset, {})
    having = {name: splits for name, splits in found.items() if split is None or split in splits} or found
    if len(having) == 1:
        return next(iter(having.values()))
    if "default" in having and "" not in having:
        return having["default"]
    if having and split is not None and all(split not in splits for splits in having.values()):
        return {name: files for splits in having.values() for name, files in splits.items()}
    if having:
        names = ", ".join(sorted(name or "(the folder itself)" for name in having))
        raise BadInput(
            f"expected one configuration with the split {split!r} under {str(folder)!r}, got {len(having)} ({names[:300]}); "
            f"choose one with --subset, or name a parquet file instead"
        )
    return {}


def split_files(folder: Path, split: str, subset: str | None = None) -> list[Path]:
    """The parquet files of one split under `folder`, in order; [] if there are none. Raises BadInput as `splits_of`, and for missing files."""
    files = splits_of(folder, subset, split).get(split)
    return files.files(f"split {split!r}") if files else []
