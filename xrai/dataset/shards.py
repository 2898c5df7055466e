"""HDF5 shards and `dataset.json`, the commit mark of a data set. The one home of h5py.

`xrai.preprocess` writes both, the loader and `xrai.verify` read them. A shard's pixels are stored
contiguously, so a reader maps the file instead of going through h5py. The same rows always give the
same bytes.
"""

import hashlib
import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from xrai.config import flatten
from xrai.errors import CorruptError, DatasetError, NotFoundError, StoreError
from xrai.files import sha256_of, write_atomically
from xrai.labels import Labels, LabelSpec, Task
from xrai.store import Store, check_key
from xrai.tables import from_plain, load_json

SCHEMA_VERSION: Final = 2  # of dataset.json; version 1 knew two classes alone, and is read as such
INDEX_KEY: Final = "dataset.json"
MANIFEST_KEY: Final = "manifest.jsonl"
REPORT_PREFIX: Final = "report/"
REPLACEMENT: Final = "replacement/"  # begins the keys of a data set that is to replace another one
SPLITS: Final = ("train", "val", "test")
HDF5_VERSION: Final = h5py.version.hdf5_version  # another one may write other bytes

_HASH = re.compile(r"[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"(train|val|test)-\d{5,}-of-\d{5,}\.h5")
_CLASS_VERSION, _FINDING_VERSION = 1, 2  # of shards with a class, or with findings, for each image
_PAGE_BYTES = 4096
_NUM_INDEX_READS = 3
_MAX_ROWS = 1_000_000  # of a shard, as in the config


def shard_name(split: str, number: int, num_shards: int) -> str:
    """`train-00000-of-00008.h5`: the key of shard `number` of a split's `num_shards`."""
    return f"{split}-{number:05d}-of-{num_shards:05d}.h5"


def is_shard_name(name: str) -> bool:
    """Whether a key has the form that `shard_name` gives."""
    return _SHARD_NAME.fullmatch(name) is not None


# ------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Columns:
    """What a shard is written from; all but images and findings are (N,), N at least 1."""

    images: NDArray[np.uint8]  # (N, H, W)
    labels: Labels  # positions in `DatasetIndex.classes`, or (N, C) findings
    source: Sequence[str]  # paths of the source files
    patient: Sequence[str]  # keys of the patients
    subtype: Sequence[str]  # such as "viral"; "" where nothing is said
    sha256: Sequence[str]  # hex digests of the source files
    width: Sequence[int]  # of the source image, upright, pixels
    height: Sequence[int]


@dataclass(frozen=True)
class Layout:
    """What opening a shard finds out, to map the same file again without HDF5."""

    shape: tuple[int, int, int]  # of `images`, (N, H, W)
    offset: int  # of `images` in the file, bytes
    labels: Labels  # (N,) or (N, C)


class _Column:
    """A column of `Shard`, read from the mapped file each time. Raises `CorruptError`.

    Training needs none of them; as Python objects they would take 300 bytes a row, and most of the
    time of opening.
    """

    def __set_name__(self, owner: type["Shard"], name: str) -> None:
        self._name = name

    def __get__(self, shard: "Shard", owner: type["Shard"]) -> NDArray[Any]:
        with _explained(shard._path), h5py.File(shard._mapped, "r") as file:
            column = file[self._name]
            is_text = h5py.check_string_dtype(column.dtype) is not None
            values: NDArray[Any] = column.asstr()[:].astype(object) if is_text else column[:]
        if len(values) != len(shard.labels):
            raise CorruptError(
                f"{shard._path} is not laid out as a shard: {self._name} has {len(values)} rows"
            )
        return values


@dataclass(frozen=True)
class Shard:
    """An open shard. `images` is a view of the mapped file: pages are read when touched."""

    images: NDArray[np.uint8]  # (N, H, W), read-only
    labels: Labels  # (N,) uint8 positions in `DatasetIndex.classes`, or (N, C) int8 findings
    layout: Layout = field(repr=False)
    _path: Path = field(repr=False)  # for messages: the file may have gone
    _mapped: mmap.mmap = field(repr=False)

    source = _Column()  # (N,) str, as in `Columns`; so are the others
    patient = _Column()
    subtype = _Column()
    sha256 = _Column()
    width = _Column()  # (N,) uint32
    height = _Column()


def write_shard(path: Path, columns: Columns) -> None:
    """Write a shard, atomically; the same bytes for the same columns and version of HDF5.

    Raises OSError if the disk is full or `path` cannot be written.
    """
    assert columns.images.ndim == 3 and len(columns.images) > 0
    has_findings = columns.labels.ndim == 2
    assert columns.images.dtype == np.uint8
    assert columns.labels.dtype == (np.int8 if has_findings else np.uint8)
    text = h5py.string_dtype("utf-8")
    types = {"source": text, "patient": text, "subtype": text, "sha256": "S64"}
    types |= {"width": np.uint32, "height": np.uint32}
    values = {item.name: getattr(columns, item.name) for item in fields(columns)}
    assert {len(column) for column in values.values()} == {len(columns.images)}
    # One fixed range of format versions; v110 also adds checksums to all of HDF5's own metadata.
    # Large objects start on a page, so `images` can be mapped. In memory first: HDF5 cannot close
    # a file on a full disk, and prints that for each object in it.
    with h5py.File(
        path.name,
        "w",
        driver="core",
        backing_store=False,
        libver=("v110", "v110"),
        alignment_threshold=_PAGE_BYTES,
        alignment_interval=_PAGE_BYTES,
    ) as file:
        file.attrs["schema_version"] = _FINDING_VERSION if has_findings else _CLASS_VERSION
        for name, column in values.items():  # contiguous: no chunks, no filter
            data = np.asarray(column, dtype=types.get(name))
            file.create_dataset(name, data=data, track_times=False)
        file.flush()
        content = file.id.get_file_image()
    write_atomically(path, content)


def open_shard(path: Path) -> Shard:
    """Map a shard. The caller has checked its hash: pixels carry no checksum of their own.

    Raises `CorruptError` if the file is no shard of this schema version, or is cut short.
    """
    return map_shard(path, _read_layout(path))


def map_shard(path: Path, layout: Layout) -> Shard:
    """Map a shard whose layout is known. Raises `CorruptError` if the file is cut short."""
    with _explained(path), path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    num_pixels = math.prod(layout.shape)
    if len(mapped) < layout.offset + num_pixels:
        raise CorruptError(
            f"{path} is cut short: {len(mapped)} bytes do not hold images of {layout.shape}"
        )
    images = np.frombuffer(mapped, np.uint8, count=num_pixels, offset=layout.offset)
    return Shard(images.reshape(layout.shape), layout.labels, layout, path, mapped)


def _read_layout(path: Path) -> Layout:
    with _explained(path), h5py.File(path, "r", locking=False) as file:
        version = int(file.attrs["schema_version"])
        if version not in (_CLASS_VERSION, _FINDING_VERSION):
            raise CorruptError(
                f"{path} is a shard of schema version {version}; this xrai reads "
                f"{_CLASS_VERSION} and {_FINDING_VERSION}"
            )
        images, labels = file["images"], file["labels"][:]
        shape, dtype, offset = images.shape, images.dtype, images.id.get_offset()
    kind = (labels.ndim, labels.dtype)
    is_usual = kind == ((2, np.int8) if version == _FINDING_VERSION else (1, np.uint8))
    is_usual = is_usual and labels.shape[:1] == shape[:1]
    if dtype != np.uint8 or len(shape) != 3 or offset is None or not is_usual:
        raise CorruptError(
            f"{path} is not laid out as a shard: images are {shape} {dtype}, labels "
            f"{labels.shape} {labels.dtype}"
        )
    return Layout(shape, offset, labels)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:  # h5py's, if damaged
        raise CorruptError(f"{path} cannot be read as a shard: {error}") from error


# -------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class ShardInfo:
    """A shard as `dataset.json` lists it."""

    name: str
    num_rows: int
    size_bytes: int
    sha256: str
    num_rows_per_class: tuple[int, ...]  # or with each finding present
    num_unknown_per_class: tuple[int, ...] = ()  # findings alone


@dataclass(frozen=True)
class ObjectInfo:
    """Another object of the data set: the manifest or a file of the report."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Counts:
    """Source files: `num_found` = `num_written` + `num_set_aside` (excluded). Files that are not
    data, such as hidden ones, are counted separately.
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
    carved: tuple[str, ...]  # splits carved from train, by patient; the source gave the others
    pixel_mean: float  # of all pixels of train, else of all splits, grey levels 0 to 255
    pixel_std: float
    source: str
    plan_sha256: str  # of everything that decides the contents: source files, their hashes, config
    counts: Counts
    objects: tuple[ObjectInfo, ...]
    config: Mapping[str, Any]  # sections images, splits and shards, as resolved
    tool_version: str
    task: Task = "binary"
    schema_version: int = SCHEMA_VERSION
    fingerprint: str = field(default="")  # computed where it is not given

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", compute_fingerprint(self))

    @property
    def labels(self) -> LabelSpec:
        """What the labels of the images mean."""
        return LabelSpec(self.task, self.classes)

    def all_objects(self) -> "list[ShardInfo | ObjectInfo]":
        """Shards, manifest and report."""
        return [*(shard for shards in self.splits.values() for shard in shards), *self.objects]

    @property
    def place(self) -> str:
        """What the keys of all objects begin with: "", or `REPLACEMENT` until they are moved."""
        infos = (info for infos in self.splits.values() for info in infos)
        return REPLACEMENT if any(info.name.startswith(REPLACEMENT) for info in infos) else ""

    def moved(self) -> "DatasetIndex":
        """The same index with every object under its usual key."""
        splits = {
            split: tuple(replace(info, name=info.name.removeprefix(REPLACEMENT)) for info in infos)
            for split, infos in self.splits.items()
        }
        objects = (replace(info, name=info.name.removeprefix(REPLACEMENT)) for info in self.objects)
        return replace(self, splits=splits, objects=tuple(objects))

    def num_images(self, split: str) -> int:
        """Images of one split; 0 where there is no such split."""
        return sum(shard.num_rows for shard in self.splits.get(split, ()))

    def num_images_per_class(self, split: str) -> dict[str, int]:
        """Images of one split that are of each class, or with each finding present."""
        shards = self.splits.get(split, ())
        return {
            name: sum(shard.num_rows_per_class[k] for shard in shards)
            for k, name in enumerate(self.classes)
        }

    def num_known_per_class(self, split: str) -> dict[str, int]:
        """Images of one split where it is known whether they are of each class, or show each
        finding.
        """
        shards = self.splits.get(split, ())
        unknown = [
            sum(each) for each in zip(*(x.num_unknown_per_class for x in shards), strict=True)
        ]
        num = self.num_images(split)
        return {
            name: num - absent
            for name, absent in zip(self.classes, unknown or [0] * len(self.classes), strict=True)
        }

    def to_json(self) -> str:
        """The text of `dataset.json`; its last key is a hash of all others, so any change shows."""
        mapping = asdict(replace(self, splits=dict(self.splits), config=dict(self.config)))
        if self.schema_version == 1:
            del mapping["task"]
            for info in chain.from_iterable(mapping["splits"].values()):
                del info["num_unknown_per_class"]
        ordered = {key: mapping[key] for key in ("schema_version", "fingerprint")} | mapping
        return json.dumps(ordered | {"index_sha256": _hash_json(ordered)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> "DatasetIndex":
        """Read `dataset.json` back. `where` names it in messages.

        Raises `CorruptError` if it is not what was written, `DatasetError` for another schema
        version.
        """
        try:
            mapping = load_json(text)
            version, stated = mapping["schema_version"], mapping.pop("index_sha256")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CorruptError(
                f"{where} is not the index of a data set, or is damaged: {error}"
            ) from error
        if stated != _hash_json(mapping):
            raise CorruptError(f"{where} is damaged: its contents do not have the hash it states")
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise DatasetError(
                f"{where} has schema version {version!r}; this xrai reads versions 1 to "
                f"{SCHEMA_VERSION}"
            )
        try:
            index: DatasetIndex = from_plain(cls, mapping)
            index._check()
        except (ValueError, StoreError) as error:
            raise CorruptError(f"{where} is not the index of a data set: {error}") from error
        return index

    def _check(self) -> None:
        """Raise `ValueError` or `StoreError` for what xrai never writes, `ConfigError` for an
        unknown config.
        """
        infos = [info for infos in self.splits.values() for info in infos]
        if not all(is_shard_name(info.name.removeprefix(self.place)) for info in infos):
            raise ValueError("it lists shards under names that xrai never writes")
        hashes = [self.fingerprint, *(info.sha256 for info in self.all_objects())]
        if not all(_HASH.fullmatch(text) for text in hashes):
            raise ValueError("a hash is none")
        for info in self.all_objects():
            check_key(info.name)
        "".join(self.classes).encode()  # raises `ValueError` where it is not text
        if len({*self.classes}) < len(self.classes) or not all(self.classes):
            raise ValueError(f"its classes are {', '.join(map(repr, self.classes))}")
        if not all(0 < info.num_rows <= _MAX_ROWS for info in infos):
            raise ValueError(f"a shard has no images, or more than {_MAX_ROWS}")
        num_counts = (len(self.classes), len(self.classes) if self.task == "multilabel" else 0)
        for info in infos:
            counts = (info.num_rows_per_class, info.num_unknown_per_class)
            is_counted = min((info.num_rows, *counts[0], *counts[1])) >= 0
            if (len(counts[0]), len(counts[1])) != num_counts or not is_counted:
                raise ValueError("the rows of a shard are not counted class by class")
        is_usual = {*self.splits} <= {*SPLITS} and not self.labels.fault()
        if not is_usual or not infos or not all(self.splits.values()):
            raise ValueError("it has other classes or splits than xrai writes")
        keys = flatten(self.config, where="in the config of dataset.json")
        if not {"images.fit", "images.size"} <= keys.keys():
            raise ValueError("its config lacks images.fit or images.size")
        if self.image_size != keys["images.size"]:
            raise ValueError(f"its images are {self.image_size} and {keys['images.size']} wide")


def compute_fingerprint(index: DatasetIndex) -> str:
    """Hex sha256 of a data set's contents: task, classes, image size and the hashes of its shards.

    For two classes it is that of version 1: the same images give the same fingerprint.
    """
    shards = {
        split: [shard.sha256 for shard in index.splits[split]]
        for split in SPLITS
        if split in index.splits
    }
    return _hash_json([*head_of(index.labels), index.image_size, shards])


def head_of(labels: LabelSpec) -> list[Any]:
    """The first of the values that a data set's hashes cover: version, task and classes."""
    head = [1] if labels.task == "binary" else [SCHEMA_VERSION, labels.task]
    return [*head, labels.classes]


def read_index(store: Store) -> DatasetIndex:
    """Read `dataset.json`. Raises `DatasetError` if there is none, `CorruptError` if damaged.

    One that arrives damaged from a bucket is read again: the transfer may have been cut.
    """
    num_reads = _NUM_INDEX_READS if store.local_path(INDEX_KEY) is None else 1
    while True:
        try:
            return DatasetIndex.from_json(store.read(INDEX_KEY), where=f"{store.uri}/{INDEX_KEY}")
        except NotFoundError as error:
            raise DatasetError(
                f"{store.uri} holds no {INDEX_KEY}, so no data set; `xrai preprocess "
                f"--source FOLDER --dataset {store.uri}` makes one"
            ) from error
        except CorruptError as error:
            num_reads -= 1
            if num_reads == 0:
                advice = "`xrai preprocess --overwrite` makes the data set anew"
                raise CorruptError(f"{error}; {advice}") from error


def hash_object(store: Store, key: str) -> str | None:
    """Hex sha256 of an object's stored bytes, or None if there is no such object."""
    try:
        with store.as_file(key) as path:
            return sha256_of(path)
    except (NotFoundError, FileNotFoundError):
        return None


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
