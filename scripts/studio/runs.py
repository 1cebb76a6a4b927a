"""
The routes of runs: /api/runs shows, starts, stops and resumes them, /api/settings lists settings.

A run is a folder in runs/, whoever started it, and is only read here. What the page starts leaves
its settings (until the run has begun) and its output in runs/.studio/.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lora import config, files
from lora.base.fetch import KNOWN
from lora.run import cli, lock, runlog

from .guard import read_object

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
STUDIO = Path("runs/.studio")
ROOTS = ("runs", "model", "examples")         # where files and models may be that the page names
CURVES = ("loss", "val_loss", "recall", "retention", "lr", "tokens_per_s")
MOST = 1000                                   # points of a curve

_guard = threading.RLock()                    # one start, or one look at a start's lock, at a time
_started: list[tuple[str, subprocess.Popen]] = []


def routes() -> list[Route]:
    return [Route("/api/runs", listed), Route("/api/runs", posted(start), methods=["POST"]),
            Route("/api/runs/{name}", details), Route("/api/runs/{name}/answers", answers),
            Route("/api/runs/{name}/stop", posted(stop), methods=["POST"]),
            Route("/api/runs/{name}/resume", posted(resume), methods=["POST"]),
            Route("/api/settings", settings)]


class Json(JSONResponse):
    """JSON of what files held: NaN, which browsers refuse, becomes null; a half of a surrogate pair
    is no error."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content)
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(json.loads(text, parse_constant=lambda name: None))
        return text.encode()


def posted(work: Callable) -> Callable:
    """An endpoint that hands the object it receives to work(body, name=...), in a thread."""
    async def endpoint(request: Request):
        body = await read_object(request) if await request.body() else {}
        return await run_in_threadpool(work, body, **request.path_params)
    return endpoint


# ----- metrics and answers -----------------------------------------------------------------------


def parse(line: bytes) -> dict:
    """A line with a step; {} if it is damaged."""
    try:
        value = json.loads(line)
        return value if type(value["step"]) is int and 0 <= value["step"] < 2**53 else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


def numbers(line: bytes) -> dict:
    """The numbers of a line, true and false too."""
    return {key: value for key, value in parse(line).items() if is_number(value)}


class Metrics:
    """metrics.jsonl as the list shows it. Each line is read once, when it is whole; a file that was
    cut or replaced is read anew. A step's line is not parsed unless it is the last."""

    def __init__(self, file: Path):
        self.file, self.guard = file, threading.Lock()
        self.begin()

    def begin(self) -> None:
        self.offset, self.mark, self.stamp = 0, b"", None
        self.first = self.best = None
        self.last, self.n_evaluations, self.evaluated, self.damaged = b"", 0, 0, 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[Self]:
        """Read what is new; no other thread does within the block."""
        with self.guard:
            if self.file.is_file():
                self._read()
            else:
                self.begin()
            yield self

    def _read(self):
        stat = self.file.stat()
        stamp = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if stamp == self.stamp:
            return
        with open(self.file, "rb") as file:
            file.seek(self.offset - len(self.mark))
            if file.read(len(self.mark)) != self.mark:         # the end of the last line taken
                self.begin()
                file.seek(0)
            for line in file:
                if line.endswith(b"\n"):
                    self.take(line)
                    self.offset, self.mark = self.offset + len(line), line[-200:]
        self.stamp = stamp

    def take(self, line: bytes) -> None:
        if b'"loss"' in line:
            self.last = line
        elif b'"epoch_loss"' not in line:
            record = numbers(line)
            self.n_evaluations += 1 if record else 0
            self.damaged += 0 if record else 1
            self.evaluated = record.get("step", self.evaluated)
            self.first = record if record.get("step") == 0 else self.first
            self.best = record if record.get("best") else self.best

    def seconds_left(self, steps: Any) -> float | None:
        """The steps left at the pace so far, and the evaluations left at the length of those so
        far: what the run took beyond its steps since the first evaluation began, when status.json
        was written. After a resume that counts too little, never too much."""
        last, n = numbers(self.last), self.n_evaluations
        step, seconds = last.get("step"), last.get("seconds")
        if not (step and seconds and is_number(steps)):
            return None
        beyond = _age(self.file) - _age(self.file.with_name("status.json")) - seconds
        every = self.evaluated / (n - 1) if n > 1 and self.evaluated else max(1, steps)
        return max(0, steps - step) * (seconds / step + max(0, beyond) / max(1, n) / every)


class Curves(Metrics):
    """The same with curves: {name: [(n, steps, values)]}, sums over n neighbours."""

    def begin(self) -> None:
        super().begin()
        self.curves = {name: [] for name in CURVES}

    def take(self, line: bytes) -> None:
        super().take(line)
        record = parse(line)
        for name, points in self.curves.items():
            if is_number(record.get(name)):
                points.append((1, record["step"], record[name]))
                if len(points) > 2 * MOST:
                    points[:] = merged(points, MOST)


def merged(points: list[tuple], n: int) -> list[tuple]:
    """Sum points in n equal buckets of steps, if there are more."""
    if len(points) <= n:
        return points
    places = [steps / count for count, steps, _ in points]
    first, width, buckets = places[0], (places[-1] - places[0]) / n or 1, {}
    for place, (count, steps, values) in zip(places, points, strict=True):
        key = min(n - 1, max(0, int((place - first) / width)))
        a, b, c = buckets.get(key, (0, 0, 0))
        buckets[key] = a + count, b + steps, c + values
    return list(buckets.values())


metrics_of, curves_of = lru_cache(1000)(Metrics), lru_cache(32)(Curves)


@lru_cache(4)
def answers_in(file: Path, stamp: tuple) -> tuple[list, list]:
    """(steps, questions) of answers.jsonl: each answer where its text changed. stamp is the file's
    size and time."""
    steps, asked = [], {}
    with open(file, "rb") as lines:
        for record in filter(None, map(parse, lines)):
            step = record["step"]
            for place, said in enumerate(record["answers"]):
                question, text, right = said["question"], said["answer"], said.get("right")
                about = asked.setdefault((place, question), {
                    "question": question, "value": said.get("value"), "answers": [], "flipped": []})
                before = about["answers"][-1] if about["answers"] else None
                if before and before["right"] is not right:
                    about["flipped"].append([steps[-1], step, "gained" if right else "lost"])
                if not before or before["text"] != text:
                    about["answers"].append({"step": step, "text": text, "right": right})
            steps.append(step)
    return steps, list(asked.values())


def tail(file: Path, n: int = 60) -> list[str]:
    """The last n lines with a text in the last 32 KiB of a file; [] without one."""
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 2**15))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines[1 if size > 2**15 else 0:] if line.strip()][-n:]


# ----- reading runs ------------------------------------------------------------------------------


def names() -> list[str]:
    """The runs here, and the starts that have not become one."""
    found = {p.parent.name for kind in ("config", "run", "status")
             for p in Path("runs").glob(f"*/{kind}.json")} | {p.stem for p in STUDIO.glob("*.json")}
    return [name for name in found if is_name(name)]


def is_name(name: Any) -> bool:
    """Whether a run may have this name; runs/uploads is what the page uploaded."""
    return isinstance(name, str) and bool(config.RUN.fullmatch(name)) and name != "uploads"


def folder_of(name: Any) -> Path:
    """The folder of a run, which may not exist yet. Raises ValueError for a name that is none, and
    for a folder that leads out of runs/."""
    folder = Path("runs", name).resolve() if is_name(name) else None
    if not folder or not (folder.is_dir() or (STUDIO / f"{name}.json").exists()):
        raise ValueError(f"run: {name!r:.80} is no run here")
    if folder.parent != Path("runs").resolve():
        raise ValueError(f"run: runs/{name} leads out of runs/, to {folder}")
    if folder.is_dir():
        files.stay_inside(folder)
    return folder


def object_in(file: Path, problems: list[str]) -> dict:
    """The object in a JSON file; {} without one. problems receives what is wrong with it."""
    try:
        value = files.read_json(file) if file.is_file() else {}
        if isinstance(value, dict):
            return value
        problems.append(f"{file.name} holds no object")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file.name} cannot be read: {error}")
    return {}


def _age(file: Path) -> float:
    """When a file was written; 0 without one."""
    with contextlib.suppress(OSError):
        return file.stat().st_mtime
    return 0


def _is_starting(name: str) -> bool:
    """Whether the process that the page started lives: it holds the lock of its log."""
    with _guard, contextlib.suppress(FileNotFoundError), open(STUDIO / f"{name}.log") as log:
        try:
            if lock.fcntl:
                lock.fcntl.flock(log, lock.fcntl.LOCK_SH | lock.fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def state_of(folder: Path, problems: list[str]) -> tuple[str, str]:
    """(state, message) of a run. A process that the page started and that has not got to the run's
    folder is "starting" or "resuming"; if it ended before, the message is what it said."""
    asked, log = STUDIO / f"{folder.name}.json", STUDIO / f"{folder.name}.log"
    if asked.exists() and _age(asked) <= max(
            _age(folder / "run.json"), _age(folder / "status.json")):
        asked.unlink(missing_ok=True)                          # the run has begun
    if lock.holder(folder) is not None:
        return "training", ""
    recorded = _recorded(folder, problems)
    if not asked.exists():
        return recorded
    said = tail(log, 1000) or ["it left no message"]
    if _is_starting(folder.name):
        return "resuming" if "--resume" in said[0] else "starting", said[-1]
    errors = [i for i, line in enumerate(said) if line.startswith("error: ")]
    why = "\n".join(said[errors[0] if errors else -1:])
    if (folder / "config.json").exists():
        return recorded[0], f"the last start did not begin: {why}"
    return "stopped" if why in ("stopped", "KeyboardInterrupt") else "failed", why


def _recorded(folder, problems):
    """(state, message) as the run itself wrote them."""
    status = object_in(folder / "status.json", problems)
    state = status.get("state")
    if state in ("finished", "stopped", "failed"):
        return state, str(status.get("message") or "")
    if state == "training" and lock.holder(folder) is not None:
        return state, ""                                       # it began a moment ago
    if state == "training":
        return "failed", "the process is gone; resume goes on from the last checkpoint"
    return "finished" if (folder / "samples.md").exists() else "stopped", ""


def entry(name: str, problems: list[str], metrics: Callable = metrics_of) -> dict:
    """A run as the list shows it. problems receives what is damaged."""
    folder = folder_of(name)
    state, message = state_of(folder, problems)
    begun = state != "starting"                       # until then the numbers are of an earlier run
    state = "training" if state in ("starting", "resuming") else state
    info = object_in(folder / "run.json", problems) if begun else {}
    steps = object_in(folder / "status.json", []).get("steps") if begun else None
    with metrics(folder / ("metrics.jsonl" if begun else "none")).reading() as seen:
        last, first, best = numbers(seen.last), seen.first, seen.best
        step, eta = max(last.get("step", 0), seen.evaluated), seen.seconds_left(steps)
        if seen.damaged:
            problems.append(f"metrics.jsonl: {seen.damaged} lines cannot be read")
    base, dtype, started = (str(info[key]) if key in info else None
                            for key in ("base_model", "dtype", "started"))
    weights = folder / "adapter" / "adapter_model.safetensors"
    return {"name": name, "state": state, "message": message or "; ".join(problems), "base": base,
            "dtype": dtype and dtype.removeprefix("torch."), "started": started,
            "adapter_bytes": weights.stat().st_size if weights.is_file() else None,
            "step": step, "steps": steps, "seconds": last.get("seconds"), "best": best,
            "first": first, "best_step": best and best["step"],
            "eta_s": eta if state == "training" else None,
            "memory_gib": last.get("peak_memory_gib")}


def listed(request: Request):
    """Every run, the newest first. A damaged one says so in its message."""
    with _guard:                                               # processes that ended are let go
        _started[:] = [pair for pair in _started if pair[1].poll() is None]

    def began(name):
        return max(_age(Path("runs", name, "run.json")), _age(STUDIO / f"{name}.json"))
    found = []
    for name in sorted(names(), key=began, reverse=True):
        try:
            found.append(entry(name, []))
        except (OSError, ValueError) as error:
            found.append({"name": name, "state": "failed", "message": str(error), "step": 0,
                          "best": None, "first": None})
    return Json({"runs": found})


def details(request: Request):
    """A run with its settings, its curves of at most `points` points and its last messages."""
    name, points = request.path_params["name"], request.query_params.get("points", "300")
    if not re.fullmatch(r"[0-9]{1,4}", points) or not 2 <= int(points) <= MOST:
        raise ValueError(f"points: is {points!r:.20}; expected 2 to {MOST}")
    folder, problems = folder_of(name), []
    chosen = object_in(folder / "config.json", problems) or object_in(STUDIO / f"{name}.json", [])
    run = entry(name, problems, curves_of)
    with curves_of(folder / "metrics.jsonl").reading() as drawn:
        curves = {key: [[steps / n, values / n] for n, steps, values in merged(every, int(points))]
                  for key, every in drawn.curves.items()}
    return Json({**run, "settings": chosen, "curves": curves,
                 "messages": tail(folder / "messages.txt") or tail(STUDIO / f"{name}.log")})


def answers(request: Request):
    """What a run answered to its questions, and which facts it gained or lost."""
    folder = folder_of(request.path_params["name"])
    file = folder / "answers.jsonl"
    with metrics_of(folder / "metrics.jsonl").reading() as seen:
        best = seen.best
    try:
        stat = file.stat() if file.is_file() else None
        steps, questions = answers_in(file, (stat.st_size, stat.st_mtime_ns)) if stat else ([], [])
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"run: {file} cannot be read: {error!r}") from error
    return Json({"steps": steps, "best_step": best and best["step"], "questions": questions})


# ----- starting and stopping ---------------------------------------------------------------------


def is_inside(path: str, roots: Iterable[str] = ROOTS) -> bool:
    """Whether a path, with its links followed, exists in one of the folders."""
    try:
        where = Path(path).resolve()
    except (OSError, ValueError):                              # a circle of links, NUL
        return False
    return os.path.exists(where) and any(where.is_relative_to(Path(r).resolve()) for r in roots)


def path_problems(values: dict, roots: Iterable[str] = ROOTS) -> list[dict]:
    """What is wrong with the paths among settings: [{"field", "message"}]."""
    problems = []
    for field in ("model.name", "model.adapter", "data.path", "data.val_path", "data.system",
                  "keep.replay", "keep.retain"):
        section, _, key = field.partition(".")
        path = values[section].get(key) if isinstance(values.get(section), dict) else None
        if not isinstance(path, str) or is_inside(path, roots) or (
                field == "data.path" and path == "data.py") or (
                field == "model.name" and is_model_name(path)) or (
                field == "data.system" and not (path.endswith(".txt") and os.path.isfile(path))):
            continue
        where = ", ".join(f"{root}/" for root in roots)
        problems.append({"field": field, "message": f"{field} is {path!r:.80}; expected a file or "
                         f"folder in {where}"})
    return problems


def is_model_name(name: str) -> bool:
    """Whether a text is a known model or a hub id, and no path."""
    return name in KNOWN or (re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
                             and name.partition("/")[0] not in ROOTS and not os.path.lexists(name))


def setting_problems(values: dict) -> list[dict]:
    """What is wrong with settings: [{"field", "message"}]. Of files it reads none outside ROOTS."""
    problems = path_problems(values)
    if isinstance(values.get("model"), dict) and values["model"].get("trust_remote_code"):
        problems.append({"field": "model.trust_remote_code", "message": "model.trust_remote_code: "
                         "the page runs no code of a model; start such a run in a terminal"})
    wrong, known = {problem["field"] for problem in problems}, config.flat(config.Config())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "settings.json"
        file.write_text(json.dumps({section: {
            key: value for key, value in content.items() if f"{section}.{key}" not in wrong}
            if isinstance(content, dict) else content for section, content in values.items()}))
        try:
            if config.load(file).train.run == "uploads":
                problems.append({"field": "train.run", "message": "train.run is the folder of "
                                 "uploaded files; choose another name"})
        except ValueError as error:
            for sentence in str(error).removeprefix(f"{file}: ").split(f"\n{file}: "):
                named = re.match(r"\w+\.\w+", sentence)
                problems.append({"field": named[0] if named and named[0] in known else "",
                                 "message": sentence})
    return problems


def _launch(name, words, values):
    """Start train.py in a session of its own: it outlives the server. Its log is locked for as
    long as it lives."""
    asked, log = STUDIO / f"{name}.json", STUDIO / f"{name}.log"
    with _guard:
        if state_of(Path("runs", name), [])[0] in ("training", "starting", "resuming"):
            raise ValueError(f"run: {name} trains now; stop it first, or choose another train.run")
        STUDIO.mkdir(parents=True, exist_ok=True)
        runlog.write_json(asked, values)
        log.unlink(missing_ok=True)                            # an earlier process may hold it
        with open(log, "x", encoding="utf-8") as out:
            if lock.fcntl:
                lock.fcntl.flock(out, lock.fcntl.LOCK_EX)
            print("python train.py", *words, file=out, flush=True)
            _started.append((name, subprocess.Popen(
                [sys.executable, "-u", str(TRAIN), *words], stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True)))


def start(body: dict):
    """Start a run with these settings. kept says that an earlier run of this name is renamed."""
    values = body.get("settings")
    if not isinstance(values, dict):
        raise ValueError('settings: expected {"section": {"key": value}}')
    if problems := setting_problems(values):
        return Json({"error": "\n".join(p["message"] for p in problems), "problems": problems}, 400)
    name = values.get("train", {}).get("run", config.TrainConfig.run)
    kept = Path("runs", name).exists()
    _launch(name, ["--config", f"{STUDIO}/{name}.json"], values)
    return Json({"name": name, "kept": kept})


def resume(body: dict, name: str):
    """Go on with a run from its last checkpoint."""
    chosen = config.load(folder_of(name) / "config.json")
    if chosen.model.trust_remote_code:
        raise ValueError(f"run: {name} runs the code of its model, the page does not; in a "
                         f"terminal: python train.py --resume runs/{name}")
    _launch(name, ["--resume", f"runs/{name}"], asdict(chosen))
    return Json({"name": name})


def stop(body: dict, name: str):
    """Stop a run as Ctrl-C does: after this step, with a checkpoint; a second time, at once."""
    folder = folder_of(name)
    holder, ours = lock.holder(folder), [process for of, process in _started if of == name]
    if holder:
        with contextlib.suppress(ProcessLookupError):          # it ended a moment ago
            os.kill(holder, signal.SIGINT)
    elif ours and state_of(folder, [])[0] in ("starting", "resuming"):
        ours[-1].send_signal(signal.SIGINT)
    else:
        raise ValueError(f"run: {name} does not train now")
    return Json({"name": name})


def settings(request: Request):
    """Every setting with its documentation and its value in config.json, and the models here."""
    problem, values = "", config.flat(config.Config())
    try:
        values = config.flat(config.load()) if Path("config.json").exists() else values
    except ValueError as error:
        problem = str(error)
    folders = sorted(p.parent.name for p in Path("model").glob("*/config.json"))
    return Json({"problem": problem, "models": [
        *KNOWN, *(f"model/{name}" for name in folders if name not in KNOWN)], "settings": [
        {"key": key, "section": key.partition(".")[0], "name": key.partition(".")[2],
         "default": json.loads(default), "values": kind, "comment": comment, "value": values[key]}
        for key, default, kind, comment in cli.described()]})
