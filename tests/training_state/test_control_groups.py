"""What nested limits of control groups leave, read from a folder that looks like the root."""

import pytest

from lit_stability.training_state.control_groups import free_in_groups

JOB = "slurm/uid_7/job_3"
TASK = f"{JOB}/step_0/task_1"
NO_LIMIT = 2**63 - 4096


def group_2(path, limit, used, **more):
    """The files of a group of version 2, and their text."""
    files = {"max": limit, "current": used, **more}
    return {f"sys/fs/cgroup/{path}/memory.{name}": text for name, text in files.items()}


def group_1(path, limit, used, **more):
    """The files of a group of version 1, and their text."""
    files = {"limit_in_bytes": limit, "usage_in_bytes": used, **more}
    return {f"sys/fs/cgroup/memory/{path}/memory.{name}": text for name, text in files.items()}


CASES = {
    "version 2, at the root of a container": ("0::/", group_2("", 100, 30), 70),
    "version 2, no limit": ("0::/a", group_2("a", "max", 30), None),
    "version 2, limit of the job": (
        f"0::/{TASK}",
        group_2(TASK, "max", 10) | group_2(JOB, 100, 40),
        60,
    ),
    "version 2, limit of the task": (
        f"0::/{TASK}",
        group_2(TASK, 50, 10) | group_2(JOB, 100, 40),
        40,
    ),
    "version 2, slowed down before the limit": ("0::/a", group_2("a", 100, 30, high=80), 50),
    "version 2, file cache can be dropped": (
        "0::/a",
        group_2("a", 100, 90, stat="anon 20\ninactive_file 60\nactive_file 10"),
        70,
    ),
    "version 2, path of the machine in a container": ("0::/host/pod", group_2("", 100, 30), 70),
    "version 2, outside of its namespace": ("0::/../other", group_2("", 100, 30), 70),
    "version 2, limit lowered below the use": ("0::/a", group_2("a", 100, 130), 0),
    "version 1, nested": (
        f"9:cpu,cpuacct:/x\n4:memory:/{TASK}",
        group_1(TASK, NO_LIMIT, 10) | group_1(JOB, 100, 40),
        60,
    ),
    "version 1, file cache can be dropped": (
        "4:memory:/a",
        group_1("a", 100, 90, stat="total_inactive_file 60"),
        70,
    ),
    "both versions": ("4:memory:/a\n0::/b", group_1("a", 100, 50) | group_2("b", 100, 70), 30),
    "damaged files": ("0::/a\nno colon\n", group_2("a", "", "?"), None),
}


@pytest.mark.parametrize("case", CASES)
def test_least_of_all_limits_above_the_process_is_found(case, tmp_path):
    groups, files, least = CASES[case]
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert min(free_in_groups(tmp_path), default=None) == least


def test_machine_without_groups_has_no_such_limit(tmp_path):
    assert free_in_groups(tmp_path) == []


def test_groups_of_this_process_are_read_without_an_error():
    assert all(left >= 0 for left in free_in_groups())
