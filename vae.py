"""Variational autoencoder: Kingma & Welling, "Auto-Encoding Variational Bayes" (2014,
arXiv:1312.6114), and its deterministic twin, the autoencoder.

    python vae.py --cuda                                     MNIST, downloaded to data/
    python vae.py --latent-dim 2                             also draws figure 4, manifold.png
    python vae.py --autoencoder                              z = the encoder's mean, no KL
    torchrun --nproc-per-node 8 vae.py --cuda                eight GPUs, --batch-size for each
    python vae.py --resume runs/vae --epochs 12              continue training
    python vae.py --sample runs/vae --num-samples 10000      write images
    python vae.py --sample runs/vae --interpolate 8          walk from image to image
    python vae.py --eval runs/vae                            print a tighter bound on log p(x)

Writes to runs/vae: checkpoint.pt, metrics.csv, args.json, samples/real.png with training images,
and after every epoch samples/epoch_0001.png, ... with images from the same noise, and
reconstructions/ with held-out images above their reconstructions. The metrics are the negative ELBO
and its two terms, in nats per image, with weight 1 for the KL. An autoencoder has no KL and draws
no samples.

Differences from the paper:
1. The learning rate makes one cycle over all --epochs, from --lr / 5 up to 5 * --lr and down to
   almost 0 (Smith & Topin 2018, arXiv:1708.07120). With --constant-lr it is --lr.
2. Adam, not Adagrad; ReLU, not tanh; PyTorch's initial weights; 400 hidden units, not 500; batches
   of 128, not 100, without the last partial one; no weight decay: as in most implementations.
3. Gray values in [0, 1] are the targets of a Bernoulli likelihood, not binarized. That is no
   density of gray values, so compare these bounds only with others computed like this.
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import socket
import sys
from collections import defaultdict
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim import Adam
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common import save_grid, select_device

NAME = Path(__file__).stem  # names the run's folder and marks its checkpoints
RANK = int(os.environ.get("RANK", 0))  # the number of this process under torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are
DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST}


class VAE(nn.Module):
    """Encoder q(z|x) = N(mean, exp(logvar)) and decoder p(x|z), each with one hidden layer:
    appendix C. In an autoencoder z is the mean, and there is no KL."""

    def __init__(self, latent_dim, width, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder
        self.encoder = nn.Sequential(  # (B, 1, 28, 28) to (B, 2 * latent_dim)
            nn.Flatten(),
            nn.Linear(784, width),
            nn.ReLU(),
            nn.Linear(width, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(  # (B, latent_dim) to (B, 1, 28, 28)
            nn.Linear(latent_dim, width),
            nn.ReLU(),
            nn.Linear(width, 784),
            nn.Unflatten(1, (1, 28, 28)),
        )

    def encode(self, x):
        """Maps images (B, 1, 28, 28) in [0, 1] to mean and logvar, each (B, latent_dim)."""
        return self.encoder(x).float().chunk(2, dim=1)

    def forward(self, x, epsilon):
        """Maps images and epsilon (B, latent_dim) from N(0, I) to logits (B, 1, 28, 28) and the KL
        of each image (B,)."""
        mean, logvar = self.encode(x)
        if self.autoencoder:
            return self.decoder(mean).float(), torch.zeros_like(mean[:, 0])
        z = reparameterize(mean, logvar, epsilon)
        return self.decoder(z).float(), kl_divergence(mean, logvar)


def reparameterize(mean, logvar, epsilon):
    """z ~ N(mean, exp(logvar)) as a function of epsilon ~ N(0, I), so that gradients reach mean and
    logvar: section 2.4."""
    return mean + torch.exp(0.5 * logvar) * epsilon


def kl_divergence(mean, logvar):
    """KL(q(z|x) || N(0, I)) in nats, summed over the latent dimensions (appendix B):
    (B, latent_dim) to (B,)."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1)


def reconstruction_loss(logits, x):
    """-log p(x|z) in nats, with a Bernoulli distribution for each pixel (appendix C.1), summed over
    the pixels: (B, ...) to (B,). If you change the distribution, change decode(), too."""
    loss = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return loss.flatten(1).sum(1)


@torch.no_grad()
def decode(model, z):
    """Maps z (B, latent_dim) to the mean of p(x|z), images (B, 1, 28, 28) in [0, 1]."""
    return model.decoder(z).sigmoid()


def train(args, checkpoint):
    device = select_device(args.cuda, checkpoint)
    images, held_out = (part.to(device) for part in load_images(args))
    steps = len(images) // args.batch_size
    if steps == 0:
        sys.exit(f"error: {len(images)} images per process are too few: lower --batch-size")

    torch.manual_seed(args.seed)
    fixed_noise = torch.randn(64, args.latent_dim).to(device)
    model = VAE(args.latent_dim, args.width, args.autoencoder).to(device)
    optimizer = Adam(model.parameters(), args.lr, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    if args.compile:
        model.compile(dynamic=False)

    state = {"model": model, "optimizer": optimizer}  # what a checkpoint restores
    history = []  # a row of metrics for each epoch
    if checkpoint:
        history = checkpoint["metrics"]
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])

    if RANK == 0:
        args.out_dir = args.out_dir or new_folder(f"runs/{NAME}")
        samples = args.out_dir / "samples"
        reconstructions = args.out_dir / "reconstructions"
        # Fails if another run has just taken this folder.
        samples.mkdir(parents=True, exist_ok=os.path.exists(args.out_dir / "checkpoint.pt"))
        reconstructions.mkdir(exist_ok=True)
        save_grid(images[:64], samples / "real.png", value_range=(0, 1))
        print(f"{args.dataset}: {len(images) * WORLD_SIZE:,} images, {steps:,} steps per epoch")
        print(f"on {device.type}, writing to {args.out_dir}", flush=True)

    step = len(history) * steps
    for epoch in range(len(history) + 1, args.epochs + 1):
        # Reseed every epoch, so that a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        batches = torch.randperm(len(images), device=device).split(args.batch_size)[:steps]
        sums = defaultdict(float)
        # progress() shows the means of sums, and at the end of the epoch appends them to history.
        for index in progress(batches, sums, history, args):
            lr = args.lr if args.constant_lr else one_cycle(step, args.epochs * steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr
            step += 1

            # Algorithm 1: minimize the negative of eq. 10, with one z for each image.
            x = images[index]
            epsilon = torch.randn(args.batch_size, args.latent_dim, device=device)
            with autocast:
                logits, kl = model(x, epsilon)
            reconstruction = reconstruction_loss(logits, x)
            loss = (reconstruction + args.beta * kl).mean()
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model)
            optimizer.step()

            # Add up the metric on the GPU. .item() would wait for it.
            with torch.no_grad():
                sums["train_loss"] += (reconstruction + kl).mean()

        if RANK == 0:
            model.eval()
            tested = evaluate(model, held_out, args)
            print("  ".join(f"{name} {mean:.5g}" for name, mean in tested.items()), flush=True)
            history[-1] = {"epoch": epoch, **tested, **history[-1]}

            picture = f"epoch_{epoch:04d}.png"
            x = held_out[:16]
            pairs = torch.cat([x, decode(model, model.encode(x)[0])])
            save_grid(pairs, reconstructions / picture, columns=len(x), value_range=(0, 1))
            if not args.autoencoder:
                save_grid(decode(model, fixed_noise), samples / picture, value_range=(0, 1))
            # Save the checkpoint last: a run killed before that repeats this epoch.
            save(state, history, args)
            model.train()

    if RANK == 0:
        if args.latent_dim == 2 and not args.autoencoder:
            draw_manifold(model.eval(), device, args.out_dir / "manifold.png")
        print(f"done after epoch {len(history)}, pictures in {samples}")


def one_cycle(step, steps, lr):
    """The learning rate of `step` (0 to steps - 1), as in PyTorch's OneCycleLR: from lr / 5 up to
    5 lr over the first 30% of the steps, then down to lr / 50,000, on half cosines."""
    top = 0.3 * steps - 1
    last = steps - 1
    t = step / top if step < top else (last - step) / (last - top)  # 1 at the top
    start = lr / 5 if step < top else lr / 50_000
    return start + (5 * lr - start) * (1 - math.cos(math.pi * t)) / 2


def average_gradients(network):
    """Averages the gradients over all processes, so that they all take the same step."""
    if WORLD_SIZE > 1:
        for p in network.parameters():
            dist.all_reduce(p.grad.div_(WORLD_SIZE))


@torch.no_grad()
def evaluate(model, held_out, args):
    """Returns the negative ELBO, with one z per image, and its two terms, in nats: the means over
    images (N, 1, 28, 28)."""
    torch.manual_seed(args.seed)  # training is seeded again in each epoch
    terms = []
    for x in held_out.split(1000):
        epsilon = torch.randn(len(x), args.latent_dim, device=x.device)
        logits, kl = model.forward(x, epsilon)  # uncompiled, or it would recompile for this size
        terms.append(torch.stack([reconstruction_loss(logits, x), kl]))
    reconstruction, kl = torch.cat(terms, 1).mean(1).tolist()
    return {
        "test_loss": reconstruction + kl,
        "test_reconstruction": reconstruction,
        "test_kl": kl,
    }


def log_likelihood_bound(model, x, count):
    """Returns a lower bound on log p(x), in nats, for each image of x (B, 1, 28, 28): (B,).

    The log of the mean of `count` weights p(x, z) / q(z|x), with z ~ q(z|x): Burda et al. 2016
    (arXiv:1509.00519), eq. 8. One weight gives the ELBO, more weights a tighter bound."""
    mean, logvar = model.encode(x)
    epsilon = torch.randn(count, *mean.shape, device=x.device)
    z = reparameterize(mean, logvar, epsilon)  # (count, B, latent_dim)
    logits = model.decoder(z.flatten(0, 1))
    log_px_z = -reconstruction_loss(logits, x.repeat(count, 1, 1, 1)).view(count, -1)
    log_pz_qz = 0.5 * (epsilon.square() + logvar - z.square()).sum(2)  # log(2 pi) cancels
    return torch.logsumexp(log_px_z + log_pz_qz, 0) - math.log(count)


@torch.no_grad()
def estimate(args, checkpoint):
    """Prints a bound on log p(x), the mean over the held-out images."""
    held_out = load_images(args)[1]
    model, device = restore(args, checkpoint)
    count = args.importance_samples
    chunks = held_out.to(device).split(max(1, 5000 // count))  # about 5,000 decoded at once
    bounds = torch.cat([log_likelihood_bound(model, x, count) for x in chunks])
    error = bounds.std() / math.sqrt(len(bounds))
    print(
        f"{args.dataset}: log p(x) >= {bounds.mean():.2f} nats, mean of {len(bounds):,} held-out "
        f"images (standard error {error:.2f}), {count} importance samples"
    )


@torch.no_grad()
def sample(args, checkpoint):
    """Writes generated images, each to a file, and the first 64 of them as a grid."""
    model, device = restore(args, checkpoint)
    name = "generated"
    z = torch.randn(args.num_samples, args.latent_dim).to(device)
    if args.interpolate:
        # Eight points on a straight line from the encoding of a held-out image to that of another.
        x = load_images(args)[1][: 2 * args.interpolate].to(device)
        a, b = model.encode(x)[0].unsqueeze(1).chunk(2)
        t = torch.linspace(0, 1, 8, device=device)[:, None]
        z = torch.lerp(a, b, t).flatten(0, 1)
        name = "interpolation"

    folder = new_folder(args.out_dir / name)
    for n, one in enumerate(z.split(1)):  # one by one, to need no more memory for many
        image = decode(model, one)[0] * 255 + 0.5
        to_pil_image(image.byte()).save(folder / f"{n:05d}.png")
    save_grid(decode(model, z[:64]), f"{folder}.png", value_range=(0, 1))
    print(f"{len(z):,} images in {folder}, a grid in {folder}.png")


def draw_manifold(model, device, path):
    """Figure 4: a grid on the unit square, mapped to z by the Gaussian's quantiles. z_1 grows to
    the right, z_2 upwards."""
    quantiles = torch.special.ndtri((torch.arange(20) + 0.5) / 20)
    z = torch.cartesian_prod(-quantiles, quantiles).flip(1).to(device)
    save_grid(decode(model, z), path, columns=20, value_range=(0, 1))


def restore(args, checkpoint):
    """Returns the trained model and its device. Seeds the random numbers with --seed."""
    device = select_device(args.cuda)
    model = VAE(args.latent_dim, args.width, args.autoencoder).to(device).eval()
    model.load_state_dict(checkpoint["model"])
    torch.manual_seed(args.seed)
    return model, device


def load_images(args):
    """Returns this process's share of the training set, and the whole held-out set: floats
    (N, 1, 28, 28) in [0, 1]. The held-out set is the same in every run and process.

    Without --dataset and without MNIST, sets args.dataset to synthetic."""
    source = DATASETS.get(args.dataset or "mnist")
    if source and os.environ.get("LOCAL_RANK", "0") == "0":  # one process of each machine
        socket.setdefaulttimeout(10)  # seconds, so that no download hangs
        try:
            source(args.data_dir, download=True)
            source(args.data_dir, train=False)
        except (OSError, RuntimeError, ValueError, EOFError, AssertionError) as error:
            files = Path(args.data_dir, source.__name__, "raw").glob("*-ubyte")
            damaged = len(list(files)) == 4  # none was missing, so it was not the download
            problem = "damaged, so delete it" if damaged else "missing, and no download"
            reason = f"{source.__name__} in {args.data_dir} is {problem}: {error!r:.300}"
            # Never replace a set the user named. Several processes must train on the same one.
            if damaged or args.dataset or WORLD_SIZE > 1:
                sys.exit(f"error: {reason}")
            print(f"warning: {reason}: training on synthetic digits", file=sys.stderr)
            args.dataset = "synthetic"
    if WORLD_SIZE > 1:
        dist.barrier()  # wait for the download

    args.dataset = args.dataset or "mnist"
    if args.dataset == "synthetic":
        images = synthetic_digits(20_000, seed=0)
        held_out = synthetic_digits(2_000, seed=1)
    else:
        images = source(args.data_dir).data
        held_out = source(args.data_dir, train=False).data
    # Equal shares, so that all processes make the same number of steps.
    images = images[RANK::WORLD_SIZE][: len(images) // WORLD_SIZE]
    return images.unsqueeze(1) / 255, held_out.unsqueeze(1) / 255


def synthetic_digits(count, seed):
    """`count` digits in Pillow's own font under random affine maps: uint8 (count, 28, 28)."""
    glyphs = torch.zeros(10, 1, 28, 28)
    font = ImageFont.load_default(26)
    for digit in range(10):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), str(digit), 255, font, anchor="mm")
        glyphs[digit] = pil_to_tensor(image)

    torch.manual_seed(seed)
    glyphs = glyphs[torch.randint(10, (count,))]
    # The identity, with each entry changed by up to a quarter.
    maps = torch.eye(2, 3) + torch.empty(count, 2, 3).uniform_(-0.25, 0.25)
    grid = F.affine_grid(maps, glyphs.shape, align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False).byte().squeeze(1)


# Seconds between two lines of progress, and what a line starts and ends with. On a terminal: clear
# the old one, cut the new one at the edge (?7l to ?7h), and go back to its start.
PAUSE = 60
START = ""
END = "\n"
if sys.stdout.isatty():
    PAUSE = 0.5
    START = "\033[K\033[?7l"
    END = "\033[?7h\r"


def progress(batches, sums, history, args):
    """Yields the batches of an epoch, and prints the means of `sums` over the steps so far.

    At the end of the epoch, appends them to `history`."""
    epoch = len(history) + 1
    began = shown = perf_counter()
    for step, batch in enumerate(batches, 1):
        yield batch
        done = step / len(batches)
        if done < 1 and perf_counter() - shown < PAUSE:
            continue

        row = {name: float(total) / step for name, total in sums.items()}  # waits for the GPU
        shown = perf_counter()
        seconds = shown - began
        rate = step * len(batch) * WORLD_SIZE / seconds
        left = ((args.epochs - epoch + 1) / done - 1) * seconds / 60
        line = f"{START}epoch {epoch}/{args.epochs}  {done:.0%}  {left:.0f} min left"
        for name, mean in row.items():
            line += f"  {name} {mean:.3g}"
        if RANK == 0:
            end = END if done < 1 else END.replace("\r", "\n")
            print(f"{line}  {rate:,.0f} images/s", end=end, flush=True)

    if history:
        seconds += history[-1]["seconds"]  # of the whole run
    history.append(
        {
            "epoch": epoch,
            **row,
            "images_per_second": rate,
            "seconds": seconds,
        }
    )


def save(state, history, args):
    """Writes args.json and metrics.csv, and replaces checkpoint.pt in one step: a kill or a full
    disk leaves the old one or the new one. Ends the program if a metric is not finite."""
    if not all(map(math.isfinite, history[-1].values())):
        sys.exit(f"error: not finite, so not saved: lower --lr: {history[-1]}")

    # Leave out the flags that are for this command only.
    flags = vars(args) | dict.fromkeys(("cuda", "out_dir", "resume", "sample", "eval"))
    # weights_only=True requires plain values. argparse turns strings into paths again.
    checkpoint = json.dumps({"script": NAME, "args": flags, "metrics": history}, default=os.fspath)
    checkpoint = json.loads(checkpoint)
    (args.out_dir / "args.json").write_text(json.dumps(checkpoint["args"], indent=4))
    with open(args.out_dir / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, history[-1], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)

    for name, part in state.items():
        checkpoint[name] = part.state_dict()
    names = ["checkpoint.pt"]
    if args.keep_every and len(history) % args.keep_every == 0:
        names.insert(0, f"checkpoint_{len(history):04d}.pt")
    new = args.out_dir / "checkpoint.part"
    for name in names:
        # In memory first: on a full disk, torch.save() to a file would raise a RuntimeError.
        data = io.BytesIO()
        torch.save(checkpoint, data)
        new.write_bytes(data.getbuffer())
        os.replace(new, args.out_dir / name)


def new_folder(path):
    """Makes and returns the first of the folders `path`, `path`-2, `path`-3, ... that is free."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1):
        folder = Path(f"{path}-{n}" if n > 1 else path)
        # Never overwrite a grid of samples, even if its folder is gone.
        if not os.path.exists(f"{folder}.png"):
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # perhaps made just now by another process
                continue


def positive(text):
    """For argparse: a whole number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv=None):
    """Returns the arguments, and the checkpoint that --resume, --sample or --eval names,
    else None."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    number = {"type": positive, "metavar": "N"}
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--epochs", **number, default=10, help="total passes over the training set (%(default)s)")
    add("--batch-size", **number, default=128, help="images per step and process (%(default)s)")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (%(default)s)")
    add("--constant-lr", **switch, help="--lr throughout, instead of one cycle")
    add("--beta", type=float, default=1.0, help="weight of the KL (%(default)s)")
    add("--autoencoder", **switch, help="z is the encoder's mean, and there is no KL")
    add("--seed", type=int, default=0, help="makes CPU runs bit-reproducible (0)")
    add("--cuda", action="store_true", help="use the GPU; under torchrun, one per process")
    add("--bf16", **switch, help="autocast to bfloat16")
    add("--compile", **switch, help="torch.compile the network")
    add("--dataset", choices=(*DATASETS, "synthetic"), help="default: mnist, if available")
    add("--data-dir", type=os.path.abspath, default="data", help="where the data sets are (data)")
    add("--latent-dim", **number, default=20, help="size of z (%(default)s)")
    add("--width", **number, default=400, help="units of the hidden layers (%(default)s)")
    add("--out-dir", type=Path, help="default: a new folder in runs/")
    add("--keep-every", **number, help="also keep every N-th epoch's checkpoint")
    use = parser.add_mutually_exclusive_group().add_argument
    use("--resume", type=Path, help="continue from that run or checkpoint")
    use("--sample", type=Path, help="write images from that run or checkpoint")
    add("--num-samples", **number, default=64, help="with --sample: images (%(default)s)")
    add("--interpolate", **number, help="with --sample: number of interpolations")
    use("--eval", type=Path, help="print a bound on log p(x) for that run or checkpoint")
    add("--importance-samples", **number, default=100, help="with --eval: z per image (100)")

    args = parser.parse_args(argv)
    if args.interpolate and not args.sample:
        parser.error("--interpolate needs --sample")
    checkpoint = None
    path = args.resume or args.sample or args.eval
    if path:
        if os.path.isdir(path):
            path /= "checkpoint.pt"
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["script"] != NAME:
                raise ValueError(f"it is of {checkpoint['script']}.py")
            # What the checkpoint saved becomes the default, so that no flag need be repeated.
            parser.set_defaults(**checkpoint["args"])
        except Exception as error:  # torch.load raises many kinds
            parser.error(f"{path} cannot be read as a checkpoint of {NAME}.py: {error!r:.99}")
        if args.sample or path.name == "checkpoint.pt":
            parser.set_defaults(out_dir=path.parent)
        args = parser.parse_args(argv)

    if args.out_dir and not args.sample and os.path.isdir(args.out_dir):
        newest = (args.out_dir / "checkpoint.pt").resolve()
        if os.listdir(args.out_dir) and (not path or path.resolve() != newest):
            parser.error(f"{args.out_dir} is not empty: --resume it, or use another --out-dir")
    if not 0 < args.lr <= 1:
        parser.error("--lr must be above 0 and at most 1")
    if args.autoencoder and (args.eval or (args.sample and not args.interpolate)):
        parser.error("an autoencoder has no prior: use --sample with --interpolate")
    return args, checkpoint


def main():
    args, checkpoint = parse_args()
    run = sample if args.sample else estimate if args.eval else train
    try:
        run(args, checkpoint)
    except OSError as error:
        # The run's folder cannot be written, is gone, or the disk is full.
        if isinstance(error, FileNotFoundError) and f"{args.out_dir}/" not in str(error):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        line = "stopped"
        if run is train and RANK == 0:
            line += " before the first checkpoint"
            if os.path.exists(f"{args.out_dir}/checkpoint.pt"):
                line = f"stopped; to continue: python {NAME}.py --resume {args.out_dir}"
        print(f"\n{line}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
