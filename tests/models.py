"""Finished runs for tests of what is done with one: a model.pt of a network that was trained in
memory for seconds.
"""

import functools
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.learning.fakes import FakeLoader
from xrai.config import Config, Images
from xrai.config import Model as ModelConfig
from xrai.ingest.images import decode
from xrai.labels import LabelSpec
from xrai.learning.distributed import Ranks
from xrai.learning.network import Network, ResNet
from xrai.learning.predictor import TrainedModel, build_model, save_model
from xrai.learning.typicality import fit_typicality
from xrai.phantom import draw_phantom, plan

FINGERPRINT = "f" * 64
MAX_PIXELS = 100_000_000


@functools.cache
def phantoms(
    num_images: int, *, seed: int = 0
) -> tuple[tuple[NDArray[np.uint8], ...], tuple[int, ...]]:
    """Drawn films (H, W), each of a size of its own, and labels."""
    drawn = list(islice(plan(seed), num_images))
    films = tuple(np.rint(draw_phantom(seed, phantom) * 255).astype(np.uint8) for phantom in drawn)
    return films, tuple(int(phantom.label == "PNEUMONIA") for phantom in drawn)


def save_films(folder: Path, num_images: int) -> Path:
    """Phantoms as 00.png and so on, an image of noise, and a file that is none."""
    for number, film in enumerate(phantoms(num_images)[0]):
        Image.fromarray(film).save(folder / f"{number:02}.png")
    noise = np.random.default_rng(5).integers(0, 256, (90, 120), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "none.txt").write_text("no image")
    return folder


def train(
    network: Network, images: NDArray[np.uint8], labels: NDArray[np.uint8], *, num_steps: int
) -> None:
    """A few steps on images (N, H, W), enough to tell the classes roughly apart."""
    grey, wanted = torch.from_numpy(images)[:, None] / 255, torch.from_numpy(labels).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        chosen = torch.randint(len(grey), (32,), generator=generator)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            network(grey[chosen]).squeeze(1), wanted[chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_run(
    folder: Path,
    *,
    size: int = 64,
    fit: Literal["crop", "squash", "pad"] = "crop",
    threshold: float = 0.5,
    temperature: float = 1.5,
    num_images: int = 48,
    num_steps: int = 25,
    run_id: str = "tiny",
    max_pixels: int = MAX_PIXELS,
) -> Path:
    """`folder`/`run_id` with the model.pt of a network trained on phantoms."""
    films, labels = phantoms(num_images)
    images = np.stack([decode(film, size=size, fit=fit, max_pixels=MAX_PIXELS) for film in films])
    torch.manual_seed(7)
    config = Config(
        images=Images(size=size, fit=fit, max_pixels=max_pixels), model=ModelConfig(width=8)
    )
    network = build_model(config.model, 1)
    train(network, images, np.array(labels, np.uint8), num_steps=num_steps)
    labels_of_two = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
    return _save(
        folder / run_id, network, config, images, labels_of_two, (temperature,), (threshold,)
    )


def save_random_run(folder: Path, labels: LabelSpec, *, num_images: int = 48) -> Path:
    """`folder`/tiny with the model.pt of a network of random weights, which calls each class in
    some phantoms, or each finding in half of them.
    """
    films, _ = phantoms(num_images)
    images = np.stack([decode(film, size=64, fit="crop", max_pixels=MAX_PIXELS) for film in films])
    torch.manual_seed(7)
    config = Config(images=Images(max_pixels=MAX_PIXELS), model=ModelConfig(width=8))
    network = build_model(config.model, labels.num_outputs)
    assert isinstance(network, ResNet)
    grey = torch.from_numpy(images)[:, None] / 255
    with torch.no_grad():
        features = network.features(grey).mean(dim=(2, 3))
        spread = features.std(dim=0) * features.shape[1] ** 0.5 + 1e-6  # gives logits of about 1
        network.head.weight.normal_().div_(spread)
        network.head.bias.copy_(-network.head.weight @ features.mean(dim=0))
        logits = network(grey).double()
    if labels.task == "multiclass":
        temperatures, thresholds = torch.tensor([2.5]), torch.tensor([])
    else:
        temperatures = torch.linspace(0.8, 3, labels.num_outputs)
        thresholds = torch.sigmoid(logits / temperatures).median(dim=0).values
    return _save(
        folder / "tiny",
        network,
        config,
        images,
        labels,
        tuple(temperatures.tolist()),
        tuple(thresholds.tolist()),
    )


def without_detail(typicality: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The score of model.pt as versions 3 and 4 have it, from that of version 5."""
    earlier = dict(typicality)
    last = max(int(name.split("_")[1]) for name in earlier if name.startswith("whitening_"))
    num = len(earlier.pop(f"whitening_{last}"))
    del earlier["both"]
    for name in ("mean", "directions"):
        earlier[name] = earlier[name][:-num]
    for name in ("offset", "scale"):
        earlier[name] = torch.cat([earlier[name][:2], earlier[name][3:]])
    return earlier


def _save(
    run: Path,
    network: Network,
    config: Config,
    images: NDArray[np.uint8],
    labels: LabelSpec,
    temperatures: tuple[float, ...],
    thresholds: tuple[float, ...],
) -> Path:
    loader = FakeLoader(images, np.zeros(len(images), np.uint8), batch_size=16)
    here = Ranks(0, 1, 0, 1, torch.device("cpu"))  # where the network is
    typicality = fit_typicality(network, loader, loader, ranks=here)
    run.mkdir(parents=True)
    trained = TrainedModel(
        network,
        config.model,
        config.images,
        labels,
        temperatures,
        thresholds,
        typicality,
        run.name,
        FINGERPRINT,
        tuple((0.6 + np.arange(labels.num_outputs) / 50).tolist())
        if labels.task != "multiclass"
        else tuple(np.full(len(labels.classes), 1 / len(labels.classes)).tolist()),
    )
    save_model(run / "model.pt", trained)
    return run
