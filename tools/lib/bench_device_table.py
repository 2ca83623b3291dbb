#!/usr/bin/python3
"""Shows what bench_device.py has measured, as tables in Markdown.

usage: bench_device_table.py LOG RESULT...

LOG gets all figures of all RESULTs.
"""

import json
import platform
import statistics
import sys
from collections import defaultdict

log, *paths = sys.argv[1:]
results = [json.load(open(path)) for path in paths]
json.dump({"host": platform.release(), "results": results}, open(log, "w"), indent=1)


def ordered(values):
    return list(dict.fromkeys(values))


def table(title, columns, lines):
    print(f"\n{title}\n")
    print("|", " | ".join(["", *columns]), "|")
    print("|" + "---|" * (len(columns) + 1))
    for name, cells in lines:
        print("|", " | ".join([name, *cells]), "|")


for result in results:
    rows = result["rows"]
    targets = ordered(row["target"] for row in rows)
    by = defaultdict(dict)
    for row in rows:
        by[row["part"], row["row"], row["target"]][row["round"]] = row

    def figures(part, row, target, name):
        found = by[part, row, target]
        return {number: figure[name] for number, figure in found.items() if name in figure}

    def median(*what):
        values = list(figures(*what).values())
        return statistics.median(values) if values else None

    def ratio(part, row, target, name, inverse=False):
        """To loop, round by round: both saw the same machine."""
        ours, loop = figures(part, row, target, name), figures(part, row, "loop", name)
        pairs = [ours[number] / loop[number] for number in ours if number in loop]
        if not pairs:
            return ""
        return f" ({statistics.median(1 / pair if inverse else pair for pair in pairs):.2f})"

    def rows_of(part):
        return ordered(row["row"] for row in rows if row["part"] == part)

    print(f"\n**Linux {result['kernel']}**")
    for part, title in [
        ("cached", "Device, bytes in the server's memory (in brackets: speed, loop = 1)"),
        ("cold", "Device, bytes on the disk"),
    ]:
        lines = []
        for row in rows_of(part):
            cells = []
            for target in targets:
                name, scale, unit = ("bytes_per_second", 2**20, "MiB/s") if "sequential" in row else (
                    ("mean", 1, "µs") if "depth 1" in row else ("iops", 1, "IOPS"))
                value = median(part, row, target, name)
                if value is None:
                    cells.append("–")
                else:
                    cells.append(f"{value / scale:,.0f} {unit}{ratio(part, row, target, name, name == 'mean')}")
            lines.append((row, cells))
        if lines:
            table(title, targets, lines)
    lines = []
    for row in rows_of("cached"):
        if row.endswith("depth 1"):
            cells = []
            for target in targets:
                values = [median("cached", row, target, name) for name in ("p50", "p99", "p99.9")]
                cells.append(" / ".join(f"{value:,.0f}" for value in values) if values[0] is not None else "–")
            lines.append((row, cells))
    if lines:
        table("Latency at depth 1, bytes in memory: p50 / p99 / p99.9 in µs", targets, lines)
    lines = []
    for row in rows_of("cached"):
        cells = []
        for target in targets:
            cpu = median("cached", row, target, "cpu_per_operation")
            switches = median("cached", row, target, "switches_per_operation")
            calls = median("syscalls", row, target, "per_operation")
            cells.append("–" if cpu is None else
                         f"{calls or 0:.2f} / {switches:.2f} / {cpu:,.0f} µs")
        lines.append((row, cells))
    if lines:
        table("The server per operation: system calls / context switches / CPU time", targets, lines)
    lines = []
    for target in targets:
        memory, idle = median("memory", "resident", target, "bytes"), median("idle", "two seconds", target, "cpu")
        if memory is not None:
            lines.append((target, [f"{memory / 2**20:,.0f} MiB", f"{idle * 1000:,.1f} ms"]))
    if lines:
        table("Servers", ["resident with the image cached", "CPU time in two idle seconds"], lines)
    lines = []
    for part in ("files cached", "files cold"):
        for row in rows_of(part):
            cells = []
            for target in targets:
                value = median(part, row, target, "seconds")
                cells.append("–" if value is None else f"{value:,.2f} s{ratio(part, row, target, 'seconds', True)}")
            lines.append((f"{row}, {part.split()[1]}", cells))
    if lines:
        table("Files through EROFS", targets, lines)
    for part in ordered(row["part"] for row in rows if row["part"].startswith("profile")):
        for row in rows_of(part):
            found = {target: by[part, row, target][0] for target in targets if by[part, row, target]}
            threads = ordered(thread for figure in found.values() for thread in figure["threads"])
            threads.sort(key=lambda thread: -max(figure["threads"].get(thread, 0) for figure in found.values()))
            lines = [("latency", [f"{figure['mean']:,.0f} µs" for figure in found.values()])]
            for thread in threads[:10]:
                lines.append((thread, [f"{figure['threads'].get(thread, 0):,.0f} µs" for figure in found.values()]))
            table(f"{row}, {part.split()[1]}: processor time for each operation, by thread; fio's has its start", found, lines)
            for target, figure in found.items():
                print(f"\n{target}, the functions that take most:\n")
                for share, thread, where, function in figure["functions"]:
                    print(f"* {share:,.0f} µs {thread}: {function} ({where})")
    lines = []
    mounted = ordered(row["target"] for row in rows if row["part"] == "mount")
    for row in rows_of("mount"):
        cells = []
        for target in mounted:
            seconds, fetched = (median("mount", row, target, name) for name in ("seconds", "fetched"))
            cells.append(f"{seconds:,.2f} s, {fetched / 2**20:,.1f} MiB read")
        lines.append(({"image 0": "250 MB", "image 1": "7 GB"}.get(row, row), cells))
    if lines:
        table("From `mount` to the first `ls`", mounted, lines)
print(f"\nHost: Linux {platform.release()}. Every figure: {log}")
