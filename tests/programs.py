"""Runs Python programs in processes that are forked from one with Lightning already imported.

A program of a user imports torch and Lightning for five seconds or more; here it starts at once. A
test of the imports themselves, of the interpreter's end or of the command line as installed starts
an interpreter of its own instead.
"""

import atexit
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import reduction
from pathlib import Path

import torch

from tests.distributed import CONTEXT


class _Stream:
    """A file descriptor that is handed to the new process."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def __getstate__(self):
        return {"copy": reduction.DupFd(self.descriptor)}


class Program:
    """What `subprocess.Popen` offers of a process, for a command that begins with `sys.executable`.

    Args:
        command: The interpreter, then ``-m module``, ``-c code`` or the path of a script, and its
            arguments.
        cwd: Its working directory; the present one by default.
        env: Its environment variables; the present ones by default.
        stdout: Open file or descriptor for what it prints, or `subprocess.DEVNULL`, as by default.
        stderr: The same for errors, or `subprocess.STDOUT`.
        stdin: Whatever it is, there is nothing to read.
        start_new_session: Whether it begins a session, and a process group, of its own.
        ignored: Other options of `Popen`.
    """

    stdout = stderr = None

    def __init__(
        self,
        command,
        *,
        cwd=None,
        env=None,
        stdout=None,
        stderr=None,
        stdin=None,
        start_new_session=False,
        **ignored,
    ):
        assert command[0] == sys.executable, command
        with open(os.devnull, "w") as null:
            out, error = (_descriptor(each, null.fileno()) for each in (stdout, stderr))
            streams = (_Stream(out), _Stream(out if error == subprocess.STDOUT else error))
            variables = dict(os.environ if env is None else env)
            arguments = [str(each) for each in command[1:]]
            self._process = CONTEXT.Process(
                target=_run,
                args=(arguments, str(cwd or Path.cwd()), variables, streams, start_new_session),
            )
            self._process.start()
        atexit.register(self._process.kill)  # else the interpreter would wait for it at its end
        self.stdin = io.BytesIO() if stdin == subprocess.PIPE else None
        self.pid = self._process.pid
        # Else who ends the group of the program may end that of the tests.
        while start_new_session and self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self):
        return self.returncode

    @property
    def returncode(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        """The exit code; minus the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: if it still runs after so many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("program", timeout)
        return self.returncode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def terminate(self):
        self._process.terminate()

    def kill(self):
        self._process.kill()


def run_program(command, *, folder, timeout=120, **options):
    """Runs a program to its end; what it prints passes through files in the folder.

    Returns:
        subprocess.CompletedProcess: with the exit code and the texts of both streams.
    """
    name = f"program-{time.monotonic_ns()}"
    paths = [Path(folder, f"{name}.{stream}") for stream in ("out", "err")]
    with paths[0].open("wb") as out, paths[1].open("wb") as error:
        process = Program(command, stdout=out, stderr=error, **options)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
    texts = [path.read_text(encoding="utf8", errors="replace") for path in paths]
    for path in paths:
        path.unlink()
    return subprocess.CompletedProcess(command, code, *texts)


def _descriptor(file, null):
    if file is None or file == subprocess.DEVNULL:
        return null
    return file if isinstance(file, int) else file.fileno()


def _run(arguments, cwd, variables, streams, start_new_session):
    """In the new process."""
    if start_new_session:
        os.setsid()
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.copy.detach(), number)
        (sys.stdout, sys.stderr)[number - 1].reconfigure(line_buffering=os.isatty(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    first = {"-m": "", "-c": ""}.get(arguments[0], str(Path(arguments[0]).parent))
    sys.path[:0] = [first, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    match arguments:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *rest]:
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")
