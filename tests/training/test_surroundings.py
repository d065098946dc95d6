import subprocess
from importlib.metadata import version

import pytest

from l2l_scale.training import surroundings
from l2l_scale.training.surroundings import git_state, versions, without_login


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=trunk"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_state_of_a_repository(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert git_state(repository) == {"commit": commit, "branch": "trunk", "remote": None, "dirty": False}
    git(repository, "remote", "add", "origin", "https://me:token@example.org/code.git")
    (repository / "code.py").write_text("2\n")
    git(repository, "checkout", "--detach")
    remote = "https://example.org/code.git"
    assert git_state(repository) == {"commit": commit, "branch": None, "remote": remote, "dirty": True}


def test_a_file_that_git_does_not_know_is_no_change_of_the_code(repository):
    (repository / "notes.txt").write_text("")
    assert git_state(repository)["dirty"] is False


def test_nothing_without_a_repository_a_commit_or_git(tmp_path, monkeypatch):
    assert git_state(tmp_path) == {}
    git(tmp_path, "init")
    assert git_state(tmp_path) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {}


def test_the_first_folder_in_a_repository_counts(repository, tmp_path_factory):
    assert git_state(tmp_path_factory.mktemp("none"), repository)["branch"] == "trunk"


def test_slow_git_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(surroundings, "GIT_SECONDS", 0.1)
    assert git_state(tmp_path) == {}


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://token@example.org/a.git", "https://example.org/a.git"),
        ("https://me:pass@example.org:8443/a.git", "https://example.org:8443/a.git"),
        ("git@example.org:me/a.git", "git@example.org:me/a.git"),
        ("/some/folder", "/some/folder"),
    ],
)
def test_a_remote_is_logged_without_its_login(url, clean):
    assert without_login(url) == clean


def test_versions_of_what_computes():
    found = versions()
    assert found["torch"] == version("torch")
    assert found["l2l_scale"] == version("l2l_scale")
    assert found["python"].count(".") == 2
