"""The rules that every manifest keeps. Each takes documents and returns what breaks it, a line
each.
"""

import ipaddress
import re
from collections.abc import Callable

import yaml

from tests.k8s.manifests import (
    Document,
    Workload,
    environment_of,
    expand,
    fields_of,
    of_kind,
    quantity,
    secret_of,
    workloads,
)

Rule = Callable[[list[Document]], list[str]]

XRAI = {"app.kubernetes.io/name": "xrai"}
METADATA_SERVERS = ("169.254.169.254", "fd00:ec2::254")  # of clouds: they hand out a machine's keys


def locked_down(documents: list[Document]) -> list[str]:
    """Not root, by number; nothing writable but mounts; no capability, no privilege, nothing of
    the machine.
    """
    broken = []
    for workload in workloads(documents):
        pod, security = workload.pod, workload.pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser", 0) > 0:
            broken.append(f"{workload.name} may run as root")
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            broken.append(f"{workload.name} has no seccomp profile")
        broken += [
            f"{workload.name} has {key}"
            for key in ("hostNetwork", "hostPID", "hostIPC")
            if pod.get(key)
        ]
        broken += [
            f"{workload.name} mounts the machine's {v['name']}"
            for v in pod.get("volumes", [])
            if "hostPath" in v
        ]
        for container in workload.containers:
            own = dict(container.get("securityContext", {}))
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if own != wanted:
                broken.append(f"{workload.name}/{container['name']} has the security context {own}")
    return broken


def no_token(documents: list[Document]) -> list[str]:
    """An identity of its own for each workload, and no key to Kubernetes."""
    broken = []
    accounts = of_kind(documents, "ServiceAccount")
    for workload in workloads(documents):
        account = accounts.get(workload.pod.get("serviceAccountName", "default"))
        if account is None:
            broken.append(f"{workload.name} has no service account of its own")
        elif account.get("automountServiceAccountToken") is not False:
            broken.append(f"{workload.name}'s service account mounts a token")
        if workload.pod.get("automountServiceAccountToken") is not False:
            broken.append(f"{workload.name} mounts a token")
    return broken


def no_secrets(documents: list[Document]) -> list[str]:
    """No key in a manifest, other than the development keys, which say so themselves."""
    broken = []
    for name, config in of_kind(documents, "ConfigMap").items():
        broken += [
            f"ConfigMap/{name} holds {key}"
            for key in config["data"]
            if re.search("SECRET|ACCESS_KEY|TOKEN", key)
        ]
    for workload in workloads(documents):
        broken += [
            f"{workload.name}/{container['name']} holds {variable['name']}"
            for container in workload.containers
            for variable in container.get("env", [])
            if "value" in variable and re.search("SECRET|ACCESS_KEY|TOKEN", variable["name"])
        ]
    for name, secret in of_kind(documents, "Secret").items():
        keys = [
            key for key, text in secret_of(secret).items() if not text.startswith("development")
        ]
        broken += [f"Secret/{name} holds {key}" for key in keys]
    return broken


def bounded_resources(documents: list[Document]) -> list[str]:
    """Memory and GPUs: request = limit, so that no pod lives on what another one was promised.
    Volumes have a size.
    """
    broken = []
    for workload in workloads(documents):
        for container in workload.containers:
            where = f"{workload.name}/{container['name']}"
            requests = container.get("resources", {}).get("requests", {})
            limits = container.get("resources", {}).get("limits", {})
            if "memory" not in limits or "cpu" not in requests:
                broken.append(f"{where} does not say how much memory and CPU it takes")
            broken += [
                f"{where} requests {requests.get(kind)} and may take {limits.get(kind)} of {kind}"
                for kind in ("memory", "nvidia.com/gpu")
                if requests.get(kind) != limits.get(kind)
            ]
        for volume in workload.pod.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                broken.append(f"{workload.name}'s volume {volume['name']} has no size")
    return broken


def pinned_images(documents: list[Document]) -> list[str]:
    """Each image has a version, and all of xrai's have the same."""
    images = {
        container["image"] for workload in workloads(documents) for container in workload.containers
    }
    broken = [
        f"{image} has no version"
        for image in images
        if not re.search(r":(?!latest$)[\w.-]+$|@sha256:\w{64}$", image)
    ]
    own = sorted(image for image in images if "seaweedfs" not in image)
    return [*broken, *([f"several images of xrai: {', '.join(own)}"] if len(own) > 1 else [])]


def failures_explained(documents: list[Document]) -> list[str]:
    """`kubectl describe pod` shows the line in which a training says why it ended, or the end of
    the log.
    """
    broken = []
    for workload in workloads(documents):
        for container in workload.containers:
            if container.get("terminationMessagePolicy") != "FallbackToLogsOnError":
                broken.append(f"{workload.name}/{container['name']} does not say why it failed")
            message = container.get("terminationMessagePath", "/dev/termination-log")
            if workload.component == "train" and container is workload.pod["containers"][0]:
                own = {each["name"]: each.get("value") for each in container.get("env", [])}
                if own.get("XRAI_TERMINATION_LOG") != message:
                    broken.append(f"{workload.name} ends with torch's C++ frames")
            for variable in container.get("env", []):
                if (
                    variable["name"] == "TORCHELASTIC_ERROR_FILE"
                    and variable.get("value") == message
                ):
                    broken.append(
                        f"{workload.name}/{container['name']}: "
                        f"torch removes {message} first, which is a mount"
                    )
    return broken


def mounts_fit(documents: list[Document]) -> list[str]:
    """Everything mounted exists; what is writable is an emptyDir or a claim that is made here;
    training has a cache and a large /dev/shm.
    """
    broken = []
    configs = of_kind(documents, "ConfigMap")
    claims = of_kind(documents, "PersistentVolumeClaim")
    for workload in workloads(documents):
        volumes = {volume["name"]: volume for volume in workload.pod.get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume and volume["configMap"]["name"] not in configs:
                broken.append(
                    f"{workload.name} mounts {volume['configMap']['name']}, which is not there"
                )
        for container in workload.containers:
            where = f"{workload.name}/{container['name']}"
            mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
            for path, mount in mounts.items():
                volume = volumes.get(mount["name"])
                if volume is None:
                    broken.append(f"{where} mounts {mount['name']}, which is no volume")
                elif not mount.get("readOnly") and "emptyDir" not in volume:
                    claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                    if claim not in claims:
                        broken.append(f"{where} may write to {path}")
            if "/tmp" not in mounts:
                broken.append(f"{where} has no /tmp")
            if workload.component == "train":
                shm = volumes.get(mounts.get("/dev/shm", {}).get("name"), {}).get("emptyDir", {})
                if shm.get("medium") != "Memory" or quantity(shm.get("sizeLimit", "0")) < 2**30:
                    broken.append(f"{where} has a small /dev/shm")
                if "/cache" not in mounts:
                    broken.append(f"{where} has no /cache")
    return broken


def cache_fits_its_volume(documents: list[Document]) -> list[str]:
    """Above a volume's size the pod is evicted; so xrai's own limit comes first."""
    config = yaml.safe_load(of_kind(documents, "ConfigMap")["xrai-config"]["data"]["config.yaml"])
    max_bytes = config.get("cache", {}).get("max_gib", 0) * 2**30
    return [
        f"{workload.name}: cache.max_gib does not stay below the volume's "
        f"{volume['emptyDir']['sizeLimit']}"
        for workload in workloads(documents)
        for volume in workload.pod.get("volumes", [])
        if volume["name"] == "cache"
        and not 0 < max_bytes < quantity(volume["emptyDir"]["sizeLimit"])
    ]


def jobs_replace_what_was_lost(documents: list[Document]) -> list[str]:
    """A lost pod is replaced, one at a time; a user's mistake is not tried again; an ended Job
    goes away some time.
    """
    broken = []
    for workload in _trainings_and_preprocessings(documents):
        job = workload.job
        assert job is not None
        disruption = {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        }
        mistake = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
        rules = job.get("podFailurePolicy", {}).get("rules", [])
        if _by_trainer(workload):  # a JobSet restarts all pods together
            if rules != [mistake]:
                broken.append(f"{workload.name} tries a user's mistake again")
            continue
        together = workload.name.startswith("JobSet/") and workload.component == "train"
        if together:
            disruption["action"] = "FailJob"
        if rules[:1] != [disruption]:
            broken.append(f"{workload.name} counts an eviction as a failure")
        if mistake not in rules:
            broken.append(f"{workload.name} tries a user's mistake again")
        if job.get("podReplacementPolicy") != "Failed":
            broken.append(f"{workload.name} may have two pods of one name")
        if workload.name.startswith("Job/") and not job.get("ttlSecondsAfterFinished", 0) >= 3600:
            broken.append(f"{workload.name} is never cleaned up, or too soon")
        if not workload.name.startswith("Job/") and "ttlSecondsAfterFinished" in job:
            broken.append(f"{workload.name} is cleaned up under its owner, who would make it again")
        if job.get("completionMode") != "Indexed" or workload.pod.get("restartPolicy") != "Never":
            broken.append(f"{workload.name} is no Indexed Job of pods that are replaced")
        restarts = [
            int(a.split("=")[1])
            for a in workload.pod["containers"][0]["args"]
            if a.startswith("--max_restarts=")
        ]
        if together:
            if job.get("backoffLimit") != job["completions"]:
                broken.append(f"{workload.name} may count the pods that an eviction takes with it")
        elif workload.component == "preprocess":
            if not job.get("backoffLimitPerIndex", 0) > 0 or "backoffLimit" in job:
                broken.append(f"{workload.name}: partitions share the failures that they may have")
        elif job.get("backoffLimit", 0) < job["completions"] * max([1, *restarts]):
            broken.append(f"{workload.name} gives up after {job.get('backoffLimit')} pods")
    return broken


def nodes_meet(documents: list[Document]) -> list[str]:
    """All pods of a training wait for each other at pod 0, by the full name that it knows itself
    by.
    """
    broken = []
    services = of_kind(documents, "Service")
    for workload in workloads(documents):
        if workload.component != "train" or _by_trainer(workload):
            continue
        container, pod, job = workload.pod["containers"][0], workload.pod, workload.job
        assert job is not None
        own = environment_of(container, documents, fields=fields_of("JOB", 0, "NAMESPACE"))
        args = dict(
            arg.split("=", 1)
            for arg in (expand(arg, own) for arg in container["args"])
            if "=" in arg
        )
        if not job["completions"] == job["parallelism"] == int(args.get("--nnodes", "0")):
            broken.append(
                f"{workload.name} has {job['parallelism']} pods of {job['completions']}, "
                f"args say {args}"
            )
        service = services.get(pod.get("subdomain", ""))
        if service is None:
            broken.append(f"{workload.name}'s pods have no names")
            continue
        spec = service["spec"]
        if spec.get("clusterIP") != "None" or spec.get("publishNotReadyAddresses") is not True:
            broken.append(f"{workload.name}'s pods have no names before they are ready")
        if not spec["selector"].items() <= workload.template["metadata"]["labels"].items():
            broken.append(f"{workload.name}'s pods are not those of its service")
        endpoint = f"JOB-0.{pod['subdomain']}.NAMESPACE.svc.{own['CLUSTER_DOMAIN']}:29400"
        if args.get("--rdzv_backend") != "c10d" or args.get("--rdzv_endpoint") != endpoint:
            broken.append(f"{workload.name} meets at {args.get('--rdzv_endpoint')}, not {endpoint}")
        if own.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
            broken.append(f"{workload.name}: a pod that replaces another one cannot rejoin")
    return broken


def num_nodes_held(documents: list[Document]) -> list[str]:
    """The number of nodes is in the pod template, which the API server holds: a Job that trains is
    not resized. Nor do pods of another number meet the others.
    """
    broken = []
    for workload in workloads(documents):
        if workload.component != "train" or _by_trainer(workload):
            continue
        container = workload.pod["containers"][0]
        assert workload.job is not None
        for user in [*workload.pod["initContainers"][1:], container]:
            own = {variable["name"]: variable.get("value") for variable in user.get("env", [])}
            if own.get("NUM_NODES") != str(workload.job["completions"]):
                broken.append(f"{workload.name}/{user['name']} takes its NUM_NODES from elsewhere")
        ids = [arg for arg in container["args"] if arg.startswith("--rdzv_id=")]
        if not ids or "$(NUM_NODES)" not in ids[0] or "$(XRAI_RUN_ID)" not in ids[0]:
            broken.append(f"{workload.name}: pods of another run or number meet these")
    return broken


def dead_machines_left(documents: list[Document]) -> list[str]:
    """Work leaves a machine 30 s after it was found dead; Kubernetes' default is 300."""
    keys = {"node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"}
    return [
        f"{workload.name} stays on a dead machine"
        for workload in workloads(documents)
        if workload.component in ("train", "preprocess", "serve")
        and keys
        != {
            toleration["key"]
            for toleration in workload.pod.get("tolerations", [])
            if toleration.get("effect") == "NoExecute"
            and 0 <= toleration.get("tolerationSeconds", 300) <= 30
        }
    ]


def readers_seen(documents: list[Document]) -> list[str]:
    """TensorBoard is ready while it reads runs; its page is there also when it no longer does."""
    return [
        f"{workload.name} is ready whether it reads runs or not"
        for workload in workloads(documents)
        if workload.component == "tensorboard"
        for container in workload.pod["containers"]
        if container.get("readinessProbe", {}).get("exec", {}).get("command", [])[-2:]
        != ["xrai", "healthy"]
    ]


def time_to_save(documents: list[Document]) -> list[str]:
    """Kubernetes waits longer for torchrun than torchrun for its ranks, and torchrun longer than
    by default.
    """
    broken = []
    for workload in workloads(documents):
        if workload.component == "train":
            fields = fields_of("JOB", 0, "NAMESPACE")
            own = environment_of(workload.pod["containers"][0], documents, fields=fields)
            shutdown_s = int(own.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
            if not 30 < shutdown_s <= workload.pod.get("terminationGracePeriodSeconds", 30) - 30:
                broken.append(f"{workload.name} has no time to save")
    return broken


def checked_before(documents: list[Document]) -> list[str]:
    """Before a rank begins the data set is there, and config, data, device and rights were
    checked in one process.
    """
    broken = []
    for workload in workloads(documents):
        if workload.component != "train":
            continue
        first, *others = [
            container["args"] for container in workload.pod.get("initContainers", [])
        ] or [[]]
        config = [
            arg for arg in workload.pod["containers"][0]["args"] if arg.startswith("--config=")
        ]
        if first != ["wait", *config]:
            broken.append(f"{workload.name} does not check its config, then wait for the data set")
        counts = ["--nnodes=$(NUM_NODES)", "--nproc_per_node=$(NUM_PROCESSES)"]
        if others != [["train", "--check", *counts, *config, "--train.threads=$(NUM_THREADS)"]]:
            broken.append(f"{workload.name} does not check what it will do")
        devices = {
            container["name"]: container["resources"]["limits"].get("nvidia.com/gpu")
            for container in workload.containers
            if container["args"][0] != "wait"
        }
        if len(set(devices.values())) > 1:
            broken.append(f"{workload.name} checks on other GPUs than it trains on")
    return broken


def cores_suffice(documents: list[Document]) -> list[str]:
    """As many threads as CPUs were asked for; a process sees all cores of its machine. As many
    GPUs as processes.
    """
    broken = []
    for workload in _trainings_and_preprocessings(documents):
        container = workload.pod["containers"][0]
        own = environment_of(container, documents, fields=fields_of("JOB", 0, "NAMESPACE"))
        args = dict(
            arg.split("=", 1)
            for arg in (expand(arg, own) for arg in container["args"])
            if "=" in arg
        )
        cpus, gpus = (
            max(1.0, quantity(container["resources"]["requests"]["cpu"])),  # a part runs one
            container["resources"]["limits"].get("nvidia.com/gpu"),
        )
        processes = (
            int(own["NUM_PROCESSES"])
            if workload.component == "train"
            else int(args.get("--workers", "0"))
        )
        threads = int(args.get("--train.threads", "0")) if workload.component == "train" else 1
        if not 0 < processes * threads <= cpus:
            broken.append(f"{workload.name} runs {processes} x {threads} threads on {cpus:g} CPUs")
        if gpus is not None and int(gpus) != processes:
            broken.append(f"{workload.name} runs {processes} processes on {gpus} GPUs")
    return broken


def partitions_add_up(documents: list[Document]) -> list[str]:
    """The pods of preprocessing make all partitions, each one."""
    broken = []
    for workload in workloads(documents):
        if workload.component == "preprocess":
            assert workload.job is not None
            number = workload.job["completions"]
            container = workload.pod["containers"][0]
            made = []
            for index in range(number):
                injected = {"JOB_COMPLETION_INDEX": str(index)}
                own = environment_of(
                    container, documents, fields=fields_of("JOB", index, "NAMESPACE"), also=injected
                )
                made += [
                    expand(arg, own) for arg in container["args"] if arg.startswith("--partition")
                ]
            if made != [f"--partition={index}/{number}" for index in range(number)]:
                broken.append(f"{workload.name} makes {made}")
    return broken


def variables_known(documents: list[Document]) -> list[str]:
    """Every `$(NAME)` stands for something."""
    broken = []
    for workload in workloads(documents):
        injected = {"JOB_COMPLETION_INDEX": "0"} if workload.job is not None else {}
        for container in workload.containers:
            own = environment_of(
                container, documents, fields=fields_of("JOB", 0, "NAMESPACE"), also=injected
            )
            texts = [
                expand(text, own)
                for text in [*container.get("args", []), *container.get("command", [])]
            ]
            broken += [
                f"{workload.name}/{container['name']}: {text}" for text in texts if "$(" in text
            ]
    return broken


def network_denied(documents: list[Document]) -> list[str]:
    """No pod can be reached but from its own training; out go names, HTTPS and the S3 of the
    cluster.
    """
    broken = []
    policies = of_kind(documents, "NetworkPolicy")
    for workload in workloads(documents):
        labels = workload.template["metadata"]["labels"]
        own = [
            policy
            for policy in policies.values()
            if _selects(policy["spec"]["podSelector"], labels)
        ]
        kinds = {kind for policy in own for kind in policy["spec"]["policyTypes"]}
        if kinds != {"Ingress", "Egress"}:
            broken.append(f"{workload.name} is open to {sorted({'Ingress', 'Egress'} - kinds)}")
        for policy in own:
            for rule in policy["spec"].get("ingress", []):
                if not rule.get("from") or not all(map(_is_named, rule["from"])):
                    broken.append(f"{workload.name} can be reached from anywhere")
            for rule in policy["spec"].get("egress", []):
                if not (peers := rule.get("to")):
                    if {port["port"] for port in rule.get("ports", [])} != {53}:
                        broken.append(f"{workload.name} may connect to anywhere")
                    continue
                for block in (peer["ipBlock"] for peer in peers if "ipBlock" in peer):
                    broken += [
                        f"{workload.name} may ask {a}"
                        for a in METADATA_SERVERS
                        if _within(a, block)
                    ]
                    wide = ipaddress.ip_network(block["cidr"]).num_addresses > 1
                    if wide and {port["port"] for port in rule.get("ports", [])} != {443}:
                        broken.append(f"{workload.name} may connect to any port")
        if workload.component == "train" and not _by_trainer(workload):
            inside = [
                rule
                for policy in own
                for key, way in (("ingress", "from"), ("egress", "to"))
                for rule in policy["spec"].get(key, [])
                if any(
                    _selects(peer.get("podSelector", {"matchLabels": {"": ""}}), labels)
                    for peer in rule.get(way, [])
                )
            ]
            if len([rule for rule in inside if "ports" not in rule]) < 2:
                broken.append(f"{workload.name}'s pods do not reach each other on all ports")
    return broken


RULES: tuple[Rule, ...] = (
    locked_down,
    no_token,
    no_secrets,
    bounded_resources,
    pinned_images,
    failures_explained,
    mounts_fit,
    cache_fits_its_volume,
    jobs_replace_what_was_lost,
    nodes_meet,
    num_nodes_held,
    dead_machines_left,
    readers_seen,
    time_to_save,
    checked_before,
    cores_suffice,
    partitions_add_up,
    variables_known,
    network_denied,
)


def _trainings_and_preprocessings(documents: list[Document]) -> list[Workload]:
    return [
        workload
        for workload in workloads(documents)
        if workload.component in ("train", "preprocess")
    ]


def _by_trainer(workload: Workload) -> bool:
    return workload.name.startswith("TrainingRuntime/")


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _is_named(peer: Document) -> bool:
    """Whether a rule lets in chosen pods, or one address."""
    cidr = peer.get("ipBlock", {}).get("cidr", "::/0")
    return "podSelector" in peer or ipaddress.ip_network(cidr).num_addresses == 1


def _within(address: str, block: Document) -> bool:
    host = ipaddress.ip_address(address)
    inside = [
        network
        for network in map(ipaddress.ip_network, [block["cidr"]])
        if network.version == host.version
    ]
    spared = [
        n for n in map(ipaddress.ip_network, block.get("except", [])) if n.version == host.version
    ]
    return any(host in network for network in inside) and not any(
        host in network for network in spared
    )
