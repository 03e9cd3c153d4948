"""One process imports what every notebook and command needs; kernels and commands of the tests are forks of it.

A fresh Python takes seconds to import torch and transformers, and the tests start some hundred of them. `Server` starts
that process. `forks.py kernel FILE` and `forks.py command ...` stand in for a kernel and for `kslottery`: they hand
their arguments, folder, environment and streams over, wait, and end as the fork ends. Tests that look at imports,
start-up or installations start a real Python. `[*PYTHON, code]` stands in for `python -c code`: who kills it kills
the fork.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ADDRESS = "KSLOTTERY_TEST_FORKS"  # the variable that names the server's socket
PYTHON = [sys.executable, "-I", "-S", __file__, "code"]
IMPORTS = (
    "datasets",
    "ipykernel.kernelapp",
    "IPython",
    "matplotlib.pyplot",
    "numba",
    "pandas",
    "peft",
    "sacrebleu",
    "scipy.stats",
    "torch",
)
IMPORTS += (
    "transformers",
    "transformers.models.llama",
    "transformers.trainer_utils",
    "typer",
    "papermill",
    "nbconvert",
)


def command(words):
    "Hand a command over to the server and end with its status."
    with socket.socket(socket.AF_UNIX) as line:
        for _ in range(600):  # the server may still be importing
            try:
                line.connect(os.environ[ADDRESS])
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.1)
        request = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(line, [len(request).to_bytes(8, "big")], [0, 1, 2])
        line.sendall(request)
        fork = int.from_bytes(line.recv(8), "big")
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, lambda number, frame: os.kill(fork, number))
        status = line.recv(8)
    return int.from_bytes(status, "big") if status else 1


def serve(address):
    "Import, then fork for every request, until the pipe at standard input is closed."
    import importlib

    for name in IMPORTS:
        importlib.import_module(name)
    from kslottery import cli, run  # noqa: F401

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: a watcher waits for each fork
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
            line, _ = door.accept()
            if os.fork() == 0:
                door.close()
                os._exit(watch(line))
            line.close()


def watch(line):
    "Fork once more: the fork does the work, and this process waits and reports how it ended."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(line, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += line.recv(2**20)
    request = json.loads(request)
    if (fork := os.fork()) == 0:
        line.close()
        work(request, streams)
    line.sendall(fork.to_bytes(8, "big"))
    ended = os.pidfd_open(fork)
    if ended not in select.select([line, ended], [], [])[0]:  # who asked is gone
        os.kill(fork, signal.SIGKILL)
    _, status = os.waitpid(fork, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(BrokenPipeError):
        line.sendall((code if code >= 0 else 128 - code).to_bytes(8, "big"))
    return 0


def work(request, streams):
    "Be the kernel or the command."
    status = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = (open(n, mode, encoding="utf-8") for n, mode in enumerate("rww"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        kind, *words = request["words"]
        if kind == "kernel":
            from ipykernel.kernelapp import IPKernelApp

            sys.path.insert(0, "")
            IPKernelApp.launch_instance(argv=["-f", *words, f"--IPKernelApp.parent_handle={os.getppid()}"])
            status = 0
        elif kind == "code":
            sys.argv = ["-c", *words[1:]]
            exec(compile(words[0], "code", "exec"), {"__name__": "__main__"})
            status = 0
        else:
            import matplotlib

            from kslottery.cli import main

            matplotlib.use("agg")
            sys.argv = ["kslottery", *words]
            status = 0
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(status)


class Server:
    """The process that forks, until `close`.

    The folder gets its socket, a kernelspec and a command `kslottery`; this process and its children will find both.
    """

    def __init__(self, folder):
        self.folder, self.address = folder, str(folder / "forks")
        environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", self.address], stdin=subprocess.PIPE, env=environment
        )
        stand_in = [sys.executable, "-I", "-S", __file__]
        kernel = folder / "kernels" / "python3"
        kernel.mkdir(parents=True)
        spec = {"argv": [*stand_in, "kernel", "{connection_file}"], "display_name": "python3", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(spec))
        shim = folder / "bin" / "kslottery"
        shim.parent.mkdir()
        shim.write_text("#!/bin/sh\nexec " + " ".join(stand_in) + ' command "$@"\n')
        shim.chmod(0o755)
        places = (shim.parent, Path(sys.executable).parent, os.environ["PATH"])
        found = {ADDRESS: self.address, "JUPYTER_PATH": str(folder), "PATH": os.pathsep.join(map(str, places))}
        os.environ.update(found)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder)


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    sys.exit(serve(*rest) if kind == "serve" else command([kind, *rest]))
