"""What README and docs name exists, and the project keeps its size and its language."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {p.name: p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
SOURCES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in FILES}
# scripts whose flags are fields of other files, or that hand flags on to other scripts
FLAGS_OF = {"pretrain.py": ["pretrain.py", "recipes.py", "model.py"]}
FLAGS_OF["bench/profile.py"] = FLAGS_OF["pretrain.py"]
FLAGS_OF["sweep/run.py"] = ["sweep/run.py", "finetune_glue.py", *FLAGS_OF["pretrain.py"]]


def commands(page: str) -> list[tuple[str, str]]:
    """(script, rest of the line) of every call of Python, in code blocks and in `inline code`."""
    blocks = PAGES[page].replace("\\\n", " ").split("```")
    lines = "\n".join(blocks[1::2]).split("\n")
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", " ".join(blocks[::2]))]
    call = re.compile(r"(?:python|torchrun\b.*?) (?:-m ((?:\w+\.)*\w+)|(\w+\.py))(?![\w/])(.*)")
    found = [m.groups() for line in lines if (m := call.search(line.split(" # ")[0]))]
    return [(module.replace(".", "/") + ".py" if module else script, rest)
            for module, script, rest in found if module not in ("pytest", "pip")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_flags_and_data_that_exist(page):
    made = {"data/c4"}  # by README's first command
    above = commands("RESULTS.md") if page == "LOG.md" else []  # where LOG's corpora are prepared
    for script, rest in above + commands(page):
        source = "\n".join(SOURCES[f] for f in FLAGS_OF.get(script, [script]))
        for flag in set(re.findall(r"--([a-z]\w*)", rest.replace("model.", ""))) - {"help"}:
            field = rf"\b({flag}|{flag.removeprefix('no_')}): |\"--{flag}\""
            assert re.search(field, source), f"{script} has no --{flag}"
        made |= set(re.findall(r"--out (data/[\w.-]+)", rest))
        read = set(re.findall(r"data/[\w.-]+", rest))
        assert read <= made, f"{page}: no command above makes {read - made}"


def test_readme_is_short_and_the_places_to_change_are_there():
    assert len(PAGES["README.md"].encode()) <= 7_000
    rows = re.findall(r"^\| .*? \| (.*`.*) \|$", PAGES["README.md"].split("## To change")[1], re.M)
    for name in re.findall(r"`([^`]+)`", " ".join(rows)):  # `file.py`: `name`, `name`, `--flag`
        if "." in name and " " not in name:
            source = (ROOT / name).read_text()
        elif not name.startswith("--"):
            defined = rf"^\s*(?:def|class) {name}\b|^\s*{name}\b.*[:=]"
            assert re.search(defined, source, re.M), name


def test_pages_tell_of_questions_and_functions_fit_a_screen():
    told = r"(?i)\b(sessions?|sittings?|audit\w*|agents?|reviewers?|(first|second) day)\b"
    assert not {p: m[0] for p, text in PAGES.items() if (m := re.search(told, text))}
    assert len([f for f in SOURCES if "/" not in f]) <= 14
    nodes = [n for source in SOURCES.values() for n in ast.walk(ast.parse(source))]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    assert not [n.name for n in functions if n.end_lineno - n.lineno >= 100]
