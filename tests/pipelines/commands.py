"""The command line, called in this process."""

import sys

import pytest

from compressor.pipelines import cli


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `compressor` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["compressor", *args])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
