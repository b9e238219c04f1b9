"""sandbox/workspace.py in its janitor: whatever an agent leaves, a reset ends clean."""
from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, missing
from reset_faults import FAULTS, ROOT_FAULTS, listing, make_repository
from workspace_box import LOGIN, Box, bundle

pytestmark = [pytest.mark.docker]
SLEEPS = "setsid sleep 600 >/dev/null 2>&1 & "


def git(folder: Path, *args: str) -> str:
    return subprocess.run(
        ("git", "-c", "user.name=S", "-c", "user.email=s@localhost", *args), cwd=folder,
        check=True, capture_output=True, text=True).stdout.strip()


def log_in(box: Box) -> None:
    box.inside(f"cd ~/.claude; rm -f .c*; printf '{LOGIN}' >.claude.json; "
               "printf '{\"token\": 1}' >.credentials.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("source") / "repository")


@pytest.fixture(scope="module")
def box(docker_engine: str, source: Path) -> Iterator[Box]:
    made = Box(f"ktrdr-workspace-{os.getpid()}")
    shown = subprocess.run(
        ("docker", "run", "--rm", "--network", "none", made.image(), "cat",
         "/usr/local/lib/sandbox/workspace.py"), capture_output=True, check=False)
    if shown.stdout != (ROOT / "sandbox" / "workspace.py").read_bytes():
        missing(f"image {made.image()} is not built from this tree (.ci/install)")
    try:
        made.anew()
        told = made.janitor("fill", "--home", "main", stdin=bundle(source))
        assert (told["mirror"], told["workspace"]) == ("cloned", "cloned"), told
        made.inside("printf model >/env/models/keep.pt")
        log_in(made)
        yield made
    finally:
        made.down()


@pytest.fixture
def clean(box: Box) -> Box:
    told = box.janitor("reset")
    assert told.get("clean") is True, told
    return box


def reset_of_a_new_container(box: Box) -> dict[str, object]:
    box.anew(is_checked=False)        # /workspace without rights: it does not start
    told = box.janitor("reset")
    box.compose("up", "-d", "--no-build", "sandbox")
    return told


def test_a_reset_has_the_files_of_the_host_and_tells_what_it_did(
    clean: Box, source: Path,
) -> None:
    clean.inside("touch junk /env/logs/x ~/.claude/y")
    told = clean.janitor("reset")
    assert told["clean"] is True and told["saved"] is True and told["trash"] is False
    assert told["commit"] == git(source, "rev-parse", "main")
    assert told["branch"] == "main"
    entries = {path: x["entries"] for path, x in told["cleared"].items()}
    assert entries == {"/workspace": len(os.listdir(source)) + 1, "/env/logs": 1,
                       "/home/agent/.claude": 3}
    kept = told["kept"]["/env/models"]
    assert (kept["files"], kept["bytes"]) == (1, 5)
    files, rest = clean.look()
    assert files == listing(source)
    assert rest[-1] == f"claude .claude.json .credentials.json  {LOGIN}{{\"token\": 1}}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, *ROOT_FAULTS])
def test_a_reset_ends_clean_after(clean: Box, source: Path, fault: str) -> None:
    as_it_was = clean.seen()
    clean.inject(fault)
    assert clean.seen() != as_it_was, "this fault does nothing"
    told = reset_of_a_new_container(clean)
    assert told.get("clean") is True, told
    if "login" in fault or "~/.claude" in fault:
        log_in(clean)
    assert clean.seen() == as_it_was
    assert clean.look()[0] == listing(source)


@pytest.mark.slow
def test_a_writer_that_still_lives_is_told_or_gone(clean: Box) -> None:
    clean.inside("setsid bash -c 'while :; do echo x >>/workspace/late; done' "
                 ">/dev/null 2>&1 & sleep 0.1")
    told = clean.janitor("reset")
    assert "not clean" in told["error"] and "--force-recreate" in told["hint"]
    assert reset_of_a_new_container(clean)["clean"] is True


@pytest.mark.slow
def test_what_was_planted_in_claudes_folder_does_not_outlive_a_reset(
    clean: Box,
) -> None:
    clean.inject("hooks, servers and orders in ~/.claude")
    clean.janitor("reset")
    assert clean.inside("ls -A ~/.claude; cat ~/.claude/.claude.json").split("\n") == [
        ".claude.json", ".credentials.json", '{"userID": "u"}']
    clean.inject("links for the login")
    clean.janitor("reset")
    assert clean.inside("ls -A ~/.claude; cat /env/models/keep.pt") == "model"
    log_in(clean)


def test_no_work_is_lost_in_a_reset(clean: Box) -> None:
    clean.inside("""
cd /workspace; git checkout -q -b feature/health; echo x >health; git add health
git commit -qm health; git update-ref refs/orchestrator/m/checkpoints/1.1 HEAD
git branch -f main""")
    commit = clean.inside("git rev-parse HEAD")
    told = clean.janitor("reset")
    assert told["saved"] is True and told["commit"] != commit
    for ref in ("refs/orchestrator/m/checkpoints/1.1",
                "refs/orchestrator/branches/feature/health"):
        assert clean.inside(f"git rev-parse {ref}") == commit
    assert clean.inside("git branch --format='%(refname:short)'") == "main"
    # a name that the first one is in the way of
    clean.inside("git checkout -q -b feature; git commit -q --allow-empty -m other")
    other = clean.inside("git rev-parse HEAD")
    assert clean.janitor("reset")["saved"] is True
    kept = clean.inside("git for-each-ref --format='%(objectname)' refs/orchestrator/")
    assert {commit, other} <= set(kept.split())


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "why"), [
    ("rm -rf .git", "No such file"), (": >.git/HEAD", "not appear to be a git repo"),
    ("rm -r .git; ln -s /mirror/repo.git .git", "Not a directory"),
    ("mkfifo .git/pipe", ".git/pipe: neither file nor folder"),
    ("git commit -q --allow-empty -m x; rm -rf .git/objects/??", "")])
def test_a_damaged_repository_is_told_by_save_and_harms_no_mirror(
    clean: Box, damage: str, why: str,
) -> None:
    clean.inside(f"cd /workspace; {damage}")
    told = clean.janitor("save")
    assert told["saved"] is False and why in told["why"]
    told = clean.janitor("reset")
    assert told["clean"] is True and told["saved"] is False and told["why"]


@pytest.mark.slow
def test_a_repair_keeps_the_files_and_knows_the_milestone(clean: Box) -> None:
    clean.inside("""
cd /workspace; git checkout -q -b work; echo 1 >one; git add one; git commit -qm One.1
git update-ref refs/orchestrator/m/checkpoints/1.2 HEAD""")
    commit = clean.inside("git rev-parse HEAD")
    assert clean.janitor("save") == {"saved": True}
    clean.inside("cd /workspace; echo 2 >two; echo more >>one; rm -rf .git; "
                 "mkdir -p nested; git init -q nested; echo gitdir: /tmp/x >.git")
    clean.as_root("touch /workspace/nested/root")
    told = clean.janitor("repair", "work", commit)
    assert (told["branch"], told["commit"]) == ("work", commit)
    assert clean.inside("git log -1 --format=%s; git status --short; cat one") == (
        "One.1\n M dos.bat\n M one\n?? nested/\n?? two\n1\nmore")
    assert clean.inside("git rev-parse refs/orchestrator/m/checkpoints/1.2") == commit
    assert clean.inside("ls -A nested; stat -c %u nested/root") == ".git\nroot\n1000"
    told = clean.janitor("repair", "work", "0" * 40)
    assert "holds no commit" in told["error"]


@pytest.mark.slow
def test_fill_updates_keeps_and_refuses_another_repository(
    clean: Box, source: Path, tmp_path: Path,
) -> None:
    tips = clean.janitor("tips")
    assert tips == {"home": "main", "tips": sorted(
        git(source, "rev-parse", "main", "other").split())}
    again = clean.janitor("fill", "--home", "main", stdin=bundle(source))
    assert (again["mirror"], again["workspace"]) == ("kept", "kept")
    newer = tmp_path / "newer"
    git(tmp_path, "clone", "-q", str(source), str(newer))
    git(newer, "commit", "-q", "--allow-empty", "-m", "Three")
    told = clean.janitor("fill", "--home", "main", stdin=bundle(
        newer, "main", *(f"^{tip}" for tip in tips["tips"])))
    assert (told["mirror"], told["workspace"]) == ("updated", "kept"), told
    assert told["commit"] == git(newer, "rev-parse", "main")
    assert clean.janitor("reset")["commit"] == told["commit"]
    back = clean.janitor("fill", "--home", "main", stdin=bundle(source))
    assert back["mirror"] == "updated"
    git(tmp_path, "init", "-q", "-b", "main", "another")
    git(tmp_path / "another", "commit", "-q", "--allow-empty", "-m", "Else")
    told = clean.janitor("fill", "--home", "main",
                         stdin=bundle(tmp_path / "another"))
    assert "holds another repository" in told["error"]
    assert clean.janitor("tips") == tips


@pytest.mark.slow
@pytest.mark.parametrize(("args", "stdin", "error"), [
    (("fill", "--home", "main"), b"", "no git bundle"),
    (("fill", "--home", "main"), b"garbage", "cannot read the bundle"),
    (("fill", "--home", "-x"), None, "argument --home"),
    (("fill", "--home", "a..b"), None, "no name of a branch"),
    (("fill", "--home", "absent"), None, ""),
    (("fill", "http://u:secret@localhost:9/x"), b"", "http://***@localhost"),
    (("wash",), b"", "invalid choice")])
def test_what_cannot_be_done_is_told_as_json(
    clean: Box, source: Path, args: tuple[str, ...], stdin: bytes | None, error: str,
) -> None:
    tips = clean.janitor("tips")
    told = clean.janitor(*args, stdin=bundle(source) if stdin is None else stdin)
    if error:
        assert error in told["error"] and told["hint"] and "secret" not in str(told)
    else:        # as for a detached HEAD: a branch that is new is made there
        assert told["home"] == "absent"
        clean.janitor("fill", "--home", "main", stdin=bundle(source))
    assert clean.janitor("tips")["tips"] == tips["tips"]


@pytest.mark.slow
def test_a_bundle_that_was_cut_short_changes_nothing_and_the_next_fill_repairs(
    clean: Box, source: Path, tmp_path: Path,
) -> None:
    tips = clean.janitor("tips")
    newer = tmp_path / "newer"
    git(tmp_path, "clone", "-q", str(source), str(newer))
    git(newer, "commit", "-q", "--allow-empty", "-m", "Three")
    told = clean.janitor("fill", "--home", "main", stdin=bundle(newer)[:-40])
    assert "cannot fetch the bundle" in told["error"]
    clean.as_root("cd /mirror/repo.git; touch HEAD.lock config.lock packed-refs.lock "
                  "refs/heads/main.lock; install -d -o 1000 refs/fill refs/fill/heads; "
                  "cp refs/heads/main refs/fill/heads/x; echo x >../incoming.bundle")
    told = clean.janitor("fill", "--home", "main", stdin=bundle(source))
    assert told.get("mirror") == "kept", told
    assert clean.janitor("tips") == tips


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.08, 0.12, 0.16, 0.2, 0.24])
def test_a_reset_that_was_killed_is_made_good_by_the_next(
    clean: Box, source: Path, after_s: float,
) -> None:
    clean.inside("cd /workspace; git checkout -q -b work; git commit -q --allow-empty "
                 "-m work; touch junk")
    commit = clean.inside("git rev-parse HEAD")
    clean.as_root(f"timeout -s KILL {after_s} workspace.py reset || true")
    assert clean.janitor("reset")["clean"] is True
    assert clean.look()[0] == listing(source)
    assert clean.inside("git rev-parse refs/orchestrator/branches/work") == commit


@pytest.mark.slow
def test_a_url_is_cloned_with_the_home_branch_that_it_names(source: Path, box: Box,
                                                           ) -> None:
    other = Box(f"{box.project}-url")
    try:
        other.anew()
        other.compose("run", "--rm", "-T", "--no-deps", "sandbox", "bash", "-c", """
cd /env/models; cat >bundle; git init -q --bare empty.git; git init -q --bare r.git
cd r.git; git fetch -q ../bundle 'refs/*:refs/*'; git symbolic-ref HEAD refs/heads/other
""", stdin=bundle(source))
        other.inside("setsid git daemon --export-all --base-path=/env/models "
                     "/env/models >/dev/null 2>&1 & sleep 0.3")
        told = other.janitor("fill", "git://sandbox/empty.git")
        assert "holds no commit" in told["error"]
        told = other.janitor("fill", "git://sandbox/r.git")
        assert (told["mirror"], told["home"]) == ("cloned", "other"), told
        assert other.inside("git log --format=%s; git remote") == "One"
    finally:
        other.down()


@pytest.mark.slow
def test_a_detached_head_and_a_fill_in_an_empty_sandbox(
    box: Box, source: Path, tmp_path: Path,
) -> None:
    other = Box(f"{box.project}-detached")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(source), str(clone))
    git(clone, "checkout", "-q", "--detach")
    git(clone, "commit", "-q", "--allow-empty", "-m", "Loose")
    git(clone, "branch", "-D", "main")
    try:
        assert "holds no repository" in other.janitor("reset")["error"]
        assert other.janitor("tips") == {"home": "", "tips": []}
        told = other.janitor("fill", "--home", "trunk", stdin=bundle(clone))
        assert told["commit"] == git(clone, "rev-parse", "HEAD")
        other.anew()
        assert other.inside("git branch --show-current") == "trunk"
        assert other.inside("stat -c %u /mirror/repo.git /workspace") == "1000\n1000"
    finally:
        other.down()


def test_the_agent_can_work_and_cannot_touch_the_mirror(clean: Box) -> None:
    told = clean.inside("workspace.py check")
    assert told == '{"problems": [], "claude": "2.1.330", "login": true}'
    assert clean.inside("touch /mirror/repo.git/x 2>&1 || flock /mirror/lock true "
                        "2>&1 || echo refused").endswith("refused")
    told = clean.inside("rm -rf ~/.claude/.cred*; chmod 555 /env/logs; "
                        "workspace.py check; chmod 755 /env/logs")
    log_in(clean)
    assert '"/env/logs cannot be written: Permission denied"' in told
    assert '"login": false' in told


@pytest.mark.slow
def test_a_hundred_thousand_files_are_out_of_sight_at_once_and_swept_later(
    clean: Box, source: Path,
) -> None:
    clean.inside("""python3 -c '
import os
for i in range(1000):
    os.makedirs(f"/workspace/node_modules/{i}")
    for j in range(100):
        open(f"/workspace/node_modules/{i}/{j}", "w").close()
'; ln -s /env/models /workspace/node_modules/models; mkdir /workspace/shut
touch /workspace/shut/x; chmod 0 /workspace/shut""")
    told = clean.janitor("reset")
    assert told["clean"] is True and told["trash"] is True
    assert told["duration_s"] < 10, "a slow machine takes 2"
    assert clean.look()[0] == listing(source)
    assert clean.janitor("sweep") == {"swept": True}
    assert clean.inside("ls .git/trash 2>&1; cat /env/models/keep.pt").endswith("model")
