import io

import rich.console

from examples.llama.progress import show_progress


def shown(*, terminal: bool, width: int = 120, steps: int = 10, step: int = 5) -> str:
    file = io.StringIO()
    console = rich.console.Console(
        file=file, force_terminal=terminal, width=width, highlight=False, markup=False
    )
    with show_progress(console, "apollo", steps=steps, done=4, tokens_per_step=4096) as progress:
        progress.step(step, 2.5, 0.5)
        progress.evaluation(step, 2.25)
    return file.getvalue()


def test_a_pipe_gets_plain_lines() -> None:
    assert shown(terminal=False).splitlines() == [
        "apollo  step 5/10  loss 2.5000  8,192 tokens/s  0:02 left",
        "apollo  step 5/10  validation loss 2.2500",
    ]


def test_a_terminal_gets_a_bar_below_the_lines() -> None:
    text = shown(terminal=True)
    assert "5/10" in text
    assert "8,192 tokens/s  0:02 left" in text
    assert "validation loss 2.2500" in text


def test_a_narrow_window_does_not_cut_the_count_of_a_long_run() -> None:
    assert "149999/150000" in shown(terminal=True, width=60, steps=150_000, step=149_999)
