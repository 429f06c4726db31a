"""Write a first cluster file from what Slurm says of a partition.

What Slurm does not know stands in it as a comment. Changes nothing on the cluster.
"""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dist.common.atomic import make_file
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, ClusterError, SlurmError, nearest
from peft_dist.config.cluster import check_cluster
from peft_dist.config.load import render_yaml
from peft_dist.config.yaml_text import parse_yaml
from peft_dist.slurm.cli_client import run_slurm

NODES = ["sinfo", "--noheader", "--Node", "-o", "%P|%a|%N|%c|%m|%G|%f"]
"""A line per node and partition; the partition that jobs go to by default ends with `*`."""
PARTITION = ["scontrol", "--oneliner", "show", "partition"]
CONFIG = ["scontrol", "show", "config"]
NODE = ["scontrol", "--oneliner", "show", "node"]
_KINDS = (
    r"(a(10|16|30|40|100|800)|[hb](100|200|300|800)|[vp]100|k80|t4|l40?|g[hb][23]00|mi\d{3}|rtx)"
)
GPU_KIND = re.compile(rf"(?i)(nvidia_)?{_KINDS}([^0-9].*)?")
"""A feature that names a kind of GPU: a100, h100_80gb, gh200, mi250x, l40s."""
GPU_HINT = re.compile(rf"(?i)gpu|cuda|rocm|nvlink|\b{_KINDS}|\bgh\b")
"""What speaks of GPUs in the names of a partition and of features."""
NONE = ("", "(null)", "N/A", "NONE", "UNLIMITED", "INFINITE", "0", "ALL")
"""What stands where Slurm has no limit or no value."""


@dataclass(frozen=True)
class NodeKind:
    """What nodes that are alike have to offer."""

    cpus: int
    memory_mb: int
    gpu_type: str | None
    gpus: int
    feature: str | None = None
    """The feature that names the kind of its GPUs."""

    def __str__(self) -> str:
        """Say it in a comment."""
        named = self.gpu_type or self.feature
        kind = f" ({named})" if named else ""
        gpus = f"{self.gpus} GPUs{kind}, " if self.gpus else ""
        return f"{gpus}{self.cpus} CPUs, {self.memory_mb} MB"


@dataclass(frozen=True)
class Partition:
    """A partition as `sinfo` shows it."""

    name: str
    is_default: bool
    is_up: bool
    nodes: Mapping[str, NodeKind]
    features: frozenset[str]

    @property
    def has_gpus(self) -> bool:
        """Whether Slurm knows of GPUs on any of its nodes."""
        return any(kind.gpus for kind in self.nodes.values())

    @property
    def kinds(self) -> list[tuple[NodeKind, int]]:
        """Its kinds of nodes with their number: first those that have most GPUs together."""
        counts = Counter(self.nodes.values())
        return sorted(counts.items(), key=lambda item: (-item[0].gpus * item[1], -item[1]))

    def __str__(self) -> str:
        """Say in a comment what it has."""
        counted = [(f"{count} node" + "s" * (count != 1), kind) for kind, count in self.kinds]
        kinds = "; ".join(f"{nodes} with {kind}" for nodes, kind in counted)
        return f"{self.name}: {kinds}{'' if self.is_up else ' (down)'}"


def probe(name: str | None) -> str:
    """Return the cluster file of a partition: the one named, else Slurm's default.

    Raises:
        SlurmError: Where Slurm cannot be asked.
        ClusterError: Where it has no such partition.
    """
    partitions = parse_nodes(run_slurm(NODES))
    chosen = choose(partitions, name)
    kind = chosen.kinds[0][0]
    node = next(node for node, own in chosen.nodes.items() if own == kind)
    text = describe(
        chosen,
        partition=parse_fields(run_slurm([*PARTITION, chosen.name])),
        node=parse_fields(run_slurm([*NODE, node])),
        config=parse_config(run_slurm(CONFIG)),
        others=[other for other in partitions if other is not chosen],
    )
    where = f"partition {chosen.name}"
    values = parse_yaml(text, where=where)
    if values["gpus_per_node"] is None:  # for a person to say
        del values["gpus_per_node"]
    check_cluster(values, where=where)  # names may hold what no script can
    return text


def parse_nodes(text: str) -> list[Partition]:
    """Return the partitions in what `NODES` prints, in its order."""
    rows = [line.split("|") for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[3].isdecimal() and row[4].isdecimal()]
    found = []
    for label in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == label]
        found.append(
            Partition(
                name=label.removesuffix("*"),
                is_default=label.endswith("*"),
                is_up=own[0][1] == "up",
                nodes={
                    row[2]: NodeKind(
                        int(row[3]), int(row[4]), *parse_gres(row[5]), _gpu_feature(row[6])
                    )
                    for row in own
                },
                features=frozenset(
                    word for row in own for word in row[6].split(",") if word not in NONE
                ),
            )
        )
    return found


def parse_gres(text: str) -> tuple[str | None, int]:
    """Return type and number of a node's GPUs, of several types the most: `gpu:a100:4(S:0-1)`."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", text)
    kinds = [(kind or None, int(count)) for kind, count in found]
    whole = [kind for kind in kinds if not re.search(r"\dg\.\d+gb", kind[0] or "")]  # no slices
    return max(whole or kinds, key=lambda kind: kind[1], default=(None, 0))


def _gpu_feature(features: str) -> str | None:
    """Return the feature that names a kind of GPU, where just one does."""
    found = [word for word in features.split(",") if GPU_KIND.fullmatch(word)]
    return found[0] if len(found) == 1 else None


def parse_fields(line: str) -> dict[str, str]:
    """Return the fields of a line of `scontrol --oneliner`."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line))


def parse_config(text: str) -> dict[str, str]:
    """Return the settings in what `CONFIG` prints."""
    return dict(re.findall(r"^(\S+)\s+= (.*?)\s*$", text, re.MULTILINE))


def choose(partitions: Sequence[Partition], name: str | None) -> Partition:
    """Return the partition named, else Slurm's default if it has GPUs, else the one with most.

    Raises:
        ClusterError: Where there is none.
    """
    if not partitions:
        raise SlurmError("shows no nodes", where="sinfo", remedy="ask the site which you may use")
    if name is None:
        # A default of CPUs is for other work, where others have GPUs.
        return max(partitions, key=lambda p: (p.has_gpus, p.is_default, _gpus_together(p)))
    for partition in partitions:
        if partition.name == name:
            return partition
    names = [partition.name for partition in partitions]
    raise ClusterError(f"no partition {name!r}", where="--partition", remedy=nearest(name, names))


def _gpus_together(partition: Partition) -> int:
    kind, count = partition.kinds[0]
    return kind.gpus * count


def describe(
    chosen: Partition,
    *,
    partition: Mapping[str, str],
    node: Mapping[str, str],
    config: Mapping[str, str],
    others: Sequence[Partition] = (),
) -> str:
    """Return the text of a cluster file.

    Args:
        chosen: The partition.
        partition: Its fields, as `scontrol` shows them.
        node: Those of one of its nodes, of the first kind.
        config: Slurm's settings.
        others: The other partitions, for a comment.
    """
    kind, count = chosen.kinds[0]
    exclusive = partition.get("OverSubscribe") == "EXCLUSIVE"
    return "\n".join(
        [
            *_head(chosen, partition, config, others),
            *_value("partition", chosen.name),
            "# account: my-project      # where the site charges one",
            *_only_this_kind(chosen),
            *_devices(
                kind, node, partition, exclusive=exclusive, are_known=_are_known(chosen, others)
            ),
            *_value("exclusive", exclusive),
            *_value("max_nodes", _least(count, partition.get("MaxNodes"))),
            *_times(partition),
            *_requeue(config),
            "# interface: ib0           # `ip -brief address` on a node; off: NCCL and gloo choose",
            "# shared: [/home]          # folders that all nodes see",
            "# secrets_file: ~/.config/peft-dist/secrets  # WANDB_API_KEY=...; mode 0600",
            "# setup: |                 # whatever Python needs on a node",
            "#   module load cuda",
            "# python: /path/to/venv/bin/python           # off: the one that submits",
            "",
        ]
    )


def _head(
    chosen: Partition,
    partition: Mapping[str, str],
    config: Mapping[str, str],
    others: Sequence[Partition],
) -> list[str]:
    cluster, version = config.get("ClusterName", "?"), config.get("SLURM_VERSION", "?")
    notes = [
        f"Made by `peft-dist cluster probe` on cluster {cluster}, Slurm {version}.",
        "`peft-dist schema --cluster` lists every key; no limit of an account or QOS is in it.",
        f"It describes the first kind of nodes in partition {chosen}",
        *(f"Another partition is {other}" for other in others),
    ]
    if chosen.features:
        notes.append(f"constraint: could name features: {', '.join(sorted(chosen.features))}")
    for field in ("AllowAccounts", "AllowQos", "AllowGroups"):
        if partition.get(field, "") not in NONE:
            notes.append(f"Only for {field.removeprefix('Allow').lower()} {partition[field]}")
    if config.get("MaxArraySize", "").isdecimal():
        notes.append(f"An array may have {int(config['MaxArraySize']) - 1} runs at most.")
    return [f"# {note}" for note in notes]


def _devices(
    kind: NodeKind,
    node: Mapping[str, str],
    partition: Mapping[str, str],
    *,
    exclusive: bool,
    are_known: bool,
) -> list[str]:
    """Return the lines that ask for all of one node."""
    usable = node.get("CPUEfctv", "")  # without those that Slurm keeps for itself
    cpus = int(usable) if usable.isdecimal() else kind.cpus
    cpus = _least(cpus, partition.get("MaxCPUsPerNode"))
    reserved = node.get("MemSpecLimit", "")
    memory_mb = kind.memory_mb - (int(reserved) if reserved.isdecimal() else 0)
    memory_mb = _least(memory_mb, partition.get("MaxMemPerNode"))
    lines = _value("gpus_per_node", kind.gpus)
    if not kind.gpus and not are_known:
        lines = [
            "# Slurm does not say whether nodes have GPUs: give their number, and gres: null; or",
            "# 0 to train on CPUs.",
            *_value("gpus_per_node", None),
        ]
    if kind.gpus:
        gpu = "gpu" if kind.gpu_type is None else f"gpu:{kind.gpu_type}"
        lines += _value("gres", gpu + ":{gpus}")
    if kind.gpus and cpus >= kind.gpus:
        lines += _value("cpus_per_gpu", cpus // kind.gpus)
    else:
        lines += _value("cpus_per_node", cpus)
    if exclusive:
        return lines + _value("memory_per_node", "0")
    if memory_mb > 1:  # what Slurm assumes where nobody has told it
        return lines + _value("memory_per_node", f"{memory_mb}M")
    return [*lines, "# memory_per_node: 480G    # Slurm does not know what a node has"]


def _are_known(chosen: Partition, others: Sequence[Partition]) -> bool:
    """Whether Slurm would know of GPUs in a partition, were there any."""
    hints = GPU_HINT.search(" ".join((chosen.name, *sorted(chosen.features))))
    return chosen.has_gpus or (hints is None and any(other.has_gpus for other in others))


def _only_this_kind(chosen: Partition) -> list[str]:
    """Return the line that asks for nodes of the first kind, where only a feature tells them."""
    kind, *rest = [kind for kind, _ in chosen.kinds]
    told = {other.feature for other in rest if (other.gpu_type, other.gpus) == (None, kind.gpus)}
    if kind.gpu_type is None and kind.gpus and kind.feature and told - {kind.feature}:
        return _value("constraint", kind.feature)
    return []


def _times(partition: Mapping[str, str]) -> list[str]:
    default = partition.get("DefaultTime", "")
    if (longest := partition.get("MaxTime", "")) not in NONE:
        return _value("max_time", longest)
    given = f"{default} where none is asked for" if default not in NONE else "no limit"
    return [f"# default_time: 24:00:00   # Slurm sets no longest time, and gives {given}"]


def _requeue(config: Mapping[str, str]) -> list[str]:
    allowed = config.get("JobRequeue") != "0"
    note = [] if allowed else ["# JobRequeue is 0 here; true may work where the site allows it."]
    return [*note, *_value("requeue", {"allowed": allowed})]


def _value(key: str, value: Any) -> list[str]:
    return render_yaml({key: value}).splitlines()


def _least(number: int, limit: str | None) -> int:
    return min(number, int(limit)) if limit is not None and limit.isdecimal() else number


def probe_here(partition: str | None, out: Path | None) -> int:
    """Print the cluster file of a partition, or make one; return the exit code.

    Raises:
        PeftDistError: Where Slurm cannot be asked, or the file is there or cannot be made.
    """
    text = probe(partition)
    if out is None:
        show(text, end="")
        return EXIT_DONE
    try:
        made = make_file(out, text)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ClusterError(f"cannot be written: {reason}", where=str(out)) from error
    if not made:
        raise ClusterError("is there already", where=str(out), remedy="name another file")
    show(f"{out}: look through it, then submit with --cluster {shlex.quote(str(out))}")
    return EXIT_DONE
