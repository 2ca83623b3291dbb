#!/usr/bin/python3
"""Runs programs in turns and measures them.

usage: alternate.py --runs N --input FILE --output DIR NAME=PROGRAM...

Prints JSON: for each NAME a list of runs, each with `wall` and `cpu` (user and
system, of the program and all that it waited for) in seconds and `memory` (the
largest resident set of any of these processes) in bytes.

Before each run FILE is read, so that it is in memory, what is in DIR is removed,
and the file systems are synced. Who is first changes with every round. Once, before
the first round, each program runs without being measured.
"""

import argparse
import json
import os
import shutil
import sys
import time


def prepare(source, output):
    for entry in os.scandir(output):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        else:
            os.unlink(entry)
    os.sync()
    with open(source, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def measure(program):
    start = time.monotonic()
    pid = os.posix_spawn(program, [program], os.environ)
    _, status, usage = os.wait4(pid, 0)
    wall = time.monotonic() - start
    if status:
        sys.exit(f"{program} failed (wait status {status})")
    # Linux counts ru_maxrss in KiB.
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("programs", nargs="+")
    arguments = parser.parse_args()
    programs = [program.split("=", 1) for program in arguments.programs]
    runs = {name: [] for name, _ in programs}
    for number in range(arguments.runs + 1):
        for name, program in programs if number % 2 else programs[::-1]:
            prepare(arguments.input, arguments.output)
            run = measure(program)
            if number:
                runs[name].append(run)
    prepare(arguments.input, arguments.output)
    json.dump(runs, sys.stdout)


main()
