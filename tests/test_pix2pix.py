import csv
import io
import shutil
import socket
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import result, run as run_script, same, write_pairs
from PIL import Image
from torch import nn

import pix2pix

TINY = ["--image-size", "32", "--width", "2", "--batch-size", "2", "--lr", "0.002"]
run = partial(run_script, pix2pix)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of 8 side-by-side pairs to train on and 3 held out, and 2 test pairs that nobody may look at."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, count, seed in (("train", 8, 0), ("val", 3, 1), ("test", 2, 2)):
        write_pairs(folder / split, count, seed)
    return folder


def train(data_dir, out_dir, *flags):
    """A run of a second or two on the tiny folder: its folder."""
    assert run("--dataset", "folder", "--data-dir", data_dir, "--out-dir", out_dir, *TINY, *flags) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of three epochs, not to be changed."""
    return train(data_dir, tmp_path_factory.mktemp("finished") / "run", "--epochs", "3")


def pair(seed=0, size=32):
    """Source and target of a synthetic pair, each (1, 3, size, size)."""
    return pix2pix.split_pairs(pix2pix.resize(pix2pix.synthetic_facades(1, seed)[0], [size, size])[None], "BtoA")


# networks


def test_generator_at_256_is_the_papers_unet():
    generator, shapes = pix2pix.Generator(256, 64, "batch"), []
    for level in (*generator.encoder, *generator.decoder):
        level.register_forward_hook(lambda module, inputs, output: shapes.append((*inputs[0].shape[1:3], *output.shape[1:3])))
    with torch.no_grad():
        assert generator(torch.zeros(1, 3, 256, 256)).shape == (1, 3, 256, 256)
    down = [(3, 256, 64, 128), (64, 128, 128, 64), (128, 64, 256, 32), (256, 32, 512, 16), (512, 16, 512, 8), (512, 8, 512, 4)]
    down += [(512, 4, 512, 2), (512, 2, 512, 1)]
    up = [(512, 1, 512, 2), (1024, 2, 512, 4), (1024, 4, 512, 8), (1024, 8, 512, 16), (1024, 16, 256, 32), (512, 32, 128, 64)]
    assert shapes == [*down, *up, (256, 64, 64, 128), (128, 128, 3, 256)]
    names = [[type(module).__name__ for module in level] for level in (*generator.encoder, *generator.decoder)]
    assert names[0] == ["Conv2d"] and names[7] == ["LeakyReLU", "Conv2d"]  # no norm on the first, nor on 1x1
    assert names[1:7] == [["LeakyReLU", "Conv2d", "BatchNorm2d"]] * 6
    assert names[8:11] == [["ReLU", "ConvTranspose2d", "BatchNorm2d", "Dropout"]] * 3
    assert names[11:] == [["ReLU", "ConvTranspose2d", "BatchNorm2d"]] * 4 + [["ReLU", "ConvTranspose2d", "Tanh"]]
    assert round(sum(p.numel() for p in generator.parameters()) / 1e6, 1) == 54.4
    assert all(m.negative_slope == 0.2 for m in generator.modules() if isinstance(m, nn.LeakyReLU))
    assert {m.p for m in generator.modules() if isinstance(m, nn.Dropout)} == {0.5}


@pytest.mark.parametrize("size, levels", [(32, 5), (64, 6), (128, 7), (256, 8), (512, 8)])
def test_depth_follows_the_image_size(size, levels):
    generator = pix2pix.Generator(size, 1, "instance")
    assert len(generator.encoder) == len(generator.decoder) == levels
    assert generator(torch.randn(1, 3, size, size)).shape == (1, 3, size, size)


def test_discriminator_is_the_70x70_patchgan():
    discriminator, shapes = pix2pix.Discriminator(64, "batch"), []
    for module in discriminator:
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size == (4, 4)
            module.register_forward_hook(lambda module, inputs, output: shapes.append((*module.stride, *output.shape[1:])))
    with torch.no_grad():
        discriminator(torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256))
    assert shapes == [(2, 2, 64, 128, 128), (2, 2, 128, 64, 64), (2, 2, 256, 32, 32), (1, 1, 512, 31, 31), (1, 1, 1, 30, 30)]
    assert round(sum(p.numel() for p in discriminator.parameters()) / 1e6, 2) == 2.77
    names = [type(module).__name__ for module in discriminator]
    assert names == ["Conv2d", "LeakyReLU"] + ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3 + ["Conv2d"]


def test_receptive_field_is_70(monkeypatch):
    """One logit, differentiated by every pixel; without the norms, whose statistics are the whole image's."""
    monkeypatch.setattr(pix2pix, "normalization", lambda norm, channels: nn.Identity())
    discriminator, source = pix2pix.Discriminator(2, "batch").double(), torch.randn(1, 3, 256, 256, dtype=torch.double)
    image = source.clone().requires_grad_()
    discriminator(source, image)[0, 0, 15, 15].backward()
    seen = image.grad[0].abs().sum(0) > 0
    assert [line.sum() for line in (seen.any(0), seen.any(1))] == [70, 70]
    assert seen.sum() == 70 * 70


def test_discriminator_sees_the_source():
    torch.manual_seed(0)
    discriminator, (source, image) = pix2pix.Discriminator(4, "batch"), pair()
    assert not torch.allclose(discriminator(source, image), discriminator(pair(1)[0], image), rtol=0.1)
    assert not torch.allclose(discriminator(source, image), discriminator(image, source), rtol=0.1)


def test_skips_carry():
    """Decoder level j gets the output of encoder level n - 1 - j beside its own; cut one, and the picture changes."""
    torch.manual_seed(0)
    generator, x, seen = pix2pix.Generator(64, 4, "batch").eval(), torch.randn(1, 3, 64, 64), {}
    hooks = [level.register_forward_hook(lambda module, _, output: seen.update({module: output})) for level in generator.encoder]
    hooks += [level.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})) for level in generator.decoder]
    whole = generator(x)
    for hook in hooks:
        hook.remove()
    for j, level in enumerate(generator.decoder):
        if j == 0:
            assert torch.equal(seen[level], seen[generator.encoder[5]])
            continue
        skip = seen[level].chunk(2, 1)[1]
        assert torch.equal(skip, seen[generator.encoder[5 - j]])
        cut = level.register_forward_pre_hook(lambda module, inputs: torch.cat([inputs[0].chunk(2, 1)[0], 0 * skip], 1))
        assert (generator(x) - whole).abs().max() > 1e-4, j
        cut.remove()


def test_weights_start_as_in_section_6_2():
    torch.manual_seed(0)
    modules = [*pix2pix.Generator(64, 32, "batch").modules(), *pix2pix.Discriminator(32, "instance").modules()]
    modules = [module for module in modules if getattr(module, "weight", None) is not None]
    for module in modules:
        n, mean = module.weight.numel(), 0.0 if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) else 1.0
        assert abs(module.weight.mean() - mean) < 5 * 0.02 / n**0.5
        assert abs(module.weight.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
        assert module.bias is None or module.bias.abs().max() == 0
    assert len(modules) == 6 + 4 + 6 + 5 + 5 + 3


def test_batch_and_instance_norm_are_the_same_for_one_image_and_differ_for_two():
    x = torch.randn(2, 5, 6, 6) * torch.tensor([1.0, 3.0])[:, None, None, None]
    for mode in (True, False):  # training and eval mode
        batch, instance = (pix2pix.normalization(norm, 5).train(mode) for norm in ("batch", "instance"))
        torch.testing.assert_close(batch(x[:1]), instance(x[:1]))
        assert not torch.allclose(batch(x), instance(x), atol=0.1)
    torch.testing.assert_close(instance(x)[:1], instance(x[:1]))


# losses


def test_losses_are_the_papers():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 1.0])
    d = lambda logits: 1 / (1 + torch.exp(-logits))
    expected = (-torch.log(d(real)).mean() - torch.log(1 - d(fake)).mean()) / 2
    torch.testing.assert_close(pix2pix.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(pix2pix.generator_loss(fake), -torch.log(d(fake)).mean())
    assert pix2pix.discriminator_loss(torch.tensor([-200.0]), torch.tensor([200.0])) == 200  # logits, never log(0)


# jitter and direction


def test_jitter_is_the_same_for_both_images():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 36, 36), dtype=torch.uint8)
    pairs = torch.stack([image, image]).expand(600, -1, -1, -1, -1)
    crops = pix2pix.jitter(pairs, 32)
    assert crops.shape == (600, 2, 3, 32, 32) and torch.equal(crops[:, 0], crops[:, 1])
    possible = {}  # all 5 x 5 offsets, the last ones too, mirrored and not
    for y in range(5):
        for x in range(5):
            crop = image[:, y : y + 32, x : x + 32]
            possible |= {crop.numpy().tobytes(): 0, crop.flip(-1).numpy().tobytes(): 0}
    for crop in crops[:, 0]:
        possible[crop.contiguous().numpy().tobytes()] += 1
    assert len(possible) == 50 and min(possible.values()) >= 1


@pytest.mark.parametrize("size, jittered", [(32, 36), (64, 72), (128, 143), (256, 286), (512, 572)])
def test_training_pairs_have_room_for_the_jitter_and_held_out_ones_none(data_dir, size, jittered):
    command = ["--dataset", "folder", "--data-dir", str(data_dir), "--image-size", str(size)]
    for flags, split, expected in (((), "train", jittered), ((), "val", size), (("--no-jitter",), "train", size)):
        pairs = pix2pix.load_pairs(pix2pix.parse_args([*command, *flags]), split, torch.device("cpu"))
        assert pairs.shape == (8 if split == "train" else 3, 2, 3, expected, expected) and pairs.dtype == torch.uint8


def test_a_is_left_and_direction_swaps(tmp_path):
    (tmp_path / "train").mkdir()
    both = Image.new("RGB", (80, 40), (255, 0, 0))
    both.paste((0, 0, 255), (40, 0, 80, 40))
    both.save(tmp_path / "train" / "0.png")
    (tmp_path / "train" / "notes.txt").write_text("named, and left out")
    for direction, source_color in (("AtoB", [1, -1, -1]), ("BtoA", [-1, -1, 1])):
        args = pix2pix.parse_args(["--dataset", "folder", "--data-dir", str(tmp_path), "--image-size", "32", "--direction", direction])
        pairs = pix2pix.load_pairs(args, "train", torch.device("cpu"))
        ((source, target),) = pix2pix.batches(pairs, args, torch.device("cpu"))
        assert source.shape == target.shape == (1, 3, 32, 32)
        assert source[0, :, 5, 5].tolist() == source_color and target[0, :, -1, -1].tolist() == source_color[::-1]


def test_defaults_are_the_papers_and_the_designs(finished):
    args = pix2pix.parse_args([])
    assert (args.epochs, args.decay_epochs, args.batch_size, args.lr, args.l1_weight, args.gan_weight) == (200, 0, 1, 2e-4, 100, 1)
    assert (args.image_size, args.width, args.norm, args.jitter, args.seed, args.bf16) == (256, 64, "batch", True, 0, False)
    names = {None: "BtoA", "facades": "BtoA", "synthetic": "BtoA", "maps": "AtoB", "folder": "AtoB"}
    for name, direction in names.items():
        assert pix2pix.parse_args(["--dataset", name] if name else []).direction == direction
    for name in ("optimizer_g", "optimizer_d"):
        assert pix2pix.load_checkpoint(finished / "checkpoint.pt")[name]["param_groups"][0]["betas"] == (0.5, 0.999)


# the training loop


def test_first_step_is_the_papers(data_dir, tmp_path):
    """One step over all 8 pairs, computed again from the seed alone; the rate is too small for G to see D's step."""
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--batch-size", "8", "--lr", "1e-12")
    args = pix2pix.parse_args(["--dataset", "folder", "--data-dir", str(data_dir), "--image-size", "32"])
    pairs = pix2pix.load_pairs(args, "train", torch.device("cpu"))
    torch.manual_seed(0)
    generator, discriminator = pix2pix.Generator(32, 2, "batch"), pix2pix.Discriminator(2, "batch")
    x, y = (pix2pix.jitter(pairs[torch.randperm(8)], 32) / 127.5 - 1).unbind(1)
    fake = generator(x)
    d_real, d_fake = torch.sigmoid(discriminator(x, y)), torch.sigmoid(discriminator(x, fake))
    loss_d = -(torch.log(d_real).mean() + torch.log(1 - d_fake).mean()) / 2
    expected = [loss_d.item(), -torch.log(d_fake).mean().item(), (fake - y).abs().mean().item()]
    (row,) = pix2pix.load_checkpoint(out / "checkpoint.pt")["metrics"]
    np.testing.assert_allclose(row[1:4], expected, rtol=1e-4)
    assert row[6] * row[7] == pytest.approx(8)  # images/s times seconds


@pytest.mark.parametrize("l1, gan", [(100, 1), (100, 0), (0, 1), (3, 7)])
def test_generator_descends_the_weighted_sum(l1, gan, data_dir, tmp_path, monkeypatch):
    """The gradient of G's first step, beside the two losses' own; without the GAN term D stays as it began."""
    grads = []

    class Adam(torch.optim.Adam):
        def step(self):
            grads.append([p.grad.clone() for p in self.param_groups[0]["params"]])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    flags = ["--epochs", "1", "--batch-size", "8", "--lr", "1e-12", "--l1-weight", str(l1), "--gan-weight", str(gan)]
    out = train(data_dir, tmp_path / "run", *flags)
    args = pix2pix.parse_args(["--dataset", "folder", "--data-dir", str(data_dir), "--image-size", "32"])
    pairs = pix2pix.load_pairs(args, "train", torch.device("cpu"))
    torch.manual_seed(0)
    generator, discriminator = pix2pix.Generator(32, 2, "batch"), pix2pix.Discriminator(2, "batch")
    x, y = (pix2pix.jitter(pairs[torch.randperm(8)], 32) / 127.5 - 1).unbind(1)
    fake = generator(x)
    loss = l1 * (fake - y).abs().mean() - gan * torch.log(torch.sigmoid(discriminator(x, fake))).mean()
    for got, expected in zip(grads[-1], torch.autograd.grad(loss, list(generator.parameters()))):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert len(grads) == (2 if gan else 1)
    saved = pix2pix.load_checkpoint(out / "checkpoint.pt")
    assert gan or same(saved["discriminator"], dict(discriminator.state_dict())) and saved["metrics"][0][1:3] == [0, 0]


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
    assert wrong == [] and order == [1, 0] * 8  # D then G, four batches of two an epoch


def test_no_held_out_image_is_trained_on(data_dir, tmp_path, monkeypatch):
    seen, splits = [], []
    split_pairs = pix2pix.split_pairs
    monkeypatch.setattr(pix2pix, "split_pairs", lambda pairs, direction: seen.append(pairs) or split_pairs(pairs, direction))
    train(data_dir, tmp_path / "run", "--epochs", "1", "--no-jitter")
    for split, batch in (("train", seen[:4]), ("val", seen[4:])):  # four steps of two, then the held-out ones one by one
        files = pix2pix.PairFiles(pix2pix.find_pairs(data_dir, split), 32)
        splits.append({pair.numpy().tobytes() for pair in files})
        assert {pair.numpy().tobytes() for pair in torch.cat(batch)} == splits[-1]
    assert [len(part) for part in splits] == [8, 3] and not splits[0] & splits[1]
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val")  # then it is test/ that is held out
    assert [path.parent.name for (path,) in pix2pix.find_pairs(tmp_path / "data", "val")] == ["test"] * 2


def test_two_folders_with_splits_of_their_own_keep_them(tmp_path):
    for side in "AB":
        for split, count in (("train", 12), ("test", 3)):
            (tmp_path / side / split).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / side / split / f"{n}.png")
    for split, folder, count in (("train", "train", 12), ("val", "test", 3)):
        pairs = pix2pix.find_pairs(tmp_path, split)
        assert len(pairs) == count and {path.parent.name for pair in pairs for path in pair} == {folder}
        assert all((a.parent.parent.name, b.parent.parent.name, a.name) == ("A", "B", b.name) for a, b in pairs)


def test_two_folders_are_paired_by_name_and_every_tenth_is_held_out(tmp_path):
    for side in "AB":
        (tmp_path / side / "deep").mkdir(parents=True)
        for n in range(20):
            Image.new("RGB", (40, 40), (n, 0, 200 if side == "B" else 0)).save(tmp_path / side / "deep" / f"{n:02}.png")
    train_pairs, held_out = (pix2pix.find_pairs(tmp_path, split) for split in ("train", "val"))
    assert [a.name for a, b in held_out] == ["09.png", "19.png"] and len(train_pairs) == 18
    assert not set(train_pairs) & set(held_out)
    for n, pair in enumerate(pix2pix.PairFiles(train_pairs, 32)):
        assert pair[0, 0, 5, 5] == pair[1, 0, 5, 5] == int(train_pairs[n][0].stem) and pair[:, 2, 5, 5].tolist() == [0, 200]
    for n in range(4, 20):
        for side in "AB":
            (tmp_path / side / "deep" / f"{n:02}.png").unlink()
    parts = [pix2pix.find_pairs(tmp_path, split) for split in ("train", "val")]  # fewer than ten: one is held out
    assert [len(part) for part in parts] == [3, 1] and not set(parts[0]) & set(parts[1])


def test_overfits_one_pair(tmp_path):
    """120 steps on copies of one pair."""
    write_pairs(tmp_path / "train", 1, 0)
    for n in range(1, 40):
        shutil.copy(tmp_path / "train" / "00000.png", tmp_path / "train" / f"{n:05d}.png")
    write_pairs(tmp_path / "val", 1, 0)
    flags = ["--image-size", "32", "--width", "16", "--batch-size", "1", "--lr", "0.001", "--no-jitter", "--direction", "BtoA"]
    assert run("--dataset", "folder", "--data-dir", tmp_path, "--out-dir", tmp_path / "run", *flags, "--epochs", "3") == 0
    (*_, row) = csv.DictReader(open(tmp_path / "run" / "metrics.csv"))
    assert float(row["loss_g_l1"]) < 0.06 and float(row["val_l1"]) < 0.06 and float(row["val_psnr"]) > 27


def test_rate_is_constant_then_falls_over_the_last_epochs(data_dir, tmp_path, monkeypatch):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    train(data_dir, tmp_path / "run", "--epochs", "5", "--decay-epochs", "3", "--lr", "0.004", "--batch-size", "8")
    assert rates[::2] == rates[1::2] == pytest.approx([0.004, 0.004, 0.003, 0.002, 0.001])
    rates.clear()
    train(data_dir, tmp_path / "constant", "--epochs", "2", "--batch-size", "8")
    assert rates == [0.002] * 4


def test_held_out_metrics_are_l1_and_psnr(monkeypatch):
    """Of outputs that are off by a known amount: 1 in the lower half, then 1 everywhere; then not at all."""
    pairs, rows = torch.full((2, 2, 3, 32, 32), 255, dtype=torch.uint8), [16, 0]

    def translate(generator, source, seed):
        output, first = source.clone(), rows.pop(0)
        output[:, :, first:] -= 1
        return output

    monkeypatch.setattr(pix2pix, "translate", translate)
    args = pix2pix.parse_args(["--image-size", "32"])
    grid, l1, psnr = pix2pix.evaluate(None, pairs, args, torch.device("cpu"))
    assert l1 == pytest.approx(0.75) and psnr == pytest.approx((10 * np.log10(4 / 0.5) + 10 * np.log10(4)) / 2)
    assert grid.shape == (6, 3, 32, 32) and grid[:, 0, 31, 0].tolist() == [1, 0, 1, 1, 0, 1]  # source, output, target
    rows += [32, 32]
    assert pix2pix.evaluate(None, pairs, args, torch.device("cpu"))[1] == 0  # and a PSNR that is finite
    rows += [32, 32]
    assert np.isfinite(pix2pix.evaluate(None, pairs, args, torch.device("cpu"))[2])


def test_evaluation_leaves_the_training_as_it_was_and_repeats(data_dir):
    torch.manual_seed(0)
    generator = pix2pix.Generator(32, 4, "batch")
    before, rng = {k: v.clone() for k, v in generator.state_dict().items()}, torch.get_rng_state()
    first = pix2pix.translate(generator, pair()[0], 0)
    torch.rand(5)
    assert torch.equal(first, pix2pix.translate(generator, pair()[0], 0)) and not first.requires_grad
    torch.set_rng_state(rng)
    pix2pix.translate(generator, pair()[0], 7)
    assert same(before, dict(generator.state_dict())) and torch.equal(rng, torch.get_rng_state()) and generator.training


def test_grid_is_of_the_same_held_out_pairs_every_epoch(finished, data_dir):
    """Rows of two triples; of each the source and the target stay, and the output is the checkpoint's at that time."""
    grids = [np.asarray(Image.open(finished / "samples" / f"epoch_000{n}.png")) for n in (1, 2, 3)]
    assert grids[0].shape == (2 * 34 + 2, 6 * 34 + 2, 3)
    cell = lambda grid, n: grid[2 + 34 * (n // 6) : 34 + 34 * (n // 6), 2 + 34 * (n % 6) : 34 + 34 * (n % 6)].astype(int)
    files = pix2pix.PairFiles(pix2pix.find_pairs(data_dir, "val"), 32)
    generator = pix2pix.Generator(32, 2, "batch")
    generator.load_state_dict(pix2pix.load_checkpoint(finished / "checkpoint.pt")["generator"])
    for n in range(3):
        for grid in grids:
            for place, image in ((3 * n, files[n][0]), (3 * n + 2, files[n][1])):
                assert np.abs(cell(grid, place) - image.permute(1, 2, 0).numpy()).max() <= 1
        assert not np.array_equal(cell(grids[0], 3 * n + 1), cell(grids[2], 3 * n + 1))
        output = pix2pix.translate(generator, pix2pix.to_floats(files[n][:1]), 0)
        expected = output[0].add(1).mul(127.5).permute(1, 2, 0).numpy()
        assert np.abs(cell(grids[2], 3 * n + 1) - expected).max() <= 1.01


def test_metrics_are_what_was_promised(finished):
    rows = list(csv.DictReader(open(finished / "metrics.csv")))
    names = ["epoch", "loss_d", "loss_g_gan", "loss_g_l1", "val_l1", "val_psnr", "images_per_second", "seconds"]
    assert list(rows[0]) == names and [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert 0 < float(rows[0]["seconds"]) < float(rows[1]["seconds"]) < float(rows[2]["seconds"])
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [f"epoch_000{n}.png" for n in (1, 2, 3)]


def test_one_seed_repeats_and_two_differ(data_dir, finished, tmp_path):
    assert same(result(train(data_dir, tmp_path / "again", "--epochs", "3")), result(finished))
    other = result(train(data_dir, tmp_path / "other", "--epochs", "3", "--seed", "1"))
    assert not same(other["checkpoint"]["generator"], result(finished)["checkpoint"]["generator"])


def test_losses_in_bf16_stay_near_float32(data_dir, tmp_path):
    runs = [train(data_dir, tmp_path / f"run{flag}", "--epochs", "2", "--lr", "0.0002", flag) for flag in ("--bf16", "--no-bf16")]
    bf16, float32 = ([row[1:] for row in result(out)["checkpoint"]["metrics"]] for out in runs)
    assert not same(bf16, float32)
    np.testing.assert_allclose(bf16, float32, rtol=0.02, atol=0.02)


# interrupted and resumed


def test_resumed_is_uninterrupted_to_the_bit(data_dir, finished, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1")
    assert run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
    assert run("--resume", out / "checkpoint.pt", "--epochs", "3") == 0
    assert same(result(out), result(finished))
    seconds = [row[-1] for row in pix2pix.load_checkpoint(out / "checkpoint.pt")["metrics"]]
    assert seconds == sorted(seconds)  # summed over the runs, too


def test_a_finished_run_stays_as_it_is(finished, capsys):
    before = result(finished)
    assert run("--resume", finished / "checkpoint.pt") == 0
    assert "raise --epochs" in capsys.readouterr().out and same(result(finished), before)


def test_resumes_where_the_weights_lie_otherwise_in_memory(data_dir, tmp_path, monkeypatch):
    """As a run of a GPU does on a CPU, whose fused Adam would pair its averages with other weights than theirs."""
    with monkeypatch.context() as patch:
        patch.setattr(pix2pix, "memory_format", lambda device: torch.channels_last)
        out = train(data_dir, tmp_path / "run", "--epochs", "1")
    saved, seen = pix2pix.load_checkpoint(out / "checkpoint.pt"), []

    class Adam(torch.optim.Adam):
        def step(self):
            seen.append([(p.stride(), state["exp_avg"].stride(), state["exp_avg"].clone()) for p, state in self.state.items()])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    assert run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
    for averages, name in zip(seen, ("optimizer_d", "optimizer_g")):
        for (of_weight, of_average, average), state in zip(averages, saved[name]["state"].values()):
            assert of_weight == of_average and torch.equal(average, state["exp_avg"])
    assert any(state["exp_avg"].stride() != average[1] for average, state in zip(seen[1], saved["optimizer_g"]["state"].values()))


def test_resume_keeps_what_was_not_said_and_takes_what_was(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--lr", "0.001")
    assert run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
    state = pix2pix.load_checkpoint(out / "checkpoint.pt")
    assert state["epoch"] == 2 and state["args"]["lr"] == state["optimizer_g"]["param_groups"][0]["lr"] == 0.001
    assert run("--resume", out / "checkpoint.pt", "--epochs", "3", "--lr", "0.5") == 0
    state = pix2pix.load_checkpoint(out / "checkpoint.pt")
    assert state["args"]["lr"] == state["optimizer_g"]["param_groups"][0]["lr"] == state["optimizer_d"]["param_groups"][0]["lr"] == 0.5


# run folders


def test_no_run_overwrites_another(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "folder", "--data-dir", data_dir, *TINY, "--epochs", "1"]
    assert [run(*flags) for _ in range(3)] == [0, 0, 0]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["pix2pix", "pix2pix-2", "pix2pix-3"]
    before = Path("runs/pix2pix/checkpoint.pt").read_bytes()
    assert run(*flags, "--out-dir", "runs/pix2pix") == 2
    assert "runs/pix2pix holds a run" in capsys.readouterr().err
    shutil.copy("runs/pix2pix/checkpoint.pt", "runs/pix2pix/kept.pt")  # going on from a copy would overwrite the run, too
    assert run("--resume", "runs/pix2pix/kept.pt", "--epochs", "2") == 2
    assert Path("runs/pix2pix/checkpoint.pt").read_bytes() == before
    assert run("--resume", "runs/pix2pix/kept.pt", "--epochs", "2", "--out-dir", "runs/fork") == 0
    assert Path("runs/pix2pix/checkpoint.pt").read_bytes() == before
    assert pix2pix.load_checkpoint(Path("runs/fork/checkpoint.pt"))["epoch"] == 2


# sampling


def test_held_out_pairs_are_translated_as_in_training(data_dir, finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--sample", finished / "checkpoint.pt", "--out-dir", out) == 0
    assert run("--sample", finished / "checkpoint.pt", "--out-dir", out, "--num-samples", "2") == 0
    names = ["generated", "generated-2", "generated-2.png", "generated.png"]
    assert sorted(p.name for p in out.iterdir()) == names and "3 images" in capsys.readouterr().out
    files = sorted((out / "generated").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    assert [file.read_bytes() for file in sorted((out / "generated-2").iterdir())] == [file.read_bytes() for file in files[:2]]
    generator = pix2pix.Generator(32, 2, "batch")  # in training mode: dropout on
    generator.load_state_dict(pix2pix.load_checkpoint(finished / "checkpoint.pt")["generator"])
    pairs = pix2pix.PairFiles(pix2pix.find_pairs(data_dir, "val"), 32)
    for pair, file in zip(pairs, files):
        expected = pix2pix.translate(generator, pix2pix.to_floats(pair[:1]), 0)[0].add(1).mul(127.5)
        np.testing.assert_allclose(np.asarray(Image.open(file)), expected.permute(1, 2, 0), atol=0.51)
    assert Image.open(out / "generated.png").size == (6 * 34 + 2, 2 * 34 + 2)


def test_direction_holds_when_sampling(data_dir, tmp_path):
    train(data_dir, tmp_path / "run", "--epochs", "1", "--direction", "BtoA")
    assert run("--sample", tmp_path / "run" / "checkpoint.pt", "--num-samples", "1") == 0
    grid = np.asarray(Image.open(tmp_path / "run" / "generated.png"))
    for place, image in zip((2, 70), pix2pix.PairFiles(pix2pix.find_pairs(data_dir, "val"), 32)[0].flip(0)):
        assert np.abs(grid[2:34, place : place + 32].astype(int) - image.permute(1, 2, 0).numpy()).max() <= 1


def outputs(checkpoint, folder, out, *flags):
    assert run("--sample", checkpoint, "--input", folder, "--out-dir", out, *flags) == 0
    return {str(path.relative_to(out / "generated")): np.asarray(Image.open(path)).astype(int) for path in (out / "generated").rglob("*.*")}


def test_any_image_is_translated_under_its_name(finished, tmp_path, capsys):
    """Sizes and modes of all kinds; what looks the same to a person gives the same picture."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    gray = Image.fromarray(np.asarray(Image.linear_gradient("L").resize((50, 40))))
    gray.save(folder / "gray.png")
    gray.convert("RGB").save(folder / "deep" / "rgb.bmp")
    gray.convert("RGBA").save(folder / "alpha.png")
    gray.convert("P").save(folder / "palette.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(folder / "sixteen.png")
    gray.save(folder / "photo.jpg", quality=95)
    turned = Image.Exif()
    turned[0x0112] = 8  # to be turned by 90 degrees counter-clockwise
    gray.rotate(-90, expand=True).save(folder / "turned.png", exif=turned)
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(folder / "clear.png")  # transparent: white, not the red below it
    Image.new("RGB", (9, 9), "white").save(folder / "white.gif")
    Image.new("RGB", (1, 1), (9, 8, 7)).save(folder / "dot.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    images = outputs(finished / "checkpoint.pt", folder, tmp_path / "out")
    assert sorted(images) == ["alpha.png", "clear.png", "deep/rgb.bmp", "dot.PNG", "gray.png", "palette.png", "photo.jpg", "sixteen.png", "turned.png", "white.gif.png"]
    assert all(image.shape == (32, 32, 3) for image in images.values())
    for name in ("alpha.png", "deep/rgb.bmp", "palette.png", "sixteen.png", "turned.png"):
        assert np.array_equal(images[name], images["gray.png"]), name
    assert not np.array_equal(images["dot.PNG"], images["gray.png"]) and np.array_equal(images["clear.png"], images["white.gif.png"])
    assert outputs(finished / "checkpoint.pt", folder, tmp_path / "few", "--num-samples", "5").keys() == set(sorted(images)[:5])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and "empty.png" in "".join(lines) and "notes.txt" in "".join(lines)
    assert Image.open(tmp_path / "out" / "generated.png").size == (4 * 34 + 2, 5 * 34 + 2)  # source | output, twice


def test_an_output_does_not_depend_on_what_is_beside_it(finished, tmp_path):
    for folder, seeds in (("alone", (5,)), ("together", (3, 5, 4))):
        (tmp_path / folder).mkdir()
        for seed in seeds:
            pix2pix.to_pil_image(pix2pix.synthetic_facades(1, seed)[0, 1]).save(tmp_path / folder / f"{seed}.png")
    alone, together = (outputs(finished / "checkpoint.pt", tmp_path / name, tmp_path / f"{name}-out") for name in ("alone", "together"))
    assert np.array_equal(alone["5.png"], together["5.png"]) and not np.array_equal(together["3.png"], together["5.png"])


def test_dropout_is_the_noise_and_deterministic_turns_it_off(finished, tmp_path):
    pix2pix.to_pil_image(pix2pix.synthetic_facades(1, 5)[0, 1]).save(tmp_path / "5.png")
    images = [
        outputs(finished / "checkpoint.pt", tmp_path, tmp_path / f"out{n}", *flags.split())["5.png"]
        for n, flags in enumerate(["", "", "--seed 1", "--deterministic", "--deterministic --seed 1"])
    ]
    for n in range(5):
        shutil.rmtree(tmp_path / f"out{n}")
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[3], images[4])
    assert not np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[3])


# data


def test_synthetic_facades_repeat_and_their_labels_are_cmps():
    pairs = pix2pix.synthetic_facades(6, 3)
    assert pairs.shape == (6, 2, 3, 256, 256) and pairs.dtype == torch.uint8
    assert torch.equal(pairs, pix2pix.synthetic_facades(6, 3)) and not torch.equal(pairs, pix2pix.synthetic_facades(6, 4))
    palette = {(0, 0, 222), (0, 48, 255), (0, 128, 255), (112, 255, 142), (0, 207, 255), (255, 80, 0), (192, 255, 63), (174, 0, 0)}
    colors = {tuple(color) for color in pairs[:, 1].permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0).tolist()}
    args = pix2pix.parse_args(["--dataset", "synthetic", "--image-size", "32", "--no-jitter"])
    parts = [pix2pix.load_pairs(args, split, torch.device("cpu")) for split in ("train", "val")]
    assert [part.shape for part in parts] == [(400, 2, 3, 32, 32), (100, 2, 3, 32, 32)]
    assert not {pair.numpy().tobytes() for pair in parts[0]} & {pair.numpy().tobytes() for pair in parts[1]}
    assert {(0, 0, 222), (0, 48, 255), (0, 128, 255)} <= colors <= palette
    for photo, labels in pairs.float():  # what a label covers looks alike, next to the whole
        sky = photo[:, (labels == torch.tensor([0, 0, 222.0])[:, None, None]).all(0)]
        assert sky.std(1).mean() < 0.6 * photo.flatten(1).std(1).mean()


def test_streamed_and_in_memory_are_the_same_pairs(data_dir, monkeypatch):
    device = torch.device("cpu")
    args = pix2pix.parse_args(["--dataset", "folder", "--data-dir", str(data_dir), "--image-size", "32", "--batch-size", "3"])
    in_memory = pix2pix.load_pairs(args, "train", device)
    monkeypatch.setattr(pix2pix, "IN_MEMORY", 0)
    streamed = pix2pix.load_pairs(args, "train", device)
    assert isinstance(in_memory, torch.Tensor) and isinstance(streamed, pix2pix.PairFiles)
    gone = pix2pix.PairFiles([*streamed.pairs[:5], (data_dir / "gone.png",)], 36)
    with pytest.raises(OSError, match="gone.png"):
        [*pix2pix.batches(gone, args, device)]
    torch.manual_seed(0)
    first = [*pix2pix.batches(in_memory, args, device)]
    rng = torch.get_rng_state()
    torch.manual_seed(0)
    assert same([*pix2pix.batches(streamed, args, device)], first) and torch.equal(torch.get_rng_state(), rng)
    assert len(first) == 2


def archive(path, *members):
    """A tar.gz with a file of the given name and content for each member."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_archives_are_fetched_whole_or_not_at_all(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pix2pix, "URL", f"file://{tmp_path}/{{}}.tar.gz")
    png = (data_dir / "train" / "00000.png").read_bytes()
    good = [(f"facades/{split}/{n}.png", png) for split in ("train", "val") for n in range(2)]
    flags = ["--dataset", "facades", "--data-dir", tmp_path / "data", *TINY, "--epochs", "1", "--out-dir", tmp_path / "run"]
    archive(tmp_path / "facades.tar.gz", *good, ("../../climbed.txt", b"out"))
    assert run(*flags) == 1 and not list(tmp_path.rglob("climbed.txt"))
    archive(tmp_path / "facades.tar.gz", *good, (f"{tmp_path}/climbed.txt", b"out"))
    run(*flags, "--epochs", "1")  # an absolute path loses its root: inside, or refused, as this Python has it
    assert not (tmp_path / "climbed.txt").exists()
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    archive(tmp_path / "facades.tar.gz", *good)
    data = (tmp_path / "facades.tar.gz").read_bytes()
    (tmp_path / "facades.tar.gz").write_bytes(data[:-3000])
    capsys.readouterr()
    assert run(*flags) == 1 and "facades" in capsys.readouterr().err and list((tmp_path / "data").iterdir()) == []
    (tmp_path / "facades.tar.gz").write_bytes(data)
    assert run(*flags) == 0
    assert capsys.readouterr().out.startswith("facades BtoA: 2 pairs of 3x32x32, 2 held out")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["facades"]


def test_nothing_said_and_no_network(tmp_path, monkeypatch, capsys):
    def no_network(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    assert run("--epochs", "1", "--width", "1", "--image-size", "32", "--batch-size", "200") == 0
    out, err = capsys.readouterr()
    assert out.startswith("synthetic BtoA: 400 pairs of 3x32x32, 100 held out") and "warning" in err and len(err.strip().splitlines()) == 1
    assert pix2pix.load_checkpoint(Path("runs/pix2pix/checkpoint.pt"))["args"]["dataset"] == "synthetic"
    for name in ("facades", "maps"):  # a set that was named is never replaced
        assert run("--dataset", name, "--out-dir", "x") == 1
        out, err = capsys.readouterr()
        assert name in err and len(err.strip().splitlines()) == 1 and not Path("x").exists()


# bad input: one line, non-zero, nothing written


@pytest.mark.parametrize(
    "flags, word",
    [(f"{flag} {value}", flag) for flag in ("--epochs", "--batch-size", "--width", "--num-samples") for value in ("0", "-1", "1e400", "two")]
    + [(f"--lr {value}", "--lr") for value in ("0", "-1", "nan", "inf", "1e400", "fast")]
    + [(f"{flag} {value}", flag) for flag in ("--l1-weight", "--gan-weight") for value in ("-0.5", "nan", "inf")]
    + [("--l1-weight 0 --gan-weight 0", "--l1-weight"), ("--decay-epochs -1", "--decay-epochs"), ("--decay-epochs 201", "--epochs")]
    + [(f"--image-size {size}", "32, 64") for size in ("16", "100", "257", "1024", "0", "-32")]
    + [("--direction BtoC", "--direction"), ("--direction atob", "--direction"), ("--norm layer", "--norm"), ("--dataset edges2shoes", "--dataset")]
    + [("--seed -1", "--seed"), ("--input somewhere", "--sample"), ("--deterministic", "--sample"), ("--batch-size 9", "8 pairs")]
    + [("--width 999999999", "memory"), ("--dataset folder --data-dir missing", "missing"), ("--dataset folder --data-dir nothing", "nothing")]
    + [("--out-dir file", "file"), ("--out-dir file/below", "file/below"), ("--out-dir /proc/nowhere", "/proc/nowhere")],
)
def test_bad_flags_are_refused_in_one_line(flags, word, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    Path("file").write_text("kept")
    given = flags.split()
    base = [] if "--dataset" in given else ["--dataset", "folder", "--data-dir", str(data_dir)]
    base += [] if "--image-size" in given else ["--image-size", "32"]
    assert run(*base, *given) in (1, 2)
    err = capsys.readouterr().err
    assert word in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "nothing"] and Path("file").read_text() == "kept"


def save(path, *size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: save(folder / "train" / "odd.png", 81, 40), ("train/odd.png", "81")),
        (lambda folder: (folder / "train" / "torn.jpg").write_bytes(b"\xff\xd8\xff"), ("train/torn.jpg",)),
        (lambda folder: shutil.rmtree(folder / "val"), ("test", "val/")),
        (lambda folder: shutil.rmtree(folder / "train"), ("train",)),
        (lambda folder: [save(folder / side / f"{n}.png", 8, 8 + (side + str(n) == "B1")) for side in "AB" for n in (1, 2)], ("A/1.png", "(8, 9)")),
        (lambda folder: [save(folder / side / "1.png", 8, 8) for side in "AB"] + [save(folder / "A" / "2.png", 8, 8)], ("A/2.png", "B/2.png")),
        (lambda folder: [save(folder / side / "1.png", 8, 8) for side in "AB"] + [save(folder / "B" / "2.png", 8, 8)], ("B/2.png", "A/2.png")),
    ],
)
def test_bad_folders_are_refused_in_one_line(make, words, data_dir, tmp_path, capsys):
    shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("test"))
    make(tmp_path / "data")
    assert run("--dataset", "folder", "--data-dir", tmp_path / "data", "--out-dir", tmp_path / "run", *TINY) == 1
    err = capsys.readouterr().err
    assert all(word in err for word in words) and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_an_input_folder_without_images_is_refused(finished, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    for folder in ("missing", "none"):
        assert run("--sample", finished / "checkpoint.pt", "--input", tmp_path / folder, "--out-dir", tmp_path / "out") == 1
        err = capsys.readouterr().err
        assert folder in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--width 4", "--image-size 64", "--dataset synthetic", "--norm instance", "--direction BtoA", "--seed 1"])
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
