"""Handlers that stand for a while, and give back what was there."""

from __future__ import annotations

import os
import signal
import threading

from sparse_lm.train.signals import on_signals


def test_both_signals_are_heard_and_what_was_there_comes_back():
    heard: list[int] = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with on_signals(lambda number, _: heard.append(number)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_was_there_comes_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with on_signals(lambda number, _: None):
            raise KeyError
    except KeyError:
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_hears_nothing_and_goes_on():
    done = []

    def work():
        with on_signals(lambda number, _: None):
            done.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]
