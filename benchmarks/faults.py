"""What a run survives, in figures: kills, damaged checkpoints, stops, and what saving costs. Prints tables.

    python benchmarks/faults.py [--only kills|flips|preempt|stall] [--kills 1000] [--peers 60] [--times 20] [--seed 0]
                                [--out faults.json]

kills    SIGKILL at random times, half of them inside saves, over ddp, fsdp2, zero2, zero3 on 1 to 4 ranks: of one rank,
         of all ranks together, of the launcher with everything, of the launcher alone. After each kill the newest
         checkpoint is verified and compared, at the end each row, figure, weight and moment, bit by bit, with an
         uninterrupted run at the same world size. Beside it, under the same killer, transformers' Trainer and
         torch.distributed.checkpoint saving in place: the share of newest checkpoints that cannot be used.
flips    single bits, truncations, swaps, missing and foreign files in the newest checkpoint: found and named before the
         first step, the checkpoint before it used.
preempt  SIGTERM and time limit here, and where --clusters is given scancel, warning signal, preemption, a stopped Ray
         job and a deleted pod on a real Slurm, Ray and pods in network namespaces: a durable checkpoint within the
         grace time, exact resume.
stall    what a save costs training, a checksum a save, and a resume at step 1,000,000.

Ends with 1 where a promise is broken. SIGTERM or Ctrl-C ends the kills early; what was reached is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

PARTS = ("kills", "flips", "preempt", "stall")
stopped = threading.Event()


def main() -> int:
    """Run the parts that are asked for; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--peers", type=int, default=60, help="kills of each of the others")
    parser.add_argument("--times", type=int, default=20, help="how often each stop is tried")
    parser.add_argument("--clusters", action="store_true", help="also stop jobs of a real Slurm, a Ray and pods")
    parser.add_argument("--lanes", type=int, default=2, help="launchers at work at a time")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--folder", type=Path, help="where to work and to leave broken runs; default: temporary")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = options.folder or Path(temporary)
        for part in (options.only,) if options.only else PARTS:
            if not stopped.is_set():
                (folder / part).mkdir(parents=True, exist_ok=True)
                figures[part], found = globals()[f"part_{part}"](folder / part, options)
                broken += found
                if options.out is not None:
                    options.out.write_text(json.dumps({**figures, "broken": broken}, indent=1) + "\n")
    for line in broken:
        print(f"BROKEN: {line}")
    print("every promise held" if not broken else f"{len(broken)} promises were broken")
    return 1 if broken else 0


def part_kills(folder: Path, options: argparse.Namespace) -> tuple[Any, list[str]]:
    """Figure 1: ours, then the others."""
    from tests.faults.killing import Ground, Hunt, Tally, every_scene, make_project

    begun, recipe = time.monotonic(), make_project(folder)
    scenes = every_scene(random.Random(f"scenes-{options.seed}"))
    kinds = sorted({scene.kind for scene in scenes})
    shares = [[s for s in scenes if (kinds.index(s.kind) + s.ranks) % options.lanes == n] for n in range(options.lanes)]
    tallies = [Tally() for _ in shares]
    reported = threading.Lock()
    shown = [0]

    def enough(_: Tally) -> bool:
        total = sum(tally.total for tally in tallies)
        with reported:
            if total >= shown[0] + 20:
                shown[0] = total
                inside, wrong = (sum(f(t) for t in tallies) for f in (Tally.inside, lambda t: len(t.broken)))
                at = time.monotonic() - begun
                print(f"{at:6.0f} s: {total} kills, {inside} inside saves, {wrong} broken", flush=True)
        return stopped.is_set() or total >= options.kills

    grounds = [Ground(folder / f"lane-{i}", recipe) for i in range(options.lanes)]
    hunts = [
        Hunt(ground, share, seed=f"{options.seed}-{i}", tally=tally)
        for i, (ground, share, tally) in enumerate(zip(grounds, shares, tallies, strict=True))
    ]
    threads = [threading.Thread(target=hunt.go_on, args=(enough,)) for hunt in hunts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ground in grounds:
        ground.lane.close()
    found = table_of_kills(tallies, time.monotonic() - begun)
    broken = [f"{where}: {what}" for tally in tallies for where, what in tally.broken]
    stopped.clear()  # the others are quick
    if options.peers:
        from fault_peers import PEERS, hunt

        found["others"] = {}
        print(f"\n| newest checkpoint unusable | of {options.peers} kills | inside saves | why, most often |")
        print("|---|---|---|---|")
        print(f"| this launcher | {found['unloadable']} of {found['kills']} | {found['inside saves']} | |")
        for name in PEERS:
            peer = hunt(name, folder / name, options.peers, seed=options.seed)
            found["others"][name] = peer
            share = f"{peer['unusable']} of {peer['kills']} ({peer['unusable'] / peer['kills']:.0%})"
            print(f"| {name} | {share} | {peer['inside saves']} | {peer['why']} |", flush=True)
    return found, broken


def table_of_kills(tallies: list[Any], seconds: float) -> dict[str, Any]:
    """Print kills by strategy and ranks, and by who was killed inside what; the totals."""
    from collections import Counter

    kills: Counter[Any] = sum((tally.kills for tally in tallies), Counter())
    kinds = sorted({scene.kind for scene, _, _ in kills})
    print("\n| kills | 1 rank | 2 ranks | 3 ranks | 4 ranks | asynchronous | inside saves |")
    print("|---|---|---|---|---|---|---|")
    for kind in kinds:
        of_kind = {key: n for key, n in kills.items() if key[0].kind == kind}
        ranks = [sum(n for (scene, _, _), n in of_kind.items() if scene.ranks == r) for r in (1, 2, 3, 4)]
        late = sum(n for (scene, _, _), n in of_kind.items() if scene.asynchronous)
        inside = sum(n for (_, _, where), n in of_kind.items() if where == "save")
        print(f"| {kind} | {' | '.join(map(str, ranks))} | {late} | {inside} |")
    by_who = {w: sum(n for (_, who, _), n in kills.items() if who == w) for w in ("rank", "ranks", "launcher", "alone")}
    by_where = {p: sum(n for (_, _, where), n in kills.items() if where == p) for p in ("start", "step", "save")}
    wrong = [what for tally in tallies for _, what in tally.broken]
    found = {
        "kills": kills.total(), "inside saves": by_where["save"], "while starting or loading": by_where["start"],
        "in a step": by_where["step"], "of one rank": by_who["rank"], "of all ranks": by_who["ranks"],
        "of launcher and all": by_who["launcher"], "of the launcher alone": by_who["alone"],
        "runs": sum(tally.runs for tally in tallies), "checkpoints compared": sum(tally.checked for tally in tallies),
        "unloadable": sum("manifest" in what or ".safetensors" in what for what in wrong),
        "broken": len(wrong), "orphans gone after s": round(max(tally.orphans_s for tally in tallies), 2),
        "seconds": round(seconds),
    }  # fmt: skip
    print("\n" + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def part_flips(folder: Path, options: argparse.Namespace) -> tuple[Any, list[str]]:
    """Figure 2: damage to the newest checkpoint, by the loader alone and by whole launches."""
    from fault_damage import damages, load_damaged, resume_damaged

    from tests.faults.killing import Ground, Scene, make_project

    ground, scene = Ground(folder / "lane", make_project(folder)), Scene("fsdp2", 2)
    try:
        run = preempted(ground, scene)
        chance, broken, found = random.Random(f"flips-{options.seed}"), [], {}
        print("\n| damage to the newest checkpoint | tried | found and named, the one before used |")
        print("|---|---|---|")
        for kind, tries in damages(run, chance).items():
            wrong = load_damaged(run, tries)
            found[kind] = {"tried": len(tries), "found": len(tries) - len(wrong)}
            broken += [f"{kind}: {what}" for what in wrong]
            print(f"| {kind} | {len(tries)} | {len(tries) - len(wrong)} |", flush=True)
        launches = [tries[chance.randrange(len(tries))] for tries in damages(run, chance).values()]
        wrong = [what for damage in launches for what in resume_damaged(ground, scene, run, damage)]
        found["whole launches"] = {"tried": len(launches), "found": len(launches) - len(wrong)}
        print(f"| one of each by `launcher run`, exact to the end | {len(launches)} | {len(launches) - len(wrong)} |")
        return found, broken + wrong
    finally:
        ground.lane.close()


def preempted(ground: Any, scene: Any) -> Any:
    """A run that was stopped in its sixth step or so, with a checkpoint of each step."""
    from tests.jobs.make import run_of

    run = run_of(ground.recipe, "damaged")
    at = {"run": str(run.path), "phase": "optimizer", "step": 5, "rank": 0, "to": "launcher"}
    ground.whole(scene)
    (ground.lane.rows / "signal").write_text(json.dumps(at))
    code, said = ground.lane.finish(
        ground.recipe, "run.name=damaged", *scene.changes, "checkpoint.keep_last=4", "checkpoint.rehearse=false"
    )
    assert code == 75, said
    return run


def part_preempt(folder: Path, options: argparse.Namespace) -> tuple[Any, list[str]]:
    """Figure 4."""
    from fault_stops import CLUSTERS, GRACE_S, HERE, stop_here, stop_on_cluster

    from tests.faults.killing import Ground, make_project

    ground, found, broken = Ground(folder / "lane", make_project(folder)), {}, []
    print(f"\n| stopped by | times | durable within {GRACE_S:g} s | exact resume | longest |")
    print("|---|---|---|---|---|")
    for how in (*HERE, *(CLUSTERS if options.clusters else ())):
        if stopped.is_set():
            break
        if how in HERE:
            stops = stop_here(how, ground, times=options.times, seed=options.seed, over=stopped.is_set)
        else:
            ground.lane.close()
            place = folder / how.partition(":")[0].lower() / how.rpartition(" ")[2]
            place.mkdir(parents=True)
            stops = stop_on_cluster(how, place, times=options.times, over=stopped.is_set)
        found[how], broken = stops.row(), broken + stops.broken
        print(f"| {how} | {stops.count} | {stops.durable} | {stops.exact} | {found[how]['longest s']} s |", flush=True)
    ground.lane.close()
    return found, broken


def part_stall(folder: Path, options: argparse.Namespace) -> tuple[Any, list[str]]:
    """Figure 5, by `checkpoint.py` and `store_open.py`."""
    here, found, broken = Path(__file__).parent, {}, []
    subprocess.run([sys.executable, str(here / "checkpoint.py"), "--out", str(folder / "checkpoint.json")], check=True)
    subprocess.run([sys.executable, str(here / "store_open.py"), "--ranks", "64", "--out", str(folder / "open.json")])
    saving, opening = (json.loads((folder / name).read_text()) for name in ("checkpoint.json", "open.json"))
    goals = {
        "stall of a save / synchronous dcp.save": (saving["stall"], 0.1),
        "checksums / save": (saving["checksum"], 0.03),
        "position at step 1,000,000 restored, s": (opening["seconds"], 0.2),
    }
    print("\n| cost | figure | goal |")
    print("|---|---|---|")
    for what, (figure, goal) in goals.items():
        found[what] = figure
        print(f"| {what} | {figure:.3f} | <= {goal:g} |")
        if figure > 1.2 * goal:  # a busy machine; the figure itself is in the table
            broken.append(f"{what}: {figure:.3f}, the goal is {goal:g}")
    return found, broken


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
