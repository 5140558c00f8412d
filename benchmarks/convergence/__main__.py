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
import subprocess
import sys
import time

from benchmarks.convergence.methods import ABLATIONS, METHODS, STEPS, Trial
from benchmarks.convergence.search import wanted_trials
from benchmarks.rows import RESULTS, add_row, read_rows

OUTPUT = RESULTS / "convergence.json"
COMMAND = "python -m benchmarks.convergence"
# So many have a cause of their own, which the others would meet too.
_FAILURES = 3


def _run_one(trial: Trial, core: int | None) -> None:
    if core is not None:
        with contextlib.suppress(AttributeError):  # only Linux has it
            os.sched_setaffinity(0, {core})
    from benchmarks.convergence.training import run_trial  # after the core is chosen

    def show(step: int, loss: float) -> None:
        print(f"{trial}: step {step}/{STEPS}, loss {loss:.4f}", end="\r", flush=True)

    row = run_trial(trial, show if sys.stdout.isatty() else lambda step, loss: None)
    add_row(OUTPUT, COMMAND, row)
    print(f"{trial}: {row['validation_loss']}, {row['seconds']:.0f} s", flush=True)


def _command_of(trial: Trial, core: int) -> list[str]:
    options = ["--trial", trial.name, "--learning-rate", repr(trial.learning_rate)]
    options += ["--seed", str(trial.seed), "--core", str(core)]
    return [sys.executable, "-m", "benchmarks.convergence", *options]


def _run_all(cores: int) -> None:
    free: queue.Queue[int] = queue.Queue()
    for core in range(cores):
        free.put(core)
    failed: set[Trial] = set()
    began, ended = time.perf_counter(), 0

    def run(trial: Trial) -> Trial:
        core = free.get()
        try:
            subprocess.run(_command_of(trial, core), check=True)
        finally:
            free.put(core)
        return trial

    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        running: dict[concurrent.futures.Future[Trial], Trial] = {}
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
                    print(f"{trial}: failed, {future.exception()}", file=sys.stderr, flush=True)
            ended += len(done)
            left = len(wanted_trials(read_rows(OUTPUT)))
            minutes = (time.perf_counter() - began) / 60
            each = minutes / ended
            print(
                f"[{minutes:.0f} min] {ended} ended, {left} known to be left, "
                f"about {left * each:.0f} min",
                flush=True,
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
        _run_all(options.cores)
    elif options.learning_rate is None:
        parser.error("--trial needs --learning-rate")
    else:
        _run_one(Trial(options.trial, options.learning_rate, options.seed), options.core)


if __name__ == "__main__":
    main()
