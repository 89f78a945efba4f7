"""Text from files is UTF-8 byte for byte; text for terminals holds nothing that they obey."""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, field_validator

from tokenspeed_plan.plans.text import first_complaint, printable, printable_line, read_utf8

READ = """
import sys
from pathlib import Path
from tokenspeed_plan.plans.text import read_utf8
print(ascii(read_utf8(Path(sys.argv[1]))))
"""
ESCAPE = re.compile(r"\\(?:[ntr]|x..|u....|U........)")


def unescaped(found: re.Match[str]) -> str:
    return found[0].encode().decode("unicode_escape")


def test_a_text_is_the_bytes_of_its_file_in_every_locale(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("é\r\n\r日本\n".encode())
    assert read_utf8(path).encode() == path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", READ, path],
        env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == ascii("é\r\n\r日本\n")
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_utf8(path)


@given(st.text(st.characters(codec=None), max_size=20))
def test_what_is_printed_holds_no_controls_and_loses_nothing(text: str) -> None:
    shown = printable_line(text)
    assert not {unicodedata.category(one) for one in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()
    printable(text).encode()
    assert printable(text).count("\n") == text.count("\n")
    if "\\" not in text:
        assert ESCAPE.sub(unescaped, shown) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 👍", "plain é 日本 👍"),
        ("\x1b[2J\x9b31m\x07", "\\x1b[2J\\x9b31m\\x07"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\ud83d", "\\ud83d"),
        ("one\ttwo\nthree\r", "one\ttwo\nthree\\r"),
    ],
)
def test_escapes_are_spelled(text: str, shown: str) -> None:
    assert printable(text) == shown


class Price(BaseModel):
    us: float

    @field_validator("us")
    @classmethod
    def _check(cls, us: float) -> float:
        if us < 0:
            raise ValueError("A time\x1b is never negative")
        return us


class Prices(BaseModel):
    prices: dict[str, Price]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"prices": {"a\n": {"us": "x"}, "b": {}}},
            "`prices.a\\n.us`: input should be a valid num",
        ),
        ({"prices": {"a": {"us": -1}}}, "`prices.a.us`: a time\\x1b is never negative"),
        ([], "`the file`: input should be a valid dictionary"),
    ],
)
def test_the_first_complaint_names_its_place(data: object, says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Prices.model_validate(data)
    assert first_complaint(caught.value).startswith(says)
