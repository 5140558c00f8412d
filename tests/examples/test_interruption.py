import queue
import signal
import threading

import pytest

from examples.llama.interruption import caught_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_noted(number: signal.Signals) -> None:
    with caught_signals() as caught:
        assert not caught
        signal.raise_signal(number)
        assert caught == [number]


def test_a_signal_is_announced_though_the_main_thread_runs_no_python() -> None:
    announced = queue.SimpleQueue[tuple[str, threading.Thread]]()
    with caught_signals(lambda said: announced.put((said, threading.current_thread()))):
        signal.raise_signal(signal.SIGINT)
        said, thread = announced.get(timeout=60)
    assert "Stopping after this step" in said
    assert thread is not threading.main_thread()
    assert announced.empty()


def test_without_a_signal_nothing_is_announced_and_nothing_left_running() -> None:
    announced: list[str] = []
    threads = threading.active_count()
    with caught_signals(announced.append):
        pass
    assert not announced
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_the_second_signal_aborts() -> None:
    with caught_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_of_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with caught_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
