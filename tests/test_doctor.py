"""What the doctor says of places that cannot be."""

import pytest

from kslottery.doctor import describe, examine


@pytest.mark.parametrize(
    "place, writable", [("new/deep", True), ("file", False), ("file/x", False), ("loop", False), ("x" * 300, False)]
)
def test_a_cache_that_cannot_be_is_said_and_not_tripped_over(tmp_path, monkeypatch, place, writable):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path / place))
    monkeypatch.setattr("kslottery.doctor._uses", dict)
    found = examine()
    assert found["cache"]["writable"] is writable
    assert ("KSLOTTERY_CACHE" in describe(found)) is not writable
