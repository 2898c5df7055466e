"""Pods as containers on a Docker network: what a kubelet would do with the YAML of k8s/.

Same image, arguments, environment, user, rights and mounts; each pod's own name, and its full name
in DNS. A pod that failed is replaced by a new one. What is not rehearsed: scheduling, network
policies, GPUs.
"""

import json
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.containers import docker
from tests.k8s.manifests import (
    Document,
    Workload,
    environment_of,
    expand,
    fields_of,
    of_kind,
    workloads,
)

NAMESPACE = "films"
PREFIX = "xrai-test-k8s-"  # of containers and volumes


@dataclass
class Pod:
    """One pod of an Indexed Job or a Deployment: containers of one host name, one after the
    other.
    """

    cluster: "Cluster"
    workload: Workload
    job: str
    index: int
    name: str = field(default_factory=lambda: f"{PREFIX}{uuid.uuid4().hex[:8]}")
    main: str = ""  # the container that does the work, once the others have ended

    def begin(self) -> "Pod":
        """Run what comes first to its end, then start the container that does the work."""
        for container in self.workload.pod.get("initContainers", []):
            name = self.start(container)
            status = status_of(name)
            assert status == 0, (
                f"{container['name']} of pod {self.index} ended with {status}:\n{log_of(name)}"
            )
        (container,) = self.workload.pod["containers"]
        self.main = self.start(container)
        return self

    def end(self) -> int:
        """The exit status of the container that does the work."""
        return status_of(self.main)

    def kill(self) -> None:
        """What a machine that goes away does: no signal, no word."""
        docker("kill", "--signal=KILL", self.main)

    def vanish(self) -> None:
        """What a machine without power or network does: no packet arrives, no connection ends."""
        docker("network", "disconnect", "--force", self.cluster.network, self.main)

    def log(self) -> str:
        return log_of(self.main)

    def waits(self) -> bool:
        """Whether it says that it waits for the data set."""
        return "waiting for the data set" in docker("logs", f"{self.name}-wait", check=False).stdout

    def start(self, container: Document) -> str:
        """Start one container as a kubelet would; its name."""
        pod, security = (
            self.workload.pod,
            {**self.workload.pod["securityContext"], **container["securityContext"]},
        )
        injected = {"JOB_COMPLETION_INDEX": str(self.index)} if self.workload.job else {}
        environment = environment_of(
            container,
            self.cluster.documents,
            fields=fields_of(self.job, self.index, NAMESPACE),
            also=injected,
        )
        domain = (
            f"{pod['subdomain']}.{NAMESPACE}.svc.{environment['CLUSTER_DOMAIN']}"
            if "subdomain" in pod
            else ""
        )
        options = [
            f"--network={self.cluster.network}",
            f"--hostname={self.job}-{self.index}",
            *(
                [f"--domainname={domain}", f"--network-alias={self.job}-{self.index}.{domain}"]
                if domain
                else []
            ),
            f"--user={security['runAsUser']}:{security['runAsGroup']}",
            *([f"--group-add={security['fsGroup']}"] if "fsGroup" in security else []),
            *(["--read-only"] if security["readOnlyRootFilesystem"] else []),
            *(f"--cap-drop={capability}" for capability in security["capabilities"]["drop"]),
            *([] if security["allowPrivilegeEscalation"] else ["--security-opt=no-new-privileges"]),
            f"--memory={container['resources']['limits']['memory'].rstrip('i').lower()}",
            *(f"--env={name}={value}" for name, value in environment.items()),
            *self._mounts(container),
        ]
        assert "command" not in container
        name = f"{self.name}-{container['name']}"
        arguments = [expand(argument, environment) for argument in container.get("args", [])]
        named = (f"--name={name}", f"--label={self.cluster.label}")
        docker("run", "--detach", *named, *options, container["image"], *arguments)
        return name

    def _mounts(self, container: Document) -> Iterator[str]:
        volumes = {volume["name"]: volume for volume in self.workload.pod["volumes"]}
        for mount in container["volumeMounts"]:
            volume, place = volumes[mount["name"]], mount["mountPath"]
            if "configMap" in volume:
                files = of_kind(self.cluster.documents, "ConfigMap")[volume["configMap"]["name"]][
                    "data"
                ]
                folder = self.cluster.folder / volume["configMap"]["name"]
                folder.mkdir(exist_ok=True)
                for name, text in files.items():
                    (folder / name).write_text(text)
                yield f"--volume={folder}:{place}:ro"
            elif place == "/dev/shm":
                yield f"--shm-size={volume['emptyDir']['sizeLimit'].rstrip('i').lower()}"
            else:
                claim = volume.get("persistentVolumeClaim")  # which outlives the pod
                name = f"{PREFIX}{claim['claimName']}" if claim else f"{self.name}-{mount['name']}"
                if claim:
                    self._give_to_group(name, container["image"])
                yield f"--volume={name}:{place}"

    def _give_to_group(self, volume: str, image: str) -> None:
        """What a kubelet does with a disk before each start of a pod with an fsGroup. A new one
        belongs to root.
        """
        group = self.workload.pod["securityContext"].get("fsGroup", 0)
        script = f"chgrp -R {group} /v; chmod -R g+rwX /v; find /v -type d -exec chmod g+s {{}} +"
        options = ("--rm", "--user=0", f"--volume={volume}:/v", "--entrypoint=bash")
        docker("run", *options, image, "-ec", script)


@dataclass
class Cluster:
    """The documents as applied, and the network on which their pods run."""

    documents: list[Document]
    network: str
    folder: Path
    label: str

    def pod(self, component: str, index: int) -> Pod:
        """A pod of the Job or Deployment of this component; its number says which."""
        (workload,) = (
            workload for workload in workloads(self.documents) if workload.component == component
        )
        return Pod(self, workload, workload.name.rpartition("/")[2], index)

    def change(self, config_map: str, **values: str) -> None:
        """Set values of a ConfigMap, as somebody who edits the file."""
        of_kind(self.documents, "ConfigMap")[config_map]["data"].update(values)

    def remove(self) -> None:
        """Remove all pods and their volumes."""
        labelled = f"--filter=label={self.label}"
        containers = docker("ps", "--all", "--quiet", labelled).stdout.split()
        if containers:
            docker("rm", "--force", *containers)
        volumes = docker("volume", "ls", "--quiet").stdout.split()
        if own := [volume for volume in volumes if volume.startswith(PREFIX)]:
            docker("volume", "rm", "--force", *own)

    def copy(self, name: str) -> "Cluster":
        """The same documents, to be changed by themselves."""
        documents = json.loads(json.dumps(self.documents))
        copied = Cluster(documents, self.network, self.folder / name, self.label)
        copied.folder.mkdir()
        return copied

    def set_num_nodes(self, number: int) -> None:
        """Make the training's Job one of so many pods, as somebody who edits the file."""
        (workload,) = (w for w in workloads(self.documents) if w.component == "train")
        assert workload.job is not None
        workload.job["completions"] = workload.job["parallelism"] = number
        for container in workload.containers:
            for variable in container.get("env", []):
                if variable["name"] == "NUM_NODES":
                    variable["value"] = str(number)


def log_of(container: str) -> str:
    return docker("logs", container).stdout


def status_of(container: str, *, timeout_s: float = 300) -> int:
    """What it exits with, when it has ended."""
    try:
        return int(docker("wait", container, timeout_s=timeout_s).stdout)
    except subprocess.TimeoutExpired:
        raise AssertionError(
            f"{container} still runs after {timeout_s:.0f} s:\n{log_of(container)}"
        ) from None
