"""What schedulers are given is run where that can be, and held against the fields they document where it cannot."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from train import ROOT
from train.launch import GAVE_UP
from train.schedulers import FINAL_STATUSES, NodeJob, Pod, job_set, pytorch_job, resource_name, sbatch_script

JOB = NodeJob("digits", ["launch.py", "a b"], nnodes=4, gpus=8, port=29500, grace_s=30)
POD = Pod("registry.example/sfumato:1", "sfumato-runs", secret=True)


# --- Slurm ---------------------------------------------------------------------------------------------------------


def test_the_sbatch_script_is_sound_shell_and_asks_to_be_told_before_its_end(tmp_path: Path) -> None:
    script = sbatch_script(JOB, tmp_path / "a run")
    for line in ("--nodes=4", "--gpus-per-node=8", "--signal=B:TERM@120", "--requeue", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in script
    assert "launch.py 'a b' &" in script
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-"], input=script.encode(), check=True)


def test_without_gpus_the_sbatch_script_asks_for_none(tmp_path: Path) -> None:
    assert "#SBATCH --gpus" not in sbatch_script(replace(JOB, gpus=0), tmp_path)


def test_the_warning_comes_as_early_as_the_last_save_needs(tmp_path: Path) -> None:
    assert "--signal=B:TERM@690\n" in sbatch_script(replace(JOB, grace_s=600), tmp_path)


# Slurm's commands, as the script meets them. $STATUS: how the launches end; $STATE: what Slurm makes of the job.
SLURM = {
    "scontrol": """echo "scontrol $*" >> "$CALLS"
case "$1 $2" in
  "show hostnames") echo node7; echo node8 ;;
  "show job") echo "   JobState=$STATE Reason=None" ;;
esac""",
    "srun": """echo "srun $MASTER_ADDR:$MASTER_PORT $*" >> "$CALLS"
trap 'sleep 0.2; exit "$STATUS"' TERM
touch "$CALLS.up"
[ "$TOLD" = 1 ] || exit "$STATUS"
for _ in $(seq 400); do sleep 0.05; done""",
}


class Slurm:
    """A folder with those commands, and runs of the script among them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.script = folder, folder / "calls", folder / "sfumato.sbatch"
        for name, body in SLURM.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        self.script.write_text(sbatch_script(replace(JOB, nnodes=2, launch=["launch"]), folder))

    def run(self, status: int, *, told: bool = False, state: str = "RUNNING") -> bool:
        """Run the script once; whether it queued the job again."""
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "STATUS": str(status),
            "STATE": state,
            "TOLD": str(int(told)),
        }
        for left in self.folder.glob("calls*"):
            left.unlink()
        with subprocess.Popen(["bash", str(self.script)], env=environment) as job:
            if told:
                while not (self.folder / "calls.up").exists():
                    assert job.poll() is None
                    time.sleep(0.02)
                job.terminate()
        assert job.returncode == status
        return "scontrol requeue 42" in self.calls.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_the_script_passes_the_warning_on_waits_for_the_save_and_queues_again(slurm: Slurm) -> None:
    assert slurm.run(143, told=True)
    assert slurm.calls.read_text().splitlines() == [
        "scontrol show hostnames node[7-8]",
        "srun node7:29500 --cpu-bind=none --kill-on-bad-exit=0 --wait=120 launch",
        "scontrol show job 42",
        "scontrol requeue 42",
    ]


@pytest.mark.parametrize("status", [0, *FINAL_STATUSES])
def test_what_is_done_or_for_a_person_is_not_queued_again(slurm: Slurm, status: int) -> None:
    assert not slurm.run(status)
    assert not slurm.run(status, told=True)  # it ended so just when it was told


@pytest.mark.parametrize("status", [3, 4, 129, 137, 143])
def test_what_another_node_may_mend_gets_one_second_chance_in_a_row(slurm: Slurm, status: int) -> None:
    assert slurm.run(status)
    assert not slurm.run(status)
    assert slurm.run(143, told=True)  # it got on until its time was up
    assert slurm.run(status)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_a_job_that_slurm_itself_ends_is_left_alone(slurm: Slurm, state: str) -> None:
    assert not slurm.run(143, told=True, state=state)


def test_the_launch_tells_a_person_and_a_node_apart() -> None:
    assert GAVE_UP == {"": 1, "crash": 3, "hang": 4, "bad steps": 5}
    assert (GAVE_UP[""], 2, GAVE_UP["bad steps"]) == FINAL_STATUSES


# --- Kubernetes ----------------------------------------------------------------------------------------------------


class Required:
    """A field that must be there."""

    def __init__(self, form: Any) -> None:
        self.form = form


# The fields we use, as the API documents them: a dict is an object with these fields and no other, a list an array, a
# set the values allowed, a str a pattern.
LABEL, DNS_1035, LABELS = (
    r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?",
    r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
    dict[str, str],
)
POD_TEMPLATE = {
    "metadata": {"labels": LABELS},
    "spec": {
        "restartPolicy": {"Always", "OnFailure", "Never"},
        "terminationGracePeriodSeconds": int,
        "affinity": {
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {"labelSelector": {"matchLabels": LABELS}, "topologyKey": Required(str)}
                ]
            }
        },
        "containers": Required(
            [
                {
                    "name": Required(DNS_1035),
                    "image": Required(str),
                    "command": [str],
                    "env": [
                        {
                            "name": Required(str),
                            "value": str,
                            "valueFrom": {
                                "fieldRef": {"fieldPath": Required(str)},
                                "secretKeyRef": {"name": str, "key": Required(str), "optional": bool},
                            },
                        }
                    ],
                    "ports": [{"name": r"[a-z0-9-]{1,15}", "containerPort": Required(int)}],
                    "resources": {"limits": {"nvidia.com/gpu": int}},
                    "volumeMounts": [{"name": Required(str), "mountPath": Required(r"/[^:]*")}],
                }
            ]
        ),
        "volumes": [
            {
                "name": Required(DNS_1035),
                "persistentVolumeClaim": {"claimName": Required(str)},
                "emptyDir": {"medium": {"", "Memory"}},
            }
        ],
    },
}
# github.com/kubeflow/training-operator, manifests/base/crds/kubeflow.org_pytorchjobs.yaml
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": Required(POD_TEMPLATE),
}
PYTORCH_JOB = {
    "apiVersion": Required({"kubeflow.org/v1"}),
    "kind": Required({"PyTorchJob"}),
    "metadata": Required({"name": Required(DNS_1035)}),
    "spec": Required(
        {
            "runPolicy": {"cleanPodPolicy": {"All", "Running", "None"}},
            "pytorchReplicaSpecs": Required({"Master": REPLICAS, "Worker": REPLICAS}),
        }
    ),
}
# github.com/kubernetes-sigs/jobset, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml
JOB_SET = {
    "apiVersion": Required({"jobset.x-k8s.io/v1alpha2"}),
    "kind": Required({"JobSet"}),
    "metadata": Required({"name": Required(DNS_1035)}),
    "spec": Required(
        {
            "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
            "failurePolicy": {
                "maxRestarts": int,
                "rules": [
                    {
                        "name": Required(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                        "action": Required({"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}),
                        "onJobFailureReasons": [
                            {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
                            | {"PodFailurePolicy"}
                        ],
                    }
                ],
            },
            "replicatedJobs": Required(
                [
                    {
                        "name": Required(DNS_1035),
                        "replicas": int,
                        "template": Required(
                            {
                                "spec": {
                                    "completionMode": {"NonIndexed", "Indexed"},
                                    "completions": int,
                                    "parallelism": int,
                                    "backoffLimit": int,
                                    "podReplacementPolicy": {"TerminatingOrFailed", "Failed"},
                                    "podFailurePolicy": {
                                        "rules": Required(
                                            [
                                                {
                                                    "action": Required({"FailJob", "FailIndex", "Ignore", "Count"}),
                                                    "onExitCodes": {
                                                        "containerName": str,
                                                        "operator": Required({"In", "NotIn"}),
                                                        "values": Required([int]),
                                                    },
                                                    "onPodConditions": [
                                                        {"type": Required(str), "status": {"True", "False", "Unknown"}}
                                                    ],
                                                }
                                            ]
                                        )
                                    },
                                    "template": Required(POD_TEMPLATE),
                                }
                            }
                        ),
                    }
                ]
            ),
        }
    ),
}


def faults(value: Any, form: Any, path: str = "") -> list[str]:
    """Where `value` is not of that form."""
    if isinstance(form, Required):
        form = form.form
    found: list[str] = []
    if isinstance(form, dict) and isinstance(value, Mapping):
        needed = [name for name, part in form.items() if isinstance(part, Required)]
        found += [f"{path}.{name} is missing" for name in needed if name not in value]
        found += [f"{path}.{name} is unknown" for name in value if name not in form]
        for name in value.keys() & form.keys():
            found += faults(value[name], form[name], f"{path}.{name}")
    elif isinstance(form, list) and isinstance(value, list):
        for number, part in enumerate(value):
            found += faults(part, form[0], f"{path}[{number}]")
    else:
        if isinstance(form, set):
            good = value in form
        elif isinstance(form, str):
            good = isinstance(value, str) and re.fullmatch(form, value) is not None
        elif form == LABELS:
            good = isinstance(value, Mapping) and all(re.fullmatch(LABEL, part) for part in value.values())
        else:
            good = type(value) is form
        found += [] if good else [f"{path} is {value!r}"]
    return found


def test_the_form_finds_what_an_api_server_would_refuse() -> None:
    good = pytorch_job(JOB, POD)
    assert faults({**good, "kind": "PytorchJob"}, PYTORCH_JOB) == [".kind is 'PytorchJob'"]
    assert faults({**good, "status": {}}, PYTORCH_JOB) == [".status is unknown"]
    assert faults({**good, "spec": {"runPolicy": {"cleanPodPolicy": "Some"}}}, PYTORCH_JOB) == [
        ".spec.pytorchReplicaSpecs is missing",
        ".spec.runPolicy.cleanPodPolicy is 'Some'",
    ]
    good["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = "3"
    assert faults(good, PYTORCH_JOB) == [".spec.pytorchReplicaSpecs.Worker.replicas is '3'"]


JOBS = [JOB, replace(JOB, nnodes=1, gpus=0), replace(JOB, name="imagenet_dit_xl2", grace_s=12.5)]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("pod", [POD, replace(POD, secret=False)])
def test_both_manifests_have_only_fields_that_the_apis_know(job: NodeJob, pod: Pod) -> None:
    for manifest, form in ((pytorch_job(job, pod), PYTORCH_JOB), (job_set(job, pod), JOB_SET)):
        assert faults(manifest, form) == []
        assert yaml.safe_load(yaml.safe_dump(manifest)) == json.loads(json.dumps(manifest))


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a manifest."""
    spec = manifest["spec"]
    if "pytorchReplicaSpecs" in spec:
        return [replicas["template"] for replicas in spec["pytorchReplicaSpecs"].values()]
    return [replicated["template"]["spec"]["template"] for replicated in spec["replicatedJobs"]]


@pytest.mark.parametrize("manifest", [pytorch_job(JOB, POD), job_set(JOB, POD)], ids=["pytorch_job", "job_set"])
def test_a_pod_has_the_run_folder_memory_for_snapshots_time_to_save_and_a_machine_of_its_own(
    manifest: dict[str, Any],
) -> None:
    for template in pods(manifest):
        spec = template["spec"]
        (container,) = spec["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert mounted == {"runs": "/runs", "shm": "/dev/shm"} and set(volumes) == set(mounted)
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory"}
        assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "sfumato-runs"}
        assert spec["terminationGracePeriodSeconds"] == 120
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        (term,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["labelSelector"]["matchLabels"] == template["metadata"]["labels"]
        assert {"name": "SFUMATO_SECRET"}.items() <= container["env"][-1].items()


def test_a_pytorch_job_has_one_master_and_restarts_by_exit_status() -> None:
    specs = pytorch_job(JOB, POD)["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in specs.items()} == {"Master": 1, "Worker": 3}
    assert {spec["restartPolicy"] for spec in specs.values()} == {"ExitCode"}
    # The operator's rule: 1 to 127 are permanent, 128 and more are tried again.
    assert all(status < 128 for status in FINAL_STATUSES)
    # It takes the port it announces from the container `pytorch`, and refuses a job without one.
    (container,) = specs["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert container["ports"] == [{"name": "pytorchjob-port", "containerPort": 29500}]
    assert set(pytorch_job(replace(JOB, nnodes=1), POD)["spec"]["pytorchReplicaSpecs"]) == {"Master"}


def test_a_pytorch_jobs_rank_is_the_number_of_a_node() -> None:
    show = [sys.executable, "-c", "import os, sys; print(os.environ['NODE_RANK'], sys.argv[1:])", "a b"]
    job = pytorch_job(replace(JOB, launch=show), POD)
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    environment = {"RANK": "2", "PATH": os.environ["PATH"]}
    done = subprocess.run(container["command"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "2 ['a b']\n"


def test_a_job_set_counts_its_nodes_by_index_and_meets_at_the_first() -> None:
    spec = job_set(JOB, POD)["spec"]
    (nodes,) = spec["replicatedJobs"]
    job = nodes["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    environment = {entry["name"]: entry for entry in job["template"]["spec"]["containers"][0]["env"]}
    # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain, by default the jobset's name>
    assert environment["MASTER_ADDR"]["value"] == "sfumato-digits-nodes-0-0.sfumato-digits"
    assert "job-completion-index" in environment["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_a_job_set_ends_for_a_person_and_replaces_a_disrupted_pod_alone() -> None:
    spec = job_set(JOB, POD)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    final, disrupted = job["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob" and final["onExitCodes"]["values"] == sorted(set(FINAL_STATUSES))
    assert disrupted["action"] == "Ignore" and disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # the API refuses a pod failure policy without
    assert job["podReplacementPolicy"] == "Failed"  # likewise
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("recipe", ["digits", "imagenet_dit_xl2", "My.Recipe_", "r" * 80])
def test_a_recipes_name_becomes_one_that_kubernetes_takes(recipe: str) -> None:
    name = resource_name(recipe)
    assert re.fullmatch(DNS_1035, name)
    assert len(f"{name}-nodes-0-100000") <= 63


# --- launch.py -----------------------------------------------------------------------------------------------------


@pytest.fixture
def script() -> Any:
    """scripts/launch.py as a module."""
    spec = importlib.util.spec_from_file_location("launch_script", ROOT / "scripts" / "launch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_launch_of_each_pod_is_the_one_asked_for(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--nnodes", "2", "--until", "pretrain", "--set", "pretrain.supervision.grace_s=45", "--nproc", "2"]
    asked += ["--launcher", "kubernetes", "--image", POD.image, "--port", "1234"]
    assert script.main([str(ROOT / "configs" / "digits"), "--run-dir", str(tmp_path / "x"), *asked]) == 0
    assert "apply one of them, not both" in capsys.readouterr().out
    manifests = {kind: tmp_path / "x" / f"sfumato.{kind}.yaml" for kind in ("pytorchjob", "jobset")}
    for kind, form in (("pytorchjob", PYTORCH_JOB), ("jobset", JOB_SET)):
        manifest = yaml.safe_load(manifests[kind].read_text())
        assert faults(manifest, form) == []
        for template in pods(manifest):
            (container,) = template["spec"]["containers"]
            command = container["command"]
            launch = script._parser().parse_args(command[command.index("scripts/launch.py") + 1 :])
            assert (ROOT / launch.recipe / "30_pretrain.yaml").exists()
            assert (str(launch.run_dir), launch.launcher, launch.nnodes, launch.last) == (
                "/runs/x",
                "torchrun",
                2,
                "pretrain",
            )
            assert launch.overrides == ["pretrain.supervision.grace_s=45"] and launch.nproc == 2
            assert container["ports"][0]["containerPort"] == 1234
            assert template["spec"]["terminationGracePeriodSeconds"] == 45 + 90
            assert "SFUMATO_SECRET" not in [
                entry["name"] for entry in container["env"]
            ]  # no private stage is asked for


def test_what_no_pod_could_run_is_refused_with_the_mend(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits, here = ROOT / "configs" / "digits", tmp_path / "digits"
    shutil.copytree(digits, here)
    for recipe, options, message in (
        (digits, [], "--launcher kubernetes needs --image"),
        (digits, ["--image", "x", "--submit"], "--submit is for --launcher slurm"),
        (here, ["--image", "x"], "so no image of it has it: move it to"),
    ):
        run_dir = ["--run-dir", str(tmp_path / "x")]
        assert script.main([str(recipe), *run_dir, "--launcher", "kubernetes", *options]) == 2
        assert message in capsys.readouterr().err
