"""`flashbias run`: the script sees what Python would show it, and its host is patched."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

# Says whether the host is patched, in which process.
WHO = """
def who():
    from timm.models.swin_transformer_v2 import WindowAttention
    return WindowAttention.forward.__module__
"""
PATCHED = "flashbias.integrations.swin_v2"

SURROUNDINGS = """
'''The documentation.'''
import os, pickle, sys
class A:
    pass
assert type(pickle.loads(pickle.dumps(A()))) is A
names = ("__name__", "__doc__", "__file__", "__package__", "__spec__", "__cached__", "__annotations__")
print({name: str(globals().get(name)) for name in names}, type(__builtins__), type(__loader__))
print(sys.argv, sys.path[0], os.getcwd(), sys.modules["__main__"].__dict__ is globals(), __name__ == "__main__")
import beside
sys.stdout.write(beside.text)
"""
ERROR = """
def inner():
    1 / 0
try:
    inner()
except ZeroDivisionError as error:
    raise ValueError from error
"""
HOOK = """
import sys
sys.excepthook = lambda kind, value, trace: print(kind, trace.tb_frame.f_code.co_name, trace.tb_next)
1 / 0
"""
THREAD = """
import threading
threading.Thread(target=lambda: 1 / 0, name="T").start()
"""
SCRIPTS = {
    "exit code": "import sys; sys.exit(3)",
    "exit message": "raise SystemExit('no such thing')",
    "exit at once": "import os; os._exit(7)",
    "error": ERROR,
    "syntax error": "x = 1\ndef x(:\n",
    "interrupt": "raise KeyboardInterrupt",
    "encoding": "# -*- coding: latin-1 -*-\nprint(len('\xe4'))\nimport sys; sys.exit()",
    "hook": HOOK,
    "traceback in a thread": THREAD,
    "at exit": "import atexit, sys\natexit.register(lambda: print(sys.modules['__main__'].x))\nx = 5",
    "surroundings": SURROUNDINGS,
}


def without_report(text):
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("flashbias: swin_v2 was"))


def same(ours, theirs):
    out, expected = (re.sub(r" at 0x\w+", "", ended.out) for ended in (ours, theirs))
    assert (ours.code, out, without_report(ours.err)) == (theirs.code, expected, theirs.err)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_as_under_python(name, write, flashbias, python):
    arguments = (write(SCRIPTS[name]), "--eval", "-m", "x y", "--", "--patch")
    same(flashbias("run", "--patch", "swin_v2", "--", *arguments), python(*arguments))


@pytest.mark.parametrize("path", ["./script.py", "sub/../script.py", "{}/script.py", "link.py", "folder"])
def test_path_is_seen_as_under_python(path, write, flashbias, python, tmp_path):
    write(SURROUNDINGS)
    write(SURROUNDINGS, "folder/__main__.py")
    write("text = 'from the folder that is run'", "folder/beside.py")
    (tmp_path / "link.py").symlink_to(tmp_path / "script.py")
    (tmp_path / "sub").mkdir()
    path = path.format(tmp_path)
    same(flashbias("run", "--patch", "swin_v2", path, "--x"), python(path, "--x"))


@pytest.mark.parametrize(
    "option", ["-m package", "-- -m package.part", "-m script", "-m missing", "-m package.missing", "-m package.wrong"]
)
def test_module_runs_as_under_python(option, write, flashbias, python):
    write(SURROUNDINGS)
    write("", "package/__init__.py")
    write(SURROUNDINGS, "package/__main__.py")
    write("import sys; from . import wrong", "package/part.py")
    write("1 / 0", "package/wrong.py")
    arguments = ("--verify", "--", "-m")
    same(
        flashbias("run", "--patch", "swin_v2", *option.split(), *arguments),
        python("-m", option.split()[-1], *arguments),
    )


@pytest.mark.usefixtures("host")
def test_host_is_patched_when_the_script_imports_it(write, flashbias):
    ended = flashbias("run", "--patch", "swin_v2", "--", write(f"{WHO}\nprint(who())"))
    assert (ended.code, ended.out) == (0, f"{PATCHED}\n")


PROCESSES = f"""
import multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor
{WHO}
class Item:
    def __init__(self, name):
        self.name = name

def work(item):
    return item.name, __name__, who(), sys.argv[1:], os.environ.get("FLASHBIAS_VERIFY")

def nested(item):
    return inside(multiprocessing.get_context("spawn"), work, item)

def inside(context, function, item):
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, item).result()

def main():
    method, function = sys.argv[1:]
    print(inside(multiprocessing.get_context(method), globals()[function], Item(method)))

if __name__ == "__main__":
    main()
"""


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("method", "function", "module"),
    [("fork", "work", False), ("spawn", "nested", True), ("forkserver", "work", False)],
)
def test_processes_have_the_patches_too(method, function, module, write, flashbias):
    target = ["-m", "script"] if module else ["--", "script.py"]
    write(PROCESSES)
    ended = flashbias("run", "--verify", "--patch", "swin_v2", *target, method, function)
    name = "__main__" if method == "fork" else "__mp_main__"
    assert (ended.code, ended.out) == (0, f"{(method, name, PATCHED, [method, function], 'first')}\n"), ended.err


MODEL = """
from flashbias.integrations._torchvision import make_importable
make_importable()
import torch
from timm.models.swin_transformer_v2 import WindowAttention
attention = WindowAttention(8, (4, 4), 2).eval()
with torch.inference_mode():
    print(attention(torch.randn(3, 16, 8)).shape)
    attention(torch.randn(3, 16, 8))
"""


def test_patched_layers_are_compared_and_timed(write, flashbias):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    ended = flashbias("run", "--verify", "--profile", "--patch", "swin_v2", "--", write(MODEL))
    assert (ended.code, ended.out) == (0, "torch.Size([3, 16, 8])\n"), ended.err
    for expected in ("FLASHBIAS_VERIFY", "largest difference", "3 x 16 x 8", "FLASHBIAS_PROFILE"):
        assert expected in ended.err
    tables = ended.err.split("FLASHBIAS_PROFILE")
    compared, timed = map(re.search, (r"float32\W+(\d+) ", r"WindowAttention 0\W+(\d+) "), tables)
    assert (compared[1], timed[1]) == ("1", "2"), "the first call is compared, all are timed"
    (line,) = (line for line in ended.err.splitlines() if line.startswith("flashbias: "))
    worst = re.match(r"flashbias: worst difference (\S+) beside entries of up to (\S+), in WindowAttention 0", line)
    assert 0 < float(worst[1]) < 1e-5 < float(worst[2])


ON_TOP = """
ours = WindowAttention.forward
WindowAttention.forward = lambda self, x, mask=None: ours(self, x, mask)
attention = """


def test_script_that_patches_on_top_is_no_failure(write, flashbias):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    ended = flashbias("run", "--patch", "swin_v2", "--", write(MODEL.replace("\nattention = ", ON_TOP)))
    assert (ended.code, ended.out, ended.err) == (0, "torch.Size([3, 16, 8])\n", "")


def test_unknown_name_is_refused(write, flashbias):
    for names, found in ((("swin_v2,swing",), "--patch swing"), ((",",), "nothing"), (("swing", "swin_v2"), "swing")):
        options = [argument for name in names for argument in ("--patch", name)]
        ended = flashbias("run", *options, "--", write("print('started')"))
        assert (ended.code, ended.out) == (2, "")
        assert found in ended.err
        assert "wanted: swin_v2" in ended.err


def test_script_that_is_not_there_is_refused(flashbias):
    ended = flashbias("run", "--patch", "swin_v2", "--", "nowhere.py")
    assert ended.code == 2
    assert "no file nowhere.py" in ended.err


@pytest.mark.usefixtures("host")
def test_patch_that_nothing_calls_is_said(write, flashbias):
    ended = flashbias("run", "--patch", "swin_v2", "--", write("import timm.models.swin_transformer_v2"))
    assert "swin_v2 was applied, but nothing that it replaces was called" in ended.err


def test_patch_in_vain_is_said(write, flashbias):
    ended = flashbias("run", "--patch", "swin_v2", "--", write("print('done')"))
    assert (ended.code, ended.out) == (0, "done\n")
    assert "swin_v2 was not applied" in ended.err
    assert "never imported" in ended.err


@pytest.mark.usefixtures("host")
def test_disabled_patch_is_said(write, flashbias):
    ended = flashbias("run", "--patch", "swin_v2", "--", write(f"{WHO}\nprint(who())"), FLASHBIAS_DISABLE="1")
    assert ended.out == "timm.models.swin_transformer_v2\n"
    assert "FLASHBIAS_DISABLE is set" in ended.err


def test_host_that_cannot_be_patched_runs_unpatched(write, flashbias, host):
    host.write_text(host.read_text().replace("mask=None", "masks=None"))
    ended = flashbias("run", "--patch", "swin_v2", "--", write(f"{WHO}\nprint(who())"))
    assert (ended.code, ended.out) == (0, "timm.models.swin_transformer_v2\n")
    assert "swin_v2 was not applied" in ended.err
    assert "masks" in ended.err


WORKER = f"""
import sys
import torch.distributed as dist
import torch
{WHO}
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
with open(f"rank{{dist.get_rank()}}", "w") as file:
    print(int(total), sys.argv, who(), __name__, file=file)
dist.destroy_process_group()
"""


@pytest.mark.usefixtures("host")
def test_works_under_torchrun(write, tmp_path):
    write(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flashbias.recipes", "run", "--patch", "swin_v2", "--", "script.py", "--eval"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == f"3 ['script.py', '--eval'] {PATCHED} __main__\n"
