#!/usr/bin/python3
"""Measures ways to serve one EROFS image, on the machine that this runs on.

usage: bench_device.py OPTIONS
(see --help; `tools/bench-device` runs it in the test guest and shows what it prints)

Prints JSON: {"kernel": ..., "rows": [{"target", "round", "part", "row", NAME: VALUE...}]}.
Times are in microseconds, rates in operations or bytes per second, sizes in bytes.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20

# name, block size, depth, pattern
JOBS = [
    ("4 KiB random, depth 1", "4k", 1, "randread"),
    ("4 KiB random, depth 32", "4k", 32, "randread"),
    ("128 KiB sequential, depth 1", "128k", 1, "read"),
    ("512 KiB sequential, depth 8", "512k", 8, "read"),
]


def say(text):
    print(f"bench-device: {text}", file=sys.stderr, flush=True)


def run(*command, **more):
    result = subprocess.run(command, capture_output=True, text=True, **more)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({result.returncode}):\n{result.stdout}{result.stderr}")
    return result.stdout


def settle():
    """udev looks at new devices, where there is one."""
    if shutil.which("udevadm"):
        run("udevadm", "settle")


def read_ahead(path, kib):
    """Has the kernel read ahead so much of a block device."""
    with open(f"/sys/block/{os.path.basename(path)}/queue/read_ahead_kb", "w") as file:
        file.write(kib)


def mount_erofs(path, point, options):
    """mount(2), as ublk-server's client does it: mount(8) makes a loop device of a file."""
    read_only = 1
    libc = ctypes.CDLL(None, use_errno=True)
    words = [os.fsencode(word) for word in (path, point, "erofs")]
    if libc.mount(*words, ctypes.c_ulong(read_only), options.encode() if options else None):
        raise SystemExit(f"cannot mount {path} ({options or 'no options'}): {os.strerror(ctypes.get_errno())}")


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def children_of(pid):
    found = [pid]
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            for child in file.read().split():
                found += children_of(int(child))
    return found


class Usage:
    """What processes have used so far: CPU seconds, context switches, by thread."""

    TICK = os.sysconf("SC_CLK_TCK")

    def __init__(self, pids):
        self.cpu, self.switches = 0.0, 0
        for pid in pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                base = f"/proc/{pid}/task/{task}"
                try:
                    # Nanoseconds on a CPU; `stat` counts in ticks.
                    self.cpu += int(open(f"{base}/schedstat").read().split()[0]) / 1e9
                except (OSError, IndexError):
                    fields = open(f"{base}/stat").read().rpartition(")")[2].split()
                    self.cpu += (int(fields[11]) + int(fields[12])) / self.TICK
                for line in open(f"{base}/status"):
                    if "ctxt_switches" in line:
                        self.switches += int(line.split()[1])

    def __sub__(self, other):
        return self.cpu - other.cpu, self.switches - other.switches


def resident(pids):
    """Memory of the processes: their own pages, and shared ones once."""
    total = {"Pss_Anon": 0, "Pss_Shmem": 0, "Pss_File": 0}
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in total:
                    total[name] += int(rest.split()[0]) * 1024
    return sum(total.values())


class Syscalls:
    """Counts system calls by thread, where the kernel can."""

    TRIGGER = "/sys/kernel/tracing/events/raw_syscalls/sys_enter/trigger"
    HISTOGRAM = "/sys/kernel/tracing/events/raw_syscalls/sys_enter/hist"

    def start(self):
        try:
            with open(self.TRIGGER, "w") as file:
                file.write("hist:keys=common_pid:size=4096")
            return True
        except OSError:
            return False

    def stop(self, pids):
        tasks = set()
        for pid in pids:
            tasks.update(os.listdir(f"/proc/{pid}/task"))
        counted = 0
        with open(self.HISTOGRAM) as file:
            for line in file:
                match = re.search(r"common_pid:\s*(\d+)\s*\}\s*hitcount:\s*(\d+)", line)
                if match and match[1] in tasks:
                    counted += int(match[2])
        with open(self.TRIGGER, "w") as file:
            file.write("!hist:keys=common_pid:size=4096")
        return counted


def fio(path, bs, depth, pattern, *more, under=()):
    """Runs one job, as `under` does where that is the beginning of a command; gives its figures."""
    output = run(
        *under, "fio", "--name=job", f"--filename={path}", "--readonly", "--direct=1", f"--bs={bs}", f"--iodepth={depth}",
        f"--rw={pattern}", "--ioengine=io_uring", "--output-format=json", "--randrepeat=0", "--norandommap",
        "--percentile_list=50:99:99.9", *more,
    )
    read = json.loads(output[output.index("{"):])["jobs"][0]["read"]
    latency = read["clat_ns"]
    percentiles = latency.get("percentile", {})
    return {
        "operations": read["total_ios"],
        "iops": read["iops"],
        "bytes_per_second": read["bw_bytes"],
        "mean": latency["mean"] / 1000,
        "p50": percentiles.get("50.000000", 0) / 1000,
        "p99": percentiles.get("99.000000", 0) / 1000,
        "p99.9": percentiles.get("99.900000", 0) / 1000,
    }


class Target:
    """One way to serve the image. `path` is a block device, or a file."""

    name = "?"
    path = None
    process = None
    mount_options = ""
    # KiB that the kernel reads ahead, if it is not to choose.
    read_ahead = None
    # Whether it is worth measuring without a file system on it.
    is_device = True

    def __init__(self, options, scratch):
        self.options, self.scratch = options, scratch

    def start(self):
        raise NotImplementedError

    def begin(self):
        """Starts it as it is to be measured."""
        self.start()
        if self.read_ahead:
            read_ahead(self.path, self.read_ahead)

    def stop(self):
        raise NotImplementedError

    def await_huge_pages(self):
        """Waits until the server has put into huge pages what it will."""

    def pids(self):
        return children_of(self.process.pid) if self.process else []

    def end_process(self):
        if self.process:
            self.process.terminate()
            self.process.wait(60)
            self.process = None


class Loop(Target):
    name = "loop"

    def start(self):
        self.path = run("losetup", "--find", "--show", "--read-only", self.options.erofs).strip()

    def stop(self):
        run("losetup", "--detach", self.path)


class PlainFile(Target):
    """The image as a file on the disk, for EROFS to mount as it is."""

    is_device = False

    def __init__(self, options, scratch, name, mount_options):
        super().__init__(options, scratch)
        self.name, self.mount_options = name, mount_options

    def start(self):
        self.path = self.options.erofs

    def stop(self):
        pass


class CopyOnly(Target):
    """The benchmark's own server; `arguments` chooses among its variants."""

    def __init__(self, options, scratch, name="copy-only", arguments=()):
        super().__init__(options, scratch)
        self.name, self.arguments = name, arguments

    def start(self):
        self.process = subprocess.Popen(
            [f"{self.options.programs}/copy-only", self.options.erofs, *self.arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.path = self.process.stdout.readline().strip()
        if not self.path:
            raise SystemExit("copy-only did not start")
        settle()

    def stop(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process = None


class Nbd(Target):
    name = "nbd"

    def start(self):
        self.path = "/dev/nbd0"
        # It goes on in the background when it is connected.
        subprocess.run(
            [self.options.nbd, "--read-only", "--format=raw", "--persistent", f"--connect={self.path}",
             f"--pid-file={self.scratch}/nbd.pid", self.options.erofs],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        for _ in range(600):
            if open("/sys/block/nbd0/size").read().strip() != "0":
                break
            time.sleep(0.1)
        settle()

    def pids(self):
        return [int(open(f"{self.scratch}/nbd.pid").read())]

    def stop(self):
        (pid,) = self.pids()
        run(self.options.nbd, "--disconnect", self.path)
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.05)


class Ours(Target):
    def __init__(self, options, scratch, transport, program="ublk-server", name=None, mount_options=""):
        super().__init__(options, scratch)
        self.mount_options = mount_options
        self.transport, self.name = transport, name or f"ours, {transport}"
        self.program = f"{options.programs}/{program}"
        self.socket = f"{scratch}/{re.sub('[^a-z0-9]+', '-', self.name)}.socket"
        self.environment, self.arguments = {}, []

    def client(self, command, *arguments):
        return run(self.program, command, "--socket", self.socket, *arguments)

    def serve(self, ufs=None):
        log = open(f"{self.socket}.log", "a")
        self.process = subprocess.Popen(
            [self.program, "serve", "--ufs", ufs or self.options.ufs, "--socket", self.socket, "--transport", self.transport,
             "--cache-size", self.options.cache_size, *self.options.serve,
             *self.arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "RUST_LOG": "warn", **self.environment})
        for _ in range(600):
            if os.path.exists(self.socket) and subprocess.run(
                    [self.program, "list", "--socket", self.socket], capture_output=True).returncode == 0:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise SystemExit("ublk-server does not answer:\n" + open(log.name).read())

    def start(self):
        self.serve()
        self.path = self.client("attach", self.options.layer).split()[-1]
        settle()

    def await_huge_pages(self):
        before, now = None, ""
        while now != before:
            time.sleep(3)
            before, now = now, re.findall("^image_accel_cache_huge_bytes .*", self.client("metrics"), re.M)

    def stop(self):
        self.client("detach", self.options.layer)
        self.end_process()


def targets_of(options, scratch):
    made = {
        "loop": lambda: Loop(options, scratch),
        "ublk": lambda: Ours(options, scratch, "ublk"),
        "fuse": lambda: Ours(options, scratch, "fuse"),
        "fuse-directio": lambda: Ours(options, scratch, "fuse", name="ours, fuse, directio", mount_options="directio"),
        "nbd": lambda: Nbd(options, scratch),
        "file": lambda: PlainFile(options, scratch, "file", ""),
        "file-directio": lambda: PlainFile(options, scratch, "file, directio", "directio"),
    }
    targets = []
    for word in options.targets.split(","):
        name, _, more = word.partition(":")
        settings = more.split("+") if more else []
        ahead = [setting for setting in settings if setting.startswith("read_ahead_kb=")]
        settings = [setting for setting in settings if setting not in ahead]
        if name == "copy-only":
            target = CopyOnly(options, scratch, word, settings)
        elif name in ("ublk", "fuse") and more:
            # The first word names another program.
            program = settings.pop(0) if settings and re.match("[a-z][^=]*$", settings[0]) else ""
            target = Ours(options, scratch, name, program or "ublk-server", word)
            target.arguments = [setting for setting in settings if setting.startswith("--")]
            settings = [setting for setting in settings if setting not in target.arguments]
            target.environment = dict(setting.split("=", 1) for setting in settings)
        else:
            target = made[name]()
            if more:
                target.name = word
        if ahead:
            target.read_ahead = ahead[-1].partition("=")[2]
        targets.append(target)
    return targets


def warm(target):
    """Has the server read everything once, so that it has it in memory, and sees to it that
    it is the image."""
    read = f"dd if={target.path} bs=1M iflag=direct status=none | cmp - {target.options.erofs}"
    run("bash", "-o", "pipefail", "-c", read)
    run("dd", f"if={target.path}", "of=/dev/null", "bs=1M", "iflag=direct")
    target.await_huge_pages()


class Bench:
    def __init__(self, options, scratch):
        self.options, self.scratch = options, scratch
        self.rows = []
        self.syscalls = Syscalls()

    def note(self, target, number, part, row, **figures):
        self.rows.append({"target": target.name, "round": number, "part": part, "row": row, **figures})
        if self.options.verbose:
            shown = " ".join(f"{k}={v:,.1f}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
            say(f"{part} {number} | {row} | {target.name}: {shown}")

    def device_warm(self, targets):
        targets = [target for target in targets if target.is_device]
        seconds = f"--runtime={int(self.options.seconds * 1000)}ms"
        for target in targets:
            target.begin()
            warm(target)
        for number in range(self.options.rounds):
            for row, bs, depth, pattern in JOBS:
                # Who is first changes with every round.
                order = targets[number % len(targets):] + targets[:number % len(targets)]
                for target in order:
                    pids = target.pids()
                    before = Usage(pids)
                    figures = fio(target.path, bs, depth, pattern, "--time_based", seconds, "--ramp_time=500ms")
                    cpu, switches = Usage(pids) - before
                    # The ramp's operations are not counted by fio.
                    share = self.options.seconds / (self.options.seconds + 0.5)
                    if pids:
                        figures["cpu_per_operation"] = cpu * 1e6 * share / max(1, figures["operations"])
                        figures["switches_per_operation"] = switches * share / max(1, figures["operations"])
                    self.note(target, number, "cached", row, **figures)
        for row, bs, depth, pattern in JOBS:
            for target in targets:
                pids = target.pids()
                if pids and self.syscalls.start():
                    figures = fio(target.path, bs, depth, pattern, "--number_ios=1000")
                    counted = self.syscalls.stop(pids)
                    self.note(target, 0, "syscalls", row, per_operation=counted / max(1, figures["operations"]))
        for target in targets:
            pids = target.pids()
            if pids:
                before = Usage(pids)
                time.sleep(2)
                cpu, switches = Usage(pids) - before
                self.note(target, 0, "idle", "two seconds", cpu=cpu, switches=switches)
                self.note(target, 0, "memory", "resident", bytes=resident(pids))

    def device_cold(self, targets):
        targets = [target for target in targets if target.is_device]
        for number in range(self.options.rounds):
            for row, bs, depth, pattern in JOBS:
                for target in targets:
                    target.begin()
                    drop_caches()
                    count = "--number_ios=400" if pattern == "randread" else "--size=128M"
                    figures = fio(target.path, bs, depth, pattern, count)
                    self.note(target, number, "cold", row, **figures)
                    target.stop()

    def profile(self, targets):
        """What the processors do while a job runs, one request at a time: their time for each
        operation by thread, and by the functions that take most; fio's own start is in it."""
        data = f"{self.scratch}/perf.data"
        record = (self.options.perf, "record", "--quiet", "--all-cpus", "--event=cpu-clock", "--freq=997", f"--output={data}", "--")
        report = (self.options.perf, "report", f"--input={data}", "--stdio", "--sort=comm,sym", "--fields=overhead,comm,sym",
                  "--field-separator=|")
        jobs = [job for job in JOBS if job[0].endswith("depth 1")]
        for target in (target for target in targets if target.is_device):
            for state in ("cached", "cold"):
                for row, bs, depth, pattern in jobs:
                    target.begin()
                    if state == "cached":
                        warm(target)
                        much = ("--time_based", f"--runtime={int(self.options.seconds * 1000)}ms")
                    else:
                        drop_caches()
                        much = ("--number_ios=400" if pattern == "randread" else "--size=128M",)
                    figures = fio(target.path, bs, depth, pattern, *much, under=record)
                    target.stop()
                    text = run(*report)
                    sampled = re.search(r"^# Event count \(approx\.\): ([0-9]+)", text, re.M)
                    whole = int(sampled[1] if sampled else 0) / 1000 / max(1, figures["operations"])
                    threads, functions = {}, {}
                    for line in text.splitlines():
                        found = re.match(r"\s*([0-9.]+)%\s*\|\s*(\S.*?)\s*\|\s*(?:\[(.)\] )?(.*?)\s*$", line)
                        if found and found[2] != "swapper":
                            share, thread, where, function = float(found[1]) / 100 * whole, *found.groups()[1:]
                            # Numbered ones are alike.
                            thread = re.sub(r"[-/:]?[0-9][0-9a-zA-Z:/+_-]*$", "", thread)
                            threads[thread] = threads.get(thread, 0) + share
                            key = (thread, "kernel" if where == "k" else "program", function)
                            functions[key] = functions.get(key, 0) + share
                    if not threads:
                        raise SystemExit(f"perf has seen nothing:\n{text}")
                    most = sorted(functions.items(), key=lambda item: -item[1])[:16]
                    self.note(target, 0, f"profile, {state}", row, mean=figures["mean"], threads=threads,
                              functions=[[share, *key] for key, share in most])

    def timed(self, *command):
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - start

    def files(self, targets):
        """Through EROFS: the kernel's cache of the mount is cold; what is below is warm,
        or cold too."""
        point = f"{self.scratch}/mnt"
        os.makedirs(point, exist_ok=True)

        def mount(target):
            if stat.S_ISBLK(os.stat(target.path).st_mode):
                # Whoever has a device open, as qemu-nbd has, keeps what the kernel has of it.
                run("blockdev", "--flushbufs", target.path)
            elif isinstance(target, Ours):
                # The kernel's cache of the file below is part of the mount.
                with open(target.path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mount_erofs(target.path, point, target.mount_options)

        def once(target, part, number):
            mount(target)
            walk = self.timed("find", point, "-newermt", "2099-01-01")
            self.note(target, number, part, "walk the tree", seconds=walk)
            run("umount", point)
            mount(target)
            read = self.timed("sh", "-c", f"find {point} -type f -print0 | xargs -0 cat")
            self.note(target, number, part, "read every file", seconds=read)
            run("umount", point)

        for target in targets:
            target.begin()
            warm(target)
        for number in range(self.options.rounds):
            for target in targets:
                once(target, "files cached", number)
        for target in targets:
            target.stop()
        for number in range(self.options.rounds):
            for target in targets:
                target.begin()
                drop_caches()
                once(target, "files cold", number)
                target.stop()

    def mounts(self, targets):
        point = f"{self.scratch}/root"
        os.makedirs(point, exist_ok=True)
        for number in range(self.options.rounds):
            for image in self.options.image:
                for target in targets:
                    if not isinstance(target, Ours):
                        continue
                    ufs, _, digest = image.partition("=")
                    target.serve(ufs)
                    drop_caches()
                    # The client itself shall be in memory.
                    target.client("list")
                    run("ls", "/")
                    start = time.monotonic()
                    target.client("mount", digest, point)
                    mounted = time.monotonic()
                    run("ls", f"{point}/")
                    listed = time.monotonic()
                    status = json.loads(target.client("status", "--json"))
                    self.note(
                        target, number, "mount", f"image {self.options.image.index(image)}", mount=mounted - start, seconds=listed - start,
                        fetched=status["fetched_bytes"])
                    target.client("unmount", point)
                    target.end_process()


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--programs", required=True, help="directory with ublk-server and copy-only")
    add("--ufs", required=True)
    add("--erofs", required=True, help="the layer's image on UFS")
    add("--layer", required=True, help="the layer's diffID")
    add("--image", action="append", default=[], metavar="UFS=DIGEST",
        help="an image for the mount times; may be repeated")
    add("--nbd", help="qemu-nbd")
    add("--perf", help="perf")
    add("--cache-size", default="512M")
    add("--serve", action="append", default=[], help="a further argument of ublk-server serve")
    add("--targets", default="loop,copy-only,ublk,fuse,nbd")
    add("--parts", default="cached,cold,files,mount")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=3)
    add("--verbose", action="store_true")
    options = parser.parse_args()

    scratch = tempfile.mkdtemp(prefix="bench-device.")
    bench = Bench(options, scratch)
    targets = targets_of(options, scratch)
    parts = options.parts.split(",")
    try:
        if "cached" in parts:
            bench.device_warm(targets)
            for target in filter(lambda target: target.is_device, targets):
                target.stop()
        if "files" in parts:
            bench.files(targets)
        if "cold" in parts:
            bench.device_cold(targets)
        if "mount" in parts:
            bench.mounts(targets)
        if "profile" in parts:
            bench.profile(targets)
        for name in os.listdir(scratch):
            if name.endswith(".log") and (text := open(f"{scratch}/{name}").read()):
                say(f"{name}:\n{text[-4000:]}")
    finally:
        for target in targets:
            if target.process:
                target.process.kill()
    shutil.rmtree(scratch, ignore_errors=True)
    json.dump({"kernel": os.uname().release, "rows": bench.rows}, sys.stdout)


main()
