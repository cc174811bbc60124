"""Every script on a CUDA GPU. Skipped where there is none."""

import gc
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SCRIPTS, Command, free_port, load, run
from PIL import Image
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def trained(name, flags, tmp_path_factory):
    """The folder of a run of two epochs with --cuda, not to be changed."""
    out = tmp_path_factory.mktemp(name) / "run"
    assert run(SCRIPTS[name], "--cuda", "--epochs", 2, "--out-dir", out, *flags[name]) == 0
    return out


@pytest.fixture
def without_tf32(monkeypatch):
    torch.set_float32_matmul_precision("highest")  # an earlier run has changed it
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def metrics(out_dir, epoch):
    """Those of the epoch, without its number and its speed."""
    return [*load(out_dir)["metrics"][epoch - 1].values()][1:-2]


def test_three_steps_have_the_losses_of_the_cpu(
    name, script, flags, without_tf32, tmp_path, monkeypatch
):
    """From the same draws, without dropout, to a thousandth: rounding is 4e-7 in the first step,
    and Adam makes more of it."""

    def draw_on_the_cpu(draw):
        return lambda *size, device="cpu": draw(*size).to(device)

    for draw in ("randn", "randperm"):
        monkeypatch.setattr(torch, draw, draw_on_the_cpu(getattr(torch, draw)))
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    words = ["--epochs", 1, *flags[name], "--out-dir"]
    assert run(script, *words, tmp_path / "cpu") == 0
    assert run(script, *words, tmp_path / "gpu", "--cuda") == 0
    cpu, gpu = (metrics(tmp_path / device, 1) for device in ("cpu", "gpu"))
    assert gpu == pytest.approx(cpu, rel=1e-3) and gpu != cpu


@pytest.mark.parametrize("words", ["--bf16", "--compile", "--bf16 --compile"])
def test_whole_runs_as_a_user_starts_them(words, flags, tmp_path):
    """All four at once, as compilation takes half a minute."""
    running = {}
    for name in SCRIPTS:
        command = [sys.executable, ROOT / f"{name}.py", "--cuda", "--epochs", "2", *flags[name]]
        command += ["--out-dir", tmp_path / name, *words.split()]
        running[name] = subprocess.Popen(command)
    for name, process in running.items():
        assert process.wait() == 0
        assert len(load(tmp_path / name)["metrics"]) == 2


def with_reproducible_convolutions(script):
    torch.backends.cudnn.deterministic = True
    script.main()


def test_killed_and_resumed(name, flags, tmp_path):
    """To the bit where there are no convolutions, whose sums may have another order."""

    def begin(*words):
        body = with_reproducible_convolutions
        return Command(name, "--cuda", "--epochs", 6, *words, cwd=tmp_path, body=body)

    whole, killed = (begin("--out-dir", out, *flags[name]) for out in ("whole", "killed"))
    killed.wait_for(tmp_path / "killed" / "samples" / "epoch_0003.png", 300)
    killed.process.kill()
    assert killed.wait()[0] == -signal.SIGKILL
    assert begin("--resume", "killed").wait()[0] == whole.wait()[0] == 0
    found, expected = (metrics(tmp_path / out, 6) for out in ("killed", "whole"))
    assert found == pytest.approx(expected, rel=0 if name in ("vae", "gan") else 0.05)


def test_checkpoints_go_from_device_to_device(script, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    assert run(script, "--resume", out, "--epochs", 3) == 0
    assert run(script, "--resume", out, "--epochs", 4, "--cuda") == 0
    assert len(load(out)["metrics"]) == 4


def test_samples_are_those_of_the_cpu(name, script, trained, without_tf32, tmp_path):
    """Their noise is drawn on the CPU. Dropout is not."""
    words = ["--sample", trained, "--num-samples", 2, "--out-dir", tmp_path]
    words += ["--deterministic"] if name == "pix2pix" else []
    assert run(script, *words) == run(script, *words, "--cuda") == 0
    grids = [Image.open(tmp_path / f"{grid}.png") for grid in ("generated", "generated-2")]
    np.testing.assert_allclose(*(np.asarray(grid).astype(int) for grid in grids), atol=2)


@pytest.mark.parametrize("name", ["vae"], indirect=True, scope="module")
def test_the_bound_is_that_of_the_cpu(script, trained, capsys):
    """Up to the noise of 1000 samples, which is drawn on the GPU."""
    words = ["--eval", trained, "--importance-samples", 1000]
    assert run(script, *words) == run(script, *words, "--cuda") == 0
    cpu, gpu = re.findall(r"-\d+\.\d+", capsys.readouterr().out)
    assert float(cpu) == pytest.approx(float(gpu), abs=0.5)


def average_with_nccl(script):
    """In a group of one, as if there were two."""
    sys.modules["common"].join(torch.device("cuda", 0), 0)
    network = nn.Conv2d(3, 4, 2).to("cuda", memory_format=torch.channels_last)
    network(torch.randn(1, 3, 5, 5, device="cuda")).square().sum().backward()
    whole = network.weight.grad.clone()
    script.WORLD_SIZE = 2
    script.average_gradients(network)
    torch.testing.assert_close(2 * network.weight.grad, whole)
    assert dist.get_backend() == "nccl"


@pytest.mark.parametrize("name", ["dcgan"], indirect=True, scope="module")
def test_processes_meet_over_nccl(name, flags, trained, tmp_path):
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    address |= {"WORLD_SIZE": "1", "RANK": "0"}
    command = Command(name, cwd=tmp_path, environment=address, body=average_with_nccl)
    status, err = command.wait(300)
    assert status == 0, err

    launch = "-m torch.distributed.run --standalone --nproc-per-node 1".split()
    words = ["--cuda", "--epochs", "2", "--out-dir", tmp_path / "run", *flags[name]]
    subprocess.run([sys.executable, *launch, ROOT / f"{name}.py", *words], check=True)
    assert metrics(tmp_path / "run", 2) == pytest.approx(metrics(trained, 2), rel=0.05)


@pytest.mark.parametrize("name", ["dcgan", "pix2pix"], indirect=True, scope="module")
def test_images_stay_on_the_host_if_they_need_half_of_the_memory(
    name, script, flags, tmp_path, monkeypatch
):
    used = []
    save = script.save

    def save_and_look(*args):
        save(*args)
        gc.collect()  # what an earlier run has left
        used.append(torch.cuda.memory_allocated())

    monkeypatch.setattr(script, "save", save_and_look)
    for n, free in enumerate((10**10, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
        torch.cuda.empty_cache()
        words = ["--cuda", "--epochs", 1, "--out-dir", tmp_path / str(n), *flags[name]]
        assert run(script, *words, "--dataset", "synthetic") == 0
    images = 20_000 * 32 * 32 if name == "dcgan" else 400 * 6 * 36 * 36
    assert used[0] - used[1] == pytest.approx(images, abs=2**20)


def test_out_of_memory_keeps_its_message(script, flags, name, tmp_path):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory"):
            words = ["--cuda", "--epochs", 1, "--out-dir", tmp_path / "run", *flags[name]]
            run(script, *words, "--width", 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
