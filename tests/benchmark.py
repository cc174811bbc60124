"""Measures what the README reports; a command, not a test. Prints markdown rows.

    python tests/benchmark.py speed [vae gan dcgan pix2pix]    images/s of the loop beside a plain loop, one process
    python tests/benchmark.py gpu [vae gan ...]                the commands on a CUDA GPU, with and without --bf16, --compile
    python tests/benchmark.py torchrun [vae gan ...]           images/s of one process and of one for each core
    python tests/benchmark.py quality DIR [DIR ...]            folders of generated digits beside the MNIST test set
    python tests/benchmark.py facades DIR [DIR ...]            folders of the translated held-out facades: the FCN score

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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dcgan  # noqa: E402
import gan  # noqa: E402
import pix2pix  # noqa: E402
import vae  # noqa: E402


def say(text):
    print(text, file=sys.stderr, flush=True)


# speed: the same networks, trained by the script's own train() and by a plain loop


def plain_dcgan(data_dir, image_size, steps):
    """images/s of the loop as it is commonly written: float32, NCHW, unfused Adam, PIL transforms image by image in a
    DataLoader, every gradient computed, three losses read in each step."""
    margin = (image_size - 28) // 2
    transform = transforms.Compose([transforms.Pad(margin), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(datasets.MNIST(data_dir, transform=transform), batch_size=128, shuffle=True, drop_last=True)
    generator, discriminator = dcgan.Generator(image_size, 1, 100, 64), dcgan.Discriminator(image_size, 1, 64)
    optimizer_g = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.5, 0.999))
    criterion, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(128), torch.zeros(128)
    for step, (x, _) in enumerate(loader):
        if step == 2:  # two steps to warm up
            began = time.perf_counter()
        elif step == 2 + steps:
            return 128 * steps / (time.perf_counter() - began)
        optimizer_d.zero_grad()
        loss_real = criterion(discriminator(x), ones)
        loss_real.backward()
        fake = generator(torch.randn(128, 100))
        loss_fake = criterion(discriminator(fake.detach()), zeros)
        loss_fake.backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        loss_g = criterion(discriminator(fake), ones)
        loss_g.backward()
        optimizer_g.step()
        loss_real.item(), loss_fake.item(), loss_g.item()


def train(script, command):
    """A run of the script in this process: its arguments."""
    args, checkpoint = script.parse_args(command)
    script.train(args, checkpoint)
    return args


def ours(script, data_dir, steps, *flags):
    """images/s that the script's own train() reports for its second epoch, of 128 * `steps` images."""
    load_images = script.load_images

    def first_images(*args):
        images = load_images(*args)
        return (images[0][: 128 * steps], images[1][:1000]) if script is vae else images[: 128 * steps]

    with tempfile.TemporaryDirectory() as folder:
        script.load_images = first_images
        command = ["--dataset", "mnist", "--data-dir", data_dir, "--epochs", "2", "--out-dir", f"{folder}/run", *flags]
        with contextlib.redirect_stdout(sys.stderr):
            train(script, command)
        script.load_images = load_images
        return float(list(csv.DictReader(open(f"{folder}/run/metrics.csv")))[-1]["images_per_second"])


def step_flops(script, *flags):
    """Floating-point operations of a training step, per image: convolutions and matrix products, forward and backward."""
    names = ("load_images", "load_pairs", "generate", "evaluate")
    kept = {name: getattr(script, name) for name in names if hasattr(script, name)}

    def one_batch(args, split=None):
        if script is pix2pix:
            size = round(args.image_size * (286 / 256 if split == "train" else 1))
            return torch.zeros(args.batch_size, 2, 3, size, size).byte()
        shape = (1, args.image_size, args.image_size) if script is dcgan else (784,)
        images = torch.zeros(args.batch_size, *shape, dtype=torch.uint8)
        return (images, images[:32]) if script is vae else images

    no_grid = torch.zeros(8, 1, 8, 8)  # the pictures do not count
    patches = dict(load_images=one_batch, load_pairs=one_batch, generate=lambda *args: no_grid)
    patches["evaluate"] = lambda *args: {} if script is vae else (no_grid, 0.0, 0.0)
    with FlopCounterMode(display=False) as counter, tempfile.TemporaryDirectory() as folder:
        command = ["--dataset", "synthetic", "--epochs", "1", "--out-dir", f"{folder}/run", *flags]
        for name in kept:
            setattr(script, name, patches[name])
        with contextlib.redirect_stdout(sys.stderr):
            args = train(script, command)
        for name, function in kept.items():
            setattr(script, name, function)
    return counter.get_total_flops() / args.batch_size


def matmul_rate(device="cpu"):
    """The most floating-point operations per second that a square bfloat16 matrix product reaches here."""
    rates = []
    for n in (1024, 2048, 4096) * 3 if device == "cpu" else (4096, 8192, 16384) * 3:
        a, b, out = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(3))
        torch.mm(a, b, out=out)[0, 0].item()  # which waits for a GPU
        began = time.perf_counter()
        torch.mm(a, b, out=out)[0, 0].item()
        rates.append(2 * n**3 / (time.perf_counter() - began))
    return max(rates)


def row(label, plain, ours, flops, args):
    """Prints a row and returns the plain loop's images/s. The loops take turns, so that the machine's own ups and downs
    meet all alike; of the rounds, the one whose last ratio is the median counts."""
    rounds = []
    for n in range(args.rounds):
        rounds.append((plain(), ours(), ours("--bf16"), matmul_rate()))
        say(f"round {n + 1} of {args.rounds}: " + "  ".join(f"{value:.2f}" for value in rounds[-1][:3]))
    plain, float32, bf16, rate = sorted(rounds, key=lambda values: values[2] / values[0])[args.rounds // 2]
    a, b, c = (f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in (plain, float32, bf16))
    print(f"| {label} | {a} | {b} | {float32 / plain:.2f} | {c} | {bf16 / plain:.2f} | {bf16 * flops / rate:.2f} |", flush=True)
    return plain


def speed_dcgan(args):
    for image_size, steps in ((32, 24), (64, 6)):
        size = ("--image-size", str(image_size))

        def loop(*flags):
            return ours(dcgan, args.data_dir, steps, *size, *flags)

        row(f"`dcgan.py {' '.join(size)}`", lambda: plain_dcgan(args.data_dir, image_size, steps), loop, step_flops(dcgan, *size), args)


def plain_vae(data_dir, steps):
    """images/s of the loop of pytorch/examples: float32, unfused Adam, ToTensor an image, a loss read every step."""
    loader = DataLoader(datasets.MNIST(data_dir, transform=transforms.ToTensor()), batch_size=128, shuffle=True)
    model, total = vae.VAE(400, 20), 0
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step, (x, _) in enumerate(loader):
        if step == 10:  # ten steps to warm up
            began = time.perf_counter()
        elif step == 10 + steps:
            return 128 * steps / (time.perf_counter() - began)
        x = x.view(-1, 784)
        optimizer.zero_grad()
        logits, mean, logvar = model(x, torch.randn(len(x), 20))
        reconstruction = F.binary_cross_entropy(torch.sigmoid(logits), x, reduction="sum")
        loss = reconstruction - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        loss.backward()
        total += loss.item()
        optimizer.step()


def speed_vae(args):
    def loop(*flags):
        return ours(vae, args.data_dir, 400, *flags)

    return row("`vae.py`", lambda: plain_vae(args.data_dir, 300), loop, step_flops(vae), args)


def time_to_loss(args, plain):
    """Seconds until vae.py's test loss is below 105.55, where the plain loop stands after ten epochs."""
    print("\n| command | test loss below 105.55 | seconds of loop | times faster |")
    print("| --- | --- | --- | --- |")
    for flags in ("", "--bf16", "--epochs 4 --lr 0.01", "--epochs 4 --lr 0.01 --bf16"):
        with tempfile.TemporaryDirectory() as folder:
            command = f"--dataset mnist --data-dir {args.data_dir} --out-dir {folder}/run {flags}"
            with contextlib.redirect_stdout(sys.stderr):
                train(vae, command.split())
            for epoch in csv.DictReader(open(f"{folder}/run/metrics.csv")):
                if float(epoch["test_loss"]) < 105.55:
                    break
            else:
                sys.exit(f"vae.py {flags}: the test loss never passed 105.55")
            seconds = float(epoch["seconds"])
            name = f"vae.py {flags}".strip()
            what = f"`{name}` | {float(epoch['test_loss']):.2f} after epoch {epoch['epoch']}"
            print(f"| {what} | {seconds:.1f} | {600_000 / plain / seconds:.1f} |", flush=True)


def plain_gan(data_dir, steps):
    """images/s of the loop of PyTorch-GAN, with the losses on logits: float32, unfused Adam, PIL transforms image by image in
    a DataLoader, every gradient computed, both losses printed in each step."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(datasets.MNIST(data_dir, transform=transform), batch_size=64, shuffle=True, drop_last=True)
    generator, discriminator = gan.Generator(100, 256), gan.Discriminator(256)
    optimizer_g = torch.optim.Adam(generator.parameters(), 4e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 4e-4, betas=(0.5, 0.999))
    criterion, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(64), torch.zeros(64)
    for step, (x, _) in enumerate(loader):
        if step == 10:  # ten steps to warm up
            began = time.perf_counter()
        elif step == 10 + steps:
            return 64 * steps / (time.perf_counter() - began)
        optimizer_g.zero_grad()
        fake = generator(torch.randn(64, 100))
        loss_g = criterion(discriminator(fake), ones)
        loss_g.backward()
        optimizer_g.step()
        optimizer_d.zero_grad()
        loss_d = (criterion(discriminator(x.view(-1, 784)), ones) + criterion(discriminator(fake.detach()), zeros)) / 2
        loss_d.backward()
        optimizer_d.step()
        print(f"[Batch {step}/{len(loader)}] [D loss: {loss_d.item():f}] [G loss: {loss_g.item():f}]", file=sys.stderr)


def speed_gan(args):
    def loop(*flags):
        return ours(gan, args.data_dir, 200, *flags)

    row("`gan.py`", lambda: plain_gan(args.data_dir, 300), loop, step_flops(gan), args)


def plain_pix2pix(data_dir, steps):
    """images/s of the loop as it is commonly written: float32, NCHW, unfused Adam, jitter by PIL pair by pair in a
    DataLoader, every gradient computed, three losses read in each step."""

    class Pairs(torch.utils.data.Dataset):
        paths = sorted(Path(data_dir, "facades", "train").glob("*.jpg"))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, i):
            both = Image.open(self.paths[i]).convert("RGB")
            images, (top, left), mirror = [], np.random.randint(0, 31, 2), np.random.rand() < 0.5
            for side in (256, 0):  # labels, photo
                image = both.crop((side, 0, side + 256, 256)).resize((286, 286), Image.Resampling.BICUBIC)
                image = image.crop((left, top, left + 256, top + 256))
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image
                images.append(transforms.functional.normalize(transforms.functional.to_tensor(image), 0.5, 0.5))
            return images

    generator, discriminator = pix2pix.Generator(256, 64), pix2pix.Discriminator(64)
    optimizer_g = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.5, 0.999))
    criterion, l1 = nn.BCEWithLogitsLoss(), nn.L1Loss()
    for step, (source, target) in enumerate(DataLoader(Pairs(), shuffle=True)):
        if step == 2:  # two steps to warm up
            began = time.perf_counter()
        elif step == 2 + steps:
            return steps / (time.perf_counter() - began)
        fake = generator(source)
        real_logits, fake_logits = discriminator(source, target), discriminator(source, fake.detach())
        loss_d = criterion(real_logits, torch.ones_like(real_logits))
        loss_d = (loss_d + criterion(fake_logits, torch.zeros_like(fake_logits))) / 2
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()
        logits = discriminator(source, fake)
        loss_gan, loss_l1 = criterion(logits, torch.ones_like(logits)), l1(fake, target)
        optimizer_g.zero_grad()
        (loss_gan + 100 * loss_l1).backward()
        optimizer_g.step()
        loss_d.item(), loss_gan.item(), loss_l1.item()


def speed_pix2pix(args):
    flops, load_pairs, evaluate = step_flops(pix2pix), pix2pix.load_pairs, pix2pix.evaluate
    pix2pix.evaluate = lambda *args: (torch.zeros(3, 3, 8, 8), 0.0, 0.0)  # the held-out pairs are not the loop

    def loop(*flags):
        pix2pix.load_pairs = lambda *arguments: load_pairs(*arguments)[:12]
        with tempfile.TemporaryDirectory() as folder:
            command = ["--dataset", "facades", "--data-dir", args.data_dir, "--epochs", "2", "--out-dir", f"{folder}/run"]
            with contextlib.redirect_stdout(sys.stderr):
                train(pix2pix, [*command, *flags])
            return float(list(csv.DictReader(open(f"{folder}/run/metrics.csv")))[-1]["images_per_second"])

    row("`pix2pix.py`", lambda: plain_pix2pix(args.data_dir, 10), loop, flops, args)
    pix2pix.load_pairs, pix2pix.evaluate = load_pairs, evaluate


def speed(args):
    tables, plain = {"vae": speed_vae, "gan": speed_gan, "dcgan": speed_dcgan, "pix2pix": speed_pix2pix}, {}
    print("| images/s of the loop | plain | float32 | ratio | `--bf16` | ratio | of the bf16 matmul rate |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.what or tables:
        plain[name] = tables[name](args)
    if "vae" in plain:
        time_to_loss(args, plain["vae"])


# gpu, torchrun: the commands themselves, each a process of its own


def loop(command, folder, threads=None):
    """Seconds and images/s of the loop of a command: seconds of all epochs, images/s of the last one."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    say(" ".join(command))
    subprocess.run([sys.executable, *command, "--out-dir", folder], env=environment, stdout=sys.stderr, check=True, cwd=ROOT)
    last = list(csv.DictReader(open(f"{folder}/metrics.csv")))[-1]
    return float(last["seconds"]), float(last["images_per_second"])


def gpu(args):
    if not torch.cuda.is_available():
        sys.exit("benchmark.py: error: PyTorch finds no CUDA GPU here, and this table is of one")
    rate, epochs = matmul_rate("cuda"), {"vae": 10, "gan": 100, "dcgan": 25, "pix2pix": 200}
    say(f"bfloat16 matrix products: {rate / 1e12:.0f} TFLOP/s")
    print("| command | seconds of loop | images/s | of the bf16 matmul rate |")
    print("| --- | --- | --- | --- |")
    for name in args.what or epochs:
        flops = step_flops({"vae": vae, "gan": gan, "dcgan": dcgan, "pix2pix": pix2pix}[name])
        for flags in ("--cuda", "--cuda --bf16", "--cuda --compile", "--cuda --bf16 --compile"):
            command = [f"{name}.py", "--epochs", str(epochs[name]), "--data-dir", os.path.abspath(args.data_dir), *flags.split()]
            with tempfile.TemporaryDirectory() as folder:
                seconds, images = loop(command, folder)
            line = f"| `{name}.py --epochs {epochs[name]} {flags}` | {seconds:.1f} | {images:,.0f} | {images * flops / rate:.3f} |"
            print(line, flush=True)


def torchrun(args):
    runs = {
        "vae": "--dataset mnist --epochs 4",
        "gan": "--dataset mnist --epochs 2",
        "dcgan": "--dataset mnist --width 32 --epochs 1",
        "pix2pix": "--dataset facades --image-size 64 --width 32 --epochs 2",
    }
    cores, launch = torch.get_num_threads(), ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    print(f"| images/s | 1 process, 1 core | 1 process, {cores} cores | {cores} processes, 1 core each |")
    print("| --- | --- | --- | --- |")
    for name in args.what or runs:
        command = [f"{name}.py", *runs[name].split(), "--data-dir", os.path.abspath(args.data_dir)]
        rates = []
        for prefix, threads in (([], 1), ([], cores), ([*launch, str(cores)], 1)):
            with tempfile.TemporaryDirectory() as folder:
                rates.append(loop([*prefix, *command], folder, threads)[1])
        print(f"| `{name}.py {runs[name]}` | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |", flush=True)


# quality: generated digits seen through a classifier


class Classifier(nn.Module):
    """Digits (B, 1, 28, 28) in [-1, 1] to logits (B, 10); features() are the 128 values before them."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),  # (B, 64, 7, 7)
            nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.5),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.features(x))


def mnist(data_dir, train):
    data = datasets.MNIST(data_dir, train=train)
    return data.data[:, None].float() / 127.5 - 1, data.targets


def digit_classifier(data_dir):
    """A Classifier trained on MNIST for 3 epochs from seed 0, kept in runs/benchmark/classifier.pt."""
    path, model = Path("runs/benchmark/classifier.pt"), Classifier()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    torch.manual_seed(0)
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    images, labels = mnist(data_dir, train=True)
    epochs, batch = 3, 128
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * (len(images) // batch))
    for epoch in range(epochs):
        for step, index in enumerate(torch.randperm(len(images)).split(batch)[: len(images) // batch]):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                say(f"classifier: epoch {epoch + 1}/{epochs}, step {step}, loss {loss.item():.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def look(model, images):
    """Features (N, 128), double, and class probabilities (N, 10) of images (N, 1, 28, 28) in [-1, 1]."""
    features = torch.cat([model.features(part) for part in images.split(1000)])
    return features.double(), model.head(features).softmax(1)


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (N, D): Heusel et al. 2017.

    The trace of the root is the sum of the roots of the eigenvalues of R C_b R, symmetric, where R R = C_a."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def quality(args):
    model = digit_classifier(args.data_dir)
    images, labels = mnist(args.data_dir, train=False)
    real, probabilities = look(model, images)
    say(f"classifier: {(probabilities.argmax(1) == labels).double().mean():.2%} of the test set right")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    halves = frechet_distance(real[order[:5000]], real[order[5000:]])
    print("| images | Fréchet distance | digits 0 to 9, % | confident (p > 0.9) |")
    print("| --- | --- | --- | --- |")
    rows = [("test set (one half to the other)", halves, probabilities)]
    for folder in args.what:
        files = sorted(Path(folder).glob("*.png"))
        pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("L")) for file in files]))
        features, probabilities = look(model, pixels[:, None].float() / 127.5 - 1)
        rows.append((f"{folder} ({len(files):,})", frechet_distance(features, real), probabilities))
    for name, distance, probabilities in rows:
        shares = torch.bincount(probabilities.argmax(1), minlength=10) / len(probabilities) * 100
        confident = (probabilities.max(1).values > 0.9).double().mean()
        print(f"| {name} | {distance:.1f} | {' '.join(f'{share:.1f}' for share in shares)} | {confident:.1%} |")


# facades: the FCN score of pix2pix's table 1, labels read back from photos by a segmenter that was trained on real ones

CMP = [(0, 0, 222), (0, 48, 255), (0, 128, 255), (0, 207, 255), (32, 255, 224), (112, 255, 142)]  # the colours of its labels
CMP += [(192, 255, 63), (255, 240, 0), (255, 159, 0), (255, 80, 0), (255, 0, 0), (174, 0, 0)]


class Segmenter(nn.Module):
    """Photos (B, 3, H, W) in [-1, 1] to logits (B, 12, H, W) of CMP's classes: a U-Net of three levels."""

    def __init__(self):
        super().__init__()

        def block(before, after):
            convs = [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            return nn.Sequential(*convs, nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

        self.down = nn.ModuleList([block(3, 32), block(32, 64), block(64, 128), block(128, 128)])
        self.up = nn.ModuleList([block(256, 64), block(128, 32), block(64, 32)])
        self.head = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(32, 12, 1))

    def forward(self, x):
        skips = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.head(x)


def facade_pairs(data_dir, split, size):
    """Photos (N, 3, size, size) in [-1, 1] and classes (N, size, size) of the real pairs, in order."""
    photos, classes, palette = [], [], torch.tensor(CMP).float()
    for path in sorted(Path(data_dir, "facades", split).glob("*.jpg")):
        both = Image.open(path).convert("RGB")
        photos.append(pix2pix.to_square(both.crop((0, 0, 256, 256)), size))
        labels = torch.from_numpy(np.asarray(both)[:, 256:].copy()).float()
        nearest = torch.cdist(labels.view(-1, 3), palette).argmin(1).view(1, 1, 256, 256)
        classes.append(F.interpolate(nearest.float(), (size, size), mode="nearest-exact")[0, 0].long())
    return torch.stack(photos).float() / 127.5 - 1, torch.stack(classes)


def facade_segmenter(data_dir, size):
    """A Segmenter trained on the real training photos from seed 0, kept in runs/benchmark/."""
    torch.manual_seed(0)
    path, model = Path(f"runs/benchmark/segmenter_{size}.pt"), Segmenter()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    photos, classes = facade_pairs(data_dir, "train", size * 9 // 8)
    epochs, batch = 40, 16
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(photos) // batch))
    for epoch in range(epochs):
        for index in torch.randperm(len(photos)).split(batch)[: len(photos) // batch]:
            top, left = torch.randint(size // 8 + 1, (2,)).tolist()
            x, y = (part[index][..., top : top + size, left : left + size] for part in (photos, classes))
            if torch.rand(()) < 0.5:
                x, y = x.flip(-1), y.flip(-1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        say(f"segmenter: epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def fcn_score(model, photos, classes):
    """Share of pixels, and mean over classes of intersection over union, where the segmenter reads the true label."""
    found = torch.cat([model(part).argmax(1) for part in photos.split(20)])
    confusion = torch.bincount((classes * 12 + found).flatten(), minlength=144).view(12, 12).double()
    right = confusion.diag()
    return (right.sum() / confusion.sum()).item(), (right / (confusion.sum(0) + confusion.sum(1) - right)).mean().item()


def facades(args):
    rows = []
    for folder in args.what:
        files = sorted(Path(folder).glob("*.png"))
        rows.append((folder, torch.stack([pix2pix.to_floats(pix2pix.pil_to_tensor(Image.open(file))) for file in files])))
    size = rows[0][1].shape[-1]
    model, (photos, classes) = facade_segmenter(args.data_dir, size), facade_pairs(args.data_dir, "val", size)
    mean = facade_pairs(args.data_dir, "train", size)[0].mean(0).expand_as(photos)
    print("| photos | pixel accuracy | mean IoU | of the real photos' | L1 | PSNR, dB |")
    print("| --- | --- | --- | --- | --- | --- |")
    real = fcn_score(model, photos, classes)
    for name, images in (("real", photos), *rows, ("mean training photo", mean)):
        score, errors = fcn_score(model, images, classes), (images - photos).flatten(1)
        psnr = (10 * torch.log10(4 / errors.square().mean(1))).mean()
        line = f"| {name} | {score[0]:.3f} | {score[1]:.3f} | {score[0] / real[0]:.2f}, {score[1] / real[1]:.2f} "
        print(line + (f"| {errors.abs().mean():.3f} | {psnr:.2f} |" if images is not photos else "| | |"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("speed", "gpu", "torchrun", "quality", "facades"))
    parser.add_argument("what", nargs="*", help="quality, facades: folders of images; else scripts, left out: all")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=int, default=3, help="speed: measurements, of which the median counts")
    args = parser.parse_intermixed_args()
    if args.table in ("quality", "facades") and not args.what:
        parser.error("name the folders of images")
    globals()[args.table](args)


if __name__ == "__main__":
    main()
