"""Every command of the README, as it stands there, in a copy of the project with a tiny MNIST, tiny facades and a few photographs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_mnist, write_pairs
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SET_UP = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt")]:
        shutil.copy(path, folder)
    write_mnist(folder / "data", 128)  # one batch
    for name in ("data/facades", "pairs"):
        write_pairs(folder / name / "train", 2, 0)
        write_pairs(folder / name / "val", 1, 1)
    write_pairs(folder / "sketches", 2, 2)
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for n in range(128):
        Image.fromarray(random.integers(0, 255, (80, 100, 3), np.uint8)).save(folder / "photos" / f"{n}.jpg")
    return folder


def test_the_first_two_commands_set_up_then_train_then_test():
    assert COMMANDS[0] == SET_UP + "python dcgan.py --epochs 25 --cuda"
    assert COMMANDS[1] == SET_UP + "python -m pytest"  # what .ci/run does, in a virtual environment that it throws away
    steps = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith(("pip", "python -m"))]
    assert steps == ["pip install -r requirements.txt", "python -m pytest"]


@pytest.mark.parametrize("command", dict.fromkeys(c.removeprefix(SET_UP) for c in COMMANDS if "pytest" not in c))
def test_command_runs_as_typed(command, checkout):
    """In the README's order: a later command may read what an earlier one wrote. The set-up itself is tested by .ci/run."""
    words, environment = command.split(), {**os.environ, "OMP_NUM_THREADS": "1"}  # of which torchrun warns otherwise
    if words[0] == "python":
        del environment["OMP_NUM_THREADS"]  # these networks are not tiny
    launch = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    done = subprocess.run([*launch, *words[1:]], cwd=checkout, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "--cuda" not in line]
    assert warnings == []


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) >= 5
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 300_000


def test_the_table_counts_the_lines():
    for name, lines in re.findall(r"^\| \[`(\w+\.py)`\].* (\d+) \|$", README, re.M):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name
