"""Hooks of pytest: a worker of pytest-xdist that dies ends the tests, as a failure."""

import pytest

_died: list[str] = []


def pytest_configure(config):
    """No worker takes a dead one's place: pytest-xdist 3.8 would wait forever for tests that are done (issue 1378)."""
    if getattr(config.option, "maxworkerrestart", "none") is None:
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Takes note of workers that did not end by themselves."""
    if error:
        _died.append(node.gateway.id)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """A failure too where one died before its first test, of which pytest-xdist's exit code says nothing."""
    if _died and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
