"""Every command of the README, as it stands there, in a copy of the project with tiny data."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, write_mnist, write_pairs
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
TORCHRUN = "torch.distributed.run"
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
        Image.fromarray(random.integers(0, 255, (80, 100, 3), np.uint8)).save(
            folder / "photos" / f"{n}.jpg"
        )
    return folder


def test_the_first_two_commands_set_up_then_train_then_test():
    assert COMMANDS[0] == SET_UP + "python dcgan.py --epochs 25 --cuda"
    assert (
        COMMANDS[1] == SET_UP + "python -m pytest"
    )  # what .ci/run does, in a virtual environment that it throws away
    steps = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line.startswith(("pip", "python -m"))
    ]
    assert steps == ["pip install -r requirements.txt", "python -m pytest"]


TYPED = list(
    dict.fromkeys(command.removeprefix(SET_UP) for command in COMMANDS if "pytest" not in command)
)


@pytest.fixture(scope="module")
def done(checkout):
    """Command to its exit status and what came on stderr. In the README's order for each script,
    whose later commands read what earlier ones wrote; two scripts at a time, a core for each."""
    scripts = {}
    for command in TYPED:
        scripts.setdefault(re.search(r"\w+\.py", command)[0], []).append(command)

    def run(commands):
        return {command: execute(command) for command in commands}

    def execute(command):
        launcher, script, *argv = command.split()
        long = script == "dcgan.py" and "--epochs" in argv
        if launcher == "python" and not long:
            return Command(script.removesuffix(".py"), *argv, cwd=checkout, folder=checkout).wait()
        launch = [sys.executable] if launcher == "python" else [sys.executable, "-m", TORCHRUN]
        words = [*launch, script, *argv]
        if long:  # killed in the second or third of its epochs, which are all alike
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(words, cwd=checkout, text=True, **pipes)
            for line in process.stdout:
                if line.startswith("epoch 2/"):
                    break
            process.kill()  # not SIGINT, which is ignored in the background
            err = process.communicate()[1]
            return 0 if process.returncode == -9 else process.returncode, err
        result = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
        return result.returncode, result.stderr

    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(run, scripts.values())
        return {command: result for part in parts for command, result in part.items()}


@pytest.mark.parametrize("command", TYPED)
def test_command_runs_as_typed(command, done):
    """The set-up itself is tested by .ci/run."""
    status, err = done[command]
    assert status == 0, err
    assert [line for line in err.splitlines() if "--cuda" not in line] == []


RECIPES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_recipes_run_as_they_stand(done, checkout):
    """On what the commands have written."""
    before = {*checkout.rglob("*")}
    words = [sys.executable, "-c"]
    running = [subprocess.Popen([*words, recipe], cwd=checkout) for recipe in RECIPES]
    assert [process.wait() for process in running] == [0] * len(RECIPES)
    written = [path for path in {*checkout.rglob("*")} - before if path.is_file()]
    assert len(written) >= len(RECIPES)


def test_pictures_are_there_and_small():
    shown = [ROOT / path for path in re.findall(r"\]\((\.github/[^)]+)\)", README)]
    results = (ROOT / ".github" / "RESULTS.md").read_text()
    shown += [ROOT / ".github" / path for path in re.findall(r"\]\(([^)]+)\)", results)]
    assert {*shown} == {*(ROOT / ".github").iterdir()}
    assert all(path.stat().st_size < 300_000 for path in shown)
