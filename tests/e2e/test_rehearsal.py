"""A rehearsal of Kubernetes: the pods of k8s/train-job.yaml, run as containers on a Docker network.

`tests.e2e.pods` does what a kubelet would do, and the tests what the Job controller would: a pod
that failed is replaced by one of the same name. What is changed is what a user changes: addresses,
keys and sizes in the ConfigMaps, and the name of the image.
"""

import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.containers import Stack, docker, wait_until
from tests.e2e.pods import Cluster, Pod, log_of, status_of
from tests.k8s.manifests import K8S, read_documents
from xrai.phantom import make_phantoms

pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(900)]

MESSAGE_BYTES = 2048  # of a log's end that FallbackToLogsOnError shows
CONFIG = """
images: {size: 32}
splits: {val_fraction: 0.25}
cache: {max_gib: 1}
model: {width: 8}
train: {epochs: 6, global_batch_size: 16, precision: 'off', step_timeout_s: 120}
checkpoint: {every: 1}
evaluate: {num_bootstrap: 50}
"""


@dataclass
class Runs:
    """The bucket in which the runs are."""

    client: Any
    bucket: str

    def read(self, run_id: str, name: str) -> bytes | None:
        try:
            content: bytes = self.client.get_object(
                Bucket=self.bucket, Key=f"submit/{run_id}/{name}"
            )["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None
        return content

    def wait_for_step(self, run_id: str, step: int, pods: list[Pod]) -> None:
        """Until a checkpoint of at least that step is in the bucket."""
        deadline = time.monotonic() + 240
        while True:
            content = self.read(run_id, "checkpoints/latest.json")
            if content is not None and json.loads(content)["step"] >= step:
                return
            running = [
                docker("inspect", "-f", "{{.State.Running}}", pod.main).stdout.strip()
                for pod in pods
            ]
            assert running == ["true"] * len(pods) and time.monotonic() < deadline, [
                pod.log() for pod in pods
            ]
            time.sleep(0.2)

    def assert_finished(self, run_id: str, *, epochs: int = 6) -> None:
        """All epochs once, in order, and the commit mark."""
        summary, history = self.read(run_id, "summary.json"), self.read(run_id, "history.csv")
        assert summary is not None and json.loads(summary)["status"] == "finished"
        assert history is not None
        assert [line.split(",")[0] for line in history.decode().splitlines()[1:]] == [
            str(e + 1) for e in range(epochs)
        ]


@pytest.fixture(scope="module")
def runs(s3: Stack) -> Runs:
    return Runs(s3.client(), s3.new_bucket(f"rehearsal-{uuid.uuid4().hex[:8]}"))


@pytest.fixture(scope="module")
def cluster(
    image: str, s3: Stack, runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """train-job.yaml and preprocess-job.yaml, applied with addresses and keys of this S3 server."""
    folder = tmp_path_factory.mktemp("rehearsal")
    documents = [
        *read_documents(K8S / "train-job.yaml"),
        *read_documents(K8S / "preprocess-job.yaml"),
    ]
    documents = json.loads(json.dumps(documents).replace('"xrai:0.1.0"', json.dumps(image)))
    keys = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret}
    documents.append({"kind": "Secret", "metadata": {"name": "xrai-s3"}, "stringData": keys})
    cluster = Cluster(documents, s3.network, folder, f"xrai.rehearsal={uuid.uuid4().hex}")
    cluster.change(
        "xrai",
        XRAI_SOURCE=f"s3://{runs.bucket}/films",
        XRAI_DATASET=f"s3://{runs.bucket}/dataset",
        XRAI_ARTIFACTS=f"s3://{runs.bucket}/submit",
        AWS_ENDPOINT_URL_S3=s3.inside,
        NUM_THREADS="1",
        NUM_PARTITIONS="2",
    )
    cluster.change("xrai-config", **{"config.yaml": CONFIG})
    make_phantoms(folder / "films", num_images=240, seed=0, workers=1)
    for path in sorted((folder / "films").rglob("*")):
        if path.is_file():
            runs.client.upload_file(
                str(path), runs.bucket, f"films/{path.relative_to(folder / 'films')}"
            )
    yield cluster
    cluster.remove()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, runs: Runs) -> list[Pod]:
    """Both Jobs applied at once: training waits for the data set, that two partitions make. All
    have ended.
    """
    cluster.change("xrai", XRAI_RUN_ID="undisturbed")
    pods = [cluster.pod("train", index) for index in range(2)]
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(pod.begin) for pod in pods]
        for pod in pods:
            wait_until(pod.waits, what=f"pod {pod.index} to wait for the data set")
        partitions = [cluster.pod("preprocess", index).begin() for index in range(2)]
        assert [pod.end() for pod in partitions] == [0, 0], [pod.log() for pod in partitions]
        for future in waiting:
            future.result()
    assert [pod.end() for pod in pods] == [0, 0], [pod.log() for pod in pods]
    return pods


def test_two_pods_wait_for_the_data_set_of_two_partitions_and_train_together(
    undisturbed: list[Pod], runs: Runs
) -> None:
    runs.assert_finished("undisturbed")
    assert "all checks passed" in log_of(f"{undisturbed[1].name}-preflight")
    assert any("batches of 16 = 2 x 8" in pod.log() for pod in undisturbed)


def test_a_pod_that_is_killed_is_replaced_and_rejoins(
    cluster: Cluster, undisturbed: list[Pod], runs: Runs
) -> None:
    cluster.change("xrai", XRAI_RUN_ID="pod-1-killed")
    with ThreadPoolExecutor(2) as threads:
        pods = list(threads.map(Pod.begin, [cluster.pod("train", index) for index in range(2)]))
    runs.wait_for_step("pod-1-killed", 3, pods)
    pods[1].kill()
    assert pods[1].end() == 137
    replacement = cluster.pod("train", 1).begin()
    assert [pods[0].end(), replacement.end()] == [0, 0], [pods[0].log(), replacement.log()]
    runs.assert_finished("pod-1-killed")
    assert "going on after step" in pods[0].log() + replacement.log()
    same_as_undisturbed(runs, "pod-1-killed")


def test_when_pod_0_is_killed_all_begin_again_and_go_on(
    cluster: Cluster, undisturbed: list[Pod], runs: Runs
) -> None:
    """It keeps the store at which all meet, so the others fail too, and the Job replaces them
    all.
    """
    cluster.change("xrai", XRAI_RUN_ID="pod-0-killed")
    with ThreadPoolExecutor(2) as threads:
        pods = list(threads.map(Pod.begin, [cluster.pod("train", index) for index in range(2)]))
        runs.wait_for_step("pod-0-killed", 3, pods)
        pods[0].kill()
        first = threads.submit(cluster.pod("train", 0).begin)
        assert pods[1].end() == 1
        second = threads.submit(cluster.pod("train", 1).begin)
        replacements = [first.result(), second.result()]
    assert [pod.end() for pod in replacements] == [0, 0], [pod.log() for pod in replacements]
    runs.assert_finished("pod-0-killed")
    same_as_undisturbed(runs, "pod-0-killed")


def test_when_pod_0s_machine_goes_away_silently_the_other_ends_by_itself_and_all_go_on(
    cluster: Cluster, undisturbed: list[Pod], runs: Runs
) -> None:
    silent = cluster.copy("silent")
    config = CONFIG.replace("step_timeout_s: 120", "step_timeout_s: 30")
    silent.change("xrai-config", **{"config.yaml": config})
    silent.change("xrai", XRAI_RUN_ID="pod-0-silent")
    with ThreadPoolExecutor(2) as threads:
        pods = list(threads.map(Pod.begin, [silent.pod("train", index) for index in range(2)]))
        runs.wait_for_step("pod-0-silent", 3, pods)
        pods[0].vanish()
        assert status_of(pods[1].main, timeout_s=60) == 1  # its deadline plus 30 s
        assert "rank 0" in pods[1].log()[-MESSAGE_BYTES:]
        second = threads.submit(silent.pod("train", 1).begin)  # which waits for pod 0
        pods[0].kill()  # as when the node is deleted
        replaced = time.monotonic()
        first = silent.pod("train", 0).begin()
        replacements = [first, second.result()]
    assert [pod.end() for pod in replacements] == [0, 0], [pod.log() for pod in replacements]
    assert time.monotonic() - replaced < 180
    runs.assert_finished("pod-0-silent")
    same_as_undisturbed(runs, "pod-0-silent")


def test_a_pod_of_another_number_of_nodes_does_not_disturb_the_training(
    cluster: Cluster, undisturbed: list[Pod], runs: Runs
) -> None:
    cluster.change("xrai", XRAI_RUN_ID="two-numbers")
    larger = cluster.copy("larger")
    larger.set_num_nodes(4)
    with ThreadPoolExecutor(2) as threads:
        pods = list(threads.map(Pod.begin, [cluster.pod("train", index) for index in range(2)]))
    third = larger.pod("train", 2).begin()
    assert [pod.end() for pod in pods] == [0, 0], [pod.log() for pod in pods]
    runs.assert_finished("two-numbers")
    same_as_undisturbed(runs, "two-numbers")
    assert not any("going on after step" in pod.log() for pod in pods)
    docker("kill", third.main, check=False)  # unless it has noticed that pod 0 is gone
    assert third.end() != 0 and "epoch 1" not in third.log(), third.log()  # it had not begun


def test_a_config_that_does_not_fit_the_finished_run_is_refused_by_preflight(
    cluster: Cluster, undisturbed: list[Pod]
) -> None:
    other = cluster.copy("other-config")
    other.change("xrai-config", **{"config.yaml": CONFIG.replace("width: 8", "width: 16")})
    other.change("xrai", XRAI_RUN_ID="undisturbed")
    with pytest.raises(AssertionError, match="preflight of pod 0 ended with 2"):
        other.pod("train", 0).begin()


def same_as_undisturbed(runs: Runs, run_id: str) -> None:
    """The losses of all epochs are those of the run that nothing happened to."""
    ours, theirs = (runs.read(name, "history.csv") for name in (run_id, "undisturbed"))
    assert ours is not None and theirs is not None
    for line, other in zip(ours.decode().splitlines(), theirs.decode().splitlines(), strict=True):
        assert line.split(",")[:9] == other.split(",")[:9]  # epoch, step, losses, accuracies, AUROC


def test_a_mistake_is_found_before_training_and_said_in_one_line_with_status_2(
    cluster: Cluster, undisturbed: list[Pod]
) -> None:
    """The Job's podFailurePolicy ends it then; `kubectl describe pod` shows the line."""
    mistaken = cluster.copy("mistaken")
    mistaken.change("xrai-config", **{"config.yaml": CONFIG.replace("epochs", "epoch")})
    pod = mistaken.pod("train", 0)
    with pytest.raises(AssertionError, match="wait of pod 0 ended with 2"):
        pod.begin()
    (line,) = log_of(f"{pod.name}-wait").splitlines()
    assert line.startswith("xrai: error: ") and "train.epoch" in line


def test_the_end_of_a_failed_pods_log_names_the_cause(
    cluster: Cluster, undisturbed: list[Pod], runs: Runs
) -> None:
    """torchrun repeats the error file of the rank that failed first; Kubernetes takes the end of
    the log as message.
    """
    documents = json.loads(
        json.dumps(cluster.documents).replace("--max_restarts=3", "--max_restarts=0")
    )  # sooner
    failing = Cluster(documents, cluster.network, cluster.folder / "failing", cluster.label)
    failing.folder.mkdir()
    failing.set_num_nodes(1)
    failing.change("xrai", XRAI_RUN_ID="failing", XRAI_DATASET=f"s3://{runs.bucket}/damaged")
    for entry in runs.client.list_objects_v2(Bucket=runs.bucket, Prefix="dataset/")["Contents"]:
        body = runs.client.get_object(Bucket=runs.bucket, Key=entry["Key"])["Body"].read()
        if entry["Key"].endswith(".h5"):
            body = body[:-1] + bytes([body[-1] ^ 1])
        runs.client.put_object(
            Bucket=runs.bucket, Key=entry["Key"].replace("dataset/", "damaged/", 1), Body=body
        )
    pod = failing.pod("train", 0).begin()
    assert pod.end() == 1
    assert "CorruptError" in pod.log()[-MESSAGE_BYTES:]


def test_nothing_in_a_pod_is_writable_but_its_mounts_and_nobody_is_root(cluster: Cluster) -> None:
    pod = cluster.pod("train", 0)
    container = json.loads(json.dumps(pod.workload.pod["initContainers"][0]))
    script = (
        "id -u; for place in / /opt /etc/xrai /tmp /cache /dev/shm; do "
        "touch $place/x 2>/dev/null && echo $place; done"
    )
    container["args"] = ["bash", "-c", f"{script}; true"]
    pod.workload.pod["initContainers"][0] = container
    name = pod.start(container)
    assert docker("wait", name).stdout.strip() == "0"
    assert subprocess.list2cmdline(log_of(name).split()) == "10001 /tmp /cache /dev/shm"
