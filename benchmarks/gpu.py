"""`make gpu`: checks and times everything on a machine with one NVIDIA GPU, in six minutes at most.

python benchmarks/gpu.py --device cuda --out DIR            # with a Python that has torch and Esper's dependencies
python benchmarks/gpu.py --device cpu                       # the rehearsal: every line, at small sizes
python benchmarks/gpu.py --sections step,compiled           # some of them

Each section (`gpu_sections.py`) is a process with a time limit of its own: whatever happens to it, the next one runs.
`DIR/gpu.md` and `gpu.json` are written after each, `DIR/SECTION.log` has what it printed. Needs no network, and itself
nothing but the standard library. Exit code 1 where a section did not come to its end.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 350  # of all
SECTIONS = {  # name → seconds at most, what matters most first
    "tests": 60,
    "numerics": 45,
    "step": 45,
    "growth": 45,
    "compiled": 100,
    "born": 45,
    "calibrate": 45,
    "packed": 75,
    "demo": 120,
}
TOLD = ("torch", "triton", "flash-attn", "numpy", "ray", "mlflow", "pydantic")  # packages


def asked(*command: str) -> str:
    """What a command prints, or why it could not."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"no {command[0]} ({type(error).__name__})"


def environment() -> list[list[str]]:
    """Rows that every number rests on."""
    there = {each.name.lower().replace("_", "-"): each.version for each in distributions()}
    fields = "--query-gpu=name,driver_version,memory.total,power.limit"
    return [
        ["GPU, driver, memory, power", "", asked("nvidia-smi", fields, "--format=csv,noheader")],
        ["cores", "", str(os.cpu_count())],
        ["Python", "", sys.version.split()[0]],
        ["packages", "", ", ".join(f"{name} {there.get(name, 'missing')}" for name in TOLD)],
        ["commit", "", asked("git", "describe", "--always", "--dirty") or "not in a clone"],
    ]


def run(name: str, device: str, out: Path, limit: float) -> dict[str, Any]:
    """Run a section: its rows, as far as it came, its seconds, and what went wrong (empty if nothing)."""
    begun, rows, log = time.monotonic(), out / f"{name}.rows.json", out / f"{name}.log"
    command = [sys.executable, str(Path(__file__).with_name("gpu_sections.py")), name, device, str(rows)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w") as file:
        section = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            failed = section.wait(timeout=limit) != 0
            told = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it ended without a word"]
            wrong = told[0].strip() if failed else ""
        except subprocess.TimeoutExpired:
            wrong = f"stopped after {limit:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(section.pid, signal.SIGKILL)  # and what it has started
            section.wait()
    found = json.loads(rows.read_text()) if rows.exists() else []
    rows.unlink(missing_ok=True)
    return {"rows": found, "seconds": round(time.monotonic() - begun, 1), "wrong": wrong}


def write(out: Path, device: str, sections: dict[str, dict[str, Any]]) -> None:
    """Both files, from what there is so far."""
    when = time.strftime("%Y-%m-%d %H:%M")
    (out / "gpu.json").write_text(json.dumps({"when": when, "device": device, "sections": sections}, indent=2) + "\n")
    lines = [f"`benchmarks/gpu.py --device {device}`, {when}:", ""]
    lines += ["| section | what | goal | now |", "|---|---|---|---|"]
    for name, section in sections.items():
        lines += [f"| {name} | {' | '.join(row)} |" for row in section["rows"]]
        if section["wrong"]:
            lines.append(f"| **{name}** | **did not come to its end** | | {section['wrong'].replace('|', '/')} |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}")
    parser.add_argument("--sections", type=lambda names: names.split(","), default=list(SECTIONS))
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds of any one section")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}: choose of {', '.join(SECTIONS)}")
    out, ends = arguments.out.resolve(), time.monotonic() + SECONDS
    out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict[str, Any]] = {"environment": {"rows": environment(), "seconds": 0.0, "wrong": ""}}
    for name in arguments.sections:
        limit = round(min(SECTIONS[name], arguments.limit, ends - time.monotonic()), 1)
        print(f"{name}: {limit:g} s at most", file=sys.stderr, flush=True)
        unrun = {"rows": [], "seconds": 0.0, "wrong": "not begun: the time is up"}
        sections[name] = run(name, arguments.device, out, limit) if limit > 0 else unrun
        write(out, arguments.device, sections)
    print((out / "gpu.md").read_text())
    print(f"results: {out / 'gpu.json'}", file=sys.stderr)
    return int(any(section["wrong"] for section in sections.values()))


if __name__ == "__main__":
    sys.exit(main())
