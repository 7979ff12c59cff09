"""The built wheel in a fresh environment without a compiler: seconds to install, `daemon-fast doctor`, operator tests.

Run it by each Python that the wheel is for, once a torch, where `make wheels` has filled dist/:

    python3.12 benchmarks/wheels.py torch==2.11.0 --save

Rows are kept in results/wheels.json, and results/wheels.md is their table. Only the standard library is needed. The
environment lies in build/, and is deleted: with a CUDA build of torch it takes up to 7 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
OPERATORS = (
    "append_tokens", "build", "compile", "gopher_repetition", "gradients", "importance_weights", "race_select",
    "repetition", "sample_tokens", "sir_select", "tilted_moments", "token_logprobs",
)  # fmt: skip
FACTS = (
    "import json, sys, torch; from importlib.metadata import version; from daemon_fast import build_info;"
    "print(json.dumps([torch.__version__, torch.version.cuda, version('transformers'), build_info()['cuda']]))"
)
HEADER = """| Python | torch | its CUDA | glibc | machine | wheel, s | its needs, s | import, s | doctor | tests |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def measure(torch: str) -> dict[str, object]:
    """Install, check and test in an environment of its own; what the table says of it."""
    place = ROOT / f"build/environments/{platform.python_version()}-{torch}"
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True, symlinks=True)
    # Nothing but the environment's own programs is found: no compiler, no readelf.
    env = {"PATH": str(place / "bin"), "HOME": os.environ["HOME"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {name: value for name, value in os.environ.items() if name.lower().startswith("pip_")}
    python = str(place / "bin/python")

    def run(*command: str, check: bool = True, cwd: Path = place) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
        if check and done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        return done

    def timed(*command: str) -> float:
        begin = time.perf_counter()
        run(*command)
        return round(time.perf_counter() - begin, 1)

    def install(*what: str) -> float:
        return timed(python, "-m", "pip", "install", "-q", "--no-cache-dir", "--only-binary", ":all:", *what)

    try:
        install(torch)
        wheel = install("--no-deps", "--no-index", "--find-links", str(ROOT / "dist"), "daemon-fast")
        needs = install("--find-links", str(ROOT / "dist"), "daemon-fast", torch)
        timed(python, "-c", "import torch")  # from now on its files are in memory
        importing = timed(python, "-c", "import daemon_fast.ops")
        version, cuda, transformers, kernels = json.loads(run(python, "-c", FACTS).stdout)
        doctor = run(str(place / "bin/daemon-fast"), "doctor", check=False)
        install("pytest", "hypothesis", "scipy")
        tests = place / "checkout"
        for folder in ("tests", "benchmarks"):
            shutil.copytree(ROOT / folder, tests / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tests)
        files = [f"tests/test_{name}.py" for name in OPERATORS]
        pytest = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, check=False, cwd=tests)
        if doctor.returncode or pytest.returncode:
            print(doctor.stdout[-2000:], doctor.stderr[-2000:], pytest.stdout[-6000:], pytest.stderr[-2000:])
    finally:
        shutil.rmtree(place, ignore_errors=True)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", pytest.stdout.splitlines()[-1])
    return {
        "python": platform.python_version(),
        "torch": version,
        "cuda": cuda,
        "transformers": transformers,
        "kernels": kernels,
        "libc": platform.libc_ver()[1],
        "machine": platform.machine(),
        "wheel_s": wheel,
        "needs_s": needs,
        "import_s": importing,
        "doctor": "ok" if doctor.returncode == 0 else "fails",
        "tests": ", ".join(f"{number} {what}" for number, what in counts),
    }


def save(row: dict[str, object]) -> None:
    """Add a row, in place of an older one of the same Python and torch, and write the table."""
    path = RESULTS / "wheels.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in ("python", "torch", "cuda", "machine"))] + [row]

    def number(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)]

    rows.sort(key=lambda r: (r["machine"] != "x86_64", number(r["torch"]), number(r["python"])))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    keys = ("python", "torch", "cuda", "libc", "machine", "wheel_s", "needs_s", "import_s", "doctor", "tests")
    lines = ["| " + " | ".join(str(r[key] or "none") for key in keys) + " |" for r in rows]
    (RESULTS / "wheels.md").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", help="what pip is asked for, such as torch==2.11.0")
    parser.add_argument("--save", action="store_true", help="keep the row in results/wheels.json and wheels.md")
    arguments = parser.parse_args()
    found = measure(arguments.torch)
    print(json.dumps(found, indent=1))
    if arguments.save:
        save(found)
    sys.exit(found["doctor"] != "ok" or "failed" in str(found["tests"]) or "error" in str(found["tests"]))
