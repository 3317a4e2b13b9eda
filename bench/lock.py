"""The lock of CI: the version of every package that the tests ran with, as `.ci/lock.txt`.

It lists what `pip install '.[test]'` brought into the environment that runs this script: the requirements of pyproject.toml with the extra
`test`, theirs, and so on. So the way to a new lock is an environment with the newest versions in which the tests pass. CI takes the lock as
constraints, users get the ranges of pyproject.toml. Without hashes: a constraint cannot have them, and PyTorch's build for CPUs, of which
the lock says the version alone, comes from whatever index a machine has.

    python bench/lock.py           write .ci/lock.txt
    python bench/lock.py --check   say whether it covers pyproject.toml, each version within its range; exit code 1 if not
"""

import argparse
import os
import platform
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK, EXTRA = ROOT / ".ci" / "lock.txt", "test"
HEAD = "# Versions that the tests ran with on Python {python}, {system}; made by bench/lock.py. Constraints for CI, not for users.\n"


def direct(extra: str = EXTRA) -> list[Requirement]:
    """The requirements of pyproject.toml with an extra, and those of the extras that this one names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = list[Requirement]()
    todo = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"][extra])]
    while todo:
        requirement = todo.pop()
        if requirement.name == project["name"]:
            todo += [Requirement(text) for name in requirement.extras for text in project["optional-dependencies"][name]]
        else:
            found.append(requirement)
    return found


def applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""})


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Versions, without a build's own mark such as +cpu, of all that these requirements bring, as installed here. LookupError for one that is not."""
    found: dict[str, str] = {}
    seen, todo = set[tuple[str, frozenset[str]]](), [r for r in requirements if applies(r, frozenset())]
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise LookupError(f"{name} is not installed here: pip install -e '.[{EXTRA}]' first") from None
        found[name] = Version(distribution.version).public
        todo += [r for r in map(Requirement, distribution.requires or []) if applies(r, extras | {""})]
    return found


def read(path: Path = LOCK) -> dict[str, str]:
    """Versions by name of a lock file."""
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def wrong(locked: dict[str, str], requirements: list[Requirement]) -> list[str]:
    """Requirements that a lock lacks, or whose range its version is not in."""
    out = []
    for requirement in requirements:
        version = locked.get(canonicalize_name(requirement.name))
        if version is None and applies(requirement, frozenset()):
            out.append(f"{requirement.name} is not locked")
        elif version is not None and not requirement.specifier.contains(version, prereleases=True):
            out.append(f"{requirement.name} {version} is not within {requirement.specifier}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    asked, requirements = parser.parse_args(), direct()
    if not asked.check:
        text = HEAD.format(python=platform.python_version(), system=f"{platform.system()} {platform.machine()}")
        text += "".join(f"{name}=={version}\n" for name, version in sorted(closure(requirements).items()))
        temporary = LOCK.with_suffix(".part")
        temporary.write_text(text, "utf-8")
        os.replace(temporary, LOCK)
    faults = wrong(read(), requirements)
    print("\n".join([*faults, f"{LOCK.relative_to(ROOT)}: {len(read())} packages"]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
