"""Packaging of `state-of-sparsity` (imported as `sos`)."""

import ast
import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent

# tests/build_test.py reads these lists: every third-party module that a source
# file imports has to be declared here.

# What `sos` imports, except `sos.experiments`.
INSTALL_REQUIRES = [
    # The backend. TensorFlow 2.20 is the newest release for TPUs, 2.21 the
    # newest for CPUs and GPUs; both are supported.
    "tensorflow>=2.20,<2.22",
    # What TensorFlow 2.20 itself asks for; developed and tested on 3.15.
    "keras>=3.15,<4",
    # Pruning schedules. No release understands Keras 3 models, so only the
    # schedules are used.
    "tensorflow-model-optimization>=0.8,<0.9",
    # Imported by tensorflow-model-optimization, which asks for any version;
    # one that does not match TensorFlow's fails at import.
    "tf-keras>=2.20,<2.22",
    # 1.26 is the oldest release that TensorFlow 2.20 and 2.21 accept.
    "numpy>=1.26",
    # Flags and logging of the command-line programs. The upper limit is
    # tensorflow-model-optimization's.
    "absl-py>=1.2,<2",
    # Tables in the terminal.
    "rich>=13,<16",
]

# What `sos.experiments` and the programs of a checkout also import.
STUDY_REQUIRES = [
    # Configuration files.
    "ml-collections>=1.0,<2",
    # Figures.
    "matplotlib>=3.8,<4",
    # The page of a study.
    "jinja2>=3.1,<4",
    # Tables of results: filters, means over seeds.
    "pandas>=2.2,<4",
    # Writes and reads tables as Parquet files.
    "pyarrow>=18,<27",
]

# What `sos.datasets` imports to read data sets of TensorFlow Datasets.
TFDS_REQUIRES = [
    # Prepares data sets as record files, and knows their features and how many
    # records each file holds. 4.9 is the first release that numpy 2 works with.
    "tensorflow-datasets>=4.9,<5",
    # tensorflow-datasets 4.9.10 imports it to prepare a data set, but does not
    # ask for it.
    "importlib-resources>=6,<8",
]

# What is imported besides to train on ImageNet.
IMAGENET_REQUIRES = [
    # Decodes images independently of TensorFlow, in benchmarks and tests.
    "pillow>=10",
]

# What is imported besides to train on pairs of sentences, to translate and to
# score translations.
TRANSLATION_REQUIRES = [
    # Tokenizes inside a graph. Each release is built for one of TensorFlow;
    # there is none for Windows.
    "tensorflow-text>=2.20,<2.22; sys_platform != 'win32'",
    # Learns vocabularies; developed and tested on 0.2.3. Another release may
    # learn another vocabulary of the same sentences.
    "sentencepiece>=0.2,<0.3",
    # BLEU as it is reported today, with a signature of how it was computed.
    "sacrebleu>=2.4,<3",
    # Punctuation and tokens as by Moses, for BLEU as the study computed it.
    "sacremoses>=0.1,<0.3",
]

# What the tests import besides all of the above.
TEST_REQUIRES = [
    "pytest>=8,<10",
    # Runs the tests in several processes.
    "pytest-xdist>=3.6,<4",
    # Property-based tests.
    "hypothesis>=6.100,<7",
    # What is written for TensorBoard is read back with it.
    "tensorboard>=2.20,<3",
    # Statistical tests of the random techniques.
    "scipy>=1.13,<2",
    # Models that nobody wrote for this package: tests make tiny ones sparse.
    # Only on test machines, as it brings clients of model hubs. Its models
    # change from one minor release to the next.
    "keras-hub>=0.32,<0.33",
    # Photographs, from which the tests make a small data set in the format of
    # ImageNet.
    "scikit-image>=0.25,<0.27",
    "scikit-learn>=1.6,<2",
    # Drives the system's Chromium, to test the page of a study.
    "playwright>=1.55,<2",
    # Runs the notebook.
    "nbclient>=0.10,<1",
    "nbformat>=5.10,<6",
    "ipykernel>=6.29,<8",
    # Style checks. The limits keep the formatter's output stable.
    "ruff>=0.17,<0.18",
    # Builds the wheel in the tests and the editable installation without
    # fetching a build tool for each.
    "setuptools>=77",
]

# What builds the documentation site.
DOCS_REQUIRES = [
    "mkdocs-material>=9.6,<10",
    # The API reference, from docstrings.
    "mkdocstrings[python]>=0.29,<2",
]


def read_version():
    """Returns the version stated in `sos/version.py`.

    The file is parsed instead of imported: importing `sos` needs TensorFlow,
    which is not there yet when the package is being installed.
    """
    tree = ast.parse((ROOT / "sos" / "version.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError(
        "sos/version.py does not assign `__version__`. Add a line such as "
        '`__version__ = "1.2.3"`.'
    )


def read_readme():
    """Returns the README, or nothing where it is not part of the sources."""
    readme = ROOT / "README.md"
    return readme.read_text("utf-8") if readme.exists() else ""


setup(
    # Not `build`, which is `BUILD` where case does not tell names apart.
    options={"build": {"build_base": ".build"}},
    name="state-of-sparsity",
    version=read_version(),
    description=(
        "Train sparse Keras 3 models: magnitude pruning, random pruning, "
        "variational dropout and L0 regularization, compared like for like."
    ),
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND MIT AND MPL-2.0",
    license_files=["LICENSE", "sos/*/data/*.NOTICE.txt"],
    # Only the library: top-level `models`, `configs` or `tests` packages would
    # collide with those of whoever installs this.
    packages=find_packages(include=["sos", "sos.*"]),
    package_data={
        "sos.datasets": ["data/*"],
        "sos.experiments": ["data/*"],
        "sos.training": ["data/*"],
    },
    include_package_data=False,
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "study": STUDY_REQUIRES,
        "imagenet": TFDS_REQUIRES + IMAGENET_REQUIRES,
        "translation": TFDS_REQUIRES + TRANSLATION_REQUIRES,
        "test": (
            STUDY_REQUIRES
            + TFDS_REQUIRES
            + IMAGENET_REQUIRES
            + TRANSLATION_REQUIRES
            + TEST_REQUIRES
        ),
        "docs": DOCS_REQUIRES,
    },
    entry_points={"console_scripts": ["sos = sos.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="keras tensorflow sparsity pruning variational-dropout l0",
)
