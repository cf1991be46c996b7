"""A Dask cluster of two hosts that share a folder, any part of which can be killed.

Where this process may make network namespaces, each host has one of its own, and reaches the scheduler
through a pair of virtual network devices. Elsewhere a host is a group of processes on the loopback device.
The kernel removes a namespace and its devices with the last process in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil

from tests.emulation.build import outer_environment

_SECONDS = 60.0


def namespaces() -> bool:
    """Whether this process may make network namespaces and devices that lead into them."""
    if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    made = subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "hbxa", "type", "veth", "peer", "name", "hbxb"],
        capture_output=True,
        check=False,
    )
    return made.returncode == 0


@dataclass
class Host:
    """One host: the prefix of its commands, its address, and the address of the scheduler as it sees it."""

    prefix: list[str]
    address: str
    scheduler: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a Python module on this host, in a process group of its own."""
        process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", *command],
            env=outer_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """End all processes of the host at once, as a loss of power does."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()


class Cluster:
    """A scheduler here, and one worker on each of two hosts."""

    def __init__(self, hosts: list[Host], folder: str) -> None:
        self.hosts, self.folder = hosts, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.here = Host([], "0.0.0.0", "127.0.0.1")
        self.address = f"tcp://127.0.0.1:{self.port}"

    def start_scheduler(self) -> None:
        """Start the scheduler, or another one in its place."""
        self.here.start(
            "distributed.cli.dask_scheduler", "--host", "0.0.0.0", "--port", str(self.port), "--no-dashboard"
        )
        until(lambda: _answers(self.port))

    def start_worker(self, host: Host) -> None:
        """Start the worker of a host; its nanny starts it anew if it is killed."""
        host.start(
            "distributed.cli.dask_worker", f"tcp://{host.scheduler}:{self.port}", "--nworkers", "1",
            "--nthreads", "1", "--no-dashboard", "--host", host.address, "--local-directory", self.folder,
        )  # fmt: skip

    def restart(self) -> None:
        """Begin anew, whatever was killed before."""
        for host in (self.here, *self.hosts):
            host.kill()
        self.start_scheduler()
        for host in self.hosts:
            self.start_worker(host)

    def kill_worker(self, host: Host) -> bool:
        """Kill the worker of a host, but not its nanny; False if it is between two lives."""
        for process in host.processes:
            children = psutil.Process(process.pid).children(recursive=True)
            busiest = max(children, key=lambda child: child.memory_info().rss, default=None)
            if busiest is not None:
                busiest.kill()
                return True
        return False


def until(condition: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the cluster did not start")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def two_hosts() -> Iterator[Cluster]:
    """A cluster that :meth:`Cluster.restart` starts; everything of it is ended in the end."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hbx-dask-"))
        hosts = [stack.enter_context(_host(number)) for number in range(2)]
        cluster = Cluster(hosts, folder)
        stack.callback(cluster.here.kill)
        yield cluster


@contextlib.contextmanager
def _host(number: int) -> Iterator[Host]:
    if not namespaces():
        host = Host([], "127.0.0.1", "127.0.0.1")
    else:
        # Held by a process that does nothing. The names of devices and the network follow from its number.
        holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        device, there = f"hbx{holder.pid}", f"hby{holder.pid}"
        network = f"10.{200 + number}.{holder.pid % 256}"
        inside = ["nsenter", "-t", str(holder.pid), "-n"]
        apart = os.stat("/proc/self/ns/net").st_ino
        until(lambda: os.stat(f"/proc/{holder.pid}/ns/net").st_ino != apart)
        for command in (
            f"ip link add {device} type veth peer name {there} netns {holder.pid}",
            f"ip addr add {network}.1/30 dev {device}",
            f"ip link set {device} up",
            *(f"{' '.join(inside)} ip {rest}" for rest in (
                f"addr add {network}.2/30 dev {there}", f"link set {there} up", "link set lo up"
            )),
        ):  # fmt: skip
            subprocess.run(command.split(), check=True)
        host = Host(inside, f"{network}.2", f"{network}.1")
    try:
        yield host
    finally:
        host.kill()
        if host.prefix:
            holder.kill()
            holder.wait()
