"""Every public object has an example in its docstring, and examples run."""

import doctest
import inspect

import pytest

import sos
import sos.datasets
import sos.datasets.fashion_mnist
import sos.datasets.imagenet
import sos.experiments
import sos.experiments.bleu
import sos.experiments.published
import sos.experiments.scores
import sos.export
import sos.extend
import sos.ramps
import sos.schedules
import sos.training
import sos.training.learning_rates
import sos.training.optimizers
import sos.training.tpu_check

# Its task is in the examples of `sos.experiments`.
from models import fashion_mnist as fashion_mnist
from sos import registry
from sos.experiments import branch_registry

# Packages and modules whose public objects need an example: those in `__all__`
# or, without it, all classes and functions of the module. Examples of a package
# share a namespace and a directory. That of the object named here runs first,
# because the others use what it defines.
PACKAGES = {
    sos: None,
    sos.datasets: None,
    sos.datasets.fashion_mnist: None,
    sos.datasets.imagenet: None,
    sos.experiments: None,
    sos.experiments.bleu: None,
    sos.experiments.published: None,
    sos.experiments.scores: None,
    sos.export: None,
    sos.extend: None,
    sos.ramps: None,
    sos.schedules: None,
    sos.training: "Task",
    sos.training.learning_rates: None,
    sos.training.optimizers: None,
    sos.training.tpu_check: None,
}


def public_objects(package):
    """Returns the public classes and functions of a package by name."""
    names = getattr(package, "__all__", None) or [
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == package.__name__
    ]
    values = {name: getattr(package, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value))
        # Not the schedules of tfmot.
        if inspect.getmodule(value).__name__.partition(".")[0] == "sos"
    }


def examples(package):
    """Returns the doctest of each public object by name; None without one."""
    finder = doctest.DocTestFinder(recurse=False, exclude_empty=False)
    tests = {
        name: finder.find(value, f"{package.__name__}.{name}", globs={})[0]
        for name, value in public_objects(package).items()
    }
    return {
        name: test if test.examples else None for name, test in tests.items()
    }


@pytest.mark.parametrize(
    "package", PACKAGES, ids=lambda package: package.__name__
)
def test_public_objects_have_examples(package):
    tests = examples(package)
    assert tests
    assert [name for name, test in tests.items() if test is None] == []


@pytest.mark.parametrize(
    "package", PACKAGES, ids=lambda package: package.__name__
)
def test_examples_of_public_objects_run(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Examples register techniques and branches. Other tests may have used their
    # names.
    for module, name, registered in (
        (registry, "_techniques", registry.techniques()),
        (branch_registry, "_branches", branch_registry.branches()),
    ):
        own = {
            key: value
            for key, value in registered.items()
            if value.__module__.startswith("sos.")
        }
        monkeypatch.setattr(module, name, own)
    # AutoGraph looks for the module of the functions in examples.
    namespace = {"__name__": package.__name__}
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    tests = examples(package)
    for name in sorted(tests, key=lambda name: name != PACKAGES[package]):
        if tests[name] is not None:
            tests[name].globs = namespace
            runner.run(tests[name], clear_globs=False)
    # The report is in the captured output.
    assert runner.summarize(verbose=False).failed == 0
