"""What an agent may leave behind, for tests/test_workspace.py and benchmarks/reset.py.

Each is a script for bash in /workspace of a container made anew, after PRELUDE; the
repository is the one of `make_repository`.
"""
from __future__ import annotations

import json
import subprocess
from pathlib import Path

PRELUDE = """
commit() { git -c user.name=a -c user.email=a@localhost commit -q --allow-empty "$@"; }
hook() { mkdir -p "$1"; printf '#!/bin/sh\\ntouch /workspace/hooked\\n' >"$1/$2"
         chmod +x "$1/$2"; }
cd /workspace
"""

FAULTS = {
    "untracked and modified":
        "echo x >>README.md; mkdir -p a/b; echo y >a/b/c; rm Makefile",
    "staged and ignored files": """
mkdir -p dist; echo s >dist/x; echo K=1 >.env; echo z >>README.md; git add -A""",
    "a nested repository": "git init -q nested; cd nested; commit -m x; echo f >f",
    "a nested repository in an ignored folder":
        "mkdir -p build; git init -q build/dep; echo f >build/dep/f",
    "index.lock held": "touch .git/index.lock; echo x >>README.md",
    "locks of refs":
        "touch .git/refs/heads/main.lock .git/HEAD.lock; echo x >>README.md",
    "a corrupt index": "echo x >>README.md; head -c 500 /dev/urandom >.git/index",
    "an empty HEAD": "echo x >>README.md; : >.git/HEAD",
    ".git deleted": "echo x >>README.md; rm -rf .git",
    "objects missing":
        "echo x >README.md; rm -rf .git/objects/info/alternates .git/objects/pack/*",
    "a detached HEAD with a commit":
        "git checkout -q --detach; echo q >>README.md; commit -am z",
    "another branch, and main moved":
        "git checkout -q -b wip; echo q >>README.md; commit -am z; git branch -f main",
    "a merge conflict": """
git checkout -q -b w1; echo 1 >README.md; commit -am 1
git checkout -q main; echo 2 >README.md; commit -am 2
git -c user.name=a -c user.email=a@localhost merge w1""",
    "a stash": """
echo 1 >>README.md; git -c user.name=a -c user.email=a@localhost stash -q
echo 2 >new""",
    "skip-worktree and assume-unchanged": """
git update-index --skip-worktree README.md; echo evil >>README.md
git update-index --assume-unchanged Makefile; echo evil >>Makefile""",
    "core.fileMode=false and chmod":
        "git config core.fileMode false; chmod +x README.md; chmod -x run.sh",
    "files hidden by info/exclude":
        "echo '*' >>.git/info/exclude; echo evil >hidden.txt",
    "a post-checkout hook":
        "hook .git/hooks post-checkout; echo x >>README.md; git checkout -q -b z",
    "core.hooksPath in ~/.gitconfig": """
hook ~/hooks post-checkout; git config --global core.hooksPath ~/hooks
git checkout -q -b z; rm -f hooked; echo x >>README.md""",
    "an fsmonitor that sees no change": r"""
printf '#!/bin/sh\nprintf "t\\0"\n' >.git/monitor; chmod +x .git/monitor
git config core.fsmonitor .git/monitor; git config core.fsmonitorHookVersion 2
git status; git status; echo evil >>README.md; echo evil >sneaky.txt""",
    "core.worktree elsewhere": """
mkdir -p /tmp/elsewhere; echo evil >>README.md; echo n >new
git config core.worktree /tmp/elsewhere""",
    ".git is a file that leads elsewhere": """
mv .git /tmp/elsewhere; echo 'gitdir: /tmp/elsewhere' >.git; echo evil >>README.md""",
    "a smudge filter": """
echo '*.md filter=evil' >.git/info/attributes
git config filter.evil.smudge 'sed s/A/EVIL/g'
git config filter.evil.clean 'sed s/EVIL/A/g'
rm README.md; git checkout -q README.md""",
    "a replaced commit": """
git checkout -q -b r; echo evil >README.md; commit -am evil; git checkout -q main
git replace main r; rm -f .git/index; git reset -q --hard""",
    "autocrlf": """
git config core.autocrlf true; git config core.safecrlf false
rm README.md Makefile; git checkout -q .""",
    "folders without rights":
        "mkdir -p locked/in; echo f >locked/in/f; chmod 0 locked/in locked",
    "a tracked folder made read-only":
        "echo x >>src/app.py; echo n >src/new.py; chmod 555 src",
    "a path longer than PATH_MAX": """
python3 -c '
import os
for i in range(60):
    os.mkdir("d" * 100)
    os.chdir("d" * 100)
open("f", "w")'""",
    "odd names": r"""
touch -- -rf $'new\nline' $'bad\xff\xfename' ' sp ace' '*' '$(touch hooked)'
mkdir -- -d""",
    "empty folders": "mkdir -p e1/e2/e3 src/e4",
    "links to what is kept":
        "ln -s /env/models link; rm -rf docs; ln -s /env/models docs",
    "a pipe and a socket": """
mkfifo pipe
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/workspace/socket")'""",
    "a sparse checkout": "git sparse-checkout set src",
    "origin elsewhere, by insteadOf": """
git init -q --bare /tmp/evil; git remote add origin /mirror/repo.git
git config url./tmp/evil.insteadOf /mirror/repo.git; echo x >>README.md
commit -am evil; git push -qf /tmp/evil HEAD:refs/heads/main""",
    "refs/remotes/origin/main moved": """
echo evil >README.md; commit -am e; git update-ref refs/remotes/origin/main HEAD""",
    "another worktree": "git worktree add -q /tmp/worktree -b wt; echo x >>README.md",
    "init.templateDir": """
hook ~/template/hooks post-checkout; git config --global init.templateDir ~/template
echo x >>README.md""",
    "a process that still writes": """
setsid sh -c 'while :; do echo x >>README.md; sleep 0.02; done' >/dev/null 2>&1 &""",
    # ---- and what the engine's and the volumes' side adds
    "a submodule of the agent's": """
git init -q /tmp/sub; (cd /tmp/sub; commit -m s)
git -c protocol.file.allow=always submodule -q add /tmp/sub sub; commit -m sub""",
    "the repository's submodule filled": """
git init -q vendored; cd vendored; commit -m v; echo f >f; cd ..; git add vendored""",
    ".git without rights": "echo x >>README.md; chmod 0 .git",
    "/workspace without rights": "echo x >>README.md; chmod 0 /workspace",
    "every loose object damaged": """
for n in $(seq 200); do echo $n | git hash-object -w --stdin; done
echo x >>README.md; commit -am x
find .git/objects -type f -name '????????*' | while read -r o; do
chmod u+w "$o"; echo damage >"$o"; done""",
    "a tracked file replaced by a folder":
        "rm README.md; mkdir README.md; echo x >README.md/x; rm -r src; echo x >src",
    "names of mount points": """
mkdir -p workspace mirror/repo.git env/models .trash .trash-1 proc
echo x >mirror/repo.git/HEAD
mkdir -p .git/trash; ln -s /env/models .git/trash/models""",
    ".git/trash is a link": "ln -s /env/models .git/trash; echo x >new",
    "a pipe for a .git/config": "rm .git/config; mkfifo .git/config",
    "hooks, servers and orders in ~/.claude": """
cd ~/.claude; echo '{"hooks": {"Stop": []}}' >settings.json; echo obey >CLAUDE.md
mkdir -p agents skills/x projects/-workspace; echo x >projects/-workspace/s.jsonl
echo '{"userID": "u", "mcpServers": {"evil": {"command": "sh"}}}' >.claude.json""",
    "a ~/.claude.json too deep to read":
        "python3 -c 'print(\"[\" * 200000)' >~/.claude/.claude.json; chmod 0 ~/.claude",
    "links for the login": """
ln -sf /env/models/keep.pt ~/.claude/.claude.json
ln -sf /env/models/keep.pt ~/.claude/.credentials.json""",
    "git config --global": """
git config --global core.autocrlf true; git config --global core.excludesFile /etc/hosts
git config --global core.fsmonitor 'touch /workspace/hooked'; echo x >>README.md""",
    "logs with a deep folder, without rights": """
cd /env/logs; mkdir -p a/b; echo x >a/b/c; ln -s /env/models m
chmod 0 a/b a; chmod 0 .""",
    "access lists that new files inherit": """
python3 -c '
import os, struct
entries = ((1, 4, -1), (4, 0, -1), (32, 0, -1))  # user r, group none, others none
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *e) for e in entries)
os.setxattr("/workspace", "system.posix_acl_default", acl)'
echo x >>README.md""",
    "a branch of a milestone, not committed":
        "git checkout -q -b feature/x; mkdir x; echo x >x/x; git add x",
}
ROOT_FAULTS = {
    "a file of root's": "echo x >/workspace/mine; echo x >/workspace/src/mine",
    "a folder of root's":
        "cd /workspace; mkdir -p d/d; echo x >d/d/f; chmod -R go-rwx d",
    "/workspace and .git are root's":
        "chown -R 0:0 /workspace /env/logs; chmod -R go-w /workspace",
}

# The files of a folder with their content, and what git says of it, as JSON.
LISTING = r"""
import hashlib, json, os, stat, sys
top, files = os.fsencode(sys.argv[1]), {}
for folder, folders, names in os.walk(top, onerror=print):
    if folder == top and b".git" in folders:
        folders.remove(b".git")
    for name in folders + names:
        path = os.path.join(folder, name)
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode):
            with open(path, "rb") as file:
                told = hashlib.sha256(file.read()).hexdigest()
            told += " x" if found.st_mode & 0o100 else ""
        else:
            told = os.readlink(path).decode() if stat.S_ISLNK(found.st_mode) else \
                "folder" if stat.S_ISDIR(found.st_mode) else "special"
        files[os.path.relpath(path, top).decode(errors="replace")] = told
print(json.dumps(files))
"""


def make_repository(folder: Path) -> Path:
    """Tracked: two folders, a link, a script, a submodule that is not filled, a file
    whose line ends its attributes forbid, an ignored file; and a second branch."""
    folder.mkdir(parents=True)
    for name, text in {
            "README.md": "# A project\nA\n", "Makefile": "all:\n\ttrue\n",
            "src/app.py": "print('A')\n", "docs/index.md": "A\n",
            "run.sh": "#!/bin/sh\n",
            ".gitignore": "dist/\nbuild/\n.env\n*.log\nnode_modules/\n",
            "kept.log": "tracked, though ignored\n"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("src/app.py")
    (folder / "vendored").mkdir()
    (folder / "dos.bat").write_bytes(b"echo\r\n")

    def git(*args: str) -> str:
        return subprocess.run(
            ("git", "-c", "user.name=S", "-c", "user.email=s@localhost", *args),
            cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "main")
    git("add", "-A", "-f")
    git("commit", "-qm", "One")
    git("branch", "other")
    # the attribute comes after the file: git will call it modified wherever it looks
    (folder / ".gitattributes").write_text("*.bat text\n")
    git("add", ".gitattributes")
    git("update-index", "--add", "--cacheinfo",
        f"160000,{git('rev-parse', 'HEAD')},vendored")
    git("commit", "-qm", "Two")
    git("tag", "v1")
    return folder


def listing(folder: Path) -> dict[str, str]:
    done = subprocess.run(("python3", "-c", LISTING, str(folder)), check=True,
                          capture_output=True, text=True)
    files: dict[str, str] = json.loads(done.stdout)
    return files
