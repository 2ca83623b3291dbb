"""Runs the command inside the guest and reports to the host over one virtio-serial port.

One port for everything keeps the order: the exit status is the last frame, so whoever has read it
has all output. A frame is a kind (1 byte), a length (4 bytes, big-endian) and that many bytes:

    H  the guest is up; kernel release
    O  a piece of standard output
    E  a piece of standard error
    M  a remark of the guest itself (the host prefixes it and prints it on standard error)
    X  exit status in decimal, 128 + N for a command that signal N ended; nothing follows

The host sends nothing.
"""

import os
import selectors
import signal
import struct
import subprocess
import time

JOB = "/run/guest"
PORT_NAME = "image-accel.guest"


def open_port():
    for port in os.listdir("/sys/class/virtio-ports"):
        with open(f"/sys/class/virtio-ports/{port}/name") as file:
            if file.read().strip() == PORT_NAME:
                return os.open(f"/dev/{port}", os.O_RDWR | os.O_CLOEXEC)
    raise SystemExit(f"guest: no virtio-serial port named {PORT_NAME}")


def send(port, kind, data):
    frame = memoryview(struct.pack(">cI", kind, len(data)) + data)
    while frame:
        frame = frame[os.write(port, frame):]


def read_strings(name):
    """Strings, each ended by a NUL."""
    with open(os.path.join(JOB, name), "rb") as file:
        return file.read().split(b"\0")[:-1]


def start(port):
    """Starts the command; returns (process, stdout, stderr), or a status when it cannot start."""
    environment = dict(item.split(b"=", 1) for item in read_strings("environment"))
    command = read_strings("command")
    directory = read_strings("directory")[0]
    try:
        return subprocess.Popen(
            command, env=environment, cwd=directory, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True,
        )
    except OSError as error:
        send(port, b"M", f"cannot run {os.fsdecode(command[0])}: {error}".encode())
        return 127 if isinstance(error, FileNotFoundError) else 126


def forward(port, process):
    """Passes output on until the command has ended and what it wrote has been read.

    A process that the command left behind may hold the pipes open: it is not waited for.
    """
    selector = selectors.DefaultSelector()
    for pipe, kind in ((process.stdout, b"O"), (process.stderr, b"E")):
        os.set_blocking(pipe.fileno(), False)
        selector.register(pipe, selectors.EVENT_READ, kind)
    ended = os.pidfd_open(process.pid)
    selector.register(ended, selectors.EVENT_READ, None)
    over = False
    while selector.get_map():
        ready = selector.select(0 if over else None)
        pipes = [(key.fileobj, key.data) for key, _ in ready if key.data]
        if not pipes and over:
            return
        for pipe, kind in pipes:
            data = os.read(pipe.fileno(), 1 << 18)
            if data:
                send(port, kind, data)
            else:
                selector.unregister(pipe)
        if not over and any(key.data is None for key, _ in ready):
            over = True
            selector.unregister(ended)


def wait_bounded(process, seconds):
    """A process stuck in the kernel cannot be killed, so it is left behind at the deadline."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)
    return process.returncode


def settle_mounts(port):
    """Takes the shares and disks off, so that what was written is on the host."""
    with open(os.path.join(JOB, "mounts")) as file:
        directories = file.read().splitlines()[1::2]
    if not directories:
        return
    os.chdir("/")
    for number in (signal.SIGTERM, signal.SIGKILL):
        for directory in reversed(directories):
            wait_bounded(subprocess.Popen(["umount", "--recursive", "--quiet", directory], stderr=subprocess.DEVNULL), 10)
        directories = [directory for directory in directories if os.path.ismount(directory)]
        if not directories:
            return
        # What the command left running may hold them: everything but process 1 and this one.
        os.kill(-1, number)
        time.sleep(0.5)
    for directory in reversed(directories):
        process = subprocess.Popen(["umount", "--recursive", directory], stderr=subprocess.PIPE)
        if wait_bounded(process, 10) != 0:
            wait_bounded(subprocess.Popen(["sync", "--file-system", directory]), 10)
            send(port, b"M", f"{directory} could not be unmounted; what was written last may be missing".encode())


def main():
    with open(os.path.join(JOB, "go")) as file:
        if file.read() != "go\n":
            raise SystemExit("guest: init gave up")
    port = open_port()
    send(port, b"H", os.uname().release.encode())
    process = start(port)
    if isinstance(process, int):
        status = process
    else:
        forward(port, process)
        status = process.wait()
        if status < 0:
            status = 128 - status
    settle_mounts(port)
    send(port, b"X", str(status).encode())
    # The host ends the guest now.
    time.sleep(60)


main()
