import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvsr import provenance
from qvsr.provenance import CodeDigestError, DiskFullError, atomic_path, code_digest, head


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    with atomic_path(tmp_path / "new" / "a.bin") as partial:
        partial.write_bytes(b"1")
        assert not (tmp_path / "new" / "a.bin").exists()
        assert partial.suffix == ".bin"
    assert names(tmp_path / "new") == ["a.bin"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(tmp_path / "a") as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_directory_replaces_a_directory(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("")
    with atomic_path(tmp_path / "d") as partial:
        partial.mkdir()
        (partial / "new").write_text("")
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["new"]


def test_a_failed_directory_is_removed_with_its_files(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "d") as partial:
        partial.mkdir()
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_others_may_read_it_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a") as partial:
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing was written for .*a\.txt"), atomic_path(tmp_path / "a.txt"):
        pass


def test_what_a_killed_process_left_is_removed_but_not_what_a_running_one_writes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".partial-{dead.pid}-a.txt").write_text("half")
    (tmp_path / f".partial-{dead.pid}-b.txt").write_text("of another output")
    (tmp_path / f".partial-{os.getppid()}-a.txt").write_text("still being written")
    with atomic_path(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert names(tmp_path) == sorted([f".partial-{os.getppid()}-a.txt", f".partial-{dead.pid}-b.txt", "a.txt"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("IoError: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_line(tmp_path, error):
    with (
        pytest.raises(DiskFullError, match=r"a\.txt: the disk is full \(\d.* MB free in .*\); free some space") as caught,
        atomic_path(tmp_path / "a.txt"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_really_full_disk(tmp_path):
    """A limit on file sizes fails in the same system call, with EFBIG where a full disk has ENOSPC."""
    code = (
        "import resource, sys\n"
        "from qvsr.provenance import atomic_path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"with atomic_path({str(tmp_path / 'a.bin')!r}) as partial:\n"
        "    partial.write_bytes(bytes(5000))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=provenance.ROOT)
    assert done.returncode != 0
    assert "DiskFullError" in done.stderr
    assert names(tmp_path) == []


def test_code_digest_follows_edits_names_and_nothing_else(tmp_path):
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    first = code_digest("*.py", root=tmp_path)
    (tmp_path / "c.txt").write_text("3")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.py").write_text("")
    assert code_digest("**/*.py", root=tmp_path) == first
    (tmp_path / "b.py").write_text("4")
    edited = code_digest("*.py", root=tmp_path)
    (tmp_path / "b.py").rename(tmp_path / "d.py")
    assert len({first, edited, code_digest("*.py", root=tmp_path)}) == 3


def test_code_digest_leaves_out_what_is_named(tmp_path):
    (tmp_path / "a.py").write_text("1")
    alone = code_digest("*.py", root=tmp_path)
    (tmp_path / "b.py").write_text("2")
    assert code_digest("*.py", "!b.py", root=tmp_path) == alone
    with pytest.raises(CodeDigestError, match=r"'!c\.py' matches no file"):
        code_digest("*.py", "!c.py", root=tmp_path)


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(CodeDigestError, match=r"'nowhere/\*\.py' matches no file"):
        code_digest("nowhere/*.py", root=tmp_path)


def test_head_is_the_same_in_every_process():
    code = "import json; from qvsr.provenance import head; print(json.dumps(head()))"
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=provenance.ROOT).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    assert set(head()) == {"qvsr", "git", "versions", "device"}


def test_git_hash_outside_git(tmp_path):
    assert provenance.git_hash(tmp_path) == "unknown"
