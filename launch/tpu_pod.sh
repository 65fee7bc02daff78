#!/usr/bin/env bash
# Installs the package on every worker of a TPU pod and runs a command on all workers.
#
#   launch/tpu_pod.sh python -m prefpaint_jax.train --config=configs/rl.py \
#     --workdir=/mnt/runs/sd15 --config.prompts=/mnt/prompts --config.mesh.fsdp=4
#
# Edit the three lines below. The workdir and the prompts must be in a folder that all workers share
# (Filestore, or a bucket mounted by gcsfuse). Run it in the repository's root, which the script
# copies to the workers. JAX finds the processes through the pod's metadata. After a preemption the
# same command resumes the run.
set -euo pipefail

name=${TPU_NAME:-prefpaint}    # name of the TPU virtual machine
zone=${TPU_ZONE:-us-east5-b}   # its zone
project=${TPU_PROJECT:-}       # default: the project of gcloud's configuration

(($#)) || { sed -n '4,5s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
where=("--zone=$zone" --worker=all ${project:+"--project=$project"})

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:prefpaint_jax.tar.gz" "${where[@]}"

# uv installs Python 3.12, because the Python of the virtual machine may be too old.
install='mkdir -p prefpaint_jax && tar -xzf prefpaint_jax.tar.gz -C prefpaint_jax &&
  python3 -m pip install --quiet --user uv &&
  { [ -d environment ] || python3 -m uv venv --quiet --python 3.12 environment; } &&
  python3 -m uv pip install --quiet --python environment -e "prefpaint_jax[tpu]"'
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command="$install"

printf -v command '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
  --command="cd prefpaint_jax && PATH=\$HOME/environment/bin:\$PATH $command"
