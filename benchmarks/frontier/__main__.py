"""Sweeps the rates of every pair of rules, then trains with the best of each from other seeds.

    python -m benchmarks.frontier                        # all that has no row, for days on CPUs
    python -m benchmarks.frontier --setting 1m --hidden whitened --vocabulary factored
    python -m benchmarks.frontier --workers 4            # that many side by side on one GPU
    python -m benchmarks.frontier --list

Adds its rows to `results/frontier.json` as they come, a row a trial; what has a row is not run
again. `--texts FILE` keeps the tokens, so that another machine trains on the same text; `--minutes`
bounds the time. Eleven pairs of the smallest setting took nine minutes on an H200. On a CPU, a
trial of `1m` takes ten minutes of a core and one of `4m` half an hour.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from benchmarks.frontier.pairs import PAIRS, Pair
from benchmarks.frontier.search import next_trials, rows_of, sweep_of
from benchmarks.frontier.training import Trial
from benchmarks.rows import RESULTS, add_rows, read_rows

OUTPUT = RESULTS / "frontier.json"
COMMAND = "python -m benchmarks.frontier"


def run_pair(
    pair: Pair, output: Path, texts_file: Path | None, until: float, given: Sequence[Trial] = ()
) -> None:
    """Trains until nothing is left to try for a pair, or the time is over; or the given trials."""
    from benchmarks.frontier import training  # in the worker, which may have its share of a GPU

    texts = training.load_texts(texts_file)
    setting = training.SETTINGS[pair.setting]
    lanes = 1 if jax.default_backend() == "cpu" else training.LANES
    while time.time() < until:
        found = read_rows(output)
        done = rows_of(found, pair)
        missing = given or next_trials(pair, done, sweep_of(found, pair))
        trials = [trial for trial in missing if trial not in done][:lanes]
        if not trials:
            return
        began = time.perf_counter()
        losses = training.train(setting, pair.hidden, pair.vocabulary, trials, texts, lanes)
        seconds = time.perf_counter() - began
        rows = [
            pair._asdict() | trial._asdict() | {"validation_loss": loss}
            for trial, loss in zip(trials, losses, strict=True)
        ]
        add_rows(output, COMMAND, rows)
        best = min((loss for loss in losses if loss is not None), default=float("nan"))
        print(f"{pair}: {len(trials)} trials in {seconds:.0f} s, best {best:.4f}", flush=True)


def _trial(text: str) -> Trial:
    *rates, seed = text.split(",")
    hidden, vocabulary, norms = map(float, rates)
    return Trial(hidden, vocabulary, norms, int(seed))


def _chosen(options: argparse.Namespace) -> Iterator[Pair]:
    for pair in PAIRS:
        wanted = (options.setting, options.hidden, options.vocabulary)
        if all(w is None or w == p for w, p in zip(wanted, pair, strict=True)):
            yield pair


def _in_process(pair: Pair, options: argparse.Namespace, until: float) -> int:
    """Runs a pair in a process of its own, with its share of the accelerator's memory."""
    minutes = (until - time.time()) / 60
    if minutes <= 0:
        return 0
    command = [sys.executable, "-m", "benchmarks.frontier", "--minutes", str(minutes)]
    command += ["--output", str(options.output)]
    command += [word for name, value in pair._asdict().items() for word in (f"--{name}", value)]
    if options.texts:
        command += ["--texts", str(options.texts)]
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / options.workers:.2f}"}
    return subprocess.run(command, env=os.environ | share, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, values in zip(Pair._fields, zip(*PAIRS, strict=True), strict=True):
        parser.add_argument(f"--{name}", choices=sorted(set(values)), help="these pairs only")
    parser.add_argument(
        "--trial",
        type=_trial,
        action="append",
        default=[],
        metavar="HIDDEN,VOCABULARY,NORMS,SEED",
        help="with one pair: these rates and seeds only",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no more after")
    parser.add_argument("--texts", type=Path, help="file of tokens: read, or written if missing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--list", action="store_true", help="show what would be run now")
    options = parser.parse_args(arguments)
    pairs, until = list(_chosen(options)), time.time() + 60 * options.minutes
    if options.list:
        found = read_rows(options.output)
        for pair in pairs:
            if trials := next_trials(pair, rows_of(found, pair), sweep_of(found, pair)):
                print(pair, *trials, sep="\n  ")
        return
    if len(pairs) == 1:
        run_pair(pairs[0], options.output, options.texts, until, options.trial)
        return
    if options.trial:
        parser.error("--trial needs --setting, --hidden and --vocabulary")
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        failed = [
            pair
            for pair, code in zip(
                pairs, pool.map(lambda pair: _in_process(pair, options, until), pairs), strict=True
            )
            if code
        ]
    if failed:
        raise SystemExit(f"failed: {'; '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
