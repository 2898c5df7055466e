"""k8s/serve.yaml by itself: the rules of all manifests, the schemas, and what the server takes."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import policies
from tests.k8s.manifests import (
    K8S,
    REPOSITORY,
    Document,
    environment_of,
    expand,
    of_kind,
    quantity,
    read_documents,
    render_dicom,
    render_folder,
)
from tests.k8s.policies import Rule
from tests.k8s.test_schemas import VERSIONS, problems
from xrai.command import parse

OWN_RULES = (
    policies.locked_down,
    policies.no_token,
    policies.no_secrets,
    policies.bounded_resources,
    policies.pinned_images,
    policies.failures_explained,
    policies.mounts_fit,
    policies.dead_machines_left,
    policies.variables_known,
    policies.network_denied,
)


@pytest.fixture
def documents() -> list[Document]:
    return read_documents(K8S / "serve.yaml")


def container_of(documents: list[Document]) -> Document:
    pod = of_kind(documents, "Deployment")["xrai-serve"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    found: Document = container
    return found


@pytest.mark.parametrize("rule", OWN_RULES, ids=lambda rule: rule.__name__)
def test_the_server_keeps_the_rules_of_all_manifests(rule: Rule, documents: list[Document]) -> None:
    assert rule(documents) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_server_fits_the_schemas(version: str, documents: list[Document]) -> None:
    assert [problem for document in documents if (problem := problems(document, version))] == []


def test_the_file_needs_no_other(documents: list[Document]) -> None:
    kinds = ["ConfigMap", "ServiceAccount", "Service", "NetworkPolicy", "Deployment"]
    assert [document["kind"] for document in documents] == kinds


def test_service_policy_and_probes_reach_the_port_that_the_server_listens_on(
    documents: list[Document],
) -> None:
    container = container_of(documents)
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    (outside,) = of_kind(documents, "Service")["xrai-serve"]["spec"]["ports"]
    (rule,) = of_kind(documents, "NetworkPolicy")["xrai-serve"]["spec"]["ingress"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness")}
    found = [outside["targetPort"], rule["ports"][0]["port"]]
    assert [*found, *(probe["port"] for probe in probes.values())] == [port["name"]] * 4
    assert probes["startup"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert probes["liveness"]["path"] == "/healthz"


def test_the_server_takes_its_arguments_and_ends_before_it_is_killed(
    documents: list[Document],
) -> None:
    serve = pytest.importorskip("xrai.serve")
    container = container_of(documents)
    own = environment_of(container, documents, fields={})
    word, *arguments = [expand(text, own) for text in container["args"]]
    parsed = parse(word, arguments, description="", flags=serve.FLAGS)
    flags: dict[str, Any] = parsed.flags
    serve.check_flags(flags)
    assert parsed.runs == (own["XRAI_RUN"],)
    pod = of_kind(documents, "Deployment")["xrai-serve"]["spec"]["template"]["spec"]
    assert flags["stop_s"] + 20 <= pod["terminationGracePeriodSeconds"]
    assert parsed.config.train.threads <= int(container["resources"]["requests"]["cpu"])


def test_the_token_comes_from_a_secret_alone(documents: list[Document]) -> None:
    serve = pytest.importorskip("xrai.serve")
    container = container_of(documents)
    named = [each["secretRef"]["name"] for each in container["envFrom"] if "secretRef" in each]
    assert "xrai-serve" in named and serve.TOKEN not in str(documents)


def test_a_folder_of_ones_own_as_the_page_shows_it_changes_image_and_run(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/serve.md").read_text()
    ((name, text),) = re.findall(r"```yaml\n# (\S+)\n(.*?)```", page, re.DOTALL)
    (tmp_path / name).write_text(text)
    shutil.copy(K8S / "serve.yaml", tmp_path)
    documents = render_folder(tmp_path)
    assert {rule.__name__: broken for rule in OWN_RULES if (broken := rule(documents))} == {}
    container = container_of(documents)
    assert container["image"] == "REGISTRY/xrai:0.1.0"
    assert environment_of(container, documents, fields={})["XRAI_RUN"].startswith("s3://our-runs/")


def test_a_server_that_stays_on_a_dead_machine_is_found(documents: list[Document]) -> None:
    pod = of_kind(documents, "Deployment")["xrai-serve"]["spec"]["template"]["spec"]
    del pod["tolerations"]
    assert policies.dead_machines_left(documents)


# ------------------------------------------------------------------------------------------- DICOM


@pytest.fixture
def with_dicom(tmp_path: Path) -> list[Document]:
    return render_dicom(tmp_path)


def test_the_dicom_node_keeps_the_rules_and_fits_the_schemas(with_dicom: list[Document]) -> None:
    assert {rule.__name__: broken for rule in OWN_RULES if (broken := rule(with_dicom))} == {}
    found = [problems(document, version) for document in with_dicom for version in VERSIONS]
    assert not any(found), found


def test_the_dicom_node_takes_its_arguments_and_is_reached(with_dicom: list[Document]) -> None:
    serve = pytest.importorskip("xrai.serve")
    dicom = pytest.importorskip("xrai.serving.dicom")
    container = container_of(with_dicom)
    own = environment_of(container, with_dicom, fields={})
    word, *arguments = [expand(text, own) for text in container["args"]]
    flags = parse(word, arguments, description="", flags=serve.FLAGS).flags
    options = dicom.read_options(flags)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert options.node.port == ports["dicom"]
    (outside,) = of_kind(with_dicom, "Service")["xrai-serve-dicom"]["spec"]["ports"]
    policy = of_kind(with_dicom, "NetworkPolicy")["xrai-serve-dicom"]["spec"]
    (incoming,), (outgoing,) = policy["ingress"], policy["egress"]
    assert outside["targetPort"] == incoming["ports"][0]["port"] == "dicom"
    (peer,) = outgoing["to"]
    assert peer["ipBlock"]["cidr"] == f"{options.pacs.host}/32"
    assert outgoing["ports"][0]["port"] == options.pacs.port
    assert len(options.node.callers) == len(incoming["from"])


def test_the_queue_of_results_outlives_the_pod(with_dicom: list[Document]) -> None:
    outbox = pytest.importorskip("xrai.serving.outbox")
    container = container_of(with_dicom)
    pod = of_kind(with_dicom, "Deployment")["xrai-serve"]["spec"]["template"]["spec"]
    (flag,) = (text for text in container["args"] if text.startswith("--outbox="))
    (mount,) = (
        mount
        for mount in container["volumeMounts"]
        if flag.removeprefix("--outbox=").startswith(f"{mount['mountPath']}/")
    )
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    claim = of_kind(with_dicom, "PersistentVolumeClaim")[
        volume["persistentVolumeClaim"]["claimName"]
    ]
    assert quantity(claim["spec"]["resources"]["requests"]["storage"]) > outbox.MAX_BYTES
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    # a second pod could not open the queue
    assert of_kind(with_dicom, "Deployment")["xrai-serve"]["spec"]["strategy"]["type"] == "Recreate"


def test_without_it_there_is_no_dicom_node(documents: list[Document]) -> None:
    assert "dicom" not in str(documents).lower()


def test_volumes_of_others_and_wide_networks_are_found(with_dicom: list[Document]) -> None:
    others = [each for each in with_dicom if each["kind"] != "PersistentVolumeClaim"]
    assert any("may write to /outbox" in line for line in policies.mounts_fit(others))
    policy = of_kind(with_dicom, "NetworkPolicy")["xrai-serve-dicom"]["spec"]
    policy["ingress"][0]["from"][0] = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    assert policies.network_denied(with_dicom)
