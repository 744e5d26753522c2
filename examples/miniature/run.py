"""Run the miniature: train its worlds, tune, test, and write tables and figures.

Owns the order of the stages, which jobs each has, and the command line. Invariant: what
is chosen is chosen from runs on the validation worlds alone, and the test worlds are run with what
was chosen before; whatever is interrupted goes on where it stopped.

    python examples/miniature/run.py --out build/miniature          # five minutes on two cores
    python examples/miniature/run.py --full --out build/miniature-full --processes 32
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

# Before torch is loaded, here and in every process of the pool: each has one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import figures
import tables
import training
import worlds
from choosing import Settings, choose
from methods import METHODS, REGIMES, trials, tuned
from pool import Clock, Line, Results, execute
from processes import beginning
from profiles import FAST, FULL, OTHERS, STAGES, TUNING_SET, Profile
from training import Job

from drift_fast import demo
from drift_fast.demo.experiment import Protocol

HERE: Final = Path(__file__).parent


class Miniature:
    """One profile in one directory."""

    def __init__(
        self, profile: Profile, out: Path, *, processes: int, device: str, clock: Clock
    ) -> None:
        self.profile = profile
        self.out = out
        self.processes = processes
        self.device = device
        self.clock = clock
        out.mkdir(parents=True, exist_ok=True)
        self.results = Results(out / "results.jsonl")
        self._refuse_others()
        _copy_shipped(out)

    def _refuse_others(self) -> None:
        for line in (*self.results.lines(), *self.results.failed()):
            # Lines of the first version have no digest, but the command.
            same = line.get("profile", self.profile.digest) == self.profile.digest
            if not same or line.get("command") != self._command():
                raise SystemExit(
                    f"{self.results.path}: expected lines of profile {self.profile.digest} of "
                    f"`{self._command()}`, found {line['key']} of {line.get('profile', 'none')} of "
                    f"`{line.get('command')}`: give another --out, or the command that began it"
                )

    def _refuse_earlier(self) -> None:
        """Let lines without digests be reported, and not be mixed with others."""
        for line in (*self.results.lines(), *self.results.failed()):
            if "profile" not in line:
                raise SystemExit(
                    f"{self.results.path}: {line['key']} was written by an earlier version and "
                    "does not say of which checkpoints: such lines can be reported (--stage "
                    "report), not added to; give another --out"
                )

    def _expected(self, job: Job) -> dict[str, Any]:
        """Return what the line of a job would say, run now, of what it follows from."""
        found = training.provenance(job, self.profile.protocol, self._digest)
        return {**found, "profile": self.profile.digest}

    def _digest(self, world: int, name: str) -> str:
        """Return a checkpoint's digest; of one that is not here, what its line says, or none.

        Results can thus be added to where only the checkpoints of what is left were brought.
        """
        if worlds.exists(self.out, world, name):
            return worlds.digest(self.out, world, name)
        line = self.results.get(f"checkpoint/{world}/{name}")
        return "none" if line is None else line["digest"]

    def _done(self, job: Job) -> bool:
        return self.results.done(job.key, self._expected(job))

    def stage(self, name: str) -> int:
        """Run a stage, and return how many of its jobs have no result, failed ones included."""
        match name:
            case "checkpoints":
                left = [job for job in self.all_jobs() if not self._done(job)]
                return self.train({(job.world, n) for job in left for n in training.needed(job)})
            case "tune":
                return self._tuned(["main"])
            case "test":
                return self.run(self.test_jobs("main"))
            case "dose":
                return self.run(self.dose_jobs())
            case "regimes":
                return self._regimes()
            case "report":
                self.report()
                return 0
        raise ValueError(f"unknown stage {name!r}")

    # The jobs.

    def methods(self, regime: str) -> list[str]:
        """Return the methods of a regime that this profile runs."""
        return [
            name
            for name in REGIMES[regime].methods
            if regime != "main" or name in self.profile.methods
        ]

    def tested_on(self, regime: str) -> tuple[int, ...]:
        """Return the test worlds of a regime."""
        worlds = self.profile.test_worlds
        most = min(self.profile.regime_worlds, REGIMES[regime].worlds)
        return worlds if regime == "main" else worlds[:most]

    def tuning_jobs(self, regime: str) -> list[Job]:
        """Return every trial of every method, on the validation worlds."""
        count = self.profile.trials if regime == "main" else self.profile.regime_trials
        present = set(self.methods(regime))
        return [
            Job(
                stage="tune",
                regime=regime,
                world=world,
                set=TUNING_SET,
                method=method,
                settings=json.dumps(settings),
                split="validation",
            )
            for world in self.profile.validation_worlds
            for method in tuned(regime)
            if method in present
            for settings in trials(regime, method, count)
        ]

    def test_jobs(self, regime: str, settings: Settings | None = None) -> list[Job]:
        """Return the runs on the test worlds, set by set, with the settings that were chosen."""
        chosen = self.settings(regime) if settings is None else settings
        return [
            Job(
                stage="test",
                regime=regime,
                world=world,
                set=number,
                method=method,
                settings=json.dumps(chosen.get(method, {})),
            )
            for number in range(self.profile.sets)
            for world in self.tested_on(regime)
            for method in self.methods(regime)
        ]

    def dose_jobs(self) -> list[Job]:
        """Return runs over α and over λ, on the validation worlds, at the chosen learning rates."""
        chosen = self.settings("main")
        doses = [{"attn": dose, "mlp": dose} for dose in self.profile.doses]
        varied: dict[str, list[dict[str, Any]]] = {
            "drift": [{"alpha": alpha} for alpha in self.profile.strengths],
            "drift_base": [{"alpha": alpha} for alpha in self.profile.strengths],
            "merge_sft_two": doses,
            "motion_base": doses,
        }
        grid = [
            (method, chosen[method] | values)
            for method, several in varied.items()
            if method in self.profile.methods
            for values in several
        ]
        return [
            Job(
                stage="dose",
                regime="main",
                world=world,
                set=TUNING_SET + 1,
                method=method,
                settings=json.dumps(settings),
                split="validation",
            )
            for world in self.profile.validation_worlds
            for method, settings in grid
        ]

    def all_jobs(self) -> list[Job]:
        """Return the jobs of all stages; tests have no settings where none are chosen yet."""
        regimes = ("main", *self.profile.regimes)
        jobs = [job for regime in regimes for job in self.tuning_jobs(regime)]
        for regime in regimes:
            jobs += self.test_jobs(regime, self.chosen(regime) or {})
        return jobs if self.chosen("main") is None else jobs + self.dose_jobs()

    # What is done with them.

    def train(self, needed: Set[tuple[int, str]]) -> int:
        """Train what is missing of (world, checkpoint), and return how many are missing still.

        What was measured of those that there are is taken up.
        """
        self._refuse_earlier()
        jobs = worlds.missing(self.out, needed)
        orphans = worlds.orphans(self.out, jobs)
        if orphans:
            raise SystemExit(
                f"{self.out / 'checkpoints'}: {', '.join(orphans)}, trained from one that is not "
                "there: bring what it was trained from, or remove it to have both trained anew"
            )

        def ready(job: tuple[int, str]) -> bool:
            parent = worlds.PLANS[job[1]].parent
            return parent is None or worlds.exists(self.out, job[0], parent)

        work = partial(_train, root=self.out, device=self.device, shrink=self.profile.shrink)
        for world, name in itertools.product(sorted({w for w, _ in needed}), worlds.PLANS):
            found = worlds.measured(self.out, world, name)
            if found is None:
                continue
            expected = {"digest": worlds.digest(self.out, world, name)}
            if not self.results.done(f"checkpoint/{world}/{name}", expected):
                # A command was stopped between the rename and its line, or others were unpacked.
                self._add_checkpoint((world, name), found, found["seconds"])
        execute(
            jobs,
            work,
            processes=self.processes,
            clock=self.clock,
            done=self._add_checkpoint,
            ready=ready,
            begin=beginning(self.device),
            cost=lambda job: worlds.PLANS[job[1]].cost,
            longest=max(
                (
                    line["seconds"]["train"] / worlds.PLANS[line["name"]].cost
                    for line in self.results.lines()
                    if (line["stage"], line["device"]) == ("checkpoints", self.device)
                ),
                default=0.0,
            ),
            title="checkpoint",
        )
        return len(worlds.missing(self.out, needed))

    def run(self, jobs: Sequence[Job]) -> int:
        """Run what of the jobs has no result yet, and return how many have none afterwards.

        A result of other checkpoints, or by another protocol, is none.
        """
        self._refuse_earlier()
        waiting = [job for job in jobs if not self._done(job)]
        needed = {(job.world, name) for job in waiting for name in training.needed(job)}
        absent = sorted(f"{w}/{n}" for w, n in needed if not worlds.exists(self.out, w, n))
        if absent:
            raise SystemExit(f"run --stage checkpoints first; missing: {', '.join(absent)}")
        work = partial(_run, root=self.out, protocol=self.profile.protocol, device=self.device)
        execute(
            waiting,
            work,
            processes=self.processes,
            clock=self.clock,
            done=self._add,
            begin=beginning(self.device),
            longest=self._longest({job.regime for job in jobs}),
            title=jobs[0].stage if jobs else "",
        )
        return self._left(jobs)

    def _longest(self, regimes: Set[str]) -> float:
        """Return the seconds of the longest run of some regimes on this device; 0 of none."""
        taken = [
            sum(line["seconds"].values())
            for line in self.results.lines()
            if line["regime"] in regimes
            and line["device"] == self.device
            and line["stage"] != "checkpoints"
        ]
        return max(taken, default=0.0)

    def _add_checkpoint(
        self, job: tuple[int, str], result: worlds.Measured | Exception, seconds: float
    ) -> None:
        world, name = job
        line = {"key": f"checkpoint/{world}/{name}", "stage": "checkpoints", "regime": "main"}
        line |= {"world": world, "name": name, "set": 0, "profile": self.profile.digest}
        if isinstance(result, Exception):
            # What is trained from it cannot be, and no later stage begins; others go on.
            self.results.add(line | {"error": str(result), "command": self._command()})
            return
        line |= {"device": result["device"], "measured": result["knows"]}
        line |= {"steps": result["steps"], "attempts": result["attempts"]}
        line |= {"seconds": {"train": round(seconds, 1)}}
        line |= {"digest": worlds.digest(self.out, world, name)}
        self.results.add(line | {"command": self._command()})

    def _command(self) -> str:
        return " ".join(["python examples/miniature/run.py", self.profile.flag]).strip()

    def _add(self, job: Job, result: Line | Exception, seconds: float) -> None:
        if isinstance(result, Exception):
            result = {"key": job.key, "method": job.method, "error": str(result)}
        self.results.add(result | self._expected(job) | {"command": self._command()})

    def _regimes(self) -> int:
        """Tune in all regimes, then test in those whose every trial has a result.

        Each in one go, so that no process waits for the last run of one regime before the next.
        """
        left = self._tuned(self.profile.regimes)
        ready = [
            regime for regime in self.profile.regimes if self._left(self.tuning_jobs(regime)) == 0
        ]
        return left + self.run([job for regime in ready for job in self.test_jobs(regime)])

    def _tuned(self, regimes: Sequence[str]) -> int:
        """Run the trials of some regimes, and choose in those where none is left."""
        left = self.run([job for regime in regimes for job in self.tuning_jobs(regime)])
        for regime in regimes:
            if self._left(self.tuning_jobs(regime)) == 0:
                self._choose(regime)
        return left

    def _left(self, jobs: Sequence[Job]) -> int:
        return sum(not self._done(job) for job in jobs)

    def _choose(self, regime: str) -> None:
        """Write down what was best of the trials of each method."""
        finished = {line["key"]: line for line in self.results.lines()}
        # In the order of the trials, in which they need not have ended.
        tried = [finished[job.key] for job in self.tuning_jobs(regime)]
        found = choose(tried, self.methods(regime), self.profile.validation_worlds)
        path = self.out / "settings.json"
        every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        every[regime] = found
        path.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")

    def settings(self, regime: str) -> Settings:
        """Return the chosen settings of each method: those of this directory, or as shipped.

        Raises:
            SystemExit: there are none, with what to run.
        """
        found = self.chosen(regime)
        if found is None:
            raise SystemExit(
                f"no settings for every method of {regime!r}: finish --stage "
                f"{'tune' if regime == 'main' else 'regimes'} first"
            )
        return found

    def chosen(self, regime: str) -> Settings | None:
        """Return what `settings` does, or None where some method has none."""
        untuned: Settings = {n: {} for n in self.methods(regime) if not METHODS[n].space}
        rows = self._rows(regime)
        return None if rows is None else untuned | _resolved(rows)

    def _rows(self, regime: str) -> Settings | None:
        """Return what was chosen, and from which trials: of this directory, or as shipped."""
        paths = [self.out / "settings.json"]
        if "tune" not in self.profile.stages:
            paths.append(HERE / "settings.json")
        tuned = {name for name in self.methods(regime) if METHODS[name].space}
        for path in paths:
            every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            rows: Settings = every.get(regime, {})
            if rows and tuned <= _resolved(rows).keys():
                return rows
        return None

    def tuned_on(self) -> list[int]:
        """Return the test worlds that were tuned on, here or where the settings are from."""
        found = {line["world"] for line in self.results.lines() if line["stage"] == "tune"}
        for row in (self._rows("main") or {}).values():
            found.update(row.get("worlds", ()))
        return sorted(found & {*self.profile.test_worlds})

    def report(self) -> None:
        """Write tables and figures from the lines there are."""
        lines, failed = self.results.lines(), self.results.failed()
        trial = {
            job.key: at
            for regime in ("main", *self.profile.regimes)
            for at, job in enumerate(self.tuning_jobs(regime))
        }
        # In the order of the trials, so that of equals the table names the one that was chosen.
        lines.sort(key=lambda line: trial.get(line["key"], -1))
        written = [tables.write(lines, failed, self.out / "results.md", tuned_on=self.tuned_on())]
        written += figures.write(lines, self.out)
        for path in written:
            print(f"wrote {path}")


def _resolved(rows: Settings) -> Settings:
    """Return the settings of each method, a control's being those of what it is like."""
    return {
        name: rows[row.get("like", name)]["settings"]
        for name, row in rows.items()
        if row.get("like", name) in rows
    }


# What the processes of the pool do.


def _train(job: tuple[int, str], *, root: Path, device: str, shrink: int) -> worlds.Measured:
    return worlds.train(root, *job, device=device, shrink=shrink)


def _run(job: Job, *, root: Path, protocol: Protocol, device: str) -> Line:
    return training.run(job, root, protocol, device=device)


def _copy_shipped(out: Path) -> None:
    for name in ("base", "expert", "multimodal"):
        target = worlds.directory(out, 0, name)
        if not target.exists():
            shutil.copytree(demo.CHECKPOINTS / name, target)


# Moving a directory between machines.


def pack(out: Path, archive: Path) -> None:
    """Write lines, settings, tables and figures, but no checkpoints, to a tar.gz."""
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.is_file():
                tar.add(path, path.name)


def unpack(archive: Path, out: Path) -> None:
    """Take up what `pack` wrote, in place of what is there."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages asked for; 0 if all of them finished, 3 if some jobs failed or had no time."""
    parser = argparse.ArgumentParser(description="Run the miniature experiment.")
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--full", action="store_true", help="every world, method and regime")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="default: all that it needs")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, help="start nothing that would end later")
    parser.add_argument("--regimes", nargs="+", choices=OTHERS, help="only these")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write results as a tar.gz")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="go on from such a file")
    options = parser.parse_args(arguments)
    profile = FULL if options.full else FAST
    if options.regimes:
        profile = replace(profile, regimes=tuple(options.regimes))
    clock = Clock(options.minutes)
    if options.unpack is not None:
        unpack(options.unpack, options.out)
    miniature = Miniature(
        profile, options.out, processes=options.processes, device=options.device, clock=clock
    )
    left = 0
    for stage in options.stage or profile.stages:
        if stage == "report" or left == 0:
            left += miniature.stage(stage)
    if options.pack is not None:
        pack(options.out, options.pack)
    if left:
        print(f"{left} jobs are left: run the same command again", file=sys.stderr)
    failed = len(miniature.results.failed())
    if failed:
        print(f"{failed} runs failed; they are listed in results.md", file=sys.stderr)
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
