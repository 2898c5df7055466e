"""Who owns the files at a data set's address, and how one data set replaces another.

Only what `xrai.preprocess` writes is ever overwritten or removed there.
"""

import contextlib
from pathlib import Path

from xrai.dataset.shards import (
    INDEX_KEY,
    MANIFEST_KEY,
    REPLACEMENT,
    REPORT_PREFIX,
    DatasetIndex,
    is_shard_name,
)
from xrai.errors import CorruptError
from xrai.ingest.card import is_report_key
from xrai.ingest.unfinished import is_unfinished, remove_unfinished
from xrai.store import Store


def find_others(store: Store, index: DatasetIndex | None, prefix: str = "") -> list[str]:
    """The keys, except `dataset.json` and what it lists, that `xrai.preprocess` has left.

    Only the claim, or the folder of a replacement, proves that there are any: without these, a file
    with the name of a shard belongs to somebody else.
    """
    listed = {INDEX_KEY}
    if index is not None:
        listed |= {info.name for info in index.all_objects()}
    others = [entry.key for entry in store.list() if is_own(entry.key) and entry.key not in listed]
    if not any(is_unfinished(key) or key.startswith(REPLACEMENT) for key in others):
        return []
    return [key for key in others if key.startswith(prefix)]


def remove_others(store: Store, index: DatasetIndex | None, prefix: str = "") -> None:
    """Remove what `find_others` finds, and what is unfinished."""
    for key in find_others(store, index, prefix):
        if not is_unfinished(key):
            store.delete(key)
    remove_unfinished(store)  # last: the claim proves that the rest is ours
    folder = store.local_path(INDEX_KEY)
    if folder is not None:
        for name in (REPLACEMENT + REPORT_PREFIX, REPLACEMENT, REPORT_PREFIX):
            with contextlib.suppress(OSError):  # it is not empty, or was not there
                Path(folder.parent, name).rmdir()


def move_into_place(store: Store, index: DatasetIndex) -> DatasetIndex:
    """Give the objects of a data set that replaced another one their usual keys.

    They are copied first, so the data set is whole at any moment. Raises `CorruptError` where one
    is damaged; then they stay where they are.
    """
    for info in index.all_objects():
        with store.as_file(info.name) as path:
            digest = store.upload(info.name.removeprefix(REPLACEMENT), path)
        if digest != info.sha256:
            raise CorruptError(f"{store.uri}/{info.name} is not what was stored there")
    moved = index.moved()
    store.write(INDEX_KEY, moved.to_json().encode())
    remove_others(store, moved)
    return moved


def is_own(key: str) -> bool:
    """Whether a key is one that `xrai.preprocess` writes."""
    name = key.removeprefix(REPLACEMENT)
    is_object = is_shard_name(name) or name == MANIFEST_KEY or is_report_key(name)
    return key == INDEX_KEY or is_object or is_unfinished(key)


def is_mark(store: Store, key: str) -> bool:
    """Whether a key proves that the address is a data set's; other programs use the other names."""
    if key == INDEX_KEY:
        return b'"schema_version"' in store.read(key)[:200]
    return is_unfinished(key)
