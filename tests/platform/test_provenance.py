"""A run goes on from the spec, the files, the text and the code that it began with, or is refused."""

from pathlib import Path

import pytest

from esper.platform import provenance
from esper.platform.errors import UserError
from esper.platform.provenance import check_pins, pin


def test_what_is_the_same_goes_on_with_the_copies_and_what_differs_is_named(tmp_path: Path, tiny_spec, monkeypatch):
    begun, plan = tmp_path / "run", tmp_path / "plan.json"
    with pytest.raises(UserError, match=r"the schedule .* cannot be read"):
        pin(begun, tiny_spec, data="f00d", inputs={"schedule": plan})
    assert not begun.exists()
    plan.write_text("[1]")
    copies = pin(begun, tiny_spec, data="f00d", inputs={"schedule": plan})
    assert copies == {"schedule": begun / "inputs" / "schedule.json"}
    plan.unlink()  # the user's own file is read no more
    assert check_pins(begun, data="f00d") == copies == pin(begun, tiny_spec, data="f00d", inputs=copies)

    for name in ("spec.json", "inputs/schedule.json", "pins.json"):
        whole = (begun / name).read_bytes()
        for content in (b"[3]", None):
            (begun / name).unlink() if content is None else (begun / name).write_bytes(content)
            with pytest.raises(UserError, match=name):
                check_pins(begun, data="f00d")
        (begun / name).write_bytes(whole)
    for other in ("beef", None):
        with pytest.raises(UserError, match="other text"):
            check_pins(begun, data=other)
    for name, says in (("code_digest", r"other code, of commit .* other numbers"), ("version", r"other torch .*0\.1")):
        with monkeypatch.context() as patch:
            patch.setattr(provenance, name, lambda *_: "0.1")
            with pytest.raises(UserError, match=says):
                check_pins(begun, data="f00d")
