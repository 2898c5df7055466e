"""A machine that goes away without a word: its packets are dropped, so no connection is reset.

Killing a process does not show this, because the kernel resets the connections of the dead. Two
network namespaces, joined by a cable, are two machines, each with a node of torchrun. A machine
goes away by routing what it would send into a black hole. What the pods of the others would leave
as a message is looked at here, too, when a machine is killed or told to stop.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training import SMALL, make_dataset

pytestmark = [
    pytest.mark.ci,
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and the command ip",
    ),
]
STEP_TIMEOUT_S = 30
DEADLINE_S = STEP_TIMEOUT_S + 60  # by which survivors have ended; the machine may be busy
MESSAGE_BYTES = 2048  # of a log's end that Kubernetes shows where a pod leaves no message


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=20)


class Machine:
    """A network namespace, and the node of a training that runs there."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.number, self.folder = number, folder
        self.namespace = f"{name}-{number}"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / f"node-{number}.log"
        self.message = folder / f"message-{number}"  # of its pod, for kubectl describe
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")

    def join(self, other: "Machine") -> None:
        """Lay the cable between the two."""
        ends = [(self.namespace, "eth0"), (other.namespace, "eth0")]
        one, two = (("netns", namespace, "name", device) for namespace, device in ends)
        ip("link", "add", *one, "type", "veth", "peer", *two)
        for machine in (self, other):
            inside = ("-n", machine.namespace)
            ip(*inside, "addr", "add", f"10.213.77.{machine.number + 1}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")

    def vanish(self) -> None:
        """Nothing that it sends arrives, not even that a packet was received."""
        ip("-n", self.namespace, "route", "add", "blackhole", f"10.213.77.{2 - self.number}/32")

    def come_back(self) -> None:
        ip("-n", self.namespace, "route", "del", "blackhole", f"10.213.77.{2 - self.number}/32")

    def train(self, *options: str) -> None:
        """Start this machine's node."""
        conf = f"join_timeout=300,is_host={'true' if self.number == 0 else 'false'}"
        command = [
            *("ip", "netns", "exec", self.namespace, sys.executable, "-m", "xrai", "train"),
            *("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=one"),
            *("--rdzv_endpoint=10.213.77.1:29400", f"--rdzv_conf={conf}"),
            *(f"--local_addr=10.213.77.{self.number + 1}", "--max_restarts=1", *SMALL),
            *(f"--train.step_timeout_s={STEP_TIMEOUT_S}", "--checkpoint.every=5"),
            *("--train.epochs=100000", "--run_id=one", f"--dataset={self.folder / 'dataset'}"),
            *(f"--artifacts={self.folder / 'submit'}", *options),
        ]
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "eth0",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20",
            "XRAI_PREFLIGHT": "0",
            "XRAI_TERMINATION_LOG": str(self.message),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text()

    def ended(self, *, timeout_s: float) -> tuple[int, str]:
        assert self.process is not None
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {timeout_s:.0f} s:\n{self.said()}") from None
        return status, self.said()

    def kill(self) -> None:
        if self.process is not None:
            pids = subprocess.run(
                ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
            )
            for pid in map(int, pids.stdout.split()):
                os.kill(pid, signal.SIGKILL)
            self.process.wait(20)

    def remove(self) -> None:
        self.kill()
        ip("netns", "del", self.namespace, check=False)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two machines whose nodes train together; a checkpoint is stored."""
    make_dataset(tmp_path, num_images=240)
    made: list[Machine] = []
    try:
        name = f"xrai-{uuid.uuid4().hex[:8]}"
        for number in range(2):
            made.append(Machine(name, number, tmp_path))
        made[0].join(made[1])
        for machine in made:
            machine.train()
        latest = tmp_path / "submit/one/checkpoints/latest.json"
        wait_until(latest.exists, made)
        yield made
    finally:
        for machine in made:
            machine.remove()


def wait_until(
    is_so: Callable[[], object], machines: list[Machine], *, timeout_s: float = 180
) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "\n\n".join(machine.said() for machine in machines)
        time.sleep(0.1)


def test_the_survivor_of_rank_0s_machine_names_it_ends_and_goes_on_with_a_replacement(
    machines: list[Machine],
) -> None:
    lost, survivor = machines
    lost.vanish()
    status, text = survivor.ended(timeout_s=DEADLINE_S)
    assert status == 1
    assert "waiting for rank 0, which has been silent for" in text
    assert re.search("rank 0, whose machine has the job's store, is gone|rank 0's machine", text)
    assert "rank 0's machine 10.213.77.1" in only_line(survivor.message)
    lost.kill()
    survivor.train()  # before there is a machine that it could meet
    wait_until(lambda: "waiting for rank 0's machine 10.213.77.1" in survivor.said(), machines)
    lost.come_back()
    lost.train()
    wait_until(lambda: "going on after step" in lost.said(), machines)


def test_rank_0_names_the_machine_that_it_waits_for_and_ends_or_is_told_to(
    machines: list[Machine],
) -> None:
    survivor, lost = machines
    lost.vanish()
    wait_until(lambda: "rank 1 was last heard of" in survivor.said(), machines)
    assert "waiting for rank 1, which has been silent for" in survivor.said()
    assert survivor.process is not None
    survivor.process.terminate()  # it waits for a replacement of rank 1 now
    status, _ = survivor.ended(timeout_s=DEADLINE_S)
    assert status != 0


def test_the_message_of_a_pod_whose_pod_0_was_killed_is_one_line(machines: list[Machine]) -> None:
    """The kernel resets the connections of the dead, and torch logs its C++ frames for each."""
    lost, survivor = machines
    lost.kill()
    status, text = survivor.ended(timeout_s=DEADLINE_S)
    assert status == 1
    assert "frame #" in text[-MESSAGE_BYTES:]  # what the message would be
    said = only_line(survivor.message)
    assert said.startswith("rank 0's machine 10.213.77.1, at which the machines of this training")
    assert said in text and not lost.message.exists()


def test_the_messages_of_pods_of_which_pod_0_was_evicted_are_one_line(
    machines: list[Machine],
) -> None:
    evicted, survivor = machines
    assert evicted.process is not None
    evicted.process.terminate()
    _, text = evicted.ended(timeout_s=DEADLINE_S)
    assert "the state is saved" in text and "Traceback" not in text
    assert only_line(evicted.message).startswith("stopped by SIGTERM: ")
    status, _ = survivor.ended(timeout_s=DEADLINE_S)
    assert status == 1
    assert "rank 0's machine 10.213.77.1" in only_line(survivor.message)


def only_line(message: Path) -> str:
    (line,) = message.read_text().splitlines()
    return line
