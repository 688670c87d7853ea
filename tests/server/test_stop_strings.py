"""Stop strings: the same result however the text is cut, nothing given out that a stop string takes back."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.stop_strings import StopChecker

texts = st.text("ab\n", max_size=20)
stops_ = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None, list[str]]:
    """The text, the stop string found, and what each piece released."""
    checker = StopChecker(stops, include)
    released = []
    for piece in pieces:
        released.append(checker.push(piece))
        if checker.found is not None:
            return "".join(released), checker.found, released
    return "".join([*released, checker.close()]), None, released


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the stop string whose first occurrence ends first; of those that end together, the first named."""
    ends = [(text.find(stop) + len(stop), number) for number, stop in enumerate(stops) if stop in text]
    if not ends:
        return text, None
    end, number = min(ends)
    return text[: end if include else end - len(stops[number])], stops[number]


@settings(max_examples=400, deadline=None)
@given(text=texts, stops=stops_, include=st.booleans(), data=st.data())
def test_any_cut_of_the_text_gives_the_same_result(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert run(pieces, stops, include)[:2] == expected(text, stops, include)


@settings(max_examples=200, deadline=None)
@given(text=texts, stops=stops_)
def test_text_is_held_only_while_a_stop_string_may_begin(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    read = out = ""
    for character in text:
        read, out = read + character, out + checker.push(character)
        if checker.found is not None:
            return
        held = read[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(read.endswith(stop[:size]) for stop in stops for size in range(len(held) + 1, len(stop)))


def test_a_stop_string_across_pieces_is_found_and_cut() -> None:
    assert run(["Hello\n", "\nUs", "er: hi"], ["\n\nUser:"]) == ("Hello", "\n\nUser:", ["Hello", "", ""])
    assert run(["Hello\n", "\nUs", "er: hi"], ["\n\nUser:"], include=True)[0] == "Hello\n\nUser:"


def test_held_text_comes_when_no_stop_string_followed() -> None:
    assert run(["ab", "ab", "x"], ["abc"])[2] == ["", "ab", "abx"]
    assert run(["ab"], ["abc"])[0] == "ab"


def test_a_stop_string_before_min_tokens_does_not_count() -> None:
    checker = StopChecker(["ab"])
    assert checker.push("xab", check=False) == "xab"
    assert checker.push("a", check=False) == ""
    assert checker.push("b") == "" and checker.found == "ab"  # begun before, ended after


def test_without_stop_strings_text_passes() -> None:
    assert run(["a", "", "b"], []) == ("ab", None, ["a", "", "b"])
