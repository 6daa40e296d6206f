"""A run goes on from the spec, the files, the text and the code that it began with, or is refused."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform import pins
from esper.platform.errors import UserError
from esper.platform.pins import check_pins, pin
from esper.platform.spec import RunSpec, load_spec


@pytest.fixture
def begun(tmp_path: Path, tiny_spec) -> Path:
    """The folder of a run that was begun."""
    (tmp_path / "plan.json").write_text("[1]")
    copies = pin(tmp_path / "run", tiny_spec, data="f00d", inputs={"schedule": tmp_path / "plan.json"})
    assert copies == {"schedule": tmp_path / "run" / "inputs" / "schedule.json"}
    return tmp_path / "run"


def test_what_is_the_same_goes_on_with_the_copies(begun: Path, tiny_spec):
    (begun.parent / "plan.json").write_text("[2]")  # the user's own file is read no more
    copies = check_pins(begun, data="f00d")
    assert copies["schedule"].read_text() == "[1]"
    assert load_spec(begun / "spec.json") == tiny_spec
    assert pin(begun, tiny_spec, data="f00d", inputs=copies) == copies  # begun again, from its own copies


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("spec.json", "{}", "spec.json was changed"),
        ("inputs/schedule.json", "[3]", "schedule.json was changed since"),
        ("inputs/schedule.json", None, "schedule.json cannot be read"),
        ("pins.json", None, "pins.json cannot be read"),
        ("pins.json", "[]", "pins.json"),
    ],
)
def test_the_first_thing_that_differs_is_named(begun: Path, name: str, content: str | None, says: str):
    (begun / name).unlink() if content is None else (begun / name).write_text(content)
    with pytest.raises(UserError, match=says):
        check_pins(begun, data="f00d")


def test_other_text_code_and_torch_are_named(begun: Path, monkeypatch):
    for other in ("beef", None):
        with pytest.raises(UserError, match="the text has changed"):
            check_pins(begun, data=other)
    for name, says in (("code_digest", r"other code \(commit .* give other numbers"), ("version", r"and this is 0\.1")):
        with monkeypatch.context() as patch:
            patch.setattr(pins, name, lambda *_: "0.1")
            with pytest.raises(UserError, match=says):
                check_pins(begun, data="f00d")


def test_an_input_that_is_not_there(tmp_path: Path, tiny_spec):
    with pytest.raises(UserError, match=r"the policy .* cannot be read"):
        pin(tmp_path, tiny_spec, data=None, inputs={"policy": tmp_path / "none"})
    assert not (tmp_path / "pins.json").exists()


@given(data=st.data())
def test_a_mutated_file_is_a_sentence(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    pin(out, RunSpec(), data=None, inputs={})
    text = (out / "pins.json").read_bytes()
    begin = data.draw(st.integers(0, len(text) - 1))
    (out / "pins.json").write_bytes(text[:begin] + data.draw(st.binary(max_size=5)) + text[begin + 1 :])
    with contextlib.suppress(UserError):  # a letter of the commit is not looked at
        check_pins(out, data=None)
