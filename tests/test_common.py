import numpy as np
import pytest
import torch
from PIL import Image

import common


@pytest.mark.parametrize("value_range, value, gray", [((-1, 1), 0.2, 153), ((-1, 1), -1.0, 0), ((0, 1), 0.2, 51), ((0, 1), 1.5, 255)])
def test_gray_is_absolute(tmp_path, value_range, value, gray):
    """One value gives one gray whatever else is in the grid: contrast can be compared between epochs."""
    common.save_grid(torch.full((3, 1, 5, 5), value), tmp_path / "grid.png", 2, value_range)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (16, 16, 3) and (pixels[2:7, 2:7] == gray).all() and (pixels[9:14, 2:7] == gray).all()


def test_device_is_the_cpu_unless_asked_and_says_why(capsys):
    assert common.select_device(False).type == "cpu" and capsys.readouterr().err == ""
    assert common.select_device(True).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(capsys.readouterr().err.splitlines()) == (not torch.cuda.is_available())
