"""What the tests share: the path to the modules, threads, the folder of real weights and photos, and a few helpers."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import InputError

torch.set_num_threads(min(4, torch.get_num_threads()))                  # small tensors: more threads only wait


def pytest_configure(config):
    config.option.reportchars += "s"                                    # say at the end why tests were skipped


@pytest.fixture(scope="session")
def shared():
    """The folder with a real ViT, the official modules' outputs on it and photos; not part of the project."""
    if "ADALA_SHARED" not in os.environ:
        pytest.skip("needs real weights: set ADALA_SHARED to the folder with weights/, golden/ and data/")
    return Path(os.environ["ADALA_SHARED"])


def error(found, truth):
    """Relative RMS error."""
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def randomise(module, seed=0):
    """Every parameter random, biases and norms too, so that none can be forgotten or exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            whole = p.ndim == 1 or p.shape[0] == 1                      # a bias, norm, token or table; else a product
            p.normal_(std=1 if whole else p[0].numel() ** -0.5, generator=generator)
    return module.eval()


def same(a, b):
    """Two models hold the same tensors, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(call, *args, **more):
    """The message of the InputError that this call ends with, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **more)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)
