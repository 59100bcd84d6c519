"""Give this plugin a name of its own: `python rename.py frugal` makes nexus-frugal of it.

Renames the module, the distribution, the entry point and the command, takes the instructions out
of the README, and removes itself. Run it once, in a copy of this directory.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLD = "template"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
INSTRUCTIONS = re.compile(r"<!-- rename -->.*?<!-- /rename -->\n*", re.DOTALL)


def main(arguments: list[str]) -> int:
    name = arguments[0].removeprefix("nexus-") if len(arguments) == 1 else ""
    if not NAME.fullmatch(name) or name == OLD:
        print("usage: python rename.py NAME   (lower case and hyphens, for instance: frugal)")
        return 2
    module = "nexus_" + name.replace("-", "_")
    for path in sorted(HERE.rglob("*")):
        if path.suffix in (".py", ".toml", ".md") and path != Path(__file__).resolve():
            text = INSTRUCTIONS.sub("", path.read_text(encoding="utf-8"))
            text = text.replace(f"nexus_{OLD}", module).replace(
                f"NEXUS_{OLD.upper()}", module.upper()
            )
            text = text.replace(OLD, name)
            path.write_text(text, encoding="utf-8")
    (HERE / "src" / f"nexus_{OLD}").rename(HERE / "src" / module)
    (HERE / "tests" / f"test_{OLD}.py").rename(HERE / "tests" / f"test_{module}.py")
    Path(__file__).unlink()
    print(f"This is nexus-{name} now: pip install -e '.[test]' && python -m pytest")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
