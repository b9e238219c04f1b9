#!/usr/bin/python3 -I
"""Fill /workspace, save what was done there, make it anew, and prove that it is clean.

    docker compose run --rm -T --no-deps janitor workspace.py COMMAND

    fill --home BRANCH      from a git bundle on stdin (tips: what need not be in it)
    fill [--home BRANCH] URL
    tips                    the home branch and the commits that the mirror holds
    save                    checkpoints and branches of /workspace into the mirror
    reset                   all of it as it was filled; models and strategies stay
    sweep                   delete what reset had no time to delete
    repair BRANCH COMMIT    a new .git around the files that are there
    check                   in the service sandbox, as the agent: can work be done here?
    reach                   there too: does the API answer, is it blocked, is it down?

The mirror is a bare repository that the agent can read and not write; /workspace
borrows its objects. Nothing in /workspace/.git is trusted: a reset renames it away.
As root this program renames, deletes and changes owners, no more: git runs as the
agent's user, and no command follows a link that the agent made.

Each command prints one JSON object; {"error", "hint"} and exit status 1 if it failed.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

WORKSPACE = Path("/workspace")
MIRROR = Path("/mirror/repo.git")
INCOMING = Path("/mirror/incoming.bundle")
LOCK = Path("/mirror/lock")
LOGS = Path("/env/logs")
KEPT = (Path("/env/models"), Path("/env/strategies"))
HOME = Path("/home/agent")                # in the image its owner is the agent
CLAUDE = HOME / ".claude"
CREDENTIALS = ".credentials.json"
SETTINGS = ".claude.json"
LOGIN_FIELDS = ("oauthAccount", "hasCompletedOnboarding", "userID")
MAX_SETTINGS_BYTES = 1 << 26

GIT_TIMEOUT_S = 120
TRANSFER_TIMEOUT_S = 3600                 # a whole repository through a slow network
LOCK_TIMEOUT_S = 120.0
CLAUDE_TIMEOUT_S = 60.0
REACH_TIMEOUT_S = 15
DELETE_INLINE_S = 0.3                     # what takes longer is left for `sweep`
SHOWN = 5                                 # so many culprits are named in a message

# Git sees no configuration but that of repositories made here, and runs nothing.
_OPTIONS = {
    "advice.detachedHead": "false", "core.fsmonitor": "false",
    "core.hooksPath": "/dev/null", "core.safecrlf": "false", "gc.auto": "0",
    "maintenance.auto": "false"}
_GIT_ENV = {
    "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8",
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1", "GIT_NO_LAZY_FETCH": "1", "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_COUNT": str(len(_OPTIONS)),
    **{f"GIT_CONFIG_KEY_{n}": key for n, key in enumerate(_OPTIONS)},
    **{f"GIT_CONFIG_VALUE_{n}": value for n, value in enumerate(_OPTIONS.values())}}
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_FETCH = ("fetch", "-q", "--no-tags", "--no-write-fetch-head")

# $1 home branch, $2 its commit; in /workspace, where no .git is
_MAKE = f"""
git init -q --template= -b "$1" .
mkdir -p .git/objects/info .git/info
echo {MIRROR}/objects >.git/objects/info/alternates
git config user.name ktrdr_orchestrator
git config user.email orchestrator@localhost
git {" ".join(_FETCH)} {MIRROR} '+refs/heads/*:refs/remotes/origin/*' \
    '+refs/tags/*:refs/tags/*' '+refs/orchestrator/*:refs/orchestrator/*'
git update-ref refs/orchestrator/start "$2"
git symbolic-ref refs/orchestrator/home "refs/heads/$1"
"""
_CHECK_OUT = _MAKE + 'git checkout -q -f -B "$1" "$2" --\n'
# $3 branch, $4 commit
_KEEP_FILES = _MAKE + """
git update-ref "refs/heads/$3" "$4"
git symbolic-ref HEAD "refs/heads/$3"
git reset -q
"""
# The files through an index that has seen none of them: how their tree is another, and
# in .git/proof what a checkout makes of each file that differs.
_PROOF = """
rm -f "$GIT_INDEX_FILE"
git read-tree HEAD
git add -A -f .
[ "$(git write-tree)" != "$(git rev-parse 'HEAD^{tree}')" ] || exit 0
git diff-index --cached --no-renames --name-status -z HEAD
git diff-index --cached --no-renames --name-only --diff-filter=M -z HEAD |
env -u GIT_INDEX_FILE git checkout-index -z --stdin --prefix=.git/proof/
"""


class Refused(Exception):
    """What failed, with the value; `hint` says what to do next."""

    def __init__(self, message: str, hint: str, **facts: object) -> None:
        super().__init__(message)
        self.told = {"error": message, "hint": hint, **facts}


# ---- git, as the agent's user

def agent() -> tuple[int, int]:
    found = HOME.stat()
    return found.st_uid, found.st_gid


def as_agent(
    *argv: str, cwd: Path = Path("/"), env: Mapping[str, str] | None = None,
    timeout_s: int = GIT_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run a command without a right that the agent has not."""
    uid, gid = agent()
    # timeout(1), for we may not kill the agent's processes: no CAP_KILL
    return subprocess.run(
        ("timeout", "-s", "KILL", str(timeout_s), *argv), cwd=cwd, user=uid, group=gid,
        extra_groups=(), env={**_GIT_ENV, **(env or {})}, stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", errors="surrogateescape", check=False)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command complained of, on one line, without passwords."""
    said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
    return re.sub(r"://[^/@\s]*@", "://***@", said)[-500:]


def checked(done: subprocess.CompletedProcess[str], what: str, hint: str) -> str:
    if done.returncode:
        raise Refused(f"{what}: {last_words(done)}", hint)
    return done.stdout


def mirror(*args: str, what: str = "") -> str:
    """Git's answer about the mirror; '' if it has none. `what` makes that an error."""
    done = as_agent("git", f"--git-dir={MIRROR}", *args)
    if done.returncode and what:
        raise Refused(f"{what}: {last_words(done)}", "init again; if that fails, "
                      "remove the project's volume `mirror`, then init")
    return "" if done.returncode else done.stdout.strip()


def home() -> tuple[str, str]:
    """The home branch and its commit."""
    branch = mirror("symbolic-ref", "--short", "HEAD") if MIRROR.is_dir() else ""
    commit = branch and mirror("rev-parse", "-q", "--verify", "HEAD^{commit}")
    if not commit:
        raise Refused("the mirror holds no repository", "init fills it")
    return branch, commit


# ---- files, as root

def found(folder: Path, *expression: str) -> list[str]:
    """What find(1) prints of a folder, split at NUL: it knows no depth too deep."""
    done = subprocess.run(("find", ".", "-xdev", *expression), cwd=folder, check=False,
                          capture_output=True, encoding="utf-8",
                          errors="surrogateescape")
    checked(done, f"cannot list {folder}", "look at it with docker compose run janitor")
    return done.stdout.split("\0")[:-1]


def empty(folder: int, *, but: Sequence[str] = (), timeout_s: float | None = None,
          ) -> bool:
    """Delete all that is in an open folder; whether that was done in time."""
    spared = (word for name in but for word in ("!", "-path", f"./{name}"))
    argv = ("find", ".", "-mindepth", "1", "-xdev", *spared, "-delete")
    os.fchdir(folder)
    try:
        subprocess.run(argv, stderr=subprocess.DEVNULL, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return False
    finally:
        os.chdir("/")
    return set(os.listdir(folder)) <= set(but)


@contextlib.contextmanager
def opened(path: str | Path, *, within: int | None = None) -> Iterator[int]:
    """A folder that is one: links are refused."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    try:
        yield folder
    finally:
        os.close(folder)


def take_back(folder: int) -> None:
    """Owner, mode and access lists that the top of a volume had in the image."""
    for name in os.listxattr(folder):
        if name.startswith("system.posix_acl_"):
            os.removexattr(folder, name)
    os.fchown(folder, *agent())
    os.fchmod(folder, 0o755)


def fingerprint(folder: Path) -> dict[str, object]:
    """Names, sizes and times of all that is in a folder."""
    lines = sorted(found(folder, "-mindepth", "1", "-printf", r"%y %s %T@ %P\0"))
    sizes = [int(line.split(" ", 2)[1]) for line in lines if line.startswith("f")]
    listing = "\0".join(lines).encode(errors="surrogateescape")
    return {"files": len(sizes), "bytes": sum(sizes),
            "sha256": hashlib.sha256(listing).hexdigest()}


def clear_claude() -> int:
    """Leave nothing in ~/.claude but the login; how many entries were there."""
    with opened(CLAUDE) as folder:
        take_back(folder)
        entries = len(os.listdir(folder))
        login = {k: v for k, v in settings(folder).items() if k in LOGIN_FIELDS}
        keeps: tuple[str, ...] = ()
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(CREDENTIALS, dir_fd=folder).st_mode):
                keeps = (CREDENTIALS,)
                os.chown(CREDENTIALS, *agent(), dir_fd=folder, follow_symlinks=False)
        if not empty(folder, but=keeps):
            raise Refused(f"not clean: {CLAUDE} cannot be emptied", "remove the volume "
                          "`claude` and log in again")
        if login:
            made = os.open(SETTINGS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600,
                           dir_fd=folder)
            with open(made, "w", encoding="utf-8") as file:
                os.fchown(made, *agent())
                json.dump(login, file)
        return entries


def settings(folder: int) -> dict[str, Any]:
    """What the CLI remembers, which is what the agent wrote: maybe no JSON at all."""
    try:
        number = os.open(SETTINGS, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK,
                         dir_fd=folder)
        with open(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                return {}
            read = json.loads(file.read(MAX_SETTINGS_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def delete_trash(timeout_s: float | None = None) -> bool:
    """Whether nothing is left of what was renamed away."""
    try:
        with opened(WORKSPACE / ".git") as git, opened("trash", within=git) as trash:
            if not empty(trash, timeout_s=timeout_s):
                return False
            os.rmdir("trash", dir_fd=git)
    except FileNotFoundError:
        pass
    return True


# ---- the commands

def tips() -> dict[str, object]:
    try:
        branch, _ = home()
    except Refused:
        return {"home": "", "tips": []}
    listed = mirror("for-each-ref", "--format=%(objectname)", "refs/heads",
                    what="cannot list the mirror")
    return {"home": branch, "tips": sorted(set(listed.split()))}


def why_unreadable() -> str:
    """Why git had better not look at /workspace/.git; '' if it may."""
    try:
        with opened(WORKSPACE / ".git"):
            # opening a pipe would wait for ever
            odd = found(WORKSPACE / ".git", "-path", "./trash", "-prune", "-o",
                        "!", "-type", "f,d,l", "-printf", r"%P\0")
    except OSError as error:
        return f"{WORKSPACE}/.git: {error.strerror}"
    return f"{WORKSPACE}/.git/{odd[0]}: neither file nor folder" if odd else ""


def save() -> dict[str, object]:
    """Only refs/orchestrator/ of the mirror changes, and nothing in it is deleted."""
    home()
    if why := why_unreadable():
        return {"saved": False, "why": why}
    # `branches` refuses a/b where it holds a; nothing stands in the way of a new name
    for place in ("branches", f"branches-{int(time.time())}"):
        done = as_agent(
            "git", f"--git-dir={MIRROR}", *_FETCH, str(WORKSPACE / ".git"),
            "+refs/orchestrator/*:refs/orchestrator/*", "^refs/orchestrator/home",
            "^refs/orchestrator/start", "^refs/orchestrator/branches/*",
            f"+refs/heads/*:refs/orchestrator/{place}/*")
        if done.returncode == 0:
            return {"saved": True}
        why = why or last_words(done)
    return {"saved": False, "why": why}


def rename_away(names: Sequence[str], workspace: int) -> str:
    """Move entries of /workspace into a new folder in it, which cannot be refused."""
    trash = Path(tempfile.mkdtemp(prefix=".trash-", dir=WORKSPACE)).name
    with opened(trash, within=workspace) as target:
        for name in names:
            os.rename(name, name, src_dir_fd=workspace, dst_dir_fd=target)
    return trash


def make_anew(script: str, *args: str, trash: str, workspace: int) -> None:
    """A new .git by one of the scripts above; the trash goes into it, out of sight."""
    checked(as_agent("sh", "-euc", script, "workspace", *args, cwd=WORKSPACE),
            "no new repository in /workspace", "init again, then reset")
    with opened(".git", within=workspace) as git:
        os.mkdir("trash", dir_fd=git)
        with opened("trash", within=git) as target:
            os.rename(trash, trash, src_dir_fd=workspace, dst_dir_fd=target)
            for name in (".", trash):         # whoever removes .git can remove it too
                os.chown(name, *agent(), dir_fd=target)


def reset() -> dict[str, object]:
    begun = time.monotonic()
    branch, commit = home()
    kept = {str(folder): fingerprint(folder) for folder in KEPT}
    with opened(WORKSPACE) as workspace, opened(LOGS) as logs:
        take_back(workspace)
        saved = save()
        entries = os.listdir(workspace)
        trash = rename_away(entries, workspace)
        cleared = {str(WORKSPACE): {"entries": len(entries)},
                   str(LOGS): {"entries": len(os.listdir(logs))},
                   str(CLAUDE): {"entries": clear_claude()}}
        take_back(logs)
        empty(logs)
        make_anew(_CHECK_OUT, branch, commit, trash=trash, workspace=workspace)
    told: dict[str, object] = {
        "commit": commit, "branch": branch, "cleared": cleared, "kept": kept, **saved}
    if wrong := list(what_is_not_clean(branch, commit, kept)):
        raise Refused(f"not clean: {'; '.join(wrong)}", "if the agent still runs, end "
                      "it: docker compose up -d --force-recreate -t 0; then reset",
                      **told)
    is_gone = delete_trash(DELETE_INLINE_S)
    return {"clean": True, **told, "trash": not is_gone,
            "duration_s": round(time.monotonic() - begun, 3)}


def what_is_not_clean(branch: str, commit: str, kept: Mapping[str, object],
                      ) -> Iterator[str]:
    """Proof by a look at what is there: every file, and every repository's ref used."""
    yield from wrong_head(branch, commit)
    same, changed = changed_files()
    if changed:
        yield f"the files are not those of the commit: {shown(changed)}"
    status = git_in_workspace("git status --porcelain -z --no-renames "
                              "--untracked-files=all --ignored=traditional")
    if dirty := [line for line in status.split("\0")[:-1]
                 if not (line.startswith(" M ") and line[3:] in same)]:
        yield f"git status: {shown(dirty)}"
    yield from odd_files()
    if os.listdir(LOGS):
        yield f"{LOGS}: {shown(os.listdir(LOGS))}"
    if rest := set(os.listdir(CLAUDE)) - {CREDENTIALS, SETTINGS}:
        yield f"{CLAUDE}: {shown(sorted(rest))}"
    for folder in KEPT:
        if fingerprint(folder) != kept[str(folder)]:
            yield f"{folder} changed meanwhile"


def wrong_head(branch: str, commit: str) -> Iterator[str]:
    at = git_in_workspace("git rev-parse HEAD; git symbolic-ref HEAD").split()
    if at != [commit, f"refs/heads/{branch}"]:
        yield f"HEAD is {' '.join(at)}, not {branch} at {commit}"


def changed_files() -> tuple[set[str], list[str]]:
    """What git reads otherwise than it wrote it, all the same as a checkout makes it
    (line ends that .gitattributes forbids, say); and all that is otherwise."""
    index = f"/tmp/index-{os.getpid()}"
    words = git_in_workspace(_PROOF, index=index).split("\0")[:-1]
    changes = dict(zip(words[1::2], words[::2], strict=True))
    proof = WORKSPACE / ".git" / "proof"
    same = {name for name, status in changes.items()
            if status == "M" and is_same_file(WORKSPACE / name, proof / name)}
    shutil.rmtree(proof, ignore_errors=True)
    return same, [f"{status} {name}" for name, status in changes.items()
                  if name not in same]


def is_same_file(one: Path, other: Path) -> bool:
    modes = {path.lstat().st_mode for path in (one, other)}
    return (len(modes) == 1 and stat.S_ISREG(modes.pop())
            and one.read_bytes() == other.read_bytes())


def git_in_workspace(script: str, *args: str, index: str = "") -> str:
    """What a script of git commands prints, in the repository that was just made."""
    env = {"GIT_INDEX_FILE": index} if index else {}
    return checked(as_agent("sh", "-euc", script, "workspace", *args, cwd=WORKSPACE,
                            env=env), "the proof failed", "reset again")


def odd_files() -> Iterator[str]:
    """Empty folders, strange owners, pipes and sockets: git does not see them."""
    uid, gid = agent()
    links = set(git_in_workspace(
        "git ls-files -s -z | sed -zn 's/^160000 [0-9a-f]* 0\\t//p'").split("\0"))
    listed = found(
        WORKSPACE, "-path", "./.git", "-prune", "-o",
        "-type", "d", "-empty", "-printf", r"empty folder %P\0", "-o",
        "!", "(", "-uid", str(uid), "-gid", str(gid), ")",
        "-printf", r"owner %U:%G of %P\0", "-o",
        "!", "-type", "f,d,l", "-printf", r"neither file nor folder: %P\0")
    odd = [x for x in listed if x.removeprefix("empty folder ") not in links]
    if odd:
        yield shown(odd)


def shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def sweep() -> dict[str, object]:
    if not delete_trash():
        raise Refused(f"{WORKSPACE}/.git/trash cannot be deleted", "look at it with "
                      "docker compose run --rm janitor bash")
    return {"swept": True}


def repair(branch: str, commit: str) -> dict[str, object]:
    """The files stay; what the old .git alone knew of them is gone."""
    start, start_commit = home()
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit) or not mirror(
            "rev-parse", "-q", "--verify", f"{commit}^{{commit}}"):
        raise Refused(f"the mirror holds no commit {commit!r}", "save brings commits "
                      "into it; reset starts over")
    well_named(branch)
    uid, gid = agent()
    with opened(WORKSPACE) as workspace:
        take_back(workspace)
        names = [name for name in os.listdir(workspace) if name == ".git"]
        trash = rename_away(names, workspace)
        make_anew(_KEEP_FILES, start, start_commit, branch, commit, trash=trash,
                  workspace=workspace)
        found(WORKSPACE, "-path", "./.git", "-prune", "-o", "!", "(", "-uid", str(uid),
              "-gid", str(gid), ")", "-execdir", "chown", "-h", f"{uid}:{gid}", "{}",
              "+")
    if wrong := list(wrong_head(branch, commit)):
        raise Refused(wrong[0], "reset starts over")
    return {"branch": branch, "commit": commit,
            "trash": not delete_trash(DELETE_INLINE_S)}


def well_named(branch: str) -> None:
    done = as_agent("git", "check-ref-format", "--branch", branch)
    if done.returncode or done.stdout.strip() != branch:
        raise Refused(f"{branch!r} is no name of a branch", "git help check-ref-format")


def fill(branch: str, url: str) -> dict[str, object]:
    """What a fill that was killed left behind is overwritten by the next."""
    try:
        if not url:
            receive_bundle()
        told = fill_mirror(branch, url or str(INCOMING))
    finally:
        INCOMING.unlink(missing_ok=True)
    branch, commit = home()
    is_filled = is_ours()
    if not is_filled:
        reset()
    return {"mirror": told, "workspace": "kept" if is_filled else "cloned",
            "home": branch, "commit": commit}


def receive_bundle() -> None:
    with INCOMING.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        if not file.tell():
            raise Refused("stdin: no git bundle", "git bundle create - HEAD --branches "
                          "--tags | docker compose run ... fill --home BRANCH")


def fill_mirror(branch: str, source: str) -> str:
    """`cloned`, `updated` or `kept`. What comes is looked at before it counts."""
    refs, symbolic = refs_of(source)
    branch = branch or symbolic
    if not branch:
        raise Refused("no home branch is named", "fill --home BRANCH")
    well_named(branch)
    prepare_mirror()
    old = mirror("rev-parse", "-q", "--verify", "HEAD^{commit}")
    before = mirror_refs()
    try:
        receive(source, "+HEAD:refs/fill/HEAD" if "HEAD" in refs else "")
        if old:
            refuse_another_repository(source)
        else:
            # that no other branch makes a fill look complete that is not
            mirror("symbolic-ref", "HEAD", f"refs/heads/{branch}", what="no home")
        take_over(branch, refs)
    finally:
        forget_fill()
    return "cloned" if not old else "updated" if mirror_refs() != before else "kept"


def mirror_refs() -> tuple[str, str]:
    return (mirror("for-each-ref", "refs/heads", "refs/tags"),
            mirror("symbolic-ref", "HEAD"))


def refs_of(source: str) -> tuple[dict[str, str], str]:
    """Commit of each branch and of HEAD; the branch that HEAD is, where it is told."""
    listed = checked(
        as_agent("git", "ls-remote", "--symref", "--", source, "HEAD", "refs/heads/*",
                 timeout_s=TRANSFER_TIMEOUT_S, env=proxies()),
        f"cannot read {without_password(source)}", "is it complete, does the network "
        "reach it, is it public?")
    lines = [line.split("\t") for line in listed.splitlines()]
    refs = {name: value for value, name in lines if not value.startswith("ref: ")}
    symbolic = [value for value, name in lines
                if name == "HEAD" and value.startswith("ref: refs/heads/")]
    if not refs:
        raise Refused(f"{without_password(source)} holds no commit", "commit something "
                      "there first")
    return refs, symbolic[0].removeprefix("ref: refs/heads/") if symbolic else ""


def without_password(source: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://***@",
                  "the bundle" if source == str(INCOMING) else source)


def proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items()
            if name.lower() in _PROXIES}


def prepare_mirror() -> None:
    """An empty mirror, or what a killed command left of one without its locks: we hold
    the only lock that counts."""
    if MIRROR.is_dir():
        for lock in found(MIRROR, "-name", "*.lock", "-printf", r"%P\0"):
            (MIRROR / lock).unlink()
    checked(as_agent("git", "init", "-q", "--bare", "--template=", str(MIRROR)),
            "no mirror", "remove the project's volume `mirror`, then init")
    mirror("config", "gc.auto", "0", what="no mirror")
    forget_fill()


def receive(source: str, head: str) -> None:
    refspecs = "+refs/heads/*:refs/fill/heads/*", "+refs/tags/*:refs/fill/tags/*", head
    checked(as_agent("git", f"--git-dir={MIRROR}", *_FETCH, source,
                     *filter(None, refspecs), timeout_s=TRANSFER_TIMEOUT_S,
                     env=proxies()),
            f"cannot fetch {without_password(source)}", "a shallow clone lacks "
            "commits: git fetch --unshallow; a bundle may be cut short: fill again")


def refuse_another_repository(source: str) -> None:
    tips = mirror("for-each-ref", "--format=%(objectname)", "refs/fill/heads",
                  "refs/fill/HEAD").split()
    if not mirror("merge-base", "HEAD", *dict.fromkeys(tips)):
        raise Refused(f"the mirror holds another repository: no commit of it is in "
                      f"{without_password(source)}", "a second repository is a second "
                      "SANDBOX_PROJECT; or give this one up: docker compose down -v")


def take_over(branch: str, refs: Mapping[str, str]) -> None:
    """The source's branches and tags; the home branch at its HEAD if it has none so
    called: HEAD is detached there, or the mirror is new."""
    at = f"refs/heads/{branch}"
    heads = {value for name, value in refs.items() if name != "HEAD"}
    is_new = not mirror("rev-parse", "-q", "--verify", at)
    mirror(*_FETCH, "--atomic", str(MIRROR), "+refs/fill/heads/*:refs/heads/*",
           "+refs/fill/tags/*:refs/tags/*", what="the mirror's branches are in the way")
    if at not in refs and "HEAD" in refs and (is_new or refs["HEAD"] not in heads):
        mirror("update-ref", at, "refs/fill/HEAD", what="no home branch")
    if not mirror("rev-parse", "-q", "--verify", at):
        raise Refused(f"no branch {branch!r} there", "--home names one that is there")
    mirror("symbolic-ref", "HEAD", at, what="no home branch")


def forget_fill() -> None:
    for name in mirror("for-each-ref", "--format=%(refname)", "refs/fill").split():
        mirror("update-ref", "-d", name, what="cannot delete a ref of the mirror")


def is_ours() -> bool:
    """Whether /workspace has a repository that the mirror knows the start of."""
    if why_unreadable():
        return False
    done = as_agent("git", f"--git-dir={WORKSPACE}/.git", "rev-parse",
                    "refs/orchestrator/start^{commit}", "HEAD^{commit}")
    start = done.stdout.partition("\n")[0]
    return done.returncode == 0 and bool(mirror("cat-file", "-t", start))


def check() -> dict[str, object]:
    problems = []
    for folder in (WORKSPACE, *KEPT, LOGS, CLAUDE, Path("/tmp")):
        if why := why_unwritable(folder):
            problems.append(f"{folder} cannot be written: {why}")
    for folder in (Path("/shared/data"), MIRROR.parent):
        if not why_unwritable(folder):
            problems.append(f"{folder} can be written by the agent")
    pinned, version = os.environ.get("SANDBOX_CLAUDE_VERSION", ""), claude_version()
    if not re.match(r"\d+\.", version):
        problems.append(f"claude --version: {version}")
    elif version != pinned:
        problems.append(f"claude is {version}, the image is made for {pinned}")
    return {"problems": problems, "claude": version,
            "login": (CLAUDE / CREDENTIALS).is_file()}


def reach() -> dict[str, object]:
    """Any answer will do but a proxy's refusal: that no waiting cures."""
    url = os.environ.get("ANTHROPIC_BASE_URL") or "https://api.anthropic.com"
    done = subprocess.run(
        ("curl", "-sS", "-m", str(REACH_TIMEOUT_S), "-o", "/dev/null", "-w",
         "%{http_code} %{http_connect} %header{server}", url),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    code, by_proxy, server = (f"{done.stdout} 000 000 ".split(" ") + [""])[:3]
    if by_proxy == "403" or (code == "403" and server.startswith("tinyproxy")):
        raise Refused(f"{url} is blocked by the proxy", "add its host to EGRESS_ALLOW "
                      "in sandbox/.env, then sandbox up")
    if code == "503" and url.startswith("http://gateway"):
        raise Refused(f"{url} has no key yet", "run with --key-by gateway, or hand it "
                      "over with set-key (docs/sandbox.md)")
    if code == "000":
        raise Refused(f"{url} does not answer: {last_words(done)}", "an outage, or no "
                      "network: docker compose exec sandbox curl -v " + url)
    return {"api": url, "http_status": int(code)}


def why_unwritable(folder: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return str(error.strerror)
    return ""


def claude_version() -> str:
    try:
        done = subprocess.run(("claude", "--version"), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, check=False,
                              timeout=CLAUDE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout.split() or [last_words(done)])[0]


# ---- command line

@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Alone at work: a client that was killed leaves its janitor running."""
    until = time.monotonic() + LOCK_TIMEOUT_S
    # for root alone: the agent could hold a lock on what it can open
    with open(os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Refused("another janitor is at work", "docker ps shows it; "
                                  "wait, or end it with docker kill") from None
                time.sleep(0.05)
        yield


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message, f"{self.prog} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, prog="workspace.py",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("tips", "save", "reset", "sweep", "check", "reach"):
        commands.add_parser(name)
    filling = commands.add_parser("fill")
    filling.add_argument("--home", default="", metavar="BRANCH")
    filling.add_argument("url", nargs="?", default="")
    repairing = commands.add_parser("repair")
    repairing.add_argument("branch")
    repairing.add_argument("commit")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> dict[str, object]:
    asked = parse(argv)
    alone: dict[str, Callable[[], dict[str, object]]] = {
        "save": save, "reset": reset,
        "fill": lambda: fill(asked.home, asked.url),
        "repair": lambda: repair(asked.branch, asked.commit)}
    if asked.command in alone:
        with locked():
            return alone[asked.command]()
    return {"tips": tips, "sweep": sweep, "check": check,
            "reach": reach}[asked.command]()


def main(argv: Sequence[str]) -> int:
    os.chdir("/")
    os.umask(0o022)
    try:
        told = run(argv)
    except Refused as refused:
        told = refused.told
    except Exception as error:       # whoever called reads JSON, not tracebacks
        told = {"error": f"{type(error).__name__}: {error}",
                "hint": "workspace.py --help tells who may run what"}
    print(json.dumps(told))
    return 1 if "error" in told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
