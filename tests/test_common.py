import numpy as np
import pytest
import torch
from PIL import Image

import common

GRAYS = [((-1, 1), 0.2, 153), ((-1, 1), -1.0, 0), ((0, 1), 0.2, 51), ((0, 1), 1.5, 255)]


@pytest.mark.parametrize("value_range, value, gray", GRAYS)
def test_gray_is_absolute(value_range, value, gray, tmp_path):
    """One value gives one gray whatever else is in the grid, so that epochs can be compared."""
    common.save_grid(torch.full((3, 1, 5, 5), value), tmp_path / "grid.png", 2, value_range)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (16, 16, 3)
    assert (pixels[2:7, 2:7] == gray).all() and (pixels[9:14, 2:7] == gray).all()


def test_device_is_the_cpu_unless_asked_and_says_why(capsys):
    assert common.select_device(False).type == "cpu"
    assert capsys.readouterr().err == ""
    if not torch.cuda.is_available():
        assert common.select_device(True).type == "cpu"
        err = capsys.readouterr().err
        assert err.startswith("warning: --cuda: ") and len(err.splitlines()) == 1


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="has 2 GPUs: lower --nproc-per-node"):
        common.select_device(True)
