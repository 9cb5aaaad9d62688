"""slurm.conf and its companions for a cluster of namespaces on one host."""

from __future__ import annotations

import secrets
from pathlib import Path

SUBNET = "10.77.3"
"""Exists only inside the namespaces that the cluster makes."""
CPUS = 4
GPUS = 4
"""What a node claims to have, so that options about GPUs can be tested; nothing looks for devices."""

_SLURM_CONF = """\
ClusterName=test
SlurmctldHost=head({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s, least 5 s).
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
# No cgroups: processes are found by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
# A lost node is noticed, and may come back, within seconds. An order to end a step that is not confirmed in
# MessageTimeout is given again a minute later, and then ends the next life of a requeued job.
ReturnToService=2
SlurmdTimeout=12
MessageTimeout=10
KillWait=20
UnkillableStepTimeout=40
SchedulerParameters=bf_interval=2,sched_interval=3,batch_sched_delay=0
# Jobs of `urgent` put jobs of `main` back into the queue. The signal of --signal comes first.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=n[1-{nodes}] NodeAddr={subnet}.[11-{last}] CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=40
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def write_settings(root: Path, num_nodes: int) -> None:
    """Writes slurm.conf, gres.conf, cgroup.conf, munge.key, hosts and nsswitch.conf under `root`."""
    filled = _SLURM_CONF.format(
        root=root, subnet=SUBNET, nodes=num_nodes, last=10 + num_nodes, cpus=CPUS, gpus=GPUS
    )
    (root / "slurm.conf").write_text(filled)
    for number in range(GPUS):
        (root / f"gpu{number}").touch()
    (root / "gres.conf").write_text(
        f"Name=gpu File={root}/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n"
    )
    # slurmd 22.05 starts a cgroup plugin even when none is used; on an empty directory v1 does nothing.
    (root / "cgroup").mkdir()
    (root / "cgroup.conf").write_text(
        f"CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint={root}/cgroup\n"
    )
    key = root / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    # Names come from `hosts` alone: a node that asked a name server would wait for nobody's answer.
    (root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    nodes = [f"{SUBNET}.{10 + number} n{number}" for number in range(1, num_nodes + 1)]
    (root / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{SUBNET}.1 head", *nodes, ""]))
