"""Command lines run in forked processes that end as if by SIGKILL, at a time or at a file operation.

The processes are forked from a server that has imported everything, so that each starts within a tenth of a second.
"""

import multiprocessing
import os
import signal
import sys

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.optim", "lightning_fabric.wrappers", "tyro", "pantarhei.cli.train"])

# Everything through which a run changes names or makes bytes last; shutil.rmtree and pathlib go through these as well.
OPERATIONS = ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")


def command(arguments, last=None):
    """Run a command line, up to and without its file operation number `last`."""
    from pantarhei.cli.main import main

    if last is not None:
        _end_before(last)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.exit(main(arguments))


def start(arguments, last=None):
    process = FORKS.Process(target=command, args=([str(a) for a in arguments], last))
    process.start()
    return process


def finish(process, seconds=60):
    """Wait for the end; returns the exit status (negative: the signal)."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"not finished after {seconds} s")
    return process.exitcode


def _end_before(last):
    done = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal done
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
