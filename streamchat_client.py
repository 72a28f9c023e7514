#!/usr/bin/env python3
"""The client of streamable HTTP chat: at a terminal, in scripts, and as a library, in one file.

    python3 streamchat_client.py                                    chat; /help lists the commands
    python3 streamchat_client.py "Sum this up:" < notes.txt         print the answer, and nothing else
    python3 streamchat_client.py --json "Hello" | jq .type          print the lines of the stream

    from streamchat_client import Api

    for event in Api("http://127.0.0.1:8000").chat("Hello!", "my-session"):
        if event["type"] == "chunk":
            print(event["text"], end="", flush=True)

No word is lost or doubled, since a turn has a name before it is sent, and its POST may be sent again:

    name session and turn ──► POST ──► read lines ──► complete, or an error that stays
                               ▲           │
                               └── pause ◄─┘   no connection, a cut, 30 s without a byte, 408, 429, 502, 503, 504,
                                               an error with "retryable": true

What comes again from its first line is compared with what is here. A session_info line of the same bytes: it is the
same run of the turn, and chunks up to the last that came are skipped by their chunk_number. Other bytes: another run,
since the server lost the first; what came of that is dropped. Only a terminal event ends an answer, whatever HTTP says.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import re
import shutil
import signal
import ssl
import sys
import threading
import time
import unicodedata
import uuid
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import BadStatusLine, HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from pathlib import Path
from queue import Empty, Queue
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

# ---- limits and tables. They know no function. -----------------------------------------------------------------------

SILENCE = 30  # seconds without a byte: then the server is stuck, since it sends a ping at least every 15
REPLY_TIME = 10  # seconds without a byte of an answer that is no stream: it is made at once
STOP_TIME = 3  # seconds in which a stop must work, and what comes before the first POST: a person waits
LAST_CHUNK_TIME = 1  # seconds for the last transfer chunk, which is sent together with the terminal event
RETRIES = 8  # after the first POST, and after each new chunk
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_RETRY_AFTER = 0.2, 5, 60  # seconds
RETRIED = {408, 429, 502, 503, 504}  # statuses that the same request may not get again
MAX_HEAD = 1000  # lines; http.client allows 100 for each head
MAX_LINE = 64 << 10  # bytes: the protocol's lines are shorter
MAX_ANSWER = 16 << 20  # bytes of an answer that is no stream: a session's history has no limit of its own
READ_SIZE = 64 << 10  # bytes
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"  # of the sign that something is awaited
WIDTH = 62  # columns inside a box
RULE = "─" * 60

ID = re.compile(r"(?!new$)[A-Za-z0-9_-]{1,64}")
URL = re.compile(r"https?://[^\x00- /?#@\x7f]+(/[!-\"$->@-~]*)?", re.IGNORECASE)  # without user, query and fragment
TOKEN = re.compile(r"[!-~]+")

EVENTS = {  # the types, and of their fields those that are used here ("?": a client can go on without)
    "session_info": "model? created?", "status": "context_messages?", "chunk": "text chunk_number",
    "complete": "finish_reason? total_chunks? message_count?", "error": "message code? retryable?", "ping": "",
}
TERMINAL = ("complete", "error")
OWN = ("retry", "resumed")  # types of events that this client makes, and takes from no server
GAP = "a part of the stream is missing"
NONSENSE = "The server sent {}. Is it a server of this protocol?"
FIELDS: dict[str, type | tuple[type, ...]] = {
    "session_id": str, "model": str, "created": bool, "timestamp": str, "context_messages": int, "text": str,
    "chunk_number": int, "finish_reason": str, "total_chunks": int, "message_count": int, "message": str, "code": str,
    "retryable": bool, "stopped": bool, "sessions": list, "duration_minutes": (int, float), "created_at": str,
    "user_messages": int, "model_messages": int, "messages": list, "role": str,
    "session_duration_seconds": (int, float), "latest_turn": (dict, type(None)), "turn_id": str, "state": str,
    "status": str, "uptime_seconds": (int, float), "total_requests": int, "successful_requests": int,
    "failed_requests": int, "active_sessions": int, "streaming_connections": int, "total_sessions_created": int,
    "average_response_time": (int, float, type(None)), "start_time": str, "framework": str,
    "features": list,
}
HEALTH = "status model uptime_seconds total_requests successful_requests failed_requests active_sessions " \
         "streaming_connections"


# ---- errors: each says what did not work as a sentence for a person, and whether the same request may help. ----------


class ChatError(Exception):
    """What did not work: the base of all errors here."""

    retryable = False  # whether the same request may help
    retry_after = 0.0  # seconds to wait before it


class Lost(ChatError):
    """The connection could not be made, or broke."""

    retryable = True


class StreamCut(Lost):
    """The stream ended without a terminal event, or a part of it is missing."""


class IdleDied(Lost):
    """A connection that was kept from the request before did not answer a byte: only a new one tells."""


class Refused(ChatError):
    """The server answered with another status than 200; `code` is that of its problem (RFC 9457), if it is one."""

    def __init__(self, detail: str, status: int, code: str = "", retry_after: float = 0) -> None:
        super().__init__(detail)
        self.status, self.code, self.retry_after, self.retryable = status, code, retry_after, status in RETRIED


class TurnFailed(ChatError):
    """The turn ended with an `error` event."""

    def __init__(self, event: Event) -> None:
        super().__init__(event["message"])
        self.code, self.retryable = event.get("code", ""), event.get("retryable", False)


class SessionDeleted(ChatError):
    """Somebody deleted the session while its turn was cut off; the same POST would make it anew."""


class BadServer(ChatError):
    """What came is not this protocol."""


# ---- wire: bytes -> lines -> events. It knows no sessions and no retries. --------------------------------------------


class Event(dict[str, Any]):
    """One event, as a dict. `line` has its bytes, or none where this client made it; `coding` is what brought it."""

    line = b""
    coding = "none"


class HeadLines:
    """The file of a response while http.client reads its head: it remembers the last line, and bounds their number."""

    def __init__(self, file: Any) -> None:
        self.file, self.line, self.count = file, b"", 0

    def readline(self, limit: int) -> bytes:
        self.line, self.count = self.file.readline(limit), self.count + 1
        if self.count > MAX_HEAD:  # of 100 (Continue), say, which http.client skips without end
            raise HTTPException("a head without an end")
        return self.line

    def close(self) -> None:
        self.file.close()


class Response(HTTPResponse):
    """http.client takes a head that was cut for a whole one, and so a cut for an answer. This one raises."""

    def begin(self) -> None:
        """Read the head from `fp`, which http.client sets to None where it gives up. A cut raises IncompleteRead."""
        head = HeadLines(self.fp)
        self.fp: Any = head
        try:
            super().begin()
            while 101 < self.status < 200:  # RFC 9110, section 15.2; http.client skips only 100
                self.headers = self.msg = None  # type: ignore[assignment]  # or it takes the head as read
                super().begin()
        except BadStatusLine:
            # RemoteDisconnected, where nothing came, stays what it is; the beginning of a status line is a cut
            if head.line and not head.line.endswith(b"\n") and b"HTTP/".startswith(head.line[:5]):
                raise IncompleteRead(head.line) from None
            raise
        finally:
            self.fp = self.fp and head.file
        if not head.line.endswith(b"\n"):
            raise IncompleteRead(head.line)


def read_events(response: HTTPResponse) -> Iterator[Event]:
    """The events of a stream, up to the terminal one. Raises StreamCut where it ends earlier, or BadServer.

    read1() returns what is there, and raises where a transfer chunk is missing at the end (RFC 9112, section 8).
    readline() would take that end for a clean one.
    """
    coding, rest = response.headers.get("Transfer-Encoding", "none"), b""
    while True:
        try:
            data = response.read1(READ_SIZE)
        except (OSError, HTTPException) as error:
            raise StreamCut(reason(error)) from error
        if not data:
            raise StreamCut("the stream ended before the answer did")
        *lines, rest = (rest + data).split(b"\n")
        for line in filter(bytes.strip, lines):
            event = parse_event(line + b"\n")
            event.coding = coding
            yield event
            if event["type"] in TERMINAL:
                return
        if len(rest) >= MAX_LINE or rest.lstrip()[:1] not in (b"", b"{"):  # it can't become an event any more
            raise BadServer(NONSENSE.format("a line that is not JSON"))


def parse_event(line: bytes) -> Event:
    """A line as an event. Raises BadServer."""
    if len(line) >= MAX_LINE:
        raise BadServer(NONSENSE.format("a line of more than 64 KiB"))
    event = Event(parse_object(line, "a line"))
    event.line = line
    kind = event.get("type")
    if not isinstance(kind, str):
        raise BadServer(NONSENSE.format("an event without a type"))
    check(event, f"an event of type {kind}", EVENTS.get(kind, ""))
    return event


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises BadServer for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadServer(NONSENSE.format(f"{what} that is not JSON")) from error
    if not isinstance(value, dict):
        raise BadServer(NONSENSE.format(f"{what} that is not a JSON object"))
    return value


def check(value: Any, what: str, fields: str) -> None:
    """Raise BadServer unless these fields are there ("?": or not), each of its type."""
    for field in fields.split():
        name = field.removesuffix("?")
        if not isinstance(value, dict) or (name in value or name == field) and not isinstance(
                value.get(name, ...), FIELDS[name]):
            raise BadServer(NONSENSE.format(f"{what} whose {name} is missing or wrong"))


def reason(error: Exception) -> str:
    """What happened to a connection, in a few words."""
    if isinstance(error, TimeoutError):
        return "the server was silent for too long"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    if isinstance(error, ConnectionError | IncompleteRead):
        return "the connection broke"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_body(response: HTTPResponse, limit: int) -> bytes:
    """The body of an answer that is no stream, or its first `limit` bytes. Raises Lost where it was cut."""
    body = bytearray()
    try:  # not by read(), which takes a transfer chunk of negative size for one without end
        while len(body) < limit and (data := response.read1(min(limit - len(body), READ_SIZE))):
            body += data
        if len(body) < limit:
            response.read(0)  # http.client notes the end of a body of known length only there
    except (OSError, HTTPException) as error:
        raise Lost(reason(error)) from error
    length = response.headers.get("Content-Length", "")
    if len(body) < limit and length.isdecimal() and len(body) < int(length[:20]):  # int() refuses very many digits
        raise Lost("the connection broke")
    return bytes(body)


def read_refusal(response: HTTPResponse) -> Refused:
    """What another status than 200 says: the problem's detail (RFC 9457) where it is one. A proxy's HTML is none."""
    status = f"{response.status} {response.reason}".strip()
    if 300 <= response.status < 400:
        place = response.headers.get("Location", "nowhere")
        return Refused(f"The server redirects to {place} ({status}). If you trust it, give that address as --url.",
                       response.status)
    body = read_body(response, MAX_LINE)
    problem: dict[str, Any] = {}
    with suppress(BadServer):
        problem = parse_object(body, "a problem")
    detail, code = problem.get("detail"), problem.get("code")
    return Refused(detail if isinstance(detail, str) and detail else f"The server answered {status}.", response.status,
                   code if isinstance(code, str) else "", seconds_of(response.headers.get("Retry-After", "")))


def seconds_of(retry_after: str) -> float:
    """The seconds that a Retry-After field asks for, as a number or a date (RFC 9110, section 10.2.3); else 0."""
    if retry_after.isdecimal():
        return float(retry_after[:9])
    with suppress(ValueError, TypeError, OverflowError):
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    return 0


# ---- Api: the endpoints, and a turn that survives cuts. It prints nothing, and knows no terminal. --------------------


class Received:
    """What came of a run of a turn: enough to tell what is new when its log comes again from the first line."""

    run = b""  # its session_info line
    chunks = 0  # their numbers are 1 to this
    others = 0  # lines of the log but session_info, chunks and the terminal event


class Api:
    """A server of streamable HTTP chat.

    Every method raises ChatError. Answers are the server's JSON objects. Between requests one connection is kept.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None) -> None:
        """Raises ValueError where `url` is none of http or https (with a path, where a proxy has the server there)."""
        if not URL.fullmatch(url):
            raise ValueError(f"{url!r} is not like http://HOST:PORT")
        parts = urlsplit(url)
        host, secure = parts.hostname, parts.scheme == "https"
        if not host or parts.port == 0:
            raise ValueError(f"{url!r} has no host, or no port")
        host.encode("idna")  # raises ValueError here rather than when it connects
        self.url, self._path = url.rstrip("/"), parts.path.rstrip("/")
        self._kind = HTTPSConnection if secure else HTTPConnection
        self._address = host, parts.port or self._kind.default_port
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._started = ""  # the server's start_time, when it was asked last
        self._streams_by_path = True  # so that a proxy can send each session to the server that has it
        self._idle: list[HTTPConnection] = []  # at most one; a list, whose pop() and append() are safe between threads

    def chat(self, message: str, session_id: str | None = None, turn_id: str | None = None,
             known: bool = False, pause: Callable[[float], Any] = time.sleep) -> Iterator[Event]:
        """Send a message, and yield the events of its turn, each once, to the `complete` one; else raise ChatError.

        After a cut the same POST is sent again. Beside the server's events, this yields `retry` (`reason`, `number`,
        `seconds` until it) before it is sent, and `resumed` when the same run goes on. A second `session_info` means
        another run: what came before it is dropped. After an `error` comes a `retry` or TurnFailed.

        `known` says that the server has the session. When it has, and the session is deleted meanwhile, it is not made
        anew, but SessionDeleted raised. (A server that has its sessions on disk loses none. Where it has not, its
        start_time tells a delete from a restart, so the first chat() asks for that.) `pause` waits for so many seconds;
        it may raise to end all this.
        """
        if not self._started:
            self._ask_start_time()
        body = {"message": message, "session_id": session_id or new_id(), "turn_id": turn_id or new_id()}
        received, tries, unseen = Received(), 0, 0
        most = 0  # chunks that came, of whatever run: only more of them are progress
        while True:
            try:
                if tries and known:
                    known = self._still_has(body["session_id"])
                if tries:
                    self.close()  # a connection that is new can't die of idleness, so each try is one POST
                for event in self._receive(body, received):
                    if event["type"] == "session_info":
                        if known and event.get("created"):  # it was restarted without our knowledge
                            self._ask_start_time()
                        known = True
                    if received.chunks > most:
                        tries, most = 0, received.chunks
                    yield event
                return
            except IdleDied:  # only the first POST finds a kept connection: another one, at once and unseen
                unseen = 1
                continue
            except ChatError as error:
                tries += unseen if type(error) is Lost else 0  # it was not idleness, if a new one died in the same way
                if not error.retryable or tries >= RETRIES:
                    raise
                trouble = error
            seconds = pause_before(tries, trouble.retry_after)
            tries, unseen = tries + 1, 0
            yield Event(type="retry", reason=str(trouble), number=tries, seconds=seconds)
            pause(seconds)

    def _receive(self, body: dict[str, str], received: Received) -> Iterator[Event]:
        """POST a turn, and yield the events that are not in `received` yet."""
        opened, others = False, 0
        for event in self._stream(body):
            kind = event["type"]
            if kind in OWN:
                continue
            if kind == "session_info":
                if event.line != received.run:
                    received.run, received.chunks, received.others, others = event.line, 0, 0, 0
                    yield event
                elif not opened:
                    yield Event(type="resumed")
                opened = True
            elif kind == "chunk":
                if not opened or event["chunk_number"] > received.chunks + 1:
                    raise StreamCut(GAP)
                if event["chunk_number"] > received.chunks:
                    received.chunks += 1
                    yield event
            elif kind in ("ping", *TERMINAL):
                if kind == "complete" and (event.get("total_chunks", received.chunks) != received.chunks
                                           or opened != bool(received.run)):
                    raise StreamCut(GAP)
                yield event
            else:  # status, and what later versions may have: told apart by their place alone
                others += 1
                if others > received.others:
                    received.others += 1
                    yield event
        if kind == "error":
            raise TurnFailed(event)

    def _still_has(self, session_id: str) -> bool:
        """Whether the server may still have a session. Raises SessionDeleted; False where a restart has lost it."""
        before = self._started
        try:
            self.session(session_id)
        except Refused as error:
            if error.status == 404:
                now = self._ask_start_time()
                if self._loses_no_session() or (now and now == before):
                    raise SessionDeleted("The session was deleted meanwhile, and the answer with it.") from error
                return not now
        except BadServer:
            pass  # the POST will tell
        return True

    def _loses_no_session(self) -> bool:
        """Whether the server says that it keeps sessions on disk."""
        with suppress(ChatError):
            return "sessions on disk" in self._ask("GET", "/", "features", silence=STOP_TIME)["features"]
        return False

    def _ask_start_time(self) -> str:
        """The server's start_time, or "" where it does not tell."""
        with suppress(ChatError):
            self._started = self._ask("GET", "/stats", "start_time", silence=STOP_TIME)["start_time"]
            return self._started
        return ""

    def stop(self, session_id: str, turn_id: str | None = None) -> bool:
        """Stop the running turn, or only the one that is named. False where it was not running."""
        body = {"turn_id": turn_id} if turn_id else None
        return self._ask("POST", path_of(session_id, "/stop"), "stopped", body, STOP_TIME)["stopped"]

    def new_session(self, session_id: str | None = None, model_id: str | None = None) -> dict[str, Any]:
        """Create a session."""
        return self._ask("POST", "/sessions/new", "session_id model timestamp",
                         {"session_id": session_id or new_id(), "model_id": model_id})

    def sessions(self) -> list[dict[str, Any]]:
        """All sessions, last active first."""
        sessions = self._ask("GET", "/sessions", "sessions")["sessions"]
        for session in sessions:
            check(session, "a session", "session_id message_count duration_minutes created_at")
        return sessions

    def session(self, session_id: str) -> dict[str, Any]:
        """One session, with its `messages`, and its `latest_turn` while that is kept."""
        session = self._ask("GET", path_of(session_id),
                            "session_id model message_count user_messages model_messages session_duration_seconds "
                            "created_at messages latest_turn")
        for message in session["messages"]:
            check(message, "a message", "role text timestamp")
        if session["latest_turn"]:
            check(session["latest_turn"], "a turn", "turn_id state message")
        return session

    def clear(self, session_id: str) -> None:
        """Forget the messages of a session."""
        self._ask("POST", path_of(session_id, "/clear"))

    def delete(self, session_id: str) -> None:
        """Delete a session."""
        self._ask("DELETE", path_of(session_id))

    def health(self) -> dict[str, Any]:
        """Is the server alive, and what does it do. Needs no token."""
        return self._ask("GET", "/health", HEALTH)

    def stats(self) -> dict[str, Any]:
        """The server's counters and averages."""
        return self._ask("GET", "/stats", HEALTH + " total_sessions_created average_response_time start_time framework")

    def close(self) -> None:
        """Close the connection that is kept."""
        while self._idle:
            self._idle.pop().close()

    def _stream(self, body: dict[str, str]) -> Iterator[Event]:
        path = path_of(body["session_id"], "/stream") if self._streams_by_path else "/chat/stream"
        try:
            with self._exchange("POST", path, body, SILENCE) as response:
                yield from read_events(response)
        except Refused as error:
            if not self._streams_by_path or error.status not in (404, 405):
                raise
            self._streams_by_path = False  # an older server
            yield from self._stream(body)

    def _ask(self, method: str, path: str, fields: str = "", body: dict[str, Any] | None = None,
             silence: float = REPLY_TIME) -> dict[str, Any]:
        try:
            answer = self._ask_once(method, path, body, silence)
        except IdleDied:
            answer = self._ask_once(method, path, body, silence)
        check(answer, f"an answer to {method} {path}", fields)
        return answer

    def _ask_once(self, method: str, path: str, body: dict[str, Any] | None, silence: float) -> dict[str, Any]:
        with self._exchange(method, path, body, silence) as response:
            return parse_object(read_body(response, MAX_ANSWER), "an answer")

    @contextmanager
    def _exchange(self, method: str, path: str, body: Any, silence: float) -> Iterator[HTTPResponse]:
        """Send a request and give its response. Afterwards the connection is kept, if the response was read whole."""
        connection, response = self._send(method, path, body, silence)
        refusal = None
        try:
            if response.status == 200:
                yield response
            else:
                refusal = read_refusal(response)
        except BaseException:  # what was not read of this answer would be taken for the next one
            close(connection, response)
            raise
        self._keep(connection, response)
        if refusal:
            raise refusal

    def _send(self, method: str, path: str, body: Any, silence: float) -> tuple[HTTPConnection, HTTPResponse]:
        """Send a request; returns when the head of its response is read. Raises Lost or BadServer."""
        data = None if body is None else json.dumps(body).encode()
        reused = self._take_idle()
        connection = reused or self._kind(*self._address)
        connection.response_class = Response
        connection.timeout = silence
        try:
            if reused:
                reused.sock.settimeout(silence)
            else:
                connection.connect()
            with suppress(BrokenPipeError, ConnectionResetError):  # an answer that was sent early is there to read
                connection.request(method, self._path + path, data, self._headers)
            return connection, connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            if isinstance(error, ConnectionError) and reused:
                raise IdleDied(reason(error)) from error
            tls = isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)
            if isinstance(error, OSError | IncompleteRead) and not tls:
                raise Lost(reason(error)) from error
            what = "TLS as it should" if tls else "HTTP"
            raise BadServer(f"The server does not speak {what} ({str(error)[:200].strip()}).") from error

    def _take_idle(self) -> HTTPConnection | None:
        """The connection that was kept, unless the server has closed it (RFC 9112, section 9.3.1), or sent what nobody
        asked for, which would be taken for the next answer."""
        with suppress(IndexError):
            connection = self._idle.pop()
            with DefaultSelector() as selector:
                selector.register(connection.sock, EVENT_READ)
                if not selector.select(0):
                    return connection
            connection.close()
        return None

    def _keep(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        if connection.sock and not response.isclosed():  # the last transfer chunk is not read yet
            connection.sock.settimeout(LAST_CHUNK_TIME)
            with suppress(OSError, HTTPException):
                response.read1(1)
        if connection.sock and response.isclosed() and not self._idle:
            self._idle.append(connection)
        else:
            close(connection, response)


def close(connection: HTTPConnection, response: HTTPResponse) -> None:
    """Close both: the response has the socket where its end is that of the connection."""
    response.close()
    connection.close()


def pause_before(tries: int, retry_after: float) -> float:
    """Seconds to wait after so many tries: at random between half and all of it, or all clients come back at once."""
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** tries) * random.uniform(0.5, 1)
    return max(pause, min(retry_after, LONGEST_RETRY_AFTER))


def path_of(session_id: str, what: str = "") -> str:
    """The path of a session, whose id may be anything that a server sent."""
    return f"/sessions/{quote(session_id, safe='', errors='replace')}{what}"


def new_id() -> str:
    """A name for a session or a turn."""
    return str(uuid.uuid4())


# ---- text: what a terminal can show, and how it gets there. It knows nothing of turns and servers. -------------------

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but newline and tab, DEL, C1


def escape(text: str) -> str:
    """Text from outside, fit for a terminal: control characters as escapes, so that none of them acts."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same where newlines and tabs would do harm, too."""
    return escape(text).replace("\n", "\\n").replace("\t", "\\t")


def columns(text: str) -> int:
    """About how many columns a terminal gives to a text: two for wide characters and emoji, none for marks."""
    total = 0
    for char, following in zip(text, text[1:] + " ", strict=False):
        if unicodedata.category(char) not in ("Mn", "Me", "Cf"):
            total += 2 if unicodedata.east_asian_width(char) in "WF" or following == "\ufe0f" else 1
    return total


def fit(text: str, width: int) -> str:
    """The text on one line, in exactly `width` columns: shortened with an ellipsis, or filled with spaces."""
    text = one_line(text[: 2 * width + 1])
    if columns(text) > width:
        while text and columns(text) > width - 3:
            text = text[:-1]
        text = (text + "...")[:width]
    return text + " " * (width - columns(text))


def short(session_id: str) -> str:
    """A session's id as the prompt and the boxes show it."""
    return one_line(session_id if len(session_id) <= 11 else session_id[:8] + "...")


def box(title: str, rows: dict[str, Any] | list[str]) -> str:
    """A box of lines with a title in its upper edge."""
    lines = rows if isinstance(rows, list) else [f"{name}: {value}" for name, value in rows.items()]
    head = f"┌─ {title} "
    return "\n".join([head + "─" * (WIDTH + 1 - columns(head)) + "┐", *(f"│ {fit(line, WIDTH - 1)}│" for line in lines),
                      "└" + "─" * WIDTH + "┘"])


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:23:45."""
    whole = int(min(max(0, seconds), 1e9))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def time_of_day(timestamp: str) -> str:
    """The local time of a server's timestamp."""
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromisoformat(timestamp).astimezone().strftime("%H:%M:%S")
    return "?"


def average(total: float, count: int, form: str) -> str:
    """A mean, or a dash before there is anything to average."""
    return format(total / count, form) if count else "-"


def as_sentence(trouble: Any) -> str:
    """What went wrong, as sentences on one line; at most 1,000 characters."""
    text = escape(" ".join(str(trouble)[:1000].split())) or "something went wrong"
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def write(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(text: str) -> None:
    """A line on standard error."""
    try:
        print(escape(text), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        abandon(sys.stderr)


def abandon(stream: Any) -> None:
    """What was not written and what comes goes nowhere: else the interpreter's last flush would fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def paint(colour: str, text: str) -> str:
    """The text in a colour (ECMA-48, section 8.3.117), where standard output is a terminal that shows it."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"


@contextmanager
def no_echo() -> Iterator[None]:
    """What is typed into an answer does not show in it, but at the next prompt."""
    try:
        import termios
    except ImportError:  # Windows, where nothing is shown before it is read
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    during = [*before]
    during[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


# ---- answer: what is seen of a turn while it runs, on a pipe and on a terminal. The only room that prints answers. ---


class Session:
    """The session that this client is in, as far as it knows."""

    def __init__(self, session_id: str = "", messages: int = 0, known: bool = False) -> None:
        self.session_id, self.messages = session_id or new_id(), messages
        self.known = known  # whether the server has it


class Turn(NamedTuple):
    """What a POST says: sent again with the same names, it is the same turn."""

    session: Session
    message: str
    turn_id: str


class Answer:
    """An answer while it comes. Its bare text goes to standard output, everything else to standard error."""

    def __init__(self, turn: Turn) -> None:
        self.turn, self.context = turn, turn.session.messages
        self.model, self.coding = "?", "none"
        self.chunks = self.received = self.retries = 0  # of this run; of all runs; POSTs announced after the first
        self.created = 0  # how often the server made the session
        self.started, self.first_chunk, self.ended = time.monotonic(), 0.0, 0.0
        self.cut = ""  # why it was sent again
        self.recovering = False  # between a cut and the next event
        self.interrupted = False  # by Ctrl-C
        self.complete: Event | None = None
        self.trouble: ChatError | None = None  # why it failed
        self.last = ""  # character of the text that was shown

    @property
    def status(self) -> str:
        """SUCCESS, STOPPED or FAILED."""
        if self.complete:
            return "STOPPED" if self.complete.get("finish_reason") == "cancelled" else "SUCCESS"
        return "FAILED" if self.trouble else "STOPPED"

    def take(self, event: Event) -> None:
        """Show an event."""
        kind = event["type"]
        self.coding = event.coding if event.line else self.coding
        self.recovering = kind == "retry"
        if kind == "session_info":
            self._open(event)
        elif kind == "status":
            self._look_back(event.get("context_messages", 0))
        elif kind == "chunk":
            self.chunks, self.received = self.chunks + 1, self.received + 1
            self.first_chunk = self.first_chunk or time.monotonic()
            self.text(event["text"])
        elif kind == "complete":
            self.complete = event
        elif kind == "retry":
            self.retries, self.cut = self.retries + 1, as_sentence(event["reason"])
            self.retry(f"🔄 {self.cut} Trying again in {event['seconds']:.1f} s ({event['number']} of {RETRIES}).")
        elif kind == "resumed":
            self.wait(f"🔄 {self.cut} Connected again: the answer goes on.")

    def finish(self, trouble: ChatError | None) -> None:
        """Nothing more comes."""
        self.ended, self.trouble = time.monotonic(), trouble
        session = self.turn.session
        if self.complete:
            session.messages = self.complete.get("message_count", session.messages)
        if isinstance(trouble, SessionDeleted):  # who sends it again after this wants the session anew
            session.messages, session.known = 0, False
        self.show_end()

    def _open(self, event: Event) -> None:
        self.model = event.get("model", self.model)
        if event.get("created") and (self.retries or not self.turn.session.known):  # else by who began a followed turn
            self.created += 1
        self.turn.session.known = True
        if self.chunks:
            self.chunks, self.first_chunk = 0, 0.0
            self.anew("🔄 The answer broke off. The turn was run anew, or its log is gone: here it is from the start.")
        else:
            self.settle()

    def _look_back(self, context: int) -> None:
        if context < self.context:
            self.note(f"⚠ The context is gone: the server has {context} of {self.context} earlier messages.")
        self.context = context
        if not self.received:
            self.wait(f"💭 Generating response... (Context: {context} messages)")

    def text(self, text: str) -> None:
        """A part of the answer."""
        self.last = text[-1:] or self.last
        write(escape(text) if sys.stdout.isatty() else text)

    def anew(self, sentence: str) -> None:
        """What was shown of the answer does not count."""
        write("\n")
        self.note(sentence)

    def note(self, sentence: str) -> None:
        """Something that the user should know."""
        complain(sentence)

    def retry(self, sentence: str) -> None:
        """It will be sent again."""
        self.note(sentence)

    def wait(self, sentence: str) -> None:
        """Nothing to see yet."""

    def tick(self) -> None:
        """A tenth of a second has gone by."""

    def settle(self) -> None:
        """What is on the screen stays."""

    def quiet_keyboard(self) -> AbstractContextManager[None]:
        """Keeps what is typed out of the answer while it comes."""
        return nullcontext()

    def show_end(self) -> None:
        """Show how it ended."""
        if self.last != "\n" and (self.last or self.complete):
            write("\n")
        if self.trouble:
            complain(f"❌ {as_sentence(self.trouble)}")
        elif self.status == "STOPPED":
            complain("The answer was stopped." if self.complete else "The server did not confirm the stop.")
        elif self.complete and self.complete.get("finish_reason", "stop") != "stop":
            complain(f"The model ended the answer early ({self.complete['finish_reason']}).")


class Lines(Answer):
    """The lines of the stream, as they came."""

    def take(self, event: Event) -> None:
        """Print its line; the rest as in a script."""
        if event.line and sys.stdout.isatty():
            write(escape(event.line.decode("utf-8", "replace")))
        elif event.line:
            sys.stdout.buffer.write(event.line)
            sys.stdout.buffer.flush()
        super().take(event)

    def text(self, text: str) -> None:
        """It is in the line."""

    def anew(self, sentence: str) -> None:
        """The new session_info line says so, too."""
        self.note(sentence)

    def show_end(self) -> None:
        """Say what is in no line."""
        if self.trouble:
            complain(f"❌ {as_sentence(self.trouble)}")


SENDING = "💭 Sending..."


class Screen(Answer):
    """An answer for a person at a terminal, with a live line while there is nothing else to see."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self.live, self.frame = SENDING, 0  # the live line, and the frame of its sign
        self.drawn = 0  # its columns, as it stands on the screen
        self.opened = False  # whether the head of the answer is there
        self.tick()

    def text(self, text: str) -> None:
        """A part of the answer, with the head before the first."""
        if self.live:
            self.settle()
        if text and not self.opened:
            self.opened = True
            head = f"🤖 AI Response (HTTP Streaming) ({short(self.turn.session.session_id)} - {self.model})"
            write("\n" + paint("36", one_line(head) + "\n" + RULE) + "\n")
        super().text(text)

    def anew(self, sentence: str) -> None:
        """What was shown of the answer does not count: a new head. The sentence tells of the tries, too."""
        self.live = ""
        self.note(sentence)
        self.opened = False

    def note(self, sentence: str) -> None:
        """A line of its own."""
        self.settle()
        self._end_line()
        write(paint("33", sentence) + "\n")

    def retry(self, sentence: str) -> None:
        """On the live line: many tries take one line."""
        self.wait(sentence)

    def wait(self, sentence: str) -> None:
        """Put it on the live line."""
        self._end_line()
        self.live = sentence
        self.tick()

    def tick(self) -> None:
        """Draw the live line, with the next frame of its sign."""
        if self.live:
            self._erase()
            self.frame += 1
            sign, room = FRAMES[self.frame % len(FRAMES)], shutil.get_terminal_size().columns - 1
            line = fit(f"{sign} {self.live}", room).rstrip()
            self.drawn = columns(line)
            write(line)

    def settle(self) -> None:
        """Let the live line stay as it is, without its sign."""
        self._erase()
        if self.live and self.live != SENDING:
            write(paint("2", escape(self.live)) + "\n")
        self.live = ""

    def quiet_keyboard(self) -> AbstractContextManager[None]:
        """Keeps what is typed out of the answer while it comes."""
        return no_echo()

    def show_end(self) -> None:
        """The rule, and a box with the numbers."""
        self.settle()
        self._end_line()
        write((paint("36", RULE) + "\n" if self.opened else "") + "\n")
        status, now = self.status, datetime.now().strftime("%H:%M:%S.%f")[:-3]
        title = "COMPLETED" if status == "SUCCESS" else status
        rows: dict[str, Any] = {
            "Total Chunks": self.chunks,
            "Total Time": f"{self.ended - self.started:.3f}s",
            "First Chunk": f"{self.first_chunk - self.started:.3f}s" if self.first_chunk else "-",
            "Context Messages": self.turn.session.messages,
            "Transfer-Encoding": self.coding,
            "Status": status,
        }
        if self.complete and self.complete.get("finish_reason", "stop") not in ("stop", "cancelled"):
            rows["Finish Reason"] = self.complete["finish_reason"]
        if self.retries:
            rows["Retries"] = self.retries
        write(paint({"SUCCESS": "32", "STOPPED": "33"}.get(status, "31"),
                    box(f"📡 HTTP STREAM {title} [{now}]", rows)) + "\n")
        if self.trouble:
            write(paint("31", f"❌ {as_sentence(self.trouble)}") + "\n   /retry sends your message again.\n")
        elif not self.complete:
            write("   The server did not confirm the stop. /retry sends your message again.\n")

    def _erase(self) -> None:
        if self.drawn:
            write("\r" + " " * self.drawn + "\r")
        self.drawn = 0

    def _end_line(self) -> None:
        if self.last not in ("", "\n"):
            write("\n")
        self.last = ""


# ---- client: sends turns, counts them, hears Ctrl-C. It knows no commands. -------------------------------------------


class Statistics:
    """What this client did since it was started. A recovered stream is one that was cut and came whole all the same."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.sent = 0
        self.successful = 0  # stopped ones, too, if the server said so
        self.recovered = 0  # of the successful ones
        self.failed = 0
        self.chunks = 0  # of all streams
        self.whole = 0  # chunks of the successful ones
        self.seconds = 0.0  # of the successful ones
        self.created = 0  # sessions

    def count(self, answer: Answer) -> None:
        """Add an answer that has ended."""
        self.chunks += answer.received
        self.created += answer.created
        if answer.complete:
            self.successful += 1
            self.recovered += answer.retries > 0
            self.whole += answer.chunks
            self.seconds += answer.ended - answer.started
        else:
            self.failed += 1


class GivenUp(Exception):
    """Ends a chat that nobody waits for any more."""


class Background:
    """A chat that runs in a thread of its own, so that this one can draw, and hear Ctrl-C, while nothing comes."""

    def __init__(self, chat: Callable[[Callable[[float], None]], Iterator[Event]]) -> None:
        self.items: Queue[Event | Exception | None] = Queue(100)  # bounded: a terminal may be slower than a server
        self.hurry = threading.Event()  # ends all pauses
        self.given_up = False
        self.events = chat(self._pause)
        threading.Thread(target=self._run, daemon=True).start()

    def _pause(self, seconds: float) -> None:
        self.hurry.wait(seconds)
        if self.given_up:
            raise GivenUp

    def _run(self) -> None:
        end = None
        try:
            for event in self.events:
                if self.given_up:
                    return
                self.items.put(event)
        except Exception as error:
            end = error
        self.items.put(end)

    def give_up(self) -> None:
        """Let the thread end as soon as it can: it may be waiting for a byte, a pause, or room in the queue."""
        self.given_up = True
        self.hurry.set()
        with suppress(Empty):
            while True:
                self.items.get_nowait()


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """The first Ctrl-C that comes meanwhile, in a list: an exception could lose the event that is just taken.

    Those after it raise KeyboardInterrupt, since a write to what nobody reads ends by nothing else.
    """
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as for a program in the background
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Stop:
    """Asks the server to stop a turn, in a thread of its own, until it has done so, or for STOP_TIME."""

    def __init__(self, api: Api, turn: Turn, chat: Background) -> None:
        self.api, self.turn, self.chat = api, turn, chat
        self.deadline = time.monotonic() + STOP_TIME
        self.confirmed = False
        self.in_vain = 0  # how often the server could not be asked, or had no such turn running
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self.is_late() and not self.chat.given_up:  # /retry may begin the same turn
            if stop(self.api, self.turn):
                self.confirmed = True
                return
            self.in_vain += 1
            time.sleep(0.2)  # the POST may be under way

    def is_late(self) -> bool:
        """Whether it is time to give up."""
        return time.monotonic() > self.deadline


def stop(api: Api, turn: Turn) -> bool:
    """Ask the server once to stop a turn; whether it did."""
    with suppress(ChatError):
        return api.stop(turn.session.session_id, turn.turn_id)
    return False


class Client:
    """One user's chat with one server."""

    def __init__(self, api: Api, session: Session, answers: type[Answer]) -> None:
        self.api, self.session, self.answers = api, session, answers
        self.statistics = Statistics()
        self.unanswered: Turn | None = None  # the last turn, if there is no whole answer to it
        self.listed: list[str] = []  # session ids, in the order in which the user saw them last

    def send(self, turn: Turn) -> Answer:
        """Send a turn (again), show its answer, and return that when it has ended, however it ended."""
        before, self.unanswered = self.unanswered, turn
        with interrupts() as pressed:
            answer = self.answers(turn)
            chat = Background(lambda pause: self._chat(turn, before, pause))
            trouble = None
            try:
                with answer.quiet_keyboard():
                    trouble = self._follow(chat, answer, pressed)
            except OSError:  # nobody reads the answer
                stop(self.api, turn)
                raise
            except KeyboardInterrupt:  # the second one
                if not isinstance(answer, Screen):
                    raise
            finally:
                chat.give_up()
            answer.finish(trouble)
            self.statistics.count(answer)
        if answer.complete:
            self.unanswered = None
        if isinstance(trouble, SessionDeleted):  # only /retry makes it anew, since the user asks for that
            self.session = Session()
        return answer

    def _chat(self, turn: Turn, before: Turn | None, pause: Callable[[float], None]) -> Iterator[Event]:
        if before and before.turn_id != turn.turn_id:
            stop(self.api, before)  # it may run on, if it could not be reached when it was given up
        yield from self.api.chat(turn.message, turn.session.session_id, turn.turn_id, turn.session.known, pause)

    def _follow(self, chat: Background, answer: Answer, pressed: list[int]) -> ChatError | None:
        """Show what comes, until the answer ends; after Ctrl-C until it is stopped. Returns why it failed."""
        stopping = None
        while True:
            if pressed and not stopping:
                answer.interrupted, stopping = True, Stop(self.api, answer.turn, chat)
            if stopping and stopping.confirmed:
                chat.hurry.set()  # to what was sent before the stop, if the answer was cut
            elif stopping and stopping.in_vain and answer.recovering:
                return None
            if stopping and stopping.is_late():
                return None
            try:
                item = chat.items.get(timeout=0.1)
            except Empty:
                answer.tick()
                continue
            if item is None or isinstance(item, ChatError):
                return item
            if isinstance(item, Exception):
                raise item
            answer.take(item)


# ---- commands: name -> function. Their docstrings are what /help prints. ---------------------------------------------


class Quit(Exception):
    """The user leaves."""


def show_help(client: Client) -> None:
    """Show all commands"""
    rows = {f"{name} {ARGUMENTS.get(name, '')}": function.__doc__ for name, function in COMMANDS.items()}
    rows |= {"//text": "Send a message that begins with a slash", '"""': "Begin, and end, a message of many lines",
             "Ctrl-C": "Stop the answer", "Ctrl-D": "Exit client"}
    print("\n" + box("📡 COMMANDS", [f"{name:13} {what}" for name, what in rows.items()]))


def show_stats(client: Client) -> None:
    """Show client streaming statistics"""
    own, session = client.statistics, client.session
    print("\n" + box("📊 CLIENT SESSION STATISTICS", {
        "Client Session Duration": duration(time.monotonic() - own.started),
        "Messages Sent": own.sent,
        "Successful Streams": own.successful,
        "Recovered Streams": own.recovered,
        "Failed Streams": own.failed,
        "Total Chunks Received": own.chunks,
        "Avg Chunks per Stream": average(own.whole, own.successful, ".1f"),
        "Sessions Created": own.created,
        "Avg Response Time": average(own.seconds, own.successful, ".3f") + ("s" if own.successful else ""),
        "Current Session": short(session.session_id) if session.known else "-",
        "Session Messages": session.messages,
    }))


def show_server(client: Client) -> None:
    """Display server and streaming statistics"""
    stats = client.api.stats()
    mean = stats["average_response_time"]
    print("\n" + box("📡 HTTP STREAMING SERVER STATISTICS", {
        "Server Uptime": duration(stats["uptime_seconds"]),
        "Total Requests": stats["total_requests"],
        "Successful": stats["successful_requests"],
        "Failed": stats["failed_requests"],
        "Active Sessions": stats["active_sessions"],
        "Active Streams": stats["streaming_connections"],
        "Total Sessions Created": stats["total_sessions_created"],
        "Avg Response Time": "-" if mean is None else f"{min(mean, 1e9):.3f}s",
        "Model": stats["model"],
        "Framework": stats["framework"],
    }))


def show_health(client: Client) -> None:
    """Check server health and active streams"""
    health = client.api.health()
    print("\n" + box("💚 SERVER HEALTH", {
        "Status": health["status"],
        "Model": health["model"],
        "Server Uptime": duration(health["uptime_seconds"]),
        "Total Requests": health["total_requests"],
        "Active Sessions": health["active_sessions"],
        "Active Streams": health["streaming_connections"],
    }))


def open_docs(client: Client) -> None:
    """Open API documentation in browser"""
    open_page(client, "/docs", "API documentation")


def open_demo(client: Client) -> None:
    """Open interactive HTTP streaming demo page"""
    open_page(client, "/demo", "HTTP streaming demo page")


def open_page(client: Client, path: str, name: str) -> None:
    """Open a page of the server in the user's browser; its URL is shown for where there is none."""
    print(f"📡 Opening {name} in your browser...\n   URL: {client.api.url}{path}", flush=True)
    if not webbrowser.open(client.api.url + path):
        print("   There is no browser here: open the URL yourself.")


def clear_screen(client: Client) -> None:
    """Clear screen"""
    print("\x1b[2J\x1b[3J\x1b[H", end="")  # the screen, what was scrolled off it, and home


def leave(client: Client) -> None:
    """Exit client"""
    raise Quit


def create_session(client: Client) -> None:
    """Create a new streaming chat session"""
    try:
        session = client.api.new_session()
    except Refused as error:
        if error.status != 404:
            raise
        client.session = Session()  # a proxy before many servers can't tell which of them would have it
        print(f"✨ New session {short(client.session.session_id)}: it begins with your next message.")
        return
    client.session = Session(session["session_id"], known=True)
    client.statistics.created += 1
    print(f"✨ New session created successfully!\n   Session ID: {short(session['session_id'])}\n"
          f"   Model: {one_line(session['model'])}")


def show_session(client: Client) -> None:
    """Show current session details"""
    session = client.api.session(current(client).session_id)
    print("\n" + box("📋 SESSION INFO", {
        "Session ID": short(session["session_id"]),
        "Model": session["model"],
        "Total Messages": session["message_count"],
        "User Messages": session["user_messages"],
        "AI Messages": session["model_messages"],
        "Duration": duration(session["session_duration_seconds"]),
        "Created": time_of_day(session["created_at"]),
    }))
    print(f"To come back later: --session {one_line(session['session_id'])}")


def list_sessions(client: Client) -> None:
    """List all active sessions on server"""
    sessions = client.api.sessions()
    client.listed = [session["session_id"] for session in sessions]
    print("\n" + box(f"📋 ALL ACTIVE SESSIONS ({len(sessions)})", [
        f"{number}. {short(session['session_id'])} ({session['message_count']} msgs, "
        f"{duration(session['duration_minutes'] * 60)}, {time_of_day(session['created_at'])})"
        + (" ← CURRENT" if session["session_id"] == client.session.session_id else "")
        for number, session in enumerate(sessions, 1)]))


def switch_session(client: Client, argument: str) -> None:
    """Go to session N of /sessions, or to ID"""
    ids = [session["session_id"] for session in client.api.sessions()]
    numbers = {str(number): session_id for number, session_id in enumerate(client.listed or ids, 1)}
    begin = argument.removesuffix("...")  # as boxes and the prompt shorten it
    found = [numbers[argument]] if argument in numbers else [one for one in ids if one == argument] or [
        one for one in ids if one.startswith(begin)]
    if len(found) > 1:
        raise ChatError("There is more than one such session: /sessions lists them.")
    enter(client, found[0] if found else argument)  # not listed: the server may be one of many


def reset_session(client: Client) -> None:
    """Clear current session history"""
    client.api.clear(current(client).session_id)
    client.session.messages = 0
    print("🧹 The session's history is cleared.")


def delete_session(client: Client) -> None:
    """Delete current session"""
    client.api.delete(current(client).session_id)
    print(f"🧹 The session {short(client.session.session_id)} is deleted. Your next message begins a new one.")
    client.session = Session()


def show_history(client: Client) -> None:
    """Show the messages of the current session"""
    messages = client.api.session(current(client).session_id)["messages"]
    print(f"📋 {len(messages)} messages")
    for message in messages:
        name = "👤 You" if message["role"] == "user" else "🤖 AI"
        print("\n" + paint("36", f"{name} [{time_of_day(message['timestamp'])}]"))
        print(escape(message["text"]))


def retry_turn(client: Client) -> None:
    """Send a message that failed again"""
    if not client.unanswered:
        raise ChatError("There is nothing to send again: no message has failed.")
    client.session = client.unanswered.session
    client.send(client.unanswered)


COMMANDS: dict[str, Callable[..., None]] = {
    "/help": show_help, "/stats": show_stats, "/server": show_server, "/health": show_health, "/docs": open_docs,
    "/demo": open_demo, "/clear": clear_screen, "/quit": leave, "/new": create_session, "/info": show_session,
    "/sessions": list_sessions, "/switch": switch_session, "/reset": reset_session, "/delete": delete_session,
    "/history": show_history, "/retry": retry_turn,
}
ARGUMENTS = {"/switch": "N|ID"}


def current(client: Client) -> Session:
    """The client's session, if the server has it. Raises ChatError."""
    if not client.session.known:
        raise ChatError("There is no session yet: send a message, or /new.")
    return client.session


def enter(client: Client, session_id: str) -> None:
    """Make a session of the server the current one; where an answer is running there, show it, with its question."""
    session = client.api.session(session_id)
    client.session = Session(session_id, session["message_count"], known=True)
    print(f"📋 Session {short(session_id)} has {session['message_count']} messages.")
    turn = session["latest_turn"]
    if turn and turn["state"] == "running":
        print(f"   An answer is running there.\n\n{prompt(client)}{escape(turn['message'])}")
        client.send(Turn(client.session, turn["message"], turn["turn_id"]))


def run_command(client: Client, line: str) -> None:
    """Run a command. Raises ChatError, also where there is no such command."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"Did you mean {near[0]}?" if near else "/help lists them all."
        raise ChatError(f"There is no command {name}. {hint} (// sends a message with a slash.)")
    if bool(argument) != (name in ARGUMENTS):
        raise ChatError(f"{name} takes nothing after it." if argument else f"{name} needs {ARGUMENTS[name]} after it.")
    if argument:
        COMMANDS[name](client, argument)
    else:
        COMMANDS[name](client)


# ---- prompt: lines from a person -------------------------------------------------------------------------------------

HISTORY = "~/.streamchat_history"  # JSON strings, since a message may have many lines
HISTORY_LINES = 1000


def prompt(client: Client) -> str:
    """What stands before the user's line."""
    return f"You [{short(client.session.session_id)}] › " if client.session.known else "You › "


class Keyboard:
    """Lines with editing, history and completion, where Python has readline."""

    def __init__(self) -> None:
        self.path = Path(os.path.expanduser(HISTORY))  # which never raises
        self.readline: Any = None
        with suppress(ImportError):  # Windows; and imported only here, since for some terminals it prints at once
            import readline

            self.readline = readline
            self._set_up()

    def _set_up(self) -> None:
        readline = self.readline
        readline.set_auto_history(False)
        readline.set_completer(self._complete)
        readline.set_completer_delims(" ")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if os.environ.get("TERM") != "dumb":
                readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted newline is text then, and no Enter
        with suppress(OSError, UnicodeDecodeError):  # there is none yet, or it is not ours
            if not self.path.is_symlink():  # to /dev/null, say
                self.path.chmod(0o600)
            lines = self.path.read_text("utf-8").splitlines(keepends=True)[-HISTORY_LINES:]
            self.path.write_text("".join(lines), "utf-8")
            for line in lines:
                with suppress(ValueError, RecursionError):  # somebody changed it
                    readline.add_history(str(json.loads(line)))

    def _complete(self, text: str, state: int) -> str | None:
        names = [name for name in COMMANDS if name.startswith(text) and self.readline.get_begidx() == 0]
        return [*names, None][state]

    def typed(self) -> str:
        """What is in the line that Ctrl-C has ended."""
        return self.readline.get_line_buffer() if self.readline else ""

    def read(self, before: str) -> str:
        """A line. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
        colour = paint("1;36", before)
        if self.readline:  # it must know what takes no room on the screen
            colour = re.sub(r"\x1b\[[0-9;]*m", "\x01\\g<0>\x02", colour)
        return input(colour)

    def read_message(self, before: str) -> str:
        """A line, or what stands between two lines of three quotes. Only a command begins with one slash."""
        text = self.read(before)
        if text.strip() == '"""':
            lines: list[str] = []
            with suppress(EOFError):  # Ctrl-D ends it, too
                while (line := self.read("... ")).strip() != '"""':
                    lines.append(line)
            text = "\n".join(lines)
            if text.startswith("/"):
                text = "/" + text
        self._remember(text)
        return text

    def _remember(self, text: str) -> None:
        if self.readline and text.strip():
            with suppress(ValueError):  # the locale has no such character
                self.readline.add_history(text)
            with suppress(OSError), open(self.path, "a", encoding="utf-8",
                                         opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(json.dumps(text) + "\n")


# ---- main ------------------------------------------------------------------------------------------------------------


def converse(client: Client) -> None:
    """Chat with a person, until they leave."""
    keyboard, leaving = Keyboard(), False
    while True:
        try:
            print()
            text = keyboard.read_message(prompt(client))
            leaving = False
            if text.strip():
                act(client, text)
        except ChatError as error:
            print(paint("31", f"❌ {as_sentence(error)}"))
        except KeyboardInterrupt:
            if leaving and not keyboard.typed():
                return
            leaving = True
            print("\n(Ctrl-C again, or Ctrl-D, leaves.)")
        except (EOFError, Quit):
            return


def act(client: Client, text: str) -> None:
    """Do what a line says: a command after one slash, else a message."""
    if text.startswith("/") and not text.startswith("//"):
        run_command(client, text)
        return
    client.statistics.sent += 1
    client.send(Turn(client.session, text.removeprefix("/"), new_id()))


def greet(client: Client, session_id: str | None) -> None:
    """Find the server, and the session to go on with. Raises Refused, for a wrong token, say."""
    print(paint("1", "📡 STREAMABLE HTTP CHAT CLIENT 📡"))
    try:
        stats = client.api.stats()
        print(f"🎉 Connected to {client.api.url} ({one_line(stats['model'])})\n"
              "📡 HTTP chunked streaming enabled - responses will appear as they're generated!\n"
              "   /help lists the commands.")
        if session_id:
            enter(client, session_id)
    except Lost as error:
        print(paint("33", f"⚠ No server at {client.api.url}: {error}.\n   Start one: python3 streamchat_server.py"))
    except Refused as error:
        if error.code != "session_not_found":
            raise
        print(f"📋 Session {short(client.session.session_id)} begins with your first message.")


def parse_arguments() -> argparse.Namespace:
    """What the command line says, with an Api; `message` is None for a chat. What is wrong ends it with status 2."""
    parser = argparse.ArgumentParser(description="Chat over streamable HTTP, at a terminal or in a script.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (%(default)s)")
    parser.add_argument("--session", metavar="ID", help="go on with this session, or begin it")
    parser.add_argument("--token", metavar="T", help="the server's token (default: STREAMCHAT_TOKEN)")
    parser.add_argument("--json", action="store_true", help="print the lines of the stream instead of the answer")
    parser.add_argument("message", metavar="MESSAGE", nargs="?", help="print the answer to this, and to standard input "
                        "where that is piped, and end")
    arguments = parser.parse_args()
    token = arguments.token or os.environ.get("STREAMCHAT_TOKEN")
    if arguments.session is not None and not ID.fullmatch(arguments.session):
        parser.error("--session must be 1 to 64 of A-Z, a-z, 0-9, _ and -, but not new")
    if token and not TOKEN.fullmatch(token):
        parser.error("the token must be printable ASCII without spaces")
    try:
        arguments.api = Api(arguments.url, token)
    except ValueError as error:
        parser.error(f"--url: {escape(str(error))}")
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if arguments.message is not None or arguments.json or not at_terminal:
        arguments.message = message_of_script(parser, arguments.message)
    return arguments


def message_of_script(parser: argparse.ArgumentParser, argument: str | None) -> str:
    """The argument, and what is piped: after one newline, as it is."""
    piped = b""
    if sys.stdin.isatty() and argument is None:
        complain("(Type the message. Ctrl-D on an empty line ends it.)")
    try:
        if argument is None or not sys.stdin.isatty():
            piped = sys.stdin.buffer.read()
        message = "\n".join(filter(None, [argument, piped.decode()]))
    except UnicodeDecodeError:
        parser.error("standard input is not UTF-8")
    except OSError as error:
        parser.error(f"cannot read standard input: {error.strerror}")
    if not message.strip():
        parser.error("there is no message")
    return message


def main() -> int:
    """The exit status: 0, or 1 when no full answer came; 130 after Ctrl-C in a script; 2 for wrong arguments."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  # for the whole run
    sys.stdout, sys.stderr = map(output, (sys.stdout, sys.stderr))
    try:
        arguments = parse_arguments()
        with closing(arguments.api) as api:
            if arguments.message is None:
                return interact(Client(api, Session(arguments.session), Screen), arguments.session)
            client = Client(api, Session(arguments.session), Lines if arguments.json else Answer)
            answer = client.send(Turn(client.session, arguments.message, new_id()))
            return 130 if answer.interrupted else 0 if answer.status == "SUCCESS" else 1
    except KeyboardInterrupt:
        os._exit(130)  # the interpreter's own exit would wait until standard output is taken
    except OSError as error:  # of standard output, say; those of the network are ChatErrors
        if not isinstance(error, BrokenPipeError):  # which says that nobody reads any more
            complain(f"❌ {as_sentence(error.strerror or error)}")
        abandon(sys.stdout)
        return 1


def output(stream: Any) -> Any:
    """A stream that takes all: also where it was closed before the start, or has no sign for an emoji."""
    stream = stream or open(os.devnull, "w")  # noqa: SIM115
    stream.reconfigure(errors="backslashreplace")
    return stream


def interact(client: Client, session_id: str | None) -> int:
    """Chat at the terminal. The exit status."""
    if os.name == "nt":
        os.system("")  # makes a Windows console read escape sequences
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # what is not UTF-8 shows as �
    try:
        greet(client, session_id)
    except ChatError as error:
        complain(f"❌ {as_sentence(error)}")
        return 1
    converse(client)
    show_stats(client)
    if client.session.known:
        print(f"To go on later: --session {one_line(client.session.session_id)}")
    print("👋 Goodbye!")
    return 0


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    sys.exit(status)
