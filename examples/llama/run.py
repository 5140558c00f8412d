"""One run: from its first step or its last checkpoint to the end, or to an interruption."""

import contextlib
import dataclasses
import json
import math
import statistics
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
from examples.llama.checkpoint import (
    differing_settings,
    open_checkpoints,
    read_record,
    restore_state,
    save,
    tree_bytes,
)
from examples.llama.generate import generate
from examples.llama.huggingface import load_llama, save_llama
from examples.llama.layered import layered_training
from examples.llama.mesh import batch_sharding, devices_dividing_batch, param_shardings
from examples.llama.metrics import WriteMetrics, open_metrics, read_metrics
from examples.llama.optimizers import FLOAT32_MOMENTS, learning_rate_schedule, make_optimizer
from examples.llama.options import OutputOptions, RunSettings
from examples.llama.progress import Progress, show_progress
from examples.llama.report import RunResult
from examples.llama.text import Text, training_batches
from examples.llama.tokenizer import ByteTokenizer

__all__ = ["Evaluation", "Run", "has_checkpoint", "prepare_evaluation", "read_result", "train_run"]

_DTYPES: dict[str, DTypeLike] = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# What weights are before they are quantized.
_FLOATS = _DTYPES | {"int8": jnp.float32}

# Enough to keep the device busy, few enough for Ctrl-C to answer at once.
_STEPS_IN_FLIGHT = 2
_CHECKPOINTS = "checkpoints"
_RESULT = "result.json"
_PROMPT_TOKENS = 32


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
        )
    return train.standard_training(
        settings.model,
        tx,
        dtype=dtype,
        remat=settings.remat,
        micro_batches=settings.micro_batches,
        seed=settings.seed,
    )


def has_checkpoint(run: Run) -> bool:
    """Returns whether the run has a checkpoint to go on from; reads no arrays of it.

    Raises:
      ValueError: If the folder holds another run, or one that is not to be resumed.
    """
    record = None
    if (run.folder / _CHECKPOINTS).is_dir():
        with open_checkpoints(run.folder / _CHECKPOINTS) as checkpoints:
            record = read_record(checkpoints)
    if record is None:
        return False
    if not run.resume:
        raise ValueError(
            f"{run.folder} holds a run already; go on with it by --resume, or choose another "
            "--output"
        )
    if differences := differing_settings(record["settings"], _as_json(run.settings)):
        raise ValueError(
            f"the checkpoint in {run.folder} is of another run: {'; '.join(differences)}. Resume "
            "with the flags it was started with, or choose another --output"
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
) -> RunResult | None:
    """Trains until the last step or until stopped, and saves.

    Args:
      run: What to train.
      text: What to train on.
      evaluation: How to evaluate.
      options: What to keep.
      console: Shows the progress.
      stopped: Asked after every step whether to stop.

    Returns:
      What the run came to; None if it was stopped before its last step.

    Raises:
      OSError: If the disk is full.
    """
    settings = run.settings
    run.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = run.folder / _CHECKPOINTS
        checkpoints = stack.enter_context(open_checkpoints(folder, keep=options.keep))
        start = _start(run, text, checkpoints)
        stack.enter_context(contextlib.closing(start.batches))
        done = int(start.state.step)
        write = stack.enter_context(
            open_metrics(run.folder, steps_done=done, tensorboard=options.tensorboard)
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
        kept = _Kept(checkpoints, write, show, options)
        state, step_seconds = _take_steps(run, start, evaluation, kept, stopped)
    if int(state.step) < settings.steps:
        return None
    return _result(run, state, text, options, step_seconds)


def read_result(run: Run) -> RunResult | None:
    """Returns what a run came to that took its last step before; None if it has not."""
    path = run.folder / _RESULT
    if not (run.resume and path.exists()):
        return None
    return RunResult(**json.loads(path.read_text(encoding="utf-8")))


class _Start(NamedTuple):
    """Where a run goes on from: before its first step, or at a checkpoint."""

    state: train.TrainState
    batches: grain.DatasetIterator[Any]
    seconds: float


def _start(run: Run, text: Text, checkpoints: ocp.CheckpointManager) -> _Start:
    settings = run.settings
    init_state = training(settings).init_state
    batches = training_batches(text, settings)
    record = read_record(checkpoints) if run.resume else None
    placement = _placement(run)
    if record is None:
        params = _initial_params(run, placement)
        # Donated, so that no second copy of the weights exists.
        init = jax.jit(init_state, donate_argnums=0, out_shardings=placement.state)
        return _Start(init(params), batches, 0.0)
    batches.set_state(record["batches"])
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: init_state(_new_params(settings))),
        placement.state,
    )
    return _Start(restore_state(checkpoints, abstract_state), batches, record["seconds"])


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


def _initial_params(run: Run, placement: _Placement) -> model.Params:
    settings = run.settings
    if settings.load is None and run.mesh is None:
        return _new_params(settings)
    if settings.load is None:
        new_params = jax.jit(
            lambda seed: _new_params(settings, seed), out_shardings=placement.params
        )
        return new_params(settings.seed)
    # In the host's memory: the float weights may not fit on the device.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        _, params = load_llama(settings.load)
        params = jax.tree.map(lambda leaf: leaf.astype(_FLOATS[settings.weights]), params)
        params = training(settings).keep(params)
    return jax.device_put(params, placement.params)


class _Kept(NamedTuple):
    """Where what comes of the steps goes."""

    checkpoints: ocp.CheckpointManager
    write: WriteMetrics
    show: Progress
    options: OutputOptions


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
        done = compiled(state, jax.device_put(tokens, placement.batch))
        return jax.block_until_ready(done) if one_at_a_time else done

    return take_step


def _take_steps(
    run: Run,
    start: _Start,
    evaluation: Evaluation,
    kept: _Kept,
    stopped: Callable[[], bool],
) -> tuple[train.TrainState, list[float]]:
    """Takes the steps that are left; returns the state and the seconds of each step."""
    settings = run.settings
    state, batches, steps = start.state, start.batches, settings.steps
    log_every = kept.options.log_every or min(100, max(1, steps // 50))
    train_step = _compile_step(run, state)
    step_metrics = _step_metrics(settings)
    losses: list[jax.Array] = []
    step_seconds: list[float] = []
    began = time.perf_counter() - start.seconds
    for step in range(int(state.step) + 1, steps + 1):
        step_began = time.perf_counter()
        state, loss = train_step(state, next(batches)["tokens"])
        losses.append(loss)
        losses[-_STEPS_IN_FLIGHT:][0].block_until_ready()
        step_seconds.append(time.perf_counter() - step_began)

        ends = stopped() or step == steps
        evaluates = step == steps or _is_due(step, evaluation.every)
        saves = ends or _is_due(step, kept.options.checkpoint_every)
        if ends or evaluates or saves or _is_due(step, log_every):
            for line in step_metrics(step, jax.device_get(losses)):
                kept.write(line | {"seconds": time.perf_counter() - began})
            kept.show.step(step, float(losses[-1]), statistics.median(step_seconds[-log_every:]))
            losses.clear()
        if evaluates:
            validation_loss = evaluation.validation_loss(state.params)
            kept.write({"step": step, "validation_loss": validation_loss})
            kept.show.evaluation(step, validation_loss)
        if saves:
            record = {
                "settings": dataclasses.asdict(settings),
                "batches": batches.get_state(),
                "seconds": time.perf_counter() - began,
            }
            save(kept.checkpoints, state, record)
        if ends:
            break
    return state, step_seconds


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _step_metrics(
    settings: RunSettings,
) -> Callable[[int, Sequence[Any]], Iterator[dict[str, float]]]:
    """Returns the function that makes the metrics of the last steps of their losses."""
    schedule = learning_rate_schedule(settings.optimizer)
    learning_rates = np.asarray(schedule(np.arange(settings.steps)))

    def step_metrics(last: int, losses: Sequence[Any]) -> Iterator[dict[str, float]]:
        for step, loss in enumerate(losses, start=last - len(losses) + 1):
            yield {
                "step": step,
                "loss": float(loss),
                "learning_rate": float(learning_rates[step - 1]),
                "tokens": step * settings.tokens_per_step,
            }

    return step_metrics


def _result(
    run: Run,
    state: train.TrainState,
    text: Text,
    options: OutputOptions,
    step_seconds: Sequence[float],
) -> RunResult:
    settings = run.settings
    validation_loss = read_metrics(run.folder)[-1]["validation_loss"]
    is_bytes = isinstance(text.tokenizer, ByteTokenizer)
    if options.export is not None:
        # In the host's memory: the float weights may not fit on the device.
        params = jax.device_put(state.params, jax.local_devices(backend="cpu")[0])
        save_llama(options.export, settings.model, training(settings).float_params(params))
        text.tokenizer.save(options.export / "tokenizer.json")
    result = RunResult(
        optimizer=settings.optimizer.name,
        learning_rate=settings.optimizer.learning_rate,
        steps=settings.steps,
        tokens=settings.steps * settings.tokens_per_step,
        validation_loss=validation_loss,
        bits_per_byte=validation_loss / math.log(2) if is_bytes else None,
        state_bytes=tree_bytes(state.opt_state),
        parameter_bytes=tree_bytes(state.params),
        step_milliseconds=_step_milliseconds(run, step_seconds),
        sample=_sample(settings, state.params, text, options),
    )
    (run.folder / _RESULT).write_text(
        json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8"
    )
    return result


def _step_milliseconds(run: Run, step_seconds: Sequence[float]) -> float | None:
    if step_seconds:
        return 1000 * statistics.median(step_seconds)
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
