"""Which package of Lightning is chosen, with stand-ins that are imported in no time."""

import os
import subprocess
import sys
from pathlib import Path

import packaging
import pytest

import lit_stability

ROOT = Path(lit_stability.__file__).parents[1]
ASK = "from lit_stability.lightning_choice import choose_lightning\nprint(choose_lightning())\n"
FILES = {
    "lightning/__init__.py": "import lightning.pytorch.trainer.trainer",
    "lightning/fabric.py": "",
    "lightning/pytorch/__init__.py": "",
    "lightning/pytorch/trainer/__init__.py": "",
    "lightning/pytorch/trainer/trainer.py": "",
    "lightning/pytorch/cli.py": ASK,
    "pytorch_lightning/__init__.py": "import pytorch_lightning.trainer.trainer",
    "pytorch_lightning/trainer/__init__.py": "",
    "pytorch_lightning/trainer/trainer.py": "",
    "pytorch_lightning/cli.py": ASK,
    "uses_both.py": "import lightning, pytorch_lightning",
    "uses_lightning.py": "import lightning",
    "asks.py": ASK,
}

PROGRAMS = {
    "imports neither": (ASK, "lightning"),
    "imports lightning": ("import lightning\n" + ASK, "lightning"),
    "imports lightning later": (ASK + "import lightning.pytorch as pl", "lightning"),
    "imports pytorch_lightning": ("import pytorch_lightning as pl\n" + ASK, "pytorch_lightning"),
    "imports pytorch_lightning later": (
        ASK + "from pytorch_lightning.trainer import trainer",
        "pytorch_lightning",
    ),
    "imports pytorch_lightning later, in a file that this one is imported by": (
        "import asks\nimport pytorch_lightning",
        "pytorch_lightning",
    ),
    "imports it by a name in a text": (
        "__import__('pytorch_lightning')\n" + ASK,
        "pytorch_lightning",
    ),
    "imports pytorch_lightning beside a dependency on the other": (
        "import uses_lightning\nimport pytorch_lightning\n" + ASK,
        "pytorch_lightning",
    ),
    "imports pytorch_lightning and the fabric of the other": (
        "import lightning.fabric\nimport pytorch_lightning\n" + ASK,
        "pytorch_lightning",
    ),
    "asks in a function": (
        "import pytorch_lightning, uses_lightning\ndef main():\n import asks\nmain()",
        "pytorch_lightning",
    ),
    "imports both": ("import lightning, pytorch_lightning\n" + ASK, "lightning"),
    "depends on both": ("import uses_both\n" + ASK, "lightning"),
    "is the command line of lightning": ("import uses_both, lightning.pytorch.cli", "lightning"),
    "is the command line of pytorch_lightning": (
        "import uses_both\n__import__('pytorch_lightning.cli')",
        "pytorch_lightning",
    ),
    "has names that only look alike": (
        "lightning = pytorch_lightning = 'import pytorch_lightning'\n" + ASK,
        "lightning",
    ),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with both packages, installed as ``lightning`` and ``pytorch-lightning``."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def installed(folder, *names):
    for name in names:
        info = folder / f"{name.replace('-', '_')}-2.6.6.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.6.6\n")
    (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
    return folder


def answer(program, *folders, named=None):
    """What a program prints that runs without site-packages; the last line of its error."""
    path = os.pathsep.join(map(str, (*folders, ROOT)))
    env = {"PYTHONPATH": path} | ({} if named is None else {"LIT_STABILITY_LIGHTNING": named})
    run = subprocess.run(
        [sys.executable, "-S", "-c", program], env=env, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", PROGRAMS)
def test_package_is_that_of_the_program_that(name, site, tmp_path):
    program, wanted = PROGRAMS[name]
    assert answer(program, installed(tmp_path, "lightning", "pytorch-lightning"), site) == wanted


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ((), "lightning"),
        (("lightning",), "lightning"),
        (("pytorch-lightning",), "pytorch_lightning"),
        (("lightning", "pytorch-lightning"), "lightning"),
    ],
)
def test_package_of_a_program_that_has_imported_none_is_the_installed_one(names, wanted, tmp_path):
    assert answer(ASK, installed(tmp_path, *names)) == wanted


@pytest.mark.parametrize("named", ["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("program", ["import lightning\n", "import pytorch_lightning\n", ""])
def test_variable_decides_whatever_is_imported(program, named, site, tmp_path):
    assert answer(program + ASK, installed(tmp_path), site, named=named) == named


@pytest.mark.parametrize("named", ["pytorch-lightning", "lightning.pytorch", "PL"])
def test_variable_that_names_no_package_is_refused_with_the_two_that_it_may(named, tmp_path):
    message = answer(ASK, installed(tmp_path), named=named)
    assert message.startswith("ValueError: LIT_STABILITY_LIGHTNING must be lightning or pytorch_l")
    assert f"got {named!r}; set one of them, or unset it" in message


def test_empty_variable_names_nothing(site, tmp_path):
    program = "import pytorch_lightning\n" + ASK
    assert answer(program, installed(tmp_path), site, named="") == "pytorch_lightning"


def test_choice_is_final_once_lightning_is_imported():
    """Whatever the program imports or sets later, in this process it is what the tests import."""
    from lit_stability.lightning_choice import choose_lightning
    from lit_stability.lightning_package import PACKAGE

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_STABILITY_LIGHTNING", "pytorch_lightning")
        assert choose_lightning() == PACKAGE == "lightning"
