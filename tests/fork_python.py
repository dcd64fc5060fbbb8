"""A Python that has torch loaded already: each command is a fork of one process, so that shell scripts that start
many short commands can be tested quickly.

    python tests/fork_python.py SOCKET           waits for commands
    SOCKET's client, written beside it as SOCKET-python, is called like python
"""

import array
import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

CLIENT = """#!{python} -ISE
import array, json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({address!r})
what = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n"
fds = array.array("i", [0, 1, 2]).tobytes()
s.sendmsg([what], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
sys.exit(int(s.makefile().readline() or 1))
"""


def run(argv: list[str], cwd: str, env: dict[str, str], fds: array.array) -> None:
    """Become the command."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    module = argv[0] == "-m"
    sys.argv = argv[module:]
    sys.path[0] = cwd if module else str(Path(argv[0]).parent)
    code = 0
    try:
        (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else int(err.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(address: str) -> None:
    for name in (
        "matplotlib.figure",
        "scipy.special",
        "sklearn.datasets",
        "torch._dynamo",
        "tqdm",
        "train",
        "mem_ratio",
        "memorization.plots",
        "generate_optim",
        "emm",
    ):
        __import__(name)
    import torch

    torch.set_num_threads(1)
    client = Path(address + "-python")
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            connection, _ = server.accept()
            message, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_LEN(3 * 4))
            while not message.endswith(b"\n"):
                message += connection.recv(1 << 16)
            fds = array.array("i")
            fds.frombytes(ancillary[0][2])
            if os.fork() == 0:  # a keeper, so that the server goes on at once
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    server.close()
                    run(*json.loads(message), fds)
                _, status = os.waitpid(pid, 0)
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os._exit(0)
            connection.close()
            for fd in fds:
                os.close(fd)
            while True:  # keepers that are done
                try:
                    if os.waitpid(-1, os.WNOHANG)[0] == 0:
                        break
                except ChildProcessError:
                    break


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1])
