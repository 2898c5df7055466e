"""The DICOM node in containers: docker/compose.dicom.yaml as it stands, and the pod of
k8s/serve-dicom as a kubelet would start it.

A modality sends films from this process, where the archive listens, too: at this machine's address
on the containers' network.
"""

import json
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.containers import (
    PROJECT,
    RUN,
    Stack,
    docker,
    inspect,
    wait_for_exit,
    wait_for_line,
    wait_until,
)
from tests.e2e.pods import Cluster
from tests.k8s.manifests import Document, render_dicom, workloads
from tests.serving.dicoms import PATIENT, Archive, association, film_of, phantoms, read

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]

DICOM = "--file=docker/compose.dicom.yaml"
TOKEN = "a-token-of-this-test"
CALLER = "DX2"  # allowed
STOPPED = 143  # by SIGTERM, within the time that it has
PROBE = """
id -u; id -g
for place in / /opt/xrai /etc /cache /tmp /work /outbox; do
  touch $place/probe 2>/dev/null && rm $place/probe && echo $place
done
grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status
"""


@dataclass(frozen=True)
class Node:
    """A server in a container, and its addresses."""

    container: str
    outbox: str  # the folder there, from the working directory
    http: str  # host:port
    dicom: tuple[str, int]

    def send(self, films: Sequence[bytes]) -> list[int]:
        """The status of the answer to each film."""
        host, port = self.dicom
        with association(port, host=host, calling=CALLER) as opened:
            return [int(opened.send_c_store(read(film)).Status) for film in films]

    def rejects(self, **titles: str) -> bool:
        """Whether it rejects an association of these AE titles."""
        host, port = self.dicom
        with association(port, host=host, **titles) as opened:
            return bool(opened.is_rejected)

    def get(self, path: str) -> Any:
        """The JSON of an answer."""
        request = urllib.request.Request(
            f"http://{self.http}{path}", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def waiting(self) -> set[str]:
        """The files of results that wait."""
        return set(self.inside(f"ls {self.outbox}/pending"))

    def inside(self, script: str) -> list[str]:
        """The lines that a script prints in the container."""
        return docker("exec", self.container, "bash", "-c", script).stdout.splitlines()


@dataclass
class Ward:
    """What the films of a test go through: a server that can be started again, and an archive."""

    start: Callable[[], Node]
    stop: Callable[[Node], int]  # its exit status
    archive: Archive
    films: list[bytes] = field(default_factory=lambda: phantoms(4))

    def follow(self) -> None:
        """Send films while the archive is there, and while it is away and the server starts again:
        each is answered, and has one result in the archive in the end.
        """
        node = self.start()
        with self.archive.running():
            assert node.send(self.films[:1]) == [0]
            wait_until(lambda: not node.waiting(), what="a result to be sent")
        assert len(self.archive.stored) == 1
        assert node.send(self.films[1:3]) == [0, 0]
        waiting = node.waiting()
        assert len(waiting) == 2
        assert self.stop(node) == STOPPED
        log = docker("logs", node.container).stdout
        assert "Traceback" not in log and PATIENT not in log
        node = self.start()
        assert node.get("/v1/films")["films"] == []  # films were in memory alone
        assert node.waiting() == waiting
        assert node.send(self.films[3:]) == [0]
        with self.archive.running():
            wait_until(lambda: not node.waiting(), what="the results to be sent")
        sent = [str(read(film).SOPInstanceUID) for film in self.films]
        assert sorted(film_of(report) for report in self.archive.stored) == sorted(sent)
        (listed,) = node.get("/v1/films")["films"]
        assert (listed["name"], listed["source"], listed["model"]) == (sent[3], "DICOM", RUN)


@pytest.fixture
def archive(s3: Stack) -> Archive:
    """An archive that containers reach while it runs."""
    gateway = "{{(index .IPAM.Config 0).Gateway}}"
    found = Archive(host=docker("network", "inspect", "-f", gateway, s3.network).stdout.strip())
    with found.running():  # which gives it its port
        return found


def address_of(archive: Archive) -> str:
    """An archive as --pacs names it."""
    return f"{archive.host}:{archive.port}:ARCHIVE"


# ----------------------------------------------------------------------------------------- compose


@pytest.fixture
def compose(trained: str, s3: Stack, archive: Archive) -> Iterator[Ward]:
    """`docker compose up` with docker/compose.dicom.yaml, each time a new container."""
    settings: dict[str, Any] = {
        "XRAI_SERVE_TOKEN": TOKEN,
        "XRAI_SERVE_PORT": "0",
        "XRAI_DICOM_PORT": "0",
        "XRAI_DICOM_ALLOW": f"CR1,{CALLER}",
        "XRAI_PACS": address_of(archive),
    }
    up = ("up", "--detach", "--wait", "--no-build", "--force-recreate", "--no-deps", "serve")

    def port(number: str) -> str:
        return s3.compose(DICOM, "port", "serve", number, **settings).stdout.strip()

    def start() -> Node:
        s3.compose(DICOM, *up, **settings)
        container = s3.compose(DICOM, "ps", "--quiet", "serve", **settings).stdout.strip()
        host, _, number = port("11112").partition(":")
        assert host == "127.0.0.1"
        return Node(container, "outbox", port("8077"), (host, int(number)))

    def stop(node: Node) -> int:
        s3.compose(DICOM, "stop", "serve", **settings)
        return wait_for_exit(node.container)

    yield Ward(start, stop, archive)
    s3.compose(DICOM, "rm", "--force", "--stop", "serve", **settings)
    docker("volume", "rm", "--force", f"{PROJECT}_outbox")


def test_results_of_a_compose_project_reach_an_archive_that_was_away_while_it_started_again(
    compose: Ward,
) -> None:
    compose.follow()


def test_the_node_of_a_compose_project_takes_films_of_those_named_alone_and_is_confined(
    compose: Ward,
) -> None:
    node = compose.start()
    assert node.rejects(calling="STRANGER") and node.rejects(calling=CALLER, called="OTHER")
    assert node.get("/v1/films")["films"] == []
    assert not node.rejects(calling=CALLER) and not node.rejects(calling="CR1")
    assert node.send(compose.films[:1]) == [0]
    assert node.inside(PROBE) == confined("/tmp", "/work")
    owned = f"cd {node.outbox}; stat -c '%a %u' . pending pending/*"
    assert node.inside(owned) == ["700 10001", "700 10001", "600 10001"]


def confined(*writable: str) -> list[str]:
    """What `PROBE` says of a container without rights, which may write to these folders alone."""
    none = "0000000000000000"
    rights = [f"CapEff:\t{none}", f"CapBnd:\t{none}", "NoNewPrivs:\t1"]
    return ["10001", "10001", *writable, *rights]


# -------------------------------------------------------------------------------------- Kubernetes


@pytest.fixture
def cluster(
    trained: str, image: str, s3: Stack, archive: Archive, tmp_path: Path
) -> Iterator[Cluster]:
    """k8s/serve.yaml with the component, applied with addresses and keys of this machine."""
    documents = render_dicom(tmp_path)
    documents = json.loads(json.dumps(documents).replace('"xrai:0.1.0"', json.dumps(image)))
    keys = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret}
    for name, values in {"xrai-s3": keys, "xrai-serve": {"XRAI_SERVE_TOKEN": TOKEN}}.items():
        secret: Document = {"kind": "Secret", "metadata": {"name": name}, "stringData": values}
        documents.append(secret)
    found = Cluster(documents, s3.network, tmp_path, f"xrai.dicom={uuid.uuid4().hex}")
    found.change(
        "xrai-serve",
        XRAI_RUN=f"s3://xrai-runs/submit/{RUN}",
        AWS_ENDPOINT_URL_S3=s3.inside,
        XRAI_PACS=address_of(archive),
    )
    yield found
    found.remove()


@pytest.fixture
def deployed(cluster: Cluster, archive: Archive) -> Ward:
    """The Deployment's pod, each time a new one."""

    def start() -> Node:
        pod = cluster.pod("serve", 0).begin()
        networks = inspect(pod.main)["NetworkSettings"]["Networks"]
        address = networks[cluster.network]["IPAddress"]
        (container,) = pod.workload.pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        wait_for_line(pod.main, "is served at")
        for name in ("startup", "readiness", "liveness"):
            probe = container[f"{name}Probe"]["httpGet"]
            url = f"http://{address}:{ports[probe['port']]}{probe['path']}"
            with urllib.request.urlopen(url, timeout=60) as answer:
                assert answer.status == 200
        dicom = (address, ports["dicom"])
        return Node(pod.main, "/outbox/results", f"{address}:{ports['http']}", dicom)

    def stop(node: Node) -> int:
        (workload,) = (w for w in workloads(cluster.documents) if w.component == "serve")
        docker("stop", f"--time={workload.pod['terminationGracePeriodSeconds']}", node.container)
        return wait_for_exit(node.container)

    return Ward(start, stop, archive)


def test_results_of_a_deployment_reach_an_archive_that_was_away_while_its_pod_was_replaced(
    deployed: Ward,
) -> None:
    deployed.follow()


def test_the_pod_takes_films_of_those_named_alone_and_is_confined(deployed: Ward) -> None:
    node = deployed.start()
    assert node.rejects(calling="STRANGER") and not node.rejects(calling=CALLER)
    assert node.inside(PROBE) == confined("/tmp", "/outbox")
