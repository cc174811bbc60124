"""The scripts are one family: what they share is the same, word for word, and each stands alone."""

import ast
import re
import shutil
import sys

import pytest
from conftest import NEW, ROOT, SCRIPTS, SMALL, Command

# What is another thing in each: the model, its data, its pictures and its flags.
OWN = {"Generator", "Discriminator", "discriminator_loss", "generator_loss", "initialize"}
OWN |= {"train", "evaluate", "generate", "decode", "sample", "walks", "load_images", "batches"}
OWN |= {"DATASETS", "BadImage", "read_image", "ONE_COMMAND", "FIXED", "MAY_BE_ZERO", "parse_args", "main"}
FAMILIES = [NEW, sorted(SCRIPTS.keys() - NEW)]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_what_bears_one_name_is_one_text(family):
    texts = {}
    for name in family:
        for defined, source in definitions(name).items():
            texts.setdefault(defined, set()).add(source)
    assert {"NAME", "save", "average_gradients"} < texts.keys()
    assert {defined for defined in texts if len(texts[defined]) > 1} <= OWN


def test_flags_of_one_name_are_of_one_kind():
    found = {}
    for name in NEW:
        for line in definitions(name)["parse_args"].splitlines():
            if flag := re.match(r' +add\("(--[a-z0-9-]+)", (.*)\)', line):
                kind = re.sub(r",? ?(default|help|choices)=.*", "", flag[2])
                found.setdefault(flag[1], set()).add(kind)
    assert len(found) > 15 and {flag: found[flag] for flag in found if len(found[flag]) > 1} == {}


def test_a_script_and_common_are_a_project(name, tmp_path):
    """Copied into an empty folder, it trains there."""
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    words = ["--dataset", "synthetic", "--epochs", 1, "--batch-size", 400, *SMALL[name]]
    assert Command(name, *words, cwd=tmp_path, folder=tmp_path).wait() == (0, "")
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
