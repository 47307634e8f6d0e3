"""The documentation cannot rot: generated pages, the commands and code of the README, the examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import xtalfast
from xtalfast.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_generated_pages_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def commands(text: str) -> list[str]:
    """Every `xtalfast ...` in code, on a line of its own or between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^(xtalfast [^#\n]*)", "\n".join(blocks), re.MULTILINE)
    return [*found, *re.findall(r"`(xtalfast [^`\n]+)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page):
    """Their verbs and options, and no positional argument that the verb does not take."""
    for line in commands(page.read_text()):
        words = shlex.split(re.sub(r"[\[\]|]|\.\.\.", " ", line))[1:]
        found = typer.main.get_command(app)
        while words and words[0] in getattr(found, "commands", {}):
            found = found.commands[words.pop(0)]
        if not words or words[0] in ("VERB", "--version", "--help"):
            continue
        assert not hasattr(found, "commands"), f"{page.name}: no verb {words[0]} in `{line}`"
        options = {name for parameter in found.params for name in parameter.opts} | {"--help", "-h"}
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word in options, f"{page.name}: `{line}` has no option {word}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_python_of_the_readme_names_things_that_exist():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        compile(block, "README.md", "exec")
        imports = [line for line in block.splitlines() if line.startswith(("import ", "from "))]
        exec("\n".join(imports), {})
        for name in re.findall(r"xtalfast\.(\w+)\(", block):
            assert hasattr(xtalfast, name)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), "an example shows what it does"
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind unless told where"
