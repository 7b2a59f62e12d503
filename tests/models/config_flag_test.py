import pytest
from absl import flags

from models.config_flag import ConfigFlag
from tests.support import processes

FILE = """
import ml_collections

print("loaded")

def get_config(arg="none"):
    return ml_collections.ConfigDict(
        {"name": arg, "size": 3, "rate": 0.5, "part": {"on": True}}
    )

def sweep(config):
    for size in range(config.size):
        yield {"size": size}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def parse():
    """Parses a command line; returns the flag."""

    def call(*arguments):
        flag = ConfigFlag()
        flags.FLAGS.unparse_flags()
        # Programs of other tests define it, for the whole process.
        known = ["--workdir=x"] if "workdir" in flags.FLAGS else []
        flag.rest = flag.parse_flags(["program", *known, *arguments])
        return flag

    yield call
    flags.FLAGS.unparse_flags()


def test_config_flag_file_is_loaded_once(file, parse, capsys):
    flag = parse(f"--config={file}")
    assert flag.config.name == "none"
    assert capsys.readouterr().out == "loaded\n"
    assert [o["size"] for o in flag.sweep(flag.config)] == [0, 1, 2]
    assert flag.rest == ["program"]


def test_config_flag_argument_reaches_get_config(file, parse):
    assert parse(f"--config={file}:a,b=1").config.name == "a,b=1"
    assert parse("--config", f"{file}:").config.name == ""


def test_config_flag_overrides_replace_values(file, parse):
    flag = parse(
        "--config.size=5",
        f"--config={file}",
        "--config.rate=1e-3",
        "--noconfig.part.on",
    )
    assert (flag.config.size, flag.config.rate) == (5, 1e-3)
    assert flag.config.part.on is False
    # An earlier command line leaves nothing behind.
    assert parse(f"--config={file}").config.size == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.sizes=3"], ["'sizes'", "size", "Valid entries"]),
        (["--config.size.more=3"], ["`config.size` is a value"]),
        (["--config.size=many"], ["config.size", "many"]),
    ],
)
def test_config_flag_wrong_override_ends_the_program(
    file, parse, capsys, arguments, parts
):
    with pytest.raises(SystemExit) as end:
        parse(f"--config={file}", *arguments)
    text = f"{end.value.code}{capsys.readouterr().err}"
    assert "Traceback" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["FileNotFoundError"]),
        ("x = ", ["SyntaxError"]),
        ("x = 1", ["get_config"]),
        ("def get_config(): return {}", ["ConfigDict", "{}"]),
        ("def get_config(): raise ValueError('no\\nluck')", ["no luck"]),
        ("import nothing_like_it", ["nothing_like_it"]),
    ],
)
def test_config_flag_file_that_fails_ends_the_program(
    tmp_path, parse, content, parts
):
    path = tmp_path / "file.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as end:
        parse(f"--config={path}")
    message = str(end.value.code)
    assert message.startswith(f"FATAL Flags parsing error: --config={path}")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_config_flag_usage_error_is_the_message(parse):
    with pytest.raises(SystemExit) as end:
        parse(f"--config={processes.ROOT}/configs/fashion_mnist.py:magic")
    message = str(end.value.code)
    assert "configs/fashion_mnist.py:magic: The technique must be" in message
    assert "cannot be loaded" not in message


def test_config_flag_without_config_ends_the_program(parse):
    with pytest.raises(SystemExit, match="--config=configs/NAME.py"):
        parse()


def test_config_flag_file_without_sweep_ends_the_program(tmp_path, parse):
    path = tmp_path / "file.py"
    path.write_text(FILE[: FILE.index("def sweep")])
    with pytest.raises(SystemExit, match="no function sweep"):
        _ = parse(f"--config={path}").sweep
