"""Tests import the modules beside `tests/` and run on one thread, so that figures don't depend on the machine."""

import copy
import gc
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Read when torch is first imported, which is not here: the process that hands out the tests of
# `pytest -n 2` needs no torch.
os.environ["OMP_NUM_THREADS"] = "1"

# Longest first: with two files at once, none is left over at the end.
LONGEST = "test_train test_workers test_metrics test_data test_devices test_privacy".split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the file of most tests


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def defaults_read_once():
    """PyYAML takes 25 ms for config.yaml, which hundreds of tests load."""
    import train

    real = train.read_yaml
    defaults = real(train.DEFAULTS)

    def read_once(path):
        return copy.deepcopy(defaults) if path == train.DEFAULTS else real(path)

    with mock.patch.object(train, "read_yaml", read_once):
        yield


def pytest_collection_finish():
    gc.freeze()  # as `data.set_up_process` does
