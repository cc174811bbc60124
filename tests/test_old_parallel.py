"""Two processes under torchrun, and --compile, of all four scripts."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import result, run, same, write_pairs

import dcgan
import gan
import pix2pix
import vae

SCRIPTS = {"vae": vae, "gan": gan, "dcgan": dcgan, "pix2pix": pix2pix}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROOT = Path(vae.__file__).parent

# Runs a script's main() with an eye on what passes between the two processes; each leaves what it saw in OUT/{rank}.pt.
WATCHED = """
import importlib, sys
import torch, torch.distributed as dist
sys.path.insert(0, {root!r})
script, out = importlib.import_module(sys.argv[1]), sys.argv[2]
sys.argv[:3] = [script.__name__ + ".py"]
parallel, batches, broadcast, all_reduce, destroy = (
    script.parallel, script.batches, dist.broadcast, dist.all_reduce, dist.destroy_process_group)
modules, seen = [], dict(parameters=[], batches=[], sums=[], noise=[], broadcast_buffers=[])

def watched_parallel(module):
    modules.append(module)
    ddp = parallel(module)
    seen["broadcast_buffers"].append(ddp.broadcast_buffers)
    return ddp

def watched_batches(*args):
    seen["batches"].append([])
    for x in batches(*args):
        seen["batches"][-1].append(x[0] if isinstance(x, tuple) else x)
        yield x

def watched_broadcast(*args):  # of the order, as an epoch begins
    seen["parameters"].append(torch.cat([p.detach().flatten() for module in modules for p in module.parameters()]))
    seen["noise"].append(torch.get_rng_state())
    broadcast(*args)

def watched_all_reduce(tensor):
    before = tensor.clone()
    all_reduce(tensor)
    seen["sums"].append((before, tensor.clone()))

def watched_destroy():
    seen["parameters"].append(torch.cat([p.detach().flatten() for module in modules for p in module.parameters()]))
    if script.__name__ == "vae":
        torch.manual_seed(0)
        model, x, epsilon = script.VAE(16, 4), torch.rand(128, 784), torch.randn(128, 4)
        part = slice(64 * script.RANK, 64 * script.RANK + 64)
        ddp = parallel(model)
        logits, mean, logvar = ddp(x[part], epsilon[part])
        (script.reconstruction_loss(logits, x[part]) + script.kl_divergence(mean, logvar)).backward()
        seen["gradients"] = [p.grad for p in model.parameters()]
        seen["evaluated"] = script.evaluate(modules[0], torch.arange(2500 * 784).remainder(251).byte().view(2500, 784), 0)
    torch.save(seen, out + "/" + str(script.RANK) + ".pt")
    destroy()

script.parallel, script.batches = watched_parallel, watched_batches
dist.broadcast, dist.all_reduce, dist.destroy_process_group = watched_broadcast, watched_all_reduce, watched_destroy
script.main()
"""


@pytest.fixture(scope="session")
def flags(data_dir, tmp_path_factory):
    """The flags of a tiny run of each script; --width 2 and 32 pixels for pix2pix's four pairs and three held out."""
    pairs = tmp_path_factory.mktemp("pairs")
    write_pairs(pairs / "train", 8, 0)
    write_pairs(pairs / "val", 3, 1)
    digits = ["--dataset", "mnist", "--data-dir", str(data_dir), "--batch-size", "32"]
    return {
        "vae": [*digits, "--hidden-dim", "16", "--latent-dim", "2"],
        "gan": [*digits, "--width", "4", "--d-steps", "2"],
        "dcgan": [*digits, "--width", "2", "--image-size", "28"],
        "pix2pix": "--dataset folder --image-size 32 --width 2 --no-jitter --data-dir".split() + [str(pairs)],
    }


def alone():
    """The environment of a process that shares two cores with another."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def both(command):
    return subprocess.run([*TORCHRUN, *map(str, command)], capture_output=True, text=True, timeout=120, env=alone(), cwd=ROOT)


@pytest.fixture(scope="module", params=SCRIPTS)
def watched(request, flags, tmp_path_factory):
    """A script, the folder of a run of two epochs by two processes, what each saw, and what was printed."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "watched.py").write_text(WATCHED.format(root=str(ROOT)))
    command = [folder / "watched.py", request.param, folder, "--epochs", "2", "--out-dir", folder / "run", *flags[request.param]]
    done = both(command)
    assert done.returncode == 0, done.stderr
    return SCRIPTS[request.param], folder / "run", [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], done


def test_parameters_are_the_same_on_both_after_every_epoch(watched):
    _, out_dir, (first, second), _ = watched
    assert len(first["parameters"]) == 3
    for a, b in zip(first["parameters"], second["parameters"]):
        assert torch.equal(a, b)
    assert not torch.equal(*first["parameters"][:2]) and not torch.equal(*first["parameters"][1:])


def test_every_image_goes_to_one_process_once_an_epoch(watched):
    for epoch in zip(*(seen["batches"] for seen in watched[2])):
        parts = [torch.cat(part).flatten(1) for part in epoch]
        assert len(parts[0]) == len(parts[1])
        images = torch.cat(parts)
        assert len(images.unique(dim=0)) == len(images) == (8 if watched[0] is pix2pix else 256)


def test_noise_differs_between_processes_and_epochs(watched):
    states = [state for seen in watched[2] for state in seen["noise"]]
    assert len({state.numpy().tobytes() for state in states}) == len(states) == 4


def test_batchnorm_stays_as_a_backward_needs_it(watched):
    assert not any(watched[2][0]["broadcast_buffers"])


def test_metrics_are_means_over_both(watched, flags, tmp_path):
    script, out_dir, seen, _ = watched
    rows = list(csv.reader((out_dir / "metrics.csv").open()))[1:]
    sums = [[pair for pair in part["sums"] if pair[0].shape == seen[0]["sums"][0][0].shape] for part in seen]
    steps = len(seen[0]["batches"][0]) // (2 if script is gan else 1)
    mine, other = sums[0][0][0], sums[1][0][0]  # of the first epoch
    assert not torch.equal(mine, other)
    means = ((mine + other) / steps).tolist()
    means = means[:1] if script is vae else means
    row = [float(value) for value in rows[0][1 : len(means) + 1]]
    assert row == pytest.approx(means)
    assert run(script, "--epochs", "1", "--out-dir", tmp_path / "run", *flags[script.__name__]) == 0
    alone = torch.load(tmp_path / "run" / "checkpoint.pt")["metrics"][0][1 : len(means) + 1]
    assert row == pytest.approx(alone, rel=0.5)  # of other batches and noise, but neither a sum nor a half


def test_one_process_writes_and_speaks(watched):
    _, out_dir, seen, done = watched
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "epoch 1/2" in lines[1] and "epoch 2/2" in lines[2]
    header, *rows = csv.reader((out_dir / "metrics.csv").open())
    for line, row in zip(lines[1:], rows):
        for name, value in zip(header[1:-2], row[1:-2]):
            assert float(re.search(rf"\b{name} (\S+)", line)[1]) == pytest.approx(float(value), abs=0.006), name
    images = sum(len(x) for part in seen for x in part["batches"][0])
    assert float(rows[0][-2]) * float(rows[0][-1]) == pytest.approx(images)  # images_per_second counts those of both
    assert [path.name for path in sorted((out_dir / "samples").iterdir())] == ["epoch_0001.png", "epoch_0002.png"]
    assert not [path for path in out_dir.parent.iterdir() if path.name not in ("run", "0.pt", "1.pt", "watched.py")]


def test_two_processes_resume_on_one(watched, flags, tmp_path):
    script, out_dir, _, _ = watched
    shutil.copytree(out_dir, tmp_path / "run")
    assert run(script, "--resume", tmp_path / "run" / "checkpoint.pt", "--epochs", "3") == 0
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


def test_two_halves_of_a_batch_have_the_gradient_of_the_whole(watched):
    script, _, seen, _ = watched
    if script is not vae:
        pytest.skip("the networks of the others mix the images of a batch, or draw their noise in between")
    torch.manual_seed(0)
    model, x, epsilon = vae.VAE(16, 4), torch.rand(128, 784), torch.randn(128, 4)
    logits, mean, logvar = model(x, epsilon)
    (vae.reconstruction_loss(logits, x) + vae.kl_divergence(mean, logvar)).backward()
    for part in seen:
        torch.testing.assert_close(part["gradients"], [p.grad for p in model.parameters()])


def test_evaluation_is_shared_out_and_exact(watched, flags, tmp_path):
    script, out_dir, seen, _ = watched
    checkpoint = torch.load(out_dir / "checkpoint.pt", weights_only=True)
    if script is vae:
        model = vae.VAE(16, 2)
        model.load_state_dict(checkpoint["model"])
        images = torch.arange(2500 * 784).remainder(251).byte().view(2500, 784)
        assert seen[0]["evaluated"] == seen[1]["evaluated"] == pytest.approx(vae.evaluate(model, images, 0))
    elif script is pix2pix:
        args = pix2pix.parse_args(flags["pix2pix"])
        generator = pix2pix.Generator(32, 2, "batch")
        generator.load_state_dict(checkpoint["generator"])
        held_out = pix2pix.load_pairs(args, "val", torch.device("cpu"))
        grid, *tested = pix2pix.evaluate(generator, held_out, args, torch.device("cpu"))
        assert checkpoint["metrics"][-1][4:6] == pytest.approx(tested)
        pix2pix.save_grid(grid, tmp_path / "grid.png", columns=6)
        assert (tmp_path / "grid.png").read_bytes() == (out_dir / "samples" / "epoch_0002.png").read_bytes()


def test_one_process_pays_nothing():
    for script in SCRIPTS.values():
        module = torch.nn.Linear(1, 1)
        assert script.parallel(module) is module


def test_two_processes_resumed_are_uninterrupted_to_the_bit(watched, flags, tmp_path):
    script, out_dir, _, _ = watched
    if script is not gan:
        pytest.skip("each run costs seconds, and the blocks are the same in all four")
    for command in (["--epochs", "1", "--out-dir", tmp_path / "run"], ["--epochs", "2", "--resume", tmp_path / "run" / "checkpoint.pt"]):
        done = both(["gan.py", *command, *flags["gan"]])
        assert done.returncode == 0, done.stderr
    assert same(result(out_dir), result(tmp_path / "run"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_process_that_is_killed_ends_the_other(flags, tmp_path):
    command = [*TORCHRUN, "gan.py", "--epochs", "1000000", "--out-dir", str(tmp_path / "run"), *flags["gan"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone(), cwd=ROOT) as running:
        while "epoch 2/" not in running.stdout.readline():
            assert running.poll() is None
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        began = time.monotonic()
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 1 and time.monotonic() - began < 60
    assert re.search("did another process end|stopped; go on with --resume|KeyboardInterrupt", stderr), stderr
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] >= 1


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name, more", [("vae", []), ("gan", ["--bf16"]), ("dcgan", []), ("pix2pix", ["--batch-size", "4"])])
def test_compiled_and_eager_steps_agree(name, more, flags, tmp_path):
    for folder, flag in (("eager", "--no-compile"), ("compiled", "--compile")):
        assert run(SCRIPTS[name], "--epochs", "1", "--out-dir", tmp_path / folder, *flags[name], *more, flag) == 0
    eager, compiled = (torch.load(tmp_path / folder / "checkpoint.pt")["metrics"][0][1:-2] for folder in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=0.02 if "--bf16" in more else 1e-3)


def test_no_compiler_is_one_line(flags, tmp_path):
    env = {**alone(), "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "vae.py", "--compile", "--out-dir", str(tmp_path / "run"), *flags["vae"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "vae.py: error: --compile does not work here" in done.stderr
