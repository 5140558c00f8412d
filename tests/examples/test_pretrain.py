import contextlib
import dataclasses
import io
import json
import math
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apollo_optax import quantization
from examples.llama import pretrain
from examples.llama.checkpoint import tree_bytes
from examples.llama.command_line import parse
from examples.llama.config import MODELS
from examples.llama.files import locked
from examples.llama.huggingface import load_llama, save_llama
from examples.llama.layered import join_params
from examples.llama.lora import merged
from examples.llama.metrics import read_metrics
from examples.llama.model import init_params
from examples.llama.optimizers import OPTIMIZERS, OPTIONS_OF
from examples.llama.options import PretrainConfig
from examples.llama.pretrain import main, prepare
from examples.llama.run import abstract_state
from examples.llama.summary import state_line, state_table
from tests.examples.tiny_pretrain import TINY, squares

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def tiny_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "nano", TINY)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(squares())
    return path


Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(corpus: Path) -> Command:
    def arguments(output: Path, *more: str) -> list[str]:
        sizes = ["--sequence", "16", "--batch", "4", "--evaluation-batches", "2"]
        lengths = ["--steps", str(STEPS), "--evaluate-every", "2", "--sample-length", "0"]
        return ["--data", str(corpus), "--output", str(output), *sizes, *lengths, *more]

    return arguments


class Pressing(io.StringIO):
    """An output that presses Ctrl-C, once or twice, when a text is first written to it."""

    def __init__(self, text: str, times: int = 1):
        super().__init__()
        self.text, self.times = text, times

    def write(self, text: str) -> int:
        written = super().write(text)
        while self.text in text and self.times > 0:
            self.times -= 1
            signal.raise_signal(signal.SIGINT)
        return written


def run(arguments: Sequence[str], output: io.StringIO | None = None) -> tuple[int, str]:
    output = output or io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(arguments)
    return code, output.getvalue()


def wrong_input(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that answers wrong input."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_lines_say_the_state_that_the_run_will_hold(
    name: str, command: Command, tmp_path: Path
) -> None:
    rank = ["--rank", "4"] if name in OPTIONS_OF["rank"] else []
    flags = command(tmp_path / "run", "--optimizer", name, *rank)
    [planned] = prepare(parse(PretrainConfig, "pretrain", flags, ())).runs
    table = state_table(planned.settings)
    # Beside the counts of skipped steps.
    assert table.state_bytes == tree_bytes(abstract_state(planned).opt_state.inner_state)
    assert table.rest_bytes <= 40  # counts and keys
    assert f"{table.state_bytes:,} bytes" in state_line(planned.settings)


def test_describe_prints_a_table_of_each_optimizer_and_trains_nothing(
    command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code, shown = run(command(folder, "--describe", "--compare", "adamw,apollo_mini"))
    assert (code, folder.exists()) == (0, False)
    assert "embed/embedding" in shown
    sums = [line.split() for line in shown.splitlines() if line.startswith("sum ")]
    adamw, apollo_mini = (float(cells[-1]) for cells in sums)
    assert adamw == pytest.approx(1, rel=1e-3)  # and its counts
    assert apollo_mini < 0.9


def test_describe_needs_no_memory_for_the_model(command: Command, tmp_path: Path) -> None:
    code, shown = run(command(tmp_path / "run", "--describe", "--model", "70b", "--rank", "64"))
    assert code == 0
    assert "(80, 8192, 28672)" in shown


MESHED = {
    "apollo": ["--optimizer", "apollo", "--rank", "4", "--mesh", "data=2,fsdp=2,tensor=2"],
    "adamw": ["--optimizer", "adamw", "--micro-batches", "2", "--mesh", "fsdp=2,tensor=4"],
    "mini-layerwise": [
        *("--optimizer", "apollo_mini", "--project-embeddings", "--update", "layerwise"),
        *("--mesh", "data=2,fsdp=4"),
    ],
}


@pytest.mark.release
@pytest.mark.parametrize("name", MESHED)
def test_mesh_trains_and_resumes_as_one_device(name: str, command: Command, tmp_path: Path) -> None:
    flags, sizes = MESHED[name], ["--batch", "8", "--checkpoint-every", "3"]
    alone, meshed = tmp_path / "alone", tmp_path / "meshed"
    one_device = flags[: flags.index("--mesh")]
    assert run(command(alone, *one_device, *sizes))[0] == 0
    assert run(command(meshed, *flags, *sizes))[0] == 0
    for ours, theirs in zip(metrics(meshed), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    finished = checkpoint(meshed)
    shutil.rmtree(meshed / "checkpoints" / str(STEPS))
    (meshed / "result.json").unlink()
    assert run(command(meshed, *flags, *sizes, "--resume"))[0] == 0
    jax.tree.map(np.testing.assert_array_equal, checkpoint(meshed), finished)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--mesh", "data=3"], "data=3,fsdp=1,tensor=1 has 3 devices and there are 8"),
        (["--mesh", "rows=8"], "allowed are data=N, fsdp=N and tensor=N"),
        (["--mesh", "data=8"], "divides a micro-batch of 4 sequences into 8"),
    ],
)
def test_mesh_that_does_not_fit_is_answered_in_one_line(
    flags: list[str],
    match: str,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert match in wrong_input(command(tmp_path / "run", *flags), capsys)


# bfloat16 weights depend on the step by their rounding, float32 ones by the projection.
KINDS = {
    "apollo": ["--optimizer", "apollo", "--update-proj-gap", "2"],
    "adamw-bf16": ["--optimizer", "adamw", "--weights", "bf16", "--micro-batches", "2"],
    "mini-int8": [
        *("--optimizer", "apollo_mini", "--project-embeddings"),
        *("--update", "layerwise", "--weights", "int8", "--compute", "f32"),
    ],
}


@pytest.fixture(
    scope="module",
    params=[
        "apollo",
        pytest.param("adamw-bf16", marks=pytest.mark.slow),
        pytest.param("mini-int8", marks=pytest.mark.release),
    ],
)
def finished(
    request: pytest.FixtureRequest, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The folder of a run of six steps, saved after three and after six, and its flags."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    flags = [*KINDS[request.param], "--checkpoint-every", "3"]
    code, _ = run(command(folder, *flags))
    assert code == 0
    return folder, flags


@pytest.fixture(scope="module")
def apollo_run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an exported run, and what it printed."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    more = ["--export", str(folder / "exported"), "--sample-length", "8", "--tensorboard"]
    code, output = run(command(folder, *more))
    assert code == 0
    return folder, output


def checkpoint(folder: Path, step: int = STEPS) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute() / "checkpoints" / str(step) / "state")


def record(folder: Path, step: int = STEPS) -> dict[str, Any]:
    path = folder / "checkpoints" / str(step) / "record" / "metadata"
    written = json.loads(path.read_text())
    return {k: v for k, v in written.items() if k not in ("seconds", "digest")}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, checkpoint(one), checkpoint(other))
    assert record(one) == record(other)
    assert metrics(one) == metrics(other)


def test_a_killed_run_goes_on_as_if_uninterrupted(
    finished: tuple[Path, list[str]], command: Command, tmp_path: Path
) -> None:
    folder, flags = finished
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    shutil.rmtree(killed / "checkpoints" / str(STEPS))
    for name in ("result.json", "results.json", "curves.png"):
        (killed / name).unlink()
    code, output = run([*command(killed, *flags), "--resume"])
    assert code == 0
    assert "step 3/6" not in output
    assert_same_run(folder, killed)


def floats(params: Any) -> Any:
    """The parameters of a checkpoint as floats, those of a layer-wise run joined."""

    def is_quantized(node: Any) -> bool:
        return isinstance(node, dict) and "qvalue" in node

    def dequantized(node: Any) -> Any:
        if not is_quantized(node):
            return node
        return quantization.dequantize(quantization.QArray(node["qvalue"], node["scale"]))

    params = jax.tree.map(dequantized, params, is_leaf=is_quantized)
    return join_params(params) if "rest" in params else params


def test_a_finished_run_can_be_exported_later(
    finished: tuple[Path, list[str]], command: Command, tmp_path: Path
) -> None:
    folder, flags = finished
    before = metrics(folder)
    result = json.loads((folder / "result.json").read_text())
    (tmp_path / "model").mkdir()
    code, output = run([*command(folder, *flags), "--resume", "--export", str(tmp_path / "model")])
    assert code == 0
    assert "step 6/6" not in output
    _, params = load_llama(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, floats(checkpoint(folder)["params"]), params)
    assert metrics(folder) == before
    assert json.loads((folder / "result.json").read_text()) == result


@pytest.mark.parametrize("finished", ["apollo"], indirect=True)
def test_a_finished_run_whose_small_files_are_lost_or_damaged_is_evaluated_again(
    finished: tuple[Path, list[str]],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, flags = finished
    damaged = tmp_path / "run"
    shutil.copytree(folder, damaged)
    resuming = [*command(damaged, *flags), "--resume"]
    (damaged / "metrics.jsonl").unlink()
    code, output = run(resuming)
    assert code == 0
    assert "has taken its last step, 6, already. Nothing is trained" in output
    assert "The metrics of apollo are missing, and the picture lacks its curve" in output
    (damaged / "result.json").write_text("")
    code, output = run(resuming)
    assert code == 0
    assert "has taken its last step, 6, already. Nothing is trained" in output
    results = [json.loads((each / "result.json").read_text()) for each in (folder, damaged)]
    assert results[0] == results[1] | {"step_milliseconds": results[0]["step_milliseconds"]}
    assert metrics(damaged) == [metrics(folder)[-1]]
    (damaged / "results.json").unlink()
    (damaged / "results.json").mkdir()
    capsys.readouterr()
    assert main(resuming) == 1
    assert "results.json" in capsys.readouterr().err


@pytest.mark.parametrize("finished", ["apollo"], indirect=True)
def test_ctrl_c_saves_and_the_printed_command_goes_on_as_if_uninterrupted(
    finished: tuple[Path, list[str]], command: Command, tmp_path: Path
) -> None:
    folder, flags = finished
    stopped = tmp_path / "stopped run"
    code, output = run(command(stopped, *flags), Pressing("step 2/6"))
    assert code == 128 + signal.SIGINT
    assert not (stopped / "result.json").exists()
    *_, saved, resuming = output.splitlines()
    assert "saved" in saved
    assert resuming.startswith("python -m examples.llama.pretrain ")
    code, _ = run(shlex.split(resuming)[3:])
    assert code == 0
    assert_same_run(folder, stopped)


def test_a_second_ctrl_c_aborts(command: Command, tmp_path: Path) -> None:
    code, output = run(command(tmp_path / "run"), Pressing("step 1/6", times=2))
    assert code == 128 + signal.SIGINT
    assert "Aborted" in output


def test_the_metrics_have_every_step_and_every_evaluation(finished: tuple[Path, Any]) -> None:
    lines = read_metrics(finished[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in steps] == [64 * step for step in range(1, 7)]
    assert all(line["learning_rate"] > 0 and line["seconds"] > 0 for line in steps)
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4, 6]


def test_an_untrained_model_is_as_good_as_guessing_and_a_trained_one_better(
    apollo_run: tuple[Path, str],
) -> None:
    lines = read_metrics(apollo_run[0])
    assert lines[0]["loss"] == pytest.approx(math.log(256), rel=0.02)
    assert lines[-1]["validation_loss"] < lines[0]["loss"] - 0.5


def test_a_run_ends_with_its_table_its_picture_and_a_sample(apollo_run: tuple[Path, str]) -> None:
    folder, output = apollo_run
    written = json.loads((folder / "results.json").read_text())
    (result,) = written["runs"]
    assert result["optimizer"] == "apollo"
    assert result["validation_loss"] == read_metrics(folder)[-1]["validation_loss"]
    assert result["bits_per_byte"] == pytest.approx(result["validation_loss"] / math.log(2))
    assert result["parameter_bytes"] == 4 * written["parameters"]
    assert result["step_milliseconds"] > 0
    assert f"{result['perplexity']:.3f}" in output
    assert result["sample"] in output
    assert len(result["sample"]) >= 32
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").iterdir())


def test_output_to_a_pipe_is_plain_lines(apollo_run: tuple[Path, str]) -> None:
    assert "\r" not in apollo_run[1]
    assert "\x1b" not in apollo_run[1]


def test_state_bytes_are_those_of_the_checkpointed_state(apollo_run: tuple[Path, str]) -> None:
    (result,) = json.loads((apollo_run[0] / "results.json").read_text())["runs"]
    state = checkpoint(apollo_run[0])
    assert result["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state["opt_state"]))


def test_an_exported_model_is_the_trained_one_and_can_be_trained_on(
    apollo_run: tuple[Path, str], command: Command, tmp_path: Path
) -> None:
    exported = apollo_run[0] / "exported"
    config, params = load_llama(exported)
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, checkpoint(apollo_run[0])["params"], params)
    more = ["--load", str(exported), "--optimizer", "sgd", "--learning-rate", "1e-9"]
    code, _ = run(command(tmp_path / "run", *more))
    assert code == 0
    before, (loaded, *_, after) = read_metrics(apollo_run[0])[-1], read_metrics(tmp_path / "run")
    assert loaded == {"step": 0, "validation_loss": before["validation_loss"]}
    assert after["validation_loss"] == pytest.approx(before["validation_loss"], rel=1e-5)
    first_row = (tmp_path / "run" / "results.md").read_text().splitlines()[2]
    assert first_row.startswith(f"| as loaded | - | {loaded['validation_loss']:.4f} |")


@pytest.mark.slow
def test_an_exported_model_gets_better_with_the_defaults_of_fine_tuning(
    apollo_run: tuple[Path, str], command: Command, tmp_path: Path
) -> None:
    before = read_metrics(apollo_run[0])[-1]["validation_loss"]
    exported = ["--load", str(apollo_run[0] / "exported"), "--compare", "apollo,apollo_mini,adamw"]
    code, output = run(command(tmp_path / "run", *exported))
    assert code == 0
    for name in ("apollo", "apollo_mini", "adamw"):
        assert read_metrics(tmp_path / "run" / name)[-1]["validation_loss"] < before
    assert f"from {apollo_run[0] / 'exported'}; f32 weights" in output


def test_a_run_begins_with_the_settings_in_force(apollo_run: tuple[Path, str]) -> None:
    folder, output = apollo_run
    *first, optimizer = output.splitlines()[:6]
    assert [line.split()[0] for line in first] == ["device", "model", "text", "batch", "steps"]
    assert "cpu, 1 of 8; no accelerator found" in first[0]
    assert "jax[cuda13]" in first[0]
    assert first[3].endswith("4 sequences of 16 tokens, standard update")
    assert optimizer.startswith("apollo: learning rate 0.02, warm-up 30%, rank 32, alpha 1, ")
    assert optimizer.endswith(f"; to {folder}")


def test_compared_optimizers_see_the_same_batches_from_the_same_weights(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "compared"
    compare = command(folder, "--compare", "sgd,adamw", "--tokenizer", "train:270")
    code, _ = run(compare, Pressing("adamw  step 2/6"))
    assert code == 128 + signal.SIGINT
    code, output = run([*compare, "--resume"])
    assert code == 0
    assert "sgd  step" not in output
    first_losses = {read_metrics(folder / name)[0]["loss"] for name in ("sgd", "adamw")}
    assert len(first_losses) == 1
    written = json.loads((folder / "results.json").read_text())
    assert [result["optimizer"] for result in written["runs"]] == ["sgd", "adamw"]
    assert [result["bits_per_byte"] for result in written["runs"]] == [None, None]
    assert written["model"]["vocab_size"] == 270
    assert (folder / "tokenizer.json").is_file()
    assert record(folder / "sgd")["batches"] == record(folder / "adamw")["batches"]
    capsys.readouterr()
    error = wrong_input([*compare, "--tokenizer", "train:280", "--resume"], capsys)
    assert "--tokenizer is train:280, and the run in" in error
    assert "was started with train:270" in error


def test_a_full_disk_is_answered_in_one_line_that_says_how_to_go_on(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(command(tmp_path / "run", "--optimizer", "sgd")) == 1
    error = capsys.readouterr().err
    assert "no room for the checkpoint of step 6" in error
    assert "--resume" in error
    assert error.count("\n") == 1


def test_help_names_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--model", "--compare", "--update-proj-gap", "--resume", "--export"):
        assert flag in text
    assert "(default: a fifth of the" in text
    assert "None" not in text


@pytest.mark.parametrize("flags", [["--optimizer", "adam"], ["--model", "2b"], ["--steps", "many"]])
def test_what_a_flag_does_not_take_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert flags[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data", "no-such.txt"], "no-such.txt: no such file or folder"),
        (["--data", "empty.txt"], "no text in it"),
        (["--data", "short.txt"], "one batch of 4 needs 65 tokens"),
        (["--tokenizer", "no-such.json"], "no such file"),
        (["--compare", "apollo,adam"], "'adam'"),
        (["--micro-batches", "3"], "batch of 4 sequences"),
        (["--rank", "0"], "rank"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0"),
        (["--keep", "0"], "--keep is 0"),
        (["--resume"], "no checkpoint to resume"),
        (["--load", "no-such-model"], "config.json does not exist"),
        (["--preset", "paper", "--model", "3b"], "'3b'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_answered_in_one_line(
    flags: list[str],
    named: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("A text of less than one batch.")
    assert named in wrong_input(command(tmp_path / "run", *flags), capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_written_over(
    apollo_run: tuple[Path, str], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_metrics(apollo_run[0])
    error = wrong_input(command(apollo_run[0]), capsys)
    assert "holds a run already" in error
    assert "--resume" in error
    assert read_metrics(apollo_run[0]) == before


def test_an_export_does_not_replace_a_model(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_text("kept")
    error = wrong_input(command(tmp_path / "run", "--export", str(tmp_path)), capsys)
    assert "which holds model.safetensors of another model" in error
    assert (tmp_path / "model.safetensors").read_text() == "kept"


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["new", "resumed"])
@pytest.mark.parametrize(
    ("flags", "place"),
    [
        (("--optimizer", "sgd"), "adamw"),
        (("--compare", "sgd,lion"), "adamw"),
        (("--compare", "sgd,lion"), "."),
    ],
    ids=["single", "comparison", "comparison after single"],
)
def test_a_folder_that_holds_another_comparison_is_not_written_over(
    flags: tuple[str, ...],
    place: str,
    resume: tuple[str, ...],
    apollo_run: tuple[Path, str],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(apollo_run[0], tmp_path / "run" / place, dirs_exist_ok=True)
    (tmp_path / "run" / "results.json").write_text("kept")
    error = wrong_input(command(tmp_path / "run", *flags, *resume), capsys)
    assert f"holds another run, in {tmp_path / 'run' / place}, whose results and" in error
    assert (tmp_path / "run" / "results.json").read_text() == "kept"


def test_a_folder_that_holds_nothing_of_a_run_is_not_resumed(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("kept")
    with locked(tmp_path):  # also if it holds a comparison's results
        pass
    assert "no checkpoint to resume" in wrong_input(command(tmp_path, "--resume"), capsys)
    assert (tmp_path / "results.json").read_text() == "kept"
    (tmp_path / "results.json").rename(tmp_path / "mine.json")
    (tmp_path / ".lock").unlink()
    assert "no checkpoint to resume" in wrong_input(command(tmp_path, "--resume"), capsys)


@pytest.mark.parametrize("killed", ["never", "before locks", "early"])
def test_resuming_without_a_checkpoint_starts_and_says_so(
    killed: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if killed != "never":
        (tmp_path / "tokenizer.json").write_text("{}")
    if killed == "early":
        with locked(tmp_path):
            (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(pretrain, "train_run", lambda *args: None)
    _, output = run(command(tmp_path, "--resume"))
    assert f"no checkpoint in {tmp_path}: starting from step 0" in output


@pytest.mark.parametrize("run_folder", [".", "sgd"])
def test_a_folder_that_another_run_writes_to_is_left_to_it(
    run_folder: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / run_folder):
        error = wrong_input(command(tmp_path, "--compare", "sgd,adamw"), capsys)
    assert f"another run writes to {tmp_path / run_folder}; wait for its end, or" in error
    assert not list(tmp_path.rglob("*.json*"))


def test_a_run_that_ended_since_the_plan_was_made_is_not_written_over(
    apollo_run: tuple[Path, str],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def before_it_ended(config: PretrainConfig) -> pretrain.Plan:
        plan = prepare(config)
        return plan._replace(runs=[dataclasses.replace(run, resume=False) for run in plan.runs])

    monkeypatch.setattr(pretrain, "prepare", before_it_ended)
    assert "has just ended" in wrong_input(command(apollo_run[0], "--resume"), capsys)


@pytest.mark.parametrize("flag", ["--output", "--export"])
def test_a_folder_that_cannot_be_made_is_refused_before_training(
    flag: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = wrong_input(command(tmp_path, flag, "/proc/no/folder"), capsys)
    assert f"{flag} is /proc/no/folder, where nothing can be written ([Errno" in error
    assert error.endswith("choose another folder\n")  # not to continue
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_is_not_resumed_with_another_setting(
    apollo_run: tuple[Path, str], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    error = wrong_input(command(apollo_run[0], "--resume", "--alpha", "3"), capsys)
    assert "optimizer.alpha is 1.0 there and 3.0 here" in error
    assert "seed" not in error
    assert "--allow-changes" in error
    error = wrong_input(command(apollo_run[0], "--resume", "--rank", "3"), capsys)
    assert "optimizer.rank is 32 there and 3 here" in error
    assert "--allow-changes" not in error


@pytest.mark.slow
def test_a_finished_run_is_made_longer_only_if_asked_to(
    apollo_run: tuple[Path, str],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(apollo_run[0], folder)
    longer = ["--resume", "--steps", "8", "--learning-rate", "0.001"]
    error = wrong_input(command(folder, *longer), capsys)
    assert "--steps is 6 there and 8 here" in error
    assert "Add --allow-changes" in error
    assert run(command(folder, *longer, "--allow-changes"))[0] == 0
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines[6]["learning_rate"] < 0.001
    assert json.loads((folder / "result.json").read_text())["steps"] == 8
    shorter = ["--resume", "--allow-changes", "--steps", "7", "--learning-rate", "0.001"]
    assert "planned for 8; a run can be made longer" in wrong_input(
        command(folder, *shorter), capsys
    )


def test_a_checkpoint_of_another_model_is_named_by_the_field_that_differs(
    apollo_run: tuple[Path, str],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = dataclasses.replace(TINY, intermediate_size=48)
    monkeypatch.setitem(MODELS, "nano", other)
    error = wrong_input(command(apollo_run[0], "--resume"), capsys)
    assert "model.intermediate_size is 32 there and 48 here" in error


def test_a_run_is_not_resumed_on_another_text(
    apollo_run: tuple[Path, str],
    command: Command,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = tmp_path / "changed.txt"
    changed.write_text(corpus.read_text().replace("square", "second power"))
    error = wrong_input(command(apollo_run[0], "--resume", "--data", str(changed)), capsys)
    assert "text_digest" in error


@pytest.mark.parametrize(
    "mesh", [None, pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.release)]
)
def test_a_tied_model_is_trained_and_exported_tied(
    mesh: str | None, command: Command, tmp_path: Path
) -> None:
    model = dataclasses.replace(TINY, tied=True)
    save_llama(tmp_path / "model", model, init_params(model, 0))
    flags = ["--load", str(tmp_path / "model"), "--export", str(tmp_path / "tuned")]
    alone = command(tmp_path / "alone", *flags, "--batch", "8")
    assert run(alone)[0] == 0
    config, params = load_llama(tmp_path / "tuned")
    assert config == model
    jax.tree.map(np.testing.assert_array_equal, checkpoint(tmp_path / "alone")["params"], params)
    if mesh is not None:
        meshed = command(tmp_path / "meshed", *flags, "--batch", "8", "--mesh", mesh)
        assert run(meshed)[0] == 0
        for ours, theirs in zip(
            metrics(tmp_path / "meshed"), metrics(tmp_path / "alone"), strict=True
        ):
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")
def test_lora_is_trained_resumed_and_exported_as_a_model(command: Command, tmp_path: Path) -> None:
    save_llama(tmp_path / "model", TINY, init_params(TINY, 0))
    flags = ["--load", str(tmp_path / "model"), "--optimizer", "adamw", "--lora", "2"]
    flags += ["--learning-rate", "0.2", "--export", str(tmp_path / "tuned")]
    folder = tmp_path / "run"
    assert run(command(folder, *flags, "--steps", "3"))[0] == 0
    assert run(command(folder, *flags, "--resume", "--allow-changes"))[0] == 0
    first, *_, last = metrics(folder)
    assert last["validation_loss"] < first["validation_loss"] - 0.03
    table = (folder / "results.md").read_text()
    assert "| adamw, LoRA 2 |" in table
    params = checkpoint(folder)["params"]
    jax.tree.map(np.testing.assert_array_equal, params["frozen"], load_llama(tmp_path / "model")[1])
    _, tuned = load_llama(tmp_path / "tuned")
    jax.tree.map(np.testing.assert_array_equal, tuned, merged(params))


def test_conversations_are_trained_on_with_the_template_of_the_loaded_model(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, rows = tmp_path / "model", tmp_path / "chats.jsonl"
    save_llama(loaded, TINY, init_params(TINY, 0))
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    lines = [
        json.dumps({"messages": [*messages, {"role": "user", "content": str(i)}]})
        for i in range(60)
    ]
    rows.write_text("\n".join(lines))
    flags = command(tmp_path / "run", "--load", str(loaded), "--data", str(rows))
    assert "messages need a chat template" in wrong_input(flags, capsys)
    template = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}a{% endif %}"
    (loaded / "chat_template.jinja").write_text(template)
    # The model learns the one byte of the answer.
    assert run([*flags, "--learning-rate", "0.05", "--steps", "20"])[0] == 0
    first, *_, last = metrics(tmp_path / "run")
    assert first["validation_loss"] == pytest.approx(math.log(256), abs=0.5)
    assert last["validation_loss"] < 1
    rows.write_text("\n".join([*lines[:7], '{"messages": 3}']))
    assert "chats.jsonl, line 8: 3 is no list of messages" in wrong_input(flags, capsys)


def test_a_large_vocabulary_without_its_tokenizer_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dataclasses.replace(TINY, vocab_size=300)
    save_llama(tmp_path / "model", model, init_params(model, 0))
    error = wrong_input(command(tmp_path / "run", "--load", str(tmp_path / "model")), capsys)
    assert "a vocabulary of 300 ids, which are not bytes; give the --tokenizer" in error


@pytest.mark.parametrize("flag", ["--output", "--export"])
@pytest.mark.parametrize("below", [False, True], ids=["file", "below-file"])
def test_a_file_where_a_folder_is_to_be_is_refused_before_training(
    flag: str, below: bool, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    given = tmp_path / "file" / "folder" if below else tmp_path / "file"
    error = wrong_input(command(tmp_path / "run", flag, str(given)), capsys)
    assert f"{flag} is {given}, and {tmp_path / 'file'} is a file; choose another folder" in error
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--output", "--export"])
def test_the_folder_of_the_loaded_model_is_not_written_to(
    flag: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, link = tmp_path / "model", tmp_path / "link"
    model.mkdir()
    link.symlink_to(model)
    error = wrong_input(command(tmp_path / "run", "--load", str(model), flag, str(link)), capsys)
    assert f"{flag} is {link}, the folder of --load, whose files would be replaced" in error


@pytest.mark.parametrize("flag", ["--output", "--export"])
def test_a_folder_inside_the_text_is_refused_unless_it_is_hidden(
    flag: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text(squares())
    flags = command(tmp_path / "run", "--data", str(texts), flag)
    inside = texts / "runs" / "1"
    assert f"{flag} is {inside}, in the folder of --data" in wrong_input(
        [*flags, str(inside)], capsys
    )
    assert run([*flags, str(texts / ".runs" / "1"), "--describe"])[0] == 0


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["new", "resumed"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-2.safetensors"])
def test_an_export_beside_the_files_of_another_model_is_refused(
    name: str,
    resume: tuple[str, ...],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in (name, "model.safetensors") if resume else (name,):
        (tmp_path / file).touch()
    flags = ["--export", str(tmp_path), *resume]
    error = wrong_input(command(tmp_path / "run", *flags), capsys)
    assert f"--export is {tmp_path}, which holds {name} of another model" in error


# More than a process can address, so that no machine gives it.
HUGE = dataclasses.replace(TINY, hidden_size=2**24, intermediate_size=2**24, num_layers=1)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_allocated(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(MODELS, "nano", HUGE)
    error = wrong_input(command(tmp_path / "run", "--optimizer", "adamw"), capsys)
    assert "a device needs at least" in error
    assert "weights 7.34e+06 GiB, optimizer state 1.47e+07 GiB, gradients 7.34e+06 GiB" in error
    assert "to need less: --micro-batches 4, --remat, --update layerwise, --weights bf16" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 123 bytes."),
        MemoryError("Unable to allocate 123 bytes"),
    ],
    ids=["device", "host"],
)
def test_no_memory_left_is_answered_in_one_line_that_says_how_to_need_less(
    error: Exception,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(pretrain, "train_run", fail)
    assert main(command(tmp_path / "run", "--optimizer", "adamw")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ")
    assert "allocat" in said
    assert "to need less: --micro-batches 4, --remat, --update layerwise, --weights bf16" in said
    assert said.count("\n") == 1


def test_a_tokenizer_of_more_ids_than_the_loaded_model_has_is_refused(
    apollo_run: tuple[Path, str],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--load", str(apollo_run[0] / "exported"), "--tokenizer", "train:270"]
    error = wrong_input(command(tmp_path / "run", *more), capsys)
    assert "270 ids" in error
