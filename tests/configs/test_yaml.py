"""YAML as the configuration reads it."""

import math
from pathlib import Path

import pytest

from shoal.configs.yaml import MAX_DEPTH, MAX_FILE_BYTES, YamlError, YamlMapping, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("12:30", "12:30"),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("2001-01-01", "2001-01-01"),
        ("4GiB", "4GiB"),
        ("-.inf", -math.inf),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


def test_nan_is_a_float() -> None:
    assert math.isnan(parse_yaml(".nan"))


def test_empty_text_is_null_and_mappings_know_their_lines() -> None:
    assert parse_yaml("# nothing\n") is None
    document = parse_yaml("a: 1\n\nb:\n  c: [1, x]\n")
    assert isinstance(document, YamlMapping) and document == {"a": 1, "b": {"c": [1, "x"]}}
    assert document.lines == {"a": 1, "b": 3} and document["b"].lines == {"c": 4}


def test_anchors_are_shared_values() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key a, first on line 1"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "tags are not taken"),
        ("a: 1\nb: !!str x\n", 2, "tags are not taken"),
        ("a: 1\nb: *missing\n", 2, "alias"),
        ("a: &x [*x]\n", 1, "alias"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: [1\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("{[1]: 2}\n", 1, "key must be"),
        ("a: 1\n\x00", 1, "not valid YAML"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), 1, "nested deeper"),
    ],
)
def test_what_is_not_acceptable_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(YamlError, match=words) as refused:
        parse_yaml(text)
    assert refused.value.line == line


def test_alias_expansion_is_bounded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(YamlError, match="after aliases are expanded"):
        parse_yaml("\n".join(lines))


def test_large_and_undecodable_files_are_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(YamlError, match="larger than"):
        read_yaml(large)
    with pytest.raises(YamlError, match="not UTF-8") as refused:
        parse_yaml(b"a: 1\nb: \xff\n")
    assert refused.value.line == 2
