"""A wheel holds all that the package needs and works outside of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import xrai

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy of what the build reads."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "xrai", work / "xrai", ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", "dist"]
    run([*build, "--no-deps", "--no-index", "--no-build-isolation", "."], cwd=work)
    (path,) = (work / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel that sees this one's packages, but not its xrai."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)])
    (site,) = folder.glob("lib/python3*/site-packages")
    # only a path: the .pth file there that leads to the repository is not read
    (site / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_modules_templates_configs_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"xrai-{xrai.__version__}.dist-info"
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    modules = {f"{path.relative_to(ROOT)}" for path in (ROOT / "xrai").rglob("*.py")}
    configs = {f"xrai/configs/{path.name}" for path in (ROOT / "xrai/configs").glob("*.yaml")}
    results = (ROOT / "xrai/results").glob("*.jinja")
    templates = {f"xrai/results/{path.name}" for path in results}
    page = {f"xrai/serving/page/{path.name}" for path in (ROOT / "xrai/serving/page").iterdir()}
    assert "xrai/serving/page/main.js" in page
    assert len(configs) >= 3 and "xrai/results/report.html.jinja" in templates
    assert modules | configs | {"xrai/py.typed"} | templates | page <= names
    assert {name.partition("/")[0] for name in names} == {"xrai", info}
    assert f"{info}/licenses/LICENSE" in names
    assert "xrai = xrai.__main__:main" in scripts
    assert "Requires-Python: >=3.11" in metadata and "# xrai" in metadata


@pytest.mark.ci
def test_an_installed_wheel_goes_from_phantoms_to_predictions(
    environment: Path, tmp_path: Path
) -> None:
    def command(*words: str) -> str:
        return run([str(environment / "bin/xrai"), *words], cwd=tmp_path)

    where = [str(environment / "bin/python"), "-c", "import xrai; print(xrai.__file__)"]
    assert Path(run(where, cwd=tmp_path).strip()).is_relative_to(environment)
    command("phantom", "--num-images", "120", "--out", "images")
    size = "--images.size=32"
    config = "--config=quickstart"
    command("preprocess", config, "--source", "images", "--dataset", "data", size)
    settings = ["--train.epochs=1", "--model.width=8", "--evaluate.num_bootstrap=20"]
    command("train", config, "--dataset=data", "--artifacts=runs", "--run_id=one", size, *settings)
    assert (tmp_path / "runs/one/report.html").stat().st_size > 10_000
    folder = next((tmp_path / "images/train/NORMAL").parent.iterdir())
    table = command("predict", "--run", "runs/one", str(folder), "--out", "predictions")
    assert "pneumonia" in table or "normal" in table or "review" in table
    assert (tmp_path / "predictions/predictions.csv").exists()


def run(command: list[str], *, cwd: Path | None = None) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
