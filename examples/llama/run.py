"""One run: from its first step or its last checkpoint to the end, or to an interruption."""

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import rich.console
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from apollo_optax.sharding import shardings_of
from examples.llama import model, train
from examples.llama.bad_steps import Outcome, cause_of
from examples.llama.checkpoint import (
    differing_settings,
    open_checkpoints,
    read_record,
    restore,
    save,
    tree_bytes,
)
from examples.llama.files import filled, write_text
from examples.llama.generate import generate
from examples.llama.huggingface import load_llama, save_llama
from examples.llama.layered import layered_training
from examples.llama.machine import machine
from examples.llama.mesh import batch_sharding, devices_dividing_batch, param_shardings
from examples.llama.metrics import WriteMetrics, open_metrics, read_metrics
from examples.llama.optimizers import FLOAT32_MOMENTS, learning_rate_schedule, make_optimizer
from examples.llama.options import CHANGEABLE, OutputOptions, RunSettings
from examples.llama.processes import agreed, everywhere, writes_files
from examples.llama.progress import Progress, show_progress
from examples.llama.report import RunResult
from examples.llama.step_times import StepTimes
from examples.llama.text import Text, training_batches
from examples.llama.tokenizer import ByteTokenizer

__all__ = [
    "Evaluation",
    "Run",
    "TooManySkippedError",
    "abstract_state",
    "has_checkpoint",
    "initial_params",
    "prepare_evaluation",
    "read_result",
    "train_run",
]

_DTYPES: dict[str, DTypeLike] = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# What weights are before they are quantized.
_FLOATS = _DTYPES | {"int8": jnp.float32}

# Enough to keep the device busy, few enough for Ctrl-C to answer at once.
_STEPS_IN_FLIGHT = 2
_CHECKPOINTS = "checkpoints"
_RESULT = "result.json"
_PROMPT_TOKENS = 32


class TooManySkippedError(Exception):
    """So many steps in a row could not be taken that to go on makes no sense."""


class Run(NamedTuple):
    """What to train and where to keep it.

    Attributes:
      settings: All that decides its numbers.
      folder: Its checkpoints, metrics and result.
      resume: Whether to go on from what the folder holds.
      mesh: The devices to train on, set by `jax.set_mesh` all along; None for the first. It does
        not belong to the settings: a run may go on on another.
    """

    settings: RunSettings
    folder: Path
    resume: bool
    mesh: Mesh | None = None


class Evaluation(NamedTuple):
    """The evaluation that runs of one model share, compiled once.

    Attributes:
      validation_loss: Mean loss of the validation batches, in nats, of a state's parameters.
      every: Steps between two evaluations.
    """

    validation_loss: Callable[[model.Params], float]
    every: int


def prepare_evaluation(
    settings: RunSettings, batches: Sequence[np.ndarray], *, every: int, mesh: Mesh | None = None
) -> Evaluation:
    """Returns the evaluation of a run, for all runs that differ from it in the optimizer only."""
    compiled = jax.jit(training(settings).loss)
    if mesh is not None and len(batches[0]) % devices_dividing_batch(mesh.shape) == 0:
        placed = jax.device_put(list(batches), batch_sharding(mesh))
    else:
        placed = list(batches)
    return Evaluation(lambda params: train.mean_loss(compiled, params, placed), every)


def training(settings: RunSettings) -> train.Training:
    """Returns the way to train that the settings choose."""
    tx, dtype = make_optimizer(settings.optimizer), _DTYPES[settings.compute]
    if settings.update == "layerwise":
        return layered_training(
            settings.model,
            tx,
            weights=settings.weights,
            dtype=dtype,
            seed=settings.seed,
            float32_moments=settings.optimizer.name not in FLOAT32_MOMENTS,
            spike_limit=settings.spike_limit,
        )
    return train.standard_training(
        settings.model,
        tx,
        dtype=dtype,
        remat=settings.remat,
        micro_batches=settings.micro_batches,
        seed=settings.seed,
        spike_limit=settings.spike_limit,
    )


def has_checkpoint(run: Run, *, changes: bool = False) -> bool:
    """Returns whether the run has a checkpoint to go on from; reads no arrays of it.

    Args:
      run: The run.
      changes: Whether settings that are `CHANGEABLE` may be other ones.

    Raises:
      ValueError: If the folder holds another run, or one that is not to be resumed.
      OSError: If the records of all checkpoints are damaged.
    """
    record = read_record(run.folder / _CHECKPOINTS)
    if record is None:
        return False
    if not run.resume:
        raise ValueError(
            f"{run.folder} holds a run already; go on with it by --resume, or choose another "
            "--output"
        )
    saved, given = record["settings"], _as_json(run.settings)
    fixed = differing_settings(saved, given, but=CHANGEABLE)
    differences = fixed if changes else differing_settings(saved, given)
    if differences:
        remedy = "" if fixed else "Add --allow-changes to go on with the new values, or resume"
        named = "; ".join(differences).replace("optimizer.total_steps", "--steps")
        raise ValueError(
            f"the checkpoint in {run.folder} is of another run: {named}. {remedy or 'Resume'} with "
            "the flags it was started with, or choose another --output"
        )
    planned = saved["optimizer"]["total_steps"]
    if run.settings.steps < planned:
        raise ValueError(
            f"--steps is {run.settings.steps} and the run in {run.folder} was planned for "
            f"{planned}; a run can be made longer, not shorter"
        )
    return True


def _as_json(settings: RunSettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def train_run(
    run: Run,
    text: Text,
    evaluation: Evaluation,
    options: OutputOptions,
    console: rich.console.Console,
    stopped: Callable[[], bool],
    most_skipped: int,
) -> RunResult | None:
    """Trains until the last step or until stopped, and saves.

    Args:
      run: What to train.
      text: What to train on.
      evaluation: How to evaluate.
      options: What to keep.
      console: Shows the progress.
      stopped: Asked after every step whether to stop.
      most_skipped: Steps in a row that may be skipped.

    Returns:
      What the run came to; None if it was stopped before its last step.

    Raises:
      OSError: If the disk is full, or all checkpoints are damaged.
      TooManySkippedError: If `most_skipped` steps in a row were skipped; nothing was saved since.
    """
    settings = run.settings
    run.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        start = _start(run, text, console)
        stack.enter_context(contextlib.closing(start.batches))
        checkpoints = stack.enter_context(
            open_checkpoints(run.folder / _CHECKPOINTS, keep=options.keep)
        )
        done = int(start.state.step)
        write = stack.enter_context(
            open_metrics(run.folder, steps_done=done, tensorboard=options.tensorboard)
            if writes_files()
            else contextlib.nullcontext(lambda metrics: None)
        )
        show = stack.enter_context(
            show_progress(
                console,
                settings.optimizer.name,
                steps=settings.steps,
                done=done,
                tokens_per_step=settings.tokens_per_step,
            )
        )
        kept = _Kept(checkpoints, write, show, options, most_skipped)
        taken = _take_steps(run, start, evaluation, kept, stopped)
    if int(taken.state.step) < settings.steps:
        return None
    return _result(run, taken, text, options)


def read_result(run: Run) -> RunResult | None:
    """Returns what a run came to that took its last step before; None if it has not."""
    path = run.folder / _RESULT
    if not (run.resume and path.exists()):
        return None
    result = RunResult(**json.loads(path.read_text(encoding="utf-8")))
    return result if result.steps == run.settings.steps else None


class _Start(NamedTuple):
    """Where a run goes on from: before its first step, or at a checkpoint."""

    state: train.TrainState
    batches: grain.DatasetIterator[Any]
    seconds: float


def _start(run: Run, text: Text, console: rich.console.Console) -> _Start:
    settings = run.settings
    init_state = training(settings).init_state
    batches = training_batches(text, settings)
    placement = _placement(run)
    if not run.resume:
        params = initial_params(run)
        # Donated, so that no second copy of the weights exists.
        init = jax.jit(init_state, donate_argnums=0, out_shardings=placement.state)
        return _Start(init(params), batches, 0.0)
    restored = restore(run.folder / _CHECKPOINTS, abstract_state(run))
    for damage in restored.damaged:
        console.print(
            f"The checkpoint of step {damage.step} is damaged, {damage.reason}. It was moved to "
            f"{run.folder / 'damaged'}; the run goes on from step {int(restored.state.step)}"
        )
    batches.set_state(restored.record["batches"])
    return _Start(restored.state, batches, restored.record["seconds"])


def abstract_state(run: Run) -> train.TrainState:
    """Returns the ShapeDtypeStructs of the run's state, with their shardings."""
    init_state = training(run.settings).init_state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: init_state(_new_params(run.settings))),
        _placement(run).state,
    )


class _Placement(NamedTuple):
    """Where everything of a run lies.

    Attributes:
      params: The sharding of each parameter, as `model.init_params` returns it.
      state: The sharding of each leaf of the state.
      batch: Of the tokens of a step.
      loss: Of its loss.
    """

    params: Any
    state: Any
    batch: Sharding
    loss: Sharding


def _placement(run: Run) -> _Placement:
    shapes = jax.eval_shape(lambda: _new_params(run.settings))
    init_state = training(run.settings).init_state
    if run.mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        params, state = (
            jax.tree.map(lambda _: device, tree)
            for tree in (shapes, jax.eval_shape(init_state, shapes))
        )
        return _Placement(params, state, device, device)
    params = param_shardings(run.mesh, shapes)
    return _Placement(
        params,
        shardings_of(init_state, shapes, params),
        batch_sharding(run.mesh),
        NamedSharding(run.mesh, PartitionSpec()),
    )


# One compilation for all runs of a model.
_init_params = jax.jit(model.init_params, static_argnames=("config", "param_dtype", "convert"))


def _new_params(settings: RunSettings, seed: int | jax.Array | None = None) -> model.Params:
    return _init_params(
        settings.model,
        settings.seed if seed is None else seed,
        param_dtype=_FLOATS[settings.weights],
        convert=training(settings).keep,
    )


def initial_params(run: Run) -> model.Params:
    """Returns the weights before the first step, new or loaded, where and as the run trains them.

    Raises:
      ValueError: If the checkpoint to load is not as it was when the run was prepared.
    """
    settings, placement = run.settings, _placement(run)
    if settings.load is None and run.mesh is None:
        return _new_params(settings)
    if settings.load is None:
        new_params = jax.jit(
            lambda seed: _new_params(settings, seed), out_shardings=placement.params
        )
        return new_params(settings.seed)
    keep = training(settings).keep

    def convert(params: model.Params) -> model.Params:
        return keep(jax.tree.map(lambda leaf: leaf.astype(_FLOATS[settings.weights]), params))

    # In the host's memory: the float weights may not fit on the device.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        _, params = load_llama(settings.load, convert=convert, shardings=placement.params)
    return params


class _Kept(NamedTuple):
    """Where what comes of the steps goes."""

    checkpoints: ocp.CheckpointManager
    write: WriteMetrics
    show: Progress
    options: OutputOptions
    most_skipped: int


class _Taken(NamedTuple):
    """What came of the steps: the state, their times, the last validation loss if any."""

    state: train.TrainState
    times: StepTimes
    validation_loss: float | None


def _compile_step(run: Run, state: train.TrainState) -> Callable[..., Any]:
    """Returns the compiled step of `(state, tokens)`; the tokens come from the host."""
    settings, placement = run.settings, _placement(run)
    tokens = jax.ShapeDtypeStruct(
        (settings.batch, settings.sequence + 1), jnp.int32, sharding=placement.batch
    )
    step = jax.jit(
        training(settings).step, donate_argnums=0, out_shardings=(placement.state, placement.loss)
    )
    compiled = step.lower(state, tokens).compile()
    # On a CPU, the collectives of two steps in flight can wait for each other's threads.
    one_at_a_time = run.mesh is not None and jax.default_backend() == "cpu"

    def take_step(state: train.TrainState, tokens: np.ndarray) -> Any:
        # Every process has the whole batch, and puts its rows of it on its devices.
        placed = jax.make_array_from_callback(
            tokens.shape, placement.batch, lambda rows: tokens[rows]
        )
        done = compiled(state, placed)
        return jax.block_until_ready(done) if one_at_a_time else done

    return take_step


def _take_steps(
    run: Run,
    start: _Start,
    evaluation: Evaluation,
    kept: _Kept,
    stopped: Callable[[], bool],
) -> _Taken:
    """Takes the steps that are left."""
    settings = run.settings
    state, batches, steps = start.state, start.batches, settings.steps
    log_every = kept.options.log_every or min(100, max(1, steps // 50))
    train_step = _compile_step(run, state)
    is_stopped = agreed(stopped, run.mesh)
    times = StepTimes(time.perf_counter)
    watch = _Watch(settings, state, kept, times)
    outcomes: list[Outcome] = []
    validation_loss = None
    save_is_due = False
    began = time.perf_counter() - start.seconds
    for step in range(int(state.step) + 1, steps + 1):
        step_began = times.begin()
        state, outcome = train_step(state, next(batches)["tokens"])
        outcomes.append(outcome)
        watch.see(step, outcome, step_began, in_flight=_STEPS_IN_FLIGHT)

        ends = is_stopped() or step == steps
        evaluates = step == steps or _is_due(step, evaluation.every)
        save_is_due |= _is_due(step, kept.options.checkpoint_every)
        gives_up = watch.skipped_in_a_row >= kept.most_skipped
        if ends or evaluates or save_is_due or gives_up or _is_due(step, log_every):
            watch.settle()
            for line in watch.metrics(step, jax.device_get(outcomes)):
                kept.write(line | {"seconds": time.perf_counter() - began})
            kept.show.step(step, float(outcome.loss), times.median(last=log_every))
            outcomes.clear()
        if gives_up:
            raise TooManySkippedError(
                f"{watch.skipped_in_a_row} steps in a row were skipped, until step {step} "
                f"({watch.last_cause}); " + _last_saved(kept.checkpoints)
            )
        if evaluates:
            validation_loss = evaluation.validation_loss(state.params)
            kept.write({"step": step, "validation_loss": validation_loss})
            kept.show.evaluation(step, validation_loss)
        # While steps are skipped, the checkpoints before are what there is to go back to.
        if ends or (save_is_due and watch.skipped_in_a_row == 0):
            record = {
                "settings": dataclasses.asdict(settings),
                "batches": batches.get_state(),
                "seconds": time.perf_counter() - began,
            }
            save(kept.checkpoints, state, record)
            save_is_due = False
        if ends:
            break
    return _Taken(state, times, validation_loss)


def _last_saved(checkpoints: ocp.CheckpointManager) -> str:
    step = checkpoints.latest_step()
    if step is None:
        return "no checkpoint was saved before"
    return f"the last checkpoint is that of step {step}"


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Watch:
    """Follows from the host what comes of the steps, a little behind the device.

    Attributes:
      skipped_in_a_row: How many of the last steps seen were skipped.
      last_cause: Why the last one of them was.
    """

    def __init__(
        self, settings: RunSettings, state: train.TrainState, kept: _Kept, times: StepTimes
    ):
        self.skipped_in_a_row = int(state.opt_state.in_a_row)
        self.last_cause = ""
        self._skipped = int(state.opt_state.skipped)
        self._taken_before_metrics = int(state.step) - self._skipped
        self._settings, self._show, self._times = settings, kept.show, times
        schedule = learning_rate_schedule(settings.optimizer)
        self._learning_rates = np.asarray(schedule(np.arange(settings.steps)))
        self._unseen: collections.deque[tuple[int, Outcome, float]] = collections.deque()

    def see(self, step: int, outcome: Outcome, began: float, *, in_flight: int) -> None:
        """Takes up a step that began then, and waits until so many at most are not done."""
        self._unseen.append((step, outcome, began))
        while len(self._unseen) >= in_flight:
            self._see_one(*self._unseen.popleft())

    def settle(self) -> None:
        """Waits for all steps."""
        while self._unseen:
            self._see_one(*self._unseen.popleft())

    def _see_one(self, step: int, outcome: Outcome, began: float) -> None:
        cause = cause_of(self._times.wait(began, outcome))
        if not cause:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self._skipped += 1
        self.last_cause = cause
        self._show.skipped(step, cause, self._skipped)

    def metrics(self, last: int, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
        """Makes the lines of the last steps, once each; learning rates follow the steps taken."""
        for step, outcome in enumerate(outcomes, start=last - len(outcomes) + 1):
            cause, loss = cause_of(outcome), float(outcome.loss)
            line = {
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                "learning_rate": float(self._learning_rates[self._taken_before_metrics]),
                "tokens": step * self._settings.tokens_per_step,
            }
            self._taken_before_metrics += not cause
            yield line | ({"skipped": cause} if cause else {})


def _result(run: Run, taken: _Taken, text: Text, options: OutputOptions) -> RunResult:
    settings, state = run.settings, taken.state
    validation_loss = taken.validation_loss
    if validation_loss is None:  # the last step was taken before
        validation_loss = read_metrics(run.folder)[-1]["validation_loss"]
    is_bytes = isinstance(text.tokenizer, ByteTokenizer)
    if options.export is not None:
        _export(options.export, run, state.params, text)
    result = RunResult(
        optimizer=settings.optimizer.name,
        learning_rate=settings.optimizer.learning_rate,
        steps=settings.steps,
        tokens=settings.steps * settings.tokens_per_step,
        validation_loss=validation_loss,
        bits_per_byte=validation_loss / math.log(2) if is_bytes else None,
        state_bytes=tree_bytes(state.opt_state),
        parameter_bytes=tree_bytes(state.params),
        step_milliseconds=_step_milliseconds(run, taken.times),
        skipped_steps=int(state.opt_state.skipped),
        sample=_sample(settings, state.params, text, options),
        machine=machine(),
    )
    if writes_files():
        write_text(run.folder / _RESULT, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def _export(folder: Path, run: Run, params: Any, text: Text) -> None:
    # In the host's memory: the float weights may not fit on the device.
    params = everywhere(params)
    if not writes_files():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filled(folder) as partial, jax.default_device(jax.local_devices(backend="cpu")[0]):
        floats = training(run.settings).float_params(params)
        save_llama(partial, run.settings.model, floats, like=run.settings.load)
        text.tokenizer.save(partial / "tokenizer.json")


def _step_milliseconds(run: Run, times: StepTimes) -> float | None:
    if times:
        return 1000 * times.median()
    finished_before = read_result(run)
    return finished_before.step_milliseconds if finished_before else None


def _sample(settings: RunSettings, params: Any, text: Text, options: OutputOptions) -> str:
    """Returns the beginning of the validation text as the model continues it."""
    if options.sample_length == 0:
        return ""
    beginning = text.validation[:_PROMPT_TOKENS]
    written = generate(
        training(settings).logits,
        params,
        beginning,
        length=options.sample_length,
        window=settings.sequence,
        temperature=options.temperature,
        seed=settings.seed,
    )
    return text.tokenizer.decode(np.concatenate([beginning, written]))
