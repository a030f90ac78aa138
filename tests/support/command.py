"""``planish`` as a user types it, run in this process."""

import sys
from collections.abc import Callable

import pytest

from planish.tools.cli import main

Call = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout and stderr


def caller(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """What the fixture ``planish_`` gives."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["planish", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call
