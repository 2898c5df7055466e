"""A network on a GPU says what it says on the CPU: scores, review, heat maps, files, films."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learning.fakes import FakeLoader, make_discs
from tests.models import phantoms, save_films, save_run
from tests.serving.conftest import make_client
from tests.serving.test_http import png, post
from xrai.config import Augment, Images, Model
from xrai.ingest.find import find_files
from xrai.labels import LabelSpec
from xrai.learning import export
from xrai.learning.distributed import Ranks
from xrai.learning.explain import layer_cam
from xrai.learning.network import Network
from xrai.learning.predictor import (
    MODEL_FILE,
    TrainedModel,
    build_model,
    load_model,
    predict_split,
    save_model,
)
from xrai.learning.typicality import Typicality, count_review, fit_typicality
from xrai.pipeline import Explained, Pipeline, open_run
from xrai.serving.films import Worklist
from xrai.serving.models import Models
from xrai.serving.service import Service
from xrai.store import open_store

pytestmark = pytest.mark.usefixtures("exact")
CPU = Ranks(0, 1, 0, 1, torch.device("cpu"))
LABELS = LabelSpec("multilabel", ("DISC", "ODD"))


@pytest.fixture(scope="module")
def network() -> Network:
    """A network of two outputs with random weights, on the CPU."""
    torch.manual_seed(3)
    return build_model(Model(width=8), 2).eval()


@pytest.fixture(scope="module")
def typicality(network: Network) -> Typicality:
    """Its review score, fitted on the CPU."""
    return fit_typicality(network, *splits(), ranks=CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that tells phantoms with pneumonia from others."""
    return save_run(tmp_path_factory.mktemp("run"))


def splits() -> tuple[FakeLoader, FakeLoader]:
    train, val = (FakeLoader(*make_discs(num, seed=num), batch_size=16) for num in (60, 30))
    return train, val


def on(module: Any, device: torch.device) -> Any:
    """A copy on the device."""
    return copy.deepcopy(module).to(device)


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("shift", [None, Augment()], ids=["as they are", "augmented"])
def test_each_image_is_scored_once_as_on_the_cpu(
    network: Network, typicality: Typicality, ranks: Ranks, shift: Augment | None
) -> None:
    loader = splits()[1]
    options: dict[str, Any] = {"shift": shift, "draws": 1 if shift is None else 2}
    here, there = (
        predict_split(
            on(network, place.device),
            loader,
            ranks=place,
            typicality=on(typicality, place.device),
            **options,
        )
        for place in (ranks, CPU)
    )
    assert here.logits.shape == (options["draws"], 30, 2)
    assert np.allclose(here.logits, there.logits, rtol=1e-3, atol=1e-4)
    assert here.atypicality is not None and there.atypicality is not None
    assert np.allclose(here.atypicality, there.atypicality, rtol=5e-3, atol=5e-3)


def test_review_is_fitted_as_on_the_cpu(
    network: Network, typicality: Typicality, ranks: Ranks
) -> None:
    double = on(network, ranks.device).double()
    fitted = fit_typicality(double, *splits(), ranks=ranks)
    expected = fit_typicality(copy.deepcopy(network).double(), *splits(), ranks=CPU)
    images = torch.from_numpy(make_discs(40, seed=5)[0])[:, None].double() / 255
    here = fitted.atypicality(double, images.to(ranks.device))[1]
    there = expected.atypicality(copy.deepcopy(network).double(), images)[1]
    assert torch.allclose(here.cpu(), there, rtol=1e-4, atol=1e-4)
    assert (typicality.limit > 0).all()


def test_images_unlike_those_of_training_are_counted_on_the_device(
    network: Network, ranks: Ranks
) -> None:
    from tests.learning.test_typicality import make_unlike

    unlike = make_unlike(60)
    here, there = (
        count_review(
            on(network, place.device),
            fit_typicality(on(network, place.device), *splits(), ranks=place, unlike=unlike),
            unlike,
            ranks=place,
        )
        for place in (ranks, CPU)
    )
    assert abs(here - there) <= 1 and there > 0


@pytest.mark.parametrize("size", [32, 64, 96])
def test_heat_maps_are_those_of_the_cpu(network: Network, device: torch.device, size: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 1, size, size, dtype=torch.float64)
    outputs = torch.arange(6) % 2
    here = layer_cam(on(network, device).double(), images.to(device), outputs.to(device))
    there = layer_cam(copy.deepcopy(network).double(), images, outputs)
    assert here.shape == (6, size, size) and there.amax() == 1
    assert torch.allclose(here.cpu(), there, rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------- files


def saved(network: Network, typicality: Typicality, folder: Path) -> TrainedModel:
    """The model as it is saved from where it lies, read again."""
    model = TrainedModel(
        network,
        Model(width=8),
        Images(size=32),
        LABELS,
        temperatures=(1.5, 0.7),
        thresholds=(0.25, 0.5),
        typicality=typicality,
        run_id="discs",
        fingerprint="f" * 64,
        priors=(0.3, 0.4),
    )
    folder.mkdir()
    save_model(folder / MODEL_FILE, model)
    return load_model(open_store(str(folder)))


def test_a_model_saved_from_the_device_is_the_same_file(
    network: Network, typicality: Typicality, device: torch.device, tmp_path: Path
) -> None:
    here = saved(on(network, device), on(typicality, device), tmp_path / "here")
    there = saved(network, typicality, tmp_path / "there")
    for own, other in ((here.network, there.network), (here.typicality, there.typicality)):
        states = own.state_dict(), other.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
        assert {of.device.type for of in states[0].values()} == {"cpu"}


@pytest.mark.ci
@pytest.mark.parametrize("name", [export.ONNX_FILE, export.TORCH_FILE])
def test_a_model_on_the_device_is_exported_as_one_on_the_cpu(
    network: Network, typicality: Typicality, device: torch.device, tmp_path: Path, name: str
) -> None:
    if name == export.ONNX_FILE and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("the extra `export` is missing")
    model = saved(network, typicality, tmp_path / "model")
    model.network.to(device)
    model.typicality.to(device)
    serving = export.Serving(model)
    batches = [np.random.default_rng(0).integers(0, 256, (3, 50, 70), np.uint8)]
    program = export.trace(serving)
    agreement = export.write(program, serving, tmp_path / name, metadata={}, batches=batches)
    assert agreement.probability <= export.TOLERANCE and (tmp_path / name).stat().st_size > 1000


# ------------------------------------------------------------------------------- films and serving


def pipeline(run: Path, device: torch.device) -> Pipeline:
    return Pipeline(open_run(str(run)), device=device)


def test_rows_of_films_are_those_of_the_cpu(
    run: Path, device: torch.device, tmp_path: Path
) -> None:
    save_films(tmp_path, 12)
    here, there = (pipeline(run, place).predict(tmp_path) for place in (device, CPU.device))
    assert len(here) == len(there) == 14
    for own, other in zip(here, there, strict=True):
        assert own.path == other.path and own.is_readable == other.is_readable
        if own.is_readable:
            assert own.probability == pytest.approx(other.probability, abs=1e-4)
    decisions = [[row.decision for row in rows] for rows in (here, there)]
    assert decisions[0] == decisions[1]


def test_heat_maps_of_films_are_those_of_the_cpu(
    run: Path, device: torch.device, tmp_path: Path
) -> None:
    save_films(tmp_path, 5)
    found: list[list[Explained]] = [
        list(pipeline(run, place).classify(find_files([str(tmp_path)]), explain_side=64))
        for place in (device, CPU.device)
    ]
    num_maps = 0
    for own, other in zip(*found, strict=True):
        assert own.heats.keys() == other.heats.keys()
        for name, heat in own.heats.items():
            num_maps += 1
            assert np.allclose(heat, other.heats[name], atol=1e-3)
    assert num_maps == 6


def test_a_run_predicts_on_the_gpu_where_there_is_one(run: Path, device: torch.device) -> None:
    default = Pipeline(open_run(str(run)))
    films = phantoms(3)[0]
    rows = default.predict(list(films))
    (member,) = default._members
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert next(member._network.parameters()).device.type == expected
    for own, other in zip(rows, pipeline(run, device).predict(list(films)), strict=True):
        assert own.probability == pytest.approx(other.probability, abs=1e-4)


def test_films_are_answered_by_the_server_as_predict_does(run: Path, device: torch.device) -> None:
    pictures = phantoms(6)[0]
    expected = pipeline(run, CPU.device).predict(list(pictures))
    served = pipeline(run, device)
    worklist = Worklist(max_films=100, max_bytes=1 << 26, lifetime_s=3600)
    models = Models(served, {}, ())
    service = Service(models, (str(run),), lambda addresses: models, worklist)
    with make_client(service) as client:
        files = ((f"{number}.png", png(picture)) for number, picture in enumerate(pictures))
        answer = post(client, *files)
    assert len(answer["films"]) == len(expected)
    for film, row in zip(answer["films"], expected, strict=True):
        assert film["probabilities"] == pytest.approx(dict(row.probabilities), abs=1e-4)
        assert film["decision"] == row.decision
