"""Kernels: functions that numba compiles, and the directory in which it caches the compiled code for later processes.

numba compares its cache with a kernel's own file only. Functions and constants of other files are compiled into the
kernel too, so numba goes on with the old code after an edit there. Therefore the name of the cache directory contains
a hash of all kernel sources: the files that import `kernel` or `intrinsic`, and the project's files that they import,
directly or through others. After an edit of one of them numba compiles the kernels into a new directory.

The directory lies in `NUMBA_CACHE_DIR` where that is set, else in `__pycache__` beside this file, else (the
installation is read-only) in the user's cache directory. The first that can be written is used. If it is new, it begins
as a copy of another one: an image has compiled kernels in a file system that is read-only later, and numba uses no
cache that it cannot write. The caches of other libraries stay where they are.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, overload

import numba
import numba.extending

# A directory takes about 5 MB. The latest few stay: whoever changes between branches, or runs processes of different
# versions at the same time, does not compile again.
DIRECTORIES_MAX = 4
_PREFIX = "cascade-kernels-"
_PACKAGES = ("cascade", "stages", "streaming", "bench")
_IMPORT = re.compile(r"^(?:from ([\w.]+) import (\([^)]*\)|.*)|import ([\w.]+))", re.MULTILINE)
_DEFINES_KERNELS = re.compile(rb"^from cascade\.compilation import .*\b(?:kernel|intrinsic)\b", re.MULTILINE)
_Result = TypeVar("_Result")
_decorating = threading.Lock()
_kernels: list[Any] = []

# numba's decorator, with a type
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.extending.intrinsic


@overload
def kernel(function: Callable[..., _Result], /) -> Callable[..., _Result]: ...
@overload
def kernel(**options: Any) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]: ...
def kernel(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Compile a function with `numba.njit` and its `options`, and cache the compiled code in `cache_directory()`.

    numba reads its setting CACHE_DIR when it decorates a function. The setting is changed for that moment only, so that
    the kernels of other libraries are not cached here. Types of arguments are not checked, since compiled code takes
    numpy's numbers and Python's.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = _cached(lambda cache: numba.njit(cache=cache, **options)(function))
        _kernels.append(compiled)
        return compiled

    return decorate(function) if function else decorate


def c_callback(signature: Any, function: Callable[..., Any]) -> Any:
    """Compile a function that C code calls (`numba.cfunc`, with its `address`) at once, and cache it as a kernel is.

    The caller must keep what is returned as long as C code may call it.
    """
    return _cached(lambda cache: numba.cfunc(signature, cache=cache)(function))


def _cached(decorate: Callable[[bool], Any]) -> Any:
    """The result of a decorator of numba, which is called with whether it may cache, and then does in our directory."""
    with _decorating:
        directory = cache_directory()
        setting = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(directory or "")
        try:
            return decorate(directory is not None)
        finally:
            numba.config.CACHE_DIR = setting


def compilations() -> int:
    """Return how often this process has compiled a kernel; those that it loaded from the cache do not count."""
    return sum(sum(kernel.stats.cache_misses.values()) for kernel in _kernels)


@cache
def cache_directory() -> Path | None:
    """Return the directory of the compiled kernels; make it if needed, and remove those of former sources.

    Returns None, and warns, where no directory can be written: then each process compiles its kernels.
    """
    digest = hashlib.sha256()
    for name, text in sorted(kernel_sources(Path(__file__).parents[1]).items()):
        digest.update(b"%s %d\n%s" % (name.encode(), len(text), text))
    directories = [place / f"{_PREFIX}{digest.hexdigest()[:16]}" for place in _places()]
    for directory in directories:
        with suppress(OSError):  # without a copy the kernels are compiled
            _begin_with_copy(directory, directories)
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            os.utime(directory)  # the time of its last use
            tempfile.TemporaryFile(dir=directory).close()
            _remove_old(directory)
            return directory
    warnings.warn(
        "no directory for compiled kernels can be written, so each process compiles them for about half a minute; "
        "set NUMBA_CACHE_DIR to a directory that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def kernel_sources(root: Path) -> dict[str, bytes]:
    """Return the text of each kernel source below `root`, by its module's name."""
    texts = {}
    for package in _PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            texts[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_bytes()
    sources: dict[str, bytes] = {}
    pending = [name for name, text in texts.items() if _DEFINES_KERNELS.search(text)]
    while pending:
        name = pending.pop()
        if name in texts and name not in sources:
            sources[name] = texts[name]
            pending += _imported(texts[name].decode())
    return sources


def _imported(text: str) -> Iterator[str]:
    """The names that a module imports at its top level: modules, and members of modules written like submodules."""
    for module, members, plain in _IMPORT.findall(text):
        yield module or plain
        yield from (f"{module}.{member}" for member in re.findall(r"\w+", members))


def _places() -> Iterator[Path]:
    if numba.config.CACHE_DIR:
        yield Path(numba.config.CACHE_DIR)
    yield Path(__file__).parent / "__pycache__"
    with suppress(RuntimeError):  # the user has no home directory
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cascade-fraud"


def _begin_with_copy(directory: Path, others: Sequence[Path]) -> None:
    """Copy the first of the other directories that exists, if this one does not. Raises OSError if that fails.

    Another process may do the same: the first one's copy stays.
    """
    if directory.is_dir():
        return
    filled = next((other for other in others if other.is_dir()), None)
    if filled is None:
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{_PREFIX}", dir=directory.parent) as staging:
        staged = Path(staging) / "kernels"
        shutil.copytree(filled, staged, copy_function=shutil.copyfile)
        # the source may be read-only, and copytree has copied its mode
        for path in (staged, *staged.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staged.rename(directory)


def _remove_old(used: Path) -> None:
    """Remove the directories beside `used` but the latest. Another process may do the same at the same time."""
    times = {}
    for directory in used.parent.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):
            times[directory] = directory.stat().st_mtime
    times.pop(used, None)
    for directory in sorted(times, key=times.__getitem__)[: 1 - DIRECTORIES_MAX]:
        shutil.rmtree(directory, ignore_errors=True)
