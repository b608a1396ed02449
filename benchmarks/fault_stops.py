"""Stops that a job survives: SIGTERM and the time limit under a warm launcher; Slurm, Ray and pods as they really stop.

Each stop must leave a durable checkpoint of the last step within the grace time, and the run must end bit-equal to one
that was not stopped.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE_S = 30.0  # what Kubernetes and Slurm give a process between SIGTERM and SIGKILL, unless told otherwise
HERE = ("SIGTERM", "time limit")
CLUSTERS = ("Slurm: warning signal", "Slurm: scancel", "Slurm: preemption", "Ray: job stop", "Kubernetes: pod deletion")


@dataclass(slots=True)
class Stops:
    """What came of one way of stopping; seconds from the request to the end."""

    count: int = 0
    durable: int = 0
    exact: int = 0
    seconds: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        longest = round(max(self.seconds, default=0.0), 1)
        return {"stops": self.count, "durable": self.durable, "exact": self.exact, "longest s": longest}


def stop_here(how: str, ground: Any, *, times: int, seed: str, over: Callable[[], bool]) -> Stops:
    """Stop launches of a warm lane by a signal or by their time limit, at random times, four to a run."""
    from tests.faults.killing import every_scene
    from tests.jobs.make import run_of

    chance, stops, number = random.Random(f"{how}-{seed}"), Stops(), 0
    scenes = [scene for scene in every_scene(chance) if scene.ranks == 2]
    while stops.count < times and not over():
        scene = chance.choice(scenes)
        ground.whole(scene)
        name, code, of_this_run = f"stop-{how.replace(' ', '-')}-{number}", 75, 0
        run, number, newest = run_of(ground.recipe, name), number + 1, 0
        while code == 75:
            stopping = of_this_run < 4 and stops.count < times
            limit = ["cluster.time_limit_min=1", f"cluster.stop_lead_s={chance.choice((57, 58))}"]
            more = limit if stopping and how == "time limit" else []
            ground.lane.launch(ground.recipe, f"run.name={name}", *scene.changes, *more)
            asked = time.monotonic() + (2.5 if more else 0.0)
            if stopping and how == "SIGTERM":
                _some_steps(ground.lane, run, chance)
                asked = time.monotonic()
                ground.lane.signal(signal.SIGTERM)
            answer = ground.lane.answer(300)
            assert answer is not None, f"{name}: no end within 300 s"
            code = answer[0]
            if code not in (0, 75):
                stops.broken.append(f"{how}, {scene}: ended with {code}: {answer[1][-800:]}")
            if code == 75:
                of_this_run += 1
                newest = _judge(stops, how, run, newest, time.monotonic() - asked)
        differences = ground.differences(name, scene)
        stops.exact += of_this_run if not differences else 0
        stops.broken += [f"{how}, {scene}: {difference}" for difference in differences]
        if not differences:
            ground.forget(name)
    return stops


def _some_steps(lane: Any, run: Any, chance: random.Random) -> None:
    """Until a random one of the next steps, or a random time of the start; the launch may end before."""
    from tests.faults.killing import figures

    lines, wanted, begun = len(figures(run)), chance.randint(0, 4), time.monotonic()
    lived = len(lane.started)
    while time.monotonic() - begun < 120:
        if len(lane.started) > lived and len(figures(run)) >= lines + wanted:
            break
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.3))


def _judge(stops: Stops, how: str, run: Any, before: int, seconds: float) -> int:
    """Note one stop; the step of the newest checkpoint."""
    from launcher.run.ledger import attempts, valid_checkpoints
    from launcher.trainer.checkpoint.verify import problems

    stops.count += 1
    stops.seconds.append(seconds)
    last, valid = attempts(run)[-1], valid_checkpoints(run)
    newest = valid[-1].step if valid else 0
    said = f"{how}, {run.name}, attempt {last.number}"
    durable = (last.end_step or before) == newest >= before and not (valid and problems(valid[-1].path))
    stops.durable += durable and seconds <= GRACE_S
    if not durable:
        stops.broken.append(f"{said}: ended at step {last.end_step}, the newest checkpoint is of {newest}")
    if seconds > GRACE_S:
        stops.broken.append(f"{said}: {seconds:.0f} s from the request to the end, {GRACE_S:g} s are given")
    return newest


def stop_on_cluster(how: str, folder: Path, *, times: int, over: Callable[[], bool]) -> Stops:
    """Stop jobs of a real cluster; each stop is a run of its own, or one more restart of the same job."""
    kind, _, way = how.partition(": ")
    return {"Slurm": _on_slurm, "Ray": _on_ray, "Kubernetes": _in_pods}[kind](way, folder, times, over)


def _on_slurm(way: str, folder: Path, times: int, over: Callable[[], bool]) -> Stops:
    from launcher.run.ledger import attempts, valid_checkpoints
    from tests.slurm.make import Site
    from tests.slurm.testbed import install, slurm

    install()
    stops = Stops()
    with slurm(cpus=32) as cluster:
        site = Site(cluster, folder)
        for number in range(times):
            if over():
                break
            name = f"{way.replace(' ', '-')}-{number}"
            site.hold(name)
            job = site.submit(name)
            site.wait_until_held(name, job)
            begun = time.monotonic()
            if way == "warning signal":
                cluster.command("scancel", "--batch", "--signal=USR1", job)
            elif way == "scancel":
                cluster.command("scancel", job)
            else:
                urgent = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
                other = cluster.command("sbatch", "--parsable", *urgent)
                site.wait_for(other, "RUNNING")
            run = site.run(name)
            until_ended(run)
            _judge(stops, way, run, 0, time.monotonic() - begun)
            site.release(name)
            if way == "scancel":
                site.wait_for(job, "CANCELLED")
                job = site.submit(name)  # a person's cancel is for good, so a person starts it again
            elif way == "preemption":
                cluster.command("scancel", other)
            site.wait_for(job, "COMPLETED")
            _exact(stops, way, lambda name=name: site.assert_exact(name))
            assert len(attempts(run)) == 2
            assert valid_checkpoints(run)
        site.tidy()
    return stops


def _on_ray(way: str, folder: Path, times: int, over: Callable[[], bool]) -> Stops:
    from tests.ray.test_cluster import Site
    from tests.ray.testbed import RayCluster

    stops = Stops()
    with contextlib.closing(RayCluster(nodes=2)) as cluster:
        site = Site(cluster, folder)
        for number in range(times):
            if over():
                break
            name = f"stopped-{number}"
            site.hold(name)
            job = site.submit(name)
            site.wait_until_held(name, job)
            begun = time.monotonic()
            env = {**cluster.environment, "RAY_API_SERVER_ADDRESS": cluster.address}
            subprocess.run(["ray", "job", "stop", "--no-wait", job.id], env=env, check=True, capture_output=True)
            until_ended(site.run(name))
            _judge(stops, way, site.run(name), 0, time.monotonic() - begun)
            site.wait_for(job, "cancelled")
            site.release(name)
            site.wait_for(site.submit(name), "finished")
            _exact(stops, way, lambda name=name: site.assert_exact(name))
    return stops


def _in_pods(way: str, folder: Path, times: int, over: Callable[[], bool]) -> Stops:
    from launcher.run.ledger import valid_checkpoints
    from tests.jobs.make import finish, launcher, losses, project, run_of, tensors_of, until
    from tests.multiprocess.test_kubernetes_pods import STEPS, manifest, start
    from tests.netns import Machines, require

    require()
    stops = Stops()
    recipe = project(folder, train={"max_steps": STEPS}, checkpoint={"every_steps": None})
    finish(launcher("run", recipe, "run.name=local"), code=0)
    local = run_of(recipe, "local")
    with Machines(2) as machines:
        for number in range(times):
            if over():
                break
            name = f"pods-{number}"
            job, run = manifest(recipe, f"run.name={name}"), run_of(recipe, name)
            pods = start(machines, job, folder)
            until("some steps", lambda run=run, pods=pods: len(losses(run)) >= 3 or pods[0].poll() is not None)
            begun = time.monotonic()
            pods[number % 2].send_signal(signal.SIGTERM)
            codes = [pod.wait(timeout=900) for pod in pods]
            _judge(stops, way, run, 0, time.monotonic() - begun)
            if codes != [75, 75]:
                stops.broken.append(f"{way}, {name}: exit codes {codes}")
            for pod in start(machines, job, folder, restart=1):
                finish(pod, code=0, timeout_s=900)
            same = losses(run) == losses(local) and tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(
                valid_checkpoints(local)[-1].path
            )
            stops.exact += same
            if not same:
                stops.broken.append(f"{way}, {name}: another training than without the stop")
    return stops


def until_ended(run: Any) -> None:
    """Until the latest attempt has its `end` line."""
    from launcher.run.ledger import attempts
    from tests.jobs.make import until

    first = attempts(run)[0].number
    until("the end of the attempt", lambda: [a for a in attempts(run) if a.number == first and a.ended], timeout_s=300)


def _exact(stops: Stops, way: str, check: Callable[[], None]) -> None:
    try:
        check()
        stops.exact += 1
    except AssertionError as error:
        stops.broken.append(f"{way}: {str(error)[:500]}")
