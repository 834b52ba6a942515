"""A Slurm of two nodes on this machine: Debian's own daemons on loopback, with ports, keys and state of their own."""

from __future__ import annotations

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# What a job inherits is what sbatch was called with; a rank must not take itself for one of another job.
_NOT_INHERITED = re.compile(r"(SLURM|SBATCH|SRUN|PMI|REMIT)_?|(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT)$")
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
# Seconds after which something that is waited for will not come any more, also where the machine has other work.
PATIENCE = 900.0
# Seconds that a requeued job waits, of Slurm's two minutes. A node refuses whatever is signed in the second in which it
# has ended the job, and Slurm then takes the job for failed.
_BEFORE_A_NEW_START = 5.0

_SLURM_CONF = """
ClusterName=remit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
ReturnToService=1
KillWait=30
MinJobAge=7200
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=300
SlurmdTimeout=0
UnkillableStepTimeout=300
SchedulerParameters=sched_interval=2,batch_sched_delay=1,sched_min_interval=100000,bf_interval=5
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=2 RealMemory=1000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO
"""


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that are free on loopback, below the ephemeral ones."""
    for first in range(16800, 20000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports for slurmctld and slurmd")


def environment_of(pid: int) -> dict[bytes, bytes]:
    """What a process was started with; OSError where it is gone."""
    pairs = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    return dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)


class Job:
    """A job that was submitted.

    Args:
        cluster: where.
        id: of the job, or of one task of an array (``7_2``).
        log: what it writes.
    """

    def __init__(self, cluster: Cluster, id: str, log: Path):
        self.cluster, self.id, self.log = cluster, id, log
        self._seen: dict[str, str] = {}
        self._eligible_after: float | None = None

    def fields(self) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        shown = self.cluster.call("scontrol", "--oneliner", "show", "job", self.id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self) -> str:
        return self.fields()["JobState"]

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, what: Callable[[], Any], *, name: str, seconds: float = PATIENCE) -> Any:
        """Waits until ``what`` gives something true, which it returns. A requeued job starts again in seconds.

        Raises:
            AssertionError: the job has ended before, or ``seconds`` are over; with its log.
        """
        deadline, look = time.monotonic() + seconds, 0.0
        while not (found := what()):
            if time.monotonic() >= look:
                ended = self._seen.get("JobState") in _FINAL
                self._seen = self.fields()
                self._start_soon()
                # Asked once more: what was waited for may be what ended it.
                if ended or time.monotonic() > deadline:
                    self.cluster.call("scancel", "--full", "--signal=KILL", self.id, check=False)
                    text = f"no {name}; {self._seen['JobState']} after {seconds - deadline + time.monotonic():.0f} s"
                    raise AssertionError(f"job {self.id}: {text}\n{self.said()[-6000:]}\n{self.cluster.logs()}")
                look = time.monotonic() + 1.0
            time.sleep(0.1)
        return found

    def _start_soon(self) -> None:
        """A requeued job starts after a few of its 120 seconds."""
        if self._seen["JobState"] != "PENDING" or self._seen.get("Reason") != "BeginTime":
            self._eligible_after = None
        elif self._eligible_after is None:
            self._eligible_after = time.monotonic() + _BEFORE_A_NEW_START
        elif time.monotonic() >= self._eligible_after:
            self.cluster.call("scontrol", "update", f"jobid={self.id}", "StartTime=now", check=False)

    def end(self) -> tuple[str, int]:
        """Waits for the end; gives state and exit code (of the script, or 128 + the signal that ended it)."""
        self._seen = {}
        self.until(lambda: self._seen.get("JobState") in _FINAL, name="end")
        code, number = map(int, self._seen["ExitCode"].split(":"))
        return self._seen["JobState"], 128 + number if number else code

    def wait_for(self, text: str, *, times: int = 1) -> None:
        """Until the log has ``text`` so many times."""
        self.until(lambda: self.said().count(text) >= times, name=f"{text!r} in the log")

    def update(self, *words: str) -> None:
        """Changes a setting of the job, as its owner does."""
        self.cluster.call("scontrol", "update", f"jobid={self.id}", *words)

    @contextmanager
    def held(self, *, ranks: int = 4) -> Iterator[dict[int, int]]:
        """Every rank stands still meanwhile, so that what is done to the job is done at this step, however slow the
        machine is; gives the process of each."""
        pids = self.pids()
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        assert len(pids) == ranks, f"job {self.id}: found ranks {sorted(pids)}\n{self.said()[-6000:]}"
        try:
            yield pids
        finally:
            for pid in pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def signal(self, name: str) -> None:
        """To every rank, as Slurm's ``--signal`` and a preemption do; not to the batch script."""
        self.cluster.call("scancel", f"--signal={name}", self.id)

    def pids(self) -> dict[int, int]:
        """Process of each rank, by its number."""
        wanted = {b"SLURM_JOB_ID": self.id.encode(), b"SLURM_STEP_ID": b"0"}
        # Another Slurm on this machine has jobs of the same numbers.
        wanted[b"SLURM_CONF"] = self.cluster.environment["SLURM_CONF"].encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                values = environment_of(int(entry.name))
                # Not the batch script, nor srun.
                if any(values.get(name) != value for name, value in wanted.items()):
                    continue
                command = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                # Nor what a rank has forked (data workers).
                name = (Path("/proc") / str(parent) / "comm").read_text().strip()
            except OSError:
                continue
            if any(word.endswith(b"/remit") for word in command) and name.startswith("slurmstepd"):
                found[int(values[b"SLURM_PROCID"])] = int(entry.name)
        return found


class Cluster:
    """slurmctld, two slurmd (n1, n2; two CPUs and two GPUs in name only each) and munged, under one folder.

    Args:
        folder: empty; its path is short, because a socket is in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not _NOT_INHERITED.match(k)}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "REMIT_CONTAINER": ""}
        path = f"{REPOSITORY / '.venv' / 'bin'}:{self.environment['PATH']}:/usr/sbin:/sbin"
        self.environment["PATH"] = path
        missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
        if missing:
            raise RuntimeError(f"found no {', '.join(missing)}; expected slurm-wlm and munge (scripts/test_cluster.sh)")

    def start(self) -> None:
        """Brings the daemons up and waits until both nodes are idle."""
        folder = self.folder
        folder.mkdir(exist_ok=True)
        # munged and slurmctld refuse what others could have written.
        folder.chmod(0o755)
        (folder / "state").mkdir(mode=0o700)
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "plugstack.conf").write_text("")
        for number in range(2):
            (folder / f"gpu{number}").symlink_to("/dev/null")  # a device, or Slurm does not say which GPU a task has
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
        port = _free_ports(3)
        text = _SLURM_CONF.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            controller_port=port,
            node_ports=f"{port + 1}-{port + 2}",
        )
        (folder / "slurm.conf").write_text(text)
        self.call(
            "munged",
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
            "--force",
        )
        self.call("slurmctld", "-c")
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            self.call("slurmd", "-N", node)
        deadline = time.monotonic() + PATIENCE / 3
        while self.call("sinfo", "--noheader", "--format=%T %D", check=False).split() != ["idle", "2"]:
            if time.monotonic() > deadline:
                raise RuntimeError("Slurm's nodes do not come up\n" + self.logs())
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends every job and every daemon, by the numbers in their own files."""
        if (self.folder / "slurmctld.pid").exists():
            self.clear()
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
            file = self.folder / f"{name}.pid"
            if not file.exists():
                continue
            pid = int(file.read_text())
            deadline, number = time.monotonic() + 15, signal.SIGTERM
            while Path(f"/proc/{pid}").exists():
                os.kill(pid, number)
                time.sleep(0.2)
                if time.monotonic() > deadline:
                    number = signal.SIGKILL

    def clear(self) -> None:
        """Ends every job, and waits until the nodes are free."""
        user = ("--user", getpass.getuser())
        self.call("scancel", "--full", "--signal=KILL", *user, check=False)
        self.call("scancel", *user, check=False)
        deadline = time.monotonic() + PATIENCE / 3
        while self.call("squeue", "--noheader", *user, check=False) and time.monotonic() < deadline:
            time.sleep(0.3)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-20:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def call(self, *words: object, check: bool = True, variables: dict[str, str] | None = None) -> str:
        """Runs a program with Slurm's environment and ``variables``; gives what it printed."""
        command, environment = [str(word) for word in words], self.environment | (variables or {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout.strip()

    def submit(
        self,
        script: str,
        *words: object,
        log: Path,
        options: tuple[str, ...] = (),
        nodes: int = 2,
        tasks: int = 2,
        gpus: str = "node",
        variables: dict[str, str] | None = None,
    ) -> Job:
        """Submits ``scripts/slurm/NAME.sbatch`` from the repository, with ``tasks`` ranks on each of ``nodes``.

        Args:
            script: its name.
            words: behind it.
            gpus: ``node`` asks for the GPUs of a node at once, ``task`` for one for each task alone.
            variables: of its environment.
        """
        size = (f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1")
        if gpus == "task":
            size = (*size, "--gpus-per-task=1")
        command = ["sbatch", "--parsable", f"--output={log}", *size, *options]
        said = self.call(*command, f"scripts/slurm/{script}.sbatch", *words, variables=variables)
        return Job(self, said.split(";")[0], log)

    def node(self, name: str, *, down: bool) -> None:
        """Sets a node down, as an operator or a health check does, or up again once it has let go of its job."""
        words = ("state=down", "reason=test") if down else ("state=resume",)
        deadline = time.monotonic() + PATIENCE / 3
        while True:
            try:
                self.call("scontrol", "update", f"nodename={name}", *words)
                return
            except RuntimeError:  # a node that is still ending a job
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
