"""Forks, which stand in for processes in other tests, behave as those of subprocess."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

PRINTS = "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('MINE'), __name__); print('said', file=sys.stderr)"
CODES = {
    "ends": "pass",
    "exits": "import sys; sys.exit(3)",
    "exits with words": "raise SystemExit('words')",
    "raises": "import no_such_module",
    "at once": "import os; os._exit(9)",
    "is killed": "import os; os.kill(os.getpid(), 9)",
    "at exit": "import atexit; atexit.register(print, 'last')",
}


def ended(forks: Any, command: list[str], **named: Any) -> tuple[int, str, str, str]:
    """Returns how a fork ends, exit code and stdout as a process's, and the last line of stderr of the fork and of the process."""
    found, right = (each.run(command, capture_output=True, text=True, check=False, **named) for each in (forks, subprocess))
    assert (found.returncode, found.stdout) == (right.returncode, right.stdout)
    return found.returncode, found.stdout, *("".join(each.stderr.splitlines()[-1:]) for each in (found, right))


def test_a_fork_has_its_arguments_folder_environment_and_streams(forks: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "MINE": "yes"}
    code, out, *errors = ended(forks, [sys.executable, "-c", PRINTS, "a", "b"], cwd=tmp_path, env=environment)
    assert (code, errors) == (0, ["said", "said"])
    assert f"['-c', 'a', 'b'] {tmp_path} yes __main__" in out
    assert "MINE" not in os.environ


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_a_fork_ends_as_a_process_does(forks: Any, code: str) -> None:
    *_, of_fork, of_process = ended(forks, [sys.executable, "-c", code])
    assert of_fork == of_process


@pytest.mark.parametrize(("words", "code"), [(["-m", "only_here"], 0), (["-P", "-m", "only_here"], 1), (["-P", "-m", "only_there"], 0)])
def test_a_module_is_found_where_a_process_finds_it(forks: Any, tmp_path: Path, words: list[str], code: int) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"only_{name}.py").write_text("import sys; print(__file__, __name__, sys.argv[1:])")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "there")}
    assert ended(forks, [sys.executable, *words, "x"], cwd=tmp_path / "here", env=environment)[0] == code


def test_a_fork_answers_until_it_is_ended(forks: Any) -> None:
    code = "import sys\nfor line in sys.stdin: print('got', line.strip(), flush=True)"
    two = [forks.Popen([sys.executable, "-c", code], stdin=forks.PIPE, stdout=forks.PIPE, text=True) for _ in range(2)]
    for number, process in enumerate(two):
        print(number, file=process.stdin, flush=True)
        assert process.stdout.readline() == f"got {number}\n"
        assert process.poll() is None
    two[0].kill()
    assert two[0].wait() == -signal.SIGKILL
    assert two[1].poll() is None
    two[1].stdin.close()  # nothing else holds the other end open
    assert two[1].wait(60) == 0
    two[0].stdin.close()
    for process in two:
        process.stdout.close()


def test_the_end_of_a_fork_is_heard_however_soon_it_comes_and_by_all_who_wait(forks: Any) -> None:
    for _ in range(50):
        child = forks.Popen([sys.executable, "-c", CODES["at once"]])
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda _: child.wait(20), range(3))) == [9, 9, 9]  # noqa: B023 (called at once)
        assert child.poll() == 9
