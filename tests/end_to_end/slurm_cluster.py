"""A real Slurm of one node in a folder: `with SlurmCluster(folder) as cluster`.

Slurm's own daemons run as this user, on free ports, with a key of their own. Nothing outside the
folder is written. Debian and Ubuntu have them in the packages slurm-wlm and munge.
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CPUS = 2  # of the node; as many tasks run at a time
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_daemons() -> list[str]:
    """The daemons of Slurm that are not installed."""
    return [name for name in DAEMONS if program(name) is None]


def program(name: str) -> str | None:
    """The path of a program, also of one that only root has on its path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class SlurmCluster:
    """The daemons of a cluster; `environment` is what Slurm's commands need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes = ExitStack()

    def __enter__(self) -> "SlurmCluster":
        with ExitStack() as undo:
            undo.push(self.processes)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.processes.close()

    def command(self, *arguments: object) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            env=os.environ | self.environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        config = CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            controller_port=free_port(),
            node_port=free_port(),
            cpus=CPUS,
        )
        (self.folder / "slurm.conf").write_text(config)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid"}
        files |= {"seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        self._start_daemon("munged", "--foreground", "--force", *options)
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start_daemon("slurmctld", "-D", "-c")
        self._start_daemon("slurmd", "-D")
        self._wait_for(self._is_idle, "slurmd")

    def _start_daemon(self, name: str, *options: str) -> None:
        path = program(name)
        assert path is not None
        with open(self.folder / f"{name}.out", "wb") as out:
            process = subprocess.Popen(
                [path, *options],
                stdout=out,
                stderr=out,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        self.processes.callback(process.wait)
        self.processes.callback(process.terminate)

    def _is_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%T"],
            capture_output=True,
            text=True,
            env=os.environ | self.environment,
        )
        return done.stdout.strip() == "idle"

    def _wait_for(self, condition, name: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            if time.monotonic() > deadline:
                told = (self.folder / f"{name}.out").read_text()[-2000:]
                raise RuntimeError(f"{name} did not start: {told}")
            time.sleep(0.1)
