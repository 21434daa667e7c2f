"""What who carries the project on relies on: metadata, the linter's rules."""
import re
import shutil
import subprocess

import pytest
from helpers import ROOT


def test_pip_installs_every_module():
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"py-modules = \[(.*?)\n\]", metadata, re.S)[1]
    assert set(re.findall(r'"(\w+)"', listed)) == {file.stem for file in ROOT.glob("*.py")}
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert set(re.findall(r'"(\w+)"', re.search(r"packages = \[(.*?)\]", metadata)[1])) == packages


def test_metadata_and_requirements_name_the_same_packages():
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"(\w+)[>=]', re.search(r"\ndependencies = \[(.*?)\]", metadata, re.S)[1])
    required = re.findall(r"^(\w+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert {*listed, "pytest"} == set(required)


def test_every_file_passes_the_linter():
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff")
    done = subprocess.run([ruff, "check", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
