"""Nothing that comes from a file or the command line is ever run as code: the sources have none of the calls that could do it."""

import ast
from pathlib import Path

import pytest

from recbole_mm.paths import PACKAGE
from tests.support import ROOT

SOURCES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "run_recbole_mm.py", ROOT / "setup.py", *sorted((ROOT / "benchmarks").glob("*.py"))]
#: calls that are refused wherever they stand
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execl", "os.execv", "os.spawnl", "os.spawnv", "commands.getoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads",
    "shelve.open", "pd.read_pickle", "pandas.read_pickle", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "tempfile.mktemp",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.hub.load", "importlib.reload",
}  # fmt: skip
#: keyword arguments that are refused in any call
KEYWORDS = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}
SAFE_LOADERS = {"SettingsLoader", "yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader"}


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a call's function; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def dangers(source: str) -> list[str]:
    """Every dangerous call in a source, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and any(name_of(base).endswith("Unpickler") for base in node.bases):
            if not any(isinstance(part, ast.FunctionDef) and part.name == "find_class" for part in node.body):
                found.append(f"{node.lineno}: an unpickler that does not choose its classes")
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {word.arg: word.value for word in node.keywords}
        if name in FORBIDDEN:
            found.append(f"{node.lineno}: {name}")
        for key, value in given.items():
            if isinstance(value, ast.Constant) and (key, value.value) in KEYWORDS:
                found.append(f"{node.lineno}: {key}={value.value}")
        if name == "torch.load" and not (isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True):
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if name == "yaml.load" and name_of(given.get("Loader")) not in SAFE_LOADERS:
            found.append(f"{node.lineno}: yaml.load without a safe loader")
        if name.startswith("subprocess.") and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
            found.append(f"{node.lineno}: a program named by one string")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec(x)", "compile(x, 'y', 'exec')", "__import__('os')", "os.system('ls')", "pickle.load(f)", "pickle.Unpickler(f).load()",
        "class U(pickle.Unpickler):\n    pass", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)", "yaml.load(f, Loader=yaml.Loader)",
        "subprocess.run('ls', shell=True)", "subprocess.run('ls -l')", "subprocess.run(f'ls {x}')", "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "pd.read_pickle(f)",
    ],
)  # fmt: skip
def test_the_search_finds(source):
    """A search that finds nothing must be one that would find something."""
    assert dangers(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile(x)", "np.load(f)", "torch.load(f, weights_only=True)", "subprocess.run([a, b])"]
)
def test_the_search_lets_pass(source):
    assert not dangers(source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_data(path: Path):
    assert not dangers(path.read_text(encoding="utf-8"))


def test_unpicklers_are_two_and_choose_their_classes():
    """Foreign data (data/convert/pickles.py), and nothing else; whoever adds one has to come by here."""
    users = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if "Unpickler(" in path.read_text(encoding="utf-8").replace("(pickle.Unpickler)", "Unpickler(")
    }
    assert users == {"pickles.py"}


def test_what_a_page_takes_as_it_is_was_made_by_us():
    """`| safe` turns the template's escaping off: only for values that page.py has made harmless (a `</script>` in data stays data)."""
    import re

    page = (PACKAGE / "report" / "page.html").read_text(encoding="utf-8")
    assert set(re.findall(r"\{\{\s*(\w+)\s*\|\s*safe", page)) <= {"plotly", "figure_data", "data"}
    assert "autoescape=select_autoescape" in (PACKAGE / "report" / "page.py").read_text(encoding="utf-8")
