"""Two processes that train together, as torchrun starts them, and --compile, of every script."""

import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from conftest import STEADY, Command, free_port, load, main, result, run, same
from torch.optim.optimizer import register_optimizer_step_post_hook


# They are begun here, and test_runs.py looks at what they did.
pytestmark = pytest.mark.usefixtures("two_machines")


def begin_two(name, folder, *argv, body=main):
    """What torchrun makes of a command: two processes, each in its own folder below `folder`."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    commands = []
    for rank in ("0", "1"):
        (folder / rank).mkdir(exist_ok=True)
        environment = {**address, "RANK": rank, "LOCAL_RANK": rank}
        commands.append(Command(name, *argv, cwd=folder / rank, environment=environment, body=body))
    return commands


def two(name, folder, *argv, body=main):
    commands = begin_two(name, folder, *argv, body=body)
    for command in commands:
        assert command.wait() == (0, "")
    return commands


def watched(script):
    """main(), which leaves in ../RANK.pt its training set and, after each optimizer step, the seed
    of its random numbers and the weights that took the step."""
    seen = {"loaded": [], "seeds": [], "weights": []}
    loader = "load_pairs" if script.NAME == "pix2pix" else "load_images"
    load_images = getattr(script, loader)

    def watched_load_images(*args, **kwargs):
        images = load_images(*args, **kwargs)
        seen["loaded"].append(images[0] if isinstance(images, tuple) else images)
        return images

    def after_step(optimizer, args, kwargs):
        weights = [p.detach().flatten() for p in optimizer.param_groups[0]["params"]]
        seen["weights"].append(torch.cat(weights))
        seen["seeds"].append(torch.initial_seed())
        torch.save(seen, f"../{script.RANK}.pt")

    setattr(script, loader, watched_load_images)
    register_optimizer_step_post_hook(after_step)
    script.main()


@pytest.fixture(scope="module")
def pair(name, flags, tmp_path_factory):
    """A run of two epochs by two processes: its folder, the two commands, and what each saw."""
    folder = tmp_path_factory.mktemp(name)
    words = ["--out-dir", "run", *flags[name], *STEADY.get(name, [])]
    commands = two(name, folder, "--epochs", 2, *words, body=watched)
    seen = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return folder / "0" / "run", commands, seen


def test_two_shares_are_disjoint_and_equal(name, pair):
    shares = [seen["loaded"][0].flatten(1) for seen in pair[2]]
    each = 1 if name == "pix2pix" else 127  # of 3, or of 255
    assert len(shares[0]) == len(shares[1]) == each
    assert len(torch.cat(shares).unique(dim=0)) == 2 * each


def test_both_make_the_same_steps(pair):
    """As many as the smaller share allows, and after each the weights are the same."""
    first, second = (seen["weights"] for seen in pair[2])
    networks = len([part for part in load(pair[0]) if part.startswith("optimizer")])
    assert len(first) == len(second) == 2 * networks
    assert all(map(torch.equal, first, second)) and not torch.equal(first[0], first[networks])


def test_seeds_differ_between_processes_and_epochs(pair):
    first, second = (seen["seeds"] for seen in pair[2])
    assert len({first[0], first[-1], second[0], second[-1]}) == 4


def test_one_process_writes_and_speaks(name, pair):
    out, (first, second), _ = pair
    first = first.read("out")
    assert re.findall(r"epoch (\d)/2  100%", first) == ["1", "2"]
    data = "folder: 2 pairs" if name == "pix2pix" else "mnist: 254 images"
    assert first.startswith(f"{data}, 1 steps per epoch\n")
    assert second.read("out") == "" and os.listdir(out.parent.parent / "1") == []
    grids = sorted(path.name for path in (out / "samples").iterdir())
    assert grids == ["epoch_0001.png", "epoch_0002.png", "real.png"]
    row = load(out)["metrics"][0]
    images = 2 if name == "pix2pix" else 128
    assert row["images_per_second"] * row["seconds"] == pytest.approx(images)  # those of both


def test_resumed_by_two_is_uninterrupted_to_the_bit(name, flags, pair, tmp_path):
    two(name, tmp_path, "--epochs", 1, "--out-dir", "run", *flags[name], *STEADY.get(name, []))
    shutil.copytree(tmp_path / "0" / "run", tmp_path / "1" / "run")
    two(name, tmp_path, "--epochs", 2, "--resume", "run/checkpoint.pt")
    assert same(result(tmp_path / "0" / "run"), result(pair[0]))


@pytest.mark.parametrize("name", ["gan", "pix2pix"], indirect=True, scope="module")
def test_different_checkpoints_are_not_averaged(name, flags, tmp_path):
    """The second machine has an older one."""
    (tmp_path / "0").mkdir()
    first = ["--epochs", 1, "--out-dir", tmp_path / "1" / "run", *flags[name]]
    assert Command(name, *first, cwd=tmp_path).wait() == (0, "")
    shutil.copytree(tmp_path / "1" / "run", tmp_path / "0" / "run")
    assert Command(name, "--resume", "run", "--epochs", 2, cwd=tmp_path / "0").wait() == (0, "")
    commands = begin_two(name, tmp_path, "--resume", "run", "--epochs", 3)
    (first, err), (second, other) = [command.wait() for command in commands]
    line = "error: different checkpoints, of epochs [2, 1]: copy one to all machines\n"
    assert first == second == 1 and err == line
    assert line in other or "error: another process has ended" in other  # it was faster


def test_a_run_of_two_is_resumed_by_one(script, pair, tmp_path):
    out = Path(shutil.copytree(pair[0], tmp_path / "run"))
    assert run(script, "--resume", out / "checkpoint.pt", "--epochs", 3) == 0
    assert [row["epoch"] for row in load(out)["metrics"]] == [1, 2, 3]


def compare_gradients(script):
    """Of a batch, and of its two halves in two processes."""
    script.select_device(False)
    torch.manual_seed(0)
    network, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
    network(x).square().mean().backward()
    whole = network.weight.grad.clone()
    network.zero_grad()
    network(x.chunk(2)[script.RANK]).square().mean().backward()
    script.average_gradients(network)
    torch.testing.assert_close(network.weight.grad, whole)


def test_two_halves_of_a_batch_have_the_gradient_of_the_whole(name, tmp_path):
    two(name, tmp_path, body=compare_gradients)


def test_a_process_that_is_killed_ends_the_other(name, flags, tmp_path):
    """With a traceback of its own; what was saved stays."""
    out = tmp_path / "0" / "run"
    words = ["--epochs", 1_000_000, "--out-dir", "run", *flags[name]]
    first, second = begin_two(name, tmp_path, *words)
    first.wait_for(out / "checkpoint.pt")
    second.process.kill()
    status, err = first.wait()
    assert status == 1 and "Traceback" in err and load(out)["metrics"]


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_and_eager_steps_agree(name, script, flags, tmp_path, monkeypatch):
    """All are traced, and one made into C++, which takes half a minute."""
    backend = "inductor" if name == "vae" else "aot_eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    rows = []
    for flag in ("--compile", "--no-compile"):
        with torch._inductor.config.patch(fallback_random=True):  # draws dropout as eager does
            assert run(script, "--epochs", 1, "--out-dir", tmp_path / flag, *flags[name], flag) == 0
        rows.append(list(load(tmp_path / flag)["metrics"][0].values())[:-2])  # without the speed
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)
