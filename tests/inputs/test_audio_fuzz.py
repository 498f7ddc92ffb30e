"""Three hundred of the damaged sound files of `make fuzz`: typed errors only, no crash, bounded time and memory."""

import sys

import pytest

from tests.support.fuzz_audio import KINDS, failures


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_damaged_files_give_sound_or_an_audio_error():
    assert len(KINDS) == 12
    assert failures(range(300)) == []
