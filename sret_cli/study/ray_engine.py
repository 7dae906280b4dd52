"""The Ray engine: actors on the nodes of a cluster, each with a pool of one worker process.

Ray places the actors, and places them again when a node is lost. The runs are claimed and resumed
in their directories, as by the other engines, so all nodes must see the same directory.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import DATA, SretError, first_line
from sret_cli.runtime.files import make_directory
from sret_cli.spec.run import Run
from sret_cli.study.engines import Board, EngineOptions
from sret_cli.study.paths import PATH_FIELDS
from sret_cli.study.pool import LOOK_SECONDS, STOP_SECONDS, Pool, take_rows
from sret_cli.study.ray_cluster import Plan, connected, import_ray, plan_jobs
from sret_cli.study.shares import divide
from sret_cli.study.worker import Work

PROBE_SECONDS = 60.0  # for nodes to start a process and look at the probe file
ANSWER_SECONDS = 10.0  # for an actor to answer; one that Ray has not placed yet does not


def run(work: Work, engine: EngineOptions, board: Board) -> None:
    """Does the runs of a study by actors of a Ray cluster.

    Raises:
        SretError: there is no Ray or no cluster, or an error that would fail every run.
    """
    ray = import_ray()
    work = with_absolute_paths(work)
    left = {run.run_id: run for run in work.study.runs}
    take_rows(work, left, board.on_end)
    board.on_look()
    if left:
        with connected(ray, engine.address), probe_file(work.root) as probe:
            Actors(ray, work, engine, board, probe).do(left)


def with_absolute_paths(work: Work) -> Work:
    """The work with paths that mean the same in a process with another working directory."""
    runs = []
    for run in work.study.runs:
        if run.train is not None:
            paths = {field: getattr(run.train, field) for field in PATH_FIELDS}
            known = {k: os.path.expanduser(v) for k, v in paths.items() if isinstance(v, str)}
            places = {k: os.path.abspath(v) for k, v in known.items() if os.path.exists(v)}
            run = replace(run, train=run.train.model_copy(update=places))
        runs.append(run)
    return replace(work, study=replace(work.study, runs=tuple(runs)), root=work.root.absolute())


@contextmanager
def probe_file(root: Path) -> Iterator[Path]:
    """A new file in the directory of all runs, by which a node tells whether it sees it."""
    path = make_directory(root) / f".probe-{uuid.uuid4().hex}"
    path.write_text(path.name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def sees(probe: Path) -> bool:
    """Whether this node sees the probe file."""
    try:
        return probe.read_text() == probe.name
    except OSError:
        return False


class Worker:
    """An actor: does runs in a process of its own, with the CPUs and GPUs that Ray gave it."""

    def __init__(self) -> None:
        self.is_stopping = False

    def do_runs(
        self, work: Work, engine: EngineOptions, cpus: int, probe: Path
    ) -> SretError | str | None:
        """Does runs until each has a row; returns an error, or the node's id if it is blind."""
        import ray

        if not sees(probe):
            return str(ray.get_runtime_context().get_node_id())
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        device = "cuda" if gpus else "cpu"
        share = divide(
            1, device, gpus, engine.gpus_per_run, loaders=work.options.workers, cpus=cpus
        )
        work = replace(work, options=replace(work.options, device=device))
        try:
            Pool(work, share, lambda run, row: None, self._look, engine.retries).run()
        except SretError as error:
            return error
        except Stopped:
            pass
        return None

    def _look(self) -> None:
        if self.is_stopping:
            raise Stopped

    def stop(self) -> None:
        """Lets the run under way save its state and end."""
        self.is_stopping = True


class Stopped(Exception):
    """The command was interrupted, or all runs have rows."""


class Actors:
    """The actors of a command."""

    def __init__(
        self, ray: Any, work: Work, engine: EngineOptions, board: Board, probe: Path
    ) -> None:
        self.ray, self.work, self.engine, self.board = ray, work, engine, board
        self.probe = probe
        self.blind: list[str] = []  # ids of nodes that do not see the runs' directory
        self.tasks: dict[Any, Any] = {}  # what actors do, and the actors

    def do(self, left: dict[str, Run]) -> None:
        """Does the runs that are left; returns when each has a row.

        Raises:
            SretError: an error that would fail every run, or no node can be used.
        """
        plan = plan_jobs(self._usable_nodes(), self.engine, self.work.options.device, len(left))
        parts = f"{plan.cpus} CPUs" + f" and {plan.gpus:.2g} GPUs" * bool(plan.gpus)
        self.board.note(f"{plan.jobs} runs at a time ({plan.why}), each with {parts}")
        try:
            for _ in range(plan.jobs):
                self._start(plan)
            while left:
                time.sleep(LOOK_SECONDS)  # not in ray.wait, where a signal loses its exit code
                ended, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
                take_rows(self.work, left, self.board.on_end)
                self.board.on_look()
                for task in ended:
                    self._handle_end(task, plan)
                if left and not self.tasks:
                    self._start(plan)  # a row was removed meanwhile, or is not seen here yet
        finally:
            self._stop()

    def _usable_nodes(self) -> list[dict[str, float]]:
        """The resources of the nodes that see the runs' directory; the others are named.

        Raises:
            SretError: no node sees it.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self.ray.remote(sees)
        tasks = {}
        for node in self.ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": here}
                tasks[look.options(**options).remote(self.probe)] = node
        self.ray.wait(list(tasks), num_returns=len(tasks), timeout=PROBE_SECONDS)
        usable = []
        for task, node in tasks.items():
            try:
                if self.ray.get(task, timeout=0):
                    usable.append(node["Resources"])
                    continue
                self._exclude(node["NodeID"], f"it does not see {self.work.root}")
            except self.ray.exceptions.RayError as error:
                self._exclude(node["NodeID"], str(error).strip().splitlines()[-1])
        if not usable:
            raise SretError(
                f"no node of the cluster can use {self.work.root}; choose a directory that all "
                "nodes share, by --runs",
                DATA,
            )
        return usable

    def _exclude(self, node_id: str, reason: str) -> None:
        self.blind.append(node_id)
        (node,) = (node for node in self.ray.nodes() if node["NodeID"] == node_id)
        where = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node_id[:8]})"
        self.board.note(f"node {where} is not used: {reason}")

    def _start(self, plan: Plan) -> None:
        elsewhere = {"ray.io/node-id": f"!in({','.join(self.blind)})"}
        actor = (
            self.ray.remote(Worker)
            .options(
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=2,
                label_selector=elsewhere if self.blind else None,
            )
            .remote()
        )
        task = actor.do_runs.remote(self.work, self.engine, plan.cpus, self.probe)
        self.tasks[task] = actor

    def _handle_end(self, task: Any, plan: Plan) -> None:
        """An actor has ended: all runs have rows, or others do them; or with an error.

        Raises:
            SretError: an error that would fail every run.
        """
        self.tasks.pop(task)
        try:
            outcome = self.ray.get(task)
        except self.ray.exceptions.RayActorError as error:
            raise SretError(f"an actor of the Ray cluster ended: {first_line(error)}", 1) from None
        if isinstance(outcome, SretError):
            raise outcome
        if outcome is not None:  # a node that joined the cluster later
            self._exclude(outcome, f"it does not see {self.work.root}")
            self._start(plan)

    def _stop(self) -> None:
        """Lets the runs under way save their state and end."""
        answers = {actor.stop.remote(): task for task, actor in self.tasks.items()}
        if answers:
            placed, _ = self.ray.wait(
                list(answers), num_returns=len(answers), timeout=ANSWER_SECONDS
            )
            tasks = [answers[answer] for answer in placed]
            if tasks:
                self.ray.wait(tasks, num_returns=len(tasks), timeout=STOP_SECONDS)
