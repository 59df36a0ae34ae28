"""A SLURM cluster on this machine for the length of a test session: daemons, nodes, and their end.

Two nodes, each a `slurmd` with a host name and a network address of its own in namespaces of its
own, joined by a bridge, so that a link can be cut. Where namespaces may not be made, both share the
host's, and the tests that need a cable are skipped. No systemd, no cgroups, no accounting; nothing
outside one temporary folder but the interfaces and two lines of /etc/hosts, which go again.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
COMMANDS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
HOSTS = Path("/etc/hosts")


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts jobs as other users, and so has to be root"
    return None


def call(*command: str, **env: str) -> str:
    """Run a command that has to succeed; its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel hands out."""
    found: list[int] = []
    port = 20000 + os.getpid() % 5000
    while len(found) < count:
        port += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


def wait_for(done: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Wait until something is true; fails with `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not after {seconds:.0f} s: {what()}"
        time.sleep(0.2)


@dataclass
class Cluster:
    """Nodes n1 and n2.

    Args:
        folder: of everything.
    """

    folder: Path
    has_links: bool = False
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    tag: str = field(default_factory=lambda: f"{os.getpid() % 65536:04x}")

    def __post_init__(self) -> None:
        self.folder.chmod(0o755)
        self.net = f"10.{20 + os.getpid() % 200}.{os.getpid() // 200 % 250}"
        self.has_links = self._make_links()
        for name in ("munge", "state", "log", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "log").chmod(0o700)
        self._write_hosts()
        self._write_config()
        self._start_daemons()

    # ---- making

    def _make_links(self) -> bool:
        try:
            call("ip", "link", "add", f"slb{self.tag}", "type", "bridge")
            call("ip", "addr", "add", f"{self.net}.254/24", "dev", f"slb{self.tag}")
            call("ip", "link", "set", f"slb{self.tag}", "up")
            for i in (1, 2):
                space, cable = f"sl{self.tag}-n{i}", f"slv{self.tag}-{i}"
                call("ip", "netns", "add", space)
                call("ip", "link", "add", cable, "type", "veth", "peer", "eth0", "netns", space)
                call("ip", "link", "set", cable, "master", f"slb{self.tag}", "up")
                call("ip", "-n", space, "addr", "add", f"{self.net}.{i}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    call("ip", "-n", space, "link", "set", device, "up")
        except (AssertionError, OSError):
            self._remove_links()
            return False
        return True

    def _remove_links(self) -> None:
        for command in (
            ("netns", "del", f"sl{self.tag}-n1"),
            ("netns", "del", f"sl{self.tag}-n2"),
            ("link", "del", f"slb{self.tag}"),
        ):
            subprocess.run(["ip", *command], capture_output=True)

    def _address(self, node: int) -> str:
        return f"{self.net}.{node}" if self.has_links else "127.0.0.1"

    def _write_hosts(self) -> None:
        lines = "".join(f"{self._address(i)} n{i} # {self.folder}\n" for i in (1, 2))
        HOSTS.write_text(HOSTS.read_text().rstrip("\n") + "\n" + lines)

    def _remove_hosts(self) -> None:
        # in place: in a container the file may be mounted
        rest = [x for x in HOSTS.read_text().splitlines(True) if f"# {self.folder}" not in x]
        HOSTS.write_text("".join(rest))

    def _write_config(self) -> None:
        here, folder = socket.gethostname().split(".")[0], self.folder
        controller, *ports = free_ports(3)
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{here}({self.net}.254)" if self.has_links else f"{here}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            # a requeued job waits until its credential has expired: two minutes by default
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool.%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
            "SlurmctldLogFile": f"{folder}/log/slurmctld",
            "SlurmdLogFile": f"{folder}/log/slurmd.%n",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            # a node may say that it has more than the machine
            "SlurmdParameters": "config_overrides",
            "PropagateResourceLimits": "NONE",
            "ReturnToService": 2,
            "JobRequeue": 1,
            "MessageTimeout": 5,
            "SlurmdTimeout": 20,
            "MinJobAge": 3600,
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,bf_interval=2",
            "MailProg": "/bin/true",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for i, port in enumerate(ports, start=1):
            host = f"n{i}" if self.has_links else here
            lines.append(
                f"NodeName=n{i} NodeHostname={host} NodeAddr={self._address(i)} Port={port} CPUs=4 "
                "RealMemory=1000 State=UNKNOWN"
            )
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        self.config = folder / "slurm.conf"
        self.config.write_text("\n".join(lines) + "\n")

    def _start_daemons(self) -> None:
        munge = self.folder / "munge"
        call("mungekey", "--create", "--keyfile", str(munge / "key"))
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={munge}/key",
            f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
            f"--log-file={self.folder}/log/munged",
        )  # fmt: skip
        wait_for((munge / "socket").exists, 10, lambda: "munged is not there")
        self._spawn("slurmctld", "-D", "-f", str(self.config))
        for i in (1, 2):
            self.start_node(i)
        wait_for(self.is_idle, 60, lambda: f"nodes are not idle: {self.run('sinfo', '-N')}")

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log" / f"{Path(command[0]).name}.out").open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env=os.environ | {"SLURM_CONF": str(self.config)},
            )  # fmt: skip
        self.started.append(process)
        return process

    def start_node(self, node: int) -> None:
        """Start a node's daemon, in its namespaces where it has any."""
        slurmd = ("slurmd", "-D", "-f", str(self.config), "-N", f"n{node}")
        if not self.has_links:
            self._spawn(*slurmd)
            return
        # not `ip netns exec`, whose fresh /sys has no cgroups, without which slurmd does not start
        self._spawn(
            "nsenter", f"--net=/run/netns/sl{self.tag}-n{node}", "unshare", "--uts", "sh", "-c",
            f"hostname n{node} && exec \"$@\"", "sh", *slurmd,
        )  # fmt: skip

    def close(self) -> None:
        """End everything."""
        subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=20)
        for node in (1, 2):
            self.kill_node(node)
        for process in reversed(self.started):
            process.terminate()
        for process in self.started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.has_links:
            self._remove_links()
        self._remove_hosts()

    # ---- using

    @property
    def env(self) -> dict[str, str]:
        """The environment of SLURM's commands and of jobs."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        return kept | {
            "SLURM_CONF": str(self.config),
            "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *command: str) -> str:
        """A SLURM command's output."""
        return call(*command, **self.env)

    def is_idle(self) -> bool:
        """Whether both nodes are up and have nothing to do."""
        return self.run("sinfo", "-hN", "-o", "%T").split() == ["idle", "idle"]

    def submit(self, *args: str) -> "Job":
        """Submit, as `sbatch ARGS` does."""
        name = f"{len(list(self.folder.glob('*.txt')))}.txt"
        output = self.folder / name
        output.touch()
        said = self.run("sbatch", f"--output={output}", *args)
        return Job(self, re.findall(r"\d+", said)[-1], output)

    def processes(self, node: int) -> list[int]:
        """Processes in a node's network namespace: its daemon, and what that started."""
        wanted = os.stat(f"/run/netns/sl{self.tag}-n{node}").st_ino
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "ns" / "net").stat().st_ino == wanted:
                    found.append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue
        return found

    def kill_node(self, node: int) -> None:
        """Kill everything on a node at once, as a power cut does."""
        if self.has_links:
            for pid in self.processes(node):
                os.kill(pid, signal.SIGKILL)

    def cut(self, node: int) -> None:
        """Pull a node's cable."""
        call("ip", "link", "set", f"slv{self.tag}-{node}", "down")

    def mend(self, node: int) -> None:
        """Plug a node's cable in again."""
        call("ip", "link", "set", f"slv{self.tag}-{node}", "up")


@dataclass
class Job:
    """A job that was submitted.

    Args:
        cluster: where.
        id: its number.
        output: what it prints, of all its starts.
    """

    cluster: Cluster
    id: str
    output: Path

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()

    def facts(self) -> dict[str, str]:
        """What SLURM says of it."""
        said = self.cluster.run("scontrol", "show", "job", self.id)
        return dict(part.split("=", 1) for part in said.split() if "=" in part)

    @property
    def state(self) -> str:
        """For example RUNNING."""
        return self.facts()["JobState"]

    def _story(self) -> str:
        return f"job {self.id} is {self.state}, and printed:\n{self.text}"

    def wait_for_text(self, text: str, seconds: float = 400) -> None:
        """Wait until it has printed this."""
        wait_for(lambda: text in self.text, seconds, lambda: f"{text!r}; {self._story()}")

    def wait(self, seconds: float = 600) -> str:
        """Wait until it has ended for good; its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.state in over, seconds, self._story)
        return self.state

    def signal(self, name: str) -> None:
        """Send a signal to its processes, as `--signal` does some time before the end."""
        self.cluster.run("scancel", f"--signal={name}", self.id)

    def cancel(self) -> None:
        """End it, and wait until both nodes are free again."""
        self.cluster.run("scancel", self.id)
        wait_for(self.cluster.is_idle, 90, self._story)
