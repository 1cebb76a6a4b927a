"""
The routes of data: /api/files lists and /api/upload stores files, /api/doctor says what is wrong
with one, /api/mask shows what of an example is trained.

They read with the tokenizer alone, and never run code of a model.
"""

import contextlib
import io
import sys
import threading
from dataclasses import replace
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

import data
from lora import config, files
from lora.loss import IGNORE_INDEX
from lora.use import show
from scripts import doctor

from .runs import Json, folder_of, is_inside, object_in, path_problems, posted

UPLOADS = Path("runs/uploads")
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".md")
FACTS = Path(data.__file__).stat().st_mtime_ns        # data.py as this process has it

_guard = threading.Lock()                     # one look at a time
_last: dict[tuple, tuple] = {}                # the data of the last look


def routes() -> list[Route]:
    return [Route("/api/files", listed), Route("/api/upload", upload, methods=["POST"]),
            Route("/api/doctor", posted(findings), methods=["POST"]),
            Route("/api/mask", posted(mask), methods=["POST"])]


def listed(request: Request):
    """The files that can be looked at and trained on."""
    found = [*Path("examples").rglob("*"), *Path("runs").glob("*"), *UPLOADS.glob("*")]
    return Json({"files": ["data.py", *sorted(
        file.as_posix() for file in found if file.suffix in SUFFIXES and file.is_file()
        and file.name != "config.json" and is_inside(file))]})


async def upload(request: Request):
    """Store the body as a file of its own in runs/uploads/; a name that is taken gets a number."""
    name, body = request.query_params.get("name", ""), await request.body()
    if not config.RUN.fullmatch(name) or Path(name).suffix not in SUFFIXES:
        raise ValueError(f"upload: the name is {name!r:.80}; expected a plain name that ends in "
                         f"{', '.join(SUFFIXES)}")
    return Json({"path": (await run_in_threadpool(store, name, body)).as_posix()})


def store(name: str, body: bytes) -> Path:
    """Write a file into runs/uploads/ under a name that is free."""
    with _guard:
        UPLOADS.mkdir(parents=True, exist_ok=True)
        file, n = UPLOADS / name, 1
        while file.exists():
            n += 1
            file = UPLOADS / f"{Path(name).stem}-{n}{Path(name).suffix}"
        files.write(file, body)
        return file


# ----- looking -----------------------------------------------------------------------------------


class Heard(io.StringIO):
    """Standard output that keeps what this thread prints; other threads' goes where it went."""

    def __init__(self):
        super().__init__()
        self.thread, self.stream = threading.get_ident(), sys.stdout

    def write(self, text: str) -> int:
        mine = threading.get_ident() == self.thread
        return super().write(text) if mine else self.stream.write(text)


def settings_of(body: dict) -> config.Config:
    """The settings of the run that the page names, else config.json's, with the page's file as the
    data. That one must be in examples/ or runs/, those of the settings in the project's folder."""
    run, path = body.get("run"), body.get("path")
    file = folder_of(run) / "config.json" if run is not None else Path("config.json")
    own = object_in(file, []).get("data")                      # what is wrong there, load() says
    own = {**own, "path": None if path else own.get("path")} if isinstance(own, dict) else {}
    given = {"path": str(path)} if path else {}
    if problems := [*path_problems({"data": own}, ["."]),
                    *path_problems({"data": given}, ["examples", "runs"])]:
        raise ValueError("\n".join(problem["message"] for problem in problems))
    settings = config.load(file)
    return replace(settings, data=replace(settings.data, **given),
                   model=replace(settings.model, trust_remote_code=False))


def read(settings: config.Config) -> tuple[doctor.Read, list[str]]:
    """(the data that settings name, what reading it printed); kept until other data is read."""
    chosen = [Path(path) for path in (settings.data.path, settings.data.val_path) if path]
    if settings.data.path == "data.py":
        chosen[0] = Path(data.__file__)
        if chosen[0].stat().st_mtime_ns != FACTS:
            raise ValueError("data: data.py was edited; start the studio again to look at it")
    key = repr(settings), *(file.stat().st_mtime_ns for file in chosen if file.exists())
    if key not in _last:
        _last.clear()
        with contextlib.redirect_stdout(Heard()) as heard:
            found = doctor.read_data(settings)
        _last[key] = found, heard.getvalue().splitlines()
    return _last[key]


def findings(body: dict):
    """What the doctor finds in a file, as scripts/doctor.py prints it."""
    settings = settings_of(body)
    with _guard:
        found, printed = read(settings)
        rows = [*doctor.findings(settings, found), *(("note", line, []) for line in printed)]
        return Json({"about": doctor.about(settings, found), "findings": [
            {"level": level, "what": what, "sources": sources[:100]}
            for level, what, sources in rows],
            "lengths": [len(item["input_ids"]) for item in found.tokenised.items],
            "examples": len(found.train) + len(found.val)})


def mask(body: dict):
    """An example in tokens: what is supervised, what is a special token."""
    settings, index = settings_of(body), body.get("index", 0)
    with _guard:
        found, _ = read(settings)
        items = found.tokenised.items
        if type(index) is not int or not 0 <= index < len(items):
            raise ValueError(f"index: is {index!r:.20}; expected 0 to {len(items) - 1}")
        spans = show.runs(items[index], found.tokenizer)
    return Json({
        "source": items[index]["source"], "n_examples": len(items),
        "n_tokens": len(items[index]["labels"]), "format": found.tokenised.format,
        "n_supervised": sum(label != IGNORE_INDEX for label in items[index]["labels"]),
        "spans": [{"text": text, "on": on, "special": special} for text, on, special in spans]})
