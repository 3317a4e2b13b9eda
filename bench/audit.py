"""Known vulnerabilities, by pip-audit, and licences of the packages that CI locks: one row a package, in bench/results/audit.csv.

pip-audit asks PyPI's advisories, and OSV where PyPI does not answer; it runs in an environment of its own, as a tool and no dependency. A package
that neither knows, and any if no service can be reached, is "not asked", which is not "none": the script says how many. Licences are those that the
installed packages declare. Exit code 1 for a vulnerability, 3 where something could not be asked, 0 otherwise.

    python bench/audit.py                                      makes the environment (needs an index of packages)
    python bench/audit.py --tool PATH/pip-audit --out FILE     with a pip-audit that is there
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lock import LOCK, read
from rows import write_rows

FIELDS = ["package", "version", "vulnerabilities", "fixed_in", "asked", "licence"]
SERVICES = ("pypi", "osv")
OUT = LOCK.parent.parent / "bench" / "results" / "audit.csv"
NOT_ASKED = "not asked"


def made(place: Path) -> Path:
    """pip-audit in a venv of its own."""
    venv.create(place, with_pip=True)
    subprocess.run([place / "bin" / "python", "-m", "pip", "install", "-q", "pip-audit"], check=True)
    return place / "bin" / "pip-audit"


def ask(tool: Path, versions: Mapping[str, str], service: str, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Vulnerabilities by package of those that the service knows; empty where it cannot be reached."""
    (work / "lock.txt").write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), "utf-8")
    command = [
        tool,
        "-r",
        work / "lock.txt",
        "--no-deps",
        "--disable-pip",
        "-s",
        service,
        "-f",
        "json",
        "--progress-spinner",
        "off",
        "--timeout",
        "15",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no answer"]
        print(f"{service} could not be asked: {lines[-1][:200]}", file=sys.stderr)
        return {}
    return {each["name"]: each["vulns"] for each in found if "skip_reason" not in each}


def licence(name: str) -> str:
    """What an installed package declares: its SPDX expression, else its classifiers, else the first line of its licence."""
    try:
        told = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "not installed here"
    kinds = [kind.rpartition(" :: ")[2] for kind in told.get_all("Classifier") or [] if kind.startswith("License ::")]
    first = (told.get("License") or "").strip().splitlines()
    return told.get("License-Expression") or "; ".join(kinds) or (first[0][:60] if first else "none declared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", type=Path, help="a pip-audit that is there")
    parser.add_argument("--out", type=Path, default=OUT)
    asked, versions = parser.parse_args(), read()
    answers: dict[str, list[dict[str, Any]]] = {}
    by: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tool = asked.tool or made(Path(folder) / "venv")
        for service in SERVICES:
            left = {name: version for name, version in versions.items() if name not in answers}
            new = ask(tool, left, service, Path(folder)) if left else {}
            answers, by = answers | new, by | dict.fromkeys(new, service)
    rows = [
        {
            "package": name, "version": version, "licence": licence(name), "asked": by.get(name, NOT_ASKED),
            "vulnerabilities": " ".join(v["id"] for v in answers.get(name, [])) or ("none" if name in answers else ""),
            "fixed_in": " ".join(sorted({fix for v in answers.get(name, []) for fix in v["fix_versions"]})),
        }
        for name, version in sorted(versions.items())
    ]  # fmt: skip
    write_rows(asked.out, FIELDS, rows)
    bad = [row for row in rows if row["vulnerabilities"] not in ("", "none")]
    for row in bad:
        print(f"{row['package']} {row['version']}: {row['vulnerabilities']}; fixed in {row['fixed_in'] or 'no version'}")
    counts = Counter(row["asked"] for row in rows)
    print(f"{len(rows)} packages: {len(bad)} with known vulnerabilities; asked: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
    print("licences: " + ", ".join(f"{kind} {count}" for kind, count in Counter(row["licence"] for row in rows).most_common()))
    sys.exit(1 if bad else 3 if counts[NOT_ASKED] else 0)


if __name__ == "__main__":
    main()
