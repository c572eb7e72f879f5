"""A SLURM of our own on this machine: munge, slurmctld and two slurmd on loopback, in a folder that is thrown away.

Nothing of the machine is touched: configuration, keys, ports, sockets and state are the folder's. A node is what has its
name in its environment: slurmd, its slurmstepd, batch scripts and ranks. So can it be killed as if it lost its power.
"""

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import HANG, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun", "scancel")
NODES = ("n1", "n2")
GPUS = 2
"""Of a node, on paper: a request for them is granted, and nothing is behind it."""
_SBIN = "/usr/sbin:/sbin"


def missing() -> list[str]:
    """Commands that are not installed."""
    return [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:{_SBIN}") is None]


class Cluster:
    """Commands of a running cluster; `running` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        }
        self.environment = {**clean, "PATH": f"{clean['PATH']}:{_SBIN}", "SLURM_CONF": str(self.conf)}

    def run(self, *command: str, **variables: str) -> str:
        """Output of a command on this cluster."""
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=HANG
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Restarts and NodeList."""
        return dict(
            re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", str(number)))
        )

    def node(self, name: str) -> str:
        """State of a node."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "node", name)))[
            "State"
        ]

    def start_daemon(self, *command: str, **variables: str) -> None:
        """Start a daemon in the foreground of a session of its own; its output goes to the folder."""
        with (self.folder / "daemons.log").open("a") as log:
            subprocess.Popen(
                command, env=self.environment | variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def start_node(self, name: str) -> None:
        """Start its slurmd."""
        self.start_daemon("slurmd", "-D", "-N", name, SLURMD_NODENAME=name)

    def kill_node(self, name: str) -> None:
        """Kill all processes of a node at once."""
        kill(lambda environment: {f"SLURM_CONF={self.conf}", f"SLURMD_NODENAME={name}"} <= environment)


def kill(belongs: Callable[[set[str]], bool]) -> None:
    """Kill every process whose environment says that it belongs here, and those that they start meanwhile."""
    while found := [pid for pid, environment in _environments() if belongs(environment)]:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for pid in found:
            _reap(pid)
        time.sleep(0.05)


def _environments() -> Iterator[tuple[int, set[str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # A zombie has none any more.
            yield (
                int(folder.name),
                set((folder / "environ").read_bytes().decode(errors="replace").split("\0")),
            )
        except OSError:
            continue


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:  # somebody else's
        return


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster in `folder`, stopped with everything that runs on it at the end, whatever the end is."""
    cluster = Cluster(folder)
    _configure(cluster)
    try:
        munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")]  # fmt: skip
        cluster.start_daemon("munged", "--foreground", "--force", *munge)
        wait_until("munge's socket", (folder / "munge.socket").exists)
        cluster.start_daemon("slurmctld", "-D")
        for name in NODES:
            cluster.start_node(name)
        wait_until("idle nodes", lambda: all(_idle(cluster, name) for name in NODES), pause=0.5)
        yield cluster
    finally:
        kill(lambda environment: f"SLURM_CONF={cluster.conf}" in environment)


def _idle(cluster: Cluster, name: str) -> bool:
    try:
        return cluster.node(name).startswith("IDLE")
    except RuntimeError:  # the controller does not listen yet
        return False


def _configure(cluster: Cluster) -> None:
    folder, user, host = cluster.folder, getpass.getuser(), socket.gethostname().split(".")[0]
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    (folder / "state").mkdir()
    controller, first, second = free_ports(3)
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    cluster.conf.write_text(
        f"""\
ClusterName=skymoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
MpiDefault=none
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=30
MinJobAge=7200
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={NODES[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=8000 Gres=gpu:{GPUS}
NodeName={NODES[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=8000 Gres=gpu:{GPUS}
PartitionName=a800 Nodes=ALL Default=YES PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL PriorityTier=10
"""
    )


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at, below those that the system hands out."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
