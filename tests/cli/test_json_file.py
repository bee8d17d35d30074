from __future__ import annotations

import json
from pathlib import Path

import pytest

from sim.json_file import parse, read_object, taken_apart


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, '{"a": }', "\x00", r'{"a": "\ud83d"}'])
def test_whatever_is_no_json_is_one_kind_of_error(text: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        parse(text)


def test_both_halves_of_a_character_are_text() -> None:
    assert parse(r'["\ud83d\ude00"]') == [chr(0x1F600)]


def test_an_object_is_read_and_all_else_is_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"a\.json is missing: not mine"):
        read_object(path, "not mine")
    for content, told in (
        (b"[1]", "must hold an object, got list"),
        (b"\xff", "is not JSON"),
        (b"", "not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.json {told}" if "must" in told else told):
            read_object(path)
    path.write_text('{"a": [1]}')
    assert read_object(path) == {"a": [1]}
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_object(tmp_path)


@pytest.mark.parametrize("wrong", [{}, {"a": None}, {"a": {}}, {"a": []}])
def test_what_does_not_fit_is_told_with_the_file(wrong: dict[str, list[int]]) -> None:
    said = r"b\.json is damaged, or not as this version of coserve writes it"
    with pytest.raises(ValueError, match=said), taken_apart(Path("b.json"), "coserve"):
        wrong["a"][0].bit_length()


def test_what_is_told_already_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"^too small$"), taken_apart(Path("b.json"), "coserve"):
        raise ValueError("too small")
