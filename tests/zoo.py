"""Processes that are hard to end; each lives until a given time at the latest.

    python3 -S -c SOURCE KIND UNTIL MARK

It prints "ready" once the kind runs. Every process keeps MARK in its command line, so
that whoever looks from outside knows it; the time bounds what a failed test leaves.
"""
import os
import signal
import subprocess
import sys
import time

with open("/proc/self/cmdline", "rb") as _file:
    ME = _file.read().decode().split("\0")[:-1]
kind, until = sys.argv[1], float(sys.argv[2])


def as_kind(other):
    return [*ME[:-3], other, *ME[-2:]]


def start(other, *wrapper, **options):
    return subprocess.Popen([*wrapper, *as_kind(other)], stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            **options)


def nap(seconds=0.002):
    if time.time() > until:
        os._exit(0)
    time.sleep(seconds)


def live():
    while True:
        nap(0.1)


def detach():
    """True in a daemon: double fork, session of its own, no open pipe."""
    if os.fork():
        os.wait()
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    return True


def deaf():
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:     # kept by the C library
            pass
    live()


def stopped():
    other = start("live", start_new_session=True)
    os.kill(other.pid, signal.SIGSTOP)


def watch():
    """Two processes; whichever ends, the other starts it again."""
    while True:
        younger = os.fork()
        if not younger:
            elder = os.getppid()
            os.setsid()
            while os.getppid() == elder:
                nap()
            continue
        while not os.waitpid(younger, os.WNOHANG)[0]:
            nap()


def hop():
    """Never longer than 2 ms under the same process id: a look from outside may miss
    it, so it leaves a trace of one byte a hop."""
    trace = os.open(f".git/{sys.argv[3]}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        nap()
        os.write(trace, b".")
        if os.fork():
            os._exit(0)


def bomb():
    while True:
        nap(0)
        try:
            os.fork()
        except OSError:
            nap()


def meet(number):
    """Sends a signal to all that comes up, to what shall end everything as well."""
    spared = {1, os.getpid()}
    while True:
        nap(0)
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in spared:
                try:
                    os.kill(int(name), number)
                except OSError:
                    pass


RUNS = {"live": live, "deaf_one": deaf}
DAEMONS = {"daemon": live, "watchdogs": watch, "hopper": hop, "bomb": bomb,
           "sniper": lambda: meet(signal.SIGKILL),
           "freezer": lambda: meet(signal.SIGSTOP)}
WRAPPERS = {"foreground": (), "nohup": ("nohup",), "setsid": ("setsid",)}

if kind in RUNS:
    RUNS[kind]()
elif kind == "deaf":
    start("deaf_one")
elif kind in WRAPPERS:
    start("live", *WRAPPERS[kind])
elif kind == "stopped":
    stopped()
elif kind == "daemon_without_environment":
    if detach():
        os.execve(sys.executable, as_kind("live"), {})
elif detach():
    DAEMONS[kind]()
time.sleep(0.2)     # for what was started to be what it shall be
os.write(1, b"ready\n")
live()
