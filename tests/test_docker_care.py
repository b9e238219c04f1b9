"""The Docker sandbox under a run: one user at a time, keys unseen, back when it dies,
finished work safe whatever the agent does to its repository."""
from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from boxes import KEY, AgentBox, agent_box, wait_until
from conftest import TEST_PLANS
from receiver import OtlpReceiver

pytestmark = [pytest.mark.docker]
HELLO = TEST_PLANS / "hello_world.md"


@pytest.fixture(scope="module")
def box(docker_engine: str, tmp_path_factory: pytest.TempPathFactory,
        ) -> Iterator[AgentBox]:
    with agent_box(tmp_path_factory.mktemp("care"), "ktrdr-care") as made:
        yield made


@pytest.fixture(autouse=True)
def no_run_is_left(box: AgentBox) -> Iterator[None]:
    yield
    box.end_runs()


def plan_of(box: AgentBox, folder: Path, name: str, *attempts: object, gate: str = "",
            tasks: int = 1) -> Path:
    """A plan whose tasks 1.1, 1.2, ... play these attempts."""
    plan = folder / f"{name}.md"
    verify = f"\n**Verify:** `{gate}`\n" if gate else ""
    plan.write_text(f"# {name}\n" + "".join(
        f"\n## Task 1.{n}: Do it\n\nDo it.\n{verify}" for n in range(1, tasks + 1)))
    for n in range(1, tasks + 1):
        box.api.scenarios[f"{name}/1.{n}"] = {"attempts": list(attempts)}
    return plan


# One user at a time.

@pytest.mark.slow
def test_a_sandbox_in_use_is_refused_to_runs_resets_and_everything_else(
    box: AgentBox, tmp_path: Path,
) -> None:
    started = box.hanging_run(tmp_path)
    other = ("--state-dir", tmp_path / "elsewhere")      # as another person would
    for args in (("run", HELLO, *other), ("sandbox", "reset"), ("sandbox", "init"),
                 ("sandbox", "down"), ("sandbox", "up")):
        done = box.program.run(*args)
        assert done.returncode == 4, (args, done.stderr)
        assert f"in use by PID {started.pid} on " in done.stderr
    assert started.poll() is None and box.running()
    forced = box.program.run("sandbox", "reset", "--force")
    assert forced.returncode == 0, forced.stderr
    started.terminate()
    started.communicate(timeout=60)
    assert box.running() == []
    assert box.program.run("sandbox", "reset").returncode == 0


@pytest.mark.slow
def test_the_lock_of_a_killed_run_is_free_at_once(
    box: AgentBox, tmp_path: Path,
) -> None:
    started = box.hanging_run(tmp_path)
    started.kill()
    started.communicate(timeout=30)
    wait_until(lambda: box.program.run("sandbox", "reset").returncode == 0,
               timeout_s=10)


# What is left when it ends.

@pytest.mark.slow
def test_ctrl_c_ends_every_agent_process_and_leaves_a_state_to_resume(
    box: AgentBox, tmp_path: Path,
) -> None:
    started = box.hanging_run(tmp_path)
    begun = time.monotonic()
    started.send_signal(2)
    _, told = started.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert (started.returncode, box.running()) == (130, []), told
    box.api.scenarios["hang/1.1"] = {"attempts": [[{"say": "STATUS: completed"}]]}
    done = box.program.run("resume", tmp_path / "hang.md", timeout_s=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_next_start_after_kill_9_finds_no_process_of_the_old_attempt(
    box: AgentBox, tmp_path: Path,
) -> None:
    started = box.hanging_run(tmp_path)
    # with its client gone as well, nothing but the next start looks after the agent
    box.inside("nohup setsid sleep 601 >/dev/null 2>&1 &")
    started.kill()
    started.communicate(timeout=30)
    seen = "test -z \"$(pgrep -f 'sleep [6]01')\""
    plan = plan_of(box, tmp_path, "after",
                   [{"bash": seen}, {"say": "STATUS: completed"}], gate=seen)
    done = box.program.run("run", plan, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert box.running() == []


# A container that goes away.

@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "rm -f", "restart -t 0", "stop -t 0"])
def test_a_container_that_dies_is_brought_back_and_no_attempt_is_charged(
    box: AgentBox, tmp_path: Path, how: str,
) -> None:
    started = box.hanging_run(tmp_path)
    box.api.scenarios["hang/1.1"] = {"attempts": [[{"say": "STATUS: completed"}]]}
    subprocess.run(["docker", *how.split(), box.container], check=True,
                   capture_output=True)
    _, told = started.communicate(timeout=120)
    assert started.returncode == 0, told
    assert "went away and was brought back" in told, told
    record = box.program.state("hang")["task_results"]["1.1"]
    assert (record["status"], record["started"]) == ("completed", 1)


@pytest.mark.slow
def test_a_paused_container_is_found_out_when_the_agent_is_silent_too_long(
    box: AgentBox, tmp_path: Path,
) -> None:
    box.program.environ["ORCHESTRATOR_IDLE_TIMEOUT"] = "5"
    started = box.hanging_run(tmp_path)
    del box.program.environ["ORCHESTRATOR_IDLE_TIMEOUT"]
    box.api.scenarios["hang/1.1"] = {"attempts": [[{"say": "STATUS: completed"}]]}
    subprocess.run(["docker", "pause", box.container], check=True,
                   capture_output=True)
    _, told = started.communicate(timeout=120)
    assert started.returncode == 0, told
    assert box.program.state("hang")["task_results"]["1.1"]["started"] == 1


# Finished work, whatever the agent does to its repository.

@pytest.mark.parametrize("damage", [
    *(pytest.param(damage, marks=pytest.mark.slow) for damage in (
        "rm -rf .git", "rm -rf .git && git init -q && git add -A && "
        "git -c user.name=x -c user.email=x@localhost commit -qm mine",
        "find .git/objects -type f -delete; : > .git/HEAD",
        "mv .git /tmp/g; ln -s /tmp .git"))],
    ids=["gone", "made anew", "damaged", "a link"])
def test_a_task_that_destroys_the_repository_loses_nothing(
    box: AgentBox, tmp_path: Path, damage: str,
) -> None:
    plan = plan_of(box, tmp_path, "wreck", tasks=3)
    for n, harm in enumerate(("true", damage, "true"), start=1):
        box.api.scenarios[f"wreck/1.{n}"] = {"attempts": [[
            {"bash": f"echo {n} >file{n}; {harm}"}, {"say": "STATUS: completed"}]]}
    done = box.program.run("run", plan, "--fresh", timeout_s=180)
    assert done.returncode == 0, done.stderr
    assert box.inside("git log --format=%s -4 | xargs") == \
        "Task 1.3: Do it Task 1.2: Do it Task 1.1: Do it One"
    assert box.inside("git ls-files | xargs") == "README.md file1 file2 file3"


@pytest.mark.slow
def test_a_failed_task_that_destroyed_the_repository_is_rolled_back_all_the_same(
    box: AgentBox, tmp_path: Path,
) -> None:
    wreck = [{"bash": "echo x >bad; rm -rf .git"},
             {"say": "STATUS: failed\nERROR: no"}]
    good = [{"bash": "test ! -e bad && echo y >good"}, {"say": "STATUS: completed"}]
    plan = plan_of(box, tmp_path, "again", wreck, good)
    done = box.program.run("run", plan, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert box.inside("git ls-files | xargs") == "README.md good"


@pytest.mark.slow
def test_finished_work_outlives_a_reset_and_is_fetched_into_a_branch_of_its_own(
    box: AgentBox, tmp_path: Path,
) -> None:
    step = [{"bash": "echo 1 >one"}, {"say": "STATUS: completed"}]
    plan = plan_of(box, tmp_path, "kept", step)
    assert box.program.run("run", plan, timeout_s=120).returncode == 0
    done = box.program.run("sandbox", "reset", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["clean"] is True
    assert box.inside("ls") == "README.md"
    host = tmp_path / "host"
    subprocess.run(["git", "clone", "-q", box.program.cwd, host], check=True)
    assert box.program.run("fetch", plan, "--into", host).returncode == 0

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=host, capture_output=True, text=True,
                              check=True).stdout.strip()

    assert git("show", "orchestrator/kept:one") == "1"
    assert git("status", "--porcelain") == "" and not (host / "one").exists()
    git("-c", "user.name=P", "-c", "user.email=p@localhost", "commit", "-q",
        "--allow-empty", "-m", "A person's")
    git("branch", "-f", "orchestrator/kept", "HEAD")
    refused = box.program.run("fetch", plan, "--into", host)
    assert refused.returncode == 2 and "--force" in refused.stderr
    assert git("log", "-1", "--format=%s", "orchestrator/kept") == "A person's"
    assert box.program.run("fetch", plan, "--into", host, "--force").returncode == 0
    assert git("show", "orchestrator/kept:one") == "1"


# Keys.

@pytest.fixture
def receiver(box: AgentBox) -> Iterator[OtlpReceiver]:
    """Gets the spans of what the box runs meanwhile."""
    with OtlpReceiver() as server:
        box.program.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = server.url
        yield server
        del box.program.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]


def everything_of(box: AgentBox) -> str:
    """All that can be seen of the sandbox from outside."""
    image = os.environ.get("SANDBOX_IMAGE", "ktrdr-sandbox")
    commands = (["inspect", box.container], ["inspect", image],
                ["history", "--no-trunc", image], ["logs", box.container])
    return box.compose("config") + "".join(
        subprocess.run(["docker", *argv], capture_output=True, text=True,
                       check=True).stdout for argv in commands)


def host_files(box: AgentBox) -> bytes:
    state = box.program.cwd / "state"
    files = [path for path in state.rglob("*") if path.is_file()]
    assert any(path.suffix == ".ndjson" for path in files)
    return b"".join(str(path).encode() + path.read_bytes() for path in files)


@pytest.mark.slow
def test_no_byte_of_the_key_is_to_be_seen_during_a_run_and_after_it(
    box: AgentBox, tmp_path: Path, receiver: OtlpReceiver,
) -> None:
    started = box.hanging_run(tmp_path)
    ps = ["ps", "-eww", "-o", "args="]
    seen = subprocess.run(ps, capture_output=True, text=True, check=True).stdout
    seen += box.inside(" ".join(ps)) + everything_of(box)
    assert "time.sleep(600)" in seen and KEY not in seen
    # the agent's own processes, and what the agent can read of others
    environments = box.inside("cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'")
    assert "CLAUDE_CODE" in environments and KEY not in environments
    started.terminate()
    _, told = started.communicate(timeout=60)
    assert receiver.spans and KEY not in str(receiver.spans)
    assert KEY.encode() not in host_files(box) and KEY not in told
    left = box.inside(f"grep -rlsF {KEY[:20]} /home /tmp /workspace /env /run || true")
    assert left == ""


@pytest.mark.slow
def test_a_key_that_the_agent_tells_is_redacted_wherever_we_write(
    box: AgentBox, tmp_path: Path, receiver: OtlpReceiver,
) -> None:
    asks = [{"bash": f"echo {KEY} >&2; echo {KEY} | tee s"},
            {"say": f"STATUS: needs_human\nQUESTION: is {KEY} yours?"}]
    fails = [{"say": f"STATUS: failed\nERROR: {KEY} is no good"}]
    done = box.program.run("run", plan_of(box, tmp_path, "tells", asks, fails),
                           timeout_s=120)
    assert done.returncode == 3, done.stderr
    shown = box.program.run("status", tmp_path / "tells.md").stdout
    assert "is [redacted] yours?" in shown
    gate = plan_of(box, tmp_path, "gate", [{"say": "STATUS: completed"}],
                   gate=f"echo {KEY[:9]}''{KEY[9:]} && false")
    failed = box.program.run("run", gate, timeout_s=120)
    assert failed.returncode == 1 and "[redacted]" in str(box.program.state("gate"))
    told = done.stdout + done.stderr + shown + failed.stdout + failed.stderr
    assert KEY not in told and KEY not in str(receiver.spans)
    assert KEY.encode() not in host_files(box)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["descriptor", "environment"])
def test_the_key_reaches_the_agent_either_way(
    box: AgentBox, tmp_path: Path, how: str,
) -> None:
    plan = plan_of(box, tmp_path, how, [
        {"bash": "env | grep -c ^ANTHROPIC_API_KEY= | tee count"},
        {"say": "STATUS: completed"}])
    done = box.program.run("run", plan, "--key-by", how, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert box.inside("cat count") == {"descriptor": "0", "environment": "1"}[how]
