"""The commands of the documentation's pages: each is one that Esper takes, and those that take seconds run.

Bash reads the pages' blocks, so that whatever is no command fails.
"""

import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from esper.pipelines import policy
from esper.pipelines.common import cli
from esper.pipelines.common.arguments import parse
from esper.pipelines.tools import settings
from esper.platform.frozen import Frozen
from esper.platform.spec import load_spec, presets
from tests.pages import CONTROLLERS, DOCS, PAGES, RECORDED, ROOT, blocks, fenced
from tests.pipelines.helpers import sets

# In the pages' blocks each program writes its words instead of running: a NUL behind a word, a line's end behind all.
BASH = r"""set -eu; PATH=; said() { printf '%s\0' "$@"; printf '\n'; }; tr() { /usr/bin/tr "$@"; }
for program in esper make python ray; do eval "$program() { said $program \"\$@\"; }"; done
"""


def commands(page: str, folder: Path) -> list[list[str]]:
    """The words of each command in a page's blocks, run in a folder; a loop's are each of its turns."""
    script = BASH + "".join(blocks(page, ""))
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def targets(words: list[str]) -> set[str]:
    """Those of `make` that there are none of."""
    there = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {word for word in words if "=" not in word} - {*there}


def model_of(words: list[str]) -> tuple[type[Frozen], list[str]]:
    """The model of the arguments of `esper WORDS`, and the words that it takes."""
    assert words[0] in cli.COMMANDS
    if words[0] == "policy":
        return policy.ACTIONS[words[1]][0], words[2:]
    return inspect.getclosurevars(cli.module_of(words[0]).main).nonlocals["model_class"], words[1:]


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_are_accepted(page, tmp_path):
    """Without being run: those of its blocks with all their values, those in its text by their flags."""
    assert {language for language, _ in fenced(page)} <= {"python", "text", ""}  # what runs, what is shown, commands
    for words in commands(page, tmp_path):
        if words[0] == "ray":
            words = words[words.index("--") + 1 :] if "--" in words else ["ray"]
        program, *rest = words
        if program == "make":
            assert targets(rest) == set()
        elif program in ("python", "sh"):
            assert (ROOT / rest[0]).is_file()
            program, rest = "esper" if rest[0].startswith("pipelines/") else program, [Path(rest[0]).stem, *rest[1:]]
        if program == "esper":
            arguments: Any = parse(*model_of(rest))
            if getattr(arguments, "set", ()):
                load_spec(arguments.preset if arguments.preset in presets() else "tinystories-char", arguments.set)
    text = (DOCS / page).read_text(encoding="utf-8")
    for program, line in re.findall(r"`(make|esper) ([^`]+)`", text):
        words = shlex.split(line.replace("…", ""))
        if program == "make":
            assert targets(words) == set()
        elif words and words[0].islower():
            model = model_of([*words, "evaluate"])[0]
            known = {f"--{(field.alias or name).replace('_', '-')}" for name, field in model.model_fields.items()}
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}
    keys = {setting.key for group in settings.groups() for setting in group.settings}
    named = {key for key in re.findall(r"--set '?(\w+\.[\w.]+)=", text) if not key.startswith("growth.blueprints.")}
    assert named <= keys | {"key.path"}


NOT_RUN = {  # page, or how commands begin → why they are only parsed
    **dict.fromkeys((f"../{CONTROLLERS}", f"../{RECORDED}"), "an hour of training"),
    "results.md": "days of training",
    "make": "sets up an environment, runs these tests, measures for minutes",
    "python": "measures for minutes, or is the same as `esper`",
    "ray": "a cluster: tests/platform/test_cluster.py starts one",
    "esper demo": "minutes",
    "esper ppo$": "a fleet on Ray: tests/pipelines/test_ppo.py trains one",
    "esper ppo --(laws|init-from)": "the same",
    "esper transfer": "minutes: tests/pipelines/test_transfer.py",
    "esper sweep": "minutes on Ray: tests/pipelines/test_sweep.py, and test_plugins.py with arms of a user's own",
    "esper report": "needs a sweep: tests/pipelines/reports/test_report.py",
    "esper train my_controller:arm": "needs a trained policy: tests/test_docs.py trains it",
}
MORE = {  # words of a command → what makes it take seconds
    "train": ["--preset", "my-preset.json", "--data", "stories.txt", *sets("budget.amount=40")],
    "train --task": ["--out", "digits", *sets("budget.amount=100", "budget.decisions=4")],
    "train --resume": [],
    "ppo": ["--preset", "my-preset.json", *sets("ppo.iterations=1", "ppo.decisions=16", "ppo.minibatch=8")],
    "ppo --resume": [],
    "prepare": ["--tokenizer", "bpe:300"],
    "policy fit runs/": ["--out", "other-laws.json"],
    "policy distill": ["--out", "median.json"],
    "policy evaluate": ["--episodes", "1"],
    "calibrate": ["--preset", "my-preset.json", "--data", "stories.txt", "--steps", "5"],
}


def test_every_command_is_run_or_is_not_for_a_reason(store, tiny_spec, text_file, module, tmp_path, monkeypatch):
    """In one folder and in the pages' order, with tiny budgets; a name with `…` is the newest that is there."""
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
    spec = tiny_spec.overridden({"growth.blueprints": {"ffn": {"width": 8}, "block": {}}, "ppo.held_out": 1})
    (tmp_path / "my-preset.json").write_text(spec.model_dump_json(exclude={"preset"}))
    (tmp_path / "stories.txt").write_text(f"{text_file.read_text()}\n<|endoftext|>\nOnce upon a time. The End.")
    (tmp_path / "plan.json").write_text('[{"at": 0.15, "blueprint": "block"}]')
    module("my_module", blocks("your-own-arm.md")[0])
    module("my_blueprints", blocks("your-own-blueprint.md")[0])
    for layers in ("1", "2", "3"):  # instead of a sweep
        own = sets(f"host.n_layer={layers}", "budget.cooldowns=[0.5]")
        assert cli.main(["train", "static", *MORE["train"], *own, "--out", f"runs/sweep-1/{layers}"]) == 0
    assert cli.main(["export", "runs/sweep-1/1", "--out", "gpt2", "--format", "gpt2"]) == 0

    left, done = {*NOT_RUN}, set()
    for page in PAGES:
        for words in commands(page, tmp_path):
            line = " ".join(words)
            reasons = {each for each in NOT_RUN if each == page or re.match(each, line)}
            left -= reasons
            if reasons or line in done:
                continue
            done.add(line)
            there = {word: [*Path().glob(word.replace("…", "*"))] for word in words if "…" in word}
            named = [str(max(there[word], key=os.path.getmtime)) if word in there else word for word in words[1:]]
            if "--resume" in words:
                (Path(named[-1]) / "summary.json").unlink()  # as if it had been killed before
            more = max((each for each in MORE if {*each.split()} <= {*words}), key=len, default="")
            assert cli.main([*named, *MORE.get(more, [])]) == 0, line
    assert left == set()  # a reason for nothing
