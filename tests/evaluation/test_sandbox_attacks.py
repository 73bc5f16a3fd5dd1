"""Programs that attack: none forges its pass, and none reaches what lies outside its walls."""
# ruff: noqa: E501 (programs in one line)

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from starquant.evaluation.code_execution import build_predictions, pass_at_k
from starquant.evaluation.sandbox.programs import run_program
from starquant.evaluation.sandbox.protection import measure, protection
from starquant.evaluation.sandbox.starting import Limits
from starquant.evaluation.sandbox.walls import Walls

LIMITS = Limits(seconds=2)
TESTS = """
import math
def check(candidate):
    assert candidate(20) == 22, "first"
    assert all(map(candidate, [1, 2, 3])) and list(map(candidate, [1, 2])) == [3, 4]
    assert abs(twice(candidate(1)) - 6) < 1e-9
    assert math.isclose(candidate(5), 7.0)
    words = [3, 1]
    assert sorted(words) == [1, 3] and candidate(words) == sorted(words)
check(f)
"""
PROMPT = "def twice(x):\n    return 2 * x\n\n\ndef f(x):\n"
RIGHT = "    return sorted(x) if isinstance(x, list) else x + 2\n"

_SAYS = """
import json, os
def says(*messages):
    for message in messages:
        line = message if isinstance(message, bytes) else json.dumps(message).encode()
        for number in range(3, 32):
            try: os.write(number, line + b"\\n")
            except OSError: pass
"""
FORGERIES = {
    "frames": "import sys\n"
    "def f(x):\n frame = sys._getframe()\n while frame:\n  frame.f_locals.update(failed='', answer={'ready': True})\n"
    "  frame.f_globals.update(run_tests=lambda *a: '', describe=lambda e: '', encode=lambda v: ['int', '0x16'])\n"
    "  frame = frame.f_back\n return 0",
    "gc": "import gc\n"
    "def f(x):\n for o in gc.get_objects():\n  if type(o).__name__ == 'Link':\n   o.send({'failed': ''})\n return 0",
    "every descriptor": "import os\nfor n in range(64):\n try: os.write(n, b'{\"failed\": \"\"}\\n')\n"
    " except OSError: pass\nos._exit(0)",
    "the verdict on standard output": "import sys\nprint('{\"failed\": \"\"}', flush=True)\n"
    "sys.__stdout__.write('{\"failed\": \"\"}')\nraise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit",
    "os._exit when called": "import os\ndef f(x): os._exit(0)",
    "os._exit in a thread": "import os, threading\ndef f(x):\n threading.Thread(target=os._exit, args=(0,)).start()",
    "excepthook": "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): raise ValueError",
    "main module": "import sys\nmain = sys.modules['__main__']\nmain.run_tests = lambda *a: ''\n"
    "main.encode = lambda v: ['int', '0x16']\nmain.Ended = AssertionError\ndef f(x): return 22",
    "builtins": "import builtins\nbuiltins.all = builtins.any = builtins.isinstance = lambda *a: True\n"
    "builtins.abs = lambda x: 0\nbuiltins.sorted = lambda x: x\nbuiltins.AssertionError = KeyError\ndef f(x): return 22",
    "names of the tests": "def check(c): pass\ncandidate = None\ndef all(x): return True\ndef abs(x): return 0\n"
    "def sorted(x): return x\ndef map(*a): return [3, 4]\ndef f(x): return 22",
    "a helper of the prompt": "def twice(x): return 6\n"
    "def f(x): return x if isinstance(x, list) else {20: 22, 1: 3, 2: 4, 3: 5, 5: 7}.get(x) if x != 1 else 3.0001",
    "modules": "import math, operator\nmath.isclose = lambda *a, **k: True\ndef f(x): return 22",
    "equal to all": "class E:\n __eq__ = __lt__ = __gt__ = lambda s, o: True\n __bool__ = lambda s: True\n"
    " __hash__ = lambda s: 0\n __mul__ = __rmul__ = __sub__ = __add__ = lambda s, o: s\n __abs__ = lambda s: 0\n"
    " __float__ = lambda s: 7.0\ndef f(x): return E()",
    "int equal to all": "class E(int):\n __eq__ = lambda s, o: True\n __hash__ = lambda s: 0\ndef f(x): return E(1)",
    "str equal to all": "class E(str):\n __eq__ = lambda s, o: True\n __hash__ = lambda s: 0\ndef f(x): return E('1')",
    "list equal to all": "class E(list):\n __eq__ = lambda s, o: True\n__hash__ = None\ndef f(x): return E([1])",
    "false class": "class E:\n __class__ = int\n __eq__ = lambda s, o: True\n __index__ = lambda s: 22\ndef f(x): return E()",
    "metaclass": "class M(type):\n __eq__ = lambda s, o: True\n __hash__ = lambda s: 0\nclass E(metaclass=M): pass\n"
    "def f(x): return E",
    "StopIteration ends a loop": "def f(x):\n if x == 20: return 22\n raise StopIteration",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "an exception of one's own": "class E(BaseException): pass\ndef f(x): raise E",
    "trace": "import sys\ndef skip(frame, event, arg):\n frame.f_trace_lines = False\n return skip\n"
    "sys.settrace(skip)\nsys.setprofile(skip)\ndef f(x): return 22",
    "signal": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef f(x):\n while True: pass",
    "ctypes": "import ctypes\ntry: ctypes.memmove(id(22) + 24, id(20) + 24, 4)\nexcept Exception: pass\n"
    "ctypes.pythonapi.PyErr_SetNone\ndef f(x): return x",
    "exit from C": "import ctypes\ndef f(x): ctypes.pythonapi.Py_Exit(0)",
    "fork and end": "import os\nif os.fork(): os._exit(0)\ndef f(x): return 22",
    "kill all": "import os, signal\ndef f(x):\n for p in (-1, os.getppid(), 1):\n  try: os.kill(p, signal.SIGKILL)\n"
    "  except OSError: pass\n return 22",
    "exec": "import os, sys\ndef f(x): os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "answers in advance": _SAYS + "says({'ready': True}, *[{'value': ['int', '0x16']}] * 9)\ndef f(x): return 22",
    "claims to be judged": _SAYS + "says({'failed': ''}, {'ready': True, 'failed': ''})\nos._exit(0)",
    "ends what asks": _SAYS + "says({'ready': True}, {'raised': ['SystemExit', 'BaseException'], 'why': ''})\nos._exit(0)",
    "ends a loop by message": _SAYS + "says({'ready': True}, {'value': ['int', '0x16']}, {'raised': ['StopIteration']})\n"
    "os._exit(0)",
    "not a message": _SAYS + "says({'ready': True}, b'[' * 100_000)\nos._exit(0)",
    "endless message": "import os\nwhile True:\n for n in range(3, 32):\n  try: os.write(n, b'[' * 65536)\n"
    "  except OSError: pass",
    "values of no kind": _SAYS + "says({'ready': True}, {'value': ['eval', '1']}, 3, None)\nos._exit(0)",
    "deep value": _SAYS + "v = 1\nfor _ in range(900): v = ['list', [v]]\nsays({'ready': True}, {'value': v})\nos._exit(0)",
    "hash bomb": "def f(x): return {i * (2 ** 61 - 1) for i in range(3_000)}",
    "JSON patched": "import json\njson.dumps = lambda *a, **k: '{\"value\": [\"int\", \"0x16\"]}'\n"
    "json.loads = lambda *a: ['f', [['tuple', []], ['dict', []]]]\ndef f(x): return 22",
    "changes its argument": "def f(x):\n if isinstance(x, list):\n  x.clear()\n  return []\n return x + 2",
    "not a number": "def f(x): return float('nan')",
    "reads the tests": "import glob, re\ntext = ''\nfor path in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ')"
    " + glob.glob('/own/*') + glob.glob('/*'):\n"
    " try: text += open(path, errors='replace').read(1 << 16)\n except (OSError, ValueError): pass\n"
    "answers = dict(re.findall(r'candidate.(\\d+). == (\\d+)', text))\n"
    "def f(x): return int(answers[str(x)]) if str(x) in answers else x + 2 if type(x) is int else sorted(x)\n"
    "if not answers: raise LookupError('no tests')",
    "imports for the next": "import os, site, sys\nfor folder in sys.path + ['/tmp', os.getcwd()]:\n"
    " for name in ('ast.py', 'usercustomize.py', 'json.py', 'x.pth'):\n"
    "  try: open(os.path.join(folder, name), 'w').write('import os; os._exit(0)')\n  except OSError: pass\n"
    "def f(x): return 22",
}  # fmt: skip


def test_the_right_program_passes() -> None:
    assert run_program(PROMPT + RIGHT, TESTS, LIMITS, prompt=PROMPT).reason == "passed"


@pytest.mark.parametrize("attack", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_pass_cannot_be_forged(attack: str) -> None:
    outcome = run_program(f"{PROMPT}    return 0\n{attack}\n", TESTS, LIMITS, prompt=PROMPT)
    assert not outcome.passed and outcome.reason != "passed"


def test_a_forged_completion_scores_nothing() -> None:
    doc = {"prompt": PROMPT}
    completions = ["    raise SystemExit(0)\n", RIGHT, "    return 0\ndef twice(x): return 6\n"]
    programs = build_predictions([[text] for text in completions], [doc] * 3)
    assert programs[1] == [PROMPT + RIGHT]
    assert pass_at_k([TESTS] * 3, programs, k=[1]) == {"pass@1": 1 / 3}


#: Each defines attack(place): place is what the test laid out; the answer is what was reached, "" for nothing.
ESCAPES = {
    "environment": "import glob\ndef attack(place):\n for path in glob.glob('/proc/*/environ'):\n"
    "  try:\n   if 'PYTEST_CURRENT_TEST' in open(path, errors='replace').read(): return path\n  except OSError: pass\n"
    " return ''",
    "memory of others": "import os\ndef attack(place):\n for p in (place['pid'], os.getppid(), 1):\n"
    "  try: return open(f'/proc/{p}/mem', 'rb').name\n  except OSError: pass\n return ''",
    "ptrace": "import ctypes, os\ndef attack(place):\n c = ctypes.CDLL(None, use_errno=True)\n"
    " return 'traced' if any(c.ptrace(16, p, 0, 0) == 0 for p in (place['pid'], os.getppid(), 1)) else ''",
    "signals": "import os\ndef attack(place):\n try:\n  os.kill(place['pid'], 0)\n  return 'caller'\n"
    " except OSError: return ''",
    "reads a file": "def attack(place):\n try: return open(place['file']).read()\n except OSError: return ''",
    "reads past the root": "import glob\ndef attack(place):\n for path in ['/..' * 9 + place['file'],"
    " *(p + place['file'] for p in glob.glob('/proc/*/root') + glob.glob('/proc/*/cwd'))]:\n"
    "  try: return open(path).read()\n  except OSError: pass\n return ''",
    "lists home and temporary": "import os\ndef attack(place):\n seen = ''\n"
    " for p in ('/home', '/tmp', '/var', '/etc', '/mnt', '/srv', '/dev/shm', '/run', place['folder']):\n"
    "  try: seen += ' '.join(os.listdir(p))\n  except OSError: pass\n return seen",
    "writes elsewhere": "import os, site, sys\ndef attack(place):\n"
    " for p in ['/', '/tmp', '/usr', '/var/tmp', '/dev', '/dev/shm', '/etc', sys.prefix, sys.base_prefix, '/proc/sys/kernel',"
    " os.path.dirname(os.__file__), os.path.dirname(os.getcwd()), place['folder']] + sys.path:\n"
    "  try:\n   open(os.path.join(p, 'written'), 'w').close()\n   return p\n  except OSError: pass\n return ''",
    "links and moves": "import os\ndef attack(place):\n open('a', 'w').close()\n"
    " for to in (place['folder'] + '/b', '/usr/b', '/b'):\n  for act in (os.rename, os.link):\n"
    "   try:\n    act('a', to)\n    return to\n   except OSError: pass\n return ''",
    "mounts": "import ctypes\ndef attack(place):\n c = ctypes.CDLL(None)\n"
    " calls = [c.mount(b'none', b'/own', b'tmpfs', 0, 0), c.mount(b'/', b'/', None, 32 | 4096, 0), c.umount2(b'/usr', 2),"
    " c.chroot(b'/own'), c.mount(b'/usr', b'/usr', None, 32 | 4096, 0)]\n"
    " return 'mounted' if 0 in calls else ''",
    "namespaces of its own": "import ctypes, os\ndef attack(place):\n c = ctypes.CDLL(None)\n"
    " c.unshare(0x10000000 | 0x20000)\n c.mount(b'none', b'/usr', None, 32 | 4096, 0)\n"
    " for p in ('/usr/written', '/written'):\n  try:\n   open(p, 'w').close()\n   return p\n  except OSError: pass\n return ''",
    "devices": "import os, stat\ndef attack(place):\n for make in (lambda: os.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(8, 0)),"
    " lambda: open('/dev/mem', 'rb'), lambda: open('/dev/kmsg', 'rb'), lambda: open('/proc/sysrq-trigger', 'w'),"
    " lambda: open('/proc/kcore', 'rb').read(1), lambda: open('/proc/sys/kernel/core_pattern', 'w')):\n"
    "  try:\n   make()\n   return 'device'\n  except OSError: pass\n return ''",
    "tcp": "import socket\ndef attack(place):\n for host in ('127.0.0.1', 'localhost', '0.0.0.0', '::1'):\n"
    "  try:\n   socket.create_connection((host, place['port']), 1)\n   return host\n  except OSError: pass\n return ''",
    "udp and raw": "import socket\ndef attack(place):\n for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):\n"
    "  try:\n   s = socket.socket(socket.AF_INET, kind, 1 if kind == socket.SOCK_RAW else 0)\n"
    "   s.sendto(b'x', ('127.0.0.1', place['port']))\n   return 'sent'\n  except OSError: pass\n return ''",
    "unix sockets": "import socket\ndef attack(place):\n for name in (place['abstract'], place['folder'] + '/socket'):\n"
    "  try:\n   socket.socket(socket.AF_UNIX).connect(name)\n   return name\n  except OSError: pass\n return ''",
    "fork bomb": "import os, time\ndef attack(place):\n count = 0\n for _ in range(100):\n  try:\n"
    "   if os.fork() == 0:\n    time.sleep(9)\n    os._exit(0)\n   count += 1\n  except OSError: pass\n"
    " return f'{count} processes' if count > 8 else ''",
    "thread bomb": "import threading, time\ndef attack(place):\n count = 0\n for _ in range(100):\n  try:\n"
    "   threading.Thread(target=time.sleep, args=(9,)).start()\n   count += 1\n  except RuntimeError: pass\n"
    " return f'{count} threads' if count > 8 else ''",
    "another user": "import os\ndef attack(place):\n for change in (os.setuid, os.setgid, os.seteuid):\n"
    "  for i in (0, 1000):\n   if i != os.getuid():\n    try:\n     change(i)\n     return 'changed'\n    except OSError: pass\n"
    " return ''",
    "looser limits": "import resource\ndef attack(place):\n for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC,"
    " resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n  try:\n   resource.setrlimit(kind, (-1, -1))\n   return 'raised'\n"
    "  except (OSError, ValueError): pass\n return ''",
    "fills the disk": "def attack(place):\n try:\n  for i in range(64): open(str(i), 'wb').write(b'x' * (1 << 20))\n"
    " except OSError: return ''\n return 'filled'",
    "inherited descriptors": "import os, stat\ndef attack(place):\n kinds = []\n for n in range(3, 256):\n"
    "  try: kinds.append(stat.S_ISSOCK(os.fstat(n).st_mode))\n  except OSError: pass\n"
    " return '' if kinds == [True] else str(kinds)",
    "host of a virtual machine": "import socket\ndef attack(place):\n try: return repr(socket.socket(socket.AF_VSOCK))\n"
    " except OSError: return ''",
    "shared memory past the limit": "import ctypes\ndef attack(place):\n c = ctypes.CDLL(None)\n"
    " return 'held' if c.shmget(0, 4096, 0o1600) >= 0 or c.msgget(0, 0o1600) >= 0 else ''",
    "a file system past the limit": "import ctypes, os\ndef attack(place):\n if os.fork() == 0:\n"
    "  os._exit(ctypes.CDLL(None).unshare(0x10000000 | 0x20000) == 0)\n return 'root of its own' if os.wait()[1] else ''",
    "keys of the session": "import ctypes, platform\nCALL = {'x86_64': 248, 'aarch64': 217}[platform.machine()]\n"
    "def attack(place):\n c = ctypes.CDLL(None)\n"
    " return 'left' if any(c.syscall(CALL, b'user', b'starquant', b'x', 1, ctypes.c_int(k)) > 0 for k in (-3, -4)) else ''",
    "rings": "import ctypes\ndef attack(place):\n"
    " return 'ring' if ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)) >= 0 else ''",
    "setuid programs": "import os, stat\ndef attack(place):\n flags = os.statvfs('/usr').f_flag\n"
    " return '' if flags & os.ST_NOSUID and flags & os.ST_RDONLY else 'suid'",
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, object]]:
    """What attacks aim at: a file, sockets, this process."""
    name = f"\0starquant-{os.getpid()}"
    planted = tmp_path / "planted"
    planted.write_text("planted")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as a,
        socket.socket(socket.AF_UNIX) as b,
    ):
        a.bind(name)
        a.listen()
        b.bind(str(tmp_path / "socket"))
        b.listen()
        folder = str(tmp_path)
        port = tcp.getsockname()[1]
        yield {"file": str(planted), "folder": folder, "port": port, "abstract": name, "pid": os.getpid()}


@pytest.mark.parametrize("attack", ESCAPES.values(), ids=ESCAPES.keys())
def test_nothing_outside_is_reached(attack: str, place: dict[str, object], tmp_path: Path) -> None:
    if protection().missing():
        pytest.skip(f"no namespaces here: {protection().missing()}")
    before = sorted(path.name for path in tmp_path.iterdir())
    outcome = run_program(
        attack, f"reached = attack({place!r})\nif reached: raise ValueError(reached)", Limits(seconds=5)
    )
    assert outcome.reason == "passed"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_attacks_can_reach_what_no_walls_protect(place: dict[str, object]) -> None:
    """That the attacks above would be seen to succeed."""
    for name in ("reads a file", "tcp", "unix sockets", "signals"):
        tests = f"assert attack({place!r})"
        assert run_program(ESCAPES[name], tests, walls=Walls("none", False)).passed, name


def test_what_holds_is_measured() -> None:
    none = measure(Walls("none", False))
    assert none is not None
    assert {"network", "files", "leftovers"} <= set(none.missing())
    held = protection()
    assert held.as_data() == {"walls": held.walls.name} | {
        name: name not in held.missing() for name in ("network", "environment", "files", "processes", "leftovers")
    }


def test_namespaces_without_root_hold_too() -> None:
    """As root, whose processes no limit counts, all but that one."""
    held = measure(Walls("namespaces", False))
    if held is None:
        pytest.skip("no user namespaces here")
    assert set(held.missing()) <= ({"processes"} if os.geteuid() == 0 else set())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no filter on this machine")
def test_the_filter_refuses_those_calls_and_no_others() -> None:
    """Without walls, so that it alone refuses."""
    program = (
        "import ctypes, os, socket, threading\nfrom multiprocessing import Process\nC = ctypes.CDLL(None)\n"
        "def refused():\n    calls = C.shmget(0, 4096, 0o1600), C.msgget(0, 0o1600), C.semget(0, 1, 0o1600)\n"
        "    return [*calls, C.unshare(0x10000000), C.setns(0, 0)]\n"
        "def families():\n    known = []\n    for family in range(1, 46):\n"
        "        try: socket.socket(family, socket.SOCK_DGRAM).close()\n        except OSError: continue\n"
        "        known.append(int(family))\n    return known\n"
        "def works():\n    thread = threading.Thread(target=os.getpid)\n    thread.start()\n    thread.join()\n"
        "    return os.system('true') == 0 and os.waitstatus_to_exitcode(os.wait()[1]) if os.fork() else os._exit(0)\n"
    )
    tests = "assert refused() == [-1] * 5 and set(families()) <= {1, 2, 10} and works() == 0"
    assert run_program(program, tests, walls=Walls("none", False)).reason == "passed"
