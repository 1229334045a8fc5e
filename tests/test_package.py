"""The built wheel, installed into a fresh environment, is the whole package and loads little. Nothing is downloaded."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.package

REPOSITORY = Path(__file__).parents[1]
DOMAINS = ("images", "audio", "scenes", "motion", "fluids", "graphs", "waves")
NOT_LOADED = ("matplotlib", "lightning_fabric", "sklearn", "PIL", *(f"pantarhei.{name}" for name in DOMAINS))

# Run by the fresh environment's Python; torch is loaded first, so that the time is the package's own.
PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import pantarhei
print(json.dumps([pantarhei.__file__, time.perf_counter() - start, sorted(sys.modules)]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run outside the repository and without what would lead back into it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build folder in the repository would let deleted files into later wheels."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with the wheel, which sees this one's packages through a path file.

    Path files are not followed further, so an editable install here stays out of sight there.
    """
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    # Before the path file: pip would find the package that is installed here and leave it at that.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    inside = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    here = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(inside, "dependencies.pth").write_text("\n".join(here) + "\n")
    return folder


def test_wheel_holds_every_module_and_the_marker_of_types(wheel):
    source = REPOSITORY / "src"
    files = {p.relative_to(source).as_posix() for p in (source / "pantarhei").rglob("*.py")} | {"pantarhei/py.typed"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files


def test_wheel_brings_its_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (licence,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
    assert b"Apache License" in archive.read(licence)


def test_import_loads_the_core_only_and_fast(environment):
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        file, taken, modules = json.loads(run(environment / "venv/bin/python", "-c", PROBE, cwd=environment))
        assert Path(file).is_relative_to(environment)
        assert [name for name in NOT_LOADED if name in modules] == []
        seconds.append(taken)
        if taken < 1.0:
            break
    assert min(seconds) < 1.0, f"import pantarhei takes {seconds} s on top of torch"


def test_command_runs(environment):
    assert "quickstart" in run(environment / "venv/bin/pantarhei", "--help", cwd=environment)
