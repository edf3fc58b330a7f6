"""Several hosts on one machine: network namespaces on a switch, with limited links.

    with Cluster(2, mbit=1000) as cluster:
        subprocess.run(cluster.mpirun([sys.executable, "train.py"]))

Each host is a network namespace with one interface, eth0, and a host name of its own;
the switch is a bridge in one more namespace. Nothing is shared but the file system, the
cores and the memory. A link carries so many Mbit/s in each direction (tc's token bucket
filter, on both of its ends). Needs root, and iproute2.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
CORES = os.cpu_count() or 1
NETWORK = "10.77.0."  # seen by nobody outside of the namespaces

# Takes the place of ssh: enters the namespace of the host, whose address ends in its
# number, counted from 1. Options are of no use here.
REMOTE_SHELL = """#!/bin/sh
host=
while [ $# -gt 0 ]; do
    case $1 in
        -o | -p | -i) shift 2 ;;
        -*) shift ;;
        *) [ -z "$host" ] || break
           host=${1##*.}
           shift ;;
    esac
done
exec ENTER "$host" sh -c "$*"
"""

# Enters a host: a number, and the command to run there. The name of the host, and that
# all hosts know each other by name, is for the processes of that namespace alone. A
# host keeps to one core: wandering about, hosts would disturb each other.
ENTER = """#!/bin/sh
host=$1
shift
exec ip netns exec "PREFIX-$host" taskset -c $(((host - 1) % CORES)) \\
    unshare --uts --mount sh -c '
        hostname "$0" && mount --bind FOLDER/hosts /etc/hosts && exec "$@"' \\
    "node$host" "$@"
"""


@cache
def why_not() -> str:
    """The reason why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare", "hostname", "taskset"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, util-linux, hostname)"
    try:  # the whole of it, on one host: bridge, limit and mount may be missing, too
        with Cluster(1, mbit=100) as cluster:
            _run(*cluster.on(0, ["true"]))
    except RuntimeError as error:
        return f"no network namespaces here: {error}"
    return ""


class Cluster:
    """Hosts 0 to hosts - 1, from `with` on; afterwards nothing is left of them."""

    def __init__(self, hosts: int, mbit: float | None = None) -> None:
        """Describe it.

        Args:
            hosts: how many, 1 to 200.
            mbit: what each link carries each way, in Mbit/s; None for no limit.
        """
        if not 1 <= hosts <= 200:
            raise ValueError(f"hosts must be in [1, 200], got {hosts}")
        if mbit is not None and not mbit > 0:
            raise ValueError(f"mbit must be positive, got {mbit}")
        self.addresses = [f"{NETWORK}{host + 1}" for host in range(hosts)]
        self.mbit = mbit
        self._folder = tempfile.TemporaryDirectory(prefix="hvd-cluster-")
        self._prefix = Path(self._folder.name).name
        self._switch = f"{self._prefix}-switch"
        self._remote_shell = str(Path(self._folder.name, "ssh"))
        self._enter = str(Path(self._folder.name, "enter"))

    def __enter__(self) -> "Cluster":
        """Make namespaces, links and limits."""
        try:
            self._write_files()
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for host in range(len(self.addresses)):
                self._join(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End what runs there, and remove it."""
        for name in self.namespaces:
            while pids := _pids(name):
                _run("kill", "-9", *map(str, pids), check=False)
            _ip("netns", "del", name, check=False)
        self._folder.cleanup()

    def _write_files(self) -> None:
        folder = Path(self._folder.name)
        lines = [f"{ip}\tnode{i + 1}" for i, ip in enumerate(self.addresses)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1\tlocalhost", *lines, ""]))
        for file, text in ((self._remote_shell, REMOTE_SHELL), (self._enter, ENTER)):
            text = text.replace("PREFIX", self._prefix).replace("ENTER", self._enter)
            text = text.replace("FOLDER", str(folder)).replace("CORES", str(CORES))
            Path(file).write_text(text)
            Path(file).chmod(0o755)

    def _join(self, host: int) -> None:
        """One host with its link."""
        name, port = self._name(host), f"port{host}"
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
        peer = ("peer", "name", port, "netns", self._switch)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", *peer)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{self.addresses[host]}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        if self.mbit is not None:
            self._limit(name, "eth0", self.mbit)
            self._limit(self._switch, port, self.mbit)

    def _limit(self, name: str, device: str, mbit: float) -> None:
        # as much as passes in 1 ms at once, and the largest segment; 50 ms may queue up
        burst = max(round(mbit * 125), 70_000)
        rate = ("rate", f"{round(mbit * 1000)}kbit", "burst", str(burst))
        options = (*rate, "latency", "50ms")
        _run("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", *options)

    def _name(self, host: int) -> str:
        return f"{self._prefix}-{host + 1}"

    # -------------------------------------------------------------------- what it does

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on a host."""
        return [self._enter, str(host + 1), *command]

    def mpirun(self, program: Sequence[str]) -> list[str]:
        """The command line that runs a program with a rank on each host."""
        options = {
            "plm_rsh_agent": self._remote_shell,
            "pml": "ob1",
            "btl": "tcp,self",
            "btl_tcp_if_include": "eth0",
            "oob_tcp_if_include": "eth0",
            "mpi_yield_when_idle": "1",  # hosts share the cores of this machine
        }
        command = [str(BIN / "mpirun"), "--allow-run-as-root", "--bind-to", "none"]
        command += ["-np", str(len(self.addresses)), "--host", self._slots]
        for name, value in options.items():
            command += ["--mca", name, value]
        for variable in (
            "PATH",
            "OMP_NUM_THREADS",
            "PYTHONPATH",
            "TF_CPP_MIN_LOG_LEVEL",
        ):
            command += ["-x", variable] if variable in os.environ else []
        return self.on(0, [*command, *program])

    def horovodrun(self, program: Sequence[str], *options: str) -> list[str]:
        """The same under horovodrun, over Gloo; options come before the program's."""
        search = f"{self._folder.name}:{BIN}:{os.environ['PATH']}"
        command = ["env", f"PATH={search}", str(BIN / "horovodrun"), "--gloo"]
        command += ["--network-interfaces", "eth0", "--disable-cache"]
        if "--host-discovery-script" not in options:
            command += ["-np", str(len(self.addresses)), "-H", self._slots]
        return self.on(0, [*command, *options, *program])

    @property
    def _slots(self) -> str:
        return ",".join(f"{address}:1" for address in self.addresses)

    @property
    def namespaces(self) -> list[str]:
        """Their names: of each host, then of the switch."""
        hosts = range(len(self.addresses))
        return [*(self._name(host) for host in hosts), self._switch]

    def pids(self, host: int) -> list[int]:
        """The processes that run on a host."""
        return _pids(self._name(host))

    def set_link(self, host: int, *, up: bool) -> None:
        """Plug a host's cable in, or out."""
        state = "up" if up else "down"
        _ip("-n", self._switch, "link", "set", f"port{host}", state)

    def sent_bytes(self, host: int) -> int:
        """What a host has put on its link so far, headers of all layers included."""
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_ip("netns", "exec", self._name(host), "cat", counter))


def _pids(name: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", name, check=False).split()]


def _ip(*arguments: str, check: bool = True) -> str:
    return _run("ip", *arguments, check=check)


def _run(*command: str, check: bool = True, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
