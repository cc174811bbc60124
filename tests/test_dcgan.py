"""dcgan.py: its networks, its losses and training, and the images it trains on."""

import math
import os
import time
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load
from PIL import Image
from torch import nn
from torch.optim import Adam

import dcgan

run = partial(conftest.run, dcgan)
TINY = ["--width", 2, "--latent-dim", 5, "--batch-size", 64, "--lr", 0.02]


def train(data_dir, out_dir, *flags):
    """Trains on 256 digits. Returns the run's folder."""
    words = ["--dataset", "mnist", "--data-dir", data_dir, "--out-dir", out_dir]
    assert run(*words, *TINY, *flags) == 0
    return out_dir


def parse(*flags):
    return dcgan.parse_args([str(flag) for flag in flags])[0]


def read(folder, *flags):
    return dcgan.load_images(parse("--dataset", "folder", "--data-dir", folder, *flags))


# networks


# The image size, the side of the smallest maps, and the channels from the widest maps on.
SIZES = [
    (8, 4, [2]),
    (14, 7, [2]),
    (28, 7, [2, 4]),
    (48, 6, [2, 4, 8]),
    (80, 5, [2, 4, 8, 16]),
    (256, 4, [2, 4, 8, 16, 32, 32]),
    (64, 4, [128, 256, 512, 1024]),  # figure 1
]


@pytest.mark.parametrize("size, base, widths", SIZES)
def test_levels_follow_the_image_size(size, base, widths):
    x = torch.randn(2, 7)
    up, down = [], []
    for layer in dcgan.Generator(size, 3, 7, widths[0]):
        if isinstance(layer, nn.ConvTranspose2d):
            up.append(x.shape)
        x = layer(x)
    assert x.shape == (2, 3, size, size)
    for layer in dcgan.Discriminator(size, 3, widths[0]):
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            down.append(x.shape)
    assert x.shape == (2,)

    sides = [size // 2 ** (n + 1) for n in range(len(widths))]
    assert sides[-1] == base
    expected = [(2, width, side, side) for width, side in zip(widths, sides)]
    assert up == expected[::-1]
    assert down == [*expected, (2, 1, 1, 1)]


def test_layers_follow_the_guidelines():
    """No pooling; BatchNorm, but not at G's output and D's input; ReLU in G, LeakyReLU in D."""
    layers = [*dcgan.Generator(32, 1, 5, 4), *dcgan.Discriminator(32, 1, 4)]
    names = [type(layer).__name__ for layer in layers]
    up = 3 * ["BatchNorm2d", "ReLU", "ConvTranspose2d"]
    down = 2 * ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert names[:12] == ["Linear", "Unflatten", *up, "Tanh"]
    assert names[12:] == ["Conv2d", "LeakyReLU", *down, "Conv2d", "Flatten"]
    assert all(getattr(layer, "negative_slope", 0.2) == 0.2 for layer in layers)


def test_weights_start_as_in_section_4():
    torch.manual_seed(0)
    layers = [*dcgan.Generator(32, 1, 100, 64), *dcgan.Discriminator(32, 1, 64)]
    layers = [layer for layer in layers if hasattr(layer, "weight")]
    assert len(layers) == 13
    for layer in layers:
        mean = 1 if isinstance(layer, nn.BatchNorm2d) else 0
        error = 5 * 0.02 / math.sqrt(layer.weight.numel())
        assert abs(layer.weight.mean() - mean) < error
        assert abs(layer.weight.std() - 0.02) < error
        assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("layer", [nn.Embedding(10, 100), nn.PReLU(init=0.0)])
def test_other_types_of_layers_keep_their_start(layer):
    """Such as an embedding of labels, or a scale that is to start at 0."""
    before = layer.weight.detach().clone()
    layer.apply(dcgan.initialize)
    assert torch.equal(layer.weight, before)


def test_image_sizes_that_do_not_work_are_refused(capsys):
    works = [base * 2**n for n in range(1, 9) for base in (4, 5, 6, 7)]
    for size in range(225):
        if size in works:
            assert parse("--image-size", size).image_size == size
        else:
            with pytest.raises(SystemExit):
                parse("--image-size", size)
            err = capsys.readouterr().err
            # Some versions of Python write them in quotes.
            assert str(works)[1:-1] in err.replace("'", "") and len(err.splitlines()) == 1


def test_defaults_are_the_papers_and_those_of_each_set():
    args = parse()
    assert (args.batch_size, args.lr, args.latent_dim, args.width) == (128, 2e-4, 100, 64)
    sizes = [parse("--dataset", name).image_size for name in ("mnist", "cifar10", "folder")]
    assert sizes == [32, 32, 64]


# losses and training


def test_losses_are_those_of_the_formulas():
    real = torch.tensor([2.0, -1.0, 0.3])
    fake = torch.tensor([-3.0, 0.5, 1.0])
    d_real = real.sigmoid()
    d_fake = fake.sigmoid()
    value = (d_real.log() + (1 - d_fake).log()).mean()
    torch.testing.assert_close(dcgan.discriminator_loss(real, fake), -value)
    torch.testing.assert_close(dcgan.generator_loss(fake), -d_fake.log().mean())


def minimize(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_training_is_the_algorithm(data_dir, tmp_path):
    """Two epochs of two steps, computed again from the seed; the last 56 images are left out."""
    words = ["--epochs", 2, "--batch-size", 100, "--seed", 3, "--lr", 0.002]
    found = load(train(data_dir, tmp_path / "run", *words))
    images = F.pad(dcgan.synthetic_digits(256, 0), (2, 2, 2, 2)).unsqueeze(1) / 127.5 - 1

    torch.manual_seed(3)
    torch.randn(64, 5)  # the noise of the grids
    generator = dcgan.Generator(32, 1, 5, 2)
    discriminator = dcgan.Discriminator(32, 1, 2)
    adam_g = Adam(generator.parameters(), 0.002, betas=(0.5, 0.999))
    adam_d = Adam(discriminator.parameters(), 0.002, betas=(0.5, 0.999))
    for epoch, row in enumerate(found["metrics"], 1):
        torch.manual_seed(hash((3, epoch, 0)))
        metrics = []
        for index in torch.randperm(256).split(100)[:2]:
            fake = generator(torch.randn(100, 5))
            d_real = discriminator(images[index]).sigmoid()
            d_fake = discriminator(fake.detach()).sigmoid()
            loss_d = -(d_real.log() + (1 - d_fake).log()).mean()
            minimize(loss_d, adam_d)
            loss_g = -discriminator(fake).sigmoid().log().mean()
            minimize(loss_g, adam_g)
            metrics.append(torch.stack([loss_d, loss_g, d_real.mean(), d_fake.mean()]).tolist())
        names = ["loss_d", "loss_g", "d_real", "d_fake"]
        np.testing.assert_allclose([row[name] for name in names], np.mean(metrics, 0), rtol=1e-4)

    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(found["generator"], generator.state_dict())
    close(found["discriminator"], discriminator.state_dict())


# data


@pytest.mark.parametrize("channels, size, mode", [(3, 64, "RGB"), (1, 48, "L")])
def test_a_folder_is_trained_on_and_sampled(channels, size, mode, album, tmp_path):
    words = ["--dataset", "folder", "--data-dir", album, "--out-dir", tmp_path, *TINY]
    words += ["--channels", channels, "--image-size", size, "--batch-size", 4, "--epochs", 1]
    assert run(*words) == 0
    assert run("--sample", tmp_path, "--num-samples", 2) == 0
    image = Image.open(tmp_path / "generated" / "00001.png")
    assert image.size == (size, size)
    assert image.mode == mode


@pytest.mark.parametrize("size, margin", [(28, 0), (32, 2), (64, 18)])
def test_digits_are_padded_and_not_stretched(size, margin, data_dir):
    args = parse("--dataset", "mnist", "--data-dir", data_dir, "--image-size", size)
    padded = F.pad(dcgan.synthetic_digits(256, 0), 4 * (margin,))
    assert torch.equal(dcgan.load_images(args), padded.unsqueeze(1))


@pytest.mark.parametrize("size", [32, 64])
def test_cifar10_is_upright_and_resized(size, monkeypatch):
    data = np.zeros((5, 32, 32, 3), np.uint8)  # as torchvision holds it
    data[:, :16, :, 0] = 200  # red at the top
    data[:, :, 16:, 2] = 100  # blue at the right
    cifar10 = SimpleNamespace(data=data)
    monkeypatch.setitem(dcgan.DATASETS, "cifar10", lambda *args, **flags: cifar10)
    images = dcgan.load_images(parse("--dataset", "cifar10", "--image-size", size))
    assert images.shape == (5, 3, size, size)
    red, green, blue = images[0, :, :: size - 1, :: size - 1].tolist()
    assert red == [[200, 200], [0, 0]]
    assert green == [[0, 0], [0, 0]]
    assert blue == [[0, 100], [0, 100]]


RED, GRAY, PALE = (200, 80, 20), (109, 109, 109), (227, 167, 137)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder with images of each format, which show a square of RED, GRAY or PALE at the top left
    and are else white, and with files that cannot be read."""
    folder = tmp_path_factory.mktemp("album")
    image = Image.new("RGB", (40, 40), "white")
    image.paste(RED, (0, 0, 20, 20))
    gray = image.convert("L")
    bits = np.asarray(gray).astype(np.uint16) * 257
    half = image.convert("RGBA")
    half.putalpha(128)
    wide = Image.new("RGB", (120, 40))
    wide.paste(image, (40, 0))
    camera = image.resize((400, 400), Image.Resampling.NEAREST).rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    jpeg = {"quality": 95, "subsampling": 0}

    (folder / "0" / "deep").mkdir(parents=True)
    camera.save(folder / "0" / "deep" / "camera.jpg", **jpeg, exif=exif)
    image.convert("CMYK").save(folder / "1_cmyk.jpg", **jpeg)
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2).save(folder / "2_palette.png")
    image.save(folder / "3_animated.gif", save_all=True, append_images=[wide.crop((0, 0, 40, 40))])
    wide.save(folder / "4_wide.png")
    gray.save(folder / "5_gray.png")
    Image.fromarray(bits).save(folder / "6_16_bits.png")
    half.save(folder / "7_transparent.png")

    (folder / "8_no_image.jpg").write_text("no image")
    (folder / ".hidden").write_text("not even named")
    # Turned by 90 degrees and of the width "abc", which Pillow cannot write again.
    damaged = (
        b"Exif\0\0II*\0\x08\0\0\0\x02\0\0\x01\x02\0\x04\0\0\0abc\0\x12\x01\x03\0\x01\0\0\0\x06\0"
        b"\0\0\0\0\0\0"
    )
    image.save(folder / "8_of_bad_exif.jpg", exif=damaged)
    for name in ("9_half.jpg", "9_half.png"):
        image.save(folder / name)
        os.truncate(folder / name, os.path.getsize(folder / name) // 2)
    # This one says that it is 65,535 pixels wide and high.
    image.save(folder / "9_huge.gif")
    data = (folder / "9_huge.gif").read_bytes()
    (folder / "9_huge.gif").write_bytes(data[:6] + b"\xff\xff\xff\xff" + data[10:])
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_a_folder_are_as_they_are_seen(channels, album, capfd):
    """Files that cannot be read are named and skipped."""
    images = read(album, "--channels", channels, "--image-size", 32).float()
    colors = torch.tensor([*5 * [RED], GRAY, GRAY, PALE]).float()
    if channels == 1:
        colors = colors @ torch.tensor([[0.299], [0.587], [0.114]])
    torch.testing.assert_close(images[:, :, 8, 8], colors, rtol=0, atol=6)
    assert images[:, :, 24, 8].min() >= 249
    assert images[:, :, 8::16, 24].min() >= 249

    lines = capfd.readouterr().err.splitlines()
    bad = ["8_no_image.jpg", "8_of_bad_exif.jpg", "9_half.jpg", "9_half.png", "9_huge.gif"]
    assert [line.split(": ")[0] for line in lines] == [f"skipped {album / name}" for name in bad]


NAMED = ["F", "I", "LAB"]
SHOWN = ["1", "CMYK", "I;16", "I;16B", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", NAMED + SHOWN)
def test_grays_of_every_mode_are_right_or_the_file_is_named(mode, channels, tmp_path, capsys):
    """Of all modes in which Pillow opens files, beside a file of mode L."""
    gray = Image.fromarray(np.repeat(np.uint8([[0, 100, 255]]), 8, 1)).resize((24, 24))
    image = Image.new(mode, gray.size) if mode == "LAB" else gray.convert(mode)
    if mode.startswith("I;16"):
        wide = np.asarray(gray) * np.uint16(257)
        image = Image.frombytes(mode, gray.size, wide.astype(">u2" if "B" in mode else "<u2"))
    image.save(tmp_path / "a.tif")
    gray.save(tmp_path / "b.png")
    a, *b = read(tmp_path, "--image-size", 24, "--channels", channels).float()
    assert len(b) == (mode not in NAMED)
    assert capsys.readouterr().err.count("agreed black and white") == (mode in NAMED)
    for image in (a, *b):
        grays = image.unflatten(2, (3, 8)).mean((0, 1, 3))  # mode 1 has dots of black and white
        torch.testing.assert_close(grays, torch.tensor([0.0, 100, 255]), rtol=0, atol=3)


def test_each_folder_counts_once_and_what_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    """However many links lead to it or back. One to elsewhere is followed."""
    for folder in ("photos/deep", "photos/locked", "photos/.hidden", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (1, 1)).save(tmp_path / folder / "image.png")
    photos = tmp_path / "photos"
    (photos / "again").symlink_to(".")
    (photos / "also").symlink_to("deep")
    (photos / "deep" / "back").symlink_to("..")
    (photos / "linked").symlink_to("../elsewhere")
    (photos / "nowhere").symlink_to("gone")
    (photos / "deep" / ".notes").write_text("no image")
    scandir = os.scandir

    def refuse(folder):  # also where the tests are run by root, who may read all
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(read(photos)) == 2
    locked, nowhere = capsys.readouterr().err.splitlines()
    assert dcgan.list_files(photos) == ["also/image.png", "linked/image.png", "nowhere"]
    assert locked == f"skipped [Errno 13] Permission denied: '{photos}/locked'"
    assert nowhere.startswith(f"skipped {photos}/nowhere: ")


def test_many_files_that_are_no_images_are_five_lines_and_a_total(many, capsys):
    for n in range(1000):
        (many / f"{n}.heic").write_text("")
    assert len(read(many)) == 200
    *lines, total = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and total == "skipped files by suffix: {'.heic': 1000}"


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000)])
def test_images_of_any_shape_are_read(size, tmp_path):
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "thin.png")
    image = read(tmp_path, "--image-size", 32)[0]
    assert image[:, ::31, ::31].flatten(1).T.tolist() == 4 * [[9, 8, 7]]


@pytest.fixture
def many(tmp_path):
    """A folder of 200 images of one pixel, each brighter than the last."""
    for n in range(200):
        Image.new("L", (1, 1), n).save(tmp_path / f"{n:03d}.png")
    return tmp_path


def test_a_folder_larger_than_memory_is_read_in_order(many):
    """Its images are in a file: less than half of them are in memory at any moment."""
    tracemalloc.start()
    images = read(many, "--image-size", 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 2
    assert images[:, 0, 0, 0].tolist() == [*range(200)]


def test_a_mistake_in_the_code_that_reads_keeps_its_traceback(many, monkeypatch):
    """Although Pillow raises ValueError for bad files, too. The other files are not read."""
    tried = []

    def mistaken(image, size):
        tried.append(image)
        time.sleep(0.01)
        raise ValueError("mine")

    monkeypatch.setattr(dcgan.ImageOps, "fit", mistaken)
    with pytest.raises(ValueError, match="mine"):
        run("--dataset", "folder", "--data-dir", many, "--out-dir", many / "run")
    assert len(tried) < 100


FOLDER = "--dataset folder"
SYNTHETIC = "--dataset synthetic"
REFUSED = [
    (".hidden.png", FOLDER, "no images read from"),
    ("notes.txt", FOLDER, "no images read from"),
    ("notes.txt", f"{FOLDER} --data-dir /missing", "no images read from /missing"),
    ("notes.txt", f"{SYNTHETIC} --image-size 24", "digits need --image-size 28 or more"),
]


@pytest.mark.parametrize("file, flags, message", REFUSED)
def test_what_cannot_be_trained_on_is_refused(file, flags, message, tmp_path, capsys):
    """In one line, and nothing is written."""
    (tmp_path / "photos").mkdir()
    (tmp_path / file).write_text("no image")
    before = {*tmp_path.rglob("*")}
    words = ["--data-dir", tmp_path, "--out-dir", tmp_path / "run", "--epochs", 1, *TINY]
    assert run(*words, *flags.split()) == 1
    *skipped, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and message in last
    assert all(line.startswith("skipped ") for line in skipped)
    assert {*tmp_path.rglob("*")} == before
