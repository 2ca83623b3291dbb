#!/usr/bin/python3
"""Does what the doctor says, as far as it is about files; prints the rest.

usage: mend.py REPORT CHECK

REPORT is what `accel-snapshotter doctor --json` has printed. Values that CHECK's finding
wants in TOML files, or out of them, are written. Prints a line for each other step: "run"
and a command, or "do" and what a person is told.
"""

import json
import sys
import tomllib


def value(found):
    """A value as TOML writes it, on one line."""
    if isinstance(found, bool):
        return str(found).lower()
    if isinstance(found, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {value(one)}" for key, one in found.items()) + "}"
    if isinstance(found, list):
        return "[" + ", ".join(value(one) for one in found) + "]"
    return json.dumps(found)


def text(table, names=()):
    """A table as TOML: its values, then its tables."""
    inner = {key: one for key, one in table.items() if isinstance(one, dict)}
    lines = [f"{json.dumps(key)} = {value(one)}" for key, one in table.items() if key not in inner]
    if names and (lines or not inner):
        lines.insert(0, "[" + ".".join(json.dumps(name) for name in names) + "]")
    for key, one in inner.items():
        lines += text(one, (*names, key))
    return lines


def change(step, new):
    """Sets the value that a step is about, or with None removes it."""
    with open(step["file"], "rb") as file:
        whole = tomllib.load(file)
    table = whole
    for name in step["table"]:
        table = table.setdefault(name, {})
    if new is None:
        table.pop(step["key"], None)
    else:
        table[step["key"]] = new
    with open(step["file"], "w", encoding="utf-8") as file:
        file.write("\n".join(text(whole)) + "\n")


def main():
    report, check = sys.argv[1:]
    with open(report, encoding="utf-8") as file:
        findings = json.load(file)["findings"]
    steps = [step for one in findings if one["check"] == check for step in one["mend"]]
    if not steps:
        sys.exit(f"nothing is said about {check}")
    for step in steps:
        (kind, what), = step.items()
        if kind == "set":
            change(what, what["value"])
        elif kind == "remove":
            change(what, None)
        else:
            print(kind, what)


main()
