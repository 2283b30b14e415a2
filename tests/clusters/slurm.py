"""A Slurm cluster of two nodes on this machine's loopback, all of whose files are in one folder.

Both nodes are this machine; their names, ``n1`` and ``n2``, resolve nowhere. Debian's Slurm can do this
(``--enable-multiple-slurmd``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.distributed.launching import ENVIRONMENT, wait_until

__all__ = ["PROGRAMS", "Slurm", "missing", "slurm_cluster"]

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scancel", "scontrol", "squeue", "sinfo", "setpriv")
STARTING_SECONDS = 30.0
ENDING_SECONDS = 20.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# config_overrides: a node may have more CPUs than the machine. NoInAddrAny: the daemons listen on loopback alone.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
CommunicationParameters=NoAddrCache,NoInAddrAny,NoCtldInAddrAny
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 OverSubscribe=NO
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 OverSubscribe=NO
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons run as root"


class Slurm:
    """A running cluster.

    Args:
        folder: Where its files are.
        environment: That of a user of the cluster.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def run(
        self, *words: object, cwd: Path | None = None, timeout_seconds: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of a user of the cluster to its end."""
        return subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def submit(self, script: Path, *options: object) -> str:
        """Hand a batch script over; return the number of the job, whose output is ``job-NUMBER.out`` beside it."""
        where = ["--chdir", script.parent, "--output", script.parent / "job-%j.out", "--open-mode=append"]
        done = self.run("sbatch", "--parsable", *where, *options, script)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: ``JobState``, ``Reason``, ``Restarts``, ..."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def finish(self, job: str, *, limit_seconds: float = 240.0) -> str:
        """Wait until the job has ended, and return how; one that was requeued begins after three seconds.

        By itself after two minutes. At once would be too early: the credential of its first part is still revoked.
        """
        deadline, hurried = time.monotonic() + limit_seconds, set()
        while (shown := self.show(job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"job {job} is {shown} after {limit_seconds} s"
            is_waiting = shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime"
            if is_waiting and shown["Restarts"] not in hurried:
                hurried.add(shown["Restarts"])
                self.run("scontrol", "update", f"jobid={job}", "StartTime=now+3")
            time.sleep(0.2)  # each look starts a program
        return shown["JobState"]

    def end_all(self) -> None:
        """End all jobs, and wait until they have."""
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root")
        self.run("scancel", "--user=root")
        wait_until(lambda: not self.run("squeue", "--noheader").stdout.strip(), "all jobs end", limit_seconds=60.0)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Start a cluster in this folder; end all of it on leaving."""
    ports = free_ports(3)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=ports))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    slurm = Slurm(folder, {**ENVIRONMENT, "SLURM_CONF": str(configuration)})
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(daemon(munged, slurm))
        wait_until(lambda: (folder / "munge.socket").exists(), "munged listens", limit_seconds=STARTING_SECONDS)
        stack.enter_context(daemon(["slurmctld", "-D", "-f", configuration], slurm))
        for node in ("n1", "n2"):
            stack.enter_context(daemon(["slurmd", "-D", "-N", node, "-f", configuration], slurm))
        idle = ["sinfo", "--noheader", "--partition=debug", "--states=idle", "--responding", "--format=%D"]
        wait_until(lambda: slurm.run(*idle).stdout.strip() == "2", "both nodes are up", limit_seconds=STARTING_SECONDS)
        stack.callback(slurm.end_all)
        yield slurm


@contextlib.contextmanager
def daemon(command: Sequence[object], slurm: Slurm) -> Iterator[None]:
    """Run a program that does not end by itself; end it on leaving."""
    log = slurm.folder / "daemons.log"
    with log.open("a") as output:
        # It ends with pytest too, should that be killed.
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *(str(word) for word in command)],
            env=slurm.environment,
            cwd=slurm.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]
