"""Fixtures shared by all test modules: the markers, and one small pair of checkpoints."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Child processes and torch alike: two busy cores measure nothing else well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from support import processes
from support.disks import limit_files, small_disk  # noqa: F401
from support.synthetic import Pair, write_pair

# No clock and no chance decides a test: new examples are looked for by `make test-slow`.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests of a pre-trained model out of every run that does not name their marker."""
    if "pretrained" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("pretrained")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """Leave out of later collections what is loaded by now: the Trainer collects in each run."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # Bindings complain of what is still there when the interpreter ends.
    gc.unfreeze()


def pytest_runtest_teardown() -> None:
    processes.end_all()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A text and a multimodal checkpoint of two layers, one file each; read only."""
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def sharded_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same kind of pair in three and four shards; read only."""
    return write_pair(tmp_path_factory.mktemp("sharded"), seed=1, shards=3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory that does not exist yet, alone in its parent."""
    parent = tmp_path / "result"
    parent.mkdir()
    return parent / "delta"
