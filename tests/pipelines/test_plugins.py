"""Arms and blueprints of the user's own: the docs' code runs, is pinned, and is refused where it is wrong."""

import json
import os
import subprocess
import sys

import pytest
import ray

from esper.pipelines import sweep, train
from esper.platform import plugins
from esper.workers.tolaria.sampling import opening
from tests.pages import blocks
from tests.pipelines.helpers import planned, sets, summary_of

CLASS = """
from esper.platform.contracts import GraftAction


class MyPolicy:
    def act(self, telemetry, probe=None):
        return GraftAction(int(telemetry.legal()[-1]), telemetry.sequence, "the last row")
"""


def test_a_class_decides_a_run_which_an_edited_one_does_not_go_on_with(module, tiny, tmp_path, refused):
    module("my_module", CLASS)
    out = tmp_path / "run"
    assert train.main(["my_module:MyPolicy", *tiny, "--out", str(out)]) == 0
    grafts = summary_of(out)["grafts"]
    assert {graft["reason"] for graft in grafts} == {"the last row"}
    assert json.loads((out / "pins.json").read_text())["plugins"] == {"my_module": plugins.digest("my_module")}
    (out / "summary.json").unlink()  # as if it had been killed before
    with (tmp_path / "my_module.py").open("a") as file:
        file.write("# edited\n")
    refused(train.main, ["--resume", str(out)], "began with other sources of my_module")


BOTH = """
import json, sys
from esper.pipelines import ppo, sweep
sys.exit(sweep.main(json.loads(sys.argv[1])) or ppo.main(json.loads(sys.argv[2])))
"""


@pytest.mark.usefixtures("one_ray")
def test_a_function_and_a_blueprint_are_a_sweeps_and_in_rays_workers_as_are_those_of_ppo(module, tiny, tmp_path):
    """By a driver of their own: workers have the path that it had when it connected."""
    module("my_module", blocks("your-own-arm.md")[0])
    module("my_blueprints", blocks("your-own-blueprint.md")[0])
    own = [*tiny, *sets("growth.plugins=my_blueprints", 'growth.blueprints={"copied":{}}')]
    out = tmp_path / "sweep"
    flags = ["--arms", "static,my_module:my_arm,random:my_module:my_arm", "--tuning-seeds", "0", "--out", str(out)]
    small = sets("ppo.iterations=1", "ppo.decisions=8", "ppo.minibatch=8", "ppo.held_out=0", "fleet.workers=1")
    commands = [*own, *flags], [*own, *small, "--out", str(tmp_path / "ppo")]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    line = [sys.executable, "-c", BOTH, *map(json.dumps, commands)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tests = {run["arm"]: run["grafts"] for run in summary_of(out)}
    assert tests.keys() == {"static-1", "my_module:my_arm", "random:my_module:my_arm"}
    assert tests["my_module:my_arm"][0]["reason"].endswith("of my_module:my_arm")
    kinds = [[graft["blueprint"] for graft in grafts] for label, grafts in tests.items() if label != "static-1"]
    assert kinds[0] == kinds[1] == ["copied"] * len(kinds[0]) != []
    best = min(summary_of(out), key=lambda run: run["val_loss"])
    assert f"{best['arm']} writes: {opening(best['sample'])}" in done.stderr
    assert summary_of(tmp_path / "ppo")["spent_on"]["learned"]["steps"] > 0


def test_the_pages_blueprint_is_grafted_without_a_change_of_the_output(module, tiny, tmp_path, refused):
    module("my_blueprints", blocks("your-own-blueprint.md")[0])
    out, own = tmp_path / "run", sets("growth.plugins=my_blueprints")
    line = ["schedule", *tiny, *planned(tmp_path, {0.2: "copied"}), *own]
    refused(train.main, [*line, "--out", out], "blueprints of plug-in 'my_blueprints' (copied) growth.blueprints names")
    own = sets("growth.blueprints.copied.units=16")
    assert train.main([*line, *own, "--out", str(out)]) == 0
    [graft] = summary_of(out)["grafts"]
    assert graft["blueprint"] == "copied"
    assert graft["identity"] <= 1e-5
    assert summary_of(out)["shape"][0]["width"] == 64 + 16
    refused(train.main, [*line, *own, *sets("growth.blueprints.copied.units=0"), "--out", out], "must be")


def test_installed_packages_announce_arms_and_blueprints_by_name(module, tiny, tmp_path, monkeypatch):
    """Of a package as pip leaves it: a folder with its metadata."""
    module("my_module", CLASS)
    module("my_blueprints", blocks("your-own-blueprint.md")[0])
    metadata = tmp_path / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = "[esper.arms]\nmine = my_module:MyPolicy\n[esper.blueprints]\ncopied = my_blueprints\n"
    (metadata / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.announced.cache_clear()
    line = ["mine", *tiny, *sets('growth.blueprints={"copied":{}}'), "--out", str(tmp_path / "run")]
    try:
        assert train.main(line) == 0
    finally:
        plugins.announced.cache_clear()
    summary = summary_of(tmp_path / "run")
    assert (summary["arm"], {graft["blueprint"] for graft in summary["grafts"]}) == ("mine", {"copied"})
    pinned = json.loads((tmp_path / "run" / "pins.json").read_text())["plugins"]
    assert pinned == {name: plugins.digest(name) for name in ("my_module", "my_blueprints")}


@pytest.mark.parametrize(
    ("text", "arm", "sentence"),
    [
        (None, "nowhere:Policy", "plug-in 'nowhere' does not import (ModuleNotFoundError: No module named 'nowhere')"),
        ("1 / 0", "own:Policy", "plug-in 'own' does not import (ZeroDivisionError: division by zero)"),
        ("", "own:Policy", "arm 'own:Policy' cannot be made (AttributeError: module 'own' has no attribute 'Policy')"),
        ("class Policy:\n    pass", "own:Policy", "arm 'own:Policy' has no act(telemetry, probe) and is no function"),
        ("def policy(telemetry):\n    return 'wait'", "own:policy", "own:policy answered 'wait': it must answer the"),
        ("def policy(telemetry):\n    return telemetry.leagl()[-1]", "own:policy", "own.py, line 2: mend it."),
        ("def policy(telemetry, probe): ...", "own:policy", "arm 'own:policy' raised TypeError (policy() missing 1"),
        ("class Policy:\n    def act(self, seen, probe):\n        1 / 0", "own:Policy", "own.py, line 3: mend it."),
    ],
)
def test_an_arm_that_is_none_is_refused_before_it_begins(module, text, arm, sentence, tiny, tmp_path, refused, capfd):
    out = tmp_path / "out"
    if text is not None:
        module("own", text)
    if any(told in sentence for told in ("answered", "raised", "mend it.")):  # which only a run can show
        assert train.main([arm, *tiny, "--out", str(out)]) == 2
        assert sentence in (said := capfd.readouterr().err)
        assert "Traceback" not in said
        return
    refused(train.main, [arm, *tiny, "--out", out], sentence)
    refused(sweep.main, ["--arms", f"static,{arm}", *tiny, "--out", out], sentence)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("units: Count", "unit: Count"), "blueprint CopiedNeurons lacks units: give it that"),
        (('"copied"', '"ffn"'), "CopiedNeurons is called 'ffn', as one of esper.workers.kasmina.blueprints.units is"),
        (('"width"\n', '"wings"\n'), "unknown adds of blueprint CopiedNeurons 'wings'"),
        (("(Units)", "(Blueprint)"), "blueprint CopiedNeurons lacks allowed, outgoing, prune, pruned, resized, slices"),
        (("@dataclass(frozen=True)\n", ""), "CopiedNeurons lacks @dataclass(frozen=True)"),
    ],
)
def test_a_blueprint_that_is_none_is_refused(module, change, sentence, tiny, tmp_path, refused):
    code = "from esper.workers.kasmina.registry import Blueprint\n" + blocks("your-own-blueprint.md")[0]
    module("odd_blueprints", code.replace(*change))
    own = sets("growth.plugins=odd_blueprints", "growth.blueprints.copied={}")
    refused(train.main, ["static", *tiny, *own, "--out", tmp_path / "out"], sentence)
