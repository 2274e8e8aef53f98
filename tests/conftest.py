"""What the tests share: the path to the modules, the number of threads, the folder of real weights and photos."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(min(4, torch.get_num_threads()))                  # small tensors: more threads only wait


def pytest_configure(config):
    config.option.reportchars += "s"                                    # say at the end why tests were skipped


@pytest.fixture(scope="session")
def shared():
    """The folder with a real ViT, the official modules' outputs on it and photos; not part of the project."""
    if "ADALA_SHARED" not in os.environ:
        pytest.skip("needs real weights: set ADALA_SHARED to the folder with weights/, golden/ and data/")
    return Path(os.environ["ADALA_SHARED"])
