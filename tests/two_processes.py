"""Runs a script in two connected processes on this machine."""

import os
import socket
import subprocess
import sys
import textwrap

LIMIT = 120  # seconds for a script


def free_port() -> int:
  """Returns a port of localhost that no process listens on."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def run_two_processes(script: str, folder, devices: int) -> list[str]:
  """Runs `script` with the arguments FOLDER PORT INDEX in processes 0 and 1; returns their output.

  Each process has this number of CPU devices and must exit with status 0.
  """
  flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(free_port())]
  processes = [
    subprocess.Popen(
      [*command, str(index)],
      env=os.environ | flags,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-2000:]
  return outputs
