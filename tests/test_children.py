"""Child processes: what they answer, and how their end is told."""

from __future__ import annotations

from pathlib import Path

import pytest

import ddkit

ECHO = """
import json, sys
print("not for us")
print(json.dumps({"argument": sys.argv[1]}), flush=True)
for line in sys.stdin:
    if json.loads(line) == "die":
        sys.exit("of its own accord")
    print(json.dumps({"heard": json.loads(line)}), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ddkit.Child:
    (tmp_path / "echoing.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ddkit.Child("echoing", "hello", errors=tmp_path / "errors.txt")


def test_a_child_says_when_it_is_ready_and_answers_each_question(child: ddkit.Child) -> None:
    assert child.answer() == {"argument": "hello"}
    assert child.ask(["a", 1]) == {"heard": ["a", 1]}
    assert child.running
    child.stop()
    assert not child.running


def test_the_end_of_a_child_is_told_with_code_and_last_words(child: ddkit.Child) -> None:
    child.answer()
    for question in ("die", "again"):
        with pytest.raises(ddkit.ChildEnded, match="ended with exit code 1: of its own accord"):
            child.ask(question)
    child.stop()


def test_a_stopped_child_answers_nothing(child: ddkit.Child) -> None:
    child.stop()
    with pytest.raises(ddkit.ChildEnded):
        child.ask("anything")
    child.stop()
