"""`esper settings` and the page that is made of it have every key, with the value that it has by default."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.pipelines.tools import settings
from esper.platform.spec import RunSpec, load_spec, presets

KEYS = [setting for group in settings.groups() for setting in group.settings]


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, dict) and key != "growth.blueprints":
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def test_every_key_has_its_default_and_a_meaning():
    first = {setting.key: setting for setting in reversed(KEYS)}  # of keys that two kinds of host have, the default's
    for key, value in flat(RunSpec().model_dump(mode="json")):
        assert json.loads(first[key].default) == value
    for preset in presets():
        assert {key for key, _ in flat(load_spec(preset).model_dump(mode="json"))} <= first.keys()
    assert [setting.key for setting in KEYS if not setting.meaning or not setting.allowed] == []
    nested = {"host.layers[].experts[].share", "growth.blueprints.block.init", "growth.blueprints.conv_width.width"}
    assert nested <= first.keys()


def test_what_is_allowed_is_told_in_words():
    told = {setting.key: setting.allowed for setting in KEYS}
    assert told["budget.decisions"] == "integer ≥ 1 and ≤ 1,000"
    assert told["reward.reference"] == "number > 0 or null"
    assert told["optimizer.rates"] == "list of [integer ≥ 1, number > 0]"
    assert told["trainer.compile"] == '"auto" or "on" or "off"'


def test_the_command_prints_a_line_a_key(capfd, refused):
    assert settings.main(["budget.dec"]) == 0
    assert capfd.readouterr().out == "budget.decisions = 24  (integer ≥ 1 and ≤ 1,000)  K, in an episode\n"
    refused(settings.main, ["budgets"], "no key begins with 'budgets': `esper settings` lists all.")


def test_comments_are_found_behind_a_line_and_above_it():
    source = "a = 1  # one\n\n# lost\n\n# b is\n# two\nb = 2\nc = '# three'\n"
    assert settings.comments(source) == {1: "one", 7: "b is two"}


def test_the_page_has_every_key_once_as_a_link_can_name_it(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs")
    monkeypatch.delitem(sys.modules, "pages", raising=False)
    pages = pytest.importorskip("pages")
    page = "\n".join(map(pages.table, settings.groups()))
    assert all(f">{setting.key}</code>" in page for setting in KEYS)
    assert page.count('id="budget.axis"') == 1
