"""The YAML of k8s/ as the tests see it: read, rendered by the real kustomize, and resolved as
Kubernetes would.

tests/e2e/pods.py starts containers from the same reading.
"""

import base64
import copy
import functools
import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
FILES = ("train-job.yaml", "preprocess-job.yaml", "tensorboard.yaml")

Document = dict[str, Any]


def read_documents(path: Path) -> list[Document]:
    """All documents of a YAML file."""
    return _parse(path.read_text())


def stand_alone() -> list[Document]:
    """The three files that can be applied by themselves, as one list. Each call gives a copy."""
    return [document for name in FILES for document in read_documents(K8S / name)]


def render(overlay: str) -> list[Document]:
    """What `kubectl apply -k k8s/overlays/NAME` would apply, as a copy; skips where there is no
    kustomize.
    """
    return render_folder(K8S / "overlays" / overlay)


def render_folder(folder: Path) -> list[Document]:
    """The same for any folder."""
    return copy.deepcopy(_render(folder))


def render_dicom(folder: Path) -> list[Document]:
    """What an empty folder of one's own applies that takes k8s/serve-dicom in, as the head of its
    file says.
    """
    head = (K8S / "serve-dicom/kustomization.yaml").read_text().partition("apiVersion")[0]
    lines = [line for line in head.splitlines() if re.match(r"#   (resources|components):", line)]
    (folder / "kustomization.yaml").write_text("\n".join(line[4:] for line in lines))
    shutil.copy(K8S / "serve.yaml", folder)
    shutil.copytree(K8S / "serve-dicom", folder / "serve-dicom")
    return render_folder(folder)


@functools.cache
def _render(folder: Path) -> list[Document]:
    command = kustomize()
    if command is None:
        pytest.skip("neither kubectl nor kustomize is on the PATH")
    done = subprocess.run(
        [*command, folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return _parse(done.stdout)


def _parse(text: str) -> list[Document]:
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


@functools.cache
def kustomize() -> tuple[str, ...] | None:
    """The command that renders a folder, or None where there is none."""
    if shutil.which("kubectl"):
        return ("kubectl", "kustomize")
    return ("kustomize", "build") if shutil.which("kustomize") else None


@dataclass
class Workload:
    """A pod template and what makes pods of it."""

    name: str
    job: Document | None  # the spec of its Job; None for a Deployment
    template: Document  # of the pods

    @property
    def pod(self) -> Document:
        spec: Document = self.template["spec"]
        return spec

    @property
    def component(self) -> str:
        return str(self.template["metadata"]["labels"]["app.kubernetes.io/component"])

    @property
    def containers(self) -> list[Document]:
        """All of them, those that only begin too."""
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]


def workloads(documents: list[Document]) -> Iterator[Workload]:
    """Everything that makes pods, wherever its template is: in a Job, a Deployment, a JobSet or
    a TrainingRuntime.
    """
    for document in documents:
        name, spec = f"{document['kind']}/{document['metadata']['name']}", document.get("spec", {})
        if document["kind"] == "Job":
            yield Workload(name, spec, spec["template"])
        elif document["kind"] == "Deployment":
            yield Workload(name, None, spec["template"])
        elif document["kind"] in ("JobSet", "TrainingRuntime"):
            inner = spec if document["kind"] == "JobSet" else spec["template"]["spec"]
            for job in inner["replicatedJobs"]:
                yield Workload(
                    f"{name}/{job['name']}",
                    job["template"]["spec"],
                    job["template"]["spec"]["template"],
                )


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    """The documents of a kind, by name."""
    return {
        document["metadata"]["name"]: document for document in documents if document["kind"] == kind
    }


def environment_of(
    container: Document,
    documents: list[Document],
    *,
    fields: Mapping[str, str],
    also: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The variables of a container as Kubernetes sets them. `fields` are values of fieldRefs;
    `also` comes last.

    A Secret that is not there and is optional gives nothing.
    """
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            values.update(of_kind(documents, "ConfigMap")[source["configMapRef"]["name"]]["data"])
        elif source["secretRef"]["name"] in of_kind(documents, "Secret"):
            values.update(secret_of(of_kind(documents, "Secret")[source["secretRef"]["name"]]))
        else:
            assert source["secretRef"].get("optional"), source
    for variable in container.get("env", []):
        origin = variable.get("valueFrom", {})
        if "fieldRef" in origin:
            values[variable["name"]] = fields[origin["fieldRef"]["fieldPath"]]
        elif "resourceFieldRef" in origin:
            section, resource = origin["resourceFieldRef"]["resource"].split(".")
            number = quantity(container["resources"][section][resource])
            values[variable["name"]] = str(math.ceil(number))  # the divisor is 1
        else:
            values[variable["name"]] = expand(variable["value"], values)
    values.update(also or {})
    return values


def quantity(text: str | int) -> float:
    """What Kubernetes understands of "300m", "2" or "16Gi": CPUs, or bytes."""
    match = re.fullmatch(r"(\d+)(m|Mi|Gi|)", str(text))
    assert match is not None, text
    return int(match[1]) * {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}[match[2]]


def requested(workload: "Workload", resource: str) -> float:
    """What the scheduler sets aside for a pod: the most that a container before the others
    requests, or the sum of those that run together.
    """
    first, together = (
        [quantity(c["resources"]["requests"].get(resource, 0)) for c in workload.pod.get(kind, [])]
        for kind in ("initContainers", "containers")
    )
    return max([*first, sum(together)])


def secret_of(document: Document) -> dict[str, str]:
    """What a Secret holds."""
    encoded = {
        name: base64.b64decode(text).decode() for name, text in document.get("data", {}).items()
    }
    return {**encoded, **document.get("stringData", {})}


def expand(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` as Kubernetes expands it: what is not known stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)


def fields_of(job: str, index: int, namespace: str) -> dict[str, str]:
    """What fieldRefs of a pod of an Indexed Job give."""
    return {
        "metadata.namespace": namespace,
        "metadata.labels['batch.kubernetes.io/job-name']": job,
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
    }
