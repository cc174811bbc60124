"""The scripts are one family: what they share is the same, word for word, and each stands alone."""

import ast
import shutil
import sys

import pytest
from conftest import ROOT, SCRIPTS, Command

# What is another thing in each: the model, its data, its pictures and its flags.
OWN = {"Generator", "Discriminator", "discriminator_loss", "generator_loss", "initialize", "train"}
OWN |= {"evaluate", "sample", "load_images", "read_image", "DATASETS", "THIS_COMMAND", "parse_args"}
OWN |= {"main", "save"}  # vae.py's third use, and pix2pix.py's --save-every


def definitions(name):
    """Name to source of what a script defines."""
    text = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = source
        elif isinstance(node, ast.Assign):
            found[source.split(" = ")[0]] = source
    return found


def test_what_bears_one_name_is_one_text():
    texts = {}
    for name in SCRIPTS:
        for defined, source in definitions(name).items():
            texts.setdefault(defined, set()).add(source)
    assert {"NAME", "progress", "average_gradients"} < texts.keys()
    assert {defined for defined in texts if len(texts[defined]) > 1} <= OWN


def test_a_script_and_common_are_a_project(name, flags, tmp_path):
    """Copied into an empty folder, it trains there."""
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    running = Command(name, "--epochs", 1, *flags[name], cwd=tmp_path, folder=tmp_path)
    assert running.wait() == (0, "")
    assert (tmp_path / "runs" / name / "checkpoint.pt").exists()


@pytest.mark.parametrize("file", [*SCRIPTS, "common"])
def test_only_the_listed_packages_are_imported(file):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"torch", "torchvision", "numpy", "PIL", "common"}
