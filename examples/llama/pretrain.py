"""Pre-trains a LLaMA: `python -m examples.llama.pretrain --help`."""

import contextlib
import dataclasses
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import rich.console
from jax.sharding import Mesh

from examples.llama.command_line import parse
from examples.llama.config import MODELS, parameter_count
from examples.llama.corpus import Corpus, load_corpus
from examples.llama.files import holds_lock, locked, replaced, require_fillable
from examples.llama.huggingface import StoredModel, checkpoint_file, describe_llama
from examples.llama.instructions import ChatTemplate, load_examples
from examples.llama.interruption import caught_signals
from examples.llama.memory import advice, require_memory
from examples.llama.mesh import devices_dividing_batch, make_mesh, parse_mesh
from examples.llama.metrics import read_metrics
from examples.llama.model import Params
from examples.llama.optimizers import OPTIMIZERS
from examples.llama.options import (
    PretrainConfig,
    RunSettings,
    check_options,
    compared_optimizers,
    resolve,
)
from examples.llama.processes import (
    joined_processes,
    lost_process,
    require_in_first,
    writes_files,
)
from examples.llama.report import RunResult, draw_curves, results_table, write_results
from examples.llama.run import (
    Run,
    TooManySkippedError,
    finished_line,
    has_checkpoint,
    has_run,
    prepare_evaluation,
    read_result,
    train_run,
)
from examples.llama.summary import optimizer_line, settings_lines, state_line, state_table
from examples.llama.text import (
    Text,
    read_examples,
    read_text,
    training_batches,
    validation_batches,
)
from examples.llama.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, read_tokenizer

__all__ = ["Plan", "main", "prepare", "train_all"]

_PROGRAM = "python -m examples.llama.pretrain"
_EXAMPLES = (
    "--compare adamw,apollo,apollo_mini",
    "--data my_texts/ --tokenizer train:4096 --optimizer apollo_mini --steps 2000",
    "--load llama_folder/ --data prose.txt --export tuned/",
)
_TOKENIZER = "tokenizer.json"
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


class Plan(NamedTuple):
    """The runs of a command line, ready to start.

    Attributes:
      runs: The runs, one for each optimizer, in the order of training.
      text: The text that all runs train on.
      validation_loss: A function that evaluates the parameters of any run.
      folder: The folder that the comparison is written to.
    """

    runs: Sequence[Run]
    text: Text
    validation_loss: Callable[[Params], float]
    folder: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: Its arguments; those of the process if None.

    Returns:
      The exit code: 0; 1 if the run could not read or write something, as with a full disk, or
      skipped every step; 2 for wrong input; or 128 plus the number of the signal that stopped the
      run, as in shells.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(PretrainConfig, _PROGRAM, arguments, _EXAMPLES)
    resuming = _resuming_command(arguments)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(joined_processes(config.processes))
            if config.output.describe:
                return _describe(config)
            plan = prepare(config)
            require_in_first(lambda: _claim(plan, config, stack))
        except (ValueError, ImportError, OSError, jax.errors.JaxRuntimeError) as error:
            return _answer(f"error: {error}", exit_code=2)
        except KeyboardInterrupt:
            return _answer("Aborted before the first step", exit_code=128 + signal.SIGINT)
        console = rich.console.Console(
            highlight=False, markup=False, soft_wrap=True, quiet=not writes_files()
        )
        mesh = plan.runs[0].mesh
        try:
            with (
                caught_signals() as caught,
                jax.set_mesh(mesh) if mesh else contextlib.nullcontext(),
            ):
                results = train_all(plan, config, console, caught)
            if len(results) == len(plan.runs) and writes_files():
                _report(plan, results, shlex.join([*_PROGRAM.split(), *arguments]), console)
        except (OSError, TooManySkippedError, MemoryError, jax.errors.JaxRuntimeError) as error:
            return _answer(_explanation(error, plan, resuming), exit_code=1)
        except KeyboardInterrupt:
            console.print(f"Aborted. To continue from the last checkpoint, if any:\n{resuming}")
            return 128 + signal.SIGINT
        if len(results) < len(plan.runs):
            console.print(f"Stopped and saved. To continue:\n{resuming}")
            # Of several processes, another one may have been told to stop.
            return 128 + (caught[0] if caught else signal.SIGTERM)
        unmoved = [each.optimizer for each in results if each.skipped_steps == each.steps]
        if unmoved:
            return _answer(
                f"error: every step of {', '.join(unmoved)} was skipped, for the reasons in "
                "metrics.jsonl. If no validation loss is finite, look at the weights of --load; "
                "else look at the text of --data, or try --compute f32",
                exit_code=1,
            )
    return 0


def _claim(plan: Plan, config: PretrainConfig, stack: contextlib.ExitStack) -> None:
    """Makes the folders of the runs, and keeps other runs out of them until the stack is closed.

    Raises:
      ValueError: If another run writes there, or nothing can be written there or to an export.
    """
    for folder in dict.fromkeys([plan.folder, *(run.folder for run in plan.runs)]):
        try:
            is_locked = stack.enter_context(locked(folder))
        except BlockingIOError as error:
            raise ValueError(
                f"another run writes to {folder}; wait for its end, or choose another --output"
            ) from error
        except OSError as error:
            raise ValueError(
                f"--output is {plan.folder}, where nothing can be written ({error}); choose "
                "another folder"
            ) from error
    for export in _exports(config):
        try:
            require_fillable(export)
        except OSError as error:
            raise ValueError(
                f"--export is {export}, where nothing can be written ({error}); choose another "
                "folder"
            ) from error
    if not is_locked:
        print(f"{plan.folder} cannot be locked here: start no other run in it", file=sys.stderr)
    # Another run may have ended there after the plan was made.
    if any(
        has_checkpoint(run.settings, run.folder, config.output) > run.resume for run in plan.runs
    ):
        raise ValueError(f"another run has just ended in {plan.folder}; start this one again")
    _refuse_others(plan.folder, plan.runs)


def _describe(config: PretrainConfig) -> int:
    settings, _ = _resolved(config)
    for each in settings:
        print(f"{optimizer_line(each)}\n{state_table(each)}\n")
    return 0


def _explanation(error: Exception, plan: Plan, resuming: str) -> str:
    """Says why training ended and how to continue; raises errors of the program itself."""
    if isinstance(error, OSError):
        return f"error: {error}. To continue: {resuming}"
    if isinstance(error, TooManySkippedError):
        allow = "" if " --allow-changes" in resuming else " --allow-changes"
        return (
            f"error: {error}. To continue with a lower --learning-rate or another --seed: "
            f"{resuming}{allow}"
        )
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY in str(error):
        return f"error: out of memory: {error}; {advice(plan.runs[0].settings)}"
    if jax.process_count() == 1:
        raise error
    lost_process(
        f"error: a step of all {jax.process_count()} processes failed, so that one of them may "
        f"have ended: {error}. To continue, start all processes again with --resume"
    )


def _answer(message: str, *, exit_code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return exit_code


def _resuming_command(arguments: Sequence[str]) -> str:
    flags = [argument for argument in arguments if argument != "--resume"]
    return shlex.join([*_PROGRAM.split(), *flags, "--resume"])


def prepare(config: PretrainConfig) -> Plan:
    """Reads the text and settles everything, without training or writing anything.

    Args:
      config: The command line.

    Returns:
      What to do.

    Raises:
      ValueError: If the input is wrong; in terms of what was given, what is allowed, what to do.
      OSError: If something cannot be read.
      ImportError: If the text needs a package that is not installed.
    """
    settings, text = _resolved(config)
    folder = _folder(config)
    mesh = _mesh(config, settings[0])
    runs = []
    for each in settings:
        place = folder / each.optimizer.name if len(settings) > 1 else folder
        runs.append(Run(each, place, has_checkpoint(each, place, config.output), mesh))
        require_memory(runs[-1])
    _refuse_others(folder, runs)
    training_batches(text, settings[0]).close()
    batches = validation_batches(text, settings[0], max_batches=config.output.evaluation_batches)
    validation_loss = prepare_evaluation(runs[0], batches)
    # Without a checkpoint, the folder may be new, or of a run that was killed before its first one.
    none = config.output.resume and not any(run.resume for run in runs)
    if none and not (folder.is_dir() and _may_begin(folder)):
        raise ValueError(
            f"there is no checkpoint to resume in {folder}; leave --resume out to start, or name "
            "the --output of the run"
        )
    return Plan(runs, text, validation_loss, folder)


def _refuse_others(folder: Path, runs: Sequence[Run]) -> None:
    """Raises ValueError if a folder holds other runs, whose results would be replaced."""
    places = {folder, *(folder / name for name in OPTIMIZERS)}
    if others := sorted(filter(has_run, places - {run.folder for run in runs})):
        raise ValueError(
            f"{folder} holds another run, in {others[0]}, whose results and tokenizer would be "
            "replaced; choose another --output, or resume that run with its own flags"
        )


def _may_begin(folder: Path) -> bool:
    """Whether a folder without a checkpoint is empty, or of a run that was killed early."""
    names = {path.name for path in folder.iterdir()}
    return "results.json" not in names and (names <= {_TOKENIZER} or holds_lock(folder))


def _resolved(config: PretrainConfig) -> tuple[list[RunSettings], Text]:
    """Returns the settings of each run and the text, as `prepare` raises."""
    check_options(config)
    _check_folders(config)
    examples = load_examples(config.data.source)
    corpus = load_corpus(config.data.source) if examples is None else examples.as_corpus()
    tokenizer = _tokenizer(config, corpus, _folder(config))
    stored = _model(config, tokenizer)
    text = (
        read_text(corpus, tokenizer)
        if examples is None
        else read_examples(examples, tokenizer, _template(config))
    )
    settings = [
        resolve(
            config,
            name,
            stored,
            data=text.name,
            text_digest=text.digest,
            sequences_of=text.sequences,
        )
        for name in compared_optimizers(config)
    ]
    return settings, text


def _folder(config: PretrainConfig) -> Path:
    names = compared_optimizers(config)
    return config.output.folder or Path("runs", f"{_model_name(config)}-{'-'.join(names)}")


def _exports(config: PretrainConfig) -> list[Path]:
    """The folder of each run's model; none without --export."""
    names, export = compared_optimizers(config), config.output.export
    if export is None:
        return []
    return [export / name for name in names] if len(names) > 1 else [export]


def _check_folders(config: PretrainConfig) -> None:
    """Raises ValueError if the run would write where a file, its model or its text is."""
    load, data = config.model.load, Path(config.data.source).expanduser()
    exports = _exports(config)
    for flag, folder in [("--output", _folder(config)), *(("--export", each) for each in exports)]:
        for place in (folder, *folder.absolute().parents):
            if place.exists() and not place.is_dir():
                raise ValueError(
                    f"{flag} is {folder}, and {place} is a file; choose another folder"
                )
        if load is not None and folder.resolve() == load.resolve():
            raise ValueError(
                f"{flag} is {folder}, the folder of --load, whose files would be replaced; choose "
                "another folder"
            )
        if config.data.source != "stdlib" and _is_read(folder, data):
            raise ValueError(
                f"{flag} is {folder}, in the folder of --data {data}: --resume would read the "
                f"run's own files as text; give {flag} a folder outside of it"
            )
    # A run that ended before may have written its own.
    own = {"model.safetensors"} if config.output.resume else set()
    for export in exports:
        if others := {path.name for path in export.glob("*.safetensors*")} - own:
            raise ValueError(
                f"--export is {export}, which holds {min(others)} of another model; choose another "
                "folder, or move that model away"
            )


def _is_read(folder: Path, data: Path) -> bool:
    """Whether the text of a folder `data` would have what is in another; no hidden one is read."""
    folder, data = folder.resolve(), data.resolve()
    if not (data.is_dir() and folder.is_relative_to(data)):
        return False
    return not any(part.startswith(".") for part in folder.relative_to(data).parts)


def _model_name(config: PretrainConfig) -> str:
    return (
        config.model.name
        if config.model.load is None
        else config.model.load.name.removesuffix(".gguf")
    )


def _mesh(config: PretrainConfig, settings: RunSettings) -> Mesh | None:
    if config.processes.mesh is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes train on one --mesh; give it the sizes of all "
                f"{jax.device_count()} devices, such as --mesh data={jax.device_count()}"
            )
        return None
    sizes = parse_mesh(config.processes.mesh)
    mesh = make_mesh(sizes)
    parts, sequences = devices_dividing_batch(sizes), settings.batch // settings.micro_batches
    if sequences % parts:
        raise ValueError(
            f"--mesh divides a micro-batch of {sequences} sequences into {parts}; choose --batch "
            f"and --micro-batches that leave a multiple of {parts}"
        )
    return mesh


def _template(config: PretrainConfig) -> ChatTemplate | None:
    """The chat template beside the tokenizer."""
    given = config.data.tokenizer
    folder = config.model.load if given is None else Path(given).expanduser()
    if folder is None:
        return None
    folder = folder.parent if folder.name == _TOKENIZER else folder
    names = ("chat_template.jinja", "tokenizer_config.json")
    return ChatTemplate.of_files(*(checkpoint_file(folder, name) for name in names))


def _tokenizer(config: PretrainConfig, corpus: Corpus, folder: Path) -> Tokenizer:
    spec, load = config.data.tokenizer, config.model.load
    if spec is None and load is not None:
        content = checkpoint_file(load, _TOKENIZER)
        if content is not None:
            return read_tokenizer(content, str(load))
        _require_bytes(load)
    spec = "bytes" if spec is None else spec
    trained = folder / _TOKENIZER
    if spec.startswith("train:") and config.output.resume and trained.is_file():
        spec = str(trained)
    tokenizer = load_tokenizer(spec, corpus.train)
    asked = config.data.tokenizer
    if spec == str(trained) and asked != f"train:{tokenizer.vocab_size}":
        raise ValueError(
            f"--tokenizer is {asked}, and the run in {folder} was started with "
            f"train:{tokenizer.vocab_size}; give that, or another --output for a new run"
        )
    return tokenizer


def _require_bytes(load: Path) -> None:
    """Raises ValueError if a model that comes without a tokenizer is not one of bytes."""
    vocab_size = describe_llama(load).config.vocab_size
    if vocab_size > ByteTokenizer.vocab_size:
        raise ValueError(
            f"{load} has no {_TOKENIZER}, and a vocabulary of {vocab_size:,} ids, which are not "
            "bytes; give the --tokenizer that belongs to it (transformers writes the file with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )


def _model(config: PretrainConfig, tokenizer: Tokenizer) -> StoredModel:
    if config.model.load is None:
        shape = MODELS[config.model.name]
        return StoredModel(dataclasses.replace(shape, vocab_size=tokenizer.vocab_size), "float32")
    stored = describe_llama(config.model.load)
    if tokenizer.vocab_size > stored.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model in {config.model.load} "
            f"{stored.config.vocab_size:,}; give the --tokenizer that belongs to it"
        )
    return stored


def train_all(
    plan: Plan,
    config: PretrainConfig,
    console: rich.console.Console,
    caught: Sequence[signal.Signals],
) -> list[RunResult]:
    """Trains one run after another.

    Args:
      plan: The runs.
      config: The command line.
      console: Shows the progress.
      caught: Not empty once the process is to stop.

    Returns:
      The results; fewer than runs if stopped.

    Raises:
      OSError: If the disk is full.
    """
    for line in settings_lines(plan.runs[0].settings, plan.runs[0].mesh):
        console.print(line)
    plan.folder.mkdir(parents=True, exist_ok=True)
    if writes_files():
        with replaced(plan.folder / _TOKENIZER) as partial:
            plan.text.tokenizer.save(partial)
    results: list[RunResult] = []
    exports: list[Path | None] = [*_exports(config)] or [None] * len(plan.runs)
    for run, export in zip(plan.runs, exports, strict=True):
        output = dataclasses.replace(config.output, export=export)
        console.print(f"{optimizer_line(run.settings)}; to {run.folder}")
        console.print(state_line(run.settings))
        if config.output.resume and not run.resume:
            console.print(f"no checkpoint in {run.folder}: starting from step 0")
        result = read_result(run) if output.export is None else None
        if result is not None:
            console.print(finished_line(run))
        result = result or train_run(
            run,
            plan.text,
            plan.validation_loss,
            output,
            console,
            lambda: bool(caught),
        )
        if result is None:
            break
        results.append(result)
    return results


def _report(
    plan: Plan, results: Sequence[RunResult], command: str, console: rich.console.Console
) -> None:
    settings = plan.runs[0].settings
    about = {
        "command": command,
        "data": plan.text.name,
        "model": dataclasses.asdict(settings.model),
        "parameters": parameter_count(settings.model),
        "batch": settings.batch,
        "sequence": settings.sequence,
        "weights": settings.weights,
        "compute": settings.compute,
        "seed": settings.seed,
        "device": jax.devices()[0].device_kind,
    }
    write_results(plan.folder, results, about)
    curves = {str(run.settings.optimizer.name): read_metrics(run.folder) for run in plan.runs}
    for name in [name for name, lines in curves.items() if not lines]:
        console.print(f"The metrics of {name} are missing, and the picture lacks its curve")
    title = f"{parameter_count(settings.model):,} parameters on {plan.text.name}"
    draw_curves(plan.folder / "curves.png", curves, title=title)
    for result in results:
        if result.sample:
            console.print(f"\n--- {result.optimizer} continues the validation text ---")
            console.print(result.sample)
    console.print()
    console.print(results_table(results), soft_wrap=False)
    console.print(f"Written to {plan.folder}: results.json, results.md, curves.png, metrics")


if __name__ == "__main__":
    sys.exit(main())
