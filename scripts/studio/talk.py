"""
The page's own talk: GET /api/voices, POST /api/talk as a stream of events, POST /api/keep.

An exchange that is kept goes to runs/good.jsonl, a file that training reads: --data.path=...
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lora.run import runlog
from lora.use.conversation import MEMORIES, Conversation

from .engine import Engine, Entry, Job, decoding, entries, find
from .guard import Events, Refused, number, read_object, text_of

KEPT = Path("runs/good.jsonl")
MOST = 2**26                      # bytes of that file
BUDGET = 512                      # tokens sent to a base; to a run those of its dataset.max_length
_writing = threading.Lock()


def routes(engine: Engine) -> list[Route]:
    summaries = {}                # {hash of a base and turns: their summary}

    def voices(request: Request):
        (known, problems), held = entries(), engine.voices
        problems += held.problems if held else []
        return JSONResponse({"loaded": engine.loaded, "problems": problems, "voices": [
            {"id": e.id, "kind": "adapter" if e.run else "base", "base": e.base,
             "system": e.system} for e in known.values()]})

    async def talk(request: Request):
        asked = await read_object(request)
        entry, strength = await run_in_threadpool(find, asked.get("voice"))
        job = engine.submit(Job(entry, conversation(engine, asked, entry, summaries),
                                decoding(asked), number(asked, "scale", strength, 0, 4)))
        return Events(events(job), lambda: engine.drop(job))
    return [Route("/api/voices", voices), Route("/api/talk", talk, methods=["POST"]),
            Route("/api/keep", keep, methods=["POST"])]


async def events(job: Job):
    """A job's events as the page reads them."""
    while True:
        event = await job.next()
        yield f"data: {json.dumps(event)}\n\n"
        if "done" in event or "error" in event:
            return


def conversation(engine: Engine, asked: dict, entry: Entry, summaries: dict) -> Callable:
    """What a job is to prepare: the messages that memory keeps of the page's turns, and what the
    page shows of that. summaries grows: a page sends all its turns each time."""
    question = text_of(asked.get("question"), "question")
    system = asked["system"] if "system" in asked else entry.system
    if system is not None and not text_of(system, "system").strip():
        system = None
    turns, memory = asked.get("turns") or [], asked.get("memory") or MEMORIES[0]
    length = entry.run.settings.dataset.max_length if entry.run else BUDGET
    budget = number(asked, "budget", length, 8, 10**6, int)
    if not isinstance(turns, list) or len(turns) > 1000 or not all(
            isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise Refused("turns: expected at most 1000 pairs [question, answer]")
    turns = [tuple(text_of(text, f"turns[{i}]") for text in turn) for i, turn in enumerate(turns)]
    if memory not in MEMORIES:
        raise Refused(f"memory is {memory!r:.60}; expected {', '.join(MEMORIES)}")
    keys = [hash((entry.base, *turns[:n])) for n in range(len(turns) + 1)]

    def prepare(voices, name):
        def count(messages):
            engine.go_on()
            return len(voices.voice(name).ids(messages))

        def summarise(summary, older):
            for i in range(0, len(older), 4):
                summary = voices.summarise(summary, older[i:i + 4])
            return summary
        talk = Conversation(count, min(budget, engine.room([])), system, memory, summarise)
        talk.turns = turns
        talk.folded = max((n for n, key in enumerate(keys) if key in summaries), default=0)
        talk.summary = summaries.get(keys[talk.folded], "")
        sent = talk.messages(question)
        if talk.folded:
            summaries[keys[talk.folded]] = talk.summary
            for key in list(summaries)[:-100]:
                del summaries[key]
        written = sent[0]["content"] if sent[0]["role"] == "system" else ""
        return sent, {"n_turns": sum(m["role"] == "assistant" for m in sent),
                      "notes": written.removeprefix(system or "").strip()}
    return prepare


async def keep(request: Request):
    asked = await read_object(request)
    messages = asked.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Refused("messages: expected a list of messages")
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise Refused(f"messages have the roles {roles!r:.80}; expected user and assistant, behind "
                      "a system prompt or none")
    kept = [{"role": m["role"], "content": text_of(m.get("content"), f"messages[{i}]")}
            for i, m in enumerate(messages)]
    if not all(m["content"].strip() for m in kept):
        raise Refused("messages: one of them is empty")
    return JSONResponse({"file": str(KEPT), "n": await run_in_threadpool(add, kept)})


def add(messages: list[dict]) -> int:
    """Add a line to the file of what was kept; return how many it has."""
    with _writing:
        KEPT.parent.mkdir(exist_ok=True)
        before = KEPT.read_bytes() if KEPT.exists() else b""
        if len(before) > MOST:
            raise Refused(f"{KEPT} has {len(before)} bytes already; rename it", 413)
        if before and not before.endswith(b"\n"):              # edited by hand
            with open(KEPT, "ab") as file:
                file.write(b"\n")
        runlog.append(KEPT, {"messages": messages})
        return len(KEPT.read_bytes().splitlines())
