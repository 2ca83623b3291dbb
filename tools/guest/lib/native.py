"""`run --native`: no guest, the command runs on this machine, whose own kernel has ublk.

Shares are bind mounts and disks loop mounts in a mount namespace of the command's own, which takes
them away with its last process; paths are the same as in a guest. Not in a PID namespace: kernels
before 6.19 compare the server's process id as the device sees it with the one it was told.
Everything the command leaves running is killed at the end.
"""

import ctypes
import os
import signal
import subprocess
import time

TIMED_OUT = 124
GUEST_FAILED = 125

# Arguments: directory, then four for each mount, --, command.
ENTER = """
fail() { echo "guest: cannot $*" >&2; exit 125; }
directory=$1; shift
while [ "$1" != -- ]; do
    kind=$1 host=$2 guest=$3 access=$4; shift 4
    if [ "$kind" = disk ]; then
        mount -o "loop,$access" "$host" "$guest" || fail "mount $host at $guest"
    else
        mount --bind "$host" "$guest" || fail "bind $host to $guest"
        [ "$access" = rw ] || mount -o remount,bind,ro "$guest" || fail "make $guest read-only"
    fi
done
shift
cd "$directory" || fail "enter $directory"
exec "$@"
"""


def load_ublk(parameters):
    """Returns why the machine cannot serve as its own test node, or None."""
    if os.geteuid() != 0:
        return "--native needs root"
    own = [text.removeprefix("ublk_drv.") for text in parameters if text.startswith("ublk_drv.")]
    if not os.path.exists("/dev/ublk-control"):
        try:
            subprocess.run(["modprobe", "ublk_drv", *own], stderr=subprocess.DEVNULL, check=False)
        except FileNotFoundError:
            pass
    if not os.path.exists("/dev/ublk-control"):
        return f"--native: this kernel ({os.uname().release}) has no ublk; run without --native"
    return None


def make_directories(directories):
    """Makes the missing mount points; returns what was made, to be removed again."""
    made = []
    for directory in directories:
        missing = []
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = os.path.dirname(directory)
        for path in reversed(missing):
            os.mkdir(path)
            made.append(path)
    return made


def descendants(pid):
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *descendants(child)]
    except FileNotFoundError:
        pass
    return found


def kill_descendants(note):
    """Bounded: a process that is stuck in the kernel is named and left behind."""
    deadline = time.monotonic() + 5
    while True:
        left = descendants(os.getpid())
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            note(f"processes {left} cannot be killed")
            return
        time.sleep(0.02)


def run_native(arguments, note):
    problem = load_ublk(arguments.kernel_module_param)
    if problem:
        note(problem)
        return GUEST_FAILED
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    mounts = [("disk", *mapping) for mapping in arguments.disk] + [("share", *mapping) for mapping in arguments.share]
    command = ["unshare", "--mount", "--propagation", "private", "--", "/bin/sh", "-c", ENTER, "sh", arguments.chdir]
    for kind, host, directory, read_only in mounts:
        command += [kind, host, directory, "ro" if read_only else "rw"]
    made = make_directories([mount[2] for mount in mounts])
    try:
        process = subprocess.Popen(
            [*command, "--", *arguments.command], stdin=subprocess.DEVNULL,
            env={**os.environ, **dict(arguments.env)}, start_new_session=True,
        )
        try:
            status = process.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            note(f"killed after {arguments.timeout:g} s (--timeout)")
            return TIMED_OUT
        return status if status >= 0 else 128 - status
    finally:
        kill_descendants(note)
        for directory in reversed(made):
            try:
                os.rmdir(directory)
            except OSError as error:
                note(f"{directory} stays: {error.strerror}")
