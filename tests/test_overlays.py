"""The overlays of sandbox/docker-compose.yml on the real engine, without the internet.

Containers on the network `outside` stand for it: `allowed` and `evil`.
"""
from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, missing
from program import Program

pytestmark = [pytest.mark.docker, pytest.mark.slow]
SANDBOX = ROOT / "sandbox"
BASE = SANDBOX / "docker-compose.yml"
OVERLAYS = sorted(SANDBOX.glob("docker-compose.*.yml"))
EGRESS, GATEWAY, SOCKET = (SANDBOX / f"docker-compose.{name}.yml"
                           for name in ("egress", "gateway", "docker-socket"))
FAKE_OUTSIDE = ROOT / "tests/data/docker-compose.fake-outside.yml"
PROJECT = f"ktrdr-overlays-{os.getpid()}"
KEY = "sk-ant-api03-not-a-real-key"
SOCKET_GID = str(os.stat("/var/run/docker.sock").st_gid
                 if Path("/var/run/docker.sock").exists() else 0)
SETTINGS = {"EGRESS_ALLOW": "api.test Registry.test", "SANDBOX_PROJECT": PROJECT,
            "GATEWAY_UPSTREAM": "http://messages.test", "DOCKER_GID": SOCKET_GID}
CURL = ("curl", "-ksSf", "--connect-timeout", "0.7", "-m", "5",
        "-w", " %{http_connect}/%{http_code}")
DIRECT = ("--noproxy", "*")
EVEN_LOCAL = ("--noproxy", "")         # names in NO_PROXY through the proxy as well


def local_base() -> dict[str, str]:
    """The base image that .ci/install makes where no registry is reached."""
    name = "orchestrator-base:bookworm"
    argv = ["docker", "image", "inspect", name]
    is_here = Path("/var/run/docker.sock").exists() and subprocess.run(
        argv, capture_output=True, check=False).returncode == 0
    return {"BASE_IMAGE": name} if is_here and "BASE_IMAGE" not in os.environ else {}


class Stack:
    """The services of some compose files, in a project of their own."""

    def __init__(self, *files: Path, **settings: str) -> None:
        self.files = files
        self.environ = {k: v for k, v in os.environ.items()
                        if not k.startswith(("ANTHROPIC", "CLAUDE", "COMPOSE"))
                        } | local_base() | SETTINGS | settings
        self.ids: dict[str, str] = {}

    def compose(self, *args: str, stdin: str = "") -> str:
        files = (a for f in self.files for a in ("-f", str(f)))
        done = subprocess.run(["docker", "compose", *files, *args], input=stdin,
                              capture_output=True, text=True, check=False,
                              env=self.environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, service: str, *argv: str, stdin: str = "") -> str:
        """stdout of a command in the service's container, whatever its status."""
        if service not in self.ids:
            self.ids[service] = self.compose("ps", "-q", service).strip()
        argv = ("docker", "exec", "-i", self.ids[service], *argv)
        return subprocess.run(argv, input=stdin, capture_output=True, text=True,
                              check=False, timeout=60).stdout.strip()

    def address(self, service: str, network: str) -> str:
        """Of a service, or with "" of the host."""
        name = f"{self.environ['SANDBOX_PROJECT']}_{network}"
        if not service:
            return docker("network", "inspect", name, "--format",
                          "{{(index .IPAM.Config 0).Gateway}}")
        return docker("inspect", self.compose("ps", "-q", service).strip(), "--format",
                      f'{{{{(index .NetworkSettings.Networks "{name}").IPAddress}}}}')

    def await_log(self, service: str, text: str) -> str:
        until = time.monotonic() + 20
        while text not in (log := self.compose("logs", "--no-color", service)):
            assert time.monotonic() < until, log
            time.sleep(0.1)
        return log


def docker(*args: str) -> str:
    return subprocess.run(["docker", *args], capture_output=True, text=True,
                          check=True).stdout.strip()


@contextmanager
def running(*files: Path, **settings: str) -> Iterator[Stack]:
    stack = Stack(BASE, *files, **settings)
    try:
        stack.compose("up", "-d")
        if FAKE_OUTSIDE in files:
            stack.await_log("allowed", "ready")
            stack.await_log("evil", "ready")
        if GATEWAY in files:
            stack.compose("exec", "-T", "gateway", "set-key", stdin=KEY)
        yield stack
    finally:
        stack.compose("down", "-v", "-t", "0")


@pytest.fixture(scope="module")
def images(docker_engine: str) -> None:
    """Built once: compose puts its project into an image, so that every project's
    build is a new one, and `up` would make the others' containers anew."""
    image = Stack(BASE).compose("config", "--images").strip()
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True,
                      check=False).returncode:
        missing(f"image {image} is not built (.ci/install)")
    try:
        Stack(BASE, EGRESS, GATEWAY).compose("build", "egress", "gateway")
    except AssertionError as error:
        missing(f"the overlays' images cannot be built (.ci/install): {error}")


@pytest.fixture(scope="module")
def stack(images: None) -> Iterator[Stack]:
    with running(EGRESS, GATEWAY, FAKE_OUTSIDE) as started:
        yield started


class Quiet(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host_port() -> Iterator[int]:
    """A port that this machine serves on all its addresses."""
    with ThreadingHTTPServer(("0.0.0.0", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def addresses(stack: Stack) -> dict[str, str]:
    """What a case may name in its URL."""
    docker0 = docker("network", "inspect", "bridge", "--format",
                     "{{(index .IPAM.Config 0).Gateway}}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))      # sends nothing, only asks for the route
        own = probe.getsockname()[0]
    return {"allowed": stack.address("allowed", "outside"),
            "evil": stack.address("evil", "outside"), "docker0": docker0, "own": own,
            "inside": stack.address("", "inside"),
            "outside": stack.address("", "outside")}


# --- every combination ---------------------------------------------------------------


@pytest.mark.parametrize("files", [
    files for size in range(len(OVERLAYS) + 1)
    for files in itertools.combinations(OVERLAYS, size)],
    ids=lambda files: "+".join(f.name.split(".")[1] for f in files) or "base")
def test_every_combination_of_overlays_is_valid(
    docker_engine: str, files: tuple[Path, ...],
) -> None:
    Stack(BASE, *files).compose("--profile", "*", "config", "-q")


@pytest.mark.parametrize("service", ["egress", "gateway"])
def test_the_helpers_are_locked_up_like_the_sandbox(
    stack: Stack, service: str,
) -> None:
    shown = json.loads(docker("inspect", stack.compose("ps", "-q", service).strip()))[0]
    host = shown["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Binds"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert 0 < host["PidsLimit"] <= 128 and host["Memory"] == host["MemorySwap"] > 0
    assert host["LogConfig"]["Config"] == {"max-file": "3", "max-size": "10m"}
    assert host["PortBindings"] == {} and shown["Config"]["User"].startswith("1080")
    status = stack.run(service, "cat", "/proc/1/status")
    assert "CapEff:\t0000000000000000" in status and "Seccomp:\t2" in status


# --- egress --------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "outcome"), [
    pytest.param(argv, outcome, id=name) for name, argv, outcome in [
        ("an allowed host", ["https://api.test/"], "allowed 200/200"),
        ("a second one", ["https://registry.test/"], "allowed 200/200"),
        ("in upper case", ["https://API.TEST/"], "allowed 200/200"),
        ("without TLS", ["http://api.test/"], "allowed 000/200"),
        ("forged Host of an allowed one", ["-H", "Host: evil.test", "http://api.test/"],
         "allowed 000/200"),
        ("forged name in TLS",
         ["--connect-to", "evil.test:443:api.test:443", "https://evil.test/"],
         "allowed 200/200"),          # domain fronting: the tunnel ends at api.test
        ("another host", ["https://evil.test/"], "403/000"),
        ("another host without TLS", ["http://evil.test/"], "000/403"),
        ("forged Host of another one", ["-H", "Host: api.test", "http://evil.test/"],
         "000/403"),
        ("the gateway's upstream", ["https://messages.test/"], "403/000"),
        ("an allowed name as the end", ["https://evilapi.test/"], "403/000"),
        ("an allowed name as the start", ["https://api.test.evil.test/"], "403/000"),
        ("a name below an allowed one", ["https://sub.api.test/"], "403/000"),
        ("a dot that is none", ["https://apiXtest/"], "403/000"),
        ("a dot at the end", ["http://api.test./"], "000/403"),
        ("an allowed name as user", ["https://api.test@evil.test/"], "403/000"),
        ("an allowed name as user without TLS", ["http://api.test:80@evil.test/"],
         "000/403"),
        ("another port", ["https://api.test:8443/"], "403/000"),
        ("another port of another host", ["https://evil.test:8443/"], "403/000"),
        ("an address", ["https://{evil}/"], "403/000"),
        ("an address without TLS", ["http://{evil}/"], "000/403"),
        ("the address of an allowed host", ["https://{allowed}/"], "403/000"),
        ("IPv6", ["http://[::ffff:{evil}]/"], "000/403"),
        ("the proxy itself", [*EVEN_LOCAL, "http://127.0.0.1:8888/"], "000/403"),
        ("the gateway by proxy", [*EVEN_LOCAL, "http://gateway:8080/"], "000/403"),
        ("directly by name", [*DIRECT, "https://api.test/"], "000/000"),
        ("directly by address", [*DIRECT, "https://{evil}/"], "000/000"),
        ("directly to an allowed address", [*DIRECT, "http://{allowed}/"], "000/000"),
        ("directly to IPv6", [*DIRECT, "http://[::ffff:{evil}]/"], "000/000"),
    ]])
def test_only_allowed_hosts_are_reached(
    stack: Stack, addresses: dict[str, str], argv: list[str], outcome: str,
) -> None:
    urls = [arg.format(**addresses) for arg in argv]
    assert stack.run("sandbox", *CURL, *urls) == outcome


def test_what_is_closed_to_the_sandbox_is_open_outside(
    stack: Stack, addresses: dict[str, str], host_port: int,
) -> None:
    """Without it the refusals above and below would prove nothing."""
    for host in ("evil.test", "sub.api.test", addresses["evil"], "evil.test:8443"):
        url = f"https://{host}/"
        assert stack.run("allowed", *CURL, url) == "evil 000/200", url
    for name in ("outside", "docker0", "own"):
        url = f"http://{addresses[name]}:{host_port}/"
        assert stack.run("allowed", *CURL, url) == "000/204", url


@pytest.mark.parametrize("host", ["inside", "outside", "docker0", "own"])
def test_services_of_the_host_are_closed_directly_and_by_proxy(
    stack: Stack, addresses: dict[str, str], host_port: int, host: str,
) -> None:
    url = f"http://{addresses[host]}:{host_port}/"
    assert stack.run("sandbox", *CURL, *DIRECT, url) == "000/000"
    assert stack.run("sandbox", *CURL, url) == "000/403"


def test_no_datagram_reaches_the_host(stack: Stack, addresses: dict[str, str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("0.0.0.0", 0))
        listener.settimeout(0.3)
        port = listener.getsockname()[1]
        send = "\n".join(f"try: s.sendto(b'x', ('{addresses[name]}', {port}))\n"
                         "except OSError: pass" for name in
                         ("inside", "outside", "docker0", "own"))
        script = f"import socket\ns = socket.socket(2, 2)\n{send}\nprint('sent')"
        assert stack.run("sandbox", "python3", "-c", script) == "sent"
        with pytest.raises(TimeoutError):
            listener.recv(1)
        assert stack.run("allowed", "python3", "-c", script) == "sent"
        assert listener.recv(1) == b"x"


@pytest.mark.slow
def test_names_are_resolved_inside_only_and_unknown_ones_fail_soon(
    stack: Stack,
) -> None:
    assert "egress" in stack.run("sandbox", "getent", "hosts", "egress")
    started = time.monotonic()
    assert stack.run("sandbox", "getent", "hosts", "secret.evil.test") == ""
    assert stack.run("sandbox", "getent", "hosts", "api.test") == ""
    assert time.monotonic() - started < 10
    assert stack.run("allowed", "getent", "hosts", "evil.test").endswith("evil.test")


def reach(stack: Stack, url: str) -> dict[str, object]:
    """What `check` is told about an API at this address."""
    shown = stack.run("sandbox", "env", f"ANTHROPIC_BASE_URL={url}", "workspace.py",
                      "reach")
    told: dict[str, object] = json.loads(shown)
    return told


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_api_that_is_blocked_is_told_from_one_that_is_down(
    stack: Stack, scheme: str,
) -> None:
    blocked = reach(stack, f"{scheme}://evil.test")
    assert "blocked by the proxy" in str(blocked["error"])
    assert "EGRESS_ALLOW" in str(blocked["hint"])
    down = reach(stack, f"{scheme}://127.0.0.1:9")
    assert "does not answer" in str(down["error"])
    assert reach(stack, "http://gateway:8080")["http_status"] in (403, 404)
    assert reach(stack, "http://api.test")["http_status"] == 200


def test_the_log_names_what_was_refused(stack: Stack) -> None:
    stack.run("sandbox", *CURL, "https://tell-me.test/")
    stack.run("sandbox", "git", "-c", "http.sslVerify=false", "ls-remote",
              "https://a-repository.test/x.git")
    stack.await_log("egress", 'Proxying refused on filtered domain "tell-me.test"')
    stack.await_log("egress", 'Proxying refused on filtered domain "a-repository.test"')


@pytest.mark.slow
def test_an_empty_list_allows_nothing(images: None) -> None:
    with running(EGRESS, FAKE_OUTSIDE, EGRESS_ALLOW="",
                 SANDBOX_PROJECT=f"{PROJECT}-empty") as closed:
        assert closed.run("sandbox", *CURL, "https://api.test/") == "403/000"
        assert closed.run("sandbox", *CURL, "http://api.test/") == "000/403"


@pytest.mark.parametrize("wrong", [
    "*.example.com", "https://pypi.org", "pypi.org:443", ".pypi.org", "-x", "a,b"])
def test_what_is_no_host_name_is_told_and_nothing_is_served(
    stack: Stack, wrong: str,
) -> None:
    image = docker("inspect", stack.compose("ps", "-q", "egress").strip(),
                   "--format", "{{.Config.Image}}")
    done = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", "--tmpfs",
         "/run/egress:mode=777", "-e", f"EGRESS_ALLOW=pypi.org {wrong}", image],
        capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert f"EGRESS_ALLOW names '{wrong}'" in done.stderr


# --- gateway -------------------------------------------------------------------------


def ask_claude(stack: Stack) -> dict[str, object]:
    shown = stack.run("sandbox", "claude", "-p", "--output-format", "json", "hello")
    answer: dict[str, object] = json.loads(shown)
    return answer


def test_the_real_cli_works_with_a_key_it_does_not_have(stack: Stack) -> None:
    answer = ask_claude(stack)
    assert (answer["is_error"], answer["result"]) == (False, "ok")
    seen = stack.compose("logs", "--no-color", "allowed")
    assert f'"x-api-key": "{KEY}"' in seen and "placeholder" not in seen
    assert " 200 " in stack.compose("logs", "gateway")


def test_the_key_is_nowhere_but_in_the_gateways_memory(stack: Stack) -> None:
    assert stack.run("gateway", "cat", "/run/gateway/key") == KEY
    assert "tmpfs" in stack.run("gateway", "stat", "-f", "-c", "%T", "/run/gateway")
    ask_claude(stack)
    services = stack.compose("ps", "--services").split()
    containers = [stack.compose("ps", "-q", name).strip() for name in services]
    images = [docker("inspect", c, "--format", "{{.Config.Image}}") for c in containers]
    shown = [stack.compose("config"), docker("inspect", *containers),
             stack.compose("logs", "gateway", "egress", "sandbox"),
             *(docker("history", "--no-trunc", image) for image in images)]
    assert not any(KEY in text for text in shown)
    # The pattern comes on stdin: as an argument, grep would find itself.
    places = "/proc/[0-9]*/environ /proc/[0-9]*/cmdline /tmp /home /run /dev/shm " \
        "/workspace /env /etc"
    look = f"grep -rlaFs -D skip -f - {places}"
    assert stack.run("sandbox", "sh", "-c", look, stdin=KEY) == ""
    assert "environ" in stack.run("sandbox", "sh", "-c", look, stdin="placeholder")


def test_a_key_of_somebody_else_is_replaced(stack: Stack) -> None:
    stack.run("sandbox", *CURL, "-H", "x-api-key: sk-attacker", "-H",
              "authorization: Bearer sk-attacker", "-d", "{}",
              "http://gateway:8080/v1/messages/count_tokens?attack")
    log = stack.await_log("allowed", "?attack")
    assert [line for line in log.splitlines() if "?attack" in line and KEY in line]
    assert "sk-attacker" not in log


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/v1/models"), ("POST", "/v1/files"), ("POST", "/v1/messages/batches"),
    ("DELETE", "/v1/messages"), ("POST", "/v1/messages/../files")])
def test_no_other_call_passes_the_gateway(
    stack: Stack, method: str, path: str,
) -> None:
    assert stack.run("sandbox", *CURL, "--path-as-is", "-X", method,
                     f"http://gateway:8080{path}") == "000/403"


def test_the_gateway_does_not_serve_the_outside(stack: Stack) -> None:
    outside = stack.address("gateway", "outside")
    assert stack.run("allowed", *CURL, f"http://{outside}:8080/") == "000/000"
    assert stack.run("sandbox", *CURL, "http://gateway:8080/") == "000/403"


def test_a_restarted_gateway_asks_for_the_key_again(stack: Stack) -> None:
    call = (*CURL, "-d", "{}", "http://gateway:8080/v1/messages/count_tokens")
    assert stack.run("sandbox", *call).endswith("000/200")
    stack.compose("restart", "gateway")
    until = time.monotonic() + 10
    while (told := stack.run("sandbox", *call)) == "000/000":
        assert time.monotonic() < until
    assert told == "000/503"
    stack.compose("exec", "-T", "gateway", "set-key", stdin=f"{KEY}\n")
    assert stack.run("sandbox", *call).endswith("000/200")


@pytest.mark.slow
def test_the_gateway_works_without_the_egress_overlay(images: None) -> None:
    with running(GATEWAY, FAKE_OUTSIDE, SANDBOX_PROJECT=f"{PROJECT}-alone") as alone:
        assert ask_claude(alone)["result"] == "ok"


@pytest.mark.slow
def test_the_orchestrator_runs_a_plan_behind_both(
    stack: Stack, repository: Path,
) -> None:
    files = os.pathsep.join(map(str, stack.files))
    program = Program(repository, **SETTINGS, ORCHESTRATOR_COMPOSE_FILES=files)
    done = program.run("sandbox", "init", timeout_s=300)
    assert done.returncode == 0, done.stderr
    done = program.run("run", ROOT / "test_plans/hello_world.md", timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert program.state("hello_world")["completed_tasks"]


# --- docker socket -------------------------------------------------------------------


def test_the_docker_socket_is_the_engines_and_the_file_says_what_that_means(
    docker_engine: str, images: None,
) -> None:
    assert "ROOT ON THE ENGINE'S MACHINE" in SOCKET.read_text().partition("\n")[0]
    with running(SOCKET, SANDBOX_PROJECT=f"{PROJECT}-socket") as stack:
        shown = stack.run("sandbox", "curl", "-sS", "--unix-socket",
                          "/var/run/docker.sock", "http://engine/version")
        assert json.loads(shown)["Version"] == docker_engine


def test_without_the_sockets_group_the_overlay_says_how_to_find_it(
    docker_engine: str,
) -> None:
    with pytest.raises(AssertionError, match=r"stat -c %g /var/run/docker\.sock"):
        Stack(BASE, SOCKET, DOCKER_GID="").compose("config")
