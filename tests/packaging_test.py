"""Builds the wheel, installs it into an empty environment and uses it there."""

import ast
import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parent.parent
# All that a build could pick up by mistake, but no virtual environments.
SOURCES = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"),
    *("sos", "models", "configs", "benchmarks", "tests"),
)


def _run(*command, cwd, **variables):
    """Runs a command that must succeed and returns what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: building leaves files in the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(
                path,
                sources / name,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        elif path.exists():
            shutil.copy(path, sources / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _run(
        *(*pip, "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", folder, sources),
        cwd=folder,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of an environment with the wheel and its core dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    _run(
        *(python, "-m", "pip", "--disable-pip-version-check", "install"),
        *("--quiet", "--constraint", ROOT / "requirements.txt", wheel),
        cwd=folder,
    )
    yield python
    # pytest would keep it, and it takes gigabytes.
    shutil.rmtree(folder)


def _metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (
            name
            for name in archive.namelist()
            if name.endswith(".dist-info/METADATA")
        )
        return email.message_from_bytes(archive.read(name))


def _version():
    text = (ROOT / "sos" / "version.py").read_text("utf-8")
    (value,) = (
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    return ast.literal_eval(value)


def test_wheel_holds_the_library_and_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    library = {name for name in names if name.startswith("sos/")}
    others = {name.partition("/")[0] for name in names - library}
    assert others == {f"state_of_sparsity-{_version()}.dist-info"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "sos").rglob("*")
        if path.is_file()
        and (path.suffix == ".py" or "data" in path.parent.parts[-1:])
    }
    assert library == expected


def test_wheel_carries_the_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if "/licenses/" in n]
        texts = [archive.read(name).decode() for name in names]
    assert any("Apache License" in text for text in texts)
    assert any("Copyright (c) 2017 Zalando SE" in text for text in texts)
    assert any("The Google Research Authors" in text for text in texts)
    assert any("LibreOffice contributors" in text for text in texts)
    assert _metadata(wheel)["License"] == "Apache-2.0 AND MIT AND MPL-2.0"


def test_metadata_names_core_dependencies_and_extras(wheel):
    metadata = _metadata(wheel)
    assert metadata["Name"] == "state-of-sparsity"
    assert metadata["Version"] == _version()
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist")
    core = {re.match(r"[\w-]+", r).group() for r in required if ";" not in r}
    assert core == {
        *("tensorflow", "keras", "tf-keras", "tensorflow-model-optimization"),
        *("numpy", "absl-py", "rich"),
    }
    assert any(r.startswith("tensorflow<2.22,>=2.20") for r in required)
    study = [r for r in required if r.endswith('extra == "study"')]
    test = [r for r in required if r.endswith('extra == "test"')]
    assert study and {r.replace("study", "test") for r in study} < set(test)


def test_installed_package_works_outside_the_checkout(installed, tmp_path):
    program = (
        "import sos, sos.version; "
        "from sos.datasets import fashion_mnist, libreoffice_help; "
        "print(sos.version.__version__, sos.__file__, "
        "fashion_mnist.load().x_train.shape, len(libreoffice_help.load().test))"
    )
    output = _run(
        installed, "-c", program, cwd=tmp_path, TF_CPP_MIN_LOG_LEVEL="3"
    )
    version, path, sizes = output.splitlines()[-1].split(maxsplit=2)
    assert version == _version()
    assert pathlib.Path(path).is_relative_to(installed.parent.parent)
    assert sizes == "(6000, 28, 28, 1) 848"


def test_first_example_of_the_readme_works_without_extras(installed, tmp_path):
    readme = (ROOT / "README.md").read_text("utf-8")
    block = re.search(
        r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE
    )
    example = tmp_path / "example.py"
    example.write_text(block.group(1), "utf-8")
    _run(installed, example, cwd=tmp_path, KERAS_BACKEND="tensorflow")


def test_experiments_without_their_extra_name_it(installed, tmp_path):
    program = (
        "import sos\n"
        "try: import sos.experiments\n"
        "except ImportError as error: print(error)"
    )
    output = _run(installed, "-c", program, cwd=tmp_path)
    assert "pip install 'state-of-sparsity[study]'" in output


def test_console_script_prints_its_help(installed, tmp_path):
    script = installed.with_name("sos")
    assert "--threshold" in _run(script, "report", "--help", cwd=tmp_path)
