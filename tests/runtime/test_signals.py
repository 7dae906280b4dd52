"""Signals that ask a training to stop."""

import os
import signal

import pytest

from sret_cli.runtime.signals import catching_signals, exit_if_signalled


def test_a_signal_at_the_very_end_of_a_training_ends_the_process_after_it():
    with catching_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        exit_if_signalled()
    assert ended.value.code == 143
    exit_if_signalled()  # once
