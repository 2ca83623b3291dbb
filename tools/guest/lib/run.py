"""Boots the test guest, runs one command in it, passes its output and exit status on.

The guest never outlives this process and leaves no file: its disks are opened with a throw-away
layer (an unlinked temporary file of QEMU's), scripts and command travel in a memfd that is added
to the initramfs, and all sockets are either pairs or in the abstract name space. Only the serial
log of a failed run stays, in the cache.
"""

import argparse
import ctypes
import fcntl
import os
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time

from native import run_native
from newc import Newc

HERE = os.path.dirname(os.path.abspath(__file__))
SETUP = os.path.join(os.path.dirname(HERE), "setup")

TIMED_OUT = 124
GUEST_FAILED = 125
KEPT_LOGS = 20
TAIL_LINES = 60

EPILOG = """\
exit status: COMMAND's own (128 + N when signal N ended it, 127 when it does not exist, 126 when it
cannot be executed); 124 when --timeout passed; 125 when the guest did not boot, died under the
command, or the arguments are wrong. After a failure the end of the guest's serial log is printed
on standard error, with the place of the whole log.
"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        # Not argparse's 2, which a command may return.
        self.print_usage(sys.stderr)
        self.exit(GUEST_FAILED, f"guest: {message}\n")


def parse_arguments():
    parser = Parser(
        prog="run", usage="run [options] -- COMMAND [ARGS...]", epilog=EPILOG,
        description="Runs COMMAND as root in a guest with a stock Debian kernel, emulated by QEMU.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    add = parser.add_argument
    add("--kernel", default="6.12", metavar="VERSION", help="6.12 (default), 7 for the newest 7.x, or another prefix of a version that Debian has")
    add("--share", action="append", default=[], metavar="HOSTDIR=GUESTDIR[:ro]", help="show a directory of the host in the guest; may be repeated")
    add("--disk", action="append", default=[], metavar="FILE=GUESTDIR[:ro]", help="attach a raw file system image and mount it; may be repeated")
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable for COMMAND (without =VALUE: as it is here)")
    add("--chdir", default="/", metavar="GUESTDIR", help="directory in which COMMAND starts (default /)")
    add("--memory", default="3G", help="memory of the guest (default 3G)")
    add("--cpus", type=int, default=2, help="CPUs of the guest (default 2)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="kill the guest when COMMAND has run this long (default 600)")
    add("--boot-timeout", type=float, default=240, metavar="SECONDS", help="kill the guest when it has not booted by then, and boot once more (default 240: a busy machine takes its time)")
    add("--kernel-module-param", action="append", default=[], metavar="MODULE.NAME=VALUE", help="parameter for when MODULE is loaded, e.g. ublk_drv.ublks_max=256")
    add("--kernel-arg", action="append", default=[], metavar="ARG", help="further word for the kernel's command line")
    add("--serial-log", metavar="FILE", help="keep the serial log here, whatever happens")
    add("--verbose", action="store_true", help="say how long the boot took and what was started")
    add("--native", action="store_true", help="no guest: run COMMAND on this machine, whose kernel must have ublk")
    add("command", nargs="+", metavar="COMMAND", help=argparse.SUPPRESS)

    own = sys.argv[1:]
    if "--" not in own and not {"-h", "--help"} & set(own):
        parser.error("-- COMMAND is missing")
    arguments = parser.parse_args(own)
    arguments.share = [parse_mapping(parser, "--share", text, os.path.isdir, "directory") for text in arguments.share]
    arguments.disk = [parse_mapping(parser, "--disk", text, is_image, "file or block device") for text in arguments.disk]
    directories = [mapping[1] for mapping in arguments.share + arguments.disk]
    for directory in directories:
        if directories.count(directory) > 1:
            parser.error(f"{directory} is given twice")
    if min(arguments.cpus, arguments.timeout, arguments.boot_timeout) <= 0:
        parser.error("--cpus, --timeout and --boot-timeout must be positive")
    for text in arguments.kernel_module_param:
        module, dot, rest = text.partition(".")
        if not (module and dot and "=" in rest) or any(c.isspace() or c == '"' for c in text):
            parser.error(f"--kernel-module-param {text}: not of the form MODULE.NAME=VALUE")
    arguments.env = [parse_variable(parser, text) for text in arguments.env]
    return arguments


def is_image(path):
    return os.path.isfile(path) or stat.S_ISBLK(os.stat(path).st_mode) if os.path.exists(path) else False


def parse_mapping(parser, option, text, exists, what):
    """HOST=GUESTDIR[:ro] -> (absolute host path, guest directory, read-only). The last = divides."""
    host, equals, guest = text.rpartition("=")
    read_only = guest.endswith(":ro")
    guest = guest.removesuffix(":ro").removesuffix(":rw")
    if not equals or not host or not guest.startswith("/") or "\n" in guest:
        parser.error(f"{option} {text}: not of the form HOSTPATH=/GUESTDIR[:ro]")
    if not exists(host):
        parser.error(f"{option} {text}: {host} is no {what}")
    guest = os.path.normpath(guest)
    if guest in ("/", "/proc", "/sys", "/dev", "/run", "/usr"):
        parser.error(f"{option} {text}: the guest needs its own {guest}")
    return os.path.abspath(host), guest, read_only


def parse_variable(parser, text):
    name, equals, value = text.partition("=")
    if not equals:
        if name not in os.environ:
            parser.error(f"--env {name}: not set here")
        value = os.environ[name]
    return name, value


class GuestError(Exception):
    """The guest did not boot or died."""


class BootTimedOut(GuestError):
    """The guest did not boot in time: nothing of the command has run."""


class TimedOut(Exception):
    """--timeout has passed."""


def die_with_parent():
    """In a child before exec: SIGKILL when this process goes, even if it was killed itself."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def set_up(kernel):
    """Runs set-up, which does nothing when all is there; returns what it prints."""
    # In a session of its own, so that an interruption reaches all of its processes, once, and it
    # has the time to remove what is half-finished.
    process = subprocess.Popen([SETUP, "--kernel", kernel, "--print"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output = process.communicate()[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
    if process.returncode != 0:
        raise GuestError("set-up failed")
    return output


def locate(kernel):
    """Makes what is missing; returns the paths of all, and a lock that keeps them from removal."""
    while True:
        paths = dict(line.split("=", 1) for line in set_up(kernel).splitlines())
        lock = open(os.path.join(paths["cache"], "use.lock"), "ab")
        fcntl.flock(lock, fcntl.LOCK_SH)
        # A refresh may have come between the two steps.
        if all(os.path.exists(path) for path in paths.values()):
            return paths, lock
        lock.close()


class Guest:
    """QEMU with its virtiofsd processes, from start() to stop()."""

    def __init__(self, arguments, paths):
        self.arguments = arguments
        self.paths = paths
        self.children = []
        self.qemu = None
        self.port = None

    def tool(self, path):
        """Command line that runs a program of the tools with their own loader and libraries."""
        tools = self.paths["tools"]
        return [
            f"{tools}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", f"{tools}/usr/lib/x86_64-linux-gnu",
            f"{tools}/{path}",
        ]

    def spawn(self, command, descriptors, **more):
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=descriptors, start_new_session=True,
            preexec_fn=die_with_parent, **more,
        )
        self.children.append(child)
        return child

    def start(self, serial_log):
        arguments, paths = self.arguments, self.paths
        host_end, guest_end = socket.socketpair()
        self.port = host_end
        job = self.job_archive()
        keep = [guest_end, job]
        command = self.tool("usr/bin/qemu-system-x86_64") + [
            "-L", f"{paths['tools']}/usr/share/qemu", "-L", f"{paths['tools']}/usr/share/seabios",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none",
            "-machine", "q35,memory-backend=memory",
            # Shared, because virtiofsd reads and writes the guest's memory.
            "-object", f"memory-backend-memfd,id=memory,size={arguments.memory},share=on",
            "-m", arguments.memory, "-smp", str(arguments.cpus),
            "-accel", "tcg,thread=multi", "-cpu", "max",
            "-kernel", f"{paths['kernel']}/vmlinuz",
            "-initrd", f"/proc/self/fd/{job}",
            "-append", " ".join(self.kernel_command_line()),
            "-chardev", f"file,id=serial,path=/proc/self/fd/{serial_log.fileno()},append=on", "-serial", "chardev:serial",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,fd={guest_end.fileno()}",
            "-device", "virtserialport,chardev=agent,name=image-accel.guest",
            *disk("root", paths["root"], "snapshot=on,cache=unsafe"),
            *disk("modules", f"{paths['kernel']}/modules.img", "readonly=on"),
        ]
        for number, (path, _, read_only) in enumerate(arguments.disk):
            command += disk(f"disk{number}", path, "readonly=on" if read_only else "cache=writeback")
        for number, (path, _, read_only) in enumerate(arguments.share):
            channel = self.share(number, path, read_only)
            keep.append(channel)
            command += [
                "-chardev", f"socket,id=share{number},fd={channel.fileno()}",
                "-device", f"vhost-user-fs-pci,chardev=share{number},tag=share{number}",
            ]
        descriptors = [serial_log.fileno()] + [fd if isinstance(fd, int) else fd.fileno() for fd in keep]
        if arguments.verbose:
            note("starting " + " ".join(command))
        self.qemu = self.spawn(command, descriptors, stdout=serial_log, stderr=serial_log)
        for fd in keep:
            os.close(fd) if isinstance(fd, int) else fd.close()

    def share(self, number, path, read_only):
        """Starts virtiofsd for one share; returns the socket on which QEMU talks to it."""
        # virtiofsd takes a listening socket; an abstract name leaves nothing in the file system.
        name = f"\0image-accel-guest-{os.getpid()}-{number}-{os.urandom(8).hex()}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
            listener.listen(1)
            # Otherwise the guest forgets a file's pages whenever it is opened: a program is read
            # anew each time it is started, which takes several times as long as starting it.
            cache = "always" if read_only else "auto"
            command = self.tool("usr/libexec/virtiofsd") + [
                f"--fd={listener.fileno()}", f"--shared-dir={path}", "--sandbox=none", "--log-level=error",
                f"--cache={cache}", "--xattr", "--allow-direct-io", "--inode-file-handles=never",
            ]
            if read_only:
                command.append("--readonly")
            self.spawn(command, [listener.fileno()])
            channel = socket.socket(socket.AF_UNIX)
            channel.connect(name)
            return channel

    def kernel_command_line(self):
        # An oops ends the guest: a test must not pass on a kernel that is already broken. Hardware
        # weaknesses and a random load address only cost time under emulation.
        words = ["console=ttyS0", "panic=-1", "oops=panic", "random.trust_cpu=on", "mitigations=off", "nokaslr"]
        return words + self.arguments.kernel_module_param + self.arguments.kernel_arg

    def job_archive(self):
        """A memfd with the initramfs of this kernel and, behind it, what is special to this run."""
        arguments = self.arguments
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "LANG": "C.UTF-8",
            **dict(arguments.env),
        }
        mounts = ""
        for kind, mappings in (("disk", arguments.disk), ("share", arguments.share)):
            for number, (_, directory, read_only) in enumerate(mappings):
                mounts += f"{kind} {kind}{number} {'ro' if read_only else 'rw'}\n{directory}\n"
        archive = Newc()
        for name, target in (("early-init", "init"), ("init", "job/init"), ("agent.py", "job/agent.py")):
            with open(os.path.join(HERE, name), "rb") as file:
                archive.file(target, file.read(), 0o755)
        for name, strings in (
            ("command", arguments.command),
            ("environment", [f"{key}={value}" for key, value in environment.items()]),
            ("directory", [arguments.chdir]),
        ):
            archive.file(f"job/{name}", b"".join(os.fsencode(text) + b"\0" for text in strings))
        archive.file("job/mounts", os.fsencode(mounts))
        memfd = os.memfd_create("initrd")
        with open(os.path.join(self.paths["kernel"], "initrd"), "rb") as file, os.fdopen(memfd, "wb", closefd=False) as out:
            shutil.copyfileobj(file, out)
            out.write(archive.finish())
        return memfd

    def frames(self):
        """Yields (kind, data) as the agent sends them, until the guest is gone."""
        buffer = bytearray()
        while True:
            readable, _, _ = select.select([self.port], [], [], 1.0)
            if readable:
                data = self.port.recv(1 << 20)
                if not data:
                    return
                buffer += data
            elif self.qemu.poll() is not None:
                return
            while len(buffer) >= 5:
                kind, length = struct.unpack_from(">cI", buffer)
                if len(buffer) < 5 + length:
                    break
                frame = bytes(buffer[5 : 5 + length])
                del buffer[: 5 + length]
                yield kind, frame

    def stop(self):
        """Ends every process that was started and waits for it."""
        if self.port is not None:
            self.port.close()
        if self.qemu is not None and self.qemu.poll() is None:
            # SIGTERM makes QEMU close its disks in order.
            self.qemu.terminate()
            try:
                self.qemu.wait(5)
            except subprocess.TimeoutExpired:
                pass
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()


def disk(serial, path, options):
    # A comma ends a value unless it is doubled.
    path = path.replace(",", ",,")
    return [
        "-drive", f"if=none,id={serial},format=raw,discard=unmap,file={path},{options}",
        "-device", f"virtio-blk-pci,drive={serial},serial={serial}",
    ]


def note(text):
    print(f"guest: {text}", file=sys.stderr, flush=True)


def write_all(stream, data):
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(stream.fileno(), view):]
        except BlockingIOError: # the caller's pipe may be non-blocking
            select.select([], [stream], [])


def run_in_guest(guest, serial_log):
    """Returns the command's status."""
    started = time.monotonic()
    booted = False
    # The boot has a limit of its own: how long it takes depends on what else the machine does.
    signal.setitimer(signal.ITIMER_REAL, guest.arguments.boot_timeout)
    try:
        guest.start(serial_log)
        for kind, data in guest.frames():
            if kind == b"O":
                write_all(sys.stdout, data)
            elif kind == b"E":
                write_all(sys.stderr, data)
            elif kind == b"M":
                note(os.fsdecode(data))
            elif kind == b"X":
                return int(data)
            elif kind == b"H":
                booted = True
                signal.setitimer(signal.ITIMER_REAL, guest.arguments.timeout)
                if guest.arguments.verbose:
                    note(f"kernel {os.fsdecode(data)} up after {time.monotonic() - started:.1f} s")
    except TimedOut:
        if booted:
            raise
        raise BootTimedOut(f"the guest did not boot within {guest.arguments.boot_timeout:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    raise GuestError("the guest died under the command" if booted else "the guest did not boot")


def open_log(arguments, paths):
    if arguments.serial_log:
        return open(arguments.serial_log, "w+b")
    directory = os.path.join(paths["cache"], "logs")
    os.makedirs(directory, exist_ok=True)
    logs = sorted((entry.stat().st_mtime, entry.path) for entry in os.scandir(directory))
    for _, path in logs[:-KEPT_LOGS]:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
    name = time.strftime("serial-%Y%m%dT%H%M%S") + f"-{arguments.kernel}-{os.getpid()}.log"
    return open(os.path.join(directory, name), "x+b")


def show_log(log, lines):
    log.seek(0)
    tail = log.read().decode(errors="replace").replace("\r", "").splitlines()[-lines:]
    note(f"the serial log's last {len(tail)} lines; all of it is in {log.name}")
    for line in tail:
        print(f"  | {line}", file=sys.stderr)
    sys.stderr.flush()


def interrupted(number, _frame):
    # Once: clean-up must not be interrupted by an impatient second Ctrl-C.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    raise SystemExit(128 + number)


def alarmed(_number, _frame):
    raise TimedOut


def main():
    arguments = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    signal.signal(signal.SIGALRM, alarmed)
    if arguments.native:
        return run_native(arguments, note)
    try:
        paths, lock = locate(arguments.kernel)
    except GuestError as error:
        note(str(error))
        return GUEST_FAILED
    with lock, open_log(arguments, paths) as log:
        guest = Guest(arguments, paths)
        keep_log = bool(arguments.serial_log)
        try:
            try:
                try:
                    status = run_in_guest(guest, log)
                except BootTimedOut as error:
                    # The kernel of an emulated machine loses a wake-up at times, and waits for
                    # ever. Another attempt is as good as the first.
                    note(f"{error}; once more")
                    guest.stop()
                    guest = Guest(arguments, paths)
                    status = run_in_guest(guest, log)
                if status != 0:
                    keep_log = True
                    note(f"the command's status is {status}; serial log: {log.name}")
            except TimedOut:
                note(f"killed after {arguments.timeout:g} s (--timeout)")
                status = TIMED_OUT
            except GuestError as error:
                note(str(error))
                status = GUEST_FAILED
            except BrokenPipeError:
                status = 128 + signal.SIGPIPE
            guest.stop()
            if status in (TIMED_OUT, GUEST_FAILED):
                keep_log = True
                show_log(log, TAIL_LINES)
            return status
        finally:
            guest.stop()
            if not keep_log:
                os.unlink(log.name)


if __name__ == "__main__":
    sys.exit(main())
