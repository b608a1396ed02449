"""Watches the ranks of one attempt on this node: one that stands still ends the attempt, one that is slow is named.

Each node looks at its own ranks. Where there are several, node 0 judges over all, because in a collective every rank
stands still: what nodes tell each other travels with the beats of `launcher.jobs.meeting`.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.jobs import evidence, scratch
from launcher.jobs.ending import Ending
from launcher.jobs.evidence import Evidence
from launcher.jobs.meeting import BEAT_S, Meeting
from launcher.jobs.stragglers import GROUPS, Straggler, stragglers
from launcher.recipe.schema.cluster import Cluster
from launcher.run.control import Outcome, write_outcome
from launcher.run.directory import RunDirectory
from launcher.run.files import append_line
from launcher.run.heartbeat import ENVIRONMENT, GROUP, PHASES, Beat, Pace, Pulse, ranks_in

FLOOR_S = 300.0  # auto: storage and networks stall for minutes without being lost
TIMES = 10.0  # auto: the slowest of the recent steps, so many times
LONG_S = 1800.0  # to start, load, compile, save: at least, whatever the steps are like
_LEARNT_STEPS = 2  # of an attempt that may compile, and are not learnt from
_GAP_S = 1.0  # longer ones between two looks are sleep of this machine or a stop of this process, and no rank's fault
_SLOWEST = 64  # long gaps between beats that are remembered
_PACE_S = 1.0  # between looks at paces
_EVIDENCE_S = evidence.ANSWER_S + 6 * BEAT_S  # for other nodes to tell what they find
_STEPPING = ("data", "forward", "step", "report")
_STOPPED = (-1, -1)  # the place of a rank that everybody waits for, wherever it is
_TRACEBACK_FRAMES = 30


@dataclass(slots=True)
class _Rank:
    """A rank of this node as it was seen last.

    since: awake time of its last change; steps: finished in this attempt; gaps: long ones between its beats
    """

    pulse: Pulse
    beat: Beat
    since: float
    first_step: int
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_SLOWEST))

    @property
    def steps(self) -> int:
        return self.beat.step - self.first_step

    @property
    def place(self) -> tuple[int, int]:
        return self.beat.step, PHASES.index(self.beat.phase)


class Watch:
    """Of one attempt; `look` some times a second.

    Args:
        node: name of this host in logs
        ranks: of this node
        meeting: with the other nodes
    """

    def __init__(
        self, run: RunDirectory, cluster: Cluster, attempt: int, *, node: str, ranks: int, say: Callable[[str], None],
        meeting: Meeting | None = None,
    ) -> None:  # fmt: skip
        self._run, self._attempt, self._node, self._count, self._say = run, attempt, node, ranks, say
        self._timeout, self._factor = cluster.hang_timeout_s, cluster.straggler_factor
        self._meeting = meeting
        self._leads = meeting is None or meeting.node.rank == 0
        self._folder = scratch.folder() / "watch"
        shutil.rmtree(self._folder, ignore_errors=True)  # of an attempt that has ended
        self._folder.mkdir(mode=0o700)
        self._logs = run.logs(attempt, node)
        self._ranks: dict[int, _Rank] = {}
        self._awake, self._last = 0.0, time.monotonic()
        self._held = 0.0  # awake time until which nothing counts: a debugger was at work
        self._asked_at: float | None = None
        self._found: list[Evidence] | None = None
        self._paced_at = self._told_at = 0.0
        self._newest_group = -1
        self._slow: set[tuple[int, str]] = set()

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the ranks of this node."""
        return {
            ENVIRONMENT: str(self._folder),
            "TORCH_FR_DUMP_TEMP_FILE": str(self._logs / "flight-recorder-"),  # NCCL adds the rank, when it times out
        }

    def look(self) -> Ending | None:
        """How the attempt ends where a rank hangs; the caller then ends all ranks of this node at once."""
        now = time.monotonic()
        self._awake += min(now - self._last, _GAP_S)
        self._last = now
        self._meet_ranks()
        for rank in self._ranks.values():
            self._notice(rank)
        heard = self._heard()
        if self._factor is not None and self._awake - self._paced_at >= _PACE_S:
            self._paced_at = self._awake
            self._compare_paces(heard)
        return self._lead(heard) if self._leads else self._follow(heard)

    def steps(self) -> dict[int, int]:
        """Optimizer steps that ranks of this node had finished when they last said something, by rank."""
        return {number: (rank.pulse.beat() or rank.beat).step for number, rank in self._ranks.items()}

    # this node's ranks

    def _meet_ranks(self) -> None:
        if len(self._ranks) == self._count:
            return
        for rank in set(ranks_in(self._folder)) - set(self._ranks):
            with contextlib.suppress(OSError, ValueError):  # it is being made
                pulse = Pulse(self._folder, rank)
                if (beat := pulse.beat()) is not None:
                    self._ranks[rank] = _Rank(pulse, beat, self._awake, beat.step)

    def _notice(self, rank: _Rank) -> None:
        beat = rank.pulse.beat()
        if beat is None or beat.count == rank.beat.count:
            return
        gap = self._awake - rank.since
        if gap > _GAP_S and rank.beat.phase in _STEPPING and rank.steps >= _LEARNT_STEPS:
            rank.gaps.append(gap)
        if rank.beat.phase == "start":
            rank.first_step = beat.step
        rank.beat, rank.since = beat, self._awake

    def _limit_s(self, rank: _Rank, *, stopped: bool = False) -> float:
        """For how long this rank may stand still where it is; one whose process is stopped is in nothing long."""
        if self._timeout is None:
            return math.inf
        if isinstance(self._timeout, int):
            limit = float(self._timeout)
        else:
            limit = max(FLOOR_S, TIMES * max(rank.gaps, default=0.0))
        long = not stopped and (rank.beat.phase not in _STEPPING or rank.steps < _LEARNT_STEPS)
        return max(limit, LONG_S) if long else limit

    def _hindmost(self) -> tuple[tuple[int, int], float] | None:
        """(place of those ranks of this node that are furthest back, seconds by which all of them are over their limit,
        below 0 while one is not); a rank that is further on may only wait for them."""
        if len(self._ranks) < self._count:
            return None
        for rank in self._ranks.values():
            over = self._still_s(rank) - self._limit_s(rank, stopped=True)
            if over >= 0 and evidence.state_of(rank.pulse.pid) == "T":
                return _STOPPED, over
        place = min(rank.place for rank in self._ranks.values())
        last = [rank for rank in self._ranks.values() if rank.place == place]
        return place, min(self._still_s(rank) - self._limit_s(rank) for rank in last)

    def _still_s(self, rank: _Rank) -> float:
        """For how long it has made no beat, as far as that counts."""
        return self._awake - max(rank.since, self._held)

    def _traced(self) -> int | None:
        """A rank of this node that a debugger holds."""
        return next((number for number, rank in self._ranks.items() if evidence.tracer_of(rank.pulse.pid)), None)

    def _collect(self) -> list[Evidence]:
        still = [(rank.pulse, rank.beat, self._awake - rank.since) for rank in self._ranks.values()]
        found = evidence.collect(self._folder, still, self._node)
        with contextlib.suppress(OSError):
            evidence.write_stacks(self._folder, found, self._logs)
        return found

    def _moves(self) -> bool:
        """Whether a rank of this node has made a beat since it was last noticed."""
        beats = ((rank.pulse.beat(), rank.beat) for rank in self._ranks.values())
        return any(now is None or now.count != before.count for now, before in beats)

    # hangs

    def _lead(self, heard: Mapping[int, Mapping[str, Any]]) -> Ending | None:
        others = {rank: words for rank, words in heard.items() if "place" in words}
        own = self._hindmost()
        if own is None or (self._meeting is not None and set(others) < set(self._others())):
            return None  # somebody has not begun
        places = [own, *((tuple(words["place"]), words["over"]) for words in others.values())]
        last = min(place for place, _ in places)
        if any(over < 0 for place, over in places if place == last):
            self._forget()
            return None
        if (traced := self._traced_anywhere(others)) is not None:
            self._held = self._awake
            self._say(f"rank {traced} stands still in a debugger: the watch waits for it")
            return None
        if self._found is None:
            self._asked_at = self._awake
            self._tell({"ask": True})
            self._found = self._collect()
            if self._moves():
                self._say(
                    f"warning: no rank moved for {max(one.still_s for one in self._found):.0f} s; now they do again"
                )
                self._forget()
                return None
        told = [Evidence(**one) for words in others.values() for one in words.get("found", ())]
        complete = all("found" in words for words in others.values())
        assert self._asked_at is not None
        if not complete and self._awake - self._asked_at < _EVIDENCE_S:
            return None
        return self._judge([*self._found, *told])

    def _follow(self, heard: Mapping[int, Mapping[str, Any]]) -> Ending | None:
        words = heard.get(0, {})
        if "ended" in words:
            self._wake(self._found or [])
            return Ending(**words["ended"])
        if words.get("ask") and self._found is None:
            self._found = self._collect()
            self._told_at = 0.0
        if not words.get("ask"):
            self._found = None
        hindmost = self._hindmost()
        if self._awake - self._told_at >= BEAT_S / 2 and hindmost is not None:
            self._told_at = self._awake
            place, over = hindmost
            traced = self._traced() if over >= 0 else None
            if traced is not None:
                self._held = self._awake
            found = {"found": [asdict(one) for one in self._found]} if self._found is not None else {}
            self._tell({"place": place, "over": over, "traced": traced, "paces": self._recent_paces(), **found})
        return None

    def _forget(self) -> None:
        """It moves: what was asked and found counts no more."""
        if self._found is not None:
            self._asked_at, self._found = None, None
            self._tell({})

    def _traced_anywhere(self, others: Mapping[int, Mapping[str, Any]]) -> int | None:
        if (traced := self._traced()) is not None:
            return traced
        return next((int(words["traced"]) for words in others.values() if words.get("traced") is not None), None)

    def _judge(self, found: list[Evidence]) -> Ending:
        """The ending, said, written down for whoever asks later, and told to the other nodes."""
        awaited = evidence.awaited(found)
        culprit, why = evidence.find_culprit(found)
        found = self._wake(found)
        step = max(one.step for one in found)
        where = f"stacks of all ranks: {self._logs.parent}/*/RANK.stack.txt"
        if culprit is None:
            longest = max(one.still_s for one in found)
            message = f"no rank has moved for {longest:.0f} s, and {why}"
            message += f": all wait in {awaited}" if awaited else ""
            ending = Ending(status="failed", failure_class="hang", step=step, message=f"{message}; {where}")
        else:
            culprit = next(one for one in found if one.rank == culprit.rank)
            last = f"; its last collective was {culprit.last_collective}" if culprit.last_collective else ""
            message = (
                f"rank {culprit.rank} on {culprit.node} has not moved for {culprit.still_s:.0f} s, {culprit.doing()}: "
                f"{why}{last}" + (f"; others wait in {awaited}" if awaited else "")
            )
            ending = Ending(
                status="failed", failure_class="hang", step=step, rank=culprit.rank, node=culprit.node,
                message=f"{message}; {where}", traceback="\n".join(culprit.stack[:_TRACEBACK_FRAMES]),
                rank_step=culprit.step, time=time.time(),
            )  # fmt: skip
            self._speak_for(culprit, ending)
        self._note({
            "kind": "hang", "step": step, "rank": ending.rank, "node": ending.node or None,
            "phase": culprit.phase if culprit else None, "why": why, "awaited": awaited or None,
            "ranks": {str(one.rank): [one.node, one.step, one.phase, round(one.still_s, 1)] for one in found},
        })  # fmt: skip
        self._tell({"ended": asdict(ending)})
        return ending

    def _wake(self, found: list[Evidence]) -> list[Evidence]:
        """Have stopped ranks of this node say where they stood."""
        own = [one for one in found if one.rank in self._ranks and one.node == self._node]
        woken = {one.rank: one for one in evidence.wake_stopped(self._folder, own)}
        with contextlib.suppress(OSError):
            for one in woken.values():
                if one.state == "T":
                    evidence.add_threads(self._folder, one, self._logs)
        return [woken.get(one.rank, one) for one in found]

    def _speak_for(self, culprit: Evidence, ending: Ending) -> None:
        """A rank that hangs cannot say so: its outcome is what every reader looks for."""
        outcome = Outcome("failed", "hang", culprit.step, ending.message, ending.traceback, culprit.node)
        with contextlib.suppress(OSError):  # the ending still says it
            write_outcome(self._run, self._attempt, culprit.rank, outcome)

    # stragglers

    def _recent_paces(self) -> dict[str, dict[str, list[float]]]:
        """The last groups of this node's ranks, as JSON takes them."""
        recent = {}
        for number, rank in self._ranks.items():
            paces = rank.pulse.paces()
            last = sorted(paces)[-GROUPS - 1 :]
            recent[str(number)] = {
                str(g): [float(f"{v:.4g}") for v in (paces[g].own_s, paces[g].wait_s, paces[g].wall_s)] for g in last
            }
        return recent

    def _compare_paces(self, heard: Mapping[int, Mapping[str, Any]]) -> None:
        if not self._leads or len(self._ranks) < self._count:
            return
        paces = {number: rank.pulse.paces() for number, rank in self._ranks.items()}
        for words in heard.values():
            for number, groups in words.get("paces", {}).items():
                paces[int(number)] = {int(group): Pace(*values) for group, values in groups.items()}
        newest = min((max(groups, default=-1) for groups in paces.values()), default=-1)
        if newest == self._newest_group or (self._meeting is not None and set(heard) < set(self._others())):
            return
        self._newest_group = newest
        assert self._factor is not None
        found = {(one.rank, one.kind): one for one in stragglers(paces, self._factor)}
        for key in set(found) - self._slow:
            self._name(found[key], ranks=len(paces), heard=heard)
        for rank, kind in self._slow - set(found):
            self._say(f"rank {rank} is no longer slow ({kind}) at step {(newest + 1) * GROUP}")
            self._note({"kind": "recovered", "rank": rank, "what": kind, "step": (newest + 1) * GROUP})
        self._slow = set(found)

    def _name(self, slow: Straggler, *, ranks: int, heard: Mapping[int, Mapping[str, Any]]) -> None:
        node = self._node_of(slow.rank, heard)
        steps = f"steps {slow.first_step} to {slow.last_step}"
        if slow.kind == "computing":
            what = f"computes {slow.factor:.1f} times as long as the median of {ranks} ranks"
        else:
            what = (
                f"waits {slow.own_s:.2g} s a step for its rows, the median of {ranks} ranks {slow.median_s:.2g} s: "
                f"steps are {slow.factor:.1f} times as long for it"
            )
        self._say(f"warning: rank {slow.rank} on {node} is slow: it {what} ({steps})")
        self._note({
            "kind": "straggler", "rank": slow.rank, "node": node, "what": slow.kind, "step": slow.last_step,
            "factor": round(slow.factor, 2), "own_s": slow.own_s, "median_s": slow.median_s,
        })  # fmt: skip

    def _node_of(self, rank: int, heard: Mapping[int, Mapping[str, Any]]) -> str:
        if rank in self._ranks or self._meeting is None:
            return self._node
        on = next((number for number, words in heard.items() if str(rank) in words.get("paces", {})), None)
        return self._meeting.names.get(on, "?") if on is not None else "?"

    # words

    def _others(self) -> Iterable[int]:
        """Node ranks of the other nodes of this attempt."""
        assert self._meeting is not None
        return (rank for rank in self._meeting.members if rank != self._meeting.node.rank)

    def _heard(self) -> dict[int, dict[str, Any]]:
        """What other nodes have told of this attempt, by node rank."""
        if self._meeting is None:
            return {}
        heard = {}
        for rank, text in self._meeting.told().items():
            words = json.loads(text)
            if words.get("attempt") == self._attempt:
                heard[rank] = words
        return heard

    def _tell(self, words: dict[str, Any]) -> None:
        if self._meeting is not None:
            self._meeting.tell(json.dumps({"attempt": self._attempt, **words}))

    def _note(self, values: dict[str, Any]) -> None:
        """A line of watch.jsonl; one that cannot be written is only said."""
        try:
            append_line(self._run.watch_file, {**values, "attempt": self._attempt, "time": time.time()})
        except OSError as error:
            self._say(f"warning: {self._run.watch_file.name} cannot be written: {error.strerror or error}")
