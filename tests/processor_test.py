import pytest

from sos import processor


@pytest.fixture(autouse=True)
def uncached(monkeypatch):
    processor.multiplies_bfloat16.cache_clear()
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    yield
    processor.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16", True),
        ("fpu avx512_bf16", True),
        ("fpu amx_bf16 amx_tile", True),
        ("fpu avx2 avx512f", False),
        ("", False),
    ],
)
def test_multiplies_bfloat16_reads_the_flags(
    flags, expected, tmp_path, monkeypatch
):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "CPU_INFO", path)
    assert processor.multiplies_bfloat16() is expected


def test_multiplies_bfloat16_without_the_file_is_false(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "none")
    assert processor.multiplies_bfloat16() is False


def test_multiplies_bfloat16_without_onednn_is_false(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text("flags: amx_bf16")
    monkeypatch.setattr(processor, "CPU_INFO", path)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert processor.multiplies_bfloat16() is False
