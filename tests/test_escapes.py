"""What a hostile agent tries in the docker sandbox, and what becomes of it."""
from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from boxes import LIMITS, DockerBox, docker_box, make_repository

import ktrdr_orchestrator as ko

pytestmark = pytest.mark.docker
ZOO = Path(__file__).with_name("zoo.py").read_text(encoding="utf-8")
WRITABLE = {"/workspace", "/env/models", "/env/strategies", "/env/logs", "/home/agent",
            "/tmp", "/dev/shm", "/dev/mqueue"}
DEVICES = {"console", "full", "null", "ptmx", "random", "tty", "urandom", "zero"}
REFUSED = {"EPERM", "EACCES", "ENOENT", "ENOSYS", "EROFS", "EAFNOSUPPORT"}
# Each is harmless should it succeed: the container is bounded and thrown away.
SYSTEM_CALLS = r"""
import ctypes, errno, json, os, platform, socket, stat
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = {"x86_64": {"pivot_root": 155, "keyctl": 250, "bpf": 321, "kexec_load": 246,
                      "userfaultfd": 323, "syslog": 103, "perf_event_open": 298},
           "aarch64": {"pivot_root": 41, "keyctl": 219, "bpf": 280, "kexec_load": 104,
                       "userfaultfd": 282, "syslog": 116, "perf_event_open": 241}}
def libc_call(name, *args):
    if getattr(libc, name)(*args) == -1:
        raise OSError(ctypes.get_errno(), name)
def call(name, *args):
    if libc.syscall(NUMBERS[platform.machine()][name], *args) == -1:
        raise OSError(ctypes.get_errno(), name)
buffer = ctypes.create_string_buffer(256)
attempts = {
    "mount a file system": lambda: libc_call("mount", b"none", b"/tmp", b"tmpfs", 0, 0),
    "unmount one": lambda: libc_call("umount2", b"/shared/data", 2),
    "remount the root writable": lambda: libc_call("mount", 0, b"/", 0, 32 | 4096, 0),
    "pivot the root": lambda: call("pivot_root", b"/tmp", b"/tmp"),
    "change the root": lambda: os.chroot("/tmp"),
    "make a user namespace": lambda: libc_call("unshare", 0x10000000),
    "make a mount namespace": lambda: libc_call("unshare", 0x00020000),
    "enter PID 1's mount namespace":
        lambda: libc_call("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), 0),
    "become root": lambda: os.setuid(0),
    "become another group": lambda: os.setgroups([0]),
    "give a file away": lambda: os.chown("/workspace/README.md", 0, 0),
    "make a block device": lambda: os.mknod("/tmp/d", stat.S_IFBLK, os.makedev(8, 0)),
    "make a character device": lambda: os.mknod("/tmp/c", stat.S_IFCHR,
                                                os.makedev(1, 1)),
    "load a module": lambda: libc_call("init_module", buffer, 256, b""),
    "unload a module": lambda: libc_call("delete_module", b"overlay", 0),
    "load a kernel": lambda: call("kexec_load", 0, 0, 0, 0),
    "load a BPF program": lambda: call("bpf", 5, buffer, 48),
    "watch performance events": lambda: call("perf_event_open", buffer, 0, -1, -1, 0),
    "change the host name": lambda: socket.sethostname("mine"),
    "set the clock": lambda: libc_call("clock_settime", 0, buffer),
    "use swap": lambda: libc_call("swapon", b"/tmp/swap", 0),
    "reboot": lambda: libc_call("reboot", 0x89ABCDEF),
    "read the kernel's log": lambda: call("syslog", 3, buffer, 256),
    "use the kernel's keys": lambda: call("keyctl", 0, -3, 1),
    "handle page faults of others": lambda: call("userfaultfd", 0),
    "open a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "open a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "trace PID 1": lambda: libc_call("ptrace", 16, 1, 0, 0),
    "read the memory of PID 1": lambda: open("/proc/1/mem", "rb"),
    "read the environment of PID 1": lambda: open("/proc/1/environ", "rb").read(),
    "reach the root of PID 1": lambda: os.listdir("/proc/1/root"),
    "set what the kernel runs on a crash": lambda: open("/proc/sys/kernel/core_pattern",
                                                        "w"),
    "use the magic keys": lambda: open("/proc/sysrq-trigger", "w"),
    "be spared when memory is short": lambda: os.write(
        os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-900"),
    "raise its own memory limit": lambda: open(next(p for p in (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max")
        if os.path.exists(p)), "w"),
    "get a release agent run": lambda: open(
        "/sys/fs/cgroup/memory/release_agent", "w")
        if os.path.isdir("/sys/fs/cgroup/memory") else os.mkdir("/sys/fs/cgroup/mine"),
    "change what is in the image": lambda: open("/usr/local/lib/sandbox/supervise.py",
                                                "a"),
    "read the shell that PID 1 runs":
        lambda: open("/usr/local/lib/sandbox/untraceable-bash", "rb"),
}
told = {}
for name, attempt in attempts.items():
    try:
        attempt()
        told[name] = "done"
    except OSError as error:
        told[name] = errno.errorcode.get(error.errno, str(error))
print(json.dumps(told))
"""
ATTEMPTS = [line.strip()[1:].partition('":')[0] for line in SYSTEM_CALLS.splitlines()
            if line.startswith('    "')]


@pytest.fixture(scope="module")
def box(docker_engine: str, tmp_path_factory: pytest.TempPathFactory,
        ) -> Iterator[DockerBox]:
    repository = make_repository(tmp_path_factory.mktemp("escapes") / "repository")
    with docker_box(repository, "ktrdr-escapes", SANDBOX_CPUS="1") as made:
        made.sandbox.open()
        yield made
        made.sandbox.close()


@pytest.fixture
def unharmed(box: DockerBox) -> Iterator[None]:
    """The same container works afterwards."""
    before = box.container
    yield
    assert box.sandbox.sweep() is None
    assert box.container == before
    assert box.sandbox.sh("cat README.md").output == "# A project"
    assert box.running() == []


@pytest.fixture(scope="module")
def told(box: DockerBox) -> dict[str, str]:
    """What became of each attempt."""
    done = box.sandbox.sh('python3 -S -c "$1"', SYSTEM_CALLS)
    return dict(json.loads(done.checked("the attempts", hint="").stdout))


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_agent_cannot(told: dict[str, str], attempt: str) -> None:
    assert told[attempt] in REFUSED


def test_it_has_no_capability_and_can_gain_none(box: DockerBox) -> None:
    status = dict(line.split(":\t", 1) for line in
                  box.inside("cat /proc/self/status").splitlines())
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} \
        == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == ["1000"] * 4


def test_a_setuid_program_runs_without_the_rights_of_its_owner(box: DockerBox) -> None:
    shown = box.inside("stat -c %A /usr/bin/passwd; sleep 2 | passwd >/dev/null 2>&1 & "
                       "sleep 0.3; grep ^Uid /proc/$(pgrep -x passwd)/status")
    assert shown.split() == ["-rwsr-xr-x", "Uid:", *["1000"] * 4]


def test_it_can_write_nowhere_but_where_it_works(box: DockerBox) -> None:
    script = r"""
find / -path /proc -prune -o -writable -type d -print 2>/dev/null
find /proc -maxdepth 1 -writable -exec test -f {} \; -print
find /proc/sys /sys -type f -writable -exec sh -c ': >>"$1"' sh {} \; -print 2>/dev/null
exit 0
"""
    tops = {path for path in box.inside(script).splitlines()
            if not any(path.startswith(f"{top}/") for top in WRITABLE)}
    assert tops <= WRITABLE
    for path in ("/mirror", "/shared/data"):
        assert box.inside(f"touch {path}/x 2>&1 || :") != ""


def test_it_sees_no_process_of_the_host(box: DockerBox) -> None:
    shown = box.inside("ps -e -o pid=,args=").splitlines()
    assert "entrypoint.sh" in shown[0] and shown[0].split()[0] == "1"
    assert len(shown) < 6 and "pytest" not in "".join(shown)


def test_it_finds_no_socket_and_no_port_of_the_engine(box: DockerBox) -> None:
    assert box.inside("find / -xdev -type s 2>/dev/null; ls /var/run/docker.sock "
                      "/run/docker.sock /run/containerd 2>/dev/null; :") == ""
    script = """
import socket
gateway = next((line.split()[2] for line in open("/proc/net/route")
                if line.split()[1] == "0" * 8), "")
if gateway:
    address = socket.inet_ntoa(bytes.fromhex(gateway)[::-1])
    for port in (2375, 2376, 2377, 4243):
        probe = socket.socket()
        probe.settimeout(2)
        print(*["open"] * (probe.connect_ex((address, port)) == 0))
"""
    assert box.sandbox.sh('python3 -S -c "$1"', script).output.strip() == ""


def test_it_has_no_device_but_the_harmless_ones(box: DockerBox) -> None:
    assert set(box.inside("find /dev -type c -o -type b | grep -v ^/dev/pts/ | "
                          "xargs -n 1 basename").split()) <= DEVICES


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("signal", ["KILL", "STOP", "TERM", "SEGV", "ABRT", "HUP"])
def test_pid_1_ignores_its_signals(box: DockerBox, signal: str) -> None:
    before = box.docker("inspect", "-f", "{{.State.StartedAt}}", box.container)
    box.inside(f"kill -{signal} 1 || :")
    assert box.docker("inspect", "-f", "{{.State.StartedAt}} {{.State.Status}}",
                      box.container) == f"{before} running"


@pytest.mark.usefixtures("unharmed")
def test_a_crash_leaves_no_core_file(box: DockerBox) -> None:
    assert box.inside("mkdir -p /tmp/c; cd /tmp/c; sh -c 'kill -SEGV $$'; ls; "
                      "ulimit -Hc") == "0"


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("folder", ["/tmp", "/home/agent", "/dev/shm"])
def test_a_full_memory_file_system_stops_nothing(box: DockerBox, folder: str) -> None:
    shown = box.inside(f"dd if=/dev/zero of={folder}/fill bs=1M count=100 2>&1 || :")
    assert "No space left" in shown
    branch = f"b-{secrets.token_hex(4)}"
    base = box.sandbox.start_branch(branch, "HEAD", kept_as="refs/orchestrator/x/y")
    box.sandbox.sh("echo x >x")
    assert box.sandbox.checkpoint(branch, base, ref="refs/orchestrator/x/z",
                                  message="Full") != base
    assert box.sandbox.sweep() is None
    box.inside(f"rm {folder}/fill")


@pytest.mark.usefixtures("unharmed")
def test_what_takes_all_memory_is_killed_and_the_sandbox_goes_on(
    box: DockerBox,
) -> None:
    before = box.docker("inspect", "-f", "{{.State.StartedAt}}", box.container)
    done = box.sandbox.sh("exec python3 -S -c 'b = bytearray(2 << 30)'")
    assert done.exit_code == 137
    assert box.docker("inspect", "-f", "{{.State.StartedAt}}", box.container) == before


class Ready(ko.Listener):
    def hear(self, data: bytes, *, is_error: bool) -> None:
        super().hear(data, is_error=is_error)
        if not is_error and b"ready" in self.out:
            raise ko.Interrupted(15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bomb", "sniper", "freezer"])
def test_what_fills_the_process_table_or_fights_the_sweep_is_held_and_ended(
    box: DockerBox, kind: str,
) -> None:
    mark = f"zoo-{secrets.token_hex(6)}"
    argv = ["python3", "-S", "-c", ZOO, kind, str(time.time() + 60), mark]
    ko.Processes(ko.Clock()).run(box.sandbox.command(argv), listener=Ready(99),
                                 timeout_s=2)
    alive = [line for line in box.running() if mark in line]
    assert 0 < len(alive) <= int(LIMITS["SANDBOX_PIDS"])
    begun = time.monotonic()
    assert box.sandbox.sweep() is None
    assert time.monotonic() - begun < 10
    assert box.running() == []
    assert box.sandbox.sh("cat README.md").output == "# A project"
