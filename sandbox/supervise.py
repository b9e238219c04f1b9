#!/usr/bin/env python3
"""Run a command as the head of its process tree and leave nothing of the tree behind.

    python3 supervise.py -- COMMAND [ARG ...]

stdin carries the prompt and then serves as a dead-man switch: a line `prompt=LENGTH`,
that many bytes for the command's stdin, then nothing, held open. The line may also
name keys, `prompt=LENGTH ANTHROPIC_API_KEY=LENGTH`, whose bytes follow: the command
reads each from a pipe whose number is in a variable that the Claude CLI knows, so that
no key is in an environment, an argument or a file. The end of stdin means that whoever
asked is gone or wants a stop: the command gets SIGINT and a few seconds for its last
words. Then, as after a normal exit, all descendants are killed:
orphans of any kind (nohup, setsid, double fork) come back here, for this process is
their subreaper. stdout and stderr are the command's own.

Exit status: the command's, 128+n if signal n ended it, 126 or 127 if it could not be
started, 125 if it was stopped or the prompt never came.
"""
from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

LAST_WORDS_S = 3.0       # SIGINT -> kill; the CLI prints its result within 0.35 s
ORPHANS_GRACE_S = 0.2    # end of the command -> kill of what it left behind
KILL_ROUND_S = 0.05      # for the killed to be reaped before the next look at the tree
MAX_FREEZE_LOOKS = 100   # a process that forks and exits faster than we look
FOREVER_S = 1e8          # sigtimedwait has no other word for it
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# Undocumented variables of the Claude CLI, tried with 2.1.330.
DESCRIPTOR_VARIABLES = {
    "ANTHROPIC_API_KEY": "CLAUDE_CODE_API_KEY_FILE_DESCRIPTOR",
    "CLAUDE_CODE_OAUTH_TOKEN": "CLAUDE_CODE_OAUTH_TOKEN_FILE_DESCRIPTOR"}

EXIT_STOPPED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

STOP_ORDERS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
NEWS = STOP_ORDERS | {signal.SIGCHLD}  # blocked in this process, taken by sigtimedwait


class Tree:
    """The command and all it started, as far as waitpid knows."""

    def __init__(self, head: int) -> None:
        self.head = head
        self.status: int | None = None  # exit code, or -n for signal n
        self.is_gone = False
        self.is_stop_ordered = False

    def reap(self) -> None:
        """Collect whoever has died by now."""
        try:
            while (dead := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if dead[0] == self.head:
                    self.status = os.waitstatus_to_exitcode(dead[1])
        except ChildProcessError:
            self.is_gone = True

    def wait(self, is_over: Callable[[], bool], *, timeout_s: float) -> None:
        """Sleep from one signal to the next until it is over or the time is up."""
        deadline = time.monotonic() + timeout_s
        self.reap()
        while not is_over() and (left_s := deadline - time.monotonic()) > 0:
            news = signal.sigtimedwait(NEWS, left_s)
            self.is_stop_ordered |= news is not None and news.si_signo in STOP_ORDERS
            self.reap()

    def has_lost_head(self) -> bool:
        return self.status is not None

    def kill(self) -> None:
        """Kill every descendant. Frozen first: nothing may fork away between looks."""
        frozen: set[int] = set()
        for _ in range(MAX_FREEZE_LOOKS):
            fresh = groups_below(os.getpid()) - frozen
            if not fresh:
                break
            send(fresh, signal.SIGSTOP)
            frozen |= fresh
        send(frozen, signal.SIGKILL)


def groups_below(root: int) -> set[int]:
    """Process groups of all descendants; complete, since orphans become our children.

    A group is signalled in one system call, so even one that forks all the time is
    caught whole; and as the head leads a session, no group has a member outside.
    """
    children: dict[int, list[tuple[int, int]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", name, "stat").read_bytes()
        except OSError:  # it ended between the two looks
            continue
        # proc(5): "pid (name) state ppid pgrp ..."; any byte may occur in the name
        parent, pgrp = stat[stat.rindex(b")") + 4:].split(maxsplit=2)[:2]
        children.setdefault(int(parent), []).append((int(name), int(pgrp)))
    groups: set[int] = set()
    todo = [root]
    while todo:
        for pid, group in children.get(todo.pop(), ()):
            todo.append(pid)
            groups.add(group)
    return groups


def send(groups: Iterable[int], number: signal.Signals) -> None:
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:  # it ended by itself, or is not ours: waitpid decides
            pass


def become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def read_parts(stream: BinaryIO) -> dict[str, bytes]:
    """The prompt and the keys by name. Raises ValueError when the stream does not begin
    with a line of names and lengths and as many bytes."""
    header = stream.readline(256)
    words = header.decode("ascii", "replace").split()
    fields = [word.partition("=") for word in words]
    known = {"prompt", *DESCRIPTOR_VARIABLES}
    if not fields or not all(name in known and length.isdecimal()
                             for name, _, length in fields):
        raise ValueError(f"stdin: expected prompt=LENGTH and a newline, got {header!r}")
    parts = {name: stream.read(int(length)) for name, _, length in fields}
    for name, _, length in fields:
        if len(parts[name]) < int(length):
            raise ValueError(f"stdin: ended after {len(parts[name])} of {length} bytes "
                             f"of {name}")
    return {"prompt": b"", **parts}


def start(command: list[str], prompt: bytes, keys: dict[str, bytes]) -> int:
    """PID of the command, in a session of its own, with clean signal handling."""
    # A file in memory, not a pipe: a command that never reads it cannot block us.
    stdin = os.memfd_create("prompt")
    with open(stdin, "wb", closefd=False) as file:
        file.write(prompt)
    os.lseek(stdin, 0, os.SEEK_SET)
    environ, ours = dict(os.environ), [stdin]
    for name, key in keys.items():
        # A pipe, not a file: once read it is empty, for whoever opens it through /proc.
        reader, writer = os.pipe()
        os.write(writer, key)
        os.close(writer)
        os.set_inheritable(reader, True)
        environ[DESCRIPTOR_VARIABLES[name]] = str(reader)
        ours.append(reader)
    catchable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    try:
        return os.posix_spawnp(
            command[0], command, environ, setsid=True, setsigmask=(),
            setsigdef=catchable, file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)])
    finally:
        for descriptor in ours:
            os.close(descriptor)


def order_stop_at_end_of(stdin: int) -> None:
    while os.read(stdin, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def supervise(tree: Tree) -> int:
    """Returns the exit status once the last descendant is gone, and not before."""
    tree.wait(lambda: tree.has_lost_head() or tree.is_stop_ordered, timeout_s=FOREVER_S)
    was_stopped = tree.status is None
    if was_stopped:
        os.kill(tree.head, signal.SIGINT)  # a zombie at worst: only we reap it
        tree.wait(tree.has_lost_head, timeout_s=LAST_WORDS_S)
    tree.wait(lambda: tree.is_gone, timeout_s=ORPHANS_GRACE_S)
    while not tree.is_gone:
        tree.kill()
        tree.wait(lambda: tree.is_gone, timeout_s=KILL_ROUND_S)
    if was_stopped or tree.status is None:
        return EXIT_STOPPED
    return tree.status if tree.status >= 0 else 128 - tree.status


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] != "--":
        return complain("usage: supervise.py -- COMMAND [ARG ...]", EXIT_STOPPED)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, statuses would be lost
    signal.pthread_sigmask(signal.SIG_BLOCK, NEWS)  # before the thread starts
    become_subreaper()
    try:
        with open(0, "rb", closefd=False) as stdin:
            parts = read_parts(stdin)
        head = start(argv[1:], parts.pop("prompt"), parts)
    except ValueError as error:
        return complain(str(error), EXIT_STOPPED)
    except FileNotFoundError:
        return complain(f"{argv[1]}: not found", EXIT_NOT_FOUND)
    except OSError as error:
        return complain(f"{argv[1]}: {error.strerror}", EXIT_NOT_EXECUTABLE)
    threading.Thread(target=order_stop_at_end_of, args=(0,), daemon=True).start()
    return supervise(Tree(head))


def complain(message: str, status: int) -> int:
    print(f"supervise: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
