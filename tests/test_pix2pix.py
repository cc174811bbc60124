"""pix2pix.py's networks, losses, steps and data. What all scripts do in a run: test_runs.py."""

import gzip
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load as load_checkpoint, run as run_script, same, write_pairs
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import pix2pix

TINY = ["--image-size", "32", "--width", "2"]
run = partial(run_script, pix2pix)


@pytest.fixture(scope="module")
def pair_dir(tmp_path_factory):
    """A folder of 8 side-by-side pairs to train on and 3 held out, and 2 test pairs that nobody may
    look at."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train", 8, 0)
    write_pairs(folder / "val", 3, 1)
    write_pairs(folder / "test", 2, 2)
    return folder


def parse(*words):
    return pix2pix.parse_args([str(word) for word in words])[0]


def load(folder, split, *flags):
    """The split's pairs at 32 pixels, in training with room for the jitter."""
    args = parse("--dataset", "folder", "--data-dir", folder, "--image-size", 32, *flags)
    pix2pix.download(args)
    return pix2pix.load_pairs(args, split == "train")[0]


def train(folder, out_dir, *flags):
    words = ["--dataset", "folder", "--data-dir", folder, "--out-dir", out_dir, *TINY, *flags]
    assert run(*words) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(pair_dir, tmp_path_factory):
    """The folder of a run of three epochs from labels to photo, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--direction", "BtoA", "--epochs", "3", "--batch-size", "2", "--lr", "0.002"]
    return train(pair_dir, out, *flags)


@pytest.fixture(scope="module")
def trained(finished):
    """Its generator, in training mode, as dropout is always on."""
    generator = pix2pix.Generator(32, 2)
    generator.load_state_dict(load_checkpoint(finished)["generator"])
    return generator


def noise(count, size=32):
    return torch.randn(count, 3, size, size)


def levels_with(kind, levels):
    """The numbers of those levels that have a module of that kind."""
    found = []
    for n, level in enumerate(levels):
        if any(isinstance(module, kind) for module in level.modules()):
            found.append(n)
    return found


# networks


def test_generator_at_256_is_the_papers_unet():
    generator, shapes = pix2pix.Generator(256, 64), []

    def note(module, inputs, output):
        shapes.append((inputs[0].shape[1], *output.shape[1:3]))

    levels = [*generator.encoder, *generator.decoder]
    for level in levels:
        level.register_forward_hook(note)
    with torch.no_grad():
        assert generator(torch.zeros(1, 3, 256, 256)).shape == (1, 3, 256, 256)

    # Channels before and after each level, and the height after it. The decoder's see the skip's
    # channels, too.
    before, after, heights = zip(*shapes)
    assert after[:8] == (64, 128, 256, 512, 512, 512, 512, 512)
    assert before[8:] == (512, 1024, 1024, 1024, 1024, 512, 256, 128)
    assert after[8:] == (512, 512, 512, 512, 256, 128, 64, 3)
    assert heights == (128, 64, 32, 16, 8, 4, 2, 1, 2, 4, 8, 16, 32, 64, 128, 256)

    # No norm on the first level, the innermost and the last; dropout on the decoder's first three.
    assert levels_with(nn.InstanceNorm2d, levels) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]
    assert levels_with(nn.Dropout, levels) == [8, 9, 10]


@pytest.mark.parametrize("size, levels", [(32, 5), (64, 6), (128, 7), (512, 8), (1024, 8)])
def test_depth_follows_the_image_size_and_channels_are_the_arguments(size, levels):
    generator = pix2pix.Generator(size, 1, source_channels=1, target_channels=2)
    assert len(generator.encoder) == len(generator.decoder) == levels
    source = noise(1, size)[:, :1]
    image = generator(source)
    assert image.shape == (1, 2, size, size)
    logits = pix2pix.Discriminator(1, source_channels=1, target_channels=2)(source, image)
    assert logits.shape == (1, 1, size // 8 - 2, size // 8 - 2)


def test_each_level_of_the_decoder_gets_the_level_of_the_encoder_of_its_size():
    torch.manual_seed(0)
    generator, x = pix2pix.Generator(64, 4).eval(), noise(1, 64)
    skips = [x]
    for level in generator.encoder:
        skips.append(level(skips[-1]))
    y = generator.decoder[0](skips[6])
    for level, skip in zip(generator.decoder[1:], skips[5:0:-1]):
        y = level(torch.cat([y, skip], 1))
    torch.testing.assert_close(generator(x), y)


def test_discriminator_is_the_papers():
    discriminator, found = pix2pix.Discriminator(64), []
    for n in levels_with(nn.Conv2d, discriminator):
        layer = discriminator[n]
        found.append((layer.in_channels, layer.out_channels, *layer.stride))
    channels = [(6, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    assert found == [(*c, s, s) for c, s in zip(channels, (2, 2, 2, 1, 1))]
    assert levels_with(nn.InstanceNorm2d, discriminator) == [3, 6, 9]
    source, image = noise(2, 256).split(1)
    assert discriminator(source, image).shape == (1, 1, 30, 30)


def test_receptive_field_is_70():
    """One logit, differentiated by every pixel; without the norms, whose statistics are the whole
    image's."""
    discriminator = pix2pix.Discriminator(2)
    for n in levels_with(nn.InstanceNorm2d, discriminator):
        discriminator[n] = nn.Identity()

    source, image = noise(2, 256).double().split(1)
    image.requires_grad_()
    discriminator.double()(source, image)[0, 0, 15, 15].backward()
    seen = image.grad[0].any(0)
    assert seen.any(0).sum() == seen.any(1).sum() == 70 and seen.sum() == 70 * 70


def test_no_output_depends_on_its_neighbours():
    torch.manual_seed(0)
    generator, discriminator, x = pix2pix.Generator(32, 4), pix2pix.Discriminator(4), noise(3)
    x[1:] *= 5
    for module in generator.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # all else as in training
    torch.testing.assert_close(generator(x)[:1], generator(x[:1]))
    torch.testing.assert_close(discriminator(x, -x)[:1], discriminator(x[:1], -x[:1]))


def test_weights_start_as_in_section_6_2():
    torch.manual_seed(0)
    layers = [*pix2pix.Generator(64, 32).modules(), *pix2pix.Discriminator(32).modules()]
    for kind, mean in ((nn.Conv2d, 0), (nn.ConvTranspose2d, 0), (nn.InstanceNorm2d, 1)):
        found = [layer for layer in layers if isinstance(layer, kind)]
        weights = torch.cat([layer.weight.flatten() for layer in found])
        assert abs(weights.mean() - mean) < 0.002 and abs(weights.std() - 0.02) < 0.001
        assert not any(layer.bias.any() for layer in found if layer.bias is not None)


# losses and steps


def test_losses_are_the_papers():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 1.0])
    d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)
    loss_d = (-torch.log(d_real).mean() - torch.log(1 - d_fake).mean()) / 2
    torch.testing.assert_close(pix2pix.discriminator_loss(real, fake), loss_d)
    torch.testing.assert_close(pix2pix.generator_loss(fake), -torch.log(d_fake).mean())

    # Of logits: never log(0).
    assert pix2pix.discriminator_loss(torch.tensor(-200.0), torch.tensor(200.0)) == 200


def test_defaults_are_the_papers():
    args = parse()
    assert (args.epochs, args.decay_epochs, args.batch_size, args.lr) == (200, 0, 1, 2e-4)
    assert (args.l1_weight, args.gan_weight, args.image_size, args.width) == (100, 1, 256, 64)


def test_first_steps_are_the_papers(pair_dir, tmp_path):
    """Two steps of three pairs, beside the same made from the seed alone: losses, and what the
    optimizers saw. The two pairs left over make no step."""
    flags = ["--epochs", 1, "--batch-size", 3, "--lr", 0.01, "--l1-weight", 3, "--gan-weight", 7]
    checkpoint = load_checkpoint(train(pair_dir, tmp_path / "run", *flags, "--no-jitter"))

    torch.manual_seed(0)
    generator, discriminator = pix2pix.Generator(32, 2), pix2pix.Discriminator(2)
    optimizer_g = torch.optim.Adam(generator.parameters(), 0.01, (0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 0.01, (0.5, 0.999))
    pairs, losses = load(pair_dir, "train", "--no-jitter"), []
    torch.manual_seed(hash((0, 1, 0)))
    for index in torch.randperm(8).split(3)[:2]:
        x, y = (pairs[index] / 127.5 - 1).unbind(1)
        fake = generator(x)
        loss_d = pix2pix.discriminator_loss(discriminator(x, y), discriminator(x, fake.detach()))
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()

        # G's step is through the D that has just made its own.
        loss_gan = pix2pix.generator_loss(discriminator(x, fake))
        loss_l1 = (fake - y).abs().mean()
        optimizer_g.zero_grad()
        (7 * loss_gan + 3 * loss_l1).backward()
        optimizer_g.step()
        losses.append([loss_d.item(), loss_gan.item(), loss_l1.item()])

    (row,) = checkpoint["metrics"]
    means = torch.tensor(losses).mean(0).tolist()
    assert [row["loss_d"], row["loss_g_gan"], row["loss_g_l1"]] == pytest.approx(means, rel=1e-4)
    # Each optimizer has seen the gradients of its own step alone.
    for name, optimizer in (("optimizer_d", optimizer_d), ("optimizer_g", optimizer_g)):
        averages, expected = checkpoint[name]["state"], optimizer.state_dict()["state"]
        torch.testing.assert_close(averages, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("epochs", [-1, 201])
def test_the_rate_never_falls_over_more_epochs_than_there_are(epochs, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--decay-epochs", epochs)
    assert capsys.readouterr().err.endswith("error: --decay-epochs must be 0 to --epochs\n")


def test_rate_is_constant_then_falls_over_the_last_epochs(pair_dir, tmp_path):
    flags = ["--epochs", 5, "--batch-size", 8, "--lr", 0.004, "--keep-every", 1]
    falling = ["--decay-epochs", 3]
    for words, rates in ((falling, [0.004, 0.004, 0.003, 0.002, 0.001]), ([], [0.004] * 5)):
        out = train(pair_dir, tmp_path / str(len(words)), *flags, *words)
        found = []
        for path in sorted(out.glob("checkpoint_*.pt")):
            kept = torch.load(path, weights_only=True)
            names = ("optimizer_d", "optimizer_g")
            found += [kept[name]["param_groups"][0]["lr"] for name in names]
        assert found[::2] == found[1::2] == pytest.approx(rates)


# held-out pairs and translation


def test_held_out_metrics_are_l1_and_psnr():
    """Of two outputs: one that is off by 1 in its lower half, one that is off by 1 everywhere."""
    first_rows = [16, 0]

    class Off(nn.Module):
        def forward(self, x):
            output = x.clone()
            output[:, :, first_rows.pop(0) :] -= 1
            return output

    pairs = torch.full((2, 2, 3, 32, 32), 255, dtype=torch.uint8)
    grid, found = pix2pix.evaluate(Off(), pairs, parse(), torch.device("cpu"))
    assert found["val_l1"] == 0.75
    assert found["val_psnr"] == pytest.approx((10 * np.log10(4 / 0.5) + 10 * np.log10(4)) / 2)
    assert grid[:, 0, 31, 0].tolist() == [1, 0, 1, 1, 0, 1]  # source, output, target, twice


def triples(pairs, generator):
    """Source, output and target of the pairs, from B to A."""
    a, b = (pairs.float() / 127.5 - 1).unbind(1)
    outputs = [pix2pix.translate(generator, source, 0) for source in b.split(1)]
    return torch.stack([b, torch.cat(outputs), a], 1)


def test_grids_are_of_the_same_held_out_pairs_every_epoch(finished, trained, pair_dir, tmp_path):
    images = triples(load(pair_dir, "val"), trained).flatten(0, 1)
    pix2pix.save_grid(images, tmp_path / "expected.png", columns=6)
    grids = [finished / "samples" / f"epoch_{n:04d}.png" for n in (1, 2, 3)]
    assert grids[2].read_bytes() == (tmp_path / "expected.png").read_bytes()

    assert len({path.read_bytes() for path in grids}) == 3


def test_held_out_pairs_are_sampled_under_their_names(finished, trained, pair_dir, tmp_path):
    """Also where a file of them is skipped."""
    expected, out = triples(load(pair_dir, "val"), trained), tmp_path / "out"
    data = Path(shutil.copytree(pair_dir, tmp_path / "data"))
    (data / "val" / "00000b.jpg").write_text("no image")
    assert run("--sample", finished, "--out-dir", out, "--data-dir", data) == 0
    pix2pix.save_grid(expected.flatten(0, 1), tmp_path / "expected.png", columns=6)
    assert (out / "generated.png").read_bytes() == (tmp_path / "expected.png").read_bytes()

    names = sorted(path.name for path in (data / "val").glob("*.png"))
    assert sorted(path.name for path in (out / "generated").iterdir()) == names
    for name, output in zip(names, expected[:, 1]):
        image = np.asarray(Image.open(out / "generated" / name))
        pixels = output.add(1).mul(127.5).permute(1, 2, 0)
        np.testing.assert_allclose(image, pixels, atol=0.51)


def outputs(finished, folder, out, *flags):
    """What --sample makes of the folder's images: name to pixels."""
    words = ["--sample", finished / "checkpoint.pt", "--input", folder, "--out-dir", out]
    assert run(*words, *flags) == 0
    files, folder = {}, out / "generated"
    for path in folder.rglob("*.*"):
        files[str(path.relative_to(folder))] = np.asarray(Image.open(path))
    return files


def test_images_are_translated_under_their_names_and_at_their_size(finished, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "deep" / "er").mkdir(parents=True)
    gray = Image.linear_gradient("L").resize((50, 40))
    for name in ("a.png", "b.gif", "b.png", "c.ppm", "deep/a.png", "deep/er/d.bmp", "e.tiff"):
        gray.save(folder / name)
    gray.save(folder / "f.JPEG")  # lossy, so not quite the same
    (folder / "0.txt").write_text("no image")

    images = outputs(finished, folder, tmp_path / "out")
    alike = ["a.png", "b.png", "b.png.png", "c.png", "deep/a.png", "deep/er/d.png", "e.png"]
    assert sorted(images) == [*alike, "f.png"]
    assert images["f.png"].shape == (40, 50, 3)
    assert all(np.array_equal(images[name], images["a.png"]) for name in alike)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped {folder}/0.txt: ")

    # Source beside output, four in a row.
    assert Image.open(tmp_path / "out" / "generated.png").size == (4 * 34 + 2, 4 * 34 + 2)
    few = outputs(finished, folder, tmp_path / "few", "--num-samples", 3)
    assert sorted(few) == alike[:3]
    (one,) = outputs(finished, folder / "deep" / "er" / "d.bmp", tmp_path / "one").items()
    assert one[0] == "d.png" and np.array_equal(one[1], images["a.png"])


def test_an_input_becomes_a_source_as_in_training(finished, pair_dir, tmp_path, monkeypatch):
    """A copy that changes source_and_target() changes it for --input, too."""
    before = outputs(finished, pair_dir / "val", tmp_path / "before")
    split = pix2pix.source_and_target
    monkeypatch.setattr(pix2pix, "source_and_target", lambda *words: [-x for x in split(*words)])
    after = outputs(finished, pair_dir / "val", tmp_path / "after")
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def test_a_sample_depends_on_its_source_and_the_seed_alone(finished, pair_dir, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(pair_dir / "train" / "00001.png", alone)
    together = outputs(finished, pair_dir / "train", tmp_path / "together")

    def translate(*flags):
        out = tmp_path / " ".join(["out", *flags])
        return outputs(finished, alone, out, *flags)["00001.png"].tolist()

    image = translate()
    assert image == together["00001.png"].tolist() != together["00000.png"].tolist()
    assert image != translate("--seed", "1")

    # Without dropout the seed means nothing.
    without = translate("--deterministic")
    assert image != without == translate("--deterministic", "--seed", "1")


# batches


@pytest.fixture
def seen(monkeypatch):
    """The sources and targets of all steps of a run."""
    found, split = [], pix2pix.source_and_target

    def watched(pairs, args):
        found.append(torch.stack(split(pairs, args), 1))
        return split(pairs, args)

    monkeypatch.setattr(pix2pix, "source_and_target", watched)
    return found


def test_jitter_is_one_crop_and_mirror_for_both_images(seen, tmp_path):
    image = Image.effect_noise((36, 36), 80)
    both = Image.new("L", (72, 36))
    both.paste(image, (0, 0))
    both.paste(image, (36, 0))
    for split, count in (("train", 800), ("val", 1)):
        (tmp_path / split).mkdir()
        for n in range(count):
            both.save(tmp_path / split / f"{n}.png")
    train(tmp_path, tmp_path / "run", "--epochs", 1, "--batch-size", 8)
    found = torch.cat([pairs for pairs in seen if len(pairs) == 8])
    assert torch.equal(found[:, 0], found[:, 1])

    # All 5 x 5 crops, the last ones too, mirrored and not, and no others.
    image = pil_to_tensor(image)[0] / 127.5 - 1
    possible = image.unfold(0, 32, 1).unfold(1, 32, 1).flatten(0, 1)
    possible = torch.cat([possible, possible.flip(-1)])
    assert same(found[:, 0, 0].unique(dim=0), possible.unique(dim=0))


@pytest.mark.parametrize("size, jittered", [(32, 36), (128, 143), (256, 286)])
def test_training_pairs_have_room_for_the_jitter_and_held_out_ones_none(pair_dir, size, jittered):
    for split, flags, side in (
        ("train", [], jittered),
        ("train", ["--no-jitter"], size),
        ("val", [], size),
    ):
        assert load(pair_dir, split, "--image-size", size, *flags).shape[1:] == (2, 3, side, side)


def test_a_is_left_and_direction_swaps(tmp_path):
    red, blue = [1, -1, -1], [-1, -1, 1]
    both = Image.new("RGB", (80, 40), "red")
    both.paste("blue", (40, 0, 80, 40))
    (tmp_path / "train").mkdir()
    both.save(tmp_path / "train" / "0.png")
    for direction, colors in (("AtoB", [red, blue]), ("BtoA", [blue, red])):
        source, target = pix2pix.source_and_target(
            load(tmp_path, "train"), parse("--direction", direction)
        )
        assert [source[0, :, 5, 5].tolist(), target[0, :, 5, 5].tolist()] == colors

    directions = [parse("--dataset", name).direction for name in ("facades", "maps", "folder")]
    assert [parse().direction, *directions] == ["BtoA", "BtoA", "AtoB", "AtoB"]


# folders of pairs


def test_no_held_out_pair_is_trained_on(pair_dir, tmp_path):
    shutil.copytree(pair_dir, tmp_path, dirs_exist_ok=True)
    parts = [load(tmp_path, split, "--no-jitter") for split in ("train", "val")]
    shutil.rmtree(tmp_path / "val")  # then it is test/ that is held out
    parts.append(load(tmp_path, "val"))
    assert [len(part) for part in parts] == [8, 3, 2]
    assert len(torch.cat(parts).unique(dim=0)) == 13


def two_folders(folder, a, b):
    """Makes A/ and B/ of as many pictures, one bluer than the other."""
    for side, count, blue in ((folder / "A", a, 0), (folder / "B", b, 200)):
        side.mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (9, 9), (n, 0, blue)).save(side / f"{n:02}.png")


def test_two_folders_are_paired_by_name_and_every_tenth_is_held_out(tmp_path):
    """Hidden files and those of Windows do no harm, also if there are fewer than ten pairs."""
    two_folders(tmp_path, 20, 20)
    for name in (".notes", "Thumbs.db", "desktop.ini"):
        (tmp_path / "A" / name).write_text("no image, and no partner")
    parts = [load(tmp_path, split)[..., 5, 5].tolist() for split in ("val", "train")]
    assert parts[0] == [[[n, 0, 0], [n, 0, 200]] for n in (9, 19)]
    assert parts[1] == [[[n, 0, 0], [n, 0, 200]] for n in range(19) if n != 9]

    for path in tmp_path.glob("*/?[4-9].png"):
        path.unlink()
    assert [len(load(tmp_path, split)) for split in ("val", "train")] == [1, 7]


@pytest.mark.parametrize(
    "layout",
    [
        ("A/train", "A/val", "B/train", "B/val"),
        ("train/A", "train/B", "val/A", "val/B"),
        ("trainA", "trainB", "valA", "valB"),
        ("A", "B", "train", "val"),
        ("photos",),
        ("train",),
        ("val",),
    ],
)
def test_other_layouts_are_refused_by_a_line_that_shows_ours(layout, tmp_path):
    for part in layout:
        write_pairs(tmp_path / part, 2, 0)
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, "train")
        load(tmp_path, "val")
    for words in (str(tmp_path), "train/ and val/ (or test/)", "A/ and B/"):
        assert words in stop.value.code
    assert "\n" not in stop.value.code


def test_a_square_picture_is_told_once(tmp_path, capsys):
    write_pairs(tmp_path / "train", 2, 0)
    for name in ("b.png", "c.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / "train" / name)
    assert len(load(tmp_path, "train")) == 4
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {tmp_path}/train/b.png is square") and err.count("\n") == 1


def test_files_of_all_kinds_are_read(tmp_path, capsys):
    """What looks the same to a person is the same: files of A beside plain ones of B. Values that
    have no agreed black and white are named and left out."""
    a, b = tmp_path / "A", tmp_path / "B"
    two_folders(tmp_path, 0, 0)
    gray = Image.linear_gradient("L").resize((50, 40))
    turned = Image.Exif()
    turned[0x0112] = 8  # to be turned by 90 degrees counter-clockwise
    gray.convert("P").save(a / "palette.png")
    gray.convert("LA").save(a / "opaque.png")
    gray.convert("CMYK").save(a / "cmyk.tif")
    gray.rotate(-90, expand=True).save(a / "turned.png", exif=turned)
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) << 8)
    sixteen.save(a / "sixteen.png")
    sixteen.save(a / "sixteen.pgm")
    values = np.arange(2000).reshape(40, 50)
    signed = Image.fromarray((values - 1000).astype(np.int16).view(np.uint16))
    signed.save(a / "signed.tif", tiffinfo={339: 2})
    for kind in ("int32", "float32"):
        Image.fromarray(values.astype(kind)).save(a / f"{kind}.tif")
    for path in a.iterdir():
        gray.convert("RGB").save(b / path.name)

    # What is transparent is white, whatever its colour, and half of black is gray.
    Image.new("RGBA", (9, 9), "#ff000000").save(a / "clear.png")
    Image.new("RGB", (9, 9), "#ffffff").save(b / "clear.png")
    Image.new("RGBA", (9, 9), "#00000080").save(a / "half.png")
    Image.new("RGB", (9, 9), "#7f7f7f").save(b / "half.png")

    pairs = torch.cat([load(tmp_path, "train", "--no-jitter"), load(tmp_path, "val")])
    assert len(pairs) == 8 and torch.equal(pairs[:, 0], pairs[:, 1])
    assert capsys.readouterr().err.count("no agreed black and white") == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_files_side_by_side_are_named_and_skipped(split, pair_dir, tmp_path, capsys):
    shutil.copytree(pair_dir, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / split
    Image.new("RGB", (81, 40)).save(folder / "00000b.png")
    (folder / "00001b.png").write_bytes((folder / "00000.png").read_bytes()[:-1000])
    assert torch.equal(load(tmp_path, split), load(pair_dir, split))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"skipped {folder}/00000b.png: ") and "(41, 40)" in first
    assert second.startswith(f"skipped {folder}/00001b.png: ")


def test_broken_pairs_in_two_folders_are_named_and_skipped(tmp_path, capsys):
    two_folders(tmp_path, 6, 6)
    Image.new("RGB", (8, 9)).save(tmp_path / "B" / "01.png")
    (tmp_path / "B" / "03.png").write_bytes(b"")
    (tmp_path / "A" / "00.png").unlink()
    assert load(tmp_path, "train")[:, 0, 0, 0, 0].tolist() == [2, 4]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"skipped {tmp_path}/{name}.png" for name in ("A/00", "A/01", "B/03")
    ]


def test_what_is_missing_in_a_folder_is_one_line(pair_dir, tmp_path, capsys):
    shutil.copytree(pair_dir / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "notes.txt").write_text("no image")
    words = ["--dataset", "folder", "--data-dir", tmp_path, "--out-dir", tmp_path / "run"]
    assert run(*words, *TINY) == 1
    skipped, line = capsys.readouterr().err.splitlines()
    assert skipped.startswith("skipped ")
    assert line.startswith(f"error: no images read from {tmp_path}/val")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, folder", [("--input", "gone"), ("--input", "empty"), ("--data-dir", "gone")]
)
def test_nothing_to_translate_is_an_error(flag, folder, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert run("--sample", finished / "checkpoint.pt", "--out-dir", "out", flag, folder) == 1
    *skipped, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and folder in line
    assert all("No such file" in line for line in skipped)  # where "gone" is walked through
    assert not list(Path().glob("out/*"))


@pytest.mark.parametrize("owner, name", [(pix2pix, "to_square"), (Image.Image, "convert")])
def test_a_mistake_in_a_reader_has_its_own_traceback(
    owner, name, finished, pair_dir, tmp_path, monkeypatch
):
    """It is not taken for a broken file: here one line of read_pair and one of read_image."""

    def mistake(*args):
        raise ValueError("my own mistake")

    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises(ValueError, match="my own mistake"):
        load(pair_dir, "train")
    with pytest.raises(ValueError, match="my own mistake"):
        outputs(finished, pair_dir / "val", tmp_path / "out")


# sets


def publish(path, *names):
    """Writes an archive of small pairs, of noise, to `path`."""
    for name in names:
        Image.effect_noise((16, 8), 50).save(path.parent / "pair.png")
        with tarfile.open(path.parent / "all.tar", "a") as tar:
            tar.add(path.parent / "pair.png", name)
    path.write_bytes(gzip.compress((path.parent / "all.tar").read_bytes()))


FACADES = ["facades/train/1.png", "facades/train/2.png", "facades/val/1.png"]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Where facades are downloaded from."""
    monkeypatch.setattr(pix2pix, "URL", f"file://{tmp_path}/{{}}.tar.gz")
    return tmp_path / "facades.tar.gz"


def test_facades_are_whole_or_not_there(archive, tmp_path):
    """Of an archive that ends early, wherever it does; but for the tape's end, of zeros."""
    publish(archive, *FACADES)
    whole = archive.read_bytes()
    args = parse("--dataset", "facades", "--data-dir", tmp_path / "data", *TINY)
    for length in range(0, len(whole) - 100, 9):
        archive.write_bytes(whole[:length])
        with pytest.raises(SystemExit, match=f"file://{archive}"):
            pix2pix.download(args)
        assert not list(tmp_path.glob("data/*"))

    archive.write_bytes(whole)
    pix2pix.download(args)
    archive.unlink()  # it is not needed again
    pix2pix.download(args)
    assert [len(pix2pix.load_pairs(args, train)[1]) for train in (True, False)] == [2, 1]


def test_an_archive_writes_nothing_outside_its_folder(archive, tmp_path):
    publish(archive, *FACADES, "../../climbed.png")
    args = parse("--dataset", "facades", "--data-dir", tmp_path / "data", *TINY)
    with pytest.raises(SystemExit, match="climbed.png"):
        pix2pix.download(args)
    assert not list(tmp_path.rglob("climbed.png"))


def test_synthetic_facades_repeat_and_their_labels_are_cmps():
    pairs = pix2pix.synthetic_facades(6, 256, 3)
    assert torch.equal(pairs, pix2pix.synthetic_facades(6, 256, 3))
    both = torch.cat([pairs, pix2pix.synthetic_facades(6, 256, 4)])
    assert len(both.unique(dim=0)) == 12

    colors = {0x0000DE, 0x0030FF, 0x0080FF}  # of background, facade and window
    for r, g, b in pairs[:, 1].int():
        assert {*((r << 16) + (g << 8) + b).unique().tolist()} == colors
