"""One run: from its first step or its last checkpoint to the end, or to an interruption."""

import collections
import contextlib
import dataclasses
import functools
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
import optax
import orbax.checkpoint as ocp
import rich.console
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

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
from examples.llama.lora import lora_training
from examples.llama.machine import machine, return_freed_memory
from examples.llama.mesh import batch_sharding, devices_dividing_batch, param_shardings
from examples.llama.metrics import WriteMetrics, open_metrics, read_metrics
from examples.llama.optimizers import (
    FLOAT32_MOMENTS,
    OptimizerSettings,
    learning_rate_schedule,
    make_optimizer,
)
from examples.llama.options import CHANGEABLE, OutputOptions, RunSettings
from examples.llama.processes import agreed, everywhere, writes_files
from examples.llama.progress import Progress, show_progress
from examples.llama.report import RunResult
from examples.llama.step_times import StepTimes
from examples.llama.text import Text, training_batches
from examples.llama.tokenizer import ByteTokenizer

__all__ = [
    "Run",
    "TooManySkippedError",
    "abstract_state",
    "abstract_tokens",
    "finished_line",
    "has_checkpoint",
    "initial_params",
    "placed_step",
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


@dataclasses.dataclass(frozen=True)
class Run:
    """What to train and where to keep it.

    Attributes:
      settings: All that decides its numbers.
      folder: Its checkpoints, metrics and result.
      resume: Whether to go on from what the folder holds.
      mesh: The devices to train on, set by `jax.set_mesh` all along; None for the first. It does
        not belong to the settings: a run may go on on another.
      float32_moments: Whether moments are float32 whatever the weights are; for plans only.
    """

    settings: RunSettings
    folder: Path
    resume: bool
    mesh: Mesh | None = None
    float32_moments: bool = True

    @functools.cached_property
    def training(self) -> train.Training:
        """The way to train that the settings choose."""
        settings = self.settings
        tx, dtype = make_optimizer(settings.optimizer), _DTYPES[settings.compute]
        if settings.update == "layerwise":
            is_float32 = settings.optimizer.name in FLOAT32_MOMENTS
            return layered_training(
                settings.model,
                tx,
                weights=settings.weights,
                dtype=dtype,
                seed=settings.seed,
                float32_moments=self.float32_moments and not is_float32,
                spike_limit=settings.spike_limit,
            )
        make: Callable[..., train.Training] = functools.partial(
            train.standard_training, float32_moments=self.float32_moments
        )
        if settings.lora:
            make = functools.partial(lora_training, rank=settings.lora)
        return make(
            settings.model,
            tx,
            dtype=dtype,
            remat=settings.remat,
            micro_batches=settings.micro_batches,
            seed=settings.seed,
            spike_limit=settings.spike_limit,
        )

    @functools.cached_property
    def placement(self) -> "Placement":
        """Where everything of the run lies."""
        shapes = jax.eval_shape(lambda: _new_params(self))
        init_state = self.training.init_state
        if self.mesh is None:
            device = SingleDeviceSharding(jax.devices()[0])
            params, state = (
                jax.tree.map(lambda _: device, tree)
                for tree in (shapes, jax.eval_shape(init_state, shapes))
            )
            return Placement(params, state, device, device)
        params = param_shardings(self.mesh, shapes)
        return Placement(
            params,
            shardings_of(init_state, shapes, params),
            batch_sharding(self.mesh),
            NamedSharding(self.mesh, PartitionSpec()),
        )


class Placement(NamedTuple):
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


def prepare_evaluation(run: Run, batches: Sequence[np.ndarray]) -> Callable[[model.Params], float]:
    """Returns the mean loss of batches by a state's parameters, in nats, compiled once.

    For all runs that differ from this one in the optimizer only.
    """
    compiled, mesh = jax.jit(run.training.loss), run.mesh
    targets = [int((tokens[:, 1:] >= 0).sum()) for tokens in batches]
    if mesh is not None and len(batches[0]) % devices_dividing_batch(mesh.shape) == 0:
        placed = jax.device_put(list(batches), batch_sharding(mesh))
    else:
        placed = list(batches)
    return lambda params: train.mean_loss(compiled, params, placed, targets)


def has_run(folder: Path) -> bool:
    """Returns whether a folder holds a checkpoint of any run; OSError if all are damaged."""
    return read_record(folder / _CHECKPOINTS) is not None


def has_checkpoint(settings: RunSettings, folder: Path, options: OutputOptions) -> bool:
    """Returns whether there is a checkpoint to go on from; reads no arrays of it.

    Args:
      settings: Of the run; those that are `CHANGEABLE` may differ if the options allow it.
      folder: Of the run.
      options: Whether to resume, and with changes.

    Raises:
      ValueError: If the folder holds another run, or one that is not to be resumed.
      OSError: If the records of all checkpoints are damaged.
    """
    record = read_record(folder / _CHECKPOINTS)
    if record is None:
        return False
    if not options.resume:
        raise ValueError(
            f"{folder} holds a run already; add --resume to continue it, or choose another --output"
        )
    saved, given = record["settings"], json.loads(json.dumps(dataclasses.asdict(settings)))
    planned = saved["optimizer"]["total_steps"]
    if settings.steps < planned:
        raise ValueError(
            f"--steps is {settings.steps} and the run in {folder} was planned for {planned}; a "
            "run can be made longer, not shorter"
        )
    fixed = differing_settings(saved, given, but=CHANGEABLE)
    differences = fixed if options.allow_changes else differing_settings(saved, given)
    if differences:
        remedy = "" if fixed else "Add --allow-changes to continue with the new values, or resume"
        named = "; ".join(differences).replace("optimizer.total_steps", "--steps")
        raise ValueError(
            f"the checkpoint in {folder} is of another run: {named}. {remedy or 'Resume'} with "
            "the flags it was started with, or choose another --output"
        )
    return True


def train_run(
    run: Run,
    text: Text,
    validation_loss_of: Callable[[model.Params], float],
    options: OutputOptions,
    console: rich.console.Console,
    stopped: Callable[[], bool],
) -> RunResult | None:
    """Trains until the last step or until stopped, and saves.

    Args:
      run: What to train.
      text: What to train on.
      validation_loss_of: How to evaluate a state's parameters.
      options: What to keep.
      console: Shows the progress.
      stopped: Asked after every step whether to stop.

    Returns:
      What the run came to; None if it was stopped before its last step.

    Raises:
      OSError: If the disk is full, or all checkpoints are damaged.
      TooManySkippedError: If `most_skipped` steps in a row were skipped; nothing was saved since.
    """
    settings, steps = run.settings, run.settings.steps
    run.folder.mkdir(parents=True, exist_ok=True)
    state, batches, seconds_before = _start(run, text, console)
    with (
        contextlib.closing(batches),
        _open_outputs(run, options, console, done=int(state.step)) as (checkpoints, write, show),
    ):
        take_step, is_stopped = _compile_step(run, state), agreed(stopped, run.mesh)
        times = StepTimes(time.perf_counter)
        watch = _Watch(settings, state, show, times)
        log_every = options.log_every or min(100, max(1, steps // 50))
        evaluate_every = options.evaluate_every or max(1, steps // 5)
        validation_loss, save_is_due = None, False
        began = time.perf_counter() - seconds_before
        if settings.load is not None and int(state.step) == 0:
            loss_as_loaded = validation_loss_of(state.params)
            write({"step": 0, "validation_loss": loss_as_loaded})
            show.evaluation(0, loss_as_loaded)
        if int(state.step) == steps:
            console.print(finished_line(run))
            validation_loss = _last_validation_loss(run)
            if validation_loss is None:
                validation_loss = validation_loss_of(state.params)
                write({"step": steps, "validation_loss": validation_loss})
        return_freed_memory()
        for step in range(int(state.step) + 1, steps + 1):
            step_began = times.begin()
            state, outcome = take_step(state, next(batches)["tokens"])
            watch.see(step, outcome, step_began)

            ends = is_stopped() or step == steps
            evaluates = step == steps or _is_due(step, evaluate_every)
            save_is_due |= _is_due(step, options.checkpoint_every)
            gives_up = watch.skipped_in_a_row >= options.most_skipped
            if ends or evaluates or save_is_due or gives_up or _is_due(step, log_every):
                for line in watch.lines():
                    write(line | {"seconds": time.perf_counter() - began})
                show.step(step, float(outcome.loss), times.median(last=log_every))
            if gives_up:
                raise TooManySkippedError(
                    f"{watch.skipped_in_a_row} steps in a row were skipped, until step {step} "
                    f"({watch.last_cause}); {_last_saved(checkpoints)}"
                )
            if evaluates:
                validation_loss = validation_loss_of(state.params)
                write({"step": step, "validation_loss": validation_loss})
                show.evaluation(step, validation_loss)
            # While steps are skipped, the checkpoints before are what there is to go back to.
            if ends or (save_is_due and watch.skipped_in_a_row == 0):
                record = {
                    "settings": dataclasses.asdict(settings),
                    "batches": batches.get_state(),
                    "seconds": time.perf_counter() - began,
                }
                save(checkpoints, state, record)
                save_is_due = False
            if ends:
                break
    if validation_loss is None or int(state.step) < steps:
        return None
    return _result(run, state, times, validation_loss, text, options)


@contextlib.contextmanager
def _open_outputs(
    run: Run, options: OutputOptions, console: rich.console.Console, *, done: int
) -> Iterator[tuple[ocp.CheckpointManager, WriteMetrics, Progress]]:
    """Opens where goes what comes of the steps after those that are done."""
    settings = run.settings
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            open_checkpoints(run.folder / _CHECKPOINTS, keep=options.keep)
        )
        write = stack.enter_context(
            # Before the first step there is nothing to keep, an evaluation neither.
            open_metrics(run.folder, steps_done=done or -1, tensorboard=options.tensorboard)
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
        yield checkpoints, write, show


def finished_line(run: Run) -> str:
    """Says of a run that took its last step before that nothing is left to do."""
    return (
        f"The run in {run.folder} has taken its last step, {run.settings.steps}, already. Nothing "
        "is trained, whatever the flags. To train on, give more --steps and --allow-changes; for a "
        "new run, choose another --output"
    )


def read_result(run: Run) -> RunResult | None:
    """Returns what a run came to that took its last step before; None if there is none to read."""
    path = run.folder / _RESULT
    if not (run.resume and path.exists()):
        return None
    try:
        result = RunResult(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # damaged, and made anew
        return None
    return result if result.steps == run.settings.steps else None


def _start(
    run: Run, text: Text, console: rich.console.Console
) -> tuple[train.TrainState, grain.DatasetIterator[Any], float]:
    """Returns state, batches and seconds spent: before the first step, or at a checkpoint."""
    batches = training_batches(text, run.settings)
    if not run.resume:
        params = initial_params(run)
        # Donated, so that no second copy of the weights exists.
        init = jax.jit(run.training.init_state, donate_argnums=0, out_shardings=run.placement.state)
        return init(params), batches, 0.0
    restored = restore(run.folder / _CHECKPOINTS, abstract_state(run))
    for damage in restored.damaged:
        console.print(
            f"The checkpoint of step {damage.step} is damaged, {damage.reason}. It was moved to "
            f"{run.folder / 'damaged'}; the run continues from step {int(restored.state.step)}"
        )
    batches.set_state(restored.record["batches"])
    state, optimizer = restored.state, run.settings.optimizer
    if restored.record["settings"]["optimizer"]["seed"] != optimizer.seed:
        state = state._replace(opt_state=_with_key_of(optimizer, state.opt_state))
    return state, batches, restored.record["seconds"]


def _with_key_of(settings: OptimizerSettings, state: PyTree) -> PyTree:
    """Returns an optimizer's state with the key of its projections that the settings give it."""
    keys = optax.tree_utils.tree_get_all_with_path(make_optimizer(settings).init({}), "key")
    return optax.tree_utils.tree_set(state, key=keys[0][1]) if keys else state


def abstract_state(run: Run) -> train.TrainState:
    """Returns the ShapeDtypeStructs of the run's state, with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: run.training.init_state(_new_params(run))),
        run.placement.state,
    )


# One compilation for all runs of a model.
_init_params = jax.jit(model.init_params, static_argnames=("config", "param_dtype", "convert"))


def _new_params(run: Run, seed: int | jax.Array | None = None) -> model.Params:
    settings = run.settings
    return _init_params(
        settings.model,
        settings.seed if seed is None else seed,
        param_dtype=_FLOATS[settings.weights],
        convert=run.training.keep,
    )


def initial_params(run: Run) -> model.Params:
    """Returns the weights before the first step, new or loaded, where and as the run trains them.

    Raises:
      ValueError: If the checkpoint to load is not as it was when the run was prepared.
    """
    settings, shardings = run.settings, run.placement.params
    if settings.load is None and run.mesh is None:
        return _new_params(run)
    if settings.load is None:
        return jax.jit(lambda seed: _new_params(run, seed), out_shardings=shardings)(settings.seed)

    def convert(params: model.Params) -> model.Params:
        floats = jax.tree.map(lambda leaf: leaf.astype(_FLOATS[settings.weights]), params)
        return run.training.keep(floats)

    # In the host's memory: the float weights may not fit on the device.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        _, params = load_llama(settings.load, convert=convert, shardings=shardings)
    return params


def placed_step(run: Run) -> jax.stages.Wrapped:
    """Returns the step of `(state, tokens)` whose results lie as the run's state does."""
    shardings = (run.placement.state, run.placement.loss)
    return jax.jit(run.training.step, donate_argnums=0, out_shardings=shardings)


def abstract_tokens(run: Run) -> jax.ShapeDtypeStruct:
    """Returns the ShapeDtypeStruct of the tokens of a step."""
    shape = (run.settings.batch, run.settings.sequence + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=run.placement.batch)


def _compile_step(run: Run, state: train.TrainState) -> Callable[..., Any]:
    """Returns the compiled step of `(state, tokens)`; the tokens come from the host."""
    placement = run.placement
    compiled = placed_step(run).lower(state, abstract_tokens(run)).compile()
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


def _last_validation_loss(run: Run) -> float | None:
    lines = [line for line in read_metrics(run.folder) if "validation_loss" in line]
    is_last = bool(lines) and lines[-1]["step"] == run.settings.steps
    return lines[-1]["validation_loss"] if is_last else None


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
        self, settings: RunSettings, state: train.TrainState, show: Progress, times: StepTimes
    ):
        self.skipped_in_a_row = int(state.opt_state.in_a_row)
        self.last_cause = ""
        self._skipped = int(state.opt_state.skipped)
        self._settings, self._show, self._times = settings, show, times
        schedule = learning_rate_schedule(settings.optimizer)
        self._learning_rates = np.asarray(schedule(np.arange(settings.steps)))
        self._unseen: collections.deque[tuple[int, Outcome, float]] = collections.deque()
        self._lines: list[dict[str, Any]] = []

    def see(self, step: int, outcome: Outcome, began: float) -> None:
        """Takes up a step that began then, and waits until few enough are not done."""
        self._unseen.append((step, outcome, began))
        self._wait(_STEPS_IN_FLIGHT - 1)

    def lines(self) -> list[dict[str, Any]]:
        """Waits for all steps, and returns a line of metrics for each since the last call."""
        self._wait(0)
        lines, self._lines = self._lines, []
        return lines

    def _wait(self, in_flight: int) -> None:
        while len(self._unseen) > in_flight:
            step, outcome, began = self._unseen.popleft()
            outcome = jax.device_get(self._times.wait(began, outcome))
            cause, loss = cause_of(outcome), float(outcome.loss)
            line = {
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                # The schedule follows the steps taken.
                "learning_rate": float(self._learning_rates[step - 1 - self._skipped]),
                "tokens": step * self._settings.tokens_per_step,
            }
            self._lines.append(line | ({"skipped": cause} if cause else {}))
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if cause else 0
            if cause:
                self._skipped += 1
                self.last_cause = cause
                self._show.skipped(step, cause, self._skipped)


def _result(
    run: Run,
    state: train.TrainState,
    times: StepTimes,
    validation_loss: float,
    text: Text,
    options: OutputOptions,
) -> RunResult:
    settings = run.settings
    first = read_metrics(run.folder)[0] if writes_files() else {"step": 1}
    is_bytes = isinstance(text.tokenizer, ByteTokenizer)
    if options.export is not None:
        _export(options.export, run, state.params, text)
    if not times and (finished := read_result(run)):
        return finished
    result = RunResult(
        optimizer=settings.optimizer.name + (f", LoRA {settings.lora}" if settings.lora else ""),
        learning_rate=settings.optimizer.learning_rate,
        steps=settings.steps,
        tokens=settings.steps * settings.tokens_per_step,
        validation_loss=validation_loss,
        loss_as_loaded=first["validation_loss"] if first["step"] == 0 else None,
        bits_per_byte=validation_loss / math.log(2) if is_bytes else None,
        state_bytes=tree_bytes(state.opt_state),
        parameter_bytes=tree_bytes(state.params),
        step_milliseconds=1000 * times.median() if times else None,
        skipped_steps=int(state.opt_state.skipped),
        sample=_sample(run, state.params, text, options),
        machine=machine(),
    )
    if writes_files():
        write_text(run.folder / _RESULT, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def _export(folder: Path, run: Run, params: Any, text: Text) -> None:
    params = everywhere(params)
    if not writes_files():
        return
    # On the host, where there is room for a float tensor.
    host = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), ("host",))
    settings, floats = run.settings, run.training.float_params
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filled(folder) as partial, jax.set_mesh(host):
        params = jax.device_put(params, host.devices[0])
        save_llama(partial, settings.model, params, floats=floats, like=settings.load)
        text.tokenizer.save(partial / "tokenizer.json")


def _sample(run: Run, params: Any, text: Text, options: OutputOptions) -> str:
    """Returns the beginning of the validation text as the model continues it."""
    if options.sample_length == 0:
        return ""
    beginning = text.beginning(_PROMPT_TOKENS)
    written = generate(
        run.training.logits,
        params,
        beginning,
        length=options.sample_length,
        window=run.settings.sequence,
        temperature=options.temperature,
        seed=run.settings.seed,
    )
    return text.tokenizer.decode(np.concatenate([beginning, written]))
