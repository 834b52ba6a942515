"""What comes with the package is found by its place: configurations, and ``patches`` beside others of that name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from remit_megatron.runtime import installed

REPOSITORY = Path(__file__).resolve().parents[3]
MIX = ("data", "mix", "configs/data/youtu-own-mix.yaml", "--dry-run", "--output", "out")
FOREIGN = "raise SystemExit('the foreign module ran')\n"


# Configurations.


def test_a_shipped_configuration_is_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REMIT_SAID", raising=False)
    asked = "./configs/runs/kd.yaml"
    assert installed.find_config(asked) == REPOSITORY / "configs/runs/kd.yaml"
    assert installed.find_config(asked).is_file()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("configs/runs/kd.yaml: not in this directory; ")
    assert str(REPOSITORY / "configs/runs/kd.yaml") in said


def test_the_working_directory_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = Path("configs/models/olmo2_1b.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("model_type: olmo2\n")
    (own.parent / "mine.yaml").write_text("model_type: olmo2\n")
    Path("configs/models/youtu_2b.yaml").symlink_to("nowhere")  # broken: an error to be shown, not to be papered over
    for name in ("olmo2_1b", "youtu_2b"):
        path = Path(f"configs/models/{name}.yaml")
        assert installed.find_config(path) == path
    assert capsys.readouterr().err == ""
    assert {"mine", "olmo2_1b", "smollm3_3b"} <= set(installed.config_names("models"))


@pytest.mark.parametrize(
    "path",
    [
        "runs/kd.yaml",
        "kd.yaml",
        "../configs/runs/kd.yaml",
        "configs/../runs/kd.yaml",
        "/configs/runs/kd.yaml",
        "configs/runs",
        "configs/runs/none.yaml",
    ],
)
def test_no_other_path_is_looked_up(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert installed.find_config(path) == Path(path)


def test_a_package_without_its_configurations(tmp_path, monkeypatch):
    """The folder of that name in site-packages is somebody else's."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "remit_megatron").mkdir()
    monkeypatch.setattr(installed, "PACKAGE", tmp_path / "remit_megatron")
    with pytest.raises(installed.BrokenInstallation, match=r"^configs: found none in .*; expected .*install it again$"):
        installed.shipped_configs()


# patches.


@pytest.fixture
def site(tmp_path) -> Path:
    """Packages as in site-packages: a copy, because some tests damage it."""
    folder = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("remit_megatron", "patches"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    shutil.copytree(REPOSITORY / "configs", folder / "remit_megatron/configs")
    return folder


@pytest.fixture
def python(tmp_path, site):
    """Runs Python with the copy on its path, in a working directory of its own."""
    (tmp_path / "work").mkdir()

    def run(*words: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "REMIT_SAID")}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, [first, site])))
        return subprocess.run(
            [sys.executable, *words],
            env=environment,
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def lines_about_patches(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("patches: ")]


def test_a_module_of_the_working_directory_is_noticed_and_not_used(tmp_path, site, python):
    (tmp_path / "work/patches.py").write_text(FOREIGN)
    done = python("-m", "remit_megatron", *MIX)
    assert done.returncode == 0, done.stderr
    place = tmp_path / "work/patches.py"
    assert lines_about_patches(done) == [
        f"patches: found {place}, which is not remit's; it is left alone, and remit uses {site / 'patches'}"
    ]


def test_another_distribution_that_comes_first_is_noticed_and_not_used(tmp_path, python):
    (tmp_path / "other/patches").mkdir(parents=True)
    (tmp_path / "other/patches/__init__.py").write_text(FOREIGN)
    code = "import sys; from remit_megatron.cli import main; sys.exit(main())"
    done = python("-P", "-c", code, *MIX, first=tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in lines_about_patches(done)] == [
        f"patches: found {tmp_path / 'other/patches/__init__.py'}"
    ]


def test_what_does_not_come_first_is_nobodys_business(tmp_path, python):
    """A folder without ``__init__.py`` (of diffs, say) hides nothing; nor does the working directory of `remit`."""
    (tmp_path / "work/patches").mkdir()
    done = python("-m", "remit_megatron", *MIX)
    assert (done.returncode, lines_about_patches(done)) == (0, [])
    (tmp_path / "work/patches/__init__.py").write_text(FOREIGN)
    code = "import sys; from remit_megatron.cli import main; sys.exit(main())"
    done = python("-P", "-c", code, *MIX)
    assert (done.returncode, lines_about_patches(done)) == (0, [])


def test_ranks_pass_over_it_and_it_is_said_once(tmp_path, python):
    (tmp_path / "work/patches.py").write_text(FOREIGN)
    code = (
        "import sys; from remit_megatron.runtime.installed import say_once, use_own_patches, foreign_patches_line; "
        "from remit_megatron.runtime.launch import launch; "
        f"say_once(foreign_patches_line(use_own_patches())); sys.exit(launch(2, {list(MIX)}))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("questions is missing") == 2
    assert len(lines_about_patches(done)) == 1
    assert done.stderr.count("not in this directory") == 1


def test_one_that_is_loaded_gives_way_with_its_submodules(tmp_path, site, python):
    other = tmp_path / "other/patches"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    (other / "schedule.py").write_text("PATCH = 'foreign'\n")
    code = (
        "import patches.schedule\n"
        "from remit_megatron.runtime.installed import use_own_patches\n"
        "print(use_own_patches())\n"
        "print(use_own_patches())\n"
        "import patches\n"
        "print(*{patch.__class__.__module__ for patch in patches.registered()}, patches.__file__)\n"
        "print(patches.schedule.__file__)\n"
    )
    done = python("-c", code, first=tmp_path / "other")
    assert done.stdout.splitlines() == [
        str(other / "__init__.py"),
        "None",
        f"patches {site / 'patches/__init__.py'}",
        str(site / "patches/schedule.py"),
    ], done.stderr


def test_a_program_that_imports_this_package_keeps_its_own(tmp_path, python):
    (tmp_path / "work/patches.py").write_text("mine = True\n")
    done = python("-c", "import remit_megatron.objectives, remit_megatron.kernels, patches; print(patches.mine)")
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("__init__.py", FOREIGN, "a file of another distribution in"),
        ("schedule.py", FOREIGN, "a file of another distribution in"),
        ("__init__.py", None, "no"),
        ("schedule.py", None, "no"),
    ],
)
def test_what_is_not_ours_at_our_place_is_refused(site, python, file, content, found):
    place = site / "patches" / file
    if content is None:
        place.unlink()
    else:
        place.write_text(content)
    done = python("-m", "remit_megatron", *MIX)
    assert done.returncode == 70
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: patches: found {found} {place}")
    assert "; expected remit's" in done.stderr and done.stderr.endswith("again\n") and done.stderr.count("\n") == 1
    code = "from remit_megatron.doctor.report import own_parts; print(*own_parts(), sep='\\n')"
    problems, remarks = python("-c", code).stdout.splitlines()
    assert f"patches: found {found} {place}" in problems and remarks == "[]"


def test_ranks_look_for_modules_where_their_parent_does(tmp_path, python):
    """`remit` does not look into the working directory, so its ranks must not: a clone there would be other code."""
    (tmp_path / "work/program.py").write_text("print('the working directory')")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/program.py").write_text("print('the path')")
    code = "import sys; from remit_megatron.runtime.launch import launch; sys.exit(launch(1, [], module='program'))"
    assert python("-P", "-c", code, first=tmp_path / "other").stdout == "the path\n"
    assert python("-c", code, first=tmp_path / "other").stdout == "the working directory\n"
