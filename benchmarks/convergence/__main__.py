"""Trains a small LLaMA with every optimizer, at learning rates of its own, and with ablations.

    python -m benchmarks.convergence           # all that is missing, for hours
    python -m benchmarks.convergence --list    # what is missing now
    python -m benchmarks.convergence --trial muon --learning-rate 0.01 --seed 1  # one row

Adds a row a trial to `results/convergence.json` as it ends; a trial that has its row is not run
again, so that it can be stopped and started at will. Every trial has one core of its own.
"""

import argparse
import concurrent.futures
import contextlib
import os
import queue
import re
import subprocess
import sys
import time

import rich.console
import rich.progress

from benchmarks.convergence.methods import ABLATIONS, METHODS, STEPS, Trial
from benchmarks.convergence.search import wanted_trials
from benchmarks.rows import RESULTS, add_row, read_rows

OUTPUT = RESULTS / "convergence.json"
COMMAND = "python -m benchmarks.convergence"
# So many have a cause of their own, which the others would meet too.
_FAILURES = 3
_STEP = re.compile(r"step (\d+)/\d+, (loss \S+)")


def _run_one(trial: Trial, core: int | None) -> None:
    if core is not None:
        with contextlib.suppress(AttributeError):  # only Linux has it
            os.sched_setaffinity(0, {core})
    from benchmarks.convergence.training import run_trial  # after the core is chosen

    def show(step: int, loss: float) -> None:
        end = "\r" if sys.stdout.isatty() else "\n"
        print(f"step {step}/{STEPS}, loss {loss:.4f}", end=end, flush=True)

    row = run_trial(trial, show)
    add_row(OUTPUT, COMMAND, row)
    print(f"{trial}: {row['validation_loss']}, {row['seconds']:.0f} s", flush=True)


def _command_of(trial: Trial, core: int) -> list[str]:
    options = ["--trial", trial.name, "--learning-rate", repr(trial.learning_rate)]
    options += ["--seed", str(trial.seed), "--core", str(core)]
    return [sys.executable, "-m", "benchmarks.convergence", *options]


def _run_in_process(trial: Trial, core: int, progress: rich.progress.Progress) -> None:
    """Runs a trial in a process of its own, whose output becomes a line of the progress."""
    task = progress.add_task(str(trial), total=STEPS, loss="")
    command = _command_of(trial, core)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if step := _STEP.match(line):
                progress.update(task, completed=int(step[1]), loss=step[2])
            else:
                progress.console.print(line.rstrip())
    progress.remove_task(task)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _run_all(cores: int, console: rich.console.Console) -> None:
    free: queue.Queue[int] = queue.Queue()
    for core in range(cores):
        free.put(core)
    failed: set[Trial] = set()
    began, ended = time.perf_counter(), 0
    progress = rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(),
        "{task.completed}/{task.total}",
        "{task.fields[loss]}",
        rich.progress.TimeRemainingColumn(),
        console=console,
    )

    def run(trial: Trial) -> None:
        core = free.get()
        try:
            _run_in_process(trial, core, progress)
        finally:
            free.put(core)

    with progress, concurrent.futures.ThreadPoolExecutor(cores) as pool:
        running: dict[concurrent.futures.Future[None], Trial] = {}
        while True:
            wanted = wanted_trials(read_rows(OUTPUT))
            wanted = [t for t in wanted if t not in failed and t not in running.values()]
            if len(failed) >= _FAILURES:
                wanted = []
            for trial in wanted[: cores - len(running)]:
                running[pool.submit(run, trial)] = trial
            if not running:
                break
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                trial = running.pop(future)
                if future.exception() is not None:
                    failed.add(trial)
                    console.print(f"{trial}: failed, {future.exception()}")
            ended += len(done)
            left = len(wanted_trials(read_rows(OUTPUT)))
            minutes = (time.perf_counter() - began) / 60
            console.print(
                f"{ended} ended in {minutes:.0f} min; {left} known to be left, about "
                f"{left * minutes / ended:.0f} min"
            )
    if failed:
        raise SystemExit(f"failed: {', '.join(map(str, failed))}")


def main() -> None:
    """Runs what has no row yet, or the one trial asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trial", choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, help="run on this core only")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="trials side by side")
    parser.add_argument("--list", action="store_true", help="show what would be run now")
    options = parser.parse_args()
    if options.list:
        print(*wanted_trials(read_rows(OUTPUT)), sep="\n")
    elif options.trial is None:
        _run_all(options.cores, rich.console.Console())
    elif options.learning_rate is None:
        parser.error("--trial needs --learning-rate")
    else:
        _run_one(Trial(options.trial, options.learning_rate, options.seed), options.core)


if __name__ == "__main__":
    main()
