"""How programs end where what they write has no reader, or no character for it, and where they are interrupted."""

import subprocess
import sys

import pytest
from conftest import ROOT

PRINTS = "import sys\nfrom qatmoe import cli\ndef main():\n    {}\n    return 3\nsys.exit(cli.run(main))"


@pytest.mark.parametrize(
    "body", ["print('x' * 10**6, flush=True)", "print('x')", "print('x'); raise SystemExit(0)"]
)  # while it prints, at its end, and after a help text
def test_a_reader_that_went_away_ends_a_program_quietly(body, child_env):
    command = [sys.executable, "-c", PRINTS.format(body)]
    with subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 141


@pytest.mark.parametrize(("said", "line"), [("", "interrupted\n"), ("'x has y'", "interrupted; x has y\n")])
def test_an_interruption_ends_a_program_in_one_line_and_waits_for_no_thread(said, line, child_env):
    waits = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()"
    program = PRINTS.format(f"{waits}; print('x'); raise KeyboardInterrupt({said})")
    done = subprocess.run([sys.executable, "-c", program], env=child_env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "x\n", line)


LAST_WORD = """
    sys.stdin.read()
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        print()
        raise"""


@pytest.mark.parametrize("body", ["sys.stdin.read(); print('x'); raise KeyboardInterrupt", LAST_WORD])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_interruption_whose_reader_went_away_is_one_too(body, unbuffered, child_env):
    """`PROGRAM | tee FILE`, where Ctrl-C ends both: what it prints is in a buffer then, or cannot be written."""
    if unbuffered:
        body = body.replace("print('x'); ", "")
    command = [sys.executable, "-c", PRINTS.format(body)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    child_env = child_env | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, env=child_env, **streams) as program:
        program.stdout.close()
        program.stdin.close()
        assert program.stderr.read() == b"interrupted\n"
    assert program.returncode == 130


def test_every_program_ends_so():
    modules = [*(ROOT / "qatmoe").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    programs = [p for p in modules if "__main__" in p.read_text()]
    assert len(programs) > 10
    for program in programs:
        assert program.read_text().endswith('if __name__ == "__main__":\n    sys.exit(cli.run(main))\n'), program


def test_characters_that_the_encoding_lacks(child_env):
    command = [sys.executable, "-c", PRINTS.format("print('1 \\u00b1 2')")]
    done = subprocess.run(command, env=child_env | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "1 ? 2\n", "")
