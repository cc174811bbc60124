"""What the tests share: small data, flags of a small run, how it is run and what it leaves."""

import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The networks are tiny: threads cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# So that asking for a GPU does not begin CUDA in a process that is forked afterwards.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dcgan  # noqa: E402
import gan  # noqa: E402
import pix2pix  # noqa: E402
import vae  # noqa: E402

SCRIPTS = {"vae": vae, "gan": gan, "dcgan": dcgan, "pix2pix": pix2pix}

# What makes each script's networks so small that an epoch takes hundredths of a second.
SMALL = {
    "vae": ["--width", "8", "--latent-dim", "2"],
    "gan": ["--width", "2"],
    "dcgan": ["--width", "2"],
    "pix2pix": ["--width", "2", "--image-size", "32"],
}
# What makes a rate that does not follow the number of epochs.
STEADY = {"vae": ["--constant-lr"]}


@pytest.fixture(scope="module", params=SCRIPTS)
def name(request):
    """Each script's name in turn."""
    return request.param


@pytest.fixture
def script(name):
    return SCRIPTS[name]


# data


def write_mnist(folder, count):
    """Puts `count` + 64 synthetic digits into `folder` as MNIST's four files."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n, seed in (("train", count, 0), ("t10k", 64, 1)):
        pixels = gan.synthetic_digits(n, seed).numpy().tobytes()
        labels = bytes(i % 10 for i in range(n))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, n, 28, 28) + pixels
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels)


def write_pairs(folder, count, seed):
    """Puts `count` synthetic pairs into `folder` as facades are published, photo beside labels."""
    folder.mkdir(parents=True)
    for n, (photo, labels) in enumerate(pix2pix.synthetic_facades(count, 40, seed)):
        to_pil_image(torch.cat([photo, labels], 2)).save(folder / f"{n:05d}.png")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, 256)
    return folder


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """Script to the flags of its small run: three steps an epoch.

    Where two processes share the data, one could make two steps, the other one."""
    folder = tmp_path_factory.mktemp("small")
    write_mnist(folder, 255)
    write_pairs(folder / "pairs" / "train", 3, 0)
    write_pairs(folder / "pairs" / "val", 2, 1)
    digits = ["--dataset", "mnist", "--data-dir", str(folder), "--batch-size", "64"]
    pairs = ["--dataset", "folder", "--data-dir", str(folder / "pairs"), "--lr", "0.001"]
    pairs += ["--save-every", "1"]
    return {name: [*(pairs if name == "pix2pix" else digits), *SMALL[name]] for name in SMALL}


# running


def run(script, *argv):
    """script.main() with that command line, in this process: its exit status."""
    sys.argv = [Path(script.__file__).name, *map(str, argv)]
    try:
        script.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # what the interpreter does with it
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    return 0


# A server that has imported torch once, and forks a process for each command: 0.1 s and not 4.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch._dynamo", "torchvision"])


def main(script):
    script.main()


def execute(folder, name, argv, cwd, environment, output, body):
    os.dup2(os.open(f"{output}.out", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(f"{output}.err", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background

    # A copy of a script finds nothing but what is in its folder.
    sys.argv = [f"{name}.py", *argv]
    sys.path[:] = [folder, *(path for path in sys.path if Path(path).resolve() != ROOT)]
    for module in (*SCRIPTS, "common"):
        del sys.modules[module]
    body(importlib.import_module(name))


class Command:
    """`python NAME.py ARGV`, begun in the folder `cwd`: of the script in `folder`.

    `body(script)` is what is called there, script.main() unless told otherwise."""

    numbers = itertools.count()

    def __init__(self, name, *argv, cwd, folder=ROOT, environment={}, body=main):
        self.output = Path(cwd).parent / f"{Path(cwd).name}.{next(Command.numbers)}"
        words = [str(word) for word in argv]
        arguments = (str(folder), name, words, str(cwd), environment, str(self.output), body)
        self.process = SERVER.Process(target=execute, args=arguments, daemon=True)
        self.process.start()

    def read(self, suffix):
        path = Path(f"{self.output}.{suffix}")  # which is not there yet where a kill came first
        return path.read_text() if path.exists() else ""

    def wait(self, timeout=60):
        """Its exit status, as subprocess has it, and what came on stderr."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode, self.read("err")

    def wait_for(self, path, timeout=60):
        end = time.monotonic() + timeout
        while not path.exists():
            assert self.process.is_alive() and time.monotonic() < end, self.read("err")
            time.sleep(0.002)


# what a run leaves


def same(a, b):
    """Whether two nests of dicts, lists, tensors and numbers are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def load(out_dir):
    return torch.load(out_dir / "checkpoint.pt", weights_only=True)


def result(out_dir):
    """What a run left, without its timings, to be compared with same()."""
    checkpoint = load(out_dir)
    checkpoint["metrics"] = [list(row.items())[:-2] for row in checkpoint["metrics"]]
    lines = (out_dir / "metrics.csv").read_text().splitlines()
    files = {str(path.relative_to(out_dir)) for path in out_dir.rglob("*")}
    return {
        "checkpoint": checkpoint,
        "metrics.csv": [line.split(",")[:-2] for line in lines],
        "pictures": {
            str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("*.png")
        },
        "files": files - {"checkpoint.part"},  # what a kill left, and nothing reads
    }


def show(images):
    """A grid (H, W) of images (N, 1, h, w), 0 to 255, as common.save_grid lays it out."""
    rows = [
        torch.cat([F.pad(image, (2, 0, 2, 0)) for image in row[:, 0]], 1) for row in images.split(8)
    ]
    return F.pad(torch.cat(rows), (0, 2, 0, 2)).round().detach().numpy()


# two machines


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_two_machines(folders):
    """torchrun on two machines, an agent each in a folder of its own: a run, then one that is
    resumed without the checkpoint on the second. Returns their statuses."""
    launch = [sys.executable, *"-m torch.distributed.run --nnodes 2 --nproc-per-node 1".split()]
    words = "--dataset mnist --data-dir data --width 2 --batch-size 16".split()
    found = []
    for argv in (["--epochs", "1", *words], ["--resume", "runs/gan", "--epochs", "2"]):
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        running = []
        for rank, folder in enumerate(folders):
            command = [*launch, *address, "--node-rank", str(rank), str(ROOT / "gan.py"), *argv]
            output = open(folder / "output", "w")
            running.append(subprocess.Popen(command, cwd=folder, stdout=output, stderr=output))
        # Not the two hours of a step, but a minute, and the start of two agents.
        found.append([process.wait(120) for process in running])
    return found


@pytest.fixture(scope="session")
def two_machines(tmp_path_factory):
    """Most of their time is waiting: it passes while other tests run."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        write_mnist(folder / "data", 128)
    with ThreadPoolExecutor() as pool:
        yield folders, pool.submit(run_two_machines, folders)
