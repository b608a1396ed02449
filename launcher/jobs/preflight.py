"""Whether the nodes of a job can train together, judged from their facts before a rank starts: bad refuses the job.

What is looked at on each node is in `launcher.jobs.facts`; what ranks measure together in `launcher.trainer.preflight`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError
from launcher.jobs.checks import Needs, judge
from launcher.jobs.ending import Ending
from launcher.jobs.facts import Facts, facts
from launcher.jobs.finding import Finding
from launcher.jobs.probe import Echo, measure
from launcher.jobs.rendezvous import address
from launcher.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.run.directory import RunDirectory
from launcher.run.files import write_atomic

if TYPE_CHECKING:
    from launcher.jobs.meeting import Meeting

VERSION = 1
_OF_THE_NODE = {"GPUs", "ports"}  # findings that another choice of nodes may mend


def refusal(findings: Iterable[Finding]) -> str | None:
    """Why the job does not start, all at once; None where it may."""
    bad = [finding for finding in findings if finding.state == "bad"]
    if not bad:
        return None
    title = f"preflight: {len(bad)} thing{'s' * (len(bad) > 1)} would keep this job from training"
    return "\n".join([title, *(f"  {finding}" for finding in bad), "  (cluster.preflight=false skips these checks.)"])


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a job's nodes, and what it comes to; empty where nobody looked."""

    nodes: Sequence[Facts] = ()
    findings: Sequence[Finding] = ()

    @property
    def ending(self) -> Ending | None:
        """How the attempt ends for it; None where it may go on. Another node may do better, another start will not."""
        why = refusal(self.findings)
        if why is None:
            return None
        bad = {finding.name for finding in self.findings if finding.state == "bad"}
        return Ending(status="failed", failure_class="node" if bad <= _OF_THE_NODE else "user", message=why)

    def tell(self, say: Callable[[str], None]) -> None:
        """Say notes as warnings."""
        for finding in self.findings:
            if finding.state == "note":
                say(f"warning: {finding}")

    def keep(self, run: RunDirectory, attempt: int) -> None:
        """Leave it beside the attempt's job, as nodes.json; a file that cannot be written stops nothing."""
        if not self.nodes:
            return
        seen: dict[str, Any] = {
            "version": VERSION,
            "nodes": list(self.nodes),
            "findings": [asdict(finding) for finding in self.findings if finding.state != "ok"],
        }
        file = run.job(attempt) / "nodes.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(seen, indent=2) + "\n", durable=False)
        except OSError as error:
            print(f"warning: {file} cannot be written ({error.strerror or error})", file=sys.stderr)


def before_launch(recipe: Recipe, plan: Plan, run: RunDirectory, say: Callable[[str], None]) -> Seen:
    """Examine this node, the only one of a job that has not begun: notes are said; nothing where it is not wanted.

    Raises:
        UserError: something would keep the job from training.
    """
    if not recipe.cluster.preflight:
        return Seen()
    seen = alone(recipe, plan, run)
    if (why := refusal(seen.findings)) is not None:
        raise UserError(why)
    seen.tell(say)
    return seen


def alone(recipe: Recipe, plan: Plan, run: RunDirectory) -> Seen:
    """Examine this node, the only one of its job."""
    nodes = [facts(recipe, run.path)]
    return Seen(nodes, judge(nodes, Needs.of(recipe, plan, run)))


def together(recipe: Recipe, plan: Plan, run: RunDirectory, others: Meeting) -> Seen:
    """Examine all nodes of a job side by side; each calls this, node 0 judges, all get the findings.

    Raises:
        Away, Stopped: as `Meeting.exchange`.
    """
    mine = facts(recipe, run.path, address=others.node.local_address)
    with clock_of_node_0(others) as clock:
        mine["clock"] = clock
        nodes = others.exchange("facts", mine)
    findings = judge(nodes, Needs.of(recipe, plan, run)) if nodes is not None else []
    said = others.broadcast("findings", [asdict(finding) for finding in findings])
    return Seen(nodes or (), [Finding(**values) for values in said])


@contextlib.contextmanager
def clock_of_node_0(others: Meeting) -> Iterator[Facts | None]:
    """What this node measures of its way to node 0, which answers while the block lasts; None on node 0 itself."""
    if others.node.rank > 0:
        assert others.node.rendezvous is not None
        host, _ = address(others.node.rendezvous, name="--rendezvous")
        yield measure(host, int(others.broadcast("echo")))
        return
    echo = Echo()
    try:
        others.broadcast("echo", echo.port)
        yield None
    finally:
        echo.close()
