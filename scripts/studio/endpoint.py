"""
OpenAI's protocol: GET /v1/models and POST /v1/chat/completions, whole or as a stream.

    client = openai.OpenAI(base_url="http://127.0.0.1:8741/v1", api_key="none")
    client.chat.completions.create(model="bram@0.6", messages=[{"role": "user", "content": "Hi"}])

model is a base, a run, or a run with a strength. What would change an answer and is not computed
here is refused by name, so no client believes that it was heard.
"""

import json
import time
import uuid

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from .engine import Engine, Entry, Job, decoding, entries, find
from .guard import Events, Refused, in_protocol, read_object, text_of, while_there

ONLY = {  # parameters that change an answer, and the values at which they do not
    "n": (1,), "tools": ([],), "functions": ([],), "response_format": ({"type": "text"},),
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "frequency_penalty": (0,),
    "presence_penalty": (0,), "top_k": (0, -1), "min_p": (0,),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "reasoning_effort": ("none",)}
IN_MESSAGES = ("tool_calls", "function_call", "audio")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def routes(engine: Engine) -> list[Route]:
    def models(request: Request):
        return JSONResponse({"object": "list", "data": [card(e) for e in entries()[0].values()]})

    def model(request: Request):
        name = request.path_params["name"]
        return JSONResponse({**card(find(name)[0]), "id": name})

    async def complete(request: Request):
        asked = await read_object(request)
        entry, scale = await run_in_threadpool(find, asked.get("model"))
        messages, options = messages_of(asked, entry), options_of(asked)
        job = engine.submit(Job(entry, lambda *_: (messages, {}), options, scale, stops_of(asked)))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()),
                "model": asked["model"]}
        streams = asked.get("stream") is True
        try:                     # the status of a stream is known when its answer begins
            found = await while_there(request, job.until("sent" if streams else "done"))
        except BaseException:
            engine.drop(job)
            raise
        if streams:
            with_usage = (asked.get("stream_options") or {}).get("include_usage") is True
            return Events(chunks(job, head, with_usage), lambda: engine.drop(job))
        choice = {"index": 0, "logprobs": None, "finish_reason": reason(found),
                  "message": {"role": "assistant", "content": found["text"], "refusal": None}}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice],
                             "usage": usage(found)})
    return [Route("/v1/models", models), Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", complete, methods=["POST"])]


def card(entry: Entry) -> dict:
    owner = entry.base if entry.run else "base"
    return {"id": entry.id, "object": "model", "created": entry.created, "owned_by": owner}


def usage(done: dict) -> dict:
    return {"prompt_tokens": done["n_prompt"], "completion_tokens": done["n_tokens"],
            "total_tokens": done["n_prompt"] + done["n_tokens"]}


def reason(done: dict) -> str:
    return "stop" if done["ended"] else "length"


async def chunks(job: Job, head: dict, with_usage: bool):
    """The events of a stream: the role, the text in pieces, why it ended, the usage."""
    def chunk(choices, **more):
        more = {"usage": None, **more} if with_usage else more
        return event({**head, "object": "chat.completion.chunk", "choices": choices, **more})

    def piece(delta, ended=None):
        return chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": ended}])
    yield piece({"role": "assistant", "content": ""})
    said, done = "", None
    while done is None:
        found = await job.next()
        if "error" in found:
            yield event(in_protocol(found["error"], found["status"], code=found["code"]))
            return
        done = found.get("done")
        text = done["text"] if done else found["text"]
        if len(text) > len(said):
            yield piece({"content": text[len(said):]})
            said = text
    yield piece({}, reason(done))
    if with_usage:
        yield chunk([], usage=usage(done))
    yield "data: [DONE]\n\n"


def event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


# ----- reading a request -------------------------------------------------------------------------


def options_of(asked: dict) -> dict:
    """How to decode. Refused for a parameter that would change the answer and is not computed."""
    for name, neutral in ONLY.items():
        if asked.get(name) is not None and asked[name] not in neutral:
            only = "".join(f"; only {json.dumps(value)} is" for value in neutral[:1])
            raise Refused(f"{name} {json.dumps(asked[name]):.60} is not supported here{only}",
                          param=name, code="unsupported_parameter")
    for name, kind in (("stream", bool), ("stream_options", dict)):
        if not isinstance(asked.get(name), kind | None):
            raise Refused(f"{name} is {asked[name]!r:.60}; expected {kind.__name__}", param=name)
    newer = "max_completion_tokens"
    return decoding(asked, "max_tokens" if asked.get(newer) is None else newer)


def stops_of(asked: dict) -> tuple[str, ...]:
    """The texts that end the answer: one, or up to four."""
    stops = asked.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(
            isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops):
        raise Refused(f"stop is {asked['stop']!r:.60}; expected a text or up to four", param="stop")
    return tuple(stops)


def messages_of(asked: dict, entry: Entry) -> list[dict]:
    """The messages, with the run's own system prompt where the client has none."""
    given = asked.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused("messages: expected a list of messages", param="messages")
    messages = [message_of(message, f"messages[{i}]") for i, message in enumerate(given)]
    if messages[-1]["role"] != "user":
        raise Refused(f"messages: the last one is the {messages[-1]['role']}'s; expected the "
                      "user's", param="messages")
    if entry.system is None or any(m["role"] == "system" for m in messages):
        return messages
    return [{"role": "system", "content": entry.system}, *messages]


def message_of(given: object, where: str) -> dict:
    """A message with its text, which may come as a list of parts."""
    role = given.get("role") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(role, str) or role not in ROLES:
        raise Refused(f"{where}.role is {role!r:.60}; expected {', '.join(ROLES)}", param=where)
    for name in IN_MESSAGES:
        if given.get(name):
            raise Refused(f"{where}.{name} is not supported here", param=where,
                          code="unsupported_parameter")
    content = given.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise Refused(f"{where}: a part of the type {other[0]!r:.60} is not supported here; "
                          "only text is", param=where, code="unsupported_parameter")
        content = "".join(text_of(part.get("text"), where) for part in content)
    return {"role": ROLES[role], "content": text_of(content, where)}
