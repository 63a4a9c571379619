"""More programs that try to be called correct, to get out, to stay or to do damage: through the kernel, through results
and output, and by using up what there is.  ``f`` is asked for values that nobody can compute, as in ``attacks.py``."""

from __future__ import annotations

_C = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
"""


def _calls(*lines: str) -> str:
    return _C + "def f(x):\n" + "".join(f"    {line}\n" for line in lines)


KERNEL = {
    "trace_me": _calls("libc.ptrace(0, 0, 0, 0)", "os.kill(os.getpid(), 5)", "return 1"),
    "seize_the_supervisor": _calls("libc.ptrace(0x4206, os.getppid(), 0, 0)", "libc.ptrace(0x4207, 1, 0, 0)"),
    "write_memory_of_the_supervisor": _calls(
        "b = (ctypes.c_size_t * 2)(id(libc), 64)",
        "return [libc.process_vm_writev(p, b, 1, b, 1, 0) for p in (1, os.getppid())]",
    ),
    "files_of_the_supervisor": _calls(
        "p = call(434, 1, 0)",
        "for n in range(64):",
        "    fd = call(438, p, n, 0)",
        '    if fd >= 0: os.write(fd, b\'{"kind": "value", "data": 0}\\n\')',
    ),
    "kcmp": _calls("return call(312, 1, os.getpid(), 1, 0, 0)"),
    "io_uring": _calls("b = ctypes.create_string_buffer(200)", "return call(425, 8, b)"),
    "bpf": _calls("return call(321, 5, ctypes.create_string_buffer(200), 72)"),
    "userfaultfd": _calls("return call(323, 1)"),
    "keyring": _calls("return call(248, b'user', b'left', b'x', ctypes.c_size_t(1), -4)"),
    "memory_file_executed": _calls(
        "fd = os.memfd_create('x', 0)", "os.write(fd, b'#!/bin/sh\\ntouch OUTSIDE/written\\n')", "os.execve(fd, ['x'], {})"
    ),
    "remount": _calls("return libc.mount(None, b'/', None, ctypes.c_ulong(32), None)"),
    "root_of_before": _calls("return libc.pivot_root(b'/tmp', b'/tmp'), os.listdir('/old')"),
    "user_namespace_in_a_child": _calls(
        "pid = call(56, 0x10000000 | 17, 0, 0, 0, 0)",
        "if pid == 0:",
        "    libc.mount(b'x', b'/tmp', b'tmpfs', 0, None); os._exit(0)",
        "return pid",
    ),
    "clone3_with_namespaces": _calls(
        "b = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)", "pid = call(435, b, 88)",
        "if pid == 0: os._exit(0)", "return pid",
    ),
    "kexec": _calls("return call(246, 0, 0, None, 0), call(320, 0, 0, 0, None, 0)"),
    "kernel_module": _calls("return call(175, ctypes.create_string_buffer(10), 10, b'')"),
    "perf_events": _calls("return call(298, ctypes.create_string_buffer(200), 0, -1, -1, 0)"),
    "file_handle": _calls("return call(304, -100, ctypes.create_string_buffer(200), 0)"),
    "numbers_of_other_tables": _calls("return call(0x40000000 + 101, 16, 1, 0, 0)"),
    "thirty_two_bits": _calls(
        "import mmap",
        "m = mmap.mmap(-1, 4096, prot=7)",
        "m.write(b'\\xb8\\x25\\x00\\x00\\x00\\xbb\\x01\\x00\\x00\\x00\\xb9\\x09\\x00\\x00\\x00\\xcd\\x80\\xc3')",
        "return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    ),
    "lift_limits": (
        "import os, resource\ndef f(x):\n"
        "    for kind in range(16):\n"
        "        try: resource.setrlimit(kind, (-1, -1)); resource.prlimit(1, kind, (0, 0))\n"
        "        except (OSError, ValueError): pass\n"
        "    return bytearray(8 << 30)"
    ),
    "limits_of_the_supervisor": (
        "import resource\ndef f(x):\n"
        "    for kind in range(16): resource.prlimit(1, kind, (0, 0))"
    ),
    "queued_signals": _calls(
        "for number in range(1, 65):",
        "    for pid in (1, os.getppid()): libc.sigqueue(pid, number, ctypes.c_void_p(0))",
        "return 1",
    ),
    "signals_by_process_file": _calls(
        "import signal",
        "for number in (9, 19, 15, 2, 17): signal.pidfd_send_signal(os.pidfd_open(1), number)",
    ),
    "outlives_its_parent": _calls(
        "libc.prctl(1, 0)", "libc.prctl(36, 1)",
        "import time",
        "if os.fork() == 0:", "    os.setsid(); libc.prctl(1, 0); time.sleep(60)", "return 1",
    ),
    "vfork": _calls("pid = libc.vfork()", "if pid == 0:", "    libc.pause()", "return 1"),
    "terminal": "import os\ndef f(x):\n    return os.open('/dev/tty', os.O_RDWR), os.openpty()",
    "kernel_log": "def f(x): return [open(p).read(9) for p in ('/dev/kmsg', '/dev/mem', '/sys/kernel/notes')]",
    "new_abstract_socket": (
        "import os, socket, time\ndef f(x):\n"
        "    s = socket.socket(socket.AF_UNIX); s.bind('\\0left'); s.listen()\n"
        "    if os.fork() == 0: os.setsid(); s.accept()\n"
        "    return 1"
    ),
    "raw_sockets": (
        "import socket\ndef f(x):\n    out = []\n"
        "    for family, kind in ((17, 3), (2, 3), (16, 3), (38, 5), (40, 1), (31, 3), (15, 3)):\n"
        "        try: out.append(socket.socket(family, kind).fileno())\n"
        "        except OSError: pass\n"
        "    return out"
    ),
    "watches_files": _calls(
        "fd = libc.inotify_init()", "[libc.inotify_add_watch(fd, p, 0xfff) for p in (b'/', b'/usr', b'/lib', b'/tmp')]",
        "return os.read(fd, 4096)",
    ),
    "exhausts_inodes": "def f(x):\n    while True:\n        x += 1; open(f'{x}', 'w').close()",
    "exhausts_space": (
        "def f(x):\n    for i in range(100):\n        with open(f'{i}', 'wb') as file: file.write(bytes(1 << 20))"
    ),
    "exhausts_pipes": (
        "import fcntl, os\ndef f(x):\n    kept = []\n    while True:\n"
        "        r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 20); os.write(w, bytes(1 << 16)); kept += [r, w]"
    ),
    "exhausts_memory_files": (
        "import os\ndef f(x):\n    kept = []\n    while True:\n"
        "        fd = os.memfd_create('x'); kept.append(fd)\n        while True: os.write(fd, bytes(1 << 20))"
    ),
    "exhausts_sockets": "import socket\ndef f(x):\n    kept = []\n    while True: kept.append(socket.socketpair())",
    "locks_a_file": "import fcntl\ndef f(x):\n    fcntl.flock(open(fcntl.__file__), fcntl.LOCK_EX); fcntl.flock(open(fcntl.__file__), 2)",
    "named_pipe": "import os\ndef f(x):\n    os.mkfifo('p'); return open('p').read()",
    "alarm": "import signal, time\ndef f(x):\n    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3); time.sleep(60)",
    "stops_for_input": "import os\ndef f(x):\n    os.setpgid(0, 0) if False else None\n    return open(0).read() or input()",
}  # fmt: skip

RESULTS = {
    "forged_after_a_true_reply": (
        "import os\ndef f(x):\n    import json\n"
        "    for fd in range(3, 64):\n"
        "        try: os.write(fd, b''.join(json.dumps({'kind': 'value', 'data': i}).encode() + b'\\n' for i in range(1000)))\n"
        "        except OSError: pass\n    return 1"
    ),
    "reply_without_end": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n"
        "        try:\n            while True: os.write(fd, b'x' * 4096)\n"
        "        except OSError: pass"
    ),
    "reply_that_only_begins": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'{\"kind\": \"value\", \"data\": ')\n"
        "        except OSError: pass\n    os._exit(0)"
    ),
    "reply_of_another_kind": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'{\"kind\": \"stdout\", \"data\": \"0\"}\\n{\"kind\": \"unknown\"}\\n{\"kind\": [1]}\\n')\n"
        "        except OSError: pass\n    os._exit(0)"
    ),
    "reply_with_a_huge_number": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'{\"kind\": \"value\", \"data\": ' + b'9' * 50000 + b'}\\n')\n"
        "        except OSError: pass\n    return 1"
    ),
    "reply_before_the_question": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, b'{\"kind\": \"loaded\"}\\n{\"kind\": \"value\", \"data\": 0}\\n' * 9)\n"
        "    except OSError: pass\ndef f(x): return 1"
    ),
    "numpy_of_its_own": "import sys, types\nm = sys.modules['numpy'] = types.ModuleType('numpy'); m.allclose = m.isclose = m.array_equal = lambda *a, **k: True\nsys.modules['math'].isclose = m.allclose\ndef f(x): return 1.5",
    "swapped_pipes": "import os\ndef f(x):\n    os.dup2(41, 40); os.dup2(40, 41)\n    return 1",
    "generator_as_result": "def f(x): return (i for i in iter(int, 1))",
    "endless_iterator_in_a_list": "import itertools\ndef f(x): return [itertools.count()]",
    "endless_length": "class L(list):\n    def __iter__(self):\n        while True: yield 1\ndef f(x): return L()",
    "cycle_of_dicts": "def f(x):\n    a, b = {}, {}\n    a['b'], b['a'] = b, a\n    return a",
    "wide_and_shared": "def f(x):\n    a = [0]\n    for _ in range(60): a = [a, a]\n    return a",
    "key_that_is_a_program": "class K(str):\n    __hash__ = lambda s: 0\n    __eq__ = lambda s, o: True\ndef f(x): return {K('a'): 1}",
    "float_subclass": "class F(float):\n    __sub__ = __rsub__ = lambda s, o: F(0)\n    __abs__ = lambda s: 0\n    __le__ = __eq__ = lambda s, o: True\ndef f(x): return F(1)",
    "not_finite_in_places": "def f(x): return [float('nan'), float('inf'), -0.0, {float('nan'): float('nan')}]",
    "surrogates_as_result": "def f(x): return '\\ud800' * 1000 + '\\x00'",
    "pickle": "import pickle, os\nclass P:\n    def __reduce__(self): return os._exit, (0,)\ndef f(x): return pickle.loads(pickle.dumps(P()))",
    "finalizer": "import time\nclass D:\n    def __del__(self):\n        while True: time.sleep(1)\ndef f(x): D()",
    "hook_on_every_line": "import sys\ndef f(x):\n    sys.settrace(lambda *a: sys.exit(0)); sys.setprofile(lambda *a: sys.exit(0))\n    return 1",
    "import_hook": "import sys, builtins\nclass H:\n    def find_spec(self, *a): raise SystemExit(0)\nsys.meta_path[:] = [H()]; sys.modules.clear(); builtins.__import__ = None\ndef f(x): return 1",
    "no_builtins": "import builtins\ndelete = delattr\nfor n in list(vars(builtins)): delete(builtins, n)\ndef f(x): return 1",
    "patched_encoder": "import sys\nfor m in list(sys.modules.values()):\n    for n in ('encode', 'decode', '_send', '_name'):\n        if hasattr(m, n): setattr(m, n, lambda *a: 0)\ndef f(x): return 1",
    "deep_representation": "def f(x):\n    a = []\n    for _ in range(10**6): a = [a]\n    raise ValueError(a)",
    "deep_pattern": "import re\ndef f(x): return re.compile('(' * 20000 + ')' * 20000)",
    "deep_json": "import json, sys\nsys.setrecursionlimit(10**9)\ndef f(x): return json.loads('[' * 10**6)",
    "huge_format": "def f(x): return f'{1.0:1000000000}' + '%.999999999f' % 1.0",
    "huge_text_of_a_number": "import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return str(3 ** 10**7)",
    "error_without_end": "def f(x): raise ValueError('x' * (1 << 28))",
    "group_of_errors": "def f(x):\n    e = ValueError()\n    for _ in range(10**5): e = ExceptionGroup('', [e])\n    raise e",
    "error_class_with_a_metaclass": "class M(type):\n    __name__ = property(lambda c: 1 / 0)\nclass E(Exception, metaclass=M): pass\ndef f(x): raise E",
    "coroutine": "async def f(x): return 1",
    "answers_from_a_thread": "import threading, os, time\ndef f(x):\n    threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()\n    time.sleep(9)",
    "thread_that_writes_replies": (
        "import os, threading\ndef spam():\n    while True:\n        for fd in (40, 41):\n"
        "            try: os.write(fd, b'{\"kind\": \"value\", \"data\": 0}\\n')\n            except OSError: pass\n"
        "threading.Thread(target=spam, daemon=True).start()\ndef f(x): return 1"
    ),
    "child_that_answers_later": (
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        while True:\n"
        "            for fd in (40, 41):\n"
        "                try: os.write(fd, b'{\"kind\": \"value\", \"data\": 0}\\n')\n                except OSError: pass\n"
        "            time.sleep(0.001)\n    return 1"
    ),
}  # fmt: skip

OUTPUT = {
    "output_at_the_cap": "import sys\nsys.stdout.write('x' * (1 << 20))",
    "output_over_the_cap": "import sys\nsys.stdout.write('x' * ((1 << 20) + 1))",
    "errors_without_end": "import sys\nwhile True: sys.stderr.write('x' * 100000)",
    "prompts": "x = input('x? ' * 1000)\nprint(x)",
    "part_of_the_output": "import os\nos.write(1, b'1'); os.abort()",
    "output_then_failure": "print(input(), flush=True)\nraise SystemExit(3)",
    "input_read_twice": "import os, sys\na = sys.stdin.read(); os.lseek(0, 0, 0); print(a, open(0, closefd=False).read())",
    "input_overwritten": "import os\nos.write(0, b'9' * 1000); os.ftruncate(0, 0); print('0')",
    "input_as_output": "import os\nos.dup2(0, 1); print('0', flush=True)",
    "control_characters": "print('\\x1b[2K\\r\\x00\\x08\\u202e0')",
    "other_encodings": "import sys\nsys.stdout.reconfigure(encoding='utf-16'); print('0')",
    "reply_pipe": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"kind\": \"stdout\", \"data\": \"0\"}\\n{\"kind\": \"value\", \"data\": 0}\\n')\n    except OSError: pass",
    "finalizer_that_stays": "import time\nclass D:\n    def __del__(self): time.sleep(60)\nd = D(); print(1)",
    "exit_handlers_without_end": "import atexit\ndef again(): atexit.register(again); atexit._run_exitfuncs()\natexit.register(again)",
    "daemon_thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start(); print(1)",
    "child_that_keeps_the_output": "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\nprint(1, flush=True)\nos._exit(0)",
    "executes_python_again": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'while True: pass'])",
    "runs_as_a_module": "import runpy\nrunpy.run_path('/proc/self/exe')",
}  # fmt: skip

# Scripts that print "clean" unless a test before left something for them, which they then leave themselves.
LEFT_BY_A_TEST = {
    "a file": "import os\nprint('dirty' if os.listdir('.') else 'clean')\nopen('x', 'x').close()",
    "a file in shared memory": "import os\nprint('dirty' if os.listdir('/dev/shm') else 'clean')\nopen('/dev/shm/x', 'x').close()",
    "a module": "import os, sys\nsys.path.insert(0, '.')\nfrom fractions import Fraction\nprint('dirty' if Fraction is None else 'clean')\nopen('fractions.py', 'w').write('Fraction = None')",
    "a folder without end": "import os\nprint('dirty' if os.listdir('.') else 'clean')\nfor _ in range(900): os.mkdir('d'); os.chdir('d')",
    "a locked folder": "import os\nprint('dirty' if os.listdir('.') else 'clean')\nos.mkdir('d'); os.mkdir('d/d'); os.chmod('d', 0)\ntry: os.chmod('.', 0)\nexcept OSError: pass",
    "a full disk": "print('clean')\ntry:\n    for i in range(99): open(str(i), 'wb').write(bytes(1 << 20))\nexcept OSError as e:\n    if i < 20: print('dirty')",
    "a changed module": "import math\nprint('dirty' if math.pi == 3 else 'clean')\nmath.pi = 3",
    "a loaded module": "import sys\nprint('dirty' if 'x' in sys.modules else 'clean')\nsys.modules['x'] = sys",
    "shared memory": "import ctypes\nlibc = ctypes.CDLL(None)\nprint('dirty' if libc.shmget(7, 4096, 0) >= 0 else 'clean')\nlibc.shmget(7, 4096, 0o1600)",
    "a queue": "import ctypes\nlibc = ctypes.CDLL(None)\nprint('dirty' if libc.msgget(7, 0) >= 0 else 'clean')\nlibc.msgget(7, 0o1600)",
    "a key": "import ctypes\nlibc = ctypes.CDLL(None)\nkey = lambda n, *a: libc.syscall(ctypes.c_long(n), *a)\nprint('dirty' if key(250, 10, -4, b'user', b'x', 0) >= 0 else 'clean')\nkey(248, b'user', b'x', b'1', ctypes.c_size_t(1), -4)",
    "a process": "import os, socket, time\ns = socket.socket(socket.AF_UNIX)\ntry: s.bind('\\0x'); print('clean', flush=True)\nexcept OSError: print('dirty', flush=True)\nif os.fork() == 0: os.setsid(); time.sleep(60)\nos._exit(0)",
    "signal handlers, mask and limits": "import os, resource, signal\nh = signal.getsignal(2) is signal.default_int_handler and not signal.pthread_sigmask(0, []) and resource.getrlimit(7)[0] > 9 and os.umask(0o777) == 0o22 and not os.environ.get('x') and os.nice(5) == 5\nprint('clean' if h else 'dirty')\nsignal.signal(2, signal.SIG_IGN); signal.pthread_sigmask(0, [1]); resource.setrlimit(7, (5, 5)); os.environ['x'] = 'x'; os.putenv('x', 'x')",
}  # fmt: skip
