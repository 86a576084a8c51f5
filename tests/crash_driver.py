"""Kills builds, gc and rollback with SIGKILL at each of their failpoints, and looks at what is left.

Run as a script: crash_driver.py SCENARIO FOLDER. It imports everything once and forks a child for each death,
so that hundreds of them take seconds. Prints the failpoints as JSON; a broken promise ends it with a traceback.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before NumPy and pyarrow start: the fewer threads there are in the parent, the less a fork can miss.
os.environ.update({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"})
os.environ.update({"TOKENIZERS_PARALLELISM": "false"})

import onnxruntime  # noqa: F401
from corpora import GRAPH, answers, build, check_version, file_hashes, make_vectors, strays, write_corpus
from tiny_bert import write_tiny_bert

from index_builders import bulk_encode
from index_builders.publish import publish
from index_builders.shard_build import build_shard
from vecsvc import storage
from vecsvc.config import BuildSettings
from vecsvc.encoders.onnx import OnnxEncoder
from vecsvc.errors import StorageError
from vecsvc.parts import part_folder
from vecsvc.storage import IndexFolder

WORKERS = 2
DIM = 16
ROWS = 40
WINDOW = 16  # texts that are encoded and made durable together
QUERIES = make_vectors(4, DIM, seed=99)
SETTINGS: dict[str, Any] = {"kind": GRAPH, "shards": 2, "fields": "label,text", "certificate_queries": 4}


# ----------------------------------------------------------------------------------------------- processes


def fork(work: Callable[[], object]) -> int:
    """The id of a child that does `work` and ends with exit code 0, or 1 and a traceback."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    return child


def wait(child: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def must(work: Callable[[], object]) -> None:
    assert wait(fork(work)) == 0, "see the traceback of the child above"


def stopping(nth: int, signal_number: int, points: list[str] | None = None) -> Callable[[str], None]:
    """A failpoint that sends the signal to its own process the nth time it is met."""
    met = 0

    def hook(point: str) -> None:
        nonlocal met
        met += 1
        if points is not None:
            points.append(point)
        if met == nth:
            os.kill(os.getpid(), signal_number)

    return hook


def at(nth: int, signal_number: int, work: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        storage.failpoint = stopping(nth, signal_number)
        work()

    return run


def failpoints(work: Callable[[], Any], folder: Path) -> list[str]:
    """The names of all that `work` meets, in order; it runs in a child and leaves its files."""
    report = folder.parent / f"{folder.name}.points"

    def run() -> None:
        points: list[str] = []
        storage.failpoint = stopping(0, 0, points)
        work()
        report.write_text(json.dumps(points))

    must(run)
    found: list[str] = json.loads(report.read_text())
    return found


def for_each(count: int, job: Callable[[int], None]) -> None:
    """job(1) to job(count), shared out among a few workers."""

    def part(worker: int) -> Callable[[], None]:
        def run() -> None:
            for nth in range(1 + worker, count + 1, WORKERS):
                try:
                    job(nth)
                except BaseException as error:
                    raise AssertionError(f"failpoint {nth}") from error

        return run

    codes = [wait(child) for child in [fork(part(worker)) for worker in range(WORKERS)]]
    assert codes == [0] * WORKERS, "see the traceback of the worker above"


@contextmanager
def copied(template: Path, name: str) -> Iterator[Path]:
    """A copy of an --out folder, times and all: they say which version is older."""
    copy = template.parent / name
    shutil.copytree(template, copy)
    yield copy
    shutil.rmtree(copy)


# --------------------------------------------------------------------------------------------------- what is promised


def whole_and_serving(folder: IndexFolder, version: str, expected: Any) -> None:
    """Every published version is what was written, and the one that serves answers as expected."""
    assert folder.current() == version, (folder.current(), version)
    for published in folder.versions():
        assert check_version(folder.path / published).version == published
    assert answers(folder.path, QUERIES) == expected


def nothing_left(folder: IndexFolder, keep: int) -> None:
    folder.gc(keep)
    assert strays(folder) == [], strays(folder)
    assert len(folder.versions()) <= 1 + keep


class World:
    """Two corpora, and an --out folder where v1 was published, then v2, both of the first corpus."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old, self.new = folder / "old.parquet", folder / "new.parquet"
        self.texts = folder / "texts.parquet"
        self.encoder = write_tiny_bert(folder / "bert", dim=DIM)
        self.template, self.whole = folder / "template", folder / "whole"
        report = folder / "answers.json"
        write_corpus(self.old, n=ROWS, dim=DIM, seed=1)
        write_corpus(self.new, n=ROWS, dim=DIM, seed=2)
        write_corpus(self.texts, n=ROWS, dim=0)
        bulk_encode.WINDOW_ROWS = WINDOW  # type: ignore[misc]
        # Built in the parent, so that what is imported and compiled on the way is there for every child.
        threads = len(list(Path("/proc/self/task").iterdir()))
        for version in ("v1", "v2"):
            build(self.old, self.template, name="demo", version=version, **SETTINGS)
        self.hashes = file_hashes(self.build(self.whole).manifest)
        assert len(list(Path("/proc/self/task").iterdir())) == threads, "a thread would be missing after the fork"
        asked = (self.template, self.whole)
        must(lambda: report.write_text(json.dumps([answers(out, QUERIES) for out in asked])))
        both = json.loads(report.read_text())
        self.before, self.after = ([[tuple(hit) for hit in row] for row in rows] for rows in both)
        assert self.before != self.after

    def build(self, out: Path, version: str = "v3", resume: bool = False, corpus: Path | None = None) -> Any:
        source = corpus or self.new
        settings = {"name": "demo", "encoder": str(self.encoder), "resume": resume, "version": version, **SETTINGS}
        return build(source, out, **settings)

    def build_shard(self, out: Path, number: int, resume: bool = False) -> Any:
        own = {"out": str(out), "name": "demo", "version": "v3", "shard": f"{number}/2", "threads": 1}
        settings = BuildSettings(**{**SETTINGS, **own, "encoder": str(self.encoder)})
        return build_shard(str(self.new), settings, resume=resume, stream=io.StringIO())


# --------------------------------------------------------------------------------------------------- scenarios


def kill_builds(world: World) -> list[str]:
    """A build dies at each failpoint; the next one, with and without --resume, completes."""
    with copied(world.template, "counted") as out:
        points = failpoints(lambda: world.build(out), out)
    serves = points.index("rename CURRENT") + 1  # a failpoint comes before its step
    saved = [nth for nth, point in enumerate(points, 1) if point == "rename .state-v3"]

    def job(nth: int) -> None:
        with copied(world.template, f"killed-{nth}") as out:
            folder = IndexFolder(out / "demo")
            assert wait(fork(at(nth, signal.SIGKILL, lambda: world.build(out)))) == -signal.SIGKILL
            resume = nth % 2 == 0

            def look_and_go_on() -> None:
                if nth > serves:
                    whole_and_serving(folder, "v3", world.after)
                else:
                    whole_and_serving(folder, "v2", world.before)
                published = "v3" in folder.versions()
                if resume:
                    result = world.build(out, resume=True)
                    # What was written down as done (ingest first, then each shard's index) is not done again.
                    steps = sum(nth > step for step in saved) - 1
                    assert len(result.resumed) == max(0, steps) or "everything" in result.resumed[0], result.resumed
                    assert Path(result.path).name == "v3"
                elif published:
                    result = world.build(out, "v4")
                else:
                    result = world.build(out)
                assert file_hashes(result.manifest) == world.hashes
                whole_and_serving(folder, Path(result.path).name, world.after)
                nothing_left(folder, keep=nth % 3)
                assert folder.current() == check_version(Path(result.path)).version

            must(look_and_go_on)

    for_each(len(points), job)
    return points


def kill_text_builds(world: World) -> list[str]:
    """A build of texts dies at each step of encoding, and until the encoded parts are gone; the next one completes.

    With --resume no text is encoded again whose part was whole.
    """
    texts, whole = world.texts, world.folder / "whole-texts"
    hashes = file_hashes(world.build(whole, corpus=texts).manifest)
    report = world.folder / "texts.json"
    must(lambda: report.write_text(json.dumps(answers(whole, QUERIES))))
    after = [[tuple(hit) for hit in row] for row in json.loads(report.read_text())]
    with copied(world.template, "counted") as out:
        points = failpoints(lambda: world.build(out, corpus=texts), out)
    first = points.index("make folder encoded") + 1
    last = points.index("delete folder encoded") + 1
    parts = [nth for nth, point in enumerate(points, 1) if re.fullmatch(r"rename \d{12}-[0-9a-f]{64}\.npy", point)]
    ingested = points.index("rename .state-v3", first) + 1
    assert len(parts) == -(-ROWS // WINDOW) and parts[-1] < ingested < last
    # Between the last part and the state that says so, kill_builds dies at every step.
    chosen = [*range(first, parts[-1] + 2), *range(parts[-1] + 2, ingested - 1, 8), *range(ingested - 1, last + 1)]

    def job(number: int) -> None:
        nth = chosen[number - 1]
        with copied(world.template, f"texts-{nth}") as out:
            folder = IndexFolder(out / "demo")
            work = at(nth, signal.SIGKILL, lambda: world.build(out, corpus=texts))
            assert wait(fork(work)) == -signal.SIGKILL

            def look_and_go_on() -> None:
                whole_and_serving(folder, "v2", world.before)
                encoded: list[str] = []
                encode = OnnxEncoder.encode

                def watched(self: OnnxEncoder, texts: Sequence[str], role: Any = "query") -> Any:
                    encoded.extend(texts if role == "passage" else ())
                    return encode(self, texts, role)

                OnnxEncoder.encode = watched  # type: ignore[method-assign]
                resume = number % 4 != 0
                result = world.build(out, resume=resume, corpus=texts)
                kept = min(ROWS, WINDOW * sum(nth > part for part in parts)) if resume else 0
                assert len(encoded) == (0 if resume and nth > ingested else ROWS - kept), (len(encoded), kept)
                assert file_hashes(result.manifest) == hashes
                whole_and_serving(folder, "v3", after)
                nothing_left(folder, keep=1)

            must(look_and_go_on)

    for_each(len(chosen), job)
    return [points[nth - 1] for nth in chosen]


def kill_resumed_builds(world: World) -> list[str]:
    """A build dies, the one that resumes it dies too, the third completes."""
    with copied(world.template, "counted") as out:
        points = failpoints(lambda: world.build(out), out)
    first = points.index("create manifest.json") + 1
    with copied(world.template, "counted-2") as out:
        wait(fork(at(first, signal.SIGKILL, lambda: world.build(out))))
        more = failpoints(lambda: world.build(out, resume=True), out)
    assert len(more) < len(points) / 2

    def job(nth: int) -> None:
        with copied(world.template, f"twice-{nth}") as out:
            folder = IndexFolder(out / "demo")
            assert wait(fork(at(first, signal.SIGKILL, lambda: world.build(out)))) == -signal.SIGKILL
            assert wait(fork(at(nth, signal.SIGKILL, lambda: world.build(out, resume=True)))) == -signal.SIGKILL

            def look_and_go_on() -> None:
                if nth > more.index("rename CURRENT") + 1:
                    whole_and_serving(folder, "v3", world.after)
                else:
                    whole_and_serving(folder, "v2", world.before)
                result = world.build(out, resume=True)
                assert result.resumed and file_hashes(result.manifest) == world.hashes
                whole_and_serving(folder, "v3", world.after)
                nothing_left(folder, keep=1)

            must(look_and_go_on)

    for_each(len(more), job)
    return more


def kill_gc(world: World) -> list[str]:
    """gc dies at each failpoint with two old versions, a dead build and older trash before it."""
    littered = world.folder / "littered"
    shutil.copytree(world.template, littered)

    def litter() -> None:
        world.build(littered, "v3", corpus=world.old)
        index = littered / "demo"
        shutil.copytree(index / "v1", index / ".trash-v1")
        (index / "CURRENT.tmp").write_text("v1")

    must(litter)
    in_build = failpoints(lambda: world.build(world.folder / "scratch", "dead"), world.folder / "scratch")
    nth = in_build.index("create manifest.json")
    assert wait(fork(at(nth, signal.SIGKILL, lambda: world.build(littered, "dead", resume=True)))) == -signal.SIGKILL
    assert (littered / "demo" / ".staging-dead").exists() and (littered / "demo" / ".state-dead").exists()
    with copied(littered, "counted") as out:
        points = failpoints(lambda: IndexFolder(out / "demo").gc(0), out)

    def job(nth: int) -> None:
        with copied(littered, f"gc-{nth}") as out:
            folder = IndexFolder(out / "demo")
            assert wait(fork(at(nth, signal.SIGKILL, lambda: folder.gc(0)))) == -signal.SIGKILL

            def look_and_go_on() -> None:
                whole_and_serving(folder, "v3", world.before)
                if nth % 2 and "v1" not in folder.versions():
                    # A name that gc had begun to delete can be used again, and deleted again.
                    world.build(out, "v1")
                    folder.rollback("v3")
                nothing_left(folder, keep=0)
                assert folder.versions() == ["v3"]
                whole_and_serving(folder, "v3", world.before)

            must(look_and_go_on)

    for_each(len(points), job)
    return points


def kill_rollback(world: World) -> list[str]:
    """Rollback dies at each failpoint: CURRENT names the one or the other, and the next rollback works."""
    published = world.folder / "published"
    shutil.copytree(world.template, published)
    must(lambda: world.build(published, "v3"))
    with copied(published, "counted") as out:
        points = failpoints(lambda: IndexFolder(out / "demo").rollback(), out)

    def job(nth: int) -> None:
        with copied(published, f"rollback-{nth}") as out:
            folder = IndexFolder(out / "demo")
            assert wait(fork(at(nth, signal.SIGKILL, folder.rollback))) == -signal.SIGKILL

            def look_and_go_on() -> None:
                done = nth > points.index("rename CURRENT") + 1
                whole_and_serving(folder, *(("v2", world.before) if done else ("v3", world.after)))
                folder.rollback("v1")
                whole_and_serving(folder, "v1", world.before)
                nothing_left(folder, keep=1)
                whole_and_serving(folder, "v1", world.before)

            must(look_and_go_on)

    for_each(len(points), job)
    return points


def two_builds(world: World) -> list[str]:
    """One build stops at a failpoint, another one of the same index runs; then the first dies or goes on."""
    with copied(world.template, "counted") as out:
        points = failpoints(lambda: world.build(out), out)
    storage.TURN_WAIT_S = 0.1  # type: ignore[misc]
    published, serves = points.index("rename v3") + 1, points.index("rename CURRENT") + 1
    changing = range(points.index("delete HISTORY.tmp") + 1, serves + 2)  # who serves, until its folder is synced
    chosen = [1, 2, 3, 5, 8, *range(20, published - 4, 25), *range(published - 1, len(points) + 1)]

    def play(nth: int, first_lives: bool, out: Path) -> None:
        folder = IndexFolder(out / "demo")
        staged = folder.path / ".staging-v3" / "shards"
        first = fork(at(nth, signal.SIGSTOP, lambda: world.build(out)))
        assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])

        def second() -> None:
            was_staged = staged.exists()
            try:
                world.build(out, "v4", corpus=world.old)
            except StorageError as error:
                assert nth in changing and "another process is changing it" in str(error), str(error)
                whole_and_serving(folder, *(("v3", world.after) if nth > serves else ("v2", world.before)))
            else:
                assert nth not in changing
                whole_and_serving(folder, "v4", world.before)
                folder.gc(5)
            assert staged.exists() == was_staged, "swept a living build"

        must(second)
        os.kill(first, signal.SIGCONT if first_lives else signal.SIGKILL)
        assert wait(first) == (0 if first_lives else -signal.SIGKILL)

        def afterwards() -> None:
            if first_lives:
                # Who changes CURRENT last serves.
                late = ("v4", world.before) if nth > changing[-1] else ("v3", world.after)
            elif nth in changing:
                late = ("v3", world.after) if nth > serves else ("v2", world.before)
            else:
                late = ("v4", world.before)
            whole_and_serving(folder, *late)
            nothing_left(folder, keep=0)
            whole_and_serving(folder, *late)

        must(afterwards)

    def job(number: int) -> None:
        nth, first_lives = chosen[(number - 1) // 2], bool(number % 2)
        with copied(world.template, f"two-{nth}-{first_lives}") as out:
            play(nth, first_lives, out)

    for_each(2 * len(chosen), job)
    return [points[nth - 1] for nth in chosen]


def kill_shard_builds(world: World) -> list[str]:
    """The builder of one shard dies at every other failpoint; the other's part stays, the next builder completes."""
    ready = world.folder / "ready"
    shutil.copytree(world.template, ready)
    must(lambda: world.build_shard(ready, 0))
    part = part_folder(ready / "demo", "v3", 0)
    before = {path.name: path.read_bytes() for path in part.rglob("*") if path.is_file()}
    with copied(ready, "counted") as out:
        points = failpoints(lambda: world.build_shard(out, 1), out)

    def job(number: int) -> None:
        nth = 2 * number - 1  # what they do is what a whole build does, which dies at each
        with copied(ready, f"shard-{nth}") as out:
            folder = IndexFolder(out / "demo")
            assert wait(fork(at(nth, signal.SIGKILL, lambda: world.build_shard(out, 1)))) == -signal.SIGKILL

            def look_and_go_on() -> None:
                whole_and_serving(folder, "v2", world.before)
                folder.gc(1)  # what waits for publishing stays
                world.build_shard(out, 1, resume=number % 2 == 0)
                other = part_folder(folder.path, "v3", 0)
                assert {path.name: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
                assert file_hashes(publish(out, "v3")[1]) == world.hashes
                whole_and_serving(folder, "v3", world.after)
                nothing_left(folder, keep=nth % 3)

            must(look_and_go_on)

    for_each((len(points) + 1) // 2, job)
    return points


def kill_publish(world: World) -> list[str]:
    """Publishing dies at each failpoint, and can be repeated, also where the next build swept up before."""
    ready = world.folder / "ready"
    shutil.copytree(world.template, ready)
    must(lambda: [world.build_shard(ready, number) for number in range(2)])
    with copied(ready, "counted") as out:
        points = failpoints(lambda: publish(out, "v3"), out)
    serves = points.index("rename CURRENT") + 1

    def job(nth: int) -> None:
        with copied(ready, f"publish-{nth}") as out:
            folder = IndexFolder(out / "demo")
            assert wait(fork(at(nth, signal.SIGKILL, lambda: publish(out, "v3")))) == -signal.SIGKILL

            def look_and_go_on() -> None:
                whole_and_serving(folder, *(("v3", world.after) if nth > serves else ("v2", world.before)))
                if nth % 2:
                    folder.sweep()
                assert file_hashes(publish(out, "v3")[1]) == world.hashes
                whole_and_serving(folder, "v3", world.after)
                nothing_left(folder, keep=nth % 3)

            must(look_and_go_on)

    for_each(len(points), job)
    return points


def announced_and_synced(world: World) -> list[str]:
    """Every step that changes the disk comes right after its failpoint; what is renamed was synced before."""
    out = world.folder / "looked-at"
    verbs = {"os.mkdir": "make folder", "os.remove": "delete", "os.rmdir": "delete folder", "os.rename": "rename"}

    def watch() -> None:
        announced: list[str] = []
        seen: list[str] = []
        synced: dict[int, int] = {}  # inode -> when it was last changed
        fsync = os.fsync

        def recorded_fsync(descriptor: int) -> None:
            fsync(descriptor)
            status = os.fstat(descriptor)
            synced[status.st_ino] = status.st_mtime_ns
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            assert announced[-1].removeprefix("fsync ").removeprefix("folder ") == name, (announced[-1], name)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            verb = verbs.get(event)
            if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                verb = "create"
            if verb is None or not str(arguments[0]).startswith(str(out)):
                return
            source, target = str(arguments[0]), str(arguments[1] if verb == "rename" else arguments[0])
            step = f"{verb} {target.rpartition('/')[2]}"
            if verb == "delete" and not os.path.lexists(source):
                return
            seen.append(step)
            if announced[-1] != step:
                raise AssertionError(f"{step}: announced was {announced[-1]}")
            if verb == "rename":
                for path in [Path(source), *Path(source).rglob("*")]:
                    status = path.stat()
                    if synced.get(status.st_ino) != status.st_mtime_ns and ".trash-" not in target:
                        raise AssertionError(f"{target} before {path} was synced")

        os.fsync = recorded_fsync
        storage.failpoint = announced.append
        sys.addaudithook(audit)
        for version, corpus in (("v1", world.new), ("v2", world.texts), ("v3", world.new)):
            world.build(out, version, corpus=corpus)
            assert announced[-2:] == ["fsync folder demo", f"delete .state-{version}"], "CURRENT's rename is synced"
        folder = IndexFolder(out / "demo")
        folder.rollback()
        assert announced[-1] == "fsync folder demo"
        folder.gc(0)
        (world.folder / "watched.json").write_text(json.dumps(seen))

    must(watch)
    seen: list[str] = json.loads((world.folder / "watched.json").read_text())
    return seen


SCENARIOS = {
    work.__name__: work
    for work in (
        kill_builds,
        kill_text_builds,
        kill_resumed_builds,
        kill_gc,
        kill_rollback,
        two_builds,
        kill_shard_builds,
        kill_publish,
        announced_and_synced,
    )
}


if __name__ == "__main__":
    json.dump(SCENARIOS[sys.argv[1]](World(Path(sys.argv[2]))), sys.stdout)
