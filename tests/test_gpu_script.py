"""`benchmarks/gpu.py` on a CPU: its quick sections come to their ends, and one that does not stops no other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def played(out: Path, *words: str) -> tuple[int, dict, str]:
    done = subprocess.run([sys.executable, SCRIPT, "--out", out, *words], capture_output=True)
    return done.returncode, json.loads((out / "gpu.json").read_text())["sections"], (out / "gpu.md").read_text()


def test_quick_sections_are_rehearsed_on_a_cpu(tmp_path):
    code, sections, table = played(tmp_path, "--device", "cpu", "--sections", "step,growth")
    assert {name: section["wrong"] for name, section in sections.items()} == dict.fromkeys(sections, "")
    assert code == 0
    assert "| growth | grown: grafts | 3, all kept | attention kept, ffn kept, block kept |" in table
    assert "| step | training step: nanoGPT |  | " in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_section_that_fails_stops_no_other_and_is_told(tmp_path):
    code, sections, table = played(tmp_path, "--device", "cuda", "--sections", "growth,tests")
    assert code == 1
    assert "device is 'cuda', but this machine shows no CUDA GPU" in sections["growth"]["wrong"]
    assert (sections["tests"]["wrong"], sections["tests"]["rows"][0][0]) == ("", "pytest -m gpu")
    assert "| **growth** | **did not come to its end** |" in table


def test_a_section_has_a_time_limit(tmp_path):
    code, sections, _ = played(tmp_path, "--device", "cpu", "--sections", "step", "--limit", "0.2")
    assert (code, sections["step"]["wrong"]) == (1, "stopped after 0.2 s")
