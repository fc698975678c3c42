"""Tests import the modules beside `tests/` and run on one thread, so that figures don't depend on the machine."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
