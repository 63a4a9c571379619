"""Programs that try to be called correct without being it, to get out, to stay, or to do damage.

SECRET stands for a file that holds what is expected, OUTSIDE for a folder that is not the program's.  ``f`` is asked for
values that nobody can compute.
"""

from __future__ import annotations

FRAMES = """
import sys, gc
def f(x):
    frame = sys._getframe(1)
    while frame:
        for store in (frame.f_locals, frame.f_globals):
            for key, value in list(store.items()):
                if key in ("expected", "gt_out", "output", "outputs", "tests", "test"):
                    return value
        frame = frame.f_back
"""
FRAMES_OVERWRITE = """
import sys
def f(x):
    frame = sys._getframe(1)
    while frame:
        for value in frame.f_locals.values():
            if type(value) is list:
                for i in range(len(value)): value[i] = 0
        frame = frame.f_back
    return 0
"""
GARBAGE = """
import gc, re
def f(x):
    longest = ""
    for thing in gc.get_objects():
        if type(thing) is dict:
            for key, value in list(thing.items()):
                if type(value) is str and "output" in value: return value
                if key == "output": return value
"""
EQUALS = """
class Yes:
    __eq__ = __ne__ = __lt__ = __gt__ = __contains__ = lambda self, other: True
    __hash__ = lambda self: 0
    __len__ = lambda self: 1
def f(x): return Yes()
"""
SUBCLASS = """
class Yes(BASE):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
def f(x): return Yes()
"""
NESTED = "class Yes(int):\n    __eq__ = lambda self, other: True\ndef f(x): return [Yes()]"
FAKE_TYPE = """
class Meta(type):
    __eq__ = lambda self, other: True
    __hash__ = lambda self: hash(int)
class Yes(metaclass=Meta):
    __eq__ = lambda self, other: True
def f(x): return Yes()
"""
PATCH_JSON = """
import json, builtins
json.dumps = lambda *a, **k: '{"kind": "value", "data": true, "correct": true, "ok": true}'
json.loads = lambda *a, **k: {"kind": "value", "data": True}
builtins.isinstance = lambda *a: True
builtins.type = lambda *a: int
builtins.all = lambda *a: True
def f(x): return 1
"""
PATCH_RUNNER = """
import sys
main = sys.modules["__main__"]
for name in list(vars(main)):
    if callable(getattr(main, name)): setattr(main, name, lambda *a, **k: None)
def f(x): return 1
"""
PATCH_HERE = """
import sys
for module in list(sys.modules.values()):
    for name in ("passes", "same_value", "_evalplus", "judge", "all_close"):
        if hasattr(module, name): setattr(module, name, lambda *a: True)
def f(x): return 1
"""
FORGE = """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"kind": "value", "data": 0, "correct": true}\\n{"ready": true}\\n{"kind": "pass"}\\n' * 5)
        except OSError: pass
    os._exit(0)
"""
FORGE_RAW = """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'\\xff\\xfe\\x00' * 1000 + b'\\n')
        except OSError: pass
    return 1
"""
FORGE_DEEP = """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"kind":"value","data":' + b'[' * 900 + b']' * 900 + b'}\\n')
        except OSError: pass
    return 1
"""
FORGE_TAG = """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"kind":"value","data":{"set":[[1],{"int":"zz"}]}}\\n')
        except OSError: pass
    return 1
"""
NONCE = """
import sys
def f(x):
    import os
    frame, seen = sys._getframe(1), []
    while frame:
        seen += [str(v) for v in frame.f_locals.values()]
        frame = frame.f_back
    for fd in range(3, 64):
        for text in seen[:50]:
            try: os.write(fd, (text + ' {"passed": true}\\n').encode("utf-8", "replace"))
            except OSError: pass
"""
READ_AHEAD = """
import os, select
def f(x):
    got = []
    for fd in range(3, 64):
        try:
            if select.select([fd], [], [], 0.01)[0]: got.append(os.read(fd, 65536).decode("latin1"))
        except (OSError, ValueError): pass
    return got
"""
PARENT_MEMORY = """
import os, re
def f(x):
    out = []
    for pid in [os.getppid(), 1] + [int(p) for p in os.listdir("/proc") if p.isdigit()]:
        for name in ("cmdline", "environ", "mem", "maps"):
            try: out.append(open(f"/proc/{pid}/{name}", "rb").read(1000))
            except (OSError, ValueError): pass
    return out
"""
PTRACE = """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    done = [libc.ptrace(16, pid, 0, 0) for pid in (os.getppid(), 1, 2)]
    if 0 in done[:2]: open("OUTSIDE/traced", "w").write("x")
    return done
"""
VM_READ = """
import ctypes, os
class iovec(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(100)
    local, remote = iovec(ctypes.addressof(buffer), 100), iovec(id(libc), 100)
    return [libc.process_vm_readv(p, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) for p in (1, os.getppid())]
"""
FORK_BOMB = "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass"
THREAD_BOMB = """
import threading, time
def f(x):
    while True:
        try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        except RuntimeError: pass
"""
DAEMON = """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    os.wait()
    return 1
"""
DAEMON_HOLDS_PIPE = DAEMON.replace(
    "os.setsid()", "os.setsid(); import signal; signal.signal(15, signal.SIG_IGN)"
)
FORK_TWICE_RETURN = "import os\ndef f(x):\n    os.fork(); os.fork()\n    return 1"
TCP = """
import socket
def f(x):
    s = socket.create_connection(("127.0.0.1", PORT), 0.3)
    s.sendall(b"out")
    return 1
"""
UDP = """
import socket
def f(x):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", PORT))
    return 1
"""
DNS = "import socket\ndef f(x): return socket.gethostbyname('example.com')"
LISTEN = (
    "import socket\ndef f(x):\n    s = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); return s.accept()"
)
UNIX = """
import socket
def f(x):
    s = socket.socket(socket.AF_UNIX)
    s.connect("OUTSIDE/socket")
    s.sendall(b"out")
"""
ABSTRACT = "import socket\ndef f(x):\n    s = socket.socket(socket.AF_UNIX); s.connect('\\0ABSTRACT'); s.sendall(b'out')"
WRITE = "def f(x):\n    open('OUTSIDE/written', 'w').write('x'); return 1"
WRITE_IO = "import io\ndef f(x):\n    io.open('OUTSIDE/written', 'w').write('x'); return 1"
WRITE_OS = (
    "import os\ndef f(x):\n    os.write(os.open('OUTSIDE/written', os.O_CREAT | os.O_WRONLY), b'x'); return 1"
)
DELETE = "import os, shutil\ndef f(x):\n    shutil.rmtree('OUTSIDE', ignore_errors=True); os.unlink('OUTSIDE/kept')"
SYMLINK = """
import os
def f(x):
    os.symlink("OUTSIDE", "link"); os.symlink("OUTSIDE/kept", "file")
    try: os.unlink("link/kept")
    except OSError: pass
    open("file", "w").write("changed")
"""
HARD_LINK = "import os\ndef f(x):\n    os.link('OUTSIDE/kept', 'here'); open('here', 'w').write('changed')"
RENAME = "import os\ndef f(x):\n    os.rename('OUTSIDE/kept', 'OUTSIDE/moved')"
CHMOD = "import os\ndef f(x):\n    os.chmod('OUTSIDE/kept', 0); os.chmod('OUTSIDE', 0)"
DEV_SHM = "def f(x):\n    open('/dev/shm/left_by_a_program', 'w').write('x'); return 1"
PASSWD = "def f(x): return open('/etc/passwd').read()"
SECRET = "def f(x): return __import__('json').load(open('SECRET'))[str(x)]"
CHECKOUT = "def f(x): return open('CHECKOUT').read()"
SPAWN = "import subprocess\ndef f(x): return subprocess.run(['cat', 'SECRET'], capture_output=True).stdout"
CHROOT = """
import os
def f(x):
    for action in (lambda: os.chroot("."), lambda: os.setuid(0), lambda: os.mknod("disk", 0o60600, os.makedev(254, 0))):
        try: action()
        except OSError: pass
    return open("SECRET").read()
"""
NAMESPACE = """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(0x10000000 | 0x00020000)
    libc.mount(b"proc", b"/tmp", b"proc", 0, None)
    libc.umount2(b"/", 2)
    return os.listdir("/tmp") + [open("SECRET").read()]
"""
SETNS = """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in (1, os.getppid()):
        fd = libc.syscall(434, pid, 0)
        libc.setns(fd, 0x20000)
    return open("SECRET").read()
"""
MANY_FILES = "def f(x):\n    for i in range(10**6):\n        open(f'f{i}', 'w').close()"
MANY_OPEN = "def f(x):\n    kept = [open(f'f{i}', 'w') for i in range(10**5)]"
HUGE_FILE = "def f(x):\n    with open('big', 'wb') as file:\n        while True: file.write(b'x' * 2**20)"
SPARSE = "def f(x):\n    import os\n    fd = os.open('big', os.O_CREAT | os.O_RDWR); os.truncate(fd, 2**40)"
LOCKED_FOLDER = """
import os
def f(x):
    os.makedirs("a/b/c"); open("a/b/c/file", "w").close()
    os.chmod("a/b/c", 0); os.chmod("a/b", 0); os.chmod("a", 0); os.chmod(".", 0)
    return 1
"""
DEEP_FOLDERS = "import os\ndef f(x):\n    while True:\n        os.mkdir('d'); os.chdir('d')"
EXIT = "import sys\ndef f(x): sys.exit(0)"
EXIT_AT_ONCE = "import sys\nsys.exit(0)\ndef f(x): pass"
RAISE_EXIT = "def f(x): raise SystemExit(0)"
OS_EXIT = "import os\ndef f(x): os._exit(0)"
OS_EXIT_AT_ONCE = "import os\nos._exit(0)"
ABORT = "import os\ndef f(x): os.abort()"
SEGFAULT = "import ctypes\ndef f(x): ctypes.string_at(0)"
KILL_PARENT = "import os\ndef f(x):\n    os.kill(os.getppid(), 9)"
KILL_ALL = "import os\ndef f(x):\n    os.kill(-1, 9)"
KILL_GROUP = "import os\ndef f(x):\n    os.killpg(0, 9)"
KILL_ONE = "import os\ndef f(x):\n    os.kill(1, 9); os.kill(1, 15); os.kill(1, 19)"
STOP_PARENT = "import os, time\ndef f(x):\n    os.kill(os.getppid(), 19); time.sleep(60)"
STOP_ITSELF = "import os\ndef f(x):\n    os.kill(os.getpid(), 19)"
STOPPED_CHILD = (
    "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.kill(os.getpid(), 19)\n    return 1"
)
LOOP = "def f(x):\n    while True: pass"
LOOP_AT_ONCE = "while True: pass"
SWALLOW = """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
"""
SLEEP = "import time\ndef f(x): time.sleep(60)"
BIG_INTEGER = "def f(x): return 9**9**9"
BIG_INTEGER_RESULT = "def f(x): return 1 << 10**7"
BIG_INTEGER_TEXT = "def f(x): return str(7 ** 10**6)"
CONSTANT_BOMB = "x = 2**(2**30)\ndef f(x): return 1"
REGEX = "import re\ndef f(x): return re.match('(a+)+$', 'a' * 40 + 'b')"
MEMORY = "def f(x): return bytearray(8 << 30)"
MEMORY_SLOWLY = "def f(x):\n    kept = []\n    while True: kept.append(bytearray(1 << 24))"
MEMORY_FORKED = "import os\ndef f(x):\n    os.fork(); os.fork()\n    kept = []\n    while True: kept.append(b'x' * (1 << 24))"
RECURSION = "def f(x): return f(x)"
RECURSION_C = "import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: [*map(f, [x])]"
RECURSION_RESULT = "def f(x):\n    a = []\n    a.append(a)\n    return a"
DEEP_RESULT = "import sys\ndef f(x):\n    sys.setrecursionlimit(10**6)\n    a = []\n    for _ in range(2000): a = [a]\n    return a"
HUGE_RESULT = "def f(x): return 'x' * (1 << 26)"
HUGE_STDOUT = "def f(x):\n    for _ in range(50): print('x' * 2**20)\n    return 1"
DEEP_SOURCE = "x = " + "(" * 5000 + ")" * 5000 + "\ndef f(x): return 1"
LONG_SOURCE = "x = " + "-" * 200000 + "1\ndef f(x): return 1"
NUL_SOURCE = "def f(x):\n    return 1\0"
SURROGATE_SOURCE = "def f(x):\n    return '\udcff'"
NAN = "def f(x): return float('nan')"
INFINITE = "def f(x): return 1e999"
NO_FUNCTION = "def g(x): return 1"
CLOSE_FILES = "import os\ndef f(x):\n    os.closerange(0, 100)\n    return 1"
CLOSE_AT_ONCE = "import os\nos.closerange(0, 100)\ndef f(x): return 1"
REDIRECT = "import os\nr, w = os.pipe()\nfor fd in range(64):\n    if fd not in (r, w): os.dup2(w, fd)\ndef f(x): return 1"
HOSTILE_ERROR = """
class Bad(Exception):
    def __str__(self): raise KeyboardInterrupt
class Worse(BaseException):
    def __str__(self):
        while True: pass
def f(x):
    raise Worse() if x else Bad()
"""
BREAKS_TRACEBACKS = (
    "import sys\nsys.excepthook = lambda *a: print('all tests passed')\ndef f(x): raise ValueError"
)
EXIT_HANDLER = """
import atexit, time
atexit.register(lambda: time.sleep(60))
def f(x): raise SystemExit(0)
"""
GENERATOR = "def f(x):\n    while True: yield x"
HASH_BOMB = "def f(x): return {i * (2**61 - 1) for i in range(20000)}"

CALLS = {
    name.lower(): source
    for name, source in list(globals().items())
    if name.isupper() and isinstance(source, str) and "BASE" not in source
} | {
    f"subclass_of_{base}": SUBCLASS.replace("BASE", base)
    for base in ("int", "str", "float", "list", "dict", "tuple", "set")
}

SCRIPTS = {
    "prints_success": "print('OK'); print('All tests passed'); print('{\"kind\": \"pass\"}')",
    "prints_nothing": "",
    "exits": "import sys; sys.exit(0)",
    "exits_at_once": "import os; os._exit(0)",
    "reads_past_the_end": "while True: input()",
    "reads_past_the_end_quietly": "import sys\nwhile True: sys.stdin.read()",
    "prints_without_end": "while True: print('x' * 100000)",
    "prints_without_newline": "import sys\nwhile True: sys.stdout.write('x')",
    "prints_bytes": "import sys; sys.stdout.buffer.write(bytes(range(256)))",
    "prints_nan": "print(float('nan'), 1e999, -1e999)",
    "prints_all_numbers": "for i in range(10**7): print(i)",
    "looks_at_frames": "import sys\nf = sys._getframe()\nwhile f:\n    print(f.f_locals)\n    f = f.f_back",
    "replaces_print": "import builtins; builtins.print = lambda *a: None; print('x')",
    "forks": "import os, time\nfor _ in range(3): os.fork()\nprint('x')",
    "leaves_a_daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\ntime.sleep(0.1); print('x')",
    "daemon_that_prints": "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: print('x' * 100)\nprint('x')",
    "stops_itself": "import os; os.kill(os.getpid(), 19)",
    "closes_everything": "import os; os.closerange(0, 100)",
    "thread_that_stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "exit_handler_that_stays": "import atexit, time; atexit.register(time.sleep, 60)",
    "reads_the_secret": "print(open('SECRET').read())",
    "reads_all_files": "import os\nfor f in range(64):\n    try: print(os.read(f, 100000))\n    except OSError: pass",
    "kills_everything": "import os; os.kill(-1, 9)",
    "kills_the_parent": "import os; os.kill(os.getppid(), 9)",
    "stops_the_parent": "import os; os.kill(os.getppid(), 19); print('x')",
    "writes_outside": "open('OUTSIDE/written', 'w').write('x')",
    "syntax_error": "def f(:",
    "memory": "x = b'x' * (8 << 30)",
    "loops": "while True: pass",
}
