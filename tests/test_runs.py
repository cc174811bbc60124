"""Runs of every script: what they write; killed, on a full disk, misled; and copies, changed."""

import csv
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import gan
import numpy as np
import pix2pix
import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, STEADY, Command, load, result, run, same, write_mnist
from PIL import Image
from torchvision.transforms.functional import center_crop, to_pil_image

# The columns of metrics.csv, beside the epoch and the speed.
COLUMNS = {
    "vae": ["test_loss", "test_reconstruction", "test_kl", "train_loss"],
    "gan": ["loss_d", "loss_g", "d_real", "d_fake"],
    "dcgan": ["loss_d", "loss_g", "d_real", "d_fake"],
    "pix2pix": ["val_l1", "val_psnr", "loss_d", "loss_g_gan", "loss_g_l1"],
}


def only(names):
    """The test is about these scripts."""
    return pytest.mark.parametrize("name", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def long(name, flags, tmp_path_factory):
    """A run of 24 epochs: its folder, its open files and memory (KiB) at epochs 8 and 20."""
    folder, seen = tmp_path_factory.mktemp(name), []
    running = Command(name, "--epochs", 24, "--out-dir", folder / "run", *flags[name], cwd=folder)
    for epoch in (8, 20):
        running.wait_for(folder / "run" / "samples" / f"epoch_{epoch:04d}.png")
        process = Path(f"/proc/{running.process.pid}")
        if process.exists():  # on Linux
            memory = re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text())
            seen.append((len(os.listdir(process / "fd")), int(memory[1])))
    assert running.wait() == (0, "")
    return folder / "run", seen


@pytest.fixture(scope="module")
def finished(name, flags, tmp_path_factory):
    """The folder of a run of two epochs, not to be changed."""
    out = tmp_path_factory.mktemp(name) / "run"
    assert run(SCRIPTS[name], "--epochs", 2, "--out-dir", out, *flags[name]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, and the path of the checkpoint in it."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    return out, out / "checkpoint.pt"


@pytest.fixture
def offline(monkeypatch):
    def getaddrinfo(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# what a run writes and says


def test_metrics_and_log_have_a_line_an_epoch(name, script, flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(script, "--epochs", 2, "--out-dir", out, *flags[name]) == 0
    printed, err = capsys.readouterr()
    first, *lines, last = printed.splitlines()
    data = "folder: 3 pairs" if name == "pix2pix" else "mnist: 255 images"
    assert (err, first) == ("", f"{data}, 3 steps per epoch")
    if name in ("dcgan", "pix2pix"):
        assert lines.pop(0) == "few steps, so expect blurry images: --epochs 1334 makes 4,000 steps"
    assert lines.pop(0) == f"on cpu, writing to {out}"
    assert last == f"done after epoch 2, pictures in {out}/samples"
    assert max(map(len, lines)) <= 100

    assert json.loads((out / "args.json").read_text()) == load(out)["args"]
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert list(rows[0]) == ["epoch", *COLUMNS[name], "images_per_second", "seconds"]
    assert len(rows) == 2
    pattern = r"epoch \d/2  100%  \d min left  .*  [\d,]+ images/s"
    assert len([line for line in lines if re.fullmatch(pattern, line)]) == 2
    for row, text in zip(rows, (lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        for column in COLUMNS[name]:
            shown = re.search(rf"\b{column} (\S+)", "  ".join(text))[1]
            assert float(shown) == pytest.approx(float(row[column]), rel=5e-3)
    images = 3 if name == "pix2pix" else 192  # 3 of 1, or of 64
    assert float(rows[0]["images_per_second"]) * float(rows[0]["seconds"]) == pytest.approx(images)
    assert float(rows[1]["seconds"]) > float(rows[0]["seconds"])
    grids = sorted(path.name for path in (out / "samples").iterdir())
    assert grids == ["epoch_0001.png", "epoch_0002.png", "real.png"]


def test_real_images_are_shown(name, finished):
    """In a grid of eight columns: digits of the training set, or source and target of its pairs."""
    picture = torch.tensor(np.asarray(Image.open(finished / "samples" / "real.png")))
    side = {"dcgan": 32, "pix2pix": 36}.get(name, 28)  # padded; with room for the jitter
    first, second = (picture[2 : 2 + side, x : x + side] for x in (2, side + 4))
    if name == "pix2pix":
        photo, labels = map(to_pil_image, pix2pix.synthetic_facades(3, 40, 0)[0])
        assert torch.equal(first, pix2pix.to_square(photo, side).permute(1, 2, 0))
        assert torch.equal(second, pix2pix.to_square(labels, side).permute(1, 2, 0))
    else:
        digits = center_crop(gan.synthetic_digits(255, 0), side).tolist()
        assert first[..., 0].tolist() in digits and second[..., 0].tolist() in digits


def test_progress_shows_the_means_so_far_and_the_time_left(script, monkeypatch, capsys):
    """The second of three epochs, of two batches of five images, a minute each."""
    clock = iter([0, 60, 60, 120])
    monkeypatch.setattr(script, "perf_counter", lambda: next(clock))
    sums, history = {"loss": 0.0}, [{"seconds": 6}]
    for batch in script.progress(torch.zeros(2, 5), sums, history, SimpleNamespace(epochs=3)):
        assert len(batch) == 5
        sums["loss"] += torch.tensor(1.0 + len(history)) * (2 if sums["loss"] else 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "epoch 2/3  50%  3 min left  loss 2  0 images/s",
        "epoch 2/3  100%  2 min left  loss 3  0 images/s",
    ]
    assert history[1] == {
        "epoch": 2,
        "loss": 3.0,
        "images_per_second": 10 / 120,
        "seconds": 126,
    }


@only(["gan"])  # the others have the same progress(), word for word
def test_a_terminal_shows_one_line_that_is_rewritten(name, flags, tmp_path):
    """Cut off at its edge, and wrapping again after each."""
    pid, terminal = os.forkpty()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        code = f"import {name}; {name}.PAUSE = -1; {name}.main()"
        words = ["--epochs", "1", *flags[name], "--batch-size", "16"]
        os.execv(sys.executable, [sys.executable, "-c", code, *words])
    output = b""
    while True:
        try:
            output += os.read(terminal, 10_000)
        except OSError:  # Linux's way to say that the program has ended
            break
    assert os.waitpid(pid, 0)[1] == 0
    *_, progress, end = output.decode().strip().split("\r\n")
    lines = progress.split("\r")
    assert len(lines) == 255 // 16 and end.startswith("done after epoch 1,")
    assert all(re.fullmatch(r"\033\[K\033\[\?7lepoch 1/1.*s\033\[\?7h", line) for line in lines)


def test_progress_comes_between_steps(name, script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "PAUSE", -1)  # seconds between lines
    assert run(script, "--epochs", 1, "--out-dir", tmp_path / "run", *flags[name]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " min left" in line]
    assert re.findall(r"(\d+)%", " ".join(lines)) == ["33", "67", "100"]
    assert len({tuple(line.split("  ")[3:-1]) for line in lines}) > 1  # the metrics


def test_bfloat16_is_near_float32(name, script, flags, finished, tmp_path):
    """After one epoch: later, differences of rounding have grown until the runs are unlike."""
    assert run(script, "--bf16", "--epochs", 2, "--out-dir", tmp_path / "run", *flags[name]) == 0
    bf16, float32 = load(tmp_path / "run")["metrics"][0], load(finished)["metrics"][0]
    for column in COLUMNS[name]:
        assert bf16[column] == pytest.approx(float32[column], rel=0.01, abs=0.01)
    assert bf16[COLUMNS[name][0]] != float32[COLUMNS[name][0]]


def test_memory_and_open_files_do_not_grow(long):
    if not long[1]:
        pytest.skip("no /proc here")
    (files, memory), (files_later, memory_later) = long[1]
    assert abs(files_later - files) <= 3  # a file of the epoch may be open just then
    assert memory_later < 1.05 * memory


def test_no_run_and_no_samples_overwrite_others(name, script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Path("runs", name)
    command = ["--epochs", 1, *flags[name]]
    assert run(script, *command) == run(script, *command) == 0
    before = result(out)
    assert run(script, *command, "--out-dir", out) == 2
    assert f"{out} is not empty" in capsys.readouterr().err
    assert same(result(out), before) and sorted(os.listdir("runs")) == [name, f"{name}-2"]

    sample = ["--sample", out / "checkpoint.pt", "--num-samples", 1, "--out-dir", "new"]
    assert run(script, *sample) == run(script, *sample) == 0
    made = ["generated", "generated-2", "generated-2.png", "generated.png"]
    assert sorted(os.listdir("new")) == made
    shutil.move("new/generated-2", "moved")
    assert run(script, *sample) == 0 and Path("new/generated-3").is_dir()  # the grid of -2 stays


def test_runs_on_a_disk_that_is_not_there(name, script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("gone")
    assert run(script, "--epochs", 1, *flags[name]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "'runs'" in err and len(err.splitlines()) == 1


def test_two_runs_at_once_have_two_folders_and_never_one(name, flags, tmp_path):
    words = [name, "--epochs", 2, *flags[name]]
    running = [Command(*words, cwd=tmp_path) for _ in range(2)]
    assert [command.wait() for command in running] == [(0, "")] * 2
    running = [Command(*words, "--out-dir", "run", cwd=tmp_path) for _ in range(2)]
    assert [command.wait()[0] for command in running].count(0) == 1
    runs = tmp_path / "runs"
    assert sorted(os.listdir(runs)) == [name, f"{name}-2"]
    for folder in (runs / f"{name}-2", tmp_path / "run"):
        assert same(result(folder), result(runs / name))


def test_a_fork_never_joins_a_run_that_has_just_taken_its_folder(
    name, script, copied, tmp_path, monkeypatch, capsys
):
    def taken(*args, **kwargs):
        (tmp_path / "fork" / "samples").mkdir(parents=True, exist_ok=True)
        return loaded(*args, **kwargs)

    load = "load_pairs" if name == "pix2pix" else "load_images"
    loaded = getattr(script, load)
    monkeypatch.setattr(script, load, taken)
    words = ["--resume", copied[1], "--epochs", 3]
    assert run(script, *words, "--out-dir", tmp_path / "fork") == 1
    assert re.fullmatch(r"error: .*File exists.*samples'\n", capsys.readouterr().err)
    assert os.listdir(tmp_path / "fork" / "samples") == []


def test_nothing_said_and_no_network(name, script, offline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [*SMALL[name], "--epochs", 1, "--batch-size", 400]
    assert run(script, *small) == 0
    out, err = capsys.readouterr()
    what = "facades" if name == "pix2pix" else "MNIST"
    assert "synthetic: " in out and len(err.splitlines()) == 1
    # Before torchvision 0.20, its cause is on stdout.
    assert err.startswith("warning: ") and what in err and "not known" in out + err
    assert load(Path("runs", name))["args"]["dataset"] == "synthetic"

    # A set that was named is never replaced.
    named = "facades" if name == "pix2pix" else "fashion-mnist"
    assert run(script, *small, "--dataset", named, "--out-dir", "other") == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "no download" in err and "http" in out + err
    assert not Path("other").exists()


@pytest.mark.parametrize("size", [-1000, 5, None])
@only(["vae", "gan", "dcgan"])
def test_damaged_files_are_named_and_never_replaced(size, name, script, tmp_path, capsys):
    """Cut, or full of zeros, as after a power failure; also those of vae.py's held-out images."""
    write_mnist(tmp_path, 255)
    kind = "t10k" if name == "vae" else "train"
    path = tmp_path / "MNIST" / "raw" / f"{kind}-images-idx3-ubyte"
    data = path.read_bytes()
    path.write_bytes(data[:size] if size else bytes(len(data)))
    assert run(script, "--data-dir", tmp_path, "--out-dir", tmp_path / "run") == 1
    err = capsys.readouterr().err
    line = f"error: MNIST in {tmp_path} is damaged, so delete it: "
    assert err.startswith(line) and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_two_machines_without_a_shared_disk(two_machines):
    """Both have the data, the first alone writes. Without the checkpoint to resume, the second says
    so, upon which the first ends, too."""
    (first, second), running = two_machines
    trained, resumed = running.result()
    assert trained == [0, 0]
    assert (first / "runs" / "gan" / "checkpoint.pt").exists() and not (second / "runs").exists()
    assert 0 not in resumed
    assert "No such file or directory" in (second / "output").read_text()
    assert "error: another process has ended" in (first / "output").read_text()


# resumed


def test_a_finished_run_stays_as_it_is(script, finished, capsys):
    before = result(finished)
    assert run(script, "--resume", finished / "checkpoint.pt") == 0
    assert "done after epoch 2," in capsys.readouterr().out and same(result(finished), before)


def test_resume_keeps_what_was_not_said_and_takes_what_was(name, script, copied):
    out, checkpoint = copied
    kept = load(out)["args"]
    assert kept["batch_size"] == (1 if name == "pix2pix" else 64) and kept["width"] != 256
    assert run(script, "--resume", checkpoint, "--epochs", 3) == 0
    assert load(out)["args"] == {**kept, "epochs": 3}

    words = ["--epochs", 4, "--seed", 5, "--bf16", "--lr", 0.5, *STEADY.get(name, [])]
    assert run(script, "--resume", out, *words) == 0  # its folder
    state = load(out)
    new = {"epochs": 4, "seed": 5, "bf16": True, "lr": 0.5}
    assert {**state["args"], **new} == state["args"]
    for part in state:
        if part.startswith("optimizer"):
            assert state[part]["param_groups"][0]["lr"] == 0.5

    # The same folder, spelt otherwise. An older version may have saved a flag of --sample.
    flag = "deterministic" if name == "pix2pix" else "interpolate"
    torch.save({**state, "args": {**state["args"], flag: 2}}, checkpoint)
    assert run(script, "--resume", out, "--epochs", 5, "--out-dir", out / ".." / out.name) == 0


def test_a_kept_checkpoint_is_resumed_in_another_folder(
    name, script, flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out, fork = tmp_path / "run", tmp_path / "fork"
    words = ["--epochs", 5, *flags[name], "--keep-every", 2]
    words += ["--save-every", 3] if name == "pix2pix" else []
    assert run(script, *words, "--out-dir", out) == 0
    kept = sorted(path.name for path in out.glob("*.pt"))
    assert kept == ["checkpoint.pt", "checkpoint_0002.pt", "checkpoint_0004.pt"]

    before = result(out)
    assert run(script, "--resume", out / kept[1], "--out-dir", out) == 2  # no overwriting
    assert f"{out} is not empty" in capsys.readouterr().err
    assert same(result(out), before)
    for words in (["--out-dir", fork], []):  # it makes a folder of its own
        assert run(script, "--resume", out / kept[1], *words) == 0
    for folder in (fork, Path("runs", name)):
        assert same(result(folder)["checkpoint"], before["checkpoint"])


def test_weights_that_are_not_finite_stop_the_run(script, copied, capsys):
    out, checkpoint = copied
    state = load(out)
    network = state["model" if "model" in state else "generator"]
    next(iter(network.values())).view(-1)[0] = float("nan")
    torch.save(state, checkpoint)
    before = checkpoint.read_bytes()
    assert run(script, "--resume", checkpoint, "--epochs", 3) == 1
    err = capsys.readouterr().err
    assert "not finite" in err and len(err.splitlines()) == 1
    assert checkpoint.read_bytes() == before


# killed, stopped, without room


def test_killed_at_four_moments_the_end_is_the_same_to_the_bit(name, flags, long, tmp_path):
    """At seeded epochs and a while after: in a step, a grid, a checkpoint, or in the start."""
    out, moments = tmp_path / "run", random.Random(name)
    for epoch in sorted(moments.sample(range(1, 20), 4)):
        words = ["--epochs", 24, "--out-dir", out, *flags[name]]
        if (out / "checkpoint.pt").exists():
            words = ["--resume", out / "checkpoint.pt"]
        running = Command(name, *words, cwd=tmp_path)
        running.wait_for(out / "samples" / f"epoch_{epoch:04d}.png")
        running.process.join(moments.uniform(0, 0.05))
        running.process.kill()
        assert running.wait()[0] == -signal.SIGKILL
    assert Command(name, "--resume", out / "checkpoint.pt", cwd=tmp_path).wait() == (0, "")
    assert same(result(out), result(long[0]))


def die_in_the_second_save(script):
    saves, replace = [], os.replace

    def torn(source, target):
        saves.append(source)
        if len(saves) == 2:
            os.truncate(source, os.stat(source).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = torn
    script.main()


def test_killed_with_half_a_checkpoint_on_the_disk(name, script, flags, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    words = ["--epochs", 3, *flags[name], "--out-dir"]
    running = Command(name, *words, out, cwd=tmp_path, body=die_in_the_second_save)
    assert running.wait()[0] == -signal.SIGKILL and len(load(out)["metrics"]) == 1
    assert Command(name, "--resume", out / "checkpoint.pt", cwd=tmp_path).wait() == (0, "")
    assert run(script, *words, whole) == 0
    assert same(result(out), result(whole))


def test_ctrl_c_says_how_to_go_on(name, flags, tmp_path):
    out = tmp_path / "run"
    running = Command(name, "--epochs", 100_000, "--out-dir", out, *flags[name], cwd=tmp_path)
    running.wait_for(out / "checkpoint.pt")
    assert "few steps" not in running.read("out")
    os.kill(running.process.pid, signal.SIGINT)
    line = f"stopped; to continue: python {name}.py --resume {out}"
    assert running.wait() == (130, f"\n{line}\n")


def test_ctrl_c_before_a_checkpoint_says_that_there_is_none(script, tmp_path, monkeypatch, capsys):
    def interrupted(args, checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", interrupted)
    assert run(script, "--out-dir", tmp_path) == 130
    assert capsys.readouterr().err == "\nstopped before the first checkpoint\n"


def test_a_run_whose_folder_is_taken_away_ends_in_one_line(name, flags, tmp_path):
    out = tmp_path / "run"
    running = Command(name, "--epochs", 100_000, "--out-dir", out, *flags[name], cwd=tmp_path)
    running.wait_for(out / "checkpoint.pt")
    out.rename(tmp_path / "elsewhere")
    status, err = running.wait()
    assert status == 1 and re.fullmatch(rf"error: \[Errno 2\] No such file .*{out}.*\n", err)


def on_a_small_disk(script):
    """Files may have 20,000 bytes, which is enough for all but the checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    script.main()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is a full disk")
@pytest.mark.parametrize("file", [None, "metrics.csv", "samples/epoch_0003.png"])
@only(["gan", "pix2pix"])
def test_a_full_disk_keeps_the_last_checkpoint(name, file, copied, tmp_path):
    out, checkpoint = copied
    before = checkpoint.read_bytes()
    words = ["--resume", checkpoint, "--epochs", 3]
    if file:
        (out / file).unlink(missing_ok=True)
        (out / file).symlink_to("/dev/full")
        status, err = Command(name, *words, cwd=tmp_path).wait()
        (out / file).unlink(missing_ok=True)
    else:
        status, err = Command(name, *words, cwd=tmp_path, body=on_a_small_disk).wait()
    assert status == 1 and re.fullmatch(r"error: \[Errno \d+\] (No space|File too large).*\n", err)
    assert checkpoint.read_bytes() == before
    assert Command(name, *words, cwd=tmp_path).wait() == (0, "")
    assert len(load(out)["metrics"]) == 3


# misled


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_bad_checkpoints_are_refused_in_one_line(
    name, script, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    good, checkpoint = (finished / "checkpoint.pt").read_bytes(), load(finished)
    for tenth in range(10):
        Path(f"torn{tenth}.pt").write_bytes(good[: len(good) * tenth // 10])
    torch.save({**checkpoint, "script": "another"}, "another.pt")
    torch.save([1, 2], "list.pt")
    torch.save({}, "empty.pt")
    torch.save({**checkpoint, "evil": Evil()}, "evil.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Evil(), 2))
    Path("text.pt").write_text("no checkpoint")
    Path("link.pt").symlink_to("link.pt")

    faults = {
        "missing.pt": "No such file or directory",
        "another.pt": "it is of another.py",
    }
    names = sorted(os.listdir())
    for bad in [*names, "missing.pt"]:
        for flag in ("--resume", "--sample"):
            assert run(script, flag, bad) == 2
            out, err = capsys.readouterr()
            assert out == "" and len(err.splitlines()) == 1
            reason = f"{bad} cannot be read as a checkpoint of {name}.py: "
            assert err.startswith(f"{name}.py: error: {reason}")
            assert bad not in faults or faults[bad] in err
    assert sorted(os.listdir()) == names  # no "evil": the code in it did not run


def test_every_flag_with_values_that_nobody_wants(
    name, script, flags, copied, offline, tmp_path, monkeypatch, capsys
):
    """Refused in one line, and nothing is saved; or they mean something, as --seed 0, and run."""
    run(script, "--help")
    cases = []
    for flag, kind in re.findall(r"(--[a-z0-9-]+) ([A-Z0-9_]+)\b", capsys.readouterr().out):
        values = ["-1", "0", "nan", "inf", "1e400", "two", ""]
        if kind in ("DATA_DIR", "OUT_DIR", "RESUME", "SAMPLE", "EVAL", "INPUT"):
            values = ["missing", "file", "file/below", "loop", "folder", "", "x" * 5000]
        cases += [(flag, value) for value in values]
    assert len(cases) > 70

    refused = 0
    for n, (flag, value) in enumerate(cases):
        for base in (["--epochs", 1, *flags[name]], ["--sample", copied[1]]):
            case = tmp_path / f"{n}{base[0]}"
            (case / "folder").mkdir(parents=True)
            (case / "file").write_text("kept")
            (case / "loop").symlink_to("loop")
            monkeypatch.chdir(case)
            status = run(script, *base, flag, value)
            err = re.sub(r"skipped .*\n", "", capsys.readouterr().err)  # files that are no images
            if status:
                refused += 1
                assert re.fullmatch(r"(skipped .*\n)*([\w.]+: )?error: .*\n", err), (flag, value)
                assert status == (2 if err.startswith(f"{name}.py: error") else 1)
                assert not list(case.rglob("*.pt")), (base, flag, value)
            assert (case / "file").read_text() == "kept"
    assert refused > len(cases)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--epochs 0", "argument --epochs: invalid positive value: '0'"),
        ("--lr 2", "--lr must be above 0 and at most 1"),
        ("--resume a --sample a", "argument --sample: not allowed with argument --resume"),
    ],
)
def test_a_wrong_flag_is_one_line_in_plain_words(words, message, name, script, capsys):
    assert run(script, *words.split()) == 2
    assert re.fullmatch(f"{name}.py: error: {message}\n", capsys.readouterr().err)


def test_a_flag_that_draws_needs_sample(name, script, capsys):
    message = "--interpolate needs --sample"
    words = ["--interpolate", 2]
    if name == "pix2pix":
        message = "--input and --deterministic need --sample"
        words = ["--deterministic"]
        assert run(script, "--input", "a.png") == 2
        assert capsys.readouterr().err == f"{name}.py: error: {message}\n"
    assert run(script, *words) == 2
    assert capsys.readouterr().err == f"{name}.py: error: {message}\n"


def test_help_has_the_paper_and_the_examples(script, capsys):
    assert run(script, "--help") == 0
    out = capsys.readouterr().out
    assert script.__doc__.strip() in out and "--keep-every N" in out


# copied and changed


def change(name, folder, *replacements):
    """Puts a copy of the script into `folder`, and common.py; every `old` in it becomes `new`."""
    shutil.copy(ROOT / "common.py", folder)
    text = (ROOT / f"{name}.py").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text)


TRAIN = "def train(args, checkpoint):\n"
MISTAKES = {
    "in a loss": (".mean()", ".view(7).mean()", "RuntimeError"),
    "opening a file in train": (TRAIN, TRAIN + '    open("stats.npz")\n', "FileNotFoundError"),
}


@pytest.mark.parametrize("mistake", ["beside a download", *MISTAKES])
def test_a_mistake_in_a_copy_shows_its_traceback(mistake, name, flags, tmp_path):
    """Also where no data set is named, so that a download that failed would be no end."""
    typo = ("download=True", "download=Ture", "NameError")
    if name == "pix2pix":
        typo = ("urlopen(url", "urlopen(ulr", "NameError")
    old, new, error = MISTAKES.get(mistake, typo)
    change(name, tmp_path, (old, new))
    words = flags[name] if mistake in MISTAKES else ["--batch-size", 400, *SMALL[name]]
    status, err = Command(name, *words, cwd=tmp_path, folder=tmp_path).wait()
    assert status == 1 and "Traceback" in err and "warning" not in err
    assert err.splitlines()[-1].startswith(f"{error}: ") and new.splitlines()[-1].strip() in err
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_flag_added_to_a_copy_survives_resume(name, flags, tmp_path):
    flag = 'add("--stats", type=Path, help="mine")\n    '
    change(
        name,
        tmp_path,
        ('add("--epochs"', flag + 'add("--epochs"'),
        (TRAIN, TRAIN + "    print(args)\n"),
    )
    first = ["--epochs", 1, "--stats", "x/y", *flags[name]]
    second = ["--epochs", 2, "--resume", f"runs/{name}/checkpoint.pt"]
    for words in (first, second):
        running = Command(name, *words, cwd=tmp_path, folder=tmp_path)
        assert running.wait() == (0, "")
        printed = running.read("out").splitlines()[0]
        assert "stats=PosixPath('x/y')" in printed and len(printed) < 1000


def test_a_metric_added_to_a_copy_arrives_everywhere(name, copied, tmp_path):
    """Also one that is no float but a number of numpy's; what the run had before is kept, unless
    the copy leaves it out."""
    out, checkpoint = copied
    add = f'sums["{COLUMNS[name][-1]}"] += '
    mine = (add, f"sums['mine'] += loss.detach() * 0 + 0.25\n                {add}")
    if name != "vae":
        mine = (add, mine[1].replace("loss.", "loss_d."))
    numpys = (add, f"sums['numpys'] += np.float32(0.5)\n                {add}")
    less = ('"images_per_second": rate,', "")
    numpy = ("import argparse\n", "import argparse\nimport numpy as np\n")
    change(name, tmp_path, numpy, mine, numpys, less)
    for epochs in (3, 4):
        words = ["--resume", checkpoint, "--epochs", epochs]
        running = Command(name, *words, cwd=tmp_path, folder=tmp_path)
        assert running.wait() == (0, "")
        assert "mine 0.25" in running.read("out") and "numpys 0.5" in running.read("out")

    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert set(rows[0]) == {"epoch", "seconds", "mine", "numpys", *COLUMNS[name]}
    assert [row["mine"] for row in rows] == ["", "", "0.25", "0.25"]
    assert [float(row["numpys"]) for row in load(out)["metrics"][2:]] == [0.5, 0.5]


def test_a_loss_that_is_not_finite_ends_a_copy_before_it_is_saved(name, copied, tmp_path):
    """Though all weights stay finite."""
    out, checkpoint = copied
    add = f'sums["{COLUMNS[name][-1]}"] += '
    change(name, tmp_path, (add, f"{add}(math.inf if len(history) == 3 else 0) + "))
    words = ["--resume", checkpoint, "--epochs", 5]
    status, err = Command(name, *words, cwd=tmp_path, folder=tmp_path).wait()
    assert status == 1 and len(err.splitlines()) == 1
    assert "'epoch': 4" in err and f"'{COLUMNS[name][-1]}': inf" in err
    assert len(load(out)["metrics"]) == 3


@only(["gan", "dcgan"])
def test_weights_broken_by_the_last_step_are_not_saved(name, copied, tmp_path):
    """Though no loss has seen them yet."""
    before, check = copied[1].read_bytes(), "            if not grid.isfinite"
    change(name, tmp_path, (check, f"            grid[0, 0, 0, 0] = math.nan\n{check}"))
    words = ["--resume", copied[0], "--epochs", 3]
    status, err = Command(name, *words, cwd=tmp_path, folder=tmp_path).wait()
    assert status == 1 and err.startswith("error: weights not finite in epoch 3")
    assert copied[1].read_bytes() == before


def test_a_tensor_in_the_history_is_an_error_and_not_a_string(name, copied, tmp_path):
    out, checkpoint = copied
    before = result(out)
    save = "            save(state, history, args)\n"
    mine = "            history[-1]['mine'] = torch.ones(1)\n"
    change(name, tmp_path, (save, mine + save))
    words = ["--resume", checkpoint, "--epochs", 3]
    status, err = Command(name, *words, cwd=tmp_path, folder=tmp_path).wait()
    assert status == 1 and "Tensor" in err.splitlines()[-1]
    assert same(result(out)["metrics.csv"], before["metrics.csv"])
