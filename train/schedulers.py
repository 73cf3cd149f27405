"""A recipe's launch handed to a scheduler: an sbatch script, or a PyTorchJob and a JobSet manifest for Kubernetes.

Each starts `launch.py` once a node, tells it before it takes the node away, long enough for a save, and reads its exit
status: what is for a person to mend ends the job, and what another node may mend is tried again.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from train import ROOT
from train.config import FinetuneStage, StageConfig, TrainStage
from train.launchers import DEFAULT_PORT, LaunchError
from train.recipe import Recipe
from train.run_folder import RunFolder

SCHEDULERS = ("slurm", "kubernetes")  # values of --launcher
# launch.py's exit statuses that another start, on whatever nodes, would end with again: a failed stage or a missed
# figure, something to mend, bad steps. 3 and 4, no progress after restarts, may be a node's doing, and 129 says that
# another node's launch is gone.
FINAL_STATUSES = (1, 2, 5)
# Beyond what the stages may take for their last save: the launch's own end, and Slurm's signal, a minute early or late.
LAST_WORDS_S = 90

CONTAINER = "pytorch"  # the operator looks for a container of this name
RUNS = PurePosixPath("/runs")  # where a pod has the volume of run folders


@dataclass(frozen=True)
class NodeJob:
    """What a scheduler is told: `launch`, a command line, once on each of so many nodes."""

    name: str
    launch: Sequence[str]
    nnodes: int
    gpus: int  # a node
    port: int
    grace_s: float  # what the last save may take

    @property
    def notice_s(self) -> int:
        """Seconds between the warning and the end."""
        return math.ceil(self.grace_s) + LAST_WORDS_S


def hand_over(arguments: argparse.Namespace, recipe: Recipe, stages: Sequence[StageConfig], run: RunFolder) -> int:
    """Write what the scheduler of `--launcher` wants into the run folder, submit it if asked, return an exit status."""
    training = [stage for stage in stages if isinstance(stage, TrainStage)]
    gpus = max((stage.parallel.nproc for stage in training if stage.parallel.hardware != "cpu"), default=0)
    grace_s = max((stage.supervision.grace_s for stage in training), default=0)
    port = arguments.port or DEFAULT_PORT

    def job(*launch: str) -> NodeJob:
        return NodeJob(recipe.name, [*launch, *_options(arguments)], arguments.nnodes, gpus, port, grace_s)

    if arguments.launcher == "slurm":
        command = (sys.executable, str(ROOT / "scripts" / "launch.py"), str(arguments.recipe), "--run-dir")
        return _slurm(job(*command, str(run.path)), run.path, submit=arguments.submit)
    if arguments.submit:
        raise LaunchError("--submit is for --launcher slurm: apply one of the two manifests with kubectl yourself")
    if arguments.image is None:
        raise LaunchError("--launcher kubernetes needs --image: one that has this repository as its working directory")
    folder = arguments.recipe.resolve()
    if not folder.is_relative_to(ROOT):
        raise LaunchError(f"the recipe {folder} is not in {ROOT}, so no image of it has it: move it to {ROOT}/configs")
    command = ("python", "scripts/launch.py", str(folder.relative_to(ROOT)), "--run-dir", str(RUNS / run.path.name))
    pod = Pod(arguments.image, arguments.claim, secret=any(isinstance(stage, FinetuneStage) for stage in stages))
    return _kubernetes(job(*command), pod, run.path)


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options of this launch that a node's own launch is given too."""
    options: list[str] = []
    for option, value in (("--only", arguments.only), ("--from", arguments.first), ("--until", arguments.last)):
        options += [option, value] if value else []
    for override in arguments.overrides:
        options += ["--set", override]
    if arguments.nproc is not None:
        options += ["--nproc", str(arguments.nproc)]
    return [*options, "--nnodes", str(arguments.nnodes)]


def _slurm(job: NodeJob, run_dir: Path, *, submit: bool) -> int:
    script = run_dir / "sfumato.sbatch"
    script.write_text(sbatch_script(job, run_dir), encoding="utf-8")
    print(f"wrote {script}")
    if not submit:
        print(f"submit it with: sbatch {script}")
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError(f"--submit needs sbatch, which is not on PATH here: run `sbatch {script}` on a login node")
    return subprocess.run(["sbatch", str(script)], check=False).returncode


def sbatch_script(job: NodeJob, run_dir: Path) -> str:
    """An sbatch script that runs the launch once a node, and queues the job again where that may help.

    Slurm sends SIGTERM `notice_s` before the time limit: the stage saves, and the job is queued again. So it is, once
    in a row, where a launch ended by what another node may mend. A job that was cancelled, or that Slurm itself queues
    again (a dead node, preemption), is left alone. The first launch to end leaves the others the same notice: srun
    would otherwise kill them at once (--kill-on-bad-exit), in the middle of the save they were told to make.
    """
    gpu_line = f"#SBATCH --gpus-per-node={job.gpus}\n" if job.gpus else ""
    folder = run_dir.resolve()
    return f"""#!/bin/bash
#SBATCH --job-name=sfumato-{job.name}
#SBATCH --nodes={job.nnodes}
#SBATCH --ntasks-per-node=1
{gpu_line}#SBATCH --output={folder}/slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@{job.notice_s}
#SBATCH --requeue
# Account, partition and time limit: set SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT before sbatch.

cd {shlex.quote(str(Path.cwd()))} || exit 1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT={job.port}
second_chance={shlex.quote(str(folder / "slurm-second-chance"))}

told=0
trap 'told=1; kill -TERM "$step"' TERM
srun --cpu-bind=none --kill-on-bad-exit=0 --wait={job.notice_s} {shlex.join(job.launch)} &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do  # the trap ended the wait, not the step
  wait "$step"
  status=$?
done

again=0
case "$told:$status" in
  *:0) rm -f "$second_chance" ;;
  {" | ".join(f"*:{status}" for status in FINAL_STATUSES)}) ;;  # for a person
  1:143) again=1; rm -f "$second_chance" ;;  # saved, as it was told
  *) if [ ! -e "$second_chance" ]; then again=1; touch "$second_chance"; fi ;;
esac
# A job that was cancelled, or that Slurm queues again itself, is not running any more.
if [ "$again" = 1 ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


@dataclass(frozen=True)
class Pod:
    """What a node's pod is made of."""

    image: str  # with this repository as its working directory
    claim: str  # a PersistentVolumeClaim that all pods may write: run folders
    secret: bool  # whether the launch may need one: key `secret` of the Secret named like the job, if there is one


def _kubernetes(job: NodeJob, pod: Pod, run_dir: Path) -> int:
    for kind, manifest in (("pytorchjob", pytorch_job(job, pod)), ("jobset", job_set(job, pod))):
        path = run_dir / f"sfumato.{kind}.yaml"
        path.write_text(yaml.safe_dump(manifest, sort_keys=False, width=10_000), encoding="utf-8")
        print(f"wrote {path}")
    print(
        f"apply one of them, not both; the claim {pod.claim} must be one that several nodes may write (ReadWriteMany)"
    )
    return 0


def pytorch_job(job: NodeJob, pod: Pod) -> dict[str, Any]:
    """A PyTorchJob of Kubeflow's training operator (kubeflow.org/v1): the master is node 0, the workers the others.

    Restart policy ExitCode: a pod that ended with 128 or more (told to stop, killed, evicted) is made anew alone, so
    the others keep their snapshots in memory; any lower status ends the job, 3 and 4 among them.
    """
    adapt = 'export NODE_RANK="$RANK"; exec "$@"'  # the operator's rank is a pod's, and there is one pod a node
    command = ["bash", "-c", adapt, "launch", *job.launch]
    port = {"name": "pytorchjob-port", "containerPort": job.port}  # the operator's MASTER_PORT is the port of this name

    def replicas(count: int) -> dict[str, Any]:
        template = _pod_template(job, pod, command, port, [])
        return {"replicas": count, "restartPolicy": "ExitCode", "template": template}

    specs = {"Master": replicas(1)}
    if job.nnodes > 1:
        specs["Worker"] = replicas(job.nnodes - 1)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": resource_name(job.name)},
        "spec": {"runPolicy": {"cleanPodPolicy": "Running"}, "pytorchReplicaSpecs": specs},
    }


def job_set(job: NodeJob, pod: Pod) -> dict[str, Any]:
    """A JobSet (jobset.x-k8s.io/v1alpha2) of one indexed Job, whose pod i is node i.

    A disrupted pod is made anew alone and as often as it takes, so the others keep their snapshots in memory; a final
    exit status ends the set; whatever else ends a pod is tried twice a node, and then three times with all pods anew.
    """
    name = resource_name(job.name)
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    environment = [
        {"name": "NODE_RANK", "valueFrom": index},
        {"name": "MASTER_ADDR", "value": f"{name}-nodes-0-0.{name}"},
        {"name": "MASTER_PORT", "value": str(job.port)},
    ]
    template = _pod_template(job, pod, list(job.launch), {"containerPort": job.port}, environment)
    template["spec"] = {"restartPolicy": "Never", **template["spec"]}  # what a pod failure policy asks for
    exit_codes = {"containerName": CONTAINER, "operator": "In", "values": list(FINAL_STATUSES)}
    job_spec = {
        "completionMode": "Indexed",
        "completions": job.nnodes,
        "parallelism": job.nnodes,
        "backoffLimit": 2 * job.nnodes,
        "podReplacementPolicy": "Failed",  # never two launches of one node
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": exit_codes},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": template,
    }
    person = {"name": "forAPerson", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 3, "rules": [person]},
            "replicatedJobs": [{"name": "nodes", "replicas": 1, "template": {"spec": job_spec}}],
        },
    }


def _pod_template(
    job: NodeJob, pod: Pod, command: list[str], port: dict[str, Any], environment: list[dict[str, Any]]
) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "sfumato", "app.kubernetes.io/instance": resource_name(job.name)}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": pod.image,
        "command": command,
        "env": list(environment),
        "ports": [port],
        "volumeMounts": [{"name": "runs", "mountPath": str(RUNS)}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if pod.secret:
        key = {"name": resource_name(job.name), "key": "secret", "optional": True}  # without: the run makes its own
        container["env"].append({"name": "SFUMATO_SECRET", "valueFrom": {"secretKeyRef": key}})
    if job.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus}}
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": job.notice_s,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": pod.claim}},
            # Snapshots in memory, and the ranks' shared memory: a pod has 64 MiB of it otherwise. Its limit counts it.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if job.nnodes > 1:  # a peer's copy is of use on another machine
        apart = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": "kubernetes.io/hostname"}
        spec["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    return {"metadata": {"labels": labels}, "spec": spec}


def resource_name(recipe: str) -> str:
    """A DNS-1035 label for a recipe, short enough for what controllers append to it."""
    return f"sfumato-{re.sub('[^a-z0-9]+', '-', recipe.lower())}"[:40].rstrip("-")
