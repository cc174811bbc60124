"""Measures what the README reports; a command, not a test. Prints markdown rows, and progress on stderr.

    python tests/benchmark.py speed [vae gan dcgan pix2pix]    images/s of a script's loop and of a plain one, in turn
    python tests/benchmark.py gpu [vae gan ...]                the commands on a CUDA GPU, with and without --bf16, --compile
    python tests/benchmark.py torchrun [vae gan ...]           images/s of one process and of one for each core
    python tests/benchmark.py quality FOLDER [FOLDER ...]      generated digits beside the MNIST test set
    python tests/benchmark.py facades FOLDER [FOLDER ...]      the held-out facades translated: the paper's FCN score

The folders are what --sample wrote. MNIST and facades are read from --data-dir (data).
"""

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dcgan  # noqa: E402
import gan  # noqa: E402
import pix2pix  # noqa: E402
import vae  # noqa: E402


def row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def table(*columns):
    row(*columns)
    row(*["---"] * len(columns))


# The plain loops of speed are those of public code: float32, transforms image by image in a
# DataLoader, unfused Adam, every gradient computed, the losses read in each step, which they yield.
# Networks, --batch-size and --lr are the script's.
def plain_vae(args, _):
    """pytorch/examples' vae."""
    data = datasets.MNIST(args.data_dir, transform=transforms.ToTensor())
    model = vae.VAE(args.width, args.latent_dim)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for x, _ in DataLoader(data, args.batch_size, shuffle=True):
        x = x.view(-1, 784)
        optimizer.zero_grad()
        logits, mean, logvar = model(x, torch.randn(len(x), args.latent_dim))
        reconstruction = F.binary_cross_entropy(torch.sigmoid(logits), x, reduction="sum")
        loss = reconstruction - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        loss.backward()
        optimizer.step()
        yield loss.item()


def cross_entropy(logits, target):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def plain_gan(args, script):
    """pytorch/examples' dcgan, and for gan.py the same."""
    sizes, steps = [], [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    if script is dcgan:
        sizes = [args.image_size, 1]
        steps.insert(0, transforms.Pad((args.image_size - 28) // 2))
    data = datasets.MNIST(args.data_dir, transform=transforms.Compose(steps))
    generator = script.Generator(*sizes, args.latent_dim, args.width)
    discriminator = script.Discriminator(*sizes, args.width)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.999))
    for x, _ in DataLoader(data, args.batch_size, shuffle=True, drop_last=True):
        fake = generator(torch.randn(args.batch_size, args.latent_dim))
        optimizer_d.zero_grad()
        loss_real = cross_entropy(discriminator(x.view_as(fake)), 1)
        loss_real.backward()
        loss_fake = cross_entropy(discriminator(fake.detach()), 0)
        loss_fake.backward()
        optimizer_d.step()

        optimizer_g.zero_grad()
        loss_g = cross_entropy(discriminator(fake), 1)
        loss_g.backward()
        optimizer_g.step()
        yield loss_real.item(), loss_fake.item(), loss_g.item()


def plain_pix2pix(args, _):
    """pytorch-CycleGAN-and-pix2pix, the authors' own."""
    paths = sorted(Path(args.data_dir, "facades", "train").glob("*.jpg"))
    loader = DataLoader(paths, args.batch_size, shuffle=True, collate_fn=read_facade)
    generator = pix2pix.Generator(args.image_size, args.width)
    discriminator = pix2pix.Discriminator(args.width)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.999))
    for source, target in loader:
        fake = generator(source)
        optimizer_d.zero_grad()
        loss_fake = cross_entropy(discriminator(source, fake.detach()), 0)
        loss_real = cross_entropy(discriminator(source, target), 1)
        loss_d = (loss_fake + loss_real) / 2
        loss_d.backward()
        optimizer_d.step()

        optimizer_g.zero_grad()
        loss_gan = cross_entropy(discriminator(source, fake), 1)
        loss_l1 = F.l1_loss(fake, target)
        loss_g = loss_gan + args.l1_weight * loss_l1
        loss_g.backward()
        optimizer_g.step()
        yield loss_d.item(), loss_gan.item(), loss_l1.item()


def read_facade(paths):
    """Labels and photo of a path, (1, 3, 256, 256) in [-1, 1] each, cropped and mirrored alike."""
    both = Image.open(*paths).convert("RGB")
    sides = both.crop((256, 0, 512, 256)), both.crop((0, 0, 256, 256))
    steps = [v2.Resize((286, 286), Image.BICUBIC), v2.RandomCrop(256), v2.RandomHorizontalFlip()]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
    return [image[None] for image in v2.Compose(steps)(*sides)]


LOOPS = [  # and the steps that a round measures
    (vae, plain_vae, "vae.py", 300),
    (gan, plain_gan, "gan.py", 200),
    (dcgan, plain_gan, "dcgan.py --image-size 32", 24),
    (dcgan, plain_gan, "dcgan.py --image-size 64", 6),
    (pix2pix, plain_pix2pix, "pix2pix.py", 10),
]


def plain_rate(loop, steps):
    """Steps per second, after a third as many to warm up."""
    for _ in range(steps // 3):
        next(loop)
    began = time.perf_counter()
    for _ in range(steps):
        next(loop)
    return steps / (time.perf_counter() - began)


def own_rate(script, command, steps):
    """What train() itself reports of its second epoch, of two of so many steps."""
    rows, progress = [], getattr(script, "progress", None)
    script.fewest = lambda *_: steps
    script.progress = lambda batches, *rest: progress(batches[:steps], *rest)
    script.save = lambda _, metrics, args: rows.extend(metrics)
    if script is pix2pix:  # whose held-out pairs take longer than the steps
        script.evaluate = lambda *_: (torch.zeros(3, 3, 8, 8), {})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        script.train(*script.parse_args([*command, "--epochs", "2", "--out-dir", folder]))
    script.progress = progress
    return rows[-1]["images_per_second"]


def speed(args):
    table("images/s of the loop", "plain", "the script's", "ratio")
    for script, plain, line, steps in LOOPS:
        if script.NAME not in args.what:
            continue
        line += " --bf16" * args.bf16
        command, rounds = [*line.split()[1:], "--data-dir", args.data_dir], []
        settings, _ = script.parse_args(command)
        for n in range(args.rounds):  # in turn, so that the machine's ups and downs meet both alike
            slow = settings.batch_size * plain_rate(plain(settings, script), steps)
            fast = own_rate(script, command, steps)
            rounds.append((fast / slow, slow, fast))
            print(f"round {n + 1}: {slow:.2f} and {fast:.2f} images/s", file=sys.stderr)
        ratio, slow, fast = sorted(rounds)[args.rounds // 2]  # the round of the median ratio
        row(f"`{line}`", *(f"{value:,.2f}" for value in (slow, fast, ratio)))


def commands(args, lines, ways):
    """A row for each command: images/s of its last epoch and seconds of all, in each of the ways to start it."""
    table("images/s, seconds of the loop", *ways)
    for line in lines:
        cells = []
        for way in ways.values():
            words = way.format(line).split()
            print(*words, file=sys.stderr)
            words[words.index("python")] = sys.executable
            with tempfile.TemporaryDirectory() as folder:
                words += ["--data-dir", args.data_dir, "--out-dir", folder]
                subprocess.run(["env", *words], cwd=ROOT, stdout=sys.stderr, check=True)
                *_, last = csv.DictReader(open(f"{folder}/metrics.csv"))
            *_, rate, seconds = map(float, last.values())
            cells.append(f"{rate:,.1f}, {seconds:,.1f} s")
        row(f"`{line}`", *cells)


def gpu(args):
    if not torch.cuda.is_available():
        sys.exit("benchmark.py: error: PyTorch finds no CUDA GPU here, and this table is of one")
    ways = {"float32": "python {}", "bf16": "python {} --bf16", "compiled": "python {} --compile"}
    ways["both"] = "python {} --bf16 --compile"
    commands(args, [f"{name}.py --cuda" for name in args.what], ways)


FLAGS = {
    "vae": "--dataset mnist --epochs 4",
    "gan": "--dataset mnist --epochs 2",
    "dcgan": "--dataset mnist --width 32 --epochs 1",
    "pix2pix": "--dataset facades --image-size 64 --width 32 --epochs 2",
}


def torchrun(args):
    cores = torch.get_num_threads()
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {cores}"
    ways = {
        "1 process, 1 core": "OMP_NUM_THREADS=1 python {}",
        f"1 process, {cores} cores": f"OMP_NUM_THREADS={cores} python {{}}",
        f"{cores} processes, 1 core each": f"OMP_NUM_THREADS=1 python {launch} {{}}",
    }
    commands(args, [f"{name}.py {FLAGS[name]}" for name in args.what], ways)


def trained(network, name, load, epochs, batch, lr, decay=0, augment=None):
    """What judges generated images: a network trained on real ones from seed 0, kept in runs/benchmark/."""
    torch.manual_seed(0)
    model, path = network(), Path("runs/benchmark", name)
    if not path.exists():
        images, classes = load()
        steps = len(images) // batch
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
        for epoch in range(epochs):
            for index in torch.randperm(len(images)).split(batch)[:steps]:
                x, y = images[index], classes[index]
                x, y = augment(x, y) if augment else (x, y)
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f"{name}: epoch {epoch + 1} of {epochs}, loss {loss:.3f}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def conv(before, after, bias):
    return [nn.Conv2d(before, after, 3, padding=1, bias=bias), nn.BatchNorm2d(after), nn.ReLU()]


def read_folder(folder, mode):
    """Its images in order: (N, C, H, W) in [-1, 1]."""
    paths = sorted(Path(folder).glob("*.png"))
    if not paths:
        sys.exit(f"benchmark.py: error: no PNG files in {folder}")
    images = [v2.functional.pil_to_tensor(Image.open(path).convert(mode)) for path in paths]
    return pix2pix.to_floats(torch.stack(images))


def classifier():
    """Digits (B, 1, 28, 28) in [-1, 1] to 128 features, and these to logits (B, 10)."""
    layers = [*conv(1, 32, True), nn.MaxPool2d(2)]  # (B, 32, 14, 14)
    layers += [*conv(32, 64, True), nn.MaxPool2d(2)]  # (B, 64, 7, 7)
    layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.5)]
    parts = OrderedDict(features=nn.Sequential(*layers), head=nn.Linear(128, 10))
    return nn.Sequential(parts)


def mnist(args, train):
    data = datasets.MNIST(args.data_dir, train)
    return pix2pix.to_floats(data.data.unsqueeze(1)), data.targets


@torch.no_grad()
def look(model, images):
    """Features (N, 128), double, and class probabilities (N, 10)."""
    features = torch.cat([*map(model.features, images.split(1000))])
    return features.double(), model.head(features).softmax(1)


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features, (N, D) each: Heusel et al. 2017."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # its trace
    return (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b).trace() - 2 * root


def quality(args):
    settings = dict(epochs=3, batch=128, lr=3e-3)
    model = trained(classifier, "classifier.pt", partial(mnist, args, True), **settings)
    images, labels = mnist(args, False)
    real, p = look(model, images)
    print(f"classifier: {(p.argmax(1) == labels).float().mean():.2%} right", file=sys.stderr)
    torch.manual_seed(0)
    halves = real[torch.randperm(len(real))].chunk(2)
    rows = [("test set (one half to the other)", p, *halves)]
    for folder in args.what:
        features, p = look(model, read_folder(folder, "L"))
        rows.append((f"{folder} ({len(features):,})", p, features, real))
    table("images", "Fréchet distance", "digits 0 to 9, %", "confident (p > 0.9)")
    for name, p, *sides in rows:
        shares = p.argmax(1).bincount(minlength=10) / len(p) * 100
        digits = " ".join(f"{share:.1f}" for share in shares)
        confident = (p.amax(1) > 0.9).double().mean()
        row(name, f"{frechet_distance(*sides):.1f}", digits, f"{confident:.1%}")


class Segmenter(nn.Module):
    """Photos (B, 3, H, W) in [-1, 1] to logits (B, 12, H, W) of CMP's classes: a U-Net of three levels."""

    def __init__(self):
        def block(before, after):
            return nn.Sequential(*conv(before, after, False), *conv(after, after, False))

        super().__init__()
        self.down = nn.ModuleList([block(3, 32), block(32, 64), block(64, 128), block(128, 128)])
        self.up = nn.ModuleList([block(256, 64), block(128, 32), block(64, 32)])
        self.head = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(32, 12, 1))

    def forward(self, x):
        skips = [self.down[0](x)]
        for level in self.down[1:]:
            skips.append(level(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.head(x)


def real_facades(args, split, size):
    """Photos (N, 3, size, size) in [-1, 1] and classes (N, size, size), the nearest of CMP's colours."""
    cmp = "0000de 0030ff 0080ff 00cfff 20ffe0 70ff8e c0ff3f fff000 ff9f00 ff5000 ff0000 ae0000"
    palette = torch.tensor([*bytes.fromhex(cmp)]).view(12, 3).float()
    photos, classes = [], []
    for path in sorted(Path(args.data_dir, "facades", split).glob("*.jpg")):
        photos.append(pix2pix.read_pair([path], size)[0])
        colors = pix2pix.read_pair([path], 256)[1].flatten(1).T.float()
        nearest = torch.cdist(colors, palette).argmin(1).view(1, 1, 256, 256).float()
        classes.append(F.interpolate(nearest, (size, size), mode="nearest-exact").long())
    return pix2pix.to_floats(torch.stack(photos)), torch.cat(classes).squeeze(1)


def jitter(photos, classes):
    """Crops eight ninths, the same of all, and mirrors all or none."""
    size = photos.shape[-1] * 8 // 9
    top, left = torch.randint(size // 8 + 1, (2,)).tolist()
    parts = [part[..., top : top + size, left : left + size] for part in (photos, classes)]
    return [part.flip(-1) for part in parts] if torch.rand(()) < 0.5 else parts


@torch.no_grad()
def fcn_score(model, photos, classes):
    """The share of pixels whose class is read rightly, and the mean over classes of intersection over union."""
    found = torch.cat([model(part).argmax(1) for part in photos.split(20)])
    confusion = (classes * 12 + found).flatten().bincount(minlength=144).view(12, 12)
    right = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - right
    return right.sum() / confusion.sum(), (right / union).mean()


def facades(args):
    folders = {folder: read_folder(folder, "RGB") for folder in args.what}
    size = folders[args.what[0]].shape[-1]
    settings = dict(epochs=40, batch=16, lr=4e-3, decay=0.05, augment=jitter)
    load = partial(real_facades, args, "train", size * 9 // 8)
    model = trained(Segmenter, f"segmenter_{size}.pt", load, **settings)
    photos, classes = real_facades(args, "val", size)
    table("photos", "pixel accuracy", "mean IoU")
    for name, images in {"real": photos, **folders}.items():
        row(name, *(f"{score:.3f}" for score in fcn_score(model, images, classes)))


def main():
    tables = {table.__name__: table for table in (speed, gpu, torchrun, quality, facades)}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("table", choices=tables)
    parser.add_argument("what", nargs="*", help="folders of images, or scripts; left out: all four")
    parser.add_argument("--data-dir", type=os.path.abspath, default="data")
    parser.add_argument("--rounds", type=int, default=3, help="of speed; the median counts (3)")
    parser.add_argument("--bf16", action="store_true", help="speed: our loop in bfloat16")
    args = parser.parse_intermixed_args()
    if args.table in ("quality", "facades"):
        if not args.what:
            parser.error("name the folders of images")
    elif {*args.what} - FLAGS.keys():
        parser.error(f"scripts are {', '.join(FLAGS)}")
    args.what = args.what or list(FLAGS)
    tables[args.table](args)


if __name__ == "__main__":
    main()
