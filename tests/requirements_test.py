"""The pinned requirements, which `make lock` writes."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pins(name):
    """Returns the versions of each package in a file, by its name."""
    found = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement = line.partition(";")[0].strip()
            package, version = requirement.split("==")
            found.setdefault(package, set()).add(version)
    return found


def declared():
    """Returns the package names in each list of setup.py."""
    return {
        node.targets[0].id: {
            re.match(r"[\w-]+", line).group()
            for line in ast.literal_eval(node.value)
        }
        for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }


@pytest.mark.parametrize(
    ("name", "release"),
    [("requirements.txt", "2.21."), ("requirements-tf2.20.txt", "2.20.")],
)
def test_requirements_pin_everything_for_one_tensorflow(name, release):
    found = pins(name)
    lists = declared()
    assert set(lists) > {"INSTALL_REQUIRES", "IMAGENET_REQUIRES"}
    for packages in lists.values():
        assert packages <= set(found)
    for package in ("tensorflow", "tf-keras", "tensorflow-text"):
        (version,) = found[package]
        assert version.startswith(release)


def test_tpu_requirements_are_those_of_tensorflow_2_20():
    oldest, tpu = pins("requirements-tf2.20.txt"), pins("requirements-tpu.txt")
    # It would replace the files of tensorflow-tpu.
    assert "tensorflow" not in tpu
    assert tpu.pop("tensorflow-tpu") == oldest["tensorflow"]
    # Of newer releases, 0.0.42.1 and 0.0.52 abort the import of TensorFlow.
    assert tpu.pop("libtpu") == {"0.0.21"}
    assert tpu == {name: oldest[name] for name in tpu}


def test_tpu_requirements_have_all_that_training_and_tests_need():
    # They are installed without what they ask for.
    needed = set().union(
        *(
            packages
            for name, packages in declared().items()
            if "DOCS" not in name
        )
    )
    tpu = pins("requirements-tpu.txt")
    assert needed - {"tensorflow"} <= set(tpu)
    # What tensorflow-tpu 2.20 asks for.
    assert {"astunparse", "gast", "grpcio", "h5py", "protobuf"} <= set(tpu)
