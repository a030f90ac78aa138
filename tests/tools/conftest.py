"""What the tests of all commands share."""

import pytest

from tests.support.command import Call, caller


@pytest.fixture
def planish_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """``planish`` in this process: called with arguments, gives exit code, stdout and stderr."""
    return caller(capsys, monkeypatch)
