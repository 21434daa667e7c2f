"""Options and fixtures of all tests: where the goldens are, where real weights may be."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: these models are too small for threads

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--assets", metavar="DIR", help="folder with real vocabularies and weights (tier 2)")
    parser.addoption("--stress", action="store_true", help="run the long tests too: many kills, fuzzing")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--stress"):
        for item in items:
            if item.get_closest_marker("stress"):
                item.add_marker(pytest.mark.skip(reason="long: run with --stress"))


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Drawing a curve takes longer than most runs of these tests: the scripts do not, here.

    checkpoints.py still can: what it draws has tests of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in filter(None, map(sys.modules.get, ("train", "finetune"))):
            patch.setattr(module, "draw_log", lambda out: None)
            patch.setattr(module, "can_draw", lambda: False, raising=False)
        yield


@pytest.fixture(scope="session")
def root():
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def golden():
    """Tiny checkpoints in the publishers' formats, with the outputs of the official code."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def assets(request):
    """The folder of real vocabularies and weights; the test is skipped where none is given."""
    folder = request.config.getoption("--assets")
    if not folder:
        pytest.skip("needs real files: pytest tests --assets DIR")
    folder = Path(folder).resolve()
    if not folder.is_dir():
        pytest.fail(f"--assets {folder} is not a folder")
    return folder
