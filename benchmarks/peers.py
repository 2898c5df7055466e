"""The peers' formats, written and read as each one's documentation says is fastest. Pixels are
stored raw, not as JPEG.

`preprocess` uses the writers, `load` the readers, so that both measure the same bytes. A shard of
each format holds as many images as ours, `SHARD_ROWS`; h5py's is one file, as most people write it.
How each peer is set up:

    streaming   static `ndarray:uint8:H,W` and `uint8` columns, no compression; a writer per
                process, then `merge_index`
    litdata     `optimize` with torch tensors, which its reader maps without a copy
    webdataset  `.ten`, its own format for tensors, read without a copy, and `.cls`; a `ShardWriter`
                per process
    h5py        contiguous `images` (N, H, W) and `labels`; a pool of processes feeds one writer

The peers are imported inside the functions: none of them is needed to import this module.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Read = Callable[
    [str], tuple[NDArray[np.uint8], int]
]  # of a path: pixels (H, W) and label; picklable

SHARD_ROWS = 1024


# ------------------------------------------------------------------------------------------ writing


def write_streaming(read: Read, paths: Sequence[str], folder: Path, *, num_workers: int) -> None:
    """Write MDS shards and their index into `folder`, which may not exist yet."""
    from streaming.base.util import merge_index

    parts = _parts(paths, num_workers)
    folder.mkdir(parents=True, exist_ok=True)
    if len(parts) == 1:
        _write_mds(read, folder, parts[0])
        return
    places = [folder / f"{number:02d}" for number in range(len(parts))]
    with Pool(len(parts)) as pool:
        pool.starmap(partial(_write_mds, read), zip(places, parts, strict=True))
    merge_index(str(folder), keep_local=True)


def _write_mds(read: Read, folder: Path, part: Sequence[str]) -> None:
    from streaming import MDSWriter

    pixels, _ = read(part[0])
    columns = {"image": f"ndarray:uint8:{pixels.shape[0]},{pixels.shape[1]}", "label": "uint8"}
    with MDSWriter(
        columns=columns,
        out=str(folder),
        size_limit=SHARD_ROWS * (pixels.size + 9),
        progress_bar=False,
    ) as out:
        for path in part:
            pixels, label = read(path)
            out.write({"image": pixels, "label": np.uint8(label)})


def write_litdata(read: Read, paths: Sequence[str], folder: Path, *, num_workers: int) -> None:
    """Write litdata's chunks and index into `folder`."""
    import litdata

    litdata.optimize(
        fn=partial(_read_tensor, read),
        inputs=list(paths),
        output_dir=str(folder),
        chunk_size=SHARD_ROWS,
        num_workers=num_workers,
        verbose=False,
    )


def _read_tensor(read: Read, path: str) -> dict[str, Any]:
    import torch

    pixels, label = read(path)
    return {"image": torch.from_numpy(np.require(pixels, requirements=["C", "W"])), "label": label}


def write_webdataset(read: Read, paths: Sequence[str], folder: Path, *, num_workers: int) -> None:
    """Write tar files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(paths, num_workers)
    if len(parts) == 1:
        _write_tars(read, folder, 0, parts[0])
        return
    with Pool(len(parts)) as pool:
        pool.starmap(partial(_write_tars, read, folder), enumerate(parts))


def _write_tars(read: Read, folder: Path, worker: int, part: Sequence[str]) -> None:
    import webdataset

    with webdataset.ShardWriter(
        str(folder / f"{worker:02d}-%05d.tar"), maxcount=SHARD_ROWS, verbose=0
    ) as out:
        for number, path in enumerate(part):
            pixels, label = read(path)
            out.write(
                {
                    "__key__": f"{worker:02d}-{number:07d}",
                    "ten": np.ascontiguousarray(pixels),
                    "cls": label,
                }
            )


def write_h5py(read: Read, paths: Sequence[str], folder: Path, *, num_workers: int) -> None:
    """Write `folder`/images.h5."""
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "images.h5", "w") as file:
        labels = file.create_dataset("labels", (len(paths),), np.uint8)  # (N,)
        images = None  # (N, H, W)
        for number, (pixels, label) in enumerate(_read_all(read, paths, num_workers)):
            if images is None:
                images = file.create_dataset("images", (len(paths), *pixels.shape), np.uint8)
            images[number], labels[number] = pixels, label


def _read_all(
    read: Read, paths: Sequence[str], num_workers: int
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    if num_workers <= 1:
        yield from map(read, paths)
        return
    with Pool(num_workers) as pool:
        yield from pool.imap(read, paths, chunksize=16)


def _parts(paths: Sequence[str], num: int) -> list[Sequence[str]]:
    """As many parts of nearly equal length, none of them empty."""
    num = max(min(num, len(paths)), 1)
    return [paths[len(paths) * k // num : len(paths) * (k + 1) // num] for k in range(num)]


WRITERS: dict[str, Callable[..., None]] = {
    "streaming": write_streaming,
    "litdata": write_litdata,
    "webdataset": write_webdataset,
    "h5py": write_h5py,
}


# ------------------------------------------------------------------------------------------ reading


class Batches:
    """Iterated again and again, an epoch a time: images (B, 1, H, W) uint8 and labels (B,),
    torch tensors.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        import torch

        for batch in self._loader:
            found = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
            images, labels = map(torch.as_tensor, found)
            yield (images if images.ndim == 4 else images.unsqueeze(1)), labels


def read_streaming(
    address: str,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    cache: Path | None = None,
) -> Batches:
    """`StreamingDataset` on a folder, or on a bucket by way of the folder `cache`;
    `S3_ENDPOINT_URL` names the S3.

    The size of the batch is told to both the data set and the `DataLoader`, as the documentation
    asks.
    """
    from streaming import StreamingDataset

    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
    )
    remote, local = (address, str(cache)) if cache else (None, address)
    dataset = StreamingDataset(remote=remote, local=local, shuffle=True, batch_size=batch_size)
    return Batches(_data_loader(dataset, batch_size=batch_size, num_workers=num_workers))


def read_litdata(
    address: str,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    cache: Path | None = None,
) -> Batches:
    """`StreamingDataset` and `StreamingDataLoader`; a folder is mapped in place, a bucket's
    chunks come to `cache`.
    """
    import litdata

    os.environ.update({"GLOBAL_RANK": str(rank), "WORLD_SIZE": str(world_size)})
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if cache else {}
    if options.get("endpoint_url", "").startswith(
        "http://"
    ):  # it has no setting for a server without TLS
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset = litdata.StreamingDataset(
        address, cache_dir=str(cache) if cache else None, shuffle=True, storage_options=options
    )
    workers = {"persistent_workers": True} if num_workers else {}
    return Batches(
        litdata.StreamingDataLoader(
            dataset, batch_size=batch_size, num_workers=num_workers, **workers
        )
    )


def read_webdataset(
    address: str,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    cache: Path | None = None,
) -> Batches:
    """Tar files, shards shuffled and images in a buffer of 1,000, batched in the pipeline as its
    documentation says.

    `address` is a folder, or a text of one `pipe:` command a line; with `cache` each shard is
    copied there first.
    """
    import webdataset

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size)})
    urls = (
        address.splitlines()
        if address.startswith("pipe:")
        else sorted(map(str, Path(address).glob("*.tar")))
    )
    dataset = (
        webdataset.WebDataset(
            urls,
            shardshuffle=len(urls),
            nodesplitter=webdataset.split_by_node,
            cache_dir=str(cache) if cache else None,
        )
        .shuffle(1000)
        .decode()
        .to_tuple("ten", "cls")
        .map(_first_of_tensor)
        .batched(batch_size)
    )
    workers = {"persistent_workers": True} if num_workers else {}
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers, **workers)
    return Batches(loader)


def _first_of_tensor(sample: tuple[list[NDArray[np.uint8]], int]) -> tuple[NDArray[np.uint8], int]:
    tensors, label = sample
    return tensors[0], label


def read_h5py(
    address: str, *, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1
) -> Batches:
    """`DataLoader` over a `Dataset` that opens the file when first asked and reads one image at
    a time.
    """
    dataset = _Hdf5Images(f"{address}/images.h5")
    return Batches(
        _data_loader(
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle=True,
            rank=rank,
            world_size=world_size,
        )
    )


class _Hdf5Images:
    """The usual map-style data set: the file is opened lazily, so that each worker has a handle
    of its own.
    """

    def __init__(self, path: str) -> None:
        import h5py

        self._path = path
        self._opened: tuple[Any, Any] | None = None
        with h5py.File(path, "r") as file:
            self._num = len(file["labels"])

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, row: int) -> tuple[Any, int]:
        import h5py
        import torch

        if self._opened is None:
            file = h5py.File(self._path, "r")
            self._opened = file["images"], file["labels"]
        images, labels = self._opened
        return torch.from_numpy(images[row]), int(labels[row])


def read_files(
    address: str, *, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1
) -> Batches:
    """torchvision's `ImageFolder` over image files, one grey channel, through a `DataLoader`."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Grayscale, PILToTensor

    dataset = ImageFolder(address, transform=Compose([Grayscale(), PILToTensor()]))
    return Batches(
        _data_loader(
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle=True,
            rank=rank,
            world_size=world_size,
        )
    )


def _data_loader(
    dataset: Any,
    *,
    batch_size: int,
    num_workers: int,
    shuffle: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Any:
    from torch.utils.data import DataLoader, DistributedSampler

    sampler: Any = (
        DistributedSampler(dataset, world_size, rank) if shuffle and world_size > 1 else None
    )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        persistent_workers=num_workers > 0,
    )


READERS: dict[str, Callable[..., Batches]] = {
    "streaming": read_streaming,
    "litdata": read_litdata,
    "webdataset": read_webdataset,
    "h5py": read_h5py,
    "files": read_files,
}
