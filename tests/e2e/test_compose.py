"""compose.yaml, run for real: the whole job, stopped, killed, refused, with a real S3 server and
real containers.
"""

import concurrent.futures
import csv
import io
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.containers import (
    REPOSITORY,
    RUN,
    Stack,
    docker,
    inspect,
    run,
    wait_for_exit,
    wait_for_line,
    wait_until,
)

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]

RESULTS = {
    "config.yaml",
    "environment.json",
    "history.csv",
    "curves/loss.png",
    "curves/accuracy.png",
    "model.pt",
    "metrics.json",
    "predictions.csv",
    "report.html",
    "summary.json",
    "plots/roc.png",
    "val/metrics.json",
}
SERVICES = {
    *("s3", "phantoms", "preprocess", "train", "train-0", "train-1"),
    *("tensorboard", "predict", "serve"),
}
GPU = "--file=docker/compose.gpu.yaml"
CEPH = "--file=tests/e2e/compose.ceph.yaml"
DICOM = "--file=docker/compose.dicom.yaml"
DICOM_SETTINGS = {"XRAI_DICOM_ALLOW": "CR1", "XRAI_PACS": "pacs.example.org:104:ARCHIVE"}


def container_of(stack: Stack, service: str) -> str:
    """The id of a service's container."""
    return stack.compose("--profile=*", "ps", "--all", "--quiet", service).stdout.strip()


# ------------------------------------------------------------------------------- what the files say


@pytest.mark.parametrize(
    "files",
    [(), (GPU,), (CEPH,), (GPU, CEPH), (DICOM,)],
    ids=["plain", "gpu", "ceph", "gpu and ceph", "dicom"],
)
@pytest.mark.parametrize("profile", ["", "multinode", "tools", "*"])
def test_every_combination_of_files_profiles_and_sources_is_a_valid_project(
    files: tuple[str, ...], profile: str
) -> None:
    options = ["--file=compose.yaml", *files, *([f"--profile={profile}"] if profile else [])]
    keys: dict[str, Any] = (
        {"XRAI_S3_KEY": "key", "XRAI_S3_SECRET": "secret"} if CEPH in files else {}
    )
    if DICOM in files:
        keys |= DICOM_SETTINGS
    for source, mounted in {
        "": "phantoms",
        "/films": "/films",
        "./films": f"{REPOSITORY}/films",
    }.items():
        settings: dict[str, Any] = {"XRAI_SOURCE": source} if source else {}
        config = run(
            "docker", "compose", *options, "config", "--format=json", **settings, **keys
        ).stdout
        services = json.loads(config)["services"]
        if profile == "*":
            assert set(services) == SERVICES
        else:
            assert {"s3", "preprocess", "train"} <= set(services) < SERVICES
        (images,) = (
            mount for mount in services["preprocess"]["volumes"] if mount["target"] == "/source"
        )
        assert images["read_only"] and images["source"] == mounted
        assert ("deploy" in services["train"]) == (GPU in files)


def faults_of(services: dict[str, Any]) -> list[str]:
    """What a service may do that it should not, or lacks."""
    faults = []
    for name, service in services.items():
        wanted = {
            "init": service.get("init") is True,
            "read_only": service.get("read_only") is True,
            "cap_drop": service.get("cap_drop") == ["ALL"],
            "no-new-privileges": "no-new-privileges:true" in service.get("security_opt", []),
            "mem_limit": int(service.get("mem_limit", 0)) > 0,
            "tmpfs": any(mount.startswith("/tmp:") for mount in service.get("tmpfs", [])),
            "no privileges": not any(
                service.get(key)
                for key in ("privileged", "cap_add", "pid", "ipc", "network_mode", "devices")
            ),
            "user": "user" not in service or service["user"].split(":")[0] not in ("0", "root"),
            "local ports": all(
                port.get("host_ip") == "127.0.0.1" for port in service.get("ports", [])
            ),
            "pinned image": service.get("build") is not None
            or ":" in service["image"].rpartition("/")[2],
            "no host folders to write": all(
                mount["type"] == "volume" or mount.get("read_only")
                for mount in service.get("volumes", [])
            ),
            "no latest": not service["image"].endswith(":latest"),
        }
        if name.startswith("train"):
            wanted["shm_size"] = int(service.get("shm_size", 0)) >= 2**30
            wanted["grace period"] = service.get("stop_grace_period") == "1m30s"
            needs = {
                key: value["condition"] for key, value in service.get("depends_on", {}).items()
            }
            wanted["order"] = (
                needs.items()
                >= {"s3": "service_healthy", "preprocess": "service_completed_successfully"}.items()
            )
        faults += [f"{name}: {rule}" for rule, holds in wanted.items() if not holds]
    return faults


def project(*files: str, **settings: str) -> dict[str, Any]:
    """All services of compose.yaml and other files, resolved."""
    variables: dict[str, Any] = dict(settings)
    options = ("--file=compose.yaml", *files, "--profile=*")
    config = run("docker", "compose", *options, "config", "--format=json", **variables).stdout
    services: dict[str, Any] = json.loads(config)["services"]
    return services


def test_every_service_is_confined() -> None:
    assert faults_of(project()) == []
    assert faults_of(project(DICOM, **DICOM_SETTINGS)) == []


@pytest.mark.parametrize("missing", DICOM_SETTINGS)
def test_a_dicom_node_without_senders_or_an_archive_is_not_started(missing: str) -> None:
    settings: dict[str, Any] = {**DICOM_SETTINGS, missing: ""}
    options = ("--file=compose.yaml", DICOM, "--profile=*")
    done = run("docker", "compose", *options, "config", check=False, **settings)
    assert done.returncode != 0 and missing in done.stdout


@pytest.mark.parametrize(
    ("service", "key", "value", "rule"),
    [
        ("train", "read_only", False, "read_only"),
        ("s3", "cap_drop", [], "cap_drop"),
        ("predict", "security_opt", [], "no-new-privileges"),
        ("tensorboard", "ports", [{"target": 6006, "published": "6006"}], "local ports"),
        ("preprocess", "user", "0:0", "user"),
        ("s3", "image", "seaweedfs", "pinned image"),
        (
            "preprocess",
            "volumes",
            [{"type": "bind", "source": "/", "target": "/host"}],
            "no host folders to write",
        ),
        ("train", "stop_grace_period", "10s", "grace period"),
        ("train-1", "depends_on", {}, "order"),
        ("train", "shm_size", 0, "shm_size"),
        ("phantoms", "mem_limit", 0, "mem_limit"),
        ("train", "privileged", True, "no privileges"),
    ],
)
def test_a_service_that_is_not_confined_is_found(
    service: str, key: str, value: Any, rule: str
) -> None:
    services = project()
    services[service][key] = value
    assert faults_of(services) == [f"{service}: {rule}"]


def test_keys_that_compose_brings_are_named_as_development_keys() -> None:
    for name, service in project().items():
        for key, value in service.get("environment", {}).items():
            if "SECRET" in key or "ACCESS_KEY" in key:
                assert value.startswith("xrai-development-"), f"{name}: {key}"


# ------------------------------------------------------------------------------------ the whole job


def test_the_bare_command_draws_phantoms_and_leaves_data_set_and_results_in_the_buckets(
    trained: str, s3: Stack
) -> None:
    assert "120 files found = 120 written + 0 excluded" in trained
    assert "accuracy" in trained and f"s3://xrai-runs/submit/{RUN}/report.html" in trained
    assert {"dataset.json", "manifest.jsonl", "report/card.md"} <= s3.keys(
        "phantoms/", bucket="xrai-data"
    )
    keys = s3.keys(f"submit/{RUN}/")
    assert keys >= RESULTS, RESULTS - keys
    assert any(key.startswith("tensorboard/") for key in keys) and any(
        key.startswith("checkpoints/") for key in keys
    )
    assert json.loads(s3.read(f"submit/{RUN}/summary.json"))["status"] == "finished"
    environment = json.loads(s3.read(f"submit/{RUN}/environment.json"))
    assert environment["world_size"] == 2
    for service in ("phantoms", "preprocess", "train"):
        assert inspect(container_of(s3, service))["State"]["ExitCode"] == 0


def test_what_is_done_is_not_done_again(trained: str, s3: Stack) -> None:
    before = s3.read(f"submit/{RUN}/summary.json")
    again = s3.up("preprocess", "train")
    assert "nothing to do" in again and f"run s3://xrai-runs/submit/{RUN} is finished" in again
    assert s3.read(f"submit/{RUN}/summary.json") == before


def test_predict_classifies_files_of_the_folder_one_stands_in(
    trained: str, s3: Stack, tmp_path: Path
) -> None:
    from xrai.phantom import make_phantoms

    make_phantoms(tmp_path / "films", num_images=3, workers=1)
    tmp_path.chmod(0o755)
    done = s3.compose("run", "--rm", "-T", "predict", "films/train", cwd=tmp_path)
    assert "files: 3 = " in done.stdout and "No medical device" in done.stdout
    done = s3.compose("run", "--rm", "-T", "predict", "missing.png", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "xrai: error: there is no file or folder missing.png" in done.stdout


def test_tensorboard_shows_the_runs_of_the_bucket(trained: str, s3: Stack) -> None:
    s3.compose("up", "--detach", "--no-build", "tensorboard")
    try:
        address = s3.compose("port", "tensorboard", "6006").stdout.strip()
        assert address.startswith("127.0.0.1:")

        def runs() -> list[str]:
            try:
                with urllib.request.urlopen(f"http://{address}/data/runs", timeout=10) as answer:
                    found: list[str] = json.load(answer)
                    return found
            except OSError:
                return []

        found = wait_until(runs, what="tensorboard to list a run")
        assert any(name.startswith(RUN) for name in found), found
        container = container_of(s3, "tensorboard")
        wait_until(
            lambda: inspect(container)["State"]["Health"]["Status"] == "healthy",
            what="tensorboard's health",
        )
        docker("network", "disconnect", "--force", s3.network, container)  # S3 goes away
        wait_until(
            lambda: inspect(container)["RestartCount"] > 0,
            what="tensorboard to end and start again",
        )
        assert "the runs cannot be read" in docker("logs", container).stdout
    finally:
        s3.compose("rm", "--force", "--stop", "tensorboard")


def test_films_are_served_by_the_run_of_the_bucket_to_those_who_know_the_token(
    trained: str, s3: Stack, tmp_path: Path
) -> None:
    from xrai.phantom import make_phantoms

    make_phantoms(tmp_path, num_images=2, workers=1)
    film = min(tmp_path.rglob("*.png"))
    refused = s3.compose("run", "--rm", "-T", "serve", check=False, XRAI_SERVE_TOKEN="")
    assert refused.returncode == 2 and "set XRAI_SERVE_TOKEN" in refused.stdout
    token = "a-token-of-this-test"
    s3.compose("up", "--detach", "--wait", "--no-build", "serve", XRAI_SERVE_TOKEN=token)
    try:
        address = s3.compose("port", "serve", "8077").stdout.strip()
        assert address.startswith("127.0.0.1:")
        post = urllib.request.Request(
            f"http://{address}/v1/films",
            data=film.read_bytes(),
            headers={"Content-Type": "image/png", "Authorization": f"Bearer {token}"},
        )
        container = container_of(s3, "serve")
        for line in ("is served at", "films are scored by ONNX Runtime from now on"):
            wait_for_line(container, line)
            with urllib.request.urlopen(post, timeout=60) as answer:
                assert answer.status == 201
                assert json.load(answer)["films"][0]["model"] == RUN
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{address}/v1/films", timeout=60)
    finally:
        s3.compose("rm", "--force", "--stop", "serve")


@pytest.mark.data
def test_a_sample_of_the_real_images_becomes_results_in_the_bucket(
    s3: Stack, real_originals: Path, real_images: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    for name in ("NORMAL", "PNEUMONIA"):
        folder = tmp_path / "films" / "train" / name
        folder.mkdir(parents=True)
        originals = sorted((real_originals / "train" / name).iterdir())[:10]
        taken = {path.name for path in originals}
        copies = [
            path
            for path in sorted((real_images / "train" / name).iterdir())
            if path.name not in taken
        ]
        for path in [*originals, *copies[:: len(copies) // 40]]:
            shutil.copy(path, folder)
    num_images = sum(1 for _ in (tmp_path / "films").rglob("*.jpeg"))
    said = s3.up(
        "preprocess",
        "train",
        XRAI_SOURCE=f"{tmp_path}/films",
        XRAI_NAME="real",
        XRAI_DATASET="s3://xrai-data/real",
    )
    assert f"{num_images} files found = {num_images} written + 0 excluded" in said
    assert "no phantoms are drawn" in s3.compose("logs", "phantoms").stdout
    keys = s3.keys("submit/real/")
    assert keys >= RESULTS, RESULTS - keys
    rows = list(csv.DictReader(io.StringIO(s3.read("submit/real/predictions.csv").decode())))
    sources = {Path(row["source"]).name for row in rows}
    assert sources and sources <= {path.name for path in (tmp_path / "films").rglob("*.jpeg")}


# ----------------------------------------------------------------------- confined, seen from inside

PROBE = """
id -u; id -g
for place in / /opt/venv /opt/xrai /etc /usr/bin /home /root /var/tmp; do
  if touch "$place/probe" 2>/dev/null; then echo "can write to $place"; fi
done
for place in /tmp /cache /dev/shm; do
  touch "$place/probe" && rm "$place/probe" && echo "mount $place"
done
grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status
awk '$2 == "/" {print "root", $4}' /proc/mounts | tr , ' '
"""


@pytest.mark.parametrize("service", ["preprocess", "train"])
def test_a_job_is_not_root_holds_no_rights_and_writes_to_its_mounts_alone(
    trained: str, s3: Stack, service: str
) -> None:
    options = [] if service == "train" else ["--volume=xrai-test-probe:/cache"]
    said = s3.once(service, "bash", "-c", PROBE, options=options).stdout.splitlines()
    if options:
        docker("volume", "rm", "--force", "xrai-test-probe")
    assert [line for line in said if line.isdigit()] == ["10001", "10001"]
    assert not [line for line in said if line.startswith("can write")]
    assert [line for line in said if line.startswith("mount ")] == [
        "mount /tmp",
        "mount /cache",
        "mount /dev/shm",
    ]
    assert {"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"} <= set(said)
    assert any(line.startswith("root ro ") for line in said)


def test_the_probe_sees_a_root_that_can_be_written_to(image: str) -> None:
    said = docker("run", "--rm", "--user=0", image, "bash", "-c", PROBE).stdout
    assert "can write to /opt/xrai" in said and "can write to /" in said


# ------------------------------------------------------------------------------- stopped and killed


def steps_saved(stack: Stack, name: str) -> list[int]:
    """The steps of the checkpoints of a run, in order."""
    keys = stack.keys(f"submit/{name}/checkpoints/")
    return sorted(
        int(key.removeprefix("step-").removesuffix(".pt")) for key in keys if key.endswith(".pt")
    )


def test_a_training_that_is_stopped_in_the_middle_of_an_epoch_goes_on_with_up(
    trained: str, s3: Stack
) -> None:
    config = s3.config("stopped.yaml", epochs=10_000, batch=2, every=1)
    settings: dict[str, Any] = {"XRAI_NAME": "stopped", "XRAI_CONFIG": str(config)}
    step = batch = num_batches = 0
    said = ""
    for _ in range(3):  # a stop may fall on the last step of an epoch
        s3.compose("up", "--detach", "--no-build", "--no-deps", "train", **settings)
        container = container_of(s3, "train")
        wait_until(lambda: steps_saved(s3, "stopped"), what="a checkpoint in the bucket")
        assert docker("exec", container, "xrai", "healthy").stdout.startswith("last heartbeat ")
        s3.compose("stop", "train", **settings)
        said = docker("logs", container).stdout
        found = wait_for_line(
            container, r"stopped as asked after step (\d+) \(epoch \d+, (\d+) of (\d+) batches\)"
        )
        step, batch, num_batches = (int(number) for number in found.groups())
        if batch < num_batches:
            break
    assert batch < num_batches
    assert "the state is saved" in said and "summary.json" not in s3.keys("submit/stopped/")
    assert step in steps_saved(s3, "stopped")
    done_epochs = (step - 1) // num_batches
    s3.config("stopped.yaml", epochs=done_epochs + 1, batch=2)
    said = s3.up("--no-deps", "train", **settings)
    assert f"going on after step {step}," in said
    assert (
        f"training ends after epoch {done_epochs + 1}, step {(done_epochs + 1) * num_batches}"
        in said
    )
    assert json.loads(s3.read("submit/stopped/summary.json"))["epochs"] == done_epochs + 1


def test_a_node_that_is_killed_and_started_again_rejoins_and_both_go_on(
    trained: str, s3: Stack
) -> None:
    config = s3.config("nodes.yaml", epochs=10_000, every=1)
    settings: dict[str, Any] = {"XRAI_NAME": "nodes", "XRAI_CONFIG": str(config)}
    start = ("--profile=multinode", "up", "--detach", "--no-build", "--no-deps")
    s3.compose(*start, "train-0", "train-1", **settings)
    first, second = (container_of(s3, service) for service in ("train-0", "train-1"))
    try:
        wait_until(
            lambda: steps_saved(s3, "nodes"), what=lambda: f"a checkpoint: {logs(first, second)}"
        )
        docker("kill", "--signal=KILL", second)
        wait_for_exit(second)
        last_step = steps_saved(s3, "nodes")[-1]
        assert "summary.json" not in s3.keys("submit/nodes/")
        wait_for_line(first, "rank 1|elastic|Connection closed")
        s3.config("nodes.yaml", epochs=last_step // 5 + 8)  # of five steps each
        s3.compose(*start, "train-1", **settings)
        found = wait_for_line(first, r"going on after step (\d+),")
        assert int(found[1]) >= last_step - 2
        second = container_of(s3, "train-1")
        assert [wait_for_exit(container) for container in (first, second)] == [0, 0], logs(
            first, second
        )
        assert json.loads(s3.read("submit/nodes/environment.json"))["world_size"] == 2
        assert json.loads(s3.read("submit/nodes/summary.json"))["status"] == "finished"
    finally:
        docker("rm", "--force", first, second)


def logs(*containers: str) -> str:
    """The ends of some logs, for a message."""
    return "\n".join(docker("logs", "--tail=40", container).stdout for container in containers)


# ------------------------------------------------------------------------------------------ refused


def test_wrong_keys_a_missing_bucket_and_a_silent_server_are_one_clear_line_and_the_right_status(
    trained: str, s3: Stack
) -> None:
    cases = {
        ("preprocess", "AWS_SECRET_ACCESS_KEY=wrong"): (2, "AWS_SECRET_ACCESS_KEY is not"),
        ("preprocess", "XRAI_DATASET=s3://no-such-bucket/x"): (
            2,
            "there is no bucket 'no-such-bucket'",
        ),
        ("preprocess", "AWS_ENDPOINT_URL_S3=http://s3:1"): (1, "no success in"),
        ("train", "AWS_SECRET_ACCESS_KEY=wrong"): (2, "AWS_SECRET_ACCESS_KEY is not"),
        ("train", "XRAI_ARTIFACTS=s3://no-such-bucket"): (2, "there is no bucket 'no-such-bucket'"),
        ("train", "XRAI_DATASET=s3://xrai-data/nothing"): (2, "xrai-data/nothing"),
        ("train", "AWS_ENDPOINT_URL_S3=http://nobody:8333"): (1, "no success in"),
    }

    def attempt(case: tuple[str, str]) -> tuple[int, str]:
        service, setting = case
        done = s3.once(
            service, options=["--env=XRAI_S3_RETRY_S=2", f"--env={setting}"], check=False
        )
        return done.returncode, done.stdout

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(cases, pool.map(attempt, cases), strict=True))
    for case, (status, words) in cases.items():
        found, said = outcomes[case]
        errors = [line for line in said.splitlines() if line.startswith("xrai: error: ")]
        assert (found, len(errors)) == (status, 1) and words in errors[0], (
            f"{case}: {found}\n{said}"
        )
        assert "Traceback" not in said, said


def test_the_whole_job_stops_where_preprocessing_is_refused(s3: Stack) -> None:
    done = s3.compose(
        "up",
        "--no-build",
        "preprocess",
        "train",
        check=False,
        XRAI_NAME="refused",
        XRAI_DATASET="s3://no-such-bucket/x",
    )
    assert done.returncode == 1
    assert 'service "preprocess" didn\'t complete successfully: exit 2' in done.stdout
    assert s3.keys("submit/refused/") == set()
