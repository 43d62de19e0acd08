"""Processes on this machine, as ranks over gloo or alone, for tests that must not hang."""

import contextlib
import multiprocessing
import os
import socket
import time
import traceback

import torch

CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in a process with one thread, from which every rank is forked in no time.
CONTEXT.set_forkserver_preload(
    ["lit_stability.callbacks", "tests.rank_cases", "tests.signal_cases"]
)


def run_ranks(function, *args, ranks=2, timeout=120, folder):
    """What ``function(*args)`` returns on each rank; their first error is raised here.

    Raises:
        AssertionError: if a rank fails, or is not done in time; all that were started are ended.
    """
    port = _free_port()
    processes = [
        CONTEXT.Process(target=_rank, args=(function, args, rank, ranks, port, folder), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        _wait(processes, time.monotonic() + timeout)
        results = [_load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)
    errors = [f"rank {r}:\n{x['error']}" for r, x in enumerate(results) if "error" in x]
    assert not errors, "\n".join(errors)
    return [x["value"] for x in results]


def run_ranks_once(tmp_path_factory, function, name, *args, timeout=180, ranks=2, label=""):
    """Folder and results of ``run_ranks(function, folder, name, *args)``, by whichever worker of a
    test run comes first; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / f"ranks-{function.__name__}-{name}{label}"
    done = folder.with_suffix(".pt")
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + timeout + 30
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    else:
        part = done.with_suffix(".part")
        try:
            value = run_ranks(
                function, folder, name, *args, folder=folder, timeout=timeout, ranks=ranks
            )
            torch.save({"value": value}, part)
        except BaseException:
            torch.save({"error": traceback.format_exc()}, part)
        part.rename(done)
    told = _load(done)
    assert "error" not in told, told["error"]
    return folder, told["value"]


def exit_codes(function, *args, ranks=1, timeout=60, folder, signals=()):
    """Exit codes of processes that run ``function(*args)``; minus the signal for a killed one.

    What they print is in ``folder/output<rank>``. With one rank there is no process group.

    Args:
        signals: ``(seconds, rank, signal)``: sends a signal to a rank so long after the file
            ``folder/begun<rank>`` is there.

    Raises:
        AssertionError: if one is not done in time; all that were started are ended.
    """
    port = _free_port()
    processes = [
        CONTEXT.Process(target=_process, args=(function, args, rank, ranks, port, folder))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        for seconds, rank, signum in signals:
            begun = folder / f"begun{rank}"
            while not begun.exists() and processes[rank].is_alive():
                time.sleep(0.005)
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[rank].pid, signum)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)
    output = "\n".join((folder / f"output{r}").read_text() for r in range(ranks))
    assert None not in codes, f"{codes}, not done in {timeout} s:\n{output}"
    return codes


def _process(function, args, rank, ranks, port, folder):
    """In the new process, which ends as a script would."""
    with open(folder / f"output{rank}", "w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if ranks > 1:
        os.environ |= _group(rank, ranks, port)
    torch.set_num_threads(1)
    code = 0
    try:
        function(*args)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    # Skips the destructors of process groups, which may wait for a rank that is gone.
    os._exit(code)


def _group(rank, ranks, port):
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait(processes, deadline):
    """Until all are done, one has failed, or time is up."""
    while time.monotonic() < deadline and any(p.is_alive() for p in processes):
        if any(p.exitcode for p in processes):
            # The others are told by their connections; what they say may be worth reading.
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.02)


def _load(path):
    if not path.exists():
        return {"error": "did not end in time, or died"}
    return torch.load(path, weights_only=False)


def _rank(function, args, rank, ranks, port, folder):
    """In the new process."""
    os.environ |= _group(rank, ranks, port)
    torch.set_num_threads(1)
    part = folder / f".rank{rank}.pt"
    try:
        torch.save({"value": function(*args)}, part)
    except BaseException:
        torch.save({"error": traceback.format_exc()}, part)
    part.rename(folder / f"rank{rank}.pt")
    failed = "error" in torch.load(part.with_name(f"rank{rank}.pt"), weights_only=False)
    # Skips the destructors of process groups, which may wait for a rank that is gone.
    os._exit(1 if failed else 0)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
