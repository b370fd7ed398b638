"""A Slurm cluster of one node in a temporary folder: munged, slurmctld and slurmd as ordinary processes, no accounting, no cgroups."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

CONFIGURATION = """\
ClusterName=qvsr
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MinJobAge=86400
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class ClusterError(RuntimeError):
    """A cluster that does not start; the message holds the end of the daemon's log."""


@contextmanager
def cluster(cpus: int = 2, memory_mb: int = 6000) -> Iterator[dict[str, str]]:
    """Start the daemons and end them, whatever happens inside; keys, configuration, state and logs are in a folder that goes with them.

    Args:
        cpus, memory_mb: what the node claims to have.
    Yields:
        variables by which every Slurm command finds this cluster.
    """
    with TemporaryDirectory(prefix="qvsr-slurm-") as name:
        Path(name).chmod(0o755)  # munged refuses a socket in a folder that others cannot enter; pytest's own is closed to them
        with started(Path(name), cpus, memory_mb) as variables:
            yield variables


@contextmanager
def started(folder: Path, cpus: int, memory_mb: int) -> Iterator[dict[str, str]]:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().split(".")[0]
    configuration.write_text(CONFIGURATION.format(folder=folder, user=user, host=host, ports=free_ports(2), cpus=cpus, memory_mb=memory_mb))
    # Snakemake's jobs take every variable of Slurm's away before they call srun, which then looks for its configuration in /etc
    found_by = folder / "bin" / "srun"
    found_by.parent.mkdir()
    found_by.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {program("srun")} "$@"\n')
    found_by.chmod(0o755)
    variables = {"SLURM_CONF": str(configuration), "PATH": os.pathsep.join([str(found_by.parent), os.environ.get("PATH", "")])}
    munged = [f"--key-file={key}", *(f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed"))]
    commands = {
        "munged": [program("munged"), "--foreground", f"--socket={folder}/munge.socket", *munged],
        "slurmctld": [program("slurmctld"), "-D", "-i", "-f", str(configuration)],
        "slurmd": [program("slurmd"), "-D", "-f", str(configuration), "-N", host],
    }
    with ExitStack() as stack:
        for name, command in commands.items():
            stack.enter_context(daemon(name, command, folder, variables))
            if name == "munged":
                wait_for(lambda: (folder / "munge.socket").exists(), "munged's socket", folder)
        wait_for(lambda: "idle" in ask(["sinfo", "--noheader", "--format=%T"], variables), "an idle node", folder)
        try:
            yield variables
        finally:
            ask(["scancel", "--user", user], variables)  # what runs is ours: slurmd alone would leave it behind
            wait_for(lambda: not ask(["squeue", "--noheader"], variables).strip(), "the end of the last job", folder, check=False)


@contextmanager
def daemon(name: str, command: list[str], folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """A process in the foreground, ended with the block: asked to, and after ten seconds made to. It ends too where this process is killed."""
    command = [program("setpriv"), "--pdeathsig", "TERM", *command]
    with (folder / f"{name}.out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**os.environ, **variables})
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def program(name: str) -> str:
    """Path of a program; Debian keeps daemons where only root's PATH looks.

    Raises:
        ClusterError: it is not installed.
    """
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if found is None:
        raise ClusterError(f"{name} is not installed: `make test-slurm` installs the packages slurm-wlm and munge, as root or by sudo")
    return found


def ask(command: list[str], variables: dict[str, str]) -> str:
    """What a Slurm command prints; nothing while its daemon does not answer."""
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60).stdout


def wait_for(happened, what: str, folder: Path, seconds: float = 60, check: bool = True) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            if not check:
                return
            logs = {file.name: file.read_text()[-1500:] for file in (*folder.glob("*.log"), *folder.glob("*.out"))}
            raise ClusterError(f"no {what} after {seconds:g} s: " + "; ".join(f"{name}: {text}" for name, text in logs.items() if text))
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]
