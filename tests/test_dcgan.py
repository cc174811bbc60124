import contextlib
import csv
import fcntl
import io
import math
import os
import shutil
import socket
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import result, run as run_script, same, show
from PIL import Image
from torch import nn

import dcgan

SCRIPT = Path(dcgan.__file__)
TINY = ["--width", "2", "--latent-dim", "5", "--batch-size", "64", "--lr", "0.02"]  # a rate that shows within ten steps
run = partial(run_script, dcgan)


def train(data_dir, out_dir, *flags):
    """A run of a few seconds on the tiny MNIST: its folder."""
    assert run("--dataset", "mnist", "--data-dir", data_dir, "--out-dir", out_dir, *TINY, *flags) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of three epochs, not to be changed."""
    return train(data_dir, tmp_path_factory.mktemp("finished") / "run", "--epochs", "3")


# networks


@pytest.mark.parametrize("size, base, steps", [(8, 4, 1), (14, 7, 1), (28, 7, 2), (32, 4, 3), (48, 6, 3), (64, 4, 4), (80, 5, 4), (96, 6, 4), (128, 4, 5), (256, 4, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_follow_the_image_size(size, base, steps, channels):
    generator, discriminator = dcgan.Generator(size, channels, 7, 2), dcgan.Discriminator(size, channels, 2)
    down, up = [], []
    for module in discriminator:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, _, output: down.append(tuple(output.shape[1:])))
    for module in generator:
        if isinstance(module, nn.ConvTranspose2d):
            module.register_forward_hook(lambda module, inputs, _: up.append(tuple(inputs[0].shape[1:])))
    images = generator(torch.randn(3, 7))
    assert images.shape == (3, channels, size, size) and images.abs().max() < 1
    assert discriminator(images).shape == (3,)
    levels = [(2 * 2**i, base * 2 ** (steps - 1 - i), base * 2 ** (steps - 1 - i)) for i in range(steps)]
    assert down == [*levels, (1, 1, 1)]  # channels double from the width up to the b x b level, and back in G
    assert up == levels[::-1]


def test_at_64_pixels_the_networks_are_the_papers():
    generator, discriminator = dcgan.Generator(64, 3, 100, 64), dcgan.Discriminator(64, 3, 64)
    shapes = [tuple(m.weight.shape) for m in generator if isinstance(m, (nn.Linear, nn.ConvTranspose2d))]
    assert shapes == [(8192, 100), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    shapes = [tuple(m.weight.shape) for m in discriminator if isinstance(m, nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]


@pytest.mark.parametrize("size", [32, 48])
def test_batchnorm_stands_where_the_paper_has_it(size):
    generator, discriminator = dcgan.Generator(size, 1, 5, 4), dcgan.Discriminator(size, 1, 4)
    names = [type(module).__name__ for module in generator]
    assert names[:4] == ["Linear", "Unflatten", "BatchNorm2d", "ReLU"] and names[-2:] == ["ConvTranspose2d", "Tanh"]
    assert names[4:-2] == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * ((len(names) - 6) // 3)
    names = [type(module).__name__ for module in discriminator]
    assert names[:2] == ["Conv2d", "LeakyReLU"] and names[-2:] == ["Conv2d", "Flatten"]
    assert names[2:-2] == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * ((len(names) - 4) // 3)
    assert all(module.negative_slope == 0.2 for module in discriminator if isinstance(module, nn.LeakyReLU))
    # no pooling: every change of size is a stride
    assert all(m.stride == (2, 2) for net in (generator, discriminator) for m in list(net)[:-2] if hasattr(m, "stride"))


def test_weights_start_as_in_section_4():
    torch.manual_seed(0)
    seen = 0
    for net in (dcgan.Generator(32, 1, 100, 64), dcgan.Discriminator(32, 1, 64)):
        for module in net:
            if not hasattr(module, "weight"):
                continue
            n, mean = module.weight.numel(), 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            assert abs(module.weight.mean() - mean) < 5 * 0.02 / math.sqrt(n)
            assert abs(module.weight.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * n)
            assert module.bias is None or module.bias.abs().max() == 0
            seen += 1
    assert seen == 7 + 6


# losses


def test_losses_are_the_value_function_and_its_non_saturating_form():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 1.0], requires_grad=True)
    d = lambda logits: 1 / (1 + torch.exp(-logits))
    torch.testing.assert_close(dcgan.discriminator_loss(real, fake), -torch.log(d(real)).mean() - torch.log(1 - d(fake)).mean())
    torch.testing.assert_close(dcgan.generator_loss(fake), -torch.log(d(fake)).mean())
    rejected = torch.tensor([-200.0], requires_grad=True)  # D is certain: this loss still pulls with all its strength
    dcgan.generator_loss(rejected).backward()
    assert rejected.grad.item() == -1
    assert dcgan.discriminator_loss(torch.tensor([-200.0]), torch.tensor([200.0])) == 400  # logits, never log(0)


# the training loop


def test_defaults_are_the_papers_and_the_designs(finished):
    args = dcgan.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.latent_dim, args.width) == (25, 128, 2e-4, 100, 64)
    assert (args.image_size, args.channels, args.seed, args.bf16) == (32, 1, 0, False)
    for dataset, size, channels in (("cifar10", 32, 3), ("folder", 64, 3), ("fashion-mnist", 32, 1)):
        args = dcgan.parse_args(["--dataset", dataset])
        assert (args.image_size, args.channels) == (size, channels)
    for name in ("optimizer_g", "optimizer_d"):
        assert dcgan.load_checkpoint(finished / "checkpoint.pt")[name]["param_groups"][0]["betas"] == (0.5, 0.999)


def test_first_step_is_the_algorithms(data_dir, tmp_path):
    """One step over all 256 images, computed again from the seed alone; the rate is too small for G to see D's step."""
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--batch-size", "256", "--lr", "1e-12")
    torch.manual_seed(0)
    generator, discriminator = dcgan.Generator(32, 1, 5, 2), dcgan.Discriminator(32, 1, 2)
    real = F.pad(dcgan.synthetic_digits(256, 0), (2, 2, 2, 2))[torch.randperm(256), None].float() / 127.5 - 1
    fake = generator(torch.randn(256, 5))
    d_real, d_fake = torch.sigmoid(discriminator(real)), torch.sigmoid(discriminator(fake))
    loss_d = -(torch.log(d_real) + torch.log(1 - d_fake)).mean()
    expected = [loss_d, -torch.log(d_fake).mean(), d_real.mean(), d_fake.mean()]
    (row,) = dcgan.load_checkpoint(out / "checkpoint.pt")["metrics"]
    np.testing.assert_allclose(row[1:5], [value.item() for value in expected], rtol=1e-5)
    assert row[5] * row[6] == pytest.approx(256)  # images/s times seconds


def test_grid_is_of_the_same_noise_every_epoch(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1")
    for epoch in (1, 2):
        assert epoch == 1 or run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
        generator = dcgan.Generator(32, 1, 5, 2)
        generator.load_state_dict(dcgan.load_checkpoint(out / "checkpoint.pt")["generator"])
        images = dcgan.generate(generator, torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))
        grid = np.asarray(Image.open(out / "samples" / f"epoch_000{epoch}.png").convert("L"))
        assert np.abs(show((images + 1) * 127.5) - grid).max() <= 1
        assert grid.std() > 5  # or there is nothing to compare


def test_batches_are_shuffled_anew_each_epoch():
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 8, 8)
    torch.manual_seed(0)
    first, second = (torch.cat(list(dcgan.batches(images, 100, torch.device("cpu"))))[:, 0, 0, 0] for _ in range(2))
    assert len(first) == len(first.unique()) == 200
    assert not torch.equal(first, second) and not torch.equal(first, first.sort().values)


def grads(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def test_each_step_leaves_the_other_network_alone(data_dir, tmp_path, monkeypatch):
    """Seen at each optimizer step: since the step before, only the stepping network got gradients, and its own alone."""
    nets, order, left, wrong = [], [], {}, []

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, *args, **kwargs):
            super().__init__(nn.ParameterList(parameters), *args, **kwargs)
            nets.append(nn.ParameterList(self.param_groups[0]["params"]))

        def step(self):
            mine = next(i for i, net in enumerate(nets) if net[0] is self.param_groups[0]["params"][0])
            other = 1 - mine
            if order:  # not at the very first step, before which the other has no history
                wrong.extend([] if same(grads(nets[other]), left[other]["grads"]) else ["gradients"])
                wrong.extend([] if same(list(nets[other]), left[other]["weights"]) else ["weights"])
                wrong.extend([] if order[-1] == other else ["order"])
            super().step()
            order.append(mine)
            for i in (0, 1):
                left[i] = {"grads": grads(nets[i]), "weights": [p.detach().clone() for p in nets[i]]}

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    train(data_dir, tmp_path / "run", "--epochs", "2")
    assert wrong == [] and order == [1, 0] * 8  # D then G, four batches of 64 an epoch


def test_real_and_fake_go_through_d_apart_and_every_image_once(data_dir, tmp_path, monkeypatch):
    seen = []

    class Discriminator(dcgan.Discriminator):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    monkeypatch.setattr(dcgan, "Discriminator", Discriminator)
    train(data_dir, tmp_path / "run", "--epochs", "1", "--batch-size", "100")
    assert [len(x) for x in seen] == [100] * 6  # of 256: two batches, each real, fake, fake; the last 56 are dropped
    digits = F.pad(dcgan.synthetic_digits(256, 0), (2, 2, 2, 2)).float() / 127.5 - 1
    every = {tuple(image.flatten().tolist()) for image in digits}
    real = [tuple(image.flatten().tolist()) for x in seen[::3] for image in x]
    assert set(real) <= every and len(set(real)) == len(real) == 200
    for a, b in ((1, 2), (4, 5)):
        assert torch.equal(seen[a], seen[b])  # G steps on the images that D has just seen
        assert not {tuple(image.flatten().tolist()) for image in seen[a]} & every


def test_a_grid_leaves_the_training_as_it_was():
    torch.manual_seed(0)
    generator = dcgan.Generator(32, 1, 5, 4)
    generator(torch.randn(8, 5))
    before, rng = {k: v.clone() for k, v in generator.state_dict().items()}, torch.get_rng_state()
    images = dcgan.generate(generator, torch.randn(4, 5, generator=torch.Generator().manual_seed(1)))
    assert same(before, dict(generator.state_dict())) and torch.equal(rng, torch.get_rng_state())
    assert generator.training and not images.requires_grad
    alone = dcgan.generate(generator, torch.randn(4, 5, generator=torch.Generator().manual_seed(1))[:1])
    torch.testing.assert_close(alone, images[:1])  # one image does not depend on those beside it


def test_metrics_are_what_was_promised(finished):
    rows = list(csv.DictReader(open(finished / "metrics.csv")))
    assert list(rows[0]) == ["epoch", "loss_d", "loss_g", "d_real", "d_fake", "images_per_second", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 < float(row[name]) < 1 for row in rows for name in ("d_real", "d_fake"))
    assert 0 < float(rows[0]["seconds"]) < float(rows[1]["seconds"]) < float(rows[2]["seconds"])
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [f"epoch_000{n}.png" for n in (1, 2, 3)]


def test_one_seed_repeats_and_two_differ(data_dir, finished, tmp_path):
    assert same(result(train(data_dir, tmp_path / "again", "--epochs", "3")), result(finished))
    other = result(train(data_dir, tmp_path / "other", "--epochs", "3", "--seed", "1"))
    assert not same(other["checkpoint"]["generator"], result(finished)["checkpoint"]["generator"])


def test_losses_in_bf16_stay_near_float32(data_dir, tmp_path):
    runs = [train(data_dir, tmp_path / f"run{flag}", "--epochs", "3", "--lr", "0.001", flag) for flag in ("--bf16", "--no-bf16")]
    bf16, float32 = ([row[1:] for row in result(out)["checkpoint"]["metrics"]] for out in runs)
    assert not same(bf16, float32)
    np.testing.assert_allclose(bf16, float32, atol=0.02)


# interrupted and resumed


def test_resumed_is_uninterrupted_to_the_bit(data_dir, finished, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1")
    assert run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
    assert run("--resume", out / "checkpoint.pt", "--epochs", "3") == 0
    assert same(result(out), result(finished))
    seconds = [row[-1] for row in dcgan.load_checkpoint(out / "checkpoint.pt")["metrics"]]
    assert seconds == sorted(seconds)  # summed over the runs, too


def test_a_finished_run_stays_as_it_is(finished, capsys):
    before = result(finished)
    assert run("--resume", finished / "checkpoint.pt") == 0
    assert "raise --epochs" in capsys.readouterr().out and same(result(finished), before)


COMMAND = [sys.executable, str(SCRIPT), "--dataset", "mnist", *TINY]


def test_resume_keeps_what_was_not_said_and_takes_what_was(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--lr", "0.001")
    assert run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
    state = dcgan.load_checkpoint(out / "checkpoint.pt")
    assert state["epoch"] == 2 and state["args"]["lr"] == state["optimizer_g"]["param_groups"][0]["lr"] == 0.001
    assert run("--resume", out / "checkpoint.pt", "--epochs", "3", "--lr", "0.5") == 0
    state = dcgan.load_checkpoint(out / "checkpoint.pt")
    assert state["args"]["lr"] == state["optimizer_g"]["param_groups"][0]["lr"] == state["optimizer_d"]["param_groups"][0]["lr"] == 0.5


def test_progress_on_a_terminal_stays_on_one_line(data_dir, tmp_path):
    """On a terminal of 60 columns the line is rewritten in place and cut; what an epoch ends with stands there whole."""
    flags = ["--data-dir", data_dir, "--epochs", "2", "--out-dir", tmp_path / "run", "--batch-size", "1"]
    parent, child = os.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    process = subprocess.Popen([*COMMAND, *flags], stdout=child, env={k: v for k, v in os.environ.items() if k != "COLUMNS"})
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux raises where the other end is closed
        while chunk := os.read(parent, 65536):
            shown += chunk
    assert process.wait() == 0
    lines = shown.decode().replace("\r\n", "\n").split("\n")[1:]  # without the run's first
    assert len(lines) == 3 and lines[2] == ""  # an epoch is one line
    for epoch, line in enumerate(lines[:2], 1):
        *updates, last = line.split("\r")[1:]
        assert updates and all(len(update) == 59 and update.startswith(f"epoch {epoch}/2") for update in updates)
        assert last.startswith(f"epoch {epoch}/2  256/256  loss_d ") and last.endswith(" left")


# run folders


def test_no_run_overwrites_another(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "mnist", "--data-dir", data_dir, *TINY, "--epochs", "1"]
    assert [run(*flags) for _ in range(3)] == [0, 0, 0]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["dcgan", "dcgan-2", "dcgan-3"]
    before = Path("runs/dcgan/checkpoint.pt").read_bytes()
    assert run(*flags, "--out-dir", "runs/dcgan") == 2
    assert "runs/dcgan holds a run" in capsys.readouterr().err
    shutil.copy("runs/dcgan/checkpoint.pt", "runs/dcgan/kept.pt")  # going on from a copy would overwrite the run, too
    assert run("--resume", "runs/dcgan/kept.pt", "--epochs", "2") == 2
    assert Path("runs/dcgan/checkpoint.pt").read_bytes() == before
    assert run("--resume", "runs/dcgan/kept.pt", "--epochs", "2", "--out-dir", "runs/fork") == 0
    assert Path("runs/dcgan/checkpoint.pt").read_bytes() == before
    assert dcgan.load_checkpoint(Path("runs/fork/checkpoint.pt"))["epoch"] == 2


# sampling


def test_a_run_folder_behind_a_broken_link_is_an_error(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("nowhere/at/all")
    assert run("--dataset", "mnist", "--data-dir", data_dir, *TINY) == 1
    assert "runs" in capsys.readouterr().err


def test_samples_are_single_images_at_28_pixels(data_dir, finished, tmp_path):
    out = tmp_path / "out"
    assert run("--sample", finished / "checkpoint.pt", "--num-samples", "70", "--out-dir", out) == 0
    assert run("--sample", finished / "checkpoint.pt", "--num-samples", "3", "--seed", "9", "--out-dir", out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["generated", "generated-2", "generated-2.png", "generated.png"]
    shutil.move(out / "generated-2", tmp_path / "moved")
    assert run("--sample", finished / "checkpoint.pt", "--num-samples", "3", "--out-dir", out) == 0
    assert (out / "generated-3").exists()  # and the grid of the second stays
    files = sorted((out / "generated").iterdir())
    assert [file.name for file in files] == [f"{n:05d}.png" for n in range(70)]
    images = [np.asarray(Image.open(file)) for file in files]
    assert all(image.shape == (28, 28) and image.dtype == np.uint8 for image in images)
    z = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    generator = dcgan.Generator(32, 1, 5, 2)
    generator.load_state_dict(dcgan.load_checkpoint(finished / "checkpoint.pt")["generator"])
    expected = (dcgan.generate(generator, z)[:, 0, 2:-2, 2:-2].numpy() + 1) * 127.5
    np.testing.assert_allclose(np.stack(images), expected, atol=0.51)
    assert not np.array_equal(images[0], np.asarray(Image.open(tmp_path / "moved" / "00000.png")))


def test_walks_are_spherical(finished, tmp_path):
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(4, 50), dim=1) * 7, F.normalize(torch.randn(4, 50), dim=1) * 7
    path = dcgan.slerp(a, b, 9)
    torch.testing.assert_close(path[:, 0], a)
    torch.testing.assert_close(path[:, -1], b)
    torch.testing.assert_close(path.norm(dim=2), torch.full((4, 9), 7.0))  # a straight walk would dip to 5 or so
    steps = F.cosine_similarity(path[:, 1:], path[:, :-1], dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand(4, 8))  # equal angles
    assert dcgan.slerp(torch.randn(4, 1), torch.randn(4, 1), 9).isfinite().all()  # one dimension: 0 or 180 degrees
    assert run("--sample", finished / "checkpoint.pt", "--interpolate", "3", "--out-dir", tmp_path) == 0
    assert Image.open(tmp_path / "interpolation.png").size == (10 * 30 + 2, 3 * 30 + 2)
    assert len(list((tmp_path / "interpolation").iterdir())) == 30


# data


def test_digits_are_padded_and_never_stretched(data_dir):
    for size, before, after in ((32, 2, 2), (28, 0, 0), (64, 18, 18)):
        args = dcgan.parse_args(["--dataset", "mnist", "--data-dir", str(data_dir), "--image-size", str(size)])
        images = dcgan.load_images(args, torch.device("cpu"))
        assert images.shape == (256, 1, size, size) and images.dtype == torch.uint8
        assert torch.equal(images[:, 0, before : size - after, before : size - after], dcgan.synthetic_digits(256, 0))
        assert images.sum() == dcgan.synthetic_digits(256, 0).sum()


def test_cifar10_is_colour_first_and_resized(monkeypatch):
    class Cifar:  # torchvision's attribute, without its files
        def __init__(self, root, download):
            self.data = np.zeros((5, 32, 32, 3), np.uint8)
            self.data[:, :16, :, 0], self.data[:, :, 16:, 2] = 200, 100  # red above, blue at the right

    monkeypatch.setattr(dcgan.datasets, "CIFAR10", Cifar)
    for size in (32, 64):
        args = dcgan.parse_args(["--dataset", "cifar10", "--image-size", str(size)])
        images = dcgan.load_images(args, torch.device("cpu"))
        assert images.shape == (5, 3, size, size) and images.dtype == torch.uint8
        assert images[0, :, 2, 2].tolist() == [200, 0, 0] and images[0, :, -3, -3].tolist() == [0, 0, 100]


def test_synthetic_digits_are_ten_kinds_and_repeat():
    args = dcgan.parse_args(["--dataset", "synthetic", "--image-size", "28"])
    assert torch.equal(dcgan.load_images(args, torch.device("cpu"))[:, 0], dcgan.synthetic_digits(20_000, 0))
    digits = dcgan.synthetic_digits(400, 3)
    assert digits.shape == (400, 28, 28) and digits.max() > 200
    assert torch.equal(digits, dcgan.synthetic_digits(400, 3)) and not torch.equal(digits, dcgan.synthetic_digits(400, 4))
    ink = digits.float().mean((1, 2))
    assert ink.min() > 5  # none is lost outside the frame
    edge = digits.clone()
    edge[:, 1:-1, 1:-1] = 0
    assert (edge.flatten(1).max(1).values > 128).float().mean() < 0.02


def test_batches_are_scaled_to_the_range_of_tanh():
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 8, 8)
    (batch,) = dcgan.batches(images, 256, torch.device("cpu"))
    values = batch[:, 0, 0, 0].sort().values
    torch.testing.assert_close(values, torch.linspace(-1, 1, 256))


@pytest.fixture
def album(tmp_path):
    """A folder of trouble: file name to the RGB it must decode to, in the middle and at the top left; None for no image."""
    folder = tmp_path / "album"
    (folder / "deep" / "er").mkdir(parents=True)
    expected = {}

    def put(name, image, center, corner=None, **kwargs):
        image.save(folder / name, **kwargs)
        expected[name] = (center, corner or center)

    solid = lambda mode, color, size=(40, 40): Image.new(mode, size, color)
    put("rgb.png", solid("RGB", (10, 200, 30)), (10, 200, 30))
    put("deep/er/gray.png", solid("L", 77), (77, 77, 77))
    put("sixteen.png", Image.fromarray(np.full((40, 40), 100 * 257, np.uint16)), (100, 100, 100))
    put("palette.png", solid("RGB", (255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE), (255, 0, 0))
    put("clear.png", solid("RGBA", (255, 0, 0, 0)), (255, 255, 255))  # transparent: white, not the red below it
    put("half.gif", solid("P", 0), (0, 0, 0))
    put("cmyk.jpg", solid("CMYK", (0, 255, 255, 0)), (254, 0, 0), quality=95)
    put("dot.png", solid("RGB", (9, 8, 7), (1, 1)), (9, 8, 7))
    put("line.png", solid("RGB", (9, 8, 7), (5000, 1)), (9, 8, 7))
    corner = solid("RGB", (0, 0, 0), (64, 64))
    corner.paste((255, 255, 255), (32, 0, 64, 32))  # white at the top right, shown at the top left after EXIF's turn
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees counter-clockwise
    put("turned.jpg", corner, None, (255, 255, 255), exif=exif, quality=95)
    wide = solid("RGB", (255, 0, 0), (120, 40))
    wide.paste((0, 255, 0), (40, 0, 80, 40))  # the centre crop of a wide image is its middle third
    put("wide.png", wide, (0, 255, 0))
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(data, "jpeg")
    (folder / "torn.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "notes.txt").write_text("not even named")
    return folder, expected, {"notes.txt", "empty.png", "torn.jpg"}


def test_a_folder_of_trouble(album, capfd):
    folder, expected, bad = album
    images = dcgan.load_folder(folder, 32, 3, torch.device("cpu"))
    names = sorted(expected, key=lambda name: folder / name)
    assert images.shape == (len(expected), 3, 32, 32)
    for name, image in zip(names, images):
        center, corner = expected[name]
        for want, (y, x) in ((center, (16, 16)), (corner, (2, 2))):
            assert want is None or np.abs(np.array(want) - image[:, y, x].numpy().astype(int)).max() <= 3, name
    lines = capfd.readouterr().err.strip().splitlines()
    assert {Path(line.split("skipped ")[1].split(": ")[0]).name for line in lines} == bad and len(lines) == len(bad)
    gray = dcgan.load_folder(folder, 32, 1, torch.device("cpu"))
    assert gray.shape == (len(expected), 1, 32, 32)
    assert gray[names.index("deep/er/gray.png"), 0, 5, 5] == 77 and gray[names.index("sixteen.png"), 0, 5, 5] == 100


def test_streamed_and_in_memory_are_the_same_images(album, monkeypatch):
    device = torch.device("cpu")
    in_memory = dcgan.load_folder(album[0], 32, 3, device)
    monkeypatch.setattr(dcgan, "IN_MEMORY", 0)
    streamed = dcgan.load_folder(album[0], 32, 3, device)
    assert isinstance(in_memory, torch.Tensor) and isinstance(streamed, dcgan.ImageFiles)
    torch.manual_seed(0)
    first = [*dcgan.batches(in_memory, 4, device)]
    rng = torch.get_rng_state()
    torch.manual_seed(0)
    assert same([*dcgan.batches(streamed, 4, device)], first) and torch.equal(torch.get_rng_state(), rng)
    gone = dcgan.ImageFiles([*streamed.paths[:3], album[0] / "gone.png"], 32, 3)
    with pytest.raises(OSError, match="gone.png"):
        [*dcgan.batches(gone, 4, device)]


def test_trains_on_a_folder(album, tmp_path):
    flags = ["--dataset", "folder", "--data-dir", album[0], *TINY, "--batch-size", "4", "--epochs", "1"]
    assert run(*flags, "--out-dir", tmp_path / "color") == 0
    saved = dcgan.load_checkpoint(tmp_path / "color" / "checkpoint.pt")["args"]
    assert (saved["image_size"], saved["channels"]) == (64, 3)
    assert run(*flags, "--channels", "1", "--image-size", "48", "--out-dir", tmp_path / "gray") == 0
    assert run("--sample", tmp_path / "gray" / "checkpoint.pt", "--num-samples", "2") == 0
    assert Image.open(tmp_path / "gray" / "generated" / "00001.png").size == (48, 48)


def test_nothing_said_and_no_network(tmp_path, monkeypatch, capsys):
    def no_network(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    assert run("--epochs", "1", "--width", "2", "--batch-size", "2000") == 0
    out, err = capsys.readouterr()
    assert out.startswith("synthetic: 20,000 images") and len(err.strip().splitlines()) == 1 and "warning" in err
    assert dcgan.load_checkpoint(Path("runs/dcgan/checkpoint.pt"))["args"]["dataset"] == "synthetic"
    for name in ("mnist", "fashion-mnist", "cifar10"):  # a set that was named is never replaced
        assert run("--dataset", name, "--out-dir", "x") == 1
        out, err = capsys.readouterr()
        assert name in err and len(err.strip().splitlines()) == 1 and not Path("x").exists()


def test_a_network_that_never_answers_shows_within_seconds(tmp_path, monkeypatch, capsys):
    server = socket.create_server(("127.0.0.1", 0))  # takes connections, sends nothing
    monkeypatch.setattr(dcgan.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
    assert run("--dataset", "mnist", "--data-dir", tmp_path / "data", "--out-dir", tmp_path / "run") == 1
    assert "timed out" in capsys.readouterr().err
    server.close()


# bad input: one line, non-zero, nothing written


@pytest.mark.parametrize(
    "flags, word",
    [(f"{flag} {value}", flag) for flag in ("--epochs", "--batch-size", "--width", "--latent-dim", "--num-samples") for value in ("0", "-1", "1e400", "two")]
    + [(f"--lr {value}", "--lr") for value in ("0", "-1", "nan", "inf", "1e400", "fast")]
    + [("--seed -1", "--seed"), ("--seed 1e400", "--seed"), ("--interpolate 3", "--sample"), ("--interpolate 0", "--interpolate")]
    + [("--image-size 33", "32 or 40"), ("--image-size 7", "8"), ("--image-size 20", "28"), ("--channels 2", "--channels")]
    + [("--channels 3", "folder"), ("--dataset imagenet", "--dataset"), ("--batch-size 257", "too few"), ("--width 999999999", "memory")]
    + [("--dataset folder --data-dir missing", "missing"), ("--dataset folder --data-dir nothing", "nothing")]
    + [("--out-dir file", "file"), ("--out-dir file/below", "file/below"), ("--out-dir /proc/nowhere", "/proc/nowhere")],
)
def test_bad_flags_are_refused_in_one_line(flags, word, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    Path("file").write_text("kept")
    given = flags.split()
    base = [] if "--dataset" in given else ["--dataset", "mnist", "--data-dir", str(data_dir)]
    assert run(*base, *given) in (1, 2)
    err = capsys.readouterr().err
    assert word in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "nothing"] and Path("file").read_text() == "kept"


@pytest.mark.parametrize("flag", ["--width 4", "--latent-dim 6", "--image-size 64", "--dataset synthetic", "--seed 1"])
def test_resume_refuses_another_network(flag, finished, capsys):
    before = result(finished)
    for use in ("--resume", "--sample")[: 1 if "seed" in flag else 2]:
        assert run(use, finished / "checkpoint.pt", *flag.split()) == 2
        assert flag.split()[0] in capsys.readouterr().err
    assert same(result(finished), before)


def test_a_loss_that_is_not_finite_stops_the_run(data_dir, finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = result(out)
    assert run("--resume", out / "checkpoint.pt", "--epochs", "5", "--lr", "1e18") == 1
    err = capsys.readouterr().err
    assert "epoch 4" in err and len(err.splitlines()) == 1
    assert same(result(out), before)
