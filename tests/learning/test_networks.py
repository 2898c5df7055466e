"""Every network that a config can name works with the loop, the scorer, heat maps and review."""

import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.learning.fakes import FakeLoader, make_discs, train_discs
from xrai.config import NETWORK_GROUP, Config, Images, Model, Train
from xrai.config import build as build_config
from xrai.errors import ConfigError, UserError
from xrai.labels import LabelSpec
from xrai.learning.distributed import Ranks, join
from xrai.learning.engine import write_graph
from xrai.learning.explain import layer_cam
from xrai.learning.export import ONNX_FILE, Serving, serve, trace, write
from xrai.learning.network import Network
from xrai.learning.predictor import (
    MODEL_FILE,
    TrainedModel,
    build_model,
    load_model,
    predict_split,
    save_model,
)
from xrai.learning.typicality import fit_typicality
from xrai.pipeline import Pipeline
from xrai.store import open_store


class Plain(nn.Module):
    """What a package may register: it knows nothing of xrai."""

    def __init__(self, num_outputs: int, image_size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, num_outputs)

    def stages(self, grey: Tensor) -> list[Tensor]:
        fine = torch.relu(self.first(grey - 0.5))
        return [fine, torch.relu(self.second(fine))]

    def forward(self, grey: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(grey)[-1].mean(dim=(2, 3)))
        return logits


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"plain": f"{__name__}:Plain", "list": "builtins:dict", "gone": "no_such_package:f"}
    points = [metadata.EntryPoint(name, value, NETWORK_GROUP) for name, value in names.items()]
    monkeypatch.setattr(metadata.EntryPoint, "load", _load)
    for module in ("xrai.config", "xrai.learning.network"):
        monkeypatch.setattr(f"{module}.entry_points", lambda group: metadata.EntryPoints(points))


def _load(point: metadata.EntryPoint) -> object:
    if point.name == "gone":
        raise ImportError("no such package")
    return Plain if point.name == "plain" else dict


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    torch.set_num_threads(1)
    with join(timeout_s=10) as ranks:
        yield ranks


HAS_TIMM = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(
    not HAS_TIMM,
    reason="timm is not installed: scripts/install --timm makes .venv-timm, .ci/run tests there",
)
TIMM = [
    Model("timm/resnet18", batch_norm="frozen"),
    Model("timm/densenet121", input="xrv", batch_norm="local"),
    Model("timm/convnextv2_atto", drop_path=0.2),
    Model("timm/tf_efficientnet_lite0", input="standardized"),
    Model("timm/vit_tiny_patch16_224", drop_path=0.1),
]
NETWORKS = [
    Model(width=8),
    pytest.param(Model("resnet18", width=8), marks=pytest.mark.ci),
    Model("plain"),
    *(pytest.param(model, marks=needs_timm) for model in TIMM),
]


def in_words(config: Model) -> str:
    return config.name.removeprefix("timm/")


def test_a_registered_network_has_a_layer_for_each_of_its_parts() -> None:
    layers = build_model(Model("plain"), 1, image_size=32).parameter_layers()
    assert [layers[f"module.{part}.weight"] for part in ("first", "second", "head")] == [0, 1, 2]


@pytest.mark.parametrize("model", NETWORKS, ids=in_words)
def test_a_network_trains_and_goes_on_bit_for_bit(
    model: Model, ranks: Ranks, tmp_path: Path
) -> None:
    config = Config(
        model=model, train=Train(epochs=2, global_batch_size=32, precision="off", threads=1)
    )
    whole = train_discs(config, ranks=ranks, num_images=96, num_val=9)
    assert whole.losses[-1] != whole.losses[0]
    train_discs(config, ranks=ranks, folder=tmp_path, stop_after=4, num_images=96, num_val=9)
    rest = train_discs(config, ranks=ranks, folder=tmp_path, num_images=96, num_val=9)
    assert rest.weights == whole.weights


def give_statistics(network: Network) -> None:
    """Batch norms have those of some images: with others, values of a random network grow from
    layer to layer, and the errors of their rounding, too.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches, so of the one below
    network.train()
    with torch.no_grad():
        network(torch.from_numpy(make_discs(32, seed=4)[0])[:, None] / 255)


@pytest.mark.parametrize("model", NETWORKS, ids=in_words)
def test_a_network_is_saved_read_explained_and_exported(
    model: Model, ranks: Ranks, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = build_model(model, 1, image_size=32)
    give_statistics(network)
    network.eval()
    train, val = (
        FakeLoader(*make_discs(number, seed=number), batch_size=32) for number in (60, 30)
    )
    typicality = fit_typicality(network, train, val, ranks=ranks)
    labels = LabelSpec("binary", ("NORMAL", "PNEUMONIA"))
    of_run = ((1.5,), (0.5,), typicality, "run", "f" * 64)
    trained = TrainedModel(network, model, Images(size=32), labels, *of_run)
    save_model(tmp_path / MODEL_FILE, trained)
    read = load_model(open_store(str(tmp_path)))
    images, _ = make_discs(6, seed=3)
    grey = torch.from_numpy(images)[:, None] / 255
    found = predict_split(read.network, val, ranks=ranks, typicality=read.typicality)
    ours = predict_split(network, val, ranks=ranks, typicality=typicality)
    assert found.logits == pytest.approx(
        ours.logits, abs=1e-4, rel=1e-4
    )  # in another memory layout
    assert found.atypicality is not None
    assert np.isfinite(found.atypicality).all() and (found.atypicality > 1).mean() < 0.3
    heat = layer_cam(read.network, grey)
    assert heat.shape == (6, 32, 32) and float(heat.min()) >= 0 and float(heat.max()) <= 1
    rows = Pipeline(read).predict(list(images))
    assert [row.probability for row in rows] == pytest.approx(
        serve(Serving(read), images)[0], abs=1e-5
    )
    serving = Serving(read)
    program = trace(serving)
    for ours_, theirs in zip(serve(serving, images), serve(program.module(), images), strict=True):
        np.testing.assert_allclose(theirs, ours_, atol=1e-5, rtol=1e-4)
    if HAS_TIMM:  # in .ci/run's stage of it, of every network; tests/test_export.py has the rest
        other_sizes = [np.zeros((1, 40, 33), np.uint8), images[:2, 5:]]
        agreement = write(
            program, serving, tmp_path / ONNX_FILE, metadata={}, batches=[images, *other_sizes]
        )
        assert agreement.probability < 1e-5 and (tmp_path / ONNX_FILE).stat().st_size > 1000
        pipeline = Pipeline(read)
        assert pipeline.use_graphs([write_graph(packed) for packed in pipeline.pack()])
        again = [row.probability for row in pipeline.predict(list(images))]
        assert again == pytest.approx([row.probability for row in rows], abs=1e-5)


def test_a_registered_network_has_heat_maps_without_a_way_from_its_maps_to_its_logits() -> None:
    torch.manual_seed(0)
    heat = layer_cam(build_model(Model("plain"), 2, image_size=32), torch.rand(4, 1, 32, 32), 1)
    assert heat.isfinite().all() and float(heat.max()) == pytest.approx(1)


def test_a_name_that_nobody_registers_is_refused_and_the_allowed_ones_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"it takes resnet10, resnet18, timm/NAME, gone, list, plain, or"
    ):
        build_config({"model.name": "resnet50"})
    assert build_config({"model.name": "plain"}).model.name == "plain"


@pytest.mark.parametrize(
    ("name", "words"), [("list", "gives dict, not a torch module"), ("gone", "no such package")]
)
def test_a_package_that_gives_no_network_is_named(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model(Model(name), 1)


def test_weights_of_earlier_versions_load() -> None:
    network, other = build_model(Model(width=8), 1), build_model(Model(width=8), 1)
    earlier = {name.replace("blocks.", "stages."): of for name, of in network.state_dict().items()}
    other.load_state_dict(earlier)
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(other(images), network(images)) and isinstance(other, Network)
