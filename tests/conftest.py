"""What the tests share: a tiny MNIST and tiny facades in the published file formats, running a script, comparing two runs to the bit."""

import os
import struct
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: threads would cost more than they save

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dcgan  # noqa: E402
import pix2pix  # noqa: E402


def write_mnist(folder, count):
    """Puts `count` + 64 synthetic digits into `folder` as MNIST's four files."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n, seed in (("train", count, 0), ("t10k", 64, 1)):
        images = dcgan.synthetic_digits(n, seed)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.numpy().tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + bytes(i % 10 for i in range(n)))


def write_pairs(folder, count, seed):
    """Puts `count` synthetic pairs into `folder`, photo and labels side by side, as the facades are published; 80x40."""
    folder.mkdir(parents=True)
    for n, pair in enumerate(pix2pix.synthetic_facades(count, seed)):
        images = [to_pil_image(image).resize((40, 40)) for image in pair]
        Image.fromarray(np.concatenate(images, 1)).save(folder / f"{n:05d}.png")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, 256)
    return folder


def run(script, *argv):
    """script.main() with that command line, here and not in a process of its own: its exit status."""
    sys.argv = [Path(script.__file__).name, *map(str, argv)]
    try:
        script.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # what the interpreter does with it
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def same(a, b):
    """Whether two nests of dicts, lists, tensors and numbers are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def result(out_dir):
    """What a finished run left, without its timings: checkpoint, metrics and grids, to be compared with same()."""
    checkpoint = torch.load(out_dir / "checkpoint.pt", weights_only=True)
    checkpoint.pop("seconds")
    checkpoint["metrics"] = [row[:-2] for row in checkpoint["metrics"]]
    lines = [line.split(",")[:-2] for line in (out_dir / "metrics.csv").read_text().splitlines()]
    grids = {path.name: list(path.read_bytes()) for path in sorted((out_dir / "samples").iterdir())}
    return {"checkpoint": checkpoint, "metrics.csv": lines, "samples": grids, "files": sorted(p.name for p in out_dir.iterdir())}


def show(images):
    """A grid (H, W) of images (N, 1, 28 or more, ...) of values 0 to 255 as common.save_grid lays it out, eight in a row."""
    rows = [torch.cat([F.pad(image, (2, 0, 2, 0)) for image in row[:, 0]], 1) for row in images.split(8)]
    return F.pad(torch.cat(rows), (0, 2, 0, 2)).round().detach().numpy()
