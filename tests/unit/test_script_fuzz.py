"""Whatever stands in a cluster file, a recipe or a path: one line, or a script that says just that.

Scripts are run by a real bash, with stand-ins for what they call. A text that were taken for a
command would leave a file named `canary`.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_dist.cli.main import main
from peft_dist.common.errors import PeftDistError
from peft_dist.config.cluster import Cluster, load_cluster
from peft_dist.slurm.scripts import Array
from tests.faults.long import cases
from tests.unit.slurm_jobs import Machines, job, json_lines, render

NASTY = [
    "", " ", "a b", "a'b", 'a"b', "''", "a\nb", "a\r\ntouch canary", "\ttouch canary",
    "$(touch canary)", "`touch canary`", "; touch canary", "a; touch canary #", "&& touch canary",
    "| touch canary", "> canary", "<(touch canary)", "& touch canary &", "\n touch canary\n",
    "'; touch canary; '", '"; touch canary; "', "$'\\ntouch canary'", "${IFS}touch${IFS}canary",
    '\\"; touch canary; \\"', "\\", "a\\", "\\\n", "%", "%j%x%n%%", "100%s", "~", "~root",
    "~/a", "-n", "--wrap=touch canary", "-", "../../evil", "/etc/passwd", "a/../b", "./x",
    "\u2028touch canary", "\u2029", "\x85", "\x00", "\x1b[31m", "\x7f", "\u202e", "\xa0",
    "\udce9", "é☃\U0001f600", "x" * 300, "x" * 5000, "$SLURM_NODEID", "$share/launch/train.py",
    "$rendezvous", "{gpus}", "{0}", "{{ 7 * 7 }}", "{% raw %}", "<# x #>", "#", "# touch canary",
    "\n#SBATCH --wrap=touch", "*", "[a-z]*", "!!", "!touch", "a=b", "a,b:c", "EOF", "null", "true",
    "abc@h100", "repo:user@ampere", "^lo,docker", "!x", "a@$(touch canary)", "!$(touch canary)",
    "^lo,`touch canary`", "a:b;touch canary",
    "$((touch canary))", "a\\$(touch canary)", "(touch canary)", "{ touch canary; }", "\\`x\\`",
]  # fmt: skip

Change = Callable[[str], dict[str, Any]]

IMAGE = {"runtime": "apptainer", "image": "a.sif"}
FIELDS: dict[str, Change] = {
    **{
        name: lambda text, name=name: {name: text}
        for name in ("partition", "account", "qos", "reservation", "constraint", "gres",
                     "memory_per_node", "max_time", "default_time", "interface", "secrets_file",
                     "python", "gpus_per_node", "requeue", "exclusive", "signal_lead_s")
    },
    "gres kind": lambda text: {"gres": f"gpu:{text}:{{gpus}}"},
    "secrets path": lambda text: {"secrets_file": f"/{text}"},
    "python path": lambda text: {"python": f"/bin/{text}"},
    "value": lambda text: {"environment": {"SOME": text}},
    "name": lambda text: {"environment": {text: "some"}},
    "more of a name": lambda text: {"environment": {f"A{text}": "some"}},
    "shared": lambda text: {"shared": [text, f"/{text}"]},
    "sbatch": lambda text: {"sbatch": {"x-option": text}},
    "name in sbatch": lambda text: {"sbatch": {text: "x"}},
    "srun": lambda text: {"srun": {"x-option": text, "y-option": True}},
    "name in srun": lambda text: {"srun": {text: "x"}},
    "excluded": lambda text: {"sbatch": {"exclude": text}},
    "suffix": lambda text: {"head": {"suffix": text}},
    "image": lambda text: {"container": IMAGE | {"image": text}},
    "mount": lambda text: {"container": IMAGE | {"mounts": [text]}},
    "mounts": lambda text: {"container": IMAGE | {"mounts": [f"/{text}", f"/a:/{text}"]}},
    "stage": lambda text: {"stage": {"folder": f"/{text}"}},
    "a key": lambda text: {text: 1},
}  # fmt: skip
BASE = {"gpus_per_node": 1, "cpus_per_gpu": 2}


def read(folder: Path, values: dict[str, Any]) -> Cluster | None:
    """Return the cluster that a file with these values describes, or None where it is refused."""
    file = folder / "fuzzed.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    try:
        return load_cluster(file)
    except PeftDistError as error:
        assert len(str(error).splitlines()) == 1, error
        return None


def accepted(folder: Path, text: str) -> dict[str, Any]:
    """Return a cluster file with the text in every field that takes it."""
    values: dict[str, Any] = dict(BASE)
    for change in FIELDS.values():
        new = values | change(text)
        for section in (
            "environment",
            "container",
            "sbatch",
            "srun",
        ):  # each of their fields for itself
            if section in values and section in new:
                new[section] = values[section] | new[section]
        unseen = "container" in new and re.search("[:,]", str(new.get("secrets_file", "")))
        if not unseen and read(folder, new) is not None:
            values = new
    return values


def run_scripts(machines: Machines, folder: Path, values: dict[str, Any], decision: str) -> bool:
    """Run the scripts of a job on such a cluster; return False where they are refused."""
    arranged = values | {"python": None if "container" in values else str(machines.interpreter)}
    try:
        made = job(arranged, nodes=2, folder=folder, array=Array(elements=2, limit=1))
        texts = render(made)
    except PeftDistError as error:
        assert len(str(error).splitlines()) == 1, error
        return False
    run = folder / "000"
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    (folder / "job.sbatch").write_text(texts["job.sbatch"], encoding="utf-8")
    (run / "node.sh").write_text(texts["node.sh"], encoding="utf-8")
    check_text(texts["job.sbatch"])
    check_text(texts["node.sh"])
    done = machines.run(
        folder / "job.sbatch", nodes=2, decision=decision, SLURM_ARRAY_JOB_ID="12",
        SLURM_ARRAY_TASK_ID="0",
    )  # fmt: skip
    assert done.returncode == {"done": 0, "again": 75, "again-without node1": 75}[decision], done
    if decision == "again":
        assert machines.words("requeued") == ["12_0"]
    assert machines.words("argv-1")[3] == str(run)
    for name, value in values.get("environment", {}).items():
        assert machines.variables(1)[name] == value
    assert json_lines(run / "slurm" / "jobs.jsonl")[-1]["event"] == "ended"
    return True


def check_text(script: str) -> None:
    """See that bash can read a script and that sbatch reads one word in each directive."""
    done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            assert len(shlex.split(line.removeprefix("#SBATCH"))) == 1, line


def no_canary(folder: Path) -> None:
    assert not list(folder.rglob("canary"))
    assert not Path("canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_nasty_text_in_any_field_is_refused_or_is_just_a_text(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = accepted(tmp_path, text)
    decision = ("done", "again", "again-without node1")[NASTY.index(text) % 3]
    assert run_scripts(Machines(tmp_path), tmp_path / "run", values, decision)
    no_canary(tmp_path)


def test_every_field_takes_some_text_and_refuses_some(tmp_path: Path) -> None:
    """Else the tests here would say nothing of it."""
    plain = [
        "gpu",
        "mail-type",
        "gpu:{gpus}",
        "480G",
        "1:00:00",
        "/a",
        "/a:/b",
        "ib0",
        "7",
        "a.sif",
        "true",
    ]
    for name, change in FIELDS.items():
        taken = (read(tmp_path, BASE | change(text)) is not None for text in [*plain, *NASTY])
        refused = (read(tmp_path, BASE | change(text)) is None for text in [*NASTY, *plain])
        assert any(refused), name
        # A section is no text, and no text is one of our keys.
        assert any(taken) == (name not in ("requeue", "a key")), name


def named(folder: Path, text: str) -> Path | None:
    """Make a folder whose name holds a text; None where no file system would."""
    path = folder / f"a{text}"
    try:
        path.mkdir(parents=True)
    except (OSError, ValueError):  # too long, a NUL, no UTF-8
        return None
    return path


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_names_of_runs_models_rows_and_values_are_refused_or_arrive(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machines = Machines(tmp_path)
    monkeypatch.setenv("PATH", f"{machines.commands}:/usr/bin:/bin")
    place = named(tmp_path / "made", text) or tmp_path
    for name in ("model", "python"):
        (place / name).mkdir()
    (place / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    interpreter = place / "python" / "python3"
    interpreter.symlink_to(machines.interpreter)
    recipe = place / "recipe.yaml"
    values = {"model": {"name": str(place / "model")}, "data": {"train": str(place / "rows.jsonl")},
              "tracking": {"wandb": {"project": f"p{text}"}}}  # fmt: skip
    cluster = place / "cluster.yaml"
    on_it = {"python": str(interpreter), "shared": ["/"], "stage": {"folder": f"{tmp_path}/disk"}}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    cluster.write_text(json.dumps(on_it), encoding="utf-8")
    run = Path(f"{tmp_path}/runs/b/c/a{text}")
    for extra in ([], [f"--array=tracking.wandb.project=x,y{text}"], [f"--array=a{text}=1,2"]):
        chosen = f"--run-dir={run}{'-array' if extra else ''}"
        errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as Python's own is
        with contextlib.redirect_stderr(errors):
            code = main(["submit", str(recipe), "--cluster", str(cluster), chosen, *extra])
        errors.seek(0)
        told = errors.read()
        assert code in (0, 2)
        if code == 2:
            assert told.startswith("peft-dist: error: ")
            assert len(told.splitlines()) == 1, told
            continue
        script = Path(chosen.removeprefix("--run-dir=")) / "job.sbatch"
        check_text(script.read_text(encoding="utf-8"))
        array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"} if extra else {}
        done = machines.run(script, **array)
        assert done.returncode == 0, done
        own = script.parent / "001" if extra else script.parent
        assert machines.words("argv-0")[3] == str(own)
        assert machines.words("argv-0")[-1] == str(own / "recipe.yaml")
        model = os.path.realpath(place / "model")
        assert machines.words("stage-0")[2:] == ["--json", model, f"{tmp_path}/disk"]
        assert [event["event"] for event in json_lines(own / "slurm" / "jobs.jsonl")] == [
            "submitting", "submitted", "started", "ended",
        ]  # fmt: skip
    no_canary(tmp_path)


pieces = st.lists(
    st.sampled_from(
        ["a", "b c", "'", '"', "`", "$", "$(", ")", "{", "}", "touch canary", ";", "&&", "|", ">",
         "canary", "\\", "%", "~", "/", "-", "#", "*", "?", "!", "=", ",", ":", "\n", "\t", "\r",
         "\u2028", "é", "\udce9", "$HOME", "${", "$((", "<<", "{{", "%}", "[", "]", "&", "(", "0"]
    ),
    max_size=8,
).map("".join)  # fmt: skip
texts = pieces | st.text(max_size=20)


@pytest.mark.slow
@settings(max_examples=cases(30, 3000), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries({}, optional={name: texts for name in FIELDS}),
    texts,
    st.sampled_from(["done", "again", "again-without node1"]),
)
def test_random_texts_in_all_fields_at_once_and_in_the_folder(
    tmp_path_factory: pytest.TempPathFactory, given_texts: dict[str, str], name: str, decision: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    values: dict[str, Any] = dict(BASE)
    for field, text in given_texts.items():
        new = values | FIELDS[field](text)
        if read(folder, new) is not None:
            values = new
    run = named(folder / "runs", name.replace("/", "")[:50])
    if run is not None:
        run_scripts(Machines(folder), run, values, decision)
    no_canary(folder)


def test_the_bait_would_be_taken_by_a_script_that_does_not_quote(tmp_path: Path) -> None:
    """The tests here could not fail otherwise."""
    (tmp_path / "seen").mkdir()
    for text in ("$(touch canary)", "`touch canary`", "; touch canary", "\n touch canary\n"):
        script = f"export SOME={text}\n"
        subprocess.run(["bash", "-c", script], cwd=tmp_path / "seen", env=dict(os.environ))
        with pytest.raises(AssertionError):
            no_canary(tmp_path)
        (tmp_path / "seen" / "canary").unlink()
