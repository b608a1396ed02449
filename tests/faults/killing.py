"""SIGKILL at random times, half of them inside saves, and what must hold afterwards: nothing unloadable, all exact.

Real launches (`Lane`) of a tiny project train scene after scene; a `Hunt` kills a rank, all ranks, or the launcher with
everything, looks at the newest checkpoint after each kill, and lets the run go on to its end. Exact means: the rows
that every rank takes for every step, each loss, gradient norm and learning rate, and all weights and moments of every
checkpoint looked at, are bit by bit those of an uninterrupted run at the same world size. Nothing depends on timing:
where the machine is slow, moments are drawn from what its attempts were seen to take.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from launcher.run import ledger
from launcher.run.directory import MARKER, RunDirectory, parse_checkpoint_name
from launcher.run.files import read_lines
from launcher.trainer.checkpoint.verify import problems
from tests.jobs.make import descendants, lives, project, run_of, tensors_of

ROOT = Path(__file__).parents[2]
STEPS = 16
FIGURES = ("loss", "grad_norm", "lr", "tokens")  # of a line of metrics.jsonl; the rest are times
WHO = ("rank", "ranks", "launcher", "alone")
ORPHANS_S = 10.0
STUMBLES = 5  # hunts that could not even be carried out, after which it is enough
PATIENCE_S = 300.0
_NO_LIMIT = [
    f"cluster.restart.{kind}=1000000"
    for kind in ("node", "communication", "hang", "out_of_memory", "data", "unknown", "no_progress")
]


@dataclass(frozen=True, slots=True)
class Scene:
    """What is trained: strategy, ranks, and how it is saved.

    rehearse: whether a new run first rehearses a checkpoint
    """

    kind: str
    ranks: int
    asynchronous: bool = False
    every_steps: int = 1
    rehearse: bool = False

    @property
    def changes(self) -> list[str]:
        """Of the recipe."""
        return [
            f"strategy.kind={self.kind}",
            f"cluster.nproc_per_node={self.ranks}",
            f"train.global_batch_size={12 if self.ranks == 3 else 4 * max(1, self.ranks // 2)}",
            f"checkpoint.async_save={str(self.asynchronous).lower()}",
            f"checkpoint.every_steps={self.every_steps}",
            f"checkpoint.rehearse={str(self.rehearse).lower()}",
        ]


class Lane:
    """A launcher process that stays warm (`tests.faults.lane`); when it was killed, `ready` starts another."""

    def __init__(self, folder: Path) -> None:
        self.rows = folder / "rows"
        self.rows.mkdir(exist_ok=True)
        self._log = folder / "lane.log"
        self._process: subprocess.Popen[str] | None = None
        self._words: queue.Queue[dict[str, Any]] = queue.Queue()
        self.started: list[int] = []  # process ids of all ranks, in the order of their start

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def ready(self) -> None:
        """Be there, warm and idle."""
        if self._process is not None and self._process.poll() is None:
            return
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LAUNCHER_TEST_ROWS": str(self.rows),
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self._words, self.started = queue.Queue(), []
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.lane"], cwd=ROOT, env=environment, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._listen, args=(self._process, self._words, self.started), daemon=True).start()
        if self._answer(PATIENCE_S) is None:
            raise RuntimeError(f"no launcher: {self._log.read_text()[-3000:]}")

    def launch(self, recipe: Path, *changes: str) -> None:
        """Begin a launch; `answer` tells its end."""
        self.ready()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"recipe": str(recipe), "changes": changes}) + "\n")
        self._process.stdin.flush()

    def answer(self, wait_s: float = 0.0) -> tuple[int, str] | None:
        """Exit code of `launcher run` and what it said; None while it goes on."""
        found = self._answer(wait_s)
        return None if found is None else (int(found["code"]), str(found["said"]))

    def finish(self, recipe: Path, *changes: str) -> tuple[int, str]:
        """A launch that nobody disturbs."""
        self.launch(recipe, *changes)
        found = self.answer(PATIENCE_S)
        assert found is not None, f"no end within {PATIENCE_S:g} s"
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send the launcher a signal, as a shell or a scheduler would."""
        os.kill(self.pid, number)

    def kill(self, *, everything: bool) -> list[int]:
        """SIGKILL the launcher, and if `everything` all below it at once; what was below it."""
        assert self._process is not None
        below = descendants(self.pid)
        for pid in [self.pid, *(below if everything else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        return below

    def close(self) -> None:
        """End it with all that it started."""
        if self._process is not None and self._process.poll() is None:
            self.kill(everything=True)

    def _answer(self, wait_s: float) -> dict[str, Any] | None:
        try:
            return self._words.get(timeout=wait_s) if wait_s else self._words.get_nowait()
        except queue.Empty:
            return None

    @staticmethod
    def _listen(process: subprocess.Popen[str], words: queue.Queue[dict[str, Any]], started: list[int]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "rank" in said:
                started.append(said["rank"])
            else:
                words.put(said)


class Ground:
    """A recipe, a warm launcher, and what uninterrupted runs come to, each made when it is first asked for."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe, self.lane = recipe, Lane(folder)
        self._whole: dict[tuple[str, int], Whole] = {}

    def whole(self, scene: Scene) -> Whole:
        """The uninterrupted run beside which a scene is laid."""
        key = scene.kind, scene.ranks
        if key not in self._whole:
            self._whole[key] = Whole(self.recipe, self.lane, scene)
        return self._whole[key]

    def differences(self, name: str, scene: Scene, *, damaged: bool = False) -> list[str]:
        """What is not as in the uninterrupted run: every figure ever written, every row taken, the last state.

        damaged: whether checkpoints were, so that a bad one may be met
        """
        run, whole, found = run_of(self.recipe, name), self.whole(scene), []
        lines = figures(run)
        for line in lines:
            if [line[key] for key in FIGURES] != whole.figures[line["step"]]:
                found.append(f"step {line['step']} of attempt {line['attempt']} is another: {line}")
                break
        if (steps := {line["step"] for line in lines}) != set(whole.figures):
            found.append(f"steps with figures: {sorted(steps)}")
        for attempt in ledger.attempts(run):
            for line in recorded(self.lane, name, attempt.number):
                if line["rows"] != whole.rows[line["step"], line["rank"]]:
                    found.append(f"other rows in attempt {attempt.number}: {line}")
                    break
        newest, problem = look(run, whole)
        if problem or newest != STEPS:
            found.append(f"at the end: step {newest}; {problem}")
        logs = [] if damaged else run.path.glob("logs/*/*/0.log")
        bad = [str(log) for log in logs if "bad checkpoint" in log.read_text()]
        return found + [f"a bad checkpoint was met: {log}" for log in bad]

    def forget(self, name: str) -> None:
        """Remove a run."""
        shutil.rmtree(run_of(self.recipe, name).path, ignore_errors=True)
        for file in self.lane.rows.glob(f"{name}-a*"):
            file.unlink()


class Whole:
    """An uninterrupted run of a strategy and a number of ranks, with a checkpoint of every step."""

    def __init__(self, recipe: Path, lane: Lane, scene: Scene) -> None:
        self.name = f"whole-{scene.kind}-{scene.ranks}"
        scene = Scene(scene.kind, scene.ranks)
        code, said = lane.finish(recipe, f"run.name={self.name}", f"checkpoint.keep_last={STEPS}", *scene.changes)
        assert code == 0, said
        run = run_of(recipe, self.name)
        self.figures = {line["step"]: [line[key] for key in FIGURES] for line in figures(run)}
        assert list(self.figures) == list(range(1, STEPS + 1))
        assert len({values[0] for values in self.figures.values()}) == STEPS, "steps that cannot be told apart"
        self.states = {ref.step: digest(ref.path) for ref in ledger.valid_checkpoints(run)}
        assert list(self.states) == list(range(1, STEPS + 1))
        self.rows = {(line["step"], line["rank"]): line["rows"] for line in recorded(lane, self.name, 1)}
        assert set(self.rows) == {(step, rank) for step in range(STEPS) for rank in range(scene.ranks)}


@dataclass(slots=True)
class Pace:
    """What attempts of a scene were seen to take, in seconds: to their first figures, for a step, inside a save."""

    start_s: float = 1.0
    step_s: float = 0.1
    save_s: float = 0.02

    def see(self, name: str, seconds: float) -> None:
        setattr(self, name, 0.7 * getattr(self, name) + 0.3 * seconds)


@dataclass(slots=True)
class Tally:
    """What came of it.

    kills: (scene, who was killed, inside what) -> how many
    broken: sentences on promises that did not hold
    """

    kills: Counter[tuple[Scene, str, str]] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)
    runs: int = 0
    checked: int = 0
    orphans_s: float = 0.0

    @property
    def total(self) -> int:
        return self.kills.total()

    def inside(self, where: str = "save") -> int:
        return sum(count for (_, _, place), count in self.kills.items() if place == where)


class Hunt:
    """Kills on one ground until as many as wanted have hit; runs whose promise was broken are left there.

    Args:
        scenes: taken in turn, in an order that is drawn
        who: a weight for each of `WHO`: one rank, all ranks together, launcher and all below it, launcher alone
    """

    def __init__(
        self, ground: Ground, scenes: list[Scene], *, seed: object, who: tuple[int, ...] = (60, 32, 4, 4),
        tally: Tally | None = None,
    ) -> None:  # fmt: skip
        self.ground, self.recipe, self.lane, self.scenes, self.who = ground, ground.recipe, ground.lane, scenes, who
        self.tally, self.label = tally or Tally(), str(seed)
        self._chance = random.Random(f"kills-{seed}")
        self._pace: dict[tuple[str, int], Pace] = {}
        self._bag: list[Scene] = []
        self._stumbles = 0

    def go_on(self, enough: Callable[[Tally], bool]) -> Tally:
        """Run after run; the last one is let go on to its end without more kills."""
        while not enough(self.tally) and self._stumbles < STUMBLES:
            if not self._bag:
                self._bag = self._chance.sample(self.scenes, len(self.scenes))
            scene = self._bag.pop()
            try:
                self._one_run(scene, enough)
            except Exception:
                self._stumbles += 1
                self._broken(scene, "the hunt itself", traceback.format_exc())
                self.lane.close()
        return self.tally

    def _one_run(self, scene: Scene, enough: Callable[[Tally], bool]) -> None:
        whole, pace = self.ground.whole(scene), self._pace.setdefault((scene.kind, scene.ranks), Pace())
        name, reached, seen = f"shot-{self.label}-{self.tally.runs}", 0, 0
        self.tally.runs += 1
        run, broken = run_of(self.recipe, name), len(self.tally.broken)
        self._launch(name, scene)
        while True:
            who = self._chance.choices(WHO, self.who)[0] if not enough(self.tally) else "nobody"
            shot = Shot(self.lane, run, scene, pace, self._chance, seen, self._aim(), who)
            ended = shot.fire()
            seen = shot.attempt
            if shot.hit is not None:
                self.tally.kills[scene, shot.who, shot.hit] += 1
                reached = self._after(scene, run, whole, shot, reached)
            elif ended is not None and ended[0] != 0:
                self._broken(scene, name, f"ended by itself with {ended[0]}: {ended[1][-1500:]}")
                break
            if ended is not None and ended[0] == 0:
                break
            if ended is not None or shot.who in ("launcher", "alone"):
                self._launch(name, scene)
        for difference in self.ground.differences(name, scene):
            self._broken(scene, name, difference)
        if len(self.tally.broken) == broken:
            self.ground.forget(name)

    def _launch(self, name: str, scene: Scene) -> None:
        kept = "checkpoint.keep_last=3", "cluster.restart.backoff_s=0"
        self.lane.launch(self.recipe, f"run.name={name}", *scene.changes, *kept, *_NO_LIMIT)

    def _aim(self) -> bool:
        """Whether the next kill is meant for a save: as often as it takes for half of them to be inside one."""
        return 2 * self.tally.inside() <= self.tally.total

    def _after(self, scene: Scene, run: RunDirectory, whole: Whole, shot: Shot, reached: int) -> int:
        """Look at what a kill left; the step of its newest checkpoint."""
        if shot.below:
            begun = time.monotonic()
            while alive := [pid for pid in shot.below if lives(pid)]:
                if time.monotonic() - begun > ORPHANS_S:
                    self._broken(scene, run.name, f"orphans after {ORPHANS_S:g} s: {alive}")
                    for pid in alive:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    break
                time.sleep(0.01)
            self.tally.orphans_s = max(self.tally.orphans_s, time.monotonic() - begun)
        newest, problem = look(run, whole)
        self.tally.checked += newest > 0
        if problem:
            self._broken(scene, run.name, f"after attempt {shot.attempt}: {problem}")
        if newest < reached:
            self._broken(scene, run.name, f"step {reached} was committed, the newest checkpoint is of {newest}")
        least = max(shot.begun, shot.figured // scene.every_steps * scene.every_steps) - scene.every_steps
        if newest < least:
            told = f"a save of step {shot.begun} had begun, figures were written up to step {shot.figured}"
            self._broken(
                scene, run.name, f"more than one interval is lost: {told}, the newest checkpoint is of {newest}"
            )
        return max(reached, newest)

    def _broken(self, scene: Scene, name: str, what: str) -> None:
        self.tally.broken.append((f"{scene} {name}", what))


class Shot:
    """One attempt and the kill that is sent into it.

    seen: number of the attempt before, 0 for none
    aim: whether it is meant for the inside of a save
    who: who is killed, of `WHO`; anything else: nobody

    After `fire`: `attempt` is its number, `hit` inside what it was killed (None: it was not), `begun` the step of the
    save that had begun and was not committed, `figured` the last step with figures, `below` what must be gone.
    """

    def __init__(
        self, lane: Lane, run: RunDirectory, scene: Scene, pace: Pace, chance: random.Random, seen: int, aim: bool,
        who: str,
    ) -> None:  # fmt: skip
        self._lane, self._run, self._scene, self._pace, self._chance, self._aim = lane, run, scene, pace, chance, aim
        self.who, self.attempt = who, seen
        self.hit: str | None = None
        self.begun = self.figured = 0
        self.below: list[int] = []
        self._first = len(lane.started)
        self._ended: tuple[int, str] | None = None

    def fire(self) -> tuple[int, str] | None:
        """Wait for the moment and kill; the launch's end, where it has ended."""
        if not self._wait(self._attempt_begun):
            return self._ended
        self.attempt = max(self.attempt + 1, ledger.latest_attempt(self._run))
        if self.who not in WHO:
            self._wait(lambda: False)
            return self._ended
        if not self._wait(lambda: len(self._lane.started) > self._first):
            return self._ended
        if not (self._inside_a_save() if self._aim else self._any_time()):
            return self._ended
        self._kill()
        if self.who in ("rank", "ranks"):
            self._wait(lambda: ledger.latest_attempt(self._run) > self.attempt)
        return self._ended

    def _attempt_begun(self) -> bool:
        return ledger.latest_attempt(self._run) > self.attempt

    def _any_time(self) -> bool:
        """While the ranks start and load, or some steps later: in a step, or as it happens in a save."""
        lines = self._lines()
        if self._chance.random() < 0.4:
            due = time.monotonic() + self._chance.uniform(0, self._pace.start_s)
            return self._wait(lambda: time.monotonic() >= due)
        begun, steps = time.monotonic(), self._chance.randint(1, 5)
        if not self._wait(lambda: self._lines() > lines):
            return False
        first = time.monotonic()
        self._pace.see("start_s", first - begun)
        if not self._wait(lambda: self._lines() >= lines + steps):
            return False
        if steps > 1:
            self._pace.see("step_s", (time.monotonic() - first) / (steps - 1))
        due = time.monotonic() + self._chance.uniform(0, self._pace.step_s)
        return self._wait(lambda: time.monotonic() >= due, pause_s=0.001)

    def _lines(self) -> int:
        file = self._run.metrics_file
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def _inside_a_save(self) -> bool:
        """In one of the next saves, at a moment drawn from how long saves were seen to take."""
        wanted = self._chance.randint(1, 3)
        found: set[str] = set()
        now_open: list[tuple[str, float, float]] = []

        def there() -> bool:
            now, name = time.monotonic(), unfinished(self._run, self.attempt)
            if now_open and now_open[0][0] != name:  # committed before its moment came
                self._pace.see("save_s", now - now_open[0][1])
                now_open.clear()
            if name is not None and name not in found:
                found.add(name)
                if len(found) >= wanted:
                    now_open.append((name, now, now + self._chance.uniform(0, self._pace.save_s)))
            return bool(now_open) and now >= now_open[0][2]

        return self._wait(there, pause_s=0.0005)

    def _kill(self) -> None:
        ranks = self._lane.started[self._first :]
        if self.who in ("launcher", "alone"):
            self.below = self._lane.kill(everything=self.who == "launcher")
            hit = True
        else:
            hit = False
            for pid in [self._chance.choice(ranks)] if self.who == "rank" else ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hit = True
        if not hit:
            return  # it had just ended
        name = unfinished(self._run, self.attempt)
        steps = [line["step"] for line in figures(self._run) if line["attempt"] == self.attempt]
        self.figured = max(steps, default=0)
        if name is not None:
            self.begun = (parse_checkpoint_name(name) or (0, 0))[0]
            self.hit = "save"
        else:
            self.hit = "step" if steps else "start"

    def _wait(self, happened: Callable[[], bool], *, pause_s: float = 0.003) -> bool:
        """Whether it happened before the launch ended."""
        until = time.monotonic() + PATIENCE_S
        while not happened():
            if (ended := self._lane.answer()) is not None:
                self._ended = ended
                return False
            assert time.monotonic() < until, f"{self._run.path}: nothing happens any more"
            time.sleep(pause_s)
        return True


def unfinished(run: RunDirectory, attempt: int) -> str | None:
    """The folder of an attempt's save that is not committed; what is being removed is older than others."""
    newest: tuple[tuple[int, int], str] | None = None
    try:
        names = os.listdir(run.checkpoints)
    except FileNotFoundError:
        return None
    for name in names:
        if (key := parse_checkpoint_name(name)) and key[1] == attempt and (newest is None or key > newest[0]):
            newest = key, name
    if newest is None or (run.checkpoints / newest[1] / MARKER).exists():
        return None
    return newest[1]


def look(run: RunDirectory, whole: Whole) -> tuple[int, str]:
    """(step of the newest checkpoint, what is wrong with it), 0 where there is none; the next attempt may go on."""
    while True:
        if not (valid := ledger.valid_checkpoints(run)):
            return 0, ""
        newest = valid[-1]
        problem = "\n".join(problems(newest.path))
        rehearsed = newest.step == 0  # killed before it was removed; what is loaded from it shows at the run's end
        if not problem and not rehearsed and digest(newest.path) != whole.states[newest.step]:
            problem = f"{newest.path.name}: weights or moments are others than those of an uninterrupted run"
        if not problem or ledger.valid_checkpoints(run)[-1:] == [newest]:
            return newest.step, problem


def digest(checkpoint: Path) -> str:
    """Of all weights, moments and the step."""
    try:
        parts = tensors_of(checkpoint)
    except (AssertionError, FileNotFoundError):
        return "gone"
    found = xxhash.xxh3_128()
    for name, content in parts:
        found.update(name.encode())
        found.update(content)
    return found.hexdigest()


def figures(run: RunDirectory) -> list[dict[str, Any]]:
    """The logged steps of all attempts."""
    return [line for line in read_lines(run.metrics_file) if "loss" in line]


def recorded(lane: Lane, name: str, attempt: int) -> Iterator[dict[str, Any]]:
    """Which rows each rank of an attempt took."""
    return read_lines(lane.rows / f"{name}-a{attempt}")


def make_project(folder: Path) -> Path:
    """The recipe that all scenes change."""
    return project(
        folder, train={"max_steps": STEPS, "global_batch_size": 4, "precision": "fp32"},
        cluster={"preflight": False, "accelerator": "cpu", "nproc_per_node": 2},
    )  # fmt: skip


def every_scene(chance: random.Random) -> list[Scene]:
    """Four strategies on 1 to 4 ranks, saved synchronously and not; interval and rehearsal are drawn."""
    return [
        Scene(kind, ranks, asynchronous, chance.choice((1, 2, 3)), chance.random() < 0.3)
        for kind in ("ddp", "fsdp2", "zero2", "zero3")
        for ranks in (1, 2, 3, 4)
        for asynchronous in (False, True)
    ]
