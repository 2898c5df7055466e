"""HDF5 shards and `dataset.json`, the commit mark of a data set. The one home of h5py.

`xrai.preprocess` writes both, the loader and `xrai.verify` read them. A shard's pixels are stored
contiguously, so a reader maps the file and never goes through h5py for them. The same rows give the
same bytes, whoever writes them.
"""

import hashlib
import json
import math
import mmap
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from xrai.errors import CorruptError, DatasetError, NotFoundError
from xrai.store import Store

SCHEMA_VERSION: Final = 1
INDEX_KEY: Final = "dataset.json"
MANIFEST_KEY: Final = "manifest.jsonl"
REPORT_PREFIX: Final = "report/"
SPLITS: Final = ("train", "val", "test")
HDF5_VERSION: Final = h5py.version.hdf5_version  # another one may write other bytes

_SHARD_NAME = re.compile(r"(train|val|test)-\d{5,}-of-\d{5,}\.h5")
_PAGE_BYTES = 4096


def shard_name(split: str, number: int, num_shards: int) -> str:
    """`train-00000-of-00008.h5`: the key of the shard at place `number` of the `num_shards`
    planned for a split.
    """
    return f"{split}-{number:05d}-of-{num_shards:05d}.h5"


def is_shard_name(name: str) -> bool:
    """Whether a key has the form that `shard_name` gives."""
    return _SHARD_NAME.fullmatch(name) is not None


# ------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Layout:
    """What opening a shard finds out: whoever keeps it maps the same file again without going
    through HDF5.
    """

    shape: tuple[int, int, int]  # of `images`, (N, H, W)
    offset: int  # of `images` in the file, bytes
    labels: NDArray[np.uint8]  # (N,)


@dataclass(frozen=True)
class Shard:
    """One open shard. `images` is a view on the mapped file: pages are read when they are touched.

    The columns below, which training does not need, are read from the mapped file each time that
    they are asked for: as Python objects they would take 300 bytes a row, and most of the time of
    opening. They raise `CorruptError`.
    """

    images: NDArray[np.uint8]  # (N, H, W), read-only
    labels: NDArray[np.uint8]  # (N,), positions in `DatasetIndex.classes`
    layout: Layout = field(repr=False)
    _path: Path = field(repr=False)  # for messages: the file may have gone
    _mapped: mmap.mmap = field(repr=False)

    @property
    def source(self) -> NDArray[np.object_]:
        """(N,) str, paths of the source files."""
        return self._read_texts("source")

    @property
    def patient(self) -> NDArray[np.object_]:
        """(N,) str, keys of the patients."""
        return self._read_texts("patient")

    @property
    def subtype(self) -> NDArray[np.object_]:
        """(N,) str, "bacterial", "viral" or ""."""
        return self._read_texts("subtype")

    @property
    def sha256(self) -> NDArray[np.object_]:
        """(N,) str, hex digests of the source files."""
        return self._read_texts("sha256")

    @property
    def width(self) -> NDArray[np.uint32]:
        """(N,), of the source pictures, upright and before they were fitted, pixels."""
        return self._read("width").astype(np.uint32)

    @property
    def height(self) -> NDArray[np.uint32]:
        """(N,), of the source pictures, pixels."""
        return self._read("height").astype(np.uint32)

    def _read_texts(self, name: str) -> NDArray[np.object_]:
        return self._read(name, is_text=True).astype(object)

    def _read(self, name: str, *, is_text: bool = False) -> NDArray[Any]:
        with _explained(self._path), h5py.File(self._mapped, "r") as file:
            values: NDArray[Any] = file[name].asstr()[:] if is_text else file[name][:]
        if len(values) != len(self.labels):
            raise CorruptError(
                f"{self._path} is not laid out as a shard: {name} has {len(values)} rows"
            )
        return values


def write_shard(
    path: Path,
    *,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    source: Sequence[str],
    patient: Sequence[str],
    subtype: Sequence[str],
    sha256: Sequence[str],
    width: Sequence[int],
    height: Sequence[int],
) -> None:
    """Write one shard, byte-identical for the same input and version of HDF5.

    `images` is (N, H, W), `labels` and the others (N,), N at least 1; `sha256` holds hex digests,
    `width` and `height` the pixels of the source picture. The file appears under `path` only when
    it is whole. Raises OSError when the disk is full or `path` cannot be written.
    """
    num_rows = len(images)
    assert num_rows > 0
    assert images.ndim == 3
    assert images.dtype == labels.dtype == np.uint8
    assert num_rows == len(labels) == len(source) == len(patient) == len(subtype) == len(sha256)
    assert num_rows == len(width) == len(height)
    partial = path.with_name(f"{path.name}.partial")
    # One fixed range of format versions; v110 also puts a checksum on all of HDF5's own metadata.
    # Large objects start on a page, so that `images` can be mapped well. In memory first: HDF5 can
    # not close a file on a full disk, and prints that of each object in it.
    with h5py.File(
        path.name, "w", driver="core", backing_store=False, libver=("v110", "v110"),
        alignment_threshold=_PAGE_BYTES, alignment_interval=_PAGE_BYTES,
    ) as file:  # fmt: skip
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.create_dataset(
            "images", data=images, track_times=False
        )  # (N, H, W), contiguous: no chunks, no filter
        file.create_dataset("labels", data=labels, track_times=False)  # (N,)
        for name, texts in (("source", source), ("patient", patient), ("subtype", subtype)):
            file.create_dataset(
                name, data=list(texts), dtype=h5py.string_dtype("utf-8"), track_times=False
            )  # (N,)
        file.create_dataset("sha256", data=np.array(sha256, dtype="S64"), track_times=False)  # (N,)
        for name, sides in (("width", width), ("height", height)):
            file.create_dataset(name, data=np.array(sides, np.uint32), track_times=False)  # (N,)
        file.flush()
        data = file.id.get_file_image()
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_shard(path: Path) -> Shard:
    """Map a shard. The caller has checked its hash: pixels carry no check sum of their own.

    Raises `CorruptError` when the file is no shard of this schema version, or is cut short,
    `DatasetError` when it lacks what a version of xrai before the first release did not write.
    """
    return map_shard(path, _read_layout(path))


def map_shard(path: Path, layout: Layout) -> Shard:
    """Map a shard whose layout is known, as `open_shard` does. Raises `CorruptError` when the
    file is cut short.
    """
    with _explained(path), path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    num_pixels = math.prod(layout.shape)
    if len(mapped) < layout.offset + num_pixels:
        raise CorruptError(
            f"{path} is cut short: {len(mapped)} bytes do not hold images of {layout.shape}"
        )
    images = np.frombuffer(mapped, np.uint8, count=num_pixels, offset=layout.offset).reshape(
        layout.shape
    )
    return Shard(images, layout.labels, layout, path, mapped)


def _read_layout(path: Path) -> Layout:
    with _explained(path), h5py.File(path, "r", locking=False) as file:
        version = int(file.attrs["schema_version"])
        if version != SCHEMA_VERSION:
            raise CorruptError(
                f"{path} is a shard of schema version {version}; this xrai reads {SCHEMA_VERSION}"
            )
        shape, dtype, offset = (
            file["images"].shape,
            file["images"].dtype,
            file["images"].id.get_offset(),
        )
        labels = file["labels"][:]
        absent = [name for name in ("width", "height") if name not in file]
    if absent:
        raise DatasetError(
            f"{path} lacks {' and '.join(absent)}: an xrai before the first release wrote it; "
            "`python -m xrai.preprocess --overwrite` makes the data set anew"
        )
    if dtype != np.uint8 or len(shape) != 3 or offset is None or labels.shape != shape[:1]:
        raise CorruptError(
            f"{path} is not laid out as a shard: images are {shape} {dtype}, labels {labels.shape}"
        )
    return Layout(shape, offset, labels)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # what h5py raises on damaged files
        raise CorruptError(f"{path} cannot be read as a shard: {error}") from error


# -------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class ShardInfo:
    """A shard as `dataset.json` lists it."""

    name: str
    num_rows: int
    size_bytes: int
    sha256: str
    num_rows_per_class: tuple[int, ...]


@dataclass(frozen=True)
class ObjectInfo:
    """Another object of the data set: the manifest or a file of the report."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Counts:
    """Source files. `num_found` = `num_written` + `num_set_aside`; `num_not_data` (hidden files
    and such) is apart.
    """

    num_found: int
    num_written: int
    num_set_aside: int
    num_not_data: int


@dataclass(frozen=True)
class DatasetIndex:
    """`dataset.json`: what the data set holds and the hash of each of its objects."""

    classes: tuple[str, ...]
    image_size: int  # pixels, height and width
    splits: Mapping[str, tuple[ShardInfo, ...]]  # of train, val and test, those that exist
    carved: tuple[
        str, ...
    ]  # the splits that were carved from train, by patient; the others the source gave
    pixel_mean: float  # of all pixels of the train split, grey levels 0 to 255
    pixel_std: float
    source: str
    plan_sha256: str  # of everything that decides the contents: source files, their hashes, config
    counts: Counts
    objects: tuple[ObjectInfo, ...]
    config: Mapping[str, Any]  # sections images, splits and shards, as resolved
    tool_version: str
    schema_version: int = SCHEMA_VERSION
    fingerprint: str = field(default="")  # computed where it is not given

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", compute_fingerprint(self))

    def num_images(self, split: str) -> int:
        """Images of one split; 0 where there is no such split."""
        return sum(shard.num_rows for shard in self.splits.get(split, ()))

    def num_images_per_class(self, split: str) -> dict[str, int]:
        """Images of one split, class by class."""
        shards = self.splits.get(split, ())
        return {
            name: sum(shard.num_rows_per_class[k] for shard in shards)
            for k, name in enumerate(self.classes)
        }

    def to_json(self) -> str:
        """The text of `dataset.json`. Its last key is a hash of all the others, so that any
        change shows.
        """
        mapping = asdict(replace(self, splits=dict(self.splits), config=dict(self.config)))
        ordered = {key: mapping[key] for key in ("schema_version", "fingerprint")} | mapping
        return json.dumps(ordered | {"index_sha256": _hash_json(ordered)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> "DatasetIndex":
        """Read `dataset.json` back. `where` names it in messages.

        Raises `CorruptError` when it is not what was written, `DatasetError` for another schema
        version.
        """
        try:
            mapping = json.loads(text)
            version = mapping["schema_version"]
            stated = mapping.pop("index_sha256")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(
                f"{where} is not the index of a data set, or is damaged: {error}"
            ) from error
        if stated != _hash_json(mapping):
            raise CorruptError(
                f"{where} is damaged: its contents do not have the hash that it states"
            )
        if version != SCHEMA_VERSION:
            raise DatasetError(
                f"{where} has schema version {version}; this xrai reads version {SCHEMA_VERSION}"
            )
        mapping["classes"] = tuple(mapping["classes"])
        mapping["carved"] = tuple(mapping["carved"])
        mapping["counts"] = Counts(**mapping["counts"])
        mapping["objects"] = tuple(ObjectInfo(**entry) for entry in mapping["objects"])
        mapping["splits"] = {
            split: tuple(
                ShardInfo(**{**entry, "num_rows_per_class": tuple(entry["num_rows_per_class"])})
                for entry in entries
            )
            for split, entries in mapping["splits"].items()
        }
        index = cls(**mapping)
        if not all(
            is_shard_name(shard.name) for shards in index.splits.values() for shard in shards
        ):
            raise CorruptError(f"{where} lists shards under names that xrai never writes")
        return index


def compute_fingerprint(index: DatasetIndex) -> str:
    """Hex sha256 of a data set's contents: classes, image size and the hashes of its shards, in
    order.
    """
    shards = {
        split: [shard.sha256 for shard in index.splits[split]]
        for split in SPLITS
        if split in index.splits
    }
    return _hash_json([index.schema_version, index.classes, index.image_size, shards])


def read_index(store: Store) -> DatasetIndex:
    """Read `dataset.json` of a data set.

    Raises `DatasetError` where there is none, `CorruptError` where it is damaged.
    """
    try:
        data = store.read(INDEX_KEY)
    except NotFoundError as error:
        raise DatasetError(
            f"{store.uri} holds no {INDEX_KEY}, so no data set; "
            f"`python -m xrai.preprocess --source FOLDER --dataset {store.uri}` makes one"
        ) from error
    try:
        return DatasetIndex.from_json(data, where=f"{store.uri}/{INDEX_KEY}")
    except CorruptError as error:
        raise CorruptError(
            f"{error}; `python -m xrai.preprocess --overwrite` makes the data set anew"
        ) from error


def hash_object(store: Store, key: str) -> str | None:
    """Hex sha256 of an object's stored bytes, or None where there is no such object."""
    path = store.local_path(key)
    try:
        if path is not None:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        with tempfile.TemporaryDirectory(prefix="xrai-") as folder:
            return store.download(key, Path(folder) / "object")
    except (NotFoundError, FileNotFoundError):
        return None


def _hash_json(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
