"""dcgan.py: its networks, losses, training step and samples, and the images that it trains on."""

import io
import math
import re
import struct
import threading
import time
import tracemalloc
from functools import partial
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load, same, show
from PIL import Image
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import dcgan
import pix2pix

run = partial(conftest.run, dcgan)
TINY = ["--width", "2", "--latent-dim", "5", "--batch-size", "64", "--lr", "0.02"]


def train(data_dir, out_dir, *flags):
    """A run on 256 digits: its folder."""
    words = ["--dataset", "mnist", "--data-dir", data_dir, "--out-dir", out_dir, *TINY, *flags]
    assert run(*words) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of three epochs, not to be changed."""
    return train(data_dir, tmp_path_factory.mktemp("finished") / "run", "--epochs", 3)


def generated(out_dir, draw):
    """What the generator in that folder makes of z = draw() after the seed 0."""
    generator = dcgan.Generator(32, 1, 5, 2).eval().requires_grad_(False)
    generator.load_state_dict(load(out_dir)["generator"])
    torch.manual_seed(0)
    return generator(draw())


def load_images(*flags):
    return dcgan.load_images(dcgan.parse_args([str(flag) for flag in flags])[0])


# networks


# Image size, side of the smallest maps, and the channels, which double to 16 times the width.
SIZES = [
    (8, 4, [2]),
    (14, 7, [2]),
    (28, 7, [2, 4]),
    (32, 4, [2, 4, 8]),
    (48, 6, [2, 4, 8]),
    (80, 5, [2, 4, 8, 16]),
    (256, 4, [2, 4, 8, 16, 32, 32]),
    (64, 4, [128, 256, 512, 1024]),  # figure 1
]


@pytest.mark.parametrize("size, base, widths", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_levels_follow_the_image_size(size, base, widths, channels):
    generator = dcgan.Generator(size, channels, 7, widths[0])
    discriminator = dcgan.Discriminator(size, channels, widths[0])
    up, down = [], []

    def watch(module, inputs, output):
        if isinstance(module, nn.ConvTranspose2d):
            up.append(inputs[0].shape[1:])
        if isinstance(module, nn.Conv2d):
            down.append(output.shape[1:])

    for module in [*generator, *discriminator]:
        module.register_forward_hook(watch)
    images = generator(torch.randn(3, 7))
    assert images.shape == (3, channels, size, size)
    assert discriminator(images).shape == (3,)

    expected = [(width, base * 2**n, base * 2**n) for n, width in enumerate(widths[::-1])]
    assert up == expected and down == [*expected[::-1], (1, 1, 1)]


def test_layers_are_those_of_the_papers_guidelines():
    """No pooling; BatchNorm in both, but at G's output and at D's input; ReLU and tanh in G,
    LeakyReLU in D."""
    generator, discriminator = dcgan.Generator(32, 1, 5, 4), dcgan.Discriminator(32, 1, 4)
    up = "BatchNorm2d ReLU ConvTranspose2d"
    names = " ".join(type(module).__name__ for module in generator)
    assert names == f"Linear Unflatten {up} {up} {up} Tanh"
    down = "Conv2d BatchNorm2d LeakyReLU"
    names = " ".join(type(module).__name__ for module in discriminator)
    assert names == f"Conv2d LeakyReLU {down} {down} Conv2d Flatten"
    slopes = [module.negative_slope for module in discriminator if isinstance(module, nn.LeakyReLU)]
    assert slopes == [0.2, 0.2, 0.2]


def test_weights_start_as_in_section_4():
    torch.manual_seed(0)
    seen = 0
    for module in [*dcgan.Generator(32, 1, 100, 64), *dcgan.Discriminator(32, 1, 64)]:
        if hasattr(module, "weight"):
            seen += 1
            count = module.weight.numel()
            mean = 1 if isinstance(module, nn.BatchNorm2d) else 0
            assert abs(module.weight.mean() - mean) < 5 * 0.02 / math.sqrt(count)
            assert abs(module.weight.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * count)
            assert module.bias is None or not module.bias.any()
    assert seen == 7 + 6


def test_layers_of_other_types_keep_their_start():
    """A copy's embedding of labels, or a scale that is to start at 0."""
    embedding = nn.Sequential(nn.Embedding(10, 100), nn.PReLU(init=0.0))
    before = [p.detach().clone() for p in embedding.parameters()]
    embedding.apply(dcgan.initialize)
    assert all(map(torch.equal, before, embedding.parameters()))


def test_bad_image_sizes_are_refused_with_those_that_work(tmp_path, capsys):
    """Before anything is decoded."""
    (tmp_path / "notes.txt").write_text("no image")
    words = ["--dataset", "folder", "--data-dir", str(tmp_path), "--out-dir", str(tmp_path / "run")]
    works = [base * 2**n for base in (4, 5, 6, 7) for n in range(1, 6)]
    for size in set(range(129)) - {*works}:
        assert run(*words, "--image-size", size) == 2
    err = capsys.readouterr().err
    assert "skipped" not in err

    named = re.search(r"--image-size: .*two: (.*)\n", err)[1].replace("...", "48").split(", ")
    for size in [*works, *map(int, named)]:
        assert dcgan.parse_args([*words, "--image-size", str(size)])[0].image_size == size


# Digits are never cropped; --channels is for a folder.
@pytest.mark.parametrize("flags", ["--image-size 24", "--channels 3"])
def test_flags_that_do_not_suit_the_set_are_refused(flags, tmp_path, capsys):
    words = ["--dataset", "synthetic", "--out-dir", tmp_path / "run", *flags.split()]
    assert run(*words) == 1
    err = capsys.readouterr().err
    assert flags.split()[0] in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_defaults_are_the_papers_and_those_of_each_set():
    args = dcgan.parse_args([])[0]
    assert (args.epochs, args.batch_size, args.lr) == (25, 128, 2e-4)
    assert (args.latent_dim, args.width, args.image_size) == (100, 64, 32)
    for dataset, size in (("cifar10", 32), ("folder", 64), ("fashion-mnist", 32)):
        assert dcgan.parse_args(["--dataset", dataset])[0].image_size == size


# losses and steps


def test_losses_are_the_value_function_and_its_non_saturating_form():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 1.0])
    d_real, d_fake = 1 / (1 + torch.exp(-real)), 1 / (1 + torch.exp(-fake))
    value = torch.log(d_real).mean() + torch.log(1 - d_fake).mean()
    torch.testing.assert_close(dcgan.discriminator_loss(real, fake), -value)
    torch.testing.assert_close(dcgan.generator_loss(fake), -torch.log(d_fake).mean())


def test_losses_of_a_discriminator_that_is_certain():
    """Logits, never log(0); and G is still pulled with all strength."""
    rejected = torch.tensor([-200.0], requires_grad=True)
    dcgan.generator_loss(rejected).backward()
    assert rejected.grad.item() == -1
    assert dcgan.discriminator_loss(torch.tensor([-200.0]), torch.tensor([200.0])) == 400


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"], retain_graph=True)
    optimizer.step()


def test_training_is_the_algorithm(data_dir, tmp_path):
    """Two epochs of two steps, made again from the seed alone; the images left over make none."""
    words = ["--epochs", 2, "--batch-size", 100, "--seed", 3, "--lr", 0.002]
    state = load(train(data_dir, tmp_path / "run", *words))
    digits = F.pad(dcgan.synthetic_digits(256, 0), (2, 2, 2, 2))[:, None] / 127.5 - 1

    torch.manual_seed(3)
    torch.randn(64, 5)  # of the grids
    generator, discriminator = dcgan.Generator(32, 1, 5, 2), dcgan.Discriminator(32, 1, 2)
    adam_g = torch.optim.Adam(generator.parameters(), 0.002, betas=(0.5, 0.999))
    adam_d = torch.optim.Adam(discriminator.parameters(), 0.002, betas=(0.5, 0.999))
    for epoch, row in enumerate(state["metrics"], 1):
        torch.manual_seed(hash((3, epoch, 0)))
        sums = 0
        for real in digits[torch.randperm(256)].split(100)[:2]:
            fake = generator(torch.randn(100, 5))
            d_real, d_fake = discriminator(real).sigmoid(), discriminator(fake).sigmoid()
            loss_d = -d_real.log().mean() - (1 - d_fake).log().mean()
            descend(loss_d, adam_d)
            loss_g = -discriminator(fake).sigmoid().log().mean()
            descend(loss_g, adam_g)
            sums += torch.stack([loss_d, loss_g, d_real.mean(), d_fake.mean()]).detach()
        found = [row[name] for name in ("loss_d", "loss_g", "d_real", "d_fake")]
        np.testing.assert_allclose(found, sums / 2, rtol=1e-4)
    for name, network in (("generator", generator), ("discriminator", discriminator)):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(state[name][key], value, rtol=1e-4, atol=1e-5)


def held(optimizer):
    weights = optimizer.param_groups[0]["params"]
    grads = [p.grad for p in weights if p.grad is not None]
    return [p.detach().clone() for p in weights + grads]


def test_each_step_leaves_the_other_network_alone(data_dir, tmp_path):
    """Before a step of one optimizer, weights and gradients of the other's network are as its last
    step left them."""
    left, alone = {}, []

    def before(optimizer, args, kwargs):
        alone.extend(same(held(other), left[other]) for other in left if other is not optimizer)

    def after(optimizer, args, kwargs):
        left[optimizer] = held(optimizer)

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        train(data_dir, tmp_path / "run", "--epochs", 2)
    finally:
        for hook in hooks:
            hook.remove()
    # 4 batches, twice, by two networks; at the very first step there is no last.
    assert alone == [True] * 15


# grids and samples


def check_grid(path, images):
    """It shows these, (N, 1, h, w)."""
    grid = np.asarray(Image.open(path).convert("L")).astype(int)
    assert np.abs(show((images + 1) * 127.5) - grid).max() <= 2
    assert grid.std() > 5  # or there is nothing to compare


def test_a_grid_is_of_the_same_noise_every_epoch(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", 1)
    for epoch in (1, 2):
        assert epoch == 1 or run("--resume", out / "checkpoint.pt", "--epochs", 2) == 0
        images = generated(out, lambda: torch.randn(64, 5))
        check_grid(out / "samples" / f"epoch_000{epoch}.png", images)


def test_a_grid_leaves_the_training_as_it_was(data_dir, tmp_path, monkeypatch):
    """Without it the run is the same to the bit: the statistics, the mode, the random numbers."""
    first = load(train(data_dir, tmp_path / "run", "--epochs", 2))
    forward = dcgan.Generator.forward
    monkeypatch.setattr(dcgan, "save_grid", lambda images, path: None)

    def no_grid(self, z):
        return forward(self, z) if self.training else z

    monkeypatch.setattr(dcgan.Generator, "forward", no_grid)
    second = load(train(data_dir, tmp_path / "other", "--epochs", 2))
    assert same(first["generator"], second["generator"])


def test_an_image_does_not_depend_on_those_beside_it(finished):
    images = generated(finished, lambda: torch.randn(4, 5))
    alone = generated(finished, lambda: torch.randn(4, 5)[:1])
    torch.testing.assert_close(alone, images[:1])


def pictures(folder, count):
    """Those in `folder`: an array (count, h, w)."""
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{n:05d}.png" for n in range(count)]
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def test_samples_are_single_images_of_28_pixels(finished, tmp_path):
    words = ["--sample", finished / "checkpoint.pt", "--out-dir", tmp_path]
    assert run(*words, "--num-samples", 70) == 0
    images = generated(finished, lambda: torch.randn(70, 5))[:, :, 2:-2, 2:-2]
    found = pictures(tmp_path / "generated", 70)
    np.testing.assert_allclose(found, (images[:, 0] + 1) * 127.5, atol=0.51)
    check_grid(tmp_path / "generated.png", images[:64])


def test_interpolations_are_shown_a_line_each(finished, tmp_path):
    words = ["--sample", finished / "checkpoint.pt", "--out-dir", tmp_path]
    assert run(*words, "--interpolate", 3) == 0
    grid = Image.open(tmp_path / "interpolation.png")
    assert grid.size == (8 * 30 + 2, 3 * 30 + 2)
    found = pictures(tmp_path / "interpolation", 24)
    t = torch.linspace(0, math.pi / 2, 8)[:, None]

    def draw():
        torch.randn(64, 5)
        a, b = torch.randn(2, 3, 1, 5)
        return (t.cos() * a + t.sin() * b).flatten(0, 1)

    images = generated(finished, draw)[:, 0, 2:-2, 2:-2]
    np.testing.assert_allclose(found, (images + 1) * 127.5, atol=0.51)


@pytest.mark.parametrize("channels, size, mode", [(3, 64, "RGB"), (1, 48, "L")])
def test_a_folder_is_trained_on_and_sampled(channels, size, mode, album, tmp_path):
    words = ["--dataset", "folder", "--data-dir", album[0], "--epochs", 1, *TINY]
    words += ["--channels", channels, "--image-size", size]
    assert run(*words, "--out-dir", tmp_path) == 0
    assert run("--sample", tmp_path / "checkpoint.pt", "--num-samples", 2) == 0
    picture = Image.open(tmp_path / "generated" / "00001.png")
    assert picture.size == (size, size) and picture.mode == mode


# data


@pytest.mark.parametrize("size, margin", [(28, 0), (32, 2), (64, 18)])
def test_digits_are_padded_and_never_stretched(size, margin, data_dir):
    images = load_images("--dataset", "mnist", "--data-dir", data_dir, "--image-size", size)
    assert images.dtype == torch.uint8
    expected = F.pad(dcgan.synthetic_digits(256, 0), (margin, margin, margin, margin))
    assert torch.equal(images, expected[:, None])


@pytest.mark.parametrize("size", [32, 64])
def test_cifar10_is_upright_and_resized(size, monkeypatch):
    class Cifar:
        """As torchvision holds it: red above, blue at the right."""

        def __init__(self, root, download=False):
            self.data = np.zeros((5, 32, 32, 3), np.uint8)
            self.data[:, :16, :, 0] = 200
            self.data[:, :, 16:, 2] = 100

    monkeypatch.setitem(dcgan.DATASETS, "cifar10", Cifar)
    images = load_images("--dataset", "cifar10", "--image-size", size)
    assert images.shape == (5, 3, size, size) and images.dtype == torch.uint8
    corners = images[0, :, [2, 2, -3, -3], [2, -3, 2, -3]].T
    assert corners.tolist() == [[200, 0, 0], [200, 0, 100], [0, 0, 0], [0, 0, 100]]


# How a camera stores what is upright, for the EXIF orientations 2 to 8.
STORED = """FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE
ROTATE_270""".split()


def encode(kind, image):
    """The file that shows this image, or an image like it, in the way of that kind."""
    file, gray = io.BytesIO(), image.convert("L")
    jpeg = {"format": "jpeg", "quality": 95, "subsampling": 0}
    if kind < 8:  # as large as from a camera
        exif = Image.Exif()
        exif[0x0112] = kind + 1
        stored = image.transpose(Image.Transpose[STORED[kind - 1]]) if kind else image
        stored.resize((400, 400), Image.Resampling.NEAREST).save(file, **jpeg, exif=exif)
    elif kind == 8:
        gray.save(file, "png")
    elif kind == 9:  # 16 bits a pixel
        Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(file, "png")
    elif kind == 10:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2).save(file, "png")
    elif kind in (11, 12):  # shown on white: half of it seen through, or all transparent
        layer = image.convert("RGBA")
        layer.putalpha(128 if kind == 11 else 0)
        layer.save(file, "png")
    elif kind == 13:
        image.convert("CMYK").save(file, **jpeg)
    elif kind == 14:  # animated: the first counts
        image.save(file, "gif", save_all=True, append_images=[Image.new("RGB", (40, 40))])
    elif kind == 15:  # the middle counts
        wide = Image.new("RGB", (120, 40))
        wide.paste(image, (40, 0))
        wide.save(file, "png")
    elif kind == 16:
        image.save(file, "jpeg")
        file.truncate(file.tell() // 2)
    elif kind == 17:
        image.save(file, "png")
        file.truncate(file.tell() - 30)
    elif kind == 18:
        file.write(b"no image")
    else:  # says that it is 65535 pixels wide and high
        image.save(file, "gif")
        file.getbuffer()[6:10] = b"\xff\xff\xff\xff"
    return file.getvalue()


@pytest.fixture(scope="session")
def album(tmp_path_factory):
    """A folder of a hundred files, five of each kind; what the good ones show at the top left, the
    rest being white, and the bad ones, in order."""
    folder, good, bad = tmp_path_factory.mktemp("album"), [], []
    (folder / "deep" / "er").mkdir(parents=True)
    for n in range(100):
        color, kind = (n * 37 % 251, n * 83 % 251, n * 101 % 251), n * 7 % 20
        image = Image.new("RGB", (40, 40), "white")
        image.paste(color, (0, 0, 20, 20))
        path = folder / ("deep/er" if n > 70 else "") / f"{n:02d}.jpg"
        path.write_bytes(encode(kind, image))
        if kind in (8, 9):
            color = image.convert("L").convert("RGB").getpixel((0, 0))
        if kind in (11, 12):
            color = tuple(255 - (255 - value) * (12 - kind) // 2 for value in color)
        if kind < 16:
            good.append((path, color))
        else:
            bad.append(path)
    (folder / ".hidden").mkdir()
    for name in (".hidden/notes.txt", ".notes"):
        (folder / name).write_text("not even named")
    return folder, good, bad


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_a_hundred_files(channels, album, capfd):
    """The good ones come out in order, as they are to be seen, the bad ones are named in order,
    and nothing else."""
    folder, good, bad = album
    words = ["--dataset", "folder", "--data-dir", folder, "--channels", channels]
    images = load_images(*words, "--image-size", 32)
    assert images.shape == (80, channels, 32, 32) and images.dtype == torch.uint8
    for (path, color), image in zip(good, images):
        shown = Image.new("RGB", (1, 1), color).convert("RGB" if channels == 3 else "L")
        corner, *rest = image[:, 8::16, 8::16].int().flatten(1).T
        assert abs(corner - torch.tensor(shown.getpixel((0, 0)))).max() <= 6, path  # by JPEG
        assert torch.stack(rest).min() >= 249, path

    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"skipped {path}" for path in bad]


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000)])
def test_images_of_any_shape_are_read(size, tmp_path):
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "thin.png")
    (image,) = load_images("--dataset", "folder", "--data-dir", tmp_path, "--image-size", 32)
    assert image[:, 0, 0].tolist() == image[:, 31, 31].tolist() == [9, 8, 7]


def test_a_folder_larger_than_memory_is_read(tmp_path):
    """Its images are in a file: less than half of them is in memory at any moment."""
    for n in range(200):
        Image.new("RGB", (1, 1)).save(tmp_path / f"{n}.png")
    tracemalloc.start()
    images = load_images("--dataset", "folder", "--data-dir", tmp_path, "--image-size", 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == 200 and peak < images.nbytes / 2


@pytest.mark.parametrize("name", [".hidden.png", "notes.txt"])
def test_a_folder_without_images_is_an_error(name, tmp_path, capsys):
    (tmp_path / name).write_text("no image")
    words = ["--dataset", "folder", "--data-dir", tmp_path, "--out-dir", tmp_path / "run"]
    assert run(*words) == 1
    *skipped, last = capsys.readouterr().err.splitlines()
    assert len(skipped) == (name == "notes.txt") and "error: " in last
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_is_not_taken_for_mnist(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "1.jpg")
    assert run("--data-dir", tmp_path, "--out-dir", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert "add --dataset folder" in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_folder_that_does_not_exist_says_so(tmp_path, capsys):
    assert run("--dataset", "folder", "--data-dir", tmp_path / "no", "--out-dir", tmp_path / "run") == 1
    assert capsys.readouterr().err == f"error: --data-dir {tmp_path}/no does not exist\n"


@pytest.mark.parametrize("kind", [ValueError, OSError, NameError])
def test_a_mistake_in_reading_keeps_its_traceback(kind, album, tmp_path, monkeypatch, capsys):
    """Also where it is of a kind that Pillow raises for a bad file."""

    def mistaken(image, size):
        raise kind("mine")

    monkeypatch.setattr(dcgan.ImageOps, "fit", mistaken)
    with pytest.raises(kind, match="mine"):
        run("--dataset", "folder", "--data-dir", album[0], "--out-dir", tmp_path / "run")
    assert "mine" not in capsys.readouterr().err


def test_no_thread_reads_on_after_an_error(album, tmp_path, monkeypatch):
    """One that was within torch when the program ended would abort it. Nor are all files read."""
    read = []

    def slow(path, args):
        read.append(path)
        time.sleep(0.05)
        raise KeyError

    monkeypatch.setattr(dcgan, "read_image", slow)
    before = threading.active_count()
    with pytest.raises(KeyError):
        run("--dataset", "folder", "--data-dir", album[0], "--out-dir", tmp_path / "run")
    assert threading.active_count() == before and len(read) < 90


def test_a_damaged_exif_part_is_a_bad_image(tmp_path):
    """Turned by 90 degrees, and as wide as "abc": Pillow fails when it writes that anew."""
    tags = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc") + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.new("RGB", (40, 30)).save(tmp_path / "bad.jpg", exif=exif)
    image, error = dcgan.read_image(tmp_path / "bad.jpg", SimpleNamespace(image_size=32, channels=3))
    assert image is None and isinstance(error, Exception)
    with pytest.raises(pix2pix.BadImage, match="bad.jpg"):
        pix2pix.read_image(tmp_path / "bad.jpg")
