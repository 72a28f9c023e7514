#!/usr/bin/env python3
"""A client of streamable HTTP chat: a terminal program, a command for scripts, and a library, in one file.

    python3 streamchat_client.py                                    chat; /help lists the commands
    python3 streamchat_client.py "Sum this up:" < notes.txt         print the answer, and nothing else
    python3 streamchat_client.py --json "Hello" | jq .type          print the lines of the stream

    from streamchat_client import Api

    for event in Api("http://127.0.0.1:8000").chat("Hello!", "my-session"):
        if event["type"] == "chunk":
            print(event["text"], end="", flush=True)

The answer to a message is a stream of lines. Each line is an event, a JSON object:

    session_info    the ids of the session and the turn, and the model   first
    status          how many messages came before this turn
    chunk           the next part of the answer, numbered 1, 2, 3 …
    ping            the server is alive, but has no line to send
    complete        the answer is whole and in the history               last, or
    error           the turn failed; `retryable` tells whether to retry

Only `complete` and `error` end a turn; a lost connection does not. The client chooses the ids of the
session and the turn before it sends a message, so it may send the same POST again:

    POST /sessions/{session_id}/stream ──► lines ──► complete, or an error that is not retryable
      ▲                                      │
      └──────────────── pause ◄──────────────┘  no connection, a cut, 30 s of silence,
                                                408, 429, 502, 503, 504, a retryable error

The server keeps the log of a turn, which is all its lines, and sends it again from the first line. If the
session_info line has the same bytes as before, it is the same run of the turn, and the client skips the
chunks that it has. Otherwise the turn was run again, and the client drops the text of the earlier run.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import re
import select
import signal
import socket
import ssl
import sys
import threading
import time
import unicodedata
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import client as http
from itertools import pairwise
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

# ---- limits ------------------------------------------------------------------------------------------------

SILENCE = 30  # seconds without a byte of a stream: the server sends a ping at least every 15 s
REPLY_TIME = 10  # seconds without a connection, or without a byte of any other response
STOP_TIME = 3  # seconds in which the server must confirm a stop, since the user waits
STALL_TIME = 1  # seconds after that in which the server must end the stream
RETRIES = 8  # the count begins again when the answer grows
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_RETRY_AFTER = 0.2, 5, 60  # seconds
RETRIED = {408, 429, 502, 503, 504}  # statuses of transient failures
MAX_LINE = 64 << 10  # bytes: the protocol's lines are shorter
ID = re.compile(r"(?!new$)[A-Za-z0-9_-]{1,64}")  # /sessions/new is another endpoint
URL = re.compile(r"https?://[^\x00- /?#@\x7f]+(/[!-\"$->@-~]*)?", re.IGNORECASE)  # without user and query
WRONG_SHAPE = (  # what JSON of another shape raises where it is used
    LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
Event = dict[str, Any]

# ---- errors ------------------------------------------------------------------------------------------------


class ChatError(Exception):
    """A request or a turn failed. The text is a sentence for a person.

    `code` is the server's, or "unreachable" (no connection), "cut" (a lost connection), "unexpected" (not
    this protocol), "lost" (the server no longer has a stopped turn). `status` is the HTTP status, 0 if none
    came. `retryable` tells whether the same request may work later, after `retry_after` seconds or more.
    """

    def __init__(self, text: str, code: str = "", retryable: bool = False,
                 status: int = 0, retry_after: float = 0) -> None:
        super().__init__(text)
        self.code, self.retryable, self.status, self.retry_after = code, retryable, status, retry_after


def unexpected() -> ChatError:
    """The error for an answer outside this protocol."""
    return ChatError("The server sent an unexpected answer. Does it speak this protocol?", "unexpected")


def lost(error: Exception) -> ChatError:
    """The error for an exception during a request: a cut, or an answer outside this protocol."""
    if isinstance(error, TimeoutError):
        return ChatError("The server was silent for too long.", "cut", retryable=True)
    half_a_line = isinstance(error, http.BadStatusLine) and not str(error).endswith("\n")
    if isinstance(error, OSError | http.IncompleteRead) or half_a_line:
        return ChatError("Connection lost.", "cut", retryable=True)
    return unexpected()


def refused(response: http.HTTPResponse) -> ChatError:
    """The error for a status other than 200: the detail of its problem (RFC 9457), or the status line."""
    status = response.status
    if 300 <= status < 400:
        place = response.headers.get("Location", "another place")
        return ChatError(f"The server redirects to {place}. If you trust it, give it as --url.",
                         "unexpected", status=status)
    detail, code = f"The server answered {status} {response.reason}.", ""
    with suppress(ChatError, *WRONG_SHAPE):
        problem = read_json(response)
        if isinstance(problem.get("detail"), str):
            detail, code = problem["detail"], str(problem.get("code", ""))
    retry_after = seconds_of(response.headers.get("Retry-After", ""))
    return ChatError(detail, code, status in RETRIED, status, retry_after)


def seconds_of(retry_after: str) -> float:
    """The seconds that a Retry-After field asks for (RFC 9110, section 10.2.3), or 0."""
    if retry_after.isdecimal():
        return float(retry_after)
    with suppress(ValueError, TypeError, OverflowError):
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    return 0


# ---- wire: bytes become lines, and lines become events. Nothing here depends on sessions or retries. -------


def read_line(response: http.HTTPResponse) -> bytes:
    """The next line that is not blank. Raises IncompleteRead at the end, ChatError for a line too long."""
    line = b""
    while not line.strip():
        line = response.readline(MAX_LINE)
        if len(line) == MAX_LINE:
            raise unexpected()
        if not line.endswith(b"\n"):
            raise http.IncompleteRead(line)
    return line


def event_of(line: bytes) -> Event:
    """The event in a line, with the fields that the client needs. Raises ChatError or ValueError."""
    match event := json.loads(line):
        case {"type": "chunk", "text": str(), "chunk_number": int()} | {"type": "error", "message": str()}:
            return event
        case {"type": str(kind)} if kind not in ("chunk", "error"):
            return event
    raise unexpected()


def read_json(response: http.HTTPResponse) -> dict[str, Any]:
    """The JSON object in a body. Raises IncompleteRead for a cut, otherwise ChatError or ValueError."""
    body = response.read()
    if not body and not response.chunked and response.length is None:  # a head that was cut
        raise http.IncompleteRead(body)
    value = json.loads(body)
    if not isinstance(value, dict):
        raise unexpected()
    return value


# ---- api: the endpoints. Nothing here prints or depends on a terminal. -------------------------------------


class Api:
    """A server of streamable HTTP chat. Each request has a connection of its own.

    Every method may raise ChatError. The dicts and lists are the server's JSON; their fields are not checked.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None) -> None:
        """Raises ValueError for a bad URL or token. A path is kept, for a server behind a proxy."""
        self.url = url.rstrip("/")
        self._parts = parts = urlsplit(self.url)
        if not URL.fullmatch(url) or not parts.hostname or parts.port == 0:
            raise ValueError(f"{url!r} is not like http://HOST:PORT")
        parts.hostname.encode("idna")  # raises ValueError for a name that no machine can have
        if not re.fullmatch("[!-~]*", token or ""):
            raise ValueError("a token is printable ASCII without spaces")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def chat(self, message: str, session_id: str = "", turn_id: str = "") -> Iterator[Event]:
        """Send a message, and yield each event of its turn once, up to `complete`, through all cuts.

        A second `session_info` means that the turn was run again: drop the text that came before it.
        """
        return Turn(self, message, session_id, turn_id).run()

    def stop(self, session_id: str, turn_id: str | None = None) -> bool:
        """Stop the running turn, or only the one that is named. Returns False if it was not running."""
        answer = self._ask("POST", path_of(session_id, "/stop"), {"turn_id": turn_id}, STOP_TIME)
        return answer.get("stopped") is True

    def new_session(self, session_id: str | None = None, model_id: str | None = None) -> dict[str, Any]:
        """Create a session. An id that is taken raises ChatError ("session_exists")."""
        return self._ask("POST", "/sessions/new", {"session_id": session_id, "model_id": model_id})

    def sessions(self) -> list[dict[str, Any]]:
        """All sessions, last active first."""
        return self._ask("GET", "/sessions").get("sessions", [])

    def session(self, session_id: str) -> dict[str, Any]:
        """One session, with its `messages` and its `latest_turn`."""
        return self._ask("GET", path_of(session_id))

    def clear(self, session_id: str) -> None:
        """Forget the messages of a session. Its running turn ends with `session_cleared`."""
        self._ask("POST", path_of(session_id, "/clear"))

    def delete(self, session_id: str) -> None:
        """Delete a session. Its running turn ends with `session_deleted`."""
        self._ask("DELETE", path_of(session_id))

    def health(self) -> dict[str, Any]:
        """The server's status and counters. Needs no token."""
        return self._ask("GET", "/health")

    def stats(self) -> dict[str, Any]:
        """The server's counters and averages."""
        return self._ask("GET", "/stats")

    def _ask(self, method: str, path: str, body: Any = None, silence: float = REPLY_TIME) -> dict[str, Any]:
        with self.exchange(self.connect(silence), method, path, body) as response:
            return read_json(response)

    def connect(self, silence: float) -> http.HTTPConnection:
        """A new connection that waits so many seconds for each byte. Raises ChatError ("unreachable")."""
        kind = http.HTTPSConnection if self._parts.scheme == "https" else http.HTTPConnection
        connection = kind(self._parts.netloc, timeout=min(silence, REPLY_TIME))  # to connect
        try:
            connection.connect()
        except OSError as error:
            wrong_tls = isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)
            reason = error.strerror or "no answer"
            raise ChatError(f"Server unreachable ({reason}).", "unreachable", not wrong_tls) from error
        connection.sock.settimeout(silence)
        return connection

    @contextmanager
    def exchange(self, connection: http.HTTPConnection, method: str, path: str,
                 body: Any) -> Iterator[http.HTTPResponse]:
        """Send a request, give its response if the status is 200, and close the connection in the end."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with closing(connection):
                with suppress(BrokenPipeError, ConnectionResetError):  # the server may refuse early
                    connection.request(method, self._parts.path + path, data, self._headers)
                with connection.getresponse() as response:
                    if response.status != 200:
                        raise refused(response)
                    yield response
        except (OSError, http.HTTPException, *WRONG_SHAPE, MemoryError) as error:  # MemoryError: huge length
            raise lost(error) from error


def path_of(session_id: str, rest: str = "") -> str:
    """The path of a session, percent-encoded (RFC 3986, section 2.1)."""
    return f"/sessions/{quote(session_id, safe='', errors='replace')}{rest}"


# ---- turn: the same POST until the answer is whole ---------------------------------------------------------


class Turn:
    """A user's message and its ids. Sent again with the same ids, it is the same turn."""

    def __init__(self, api: Api, message: str, session_id: str = "", turn_id: str = "") -> None:
        self.api, self.message = api, message
        self.session_id, self.turn_id = session_id or str(uuid4()), turn_id or str(uuid4())
        self.sent = False  # the server may know of this turn
        self.stopped = False  # the server has confirmed a stop
        self.coding = "none"  # the transfer coding of the last response
        self.line = b""  # the bytes of the last event
        self.chunks = 0  # the numbers 1 to this have come
        self._seen: set[bytes] = set()  # the lines of other events
        self._socket: Any = None  # http.client drops its own while the response is read

    def run(self, wait: Callable[[ChatError, int, float], None] =
            lambda error, retry, seconds: time.sleep(seconds)) -> Iterator[Event]:
        """Send the turn, and send it again after each transient failure. Yields each event once.

        Ends after `complete`; any other end raises ChatError. Before each retry it calls `wait` with the
        error, the number of the retry and the seconds to wait.
        """
        retries = progress = 0
        while True:
            try:
                for event in self._send():
                    if self._accept(event):
                        yield event
                    if self.chunks > progress:  # the answer is longer than ever before
                        retries, progress = 0, self.chunks
                    if event["type"] == "error":
                        code, retryable = str(event.get("code", "")), event.get("retryable") is True
                        raise ChatError(event["message"], code, retryable)
                    if event["type"] == "complete":
                        return
            except ChatError as error:
                if not error.retryable or retries == RETRIES:
                    raise
                longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** retries)
                pause = longest * random.uniform(0.5, 1)  # or all clients would come back at the same moment
                retries += 1
                wait(error, retries, max(pause, min(error.retry_after, LONGEST_RETRY_AFTER)))

    def _send(self) -> Iterator[Event]:
        """POST the turn once, or after a stop only GET the rest, since a POST could run the turn again.

        Yields events until the connection is lost, which raises ChatError.
        """
        connection = self.api.connect(SILENCE)
        self._socket = connection.sock
        self.sent = True
        method, path = "POST", path_of(self.session_id, "/stream")
        body: dict[str, str] | None = {"message": self.message, "turn_id": self.turn_id}
        if self.stopped:
            method, path, body = "GET", f"{path}?after={self.chunks}", None
        with self.api.exchange(connection, method, path, body) as response:
            self.coding = response.headers.get("Transfer-Encoding", "none")
            while True:
                self.line = read_line(response)
                yield event_of(self.line)

    def _accept(self, event: Event) -> bool:
        """Note an event. Returns whether it is new. Raises ChatError for a gap, or for another turn."""
        kind = event["type"]
        is_gap = kind == "chunk" and event["chunk_number"] > self.chunks + 1
        is_short = kind == "complete" and event.get("total_chunks", self.chunks) != self.chunks
        if is_gap or is_short:
            raise ChatError("A part of the answer is missing.", "cut", retryable=True)
        if kind == "chunk":
            is_new = event["chunk_number"] > self.chunks
            self.chunks = max(self.chunks, event["chunk_number"])
            return is_new
        is_new = self.line not in self._seen
        if self.stopped and event.get("turn_id", self.turn_id) != self.turn_id:  # of another client
            raise ChatError("The server has lost the stopped turn.", "lost")
        if is_new and kind == "session_info":  # another run of the turn
            self.chunks = 0
            self._seen.clear()
        self._seen.add(self.line)
        return is_new or kind == "ping"

    def stop(self) -> bool:
        """Stop the turn. Returns False if it was not running."""
        was_running = self.api.stop(self.session_id, self.turn_id)
        self.stopped = self.stopped or was_running
        return was_running

    def is_in_history(self) -> bool:
        """Whether the server has the whole turn."""
        messages = self.api.session(self.session_id)["messages"]
        return any(message["turn_id"] == self.turn_id for message in messages)

    def disconnect(self) -> None:
        """End the connection from another thread, to wake the thread that reads."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # an SSLSocket's own is not thread-safe


# ---- Ctrl-C: the server ends the turn, and the answer ends as it always does -------------------------------


class StopByCtrlC:
    """While a turn runs, Ctrl-C asks the server to stop it. The server then sends the rest, and `complete`.

    A second Ctrl-C raises KeyboardInterrupt, and so does the first one while nothing has been sent.
    """

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.pressed = False
        self._confirmed = False  # the server has confirmed the end of the turn
        self._pausing = False  # the main thread pauses before a retry
        self._asked = threading.Event()  # the stop is confirmed, or was given up
        self._over = threading.Event()

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # a shell ignores it for programs in the background
            signal.signal(signal.SIGINT, self._press)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        if self.pressed or not self.turn.sent:
            raise KeyboardInterrupt
        self.pressed = True
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        """Ask the server until it has stopped the turn: a stop that arrives before its POST has no effect."""
        deadline = time.monotonic() + STOP_TIME
        while not self._confirmed and not self._over.is_set() and time.monotonic() < deadline:
            with suppress(ChatError, *WRONG_SHAPE):
                self._confirmed = self.turn.stop() or (self._pausing and self.turn.is_in_history())
            if self._pausing:  # no POST is on its way
                break
            self._over.wait(0.1)
        self._asked.set()
        patience = STALL_TIME
        while not self._over.wait(patience):
            self.turn.disconnect()  # the stream has stalled: a retry gets the rest
            patience *= 2  # which may be long

    def pause(self, seconds: float) -> None:
        """Pause before a retry. Ctrl-C ends the pause: if the turn has ended, the retry gets the rest.

        Raises KeyboardInterrupt if the retry could start a turn that the user has stopped.
        """
        if self._confirmed:  # a retry can only get the rest, and _asked would not wait
            time.sleep(seconds)
            return
        self._pausing = True
        self._asked.wait(seconds)
        if self.pressed:
            self._asked.wait(STOP_TIME)
            if not self._confirmed:
                raise KeyboardInterrupt
        self._pausing = False


# ---- text: what a terminal can show ------------------------------------------------------------------------

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but newline and tab, DEL, C1
CJK = "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\U00020000-\U0003fffd"
PARTS = re.compile(rf"\n|[^\S\n]|[{CJK}]|[^\s{CJK}]+")  # newlines, spaces, CJK characters, words
BOX_WIDTH, ID_WIDTH = 62, 8  # columns at most


def escape(text: object) -> str:
    """Text from outside with its control characters as escapes, so that none acts on the terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """The same with newlines and tabs as escapes, too."""
    return escape(text).replace("\n", "\\n").replace("\t", "\\t")


def columns(text: str) -> int:
    """How many columns a terminal gives to a text: two for wide characters and emoji, none for marks."""
    total = 0
    for char, following in pairwise(text + " "):
        if unicodedata.category(char) not in ("Mn", "Me", "Cf"):
            total += 2 if unicodedata.east_asian_width(char) in "WF" or following == "\ufe0f" else 1
    return total


def terminal_width() -> int:
    """Columns of the terminal. The variable COLUMNS may be wrong."""
    with suppress(OSError):
        return max(20, os.get_terminal_size(sys.stdout.fileno()).columns or 80)
    return 80


class Wrapper:
    """A text that grows on the screen, with line breaks between words, and between CJK characters."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._column = 0  # where the next part begins
        self._word = ""  # the last word, which may still grow

    def add(self, text: str) -> str:
        """The characters to write for the next part of the text."""
        parts = PARTS.findall(self._word + escape(text))
        is_open = parts and not parts[-1].isspace() and columns(parts[-1]) < self.width
        self._word = parts.pop() if is_open else ""
        return "".join(map(self._place, parts))

    def end(self) -> str:
        """The characters to write so that something else may follow on a new line."""
        return self.add("\n") if self._column or self._word else ""

    def _place(self, part: str) -> str:
        size = 8 - self._column % 8 if part == "\t" else columns(part)
        if part == "\n":
            self._column = 0
        elif self._column + size <= self.width:
            self._column += size
        elif part.isspace():
            self._column = self.width
            return ""
        else:
            part = "\n" + part if self._column else part
            self._column = size % (self.width + 1)  # the terminal breaks a word that is longer than a line
        return part


def wrap(text: str, width: int) -> str:
    """The whole text in lines of so many columns."""
    return Wrapper(width).add(text + "\n").removesuffix("\n")


def fit(text: str, width: int, filler: str = " ") -> str:
    """The text in exactly so many columns: shortened, or filled up."""
    while columns(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    return text + filler * (width - columns(text))


def show_box(title: str, rows: dict[str, Any] | list[str], colour: str = "") -> None:
    """Print rows in a box, with a title in its upper edge."""
    width = min(BOX_WIDTH, terminal_width() - 2)
    print("\n" + paint(colour, f"┌{fit(f'─ {title} ', width, '─')}┐"))
    for row in rows if isinstance(rows, list) else [f"{name}: {value}" for name, value in rows.items()]:
        for line in wrap(one_line(row)[:1000], width - 2).split("\n"):
            print(paint(colour, f"│ {fit(line, width - 1)}│"))
    print(paint(colour, f"└{'─' * width}┘"), flush=True)


def short(session_id: object) -> str:
    """A session's id as the prompt and the boxes show it."""
    text = one_line(session_id)
    return text if len(text) <= ID_WIDTH + 3 else text[:ID_WIDTH] + "..."


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:23:45; days before them."""
    return str(timedelta(seconds=int(seconds)))


def time_of_day(timestamp: str) -> str:
    """The local time of a server's timestamp."""
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromisoformat(timestamp).astimezone().strftime("%H:%M:%S")
    return "?"


def paint(colour: str, text: str) -> str:
    """The text in a colour (ECMA-48, section 8.3.117), where standard output is a terminal that shows it."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not colour else f"\x1b[{colour}m{text}\x1b[0m"


def write(text: str) -> None:
    """Write to standard output, at once."""
    print(text, end="", flush=True)


def say(text: str, colour: str = "") -> None:
    """Print sentences for a person. A curl command gets a line of its own, so that it can be copied."""
    sentence, *commands = re.split("(?=curl (?:-|http))", text, maxsplit=1)
    lines = [wrap(sentence, terminal_width() - 1), *map(escape, commands)]
    write(paint(colour, "\n".join(lines)) + "\n")


def complain(text: str) -> None:
    """Print a line to standard error."""
    try:
        print(one_line(text), file=sys.stderr, flush=True)
    except OSError:  # the other end is closed
        abandon(sys.stderr)


def abandon(stream: Any) -> None:
    """Let the stream go nowhere: otherwise the last flush at the exit would fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- keyboard: the user's lines, and what is typed during an answer ----------------------------------------

HISTORY = "~/.streamchat_history"
PASTE_TIME = 5  # seconds without a byte, after which a paste counts as ended without its end mark
KEY_TIME = 0.05  # seconds without a byte, after which no key is on its way
PASTE = re.compile(rb"\x1b\[200~(.*?)(?:\x1b\[201~|\Z)", re.DOTALL)  # as terminals mark it
ACTS = re.compile(rb"\x1b\[(20[01])~|[\x03\x1a\x1c]")  # a mark of a paste, Ctrl-C, Ctrl-Z or Ctrl-\
KEY = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)", re.DOTALL)  # of an arrow, for example
NOT_HANDLED = {  # signals that are not fatal, and those that Python cannot handle
    "SIGCHLD", "SIGCONT", "SIGINFO", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH",
    "SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL",
}


class Keyboard:
    """Lines with editing, history and completion, where Python has readline.

    During an answer, a thread keeps what is typed. The next prompt shows it as one text, so that the user can
    edit and send it. Without readline (on Windows) there is only input().
    """

    def __init__(self) -> None:
        self._prompt = ""  # the text before the user's line, while they write it
        self._typed = bytearray()  # during an answer
        self._listener = threading.Thread()
        self._is_due = threading.Event()  # the listener must end: there will be a prompt
        self._history = os.path.expanduser(HISTORY)  # which does not raise without a home
        self._readline: Any = None
        try:  # only here: for some terminals, readline prints as soon as it is imported
            import readline
            import termios
        except ImportError:
            return
        self._readline, self._termios = readline, termios
        readline.set_auto_history(False)
        readline.set_completer(self._complete)
        readline.set_completer_delims("")
        self._is_gnu = "libedit" not in (readline.__doc__ or "")
        self._marks_pastes = self._is_gnu and os.environ.get("TERM") != "dumb"
        settings = ["tab: complete", f"set enable-bracketed-paste {'on' if self._marks_pastes else 'off'}",
                    "set convert-meta off", "set input-meta on", "set output-meta on"]  # UTF-8 in any locale
        for setting in settings if self._is_gnu else ["bind ^I rl_complete"]:
            readline.parse_and_bind(setting)
        with suppress(OSError):  # a home that cannot be read or written
            os.close(os.open(self._history, os.O_CREAT, 0o600))
            readline.read_history_file(self._history)
        readline.set_history_length(1000)  # lines
        self._take_terminal()

    def _take_terminal(self) -> None:
        """Note the terminal's modes. A signal that ends or suspends the program gives them back first."""
        await_terminal()
        termios = self._termios
        self._found = termios.tcgetattr(sys.stdin)
        self._open, self._silent = [*self._found], [*self._found]  # at a prompt, during an answer
        self._open[3] &= ~termios.ICANON  # the terminal would drop all but 4,095 bytes of a line
        self._silent[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
        for number in signal.valid_signals():
            if signal.getsignal(number) is signal.SIG_DFL and getattr(number, "name", "") not in NOT_HANDLED:
                signal.signal(number, self._give_way)

    def _set(self, modes: Any) -> Any:
        """Set the modes of the terminal. Return those it had. In all modes but `_found`, it marks pastes."""
        before = modes
        with suppress(OSError, self._termios.error):  # the terminal was closed
            before = self._termios.tcgetattr(sys.stdin)
            if not in_background():  # else the shell has the terminal
                self._termios.tcsetattr(sys.stdin, self._termios.TCSADRAIN, modes)
                if self._marks_pastes:  # not print(), which a signal may have interrupted
                    os.write(sys.stdout.fileno(), b"\x1b[?2004l" if modes is self._found else b"\x1b[?2004h")
        return before

    def release(self) -> None:
        """Leave the terminal as it was found."""
        if self._readline:
            self._set(self._found)

    def _give_way(self, number: int, _: object) -> None:
        """Let a signal have its usual effect. After Ctrl-Z and `fg`, the program goes on here."""
        modes = self._set(self._found)
        signal.signal(number, signal.SIG_DFL)
        try:
            signal.raise_signal(number)
            time.sleep(KEY_TIME)  # in which another signal may end the program
            await_terminal()
        finally:  # Ctrl-C may have come in the meantime
            signal.signal(number, self._give_way)
            self._set(modes)
        if self._prompt:
            write("\r" + self._prompt + self._readline.get_line_buffer())

    def listen(self) -> None:
        """Keep what is typed, until the next prompt."""
        if self._readline:
            self._set(self._silent)
            self._is_due.clear()
            main_thread = threading.get_ident()
            self._listener = threading.Thread(target=self._keep_keys, args=[main_thread], daemon=True)
            self._listener.start()

    def _keep_keys(self, main_thread: int) -> None:
        """Read what is typed. Outside a paste, Ctrl-C, Ctrl-Z and Ctrl-\\ have their usual effect."""
        signals = {b"\x03": signal.SIGINT, b"\x1a": signal.SIGTSTP, b"\x1c": signal.SIGQUIT}
        in_paste, seen = False, 0
        while True:
            if not select.select([sys.stdin], [], [], PASTE_TIME if in_paste else KEY_TIME)[0]:
                if self._is_due.is_set():
                    return
                in_paste = False
                continue
            data = os.read(sys.stdin.fileno(), 65_536)
            if not data:  # the terminal was closed
                return
            self._typed += data
            for match in ACTS.finditer(self._typed, seen):
                seen = match.end()
                if match[1]:
                    in_paste = match[1] == b"200"
                elif not in_paste:
                    signal.pthread_kill(main_thread, signals[match[0]])  # which wakes it
            seen = max(seen, len(self._typed) - 5)  # a mark has six bytes: five may have come

    def read(self, prompt: str) -> str:
        """A line. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
        prompt = paint("1;36", prompt)
        if not self._readline:
            return input(prompt)
        if self._listener.is_alive():
            self._is_due.set()
            self._listener.join()
        await_terminal()
        self._set(self._open)
        held = in_any_locale(held_text(bytes(self._typed)))
        self._typed.clear()
        self._readline.set_startup_hook(lambda: self._readline.insert_text(held))
        self._prompt = prompt
        try:
            return input(re.sub(r"\x1b\[[0-9;]*m", "\x01\\g<0>\x02", prompt))  # for readline: no width
        finally:
            self._prompt = ""

    def read_message(self, prompt: str) -> str:
        """A line, or several between three quotes at the start of a line and at the end of one."""
        text = self.read(prompt)
        if text.startswith('"""'):
            text = text[3:]
            with suppress(EOFError):  # Ctrl-D ends the message, too
                while not text.rstrip().endswith('"""'):
                    text += "\n" + self.read("... ")
            text = text.rstrip().removesuffix('"""').strip("\n")
            text = "/" + text if text.startswith("/") else text  # not a command
        if self._readline and text.strip():
            self._readline.add_history(in_any_locale(text))
            with suppress(OSError):  # a full disk
                if self._is_gnu:
                    self._readline.append_history_file(1, self._history)
                else:  # libedit cannot append
                    self._readline.write_history_file(self._history)
        return text

    def line(self) -> str:
        """The user's line, as it was when they pressed Ctrl-C."""
        return self._readline.get_line_buffer() if self._readline else ""

    def _complete(self, text: str, state: int) -> str | None:
        names = [name for name in COMMANDS if name.startswith(text)]
        return [*names, None][state]


def in_background() -> bool:
    """Whether the terminal belongs to another program, as it does after Ctrl-Z."""
    with suppress(OSError):
        return os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp()
    return False


def await_terminal() -> None:
    """While the program is in the background, suspend it until `fg`."""
    while in_background():
        signal.raise_signal(signal.SIGTTOU)
        time.sleep(KEY_TIME)  # the signal may be ignored


def held_text(typed: bytes) -> str:
    """The keys as one text. Pastes stay as they are; of other keys, only characters and Backspace count."""
    text = ""
    for number, part in enumerate(PASTE.split(typed)):
        keys = part.decode(errors="replace").replace("\r", "\n").replace("\0", "")
        is_paste = number % 2 == 1
        for key in keys if is_paste else KEY.sub("", keys):
            if is_paste or not CONTROL.match(key):
                text += key
            elif key in "\b\x7f":
                text = text[:-1]
    return text if typed.endswith(b"\x1b[201~") else text.removesuffix("\n")  # of the last Enter


def in_any_locale(text: str) -> str:
    """The text for readline, which would encode it as the locale says (PEP 383)."""
    return text.encode(errors="replace").decode("ascii", "surrogateescape")


# ---- answer: its state, and how it is shown ----------------------------------------------------------------


class Answer:
    """The state of an answer. `show` prints its events: show_json, show_text or show_screen."""

    def __init__(self, turn: Turn, client: Client) -> None:
        self.turn, self.client, self.show = turn, client, client.show
        self.model: Any = "?"
        self.received = 0  # chunks, in all runs of the turn
        self.retries = 0
        self.created: set[bytes] = set()  # session_info lines: a /retry gets the same one again
        self.finish_reason = ""  # of the `complete` event
        self.error: ChatError | None = None
        self.ctrl_c = StopByCtrlC(turn)
        self.started = self.ended = time.monotonic()
        self.wrapper = Wrapper(terminal_width() - 1)
        self.rule = "─" * min(BOX_WIDTH - 2, self.wrapper.width)  # above and below the text
        self.opened = False  # the line above the text is on the screen
        self.last_character = ""

    def follow(self) -> None:
        """Send the turn, and show what comes. Raises ChatError, KeyboardInterrupt."""
        def wait(error: ChatError, retry: int, seconds: float) -> None:
            self.retries += 1
            if self.show is not show_screen:
                complain(f"🔄 {explain(error)} Retrying in {seconds:.1f} s ({retry} of {RETRIES}).")
            elif retry == 1:  # one sentence for each recovery
                self.note(f"🔄 {explain(error)} Retrying…")
            self.ctrl_c.pause(seconds)

        for event in self.turn.run(wait):
            self._take(event)
            self.show(self, event)

    def _take(self, event: Event) -> None:
        kind = event["type"]
        if kind == "session_info":
            self.client.known = True
            self.model = event.get("model")
            if event.get("created") is True:
                self.created.add(self.turn.line)
        elif kind == "chunk":
            self.received += 1
        elif kind == "complete":
            self.finish_reason = str(event.get("finish_reason") or "stop")
        messages, expected = event.get("message_count", event.get("context_messages")), self.client.messages
        if isinstance(messages, int):
            self.client.messages = messages
            if messages < expected:
                self.note(f"⚠ The earlier messages are gone: the server has {messages} of {expected}.")

    def status(self) -> str:
        """SUCCESS, STOPPED or FAILED."""
        if self.error:
            return "FAILED"
        return "STOPPED" if self.finish_reason in ("", "cancelled") else "SUCCESS"

    def note(self, sentence: str, colour: str = "33") -> None:
        """Say something about the answer: on a line of its own, or to standard error."""
        if self.show is show_screen:
            write(self.wrapper.end())
            say(sentence, colour)
        else:
            complain(sentence)


def show_json(answer: Answer, event: Event) -> None:
    """The lines of the stream as they came."""
    line = answer.turn.line
    if sys.stdout.isatty():
        write(escape(line.decode(errors="replace")))
    else:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def show_text(answer: Answer, event: Event) -> None:
    """The bare text as it came; at a terminal, control characters as escapes."""
    if event["type"] == "session_info" and answer.received:
        answer.note("🔄 The turn was run again. This is its answer from the start.")
        write("\n")
    elif event["type"] == "chunk":
        answer.last_character = event["text"][-1:] or answer.last_character
        write(escape(event["text"]) if sys.stdout.isatty() else event["text"])


def show_screen(answer: Answer, event: Event) -> None:
    """The text below a rule. Another run of the turn begins below a new rule."""
    if event["type"] == "session_info":
        answer.opened = False
    elif event["type"] == "status":
        again = " again" if answer.received else ""
        answer.note(f"💭 Generating response{again}... (Context: {answer.client.messages} messages)", "2")
    elif event["type"] == "chunk" and event["text"]:
        if not answer.opened:
            answer.opened = True
            place = f"{short(answer.turn.session_id)} - {one_line(answer.model)}"
            say(f"\n🤖 AI Response (HTTP Streaming) ({place})\n{answer.rule}", "36")
        write(answer.wrapper.add(event["text"]))


def show_end(answer: Answer) -> None:
    """Show how the answer ended: the rule, a box with numbers, and a sentence where it helps."""
    error, reason = answer.error, answer.finish_reason
    if answer.show is show_screen:
        write(answer.wrapper.end())
        if answer.opened:
            say(answer.rule, "36")
        if answer.turn.sent or error:
            show_numbers(answer)
    elif answer.show is show_text and answer.last_character != "\n" and (answer.last_character or reason):
        write("\n")  # after an empty answer too, but not after a failure without text
    if error:
        answer.note(f"❌ {explain(error)}", "31")
    elif not answer.turn.sent:
        answer.note("⚠ Your message was not sent.")
    elif not reason:
        answer.note("⚠ The server has not confirmed the stop. Your next message asks for it again.")
    elif reason == "cancelled" and not answer.ctrl_c.pressed:
        answer.note("⚠ The answer was stopped.")
    elif reason not in ("stop", "cancelled"):
        answer.note(f"⚠ The model ended the answer early ({reason}).")
    is_final = error and not error.retryable and not error.code.startswith("session_")  # busy or gone
    if answer.show is show_screen and not reason and not is_final:
        say("   /retry sends your message again.")


def show_numbers(answer: Answer) -> None:
    """The box below an answer."""
    status, now = answer.status(), datetime.now().strftime("%H:%M:%S.%f")[:-3]
    rows: dict[str, Any] = {
        "Total Chunks": answer.turn.chunks,
        "Total Time": f"{answer.ended - answer.started:.3f}s",
        "Context Messages": answer.client.messages,
        "Transfer-Encoding": answer.turn.coding,
        "Status": status,
    }
    if answer.retries:
        rows["Retries"] = answer.retries
    colour = {"SUCCESS": "32", "STOPPED": "33", "FAILED": "31"}[status]
    show_box(f"📡 HTTP STREAM {status.replace('SUCCESS', 'COMPLETED')} [{now}]", rows, colour)


def explain(error: ChatError) -> str:
    """An error for a person who may not know HTTP, in at most 1,000 characters."""
    if error.code == "unauthorized":
        return "The server needs its token: give it by --token T or in STREAMCHAT_TOKEN."
    if error.code == "session_not_found":
        return "There is no such session. /sessions lists them."
    return str(error)[:1000]


# ---- client: the session, what was done in it, and the commands --------------------------------------------


class Client:
    """One user's chat with one server. Each method `do_…` is a command: /help prints its docstring."""

    def __init__(self, api: Api, session_id: str | None, show: Callable[[Answer, Event], None],
                 keyboard: Keyboard | None = None) -> None:
        self.api, self.show, self.keyboard = api, show, keyboard
        self.begin(session_id)
        self.answers: list[Answer] = []  # to the user's own messages
        self.last: Answer | None = None
        self.given_up: Turn | None = None  # the server may still run it
        self.listed: list[str] = []  # session ids, as /sessions has numbered them
        self.started = time.monotonic()
        self.created = 0  # sessions, by /new

    def begin(self, session_id: str | None = None, messages: int = 0, known: bool = False) -> None:
        """Make a session the current one. `known` tells whether the server has it."""
        self.session_id, self.messages, self.known = session_id or str(uuid4()), messages, known

    def send(self, message: str) -> Answer:
        """Send a message in the current session."""
        return self.run(Turn(self.api, message, self.session_id))

    def run(self, turn: Turn, is_mine: bool = True) -> Answer:
        """Send a turn, and show its answer up to its end, however it ends."""
        self.last = answer = Answer(turn, self)
        if self.keyboard:
            self.keyboard.listen()
        with answer.ctrl_c:
            try:
                if self.given_up and self.given_up.turn_id != turn.turn_id:  # no /retry of it
                    with suppress(ChatError):
                        self.given_up.stop()
                        self.given_up = None
                answer.follow()
            except ChatError as error:
                answer.error = error
            except KeyboardInterrupt:
                if self.show is not show_screen:
                    raise
            except OSError:  # standard output is closed
                with suppress(ChatError):
                    turn.stop()
                raise
            answer.ended = time.monotonic()
            show_end(answer)
        if turn.sent and not answer.error and not answer.finish_reason:  # no stop was confirmed
            self.given_up = turn
        if is_mine and (turn.sent or answer.error):  # not what Ctrl-C stopped before it was sent
            self.answers.append(answer)
        if answer.error and answer.error.code == "session_deleted":
            self.begin()
        elif answer.error and answer.error.code == "session_cleared":
            self.messages = 0
        return answer

    def enter(self, session_id: str) -> None:
        """Make a session of the server the current one. If a turn is running there, show it."""
        session = self.api.session(session_id)
        turn = session["latest_turn"]
        self.begin(session_id, int(session["message_count"]), known=True)
        say(f"📋 Session {short(session_id)} has {session['message_count']} messages.")
        if turn and turn["state"] == "running":
            say("   An answer is running there.\n")
            write(wrap(self.prompt() + turn["message"], terminal_width() - 1) + "\n")
            self.run(Turn(self.api, turn["message"], session_id, turn["turn_id"]), is_mine=False)

    def prompt(self) -> str:
        """The text before the user's line."""
        return f"You [{short(self.session_id)}] › " if self.known else "You › "

    def do_help(self) -> None:
        """Show all commands"""
        show_box("📡 COMMANDS", [
            *[f"{name:13} {getattr(self, 'do_' + name[1:]).__doc__}" for name in COMMANDS],
            "//text        Send a message that begins with a slash",
            '"""           Begin, and end, a message of many lines',
            "Ctrl-C        Stop the answer; twice at the prompt: leave",
            f"Arrow up      Earlier lines (in {HISTORY})",
        ])

    def do_stats(self) -> None:
        """Show client streaming statistics"""
        whole = [answer for answer in self.answers if answer.finish_reason]
        count = max(1, len(whole))
        show_box("📊 CLIENT SESSION STATISTICS", {
            "Client Session Duration": duration(time.monotonic() - self.started),
            "Messages Sent": len({answer.turn.turn_id for answer in self.answers if answer.turn.sent}),
            "Successful Streams": len(whole),
            "Recovered Streams": sum(answer.retries > 0 for answer in whole),
            "Failed Streams": len(self.answers) - len(whole),
            "Total Chunks Received": sum(answer.received for answer in self.answers),
            "Avg Chunks per Stream": f"{sum(answer.turn.chunks for answer in whole) / count:.1f}",
            "Sessions Created": self.created + len(set().union(*[answer.created for answer in self.answers])),
            "Avg Response Time": f"{sum(answer.ended - answer.started for answer in whole) / count:.3f}s",
            "Current Session": short(self.session_id) if self.known else "-",
            "Session Messages": self.messages,
        })

    def do_server(self) -> None:
        """Display server and streaming statistics"""
        show_report("📡 HTTP STREAMING SERVER STATISTICS", self.api.stats())

    def do_health(self) -> None:
        """Check server health and active streams"""
        show_report("💚 SERVER HEALTH", self.api.health())

    def do_docs(self) -> None:
        """Open API documentation in browser"""
        open_page(f"{self.api.url}/docs", "API documentation")

    def do_demo(self) -> None:
        """Open interactive HTTP streaming demo page"""
        open_page(f"{self.api.url}/demo", "HTTP streaming demo page")

    def do_clear(self) -> None:
        """Clear screen"""
        write("\x1b[2J\x1b[3J\x1b[H")  # the screen, what was scrolled off it, and home

    def do_quit(self) -> None:
        """Exit client"""
        raise EOFError  # as Ctrl-D does

    def do_new(self) -> None:
        """Create a new streaming chat session"""
        try:
            session = self.api.new_session()
        except ChatError as error:
            if error.status != 404:
                raise
            self.begin()  # a proxy cannot know which of many servers will have it
            say("✨ A new session begins with your next message.")
            return
        self.begin(str(session["session_id"]), known=True)
        self.created += 1
        say(f"✨ New session created successfully!\n   Session ID: {short(session['session_id'])}\n"
            f"   Model: {session['model']}")

    def do_info(self) -> None:
        """Show current session details"""
        session = self.api.session(self._current())
        show_report("📋 SESSION INFO", session)
        say(f"To go on later: --session {one_line(session['session_id'])}")

    def do_sessions(self) -> None:
        """List all active sessions on server"""
        sessions, rows = self.api.sessions(), []
        self.listed = [session["session_id"] for session in sessions]
        for number, session in enumerate(sessions, 1):
            age, created = duration(session["duration_minutes"] * 60), time_of_day(session["created_at"])
            mark = " ← CURRENT" if session["session_id"] == self.session_id else ""
            told = f"({session['message_count']} msgs, {age}, {created})"
            rows.append(f"{number}. {short(session['session_id'])} {told}{mark}")
        show_box(f"📋 ALL ACTIVE SESSIONS ({len(sessions)})", rows)

    def do_switch(self, argument: str) -> None:
        """Go to session N of /sessions, or to ID"""
        ids = [session["session_id"] for session in self.api.sessions()]
        numbers = {str(number): session_id for number, session_id in enumerate(self.listed or ids, 1)}
        start = argument.removesuffix("...")  # boxes and the prompt shorten ids
        found = [session_id for session_id in ids if session_id.startswith(start)]
        if argument in numbers:
            found = [numbers[argument]]
        elif argument in ids or not found:  # behind a proxy, a list may not be complete
            found = [argument]
        if len(found) > 1:
            raise ChatError(f"Several sessions begin with {start}. /sessions lists them.")
        self.enter(found[0])

    def do_reset(self) -> None:
        """Clear current session history"""
        self.api.clear(self._current())
        self.messages = 0
        say("🧹 The history of the session is cleared.")

    def do_delete(self) -> None:
        """Delete current session"""
        session_id = self._current()
        self.api.delete(session_id)
        self.begin()
        say(f"🧹 Session {short(session_id)} is deleted. Your next message begins a new one.")

    def do_history(self) -> None:
        """Show the messages of the current session"""
        messages = self.api.session(self._current())["messages"]
        say(f"📋 {len(messages)} messages")
        for message in messages:
            name = "👤 You" if message["role"] == "user" else "🤖 AI"
            say(f"\n{name} [{time_of_day(message['timestamp'])}]", "36")
            write(wrap(message["text"], terminal_width() - 1) + "\n")

    def do_retry(self) -> None:
        """Send a failed message again"""
        if not self.last or self.last.finish_reason:
            raise ChatError("There is nothing to send again: no message has failed.")
        turn = self.last.turn
        if turn.session_id != self.session_id:
            self.begin(turn.session_id)
        self.run(Turn(self.api, turn.message, turn.session_id, turn.turn_id))

    def _current(self) -> str:
        if not self.known:
            raise ChatError("There is no session yet. Send a message, or type /new.")
        return self.session_id


COMMANDS = [name.replace("do_", "/") for name in vars(Client) if name.startswith("do_")]
REPORT = {  # the rows of /server, /health and /info; each shows those that the server sends
    "Status": "status", "Server Uptime": "uptime_seconds", "Total Requests": "total_requests",
    "Successful": "successful_requests", "Failed": "failed_requests", "Active Sessions": "active_sessions",
    "Active Streams": "streaming_connections", "Total Sessions Created": "total_sessions_created",
    "Avg Response Time": "average_response_time", "Session ID": "session_id", "Model": "model",
    "Framework": "framework", "Total Messages": "message_count", "User Messages": "user_messages",
    "AI Messages": "model_messages", "Duration": "session_duration_seconds", "Created": "created_at",
}
FORMS: dict[str, Callable[[Any], str]] = {  # of the fields that need one
    "uptime_seconds": duration, "session_duration_seconds": duration, "created_at": time_of_day,
    "average_response_time": "{:.3f}s".format, "session_id": short,
}


def show_report(title: str, told: dict[str, Any]) -> None:
    """Print the server's report on itself or on a session as a box."""
    rows = {name: FORMS.get(field, str)(told[field]) for name, field in REPORT.items() if field in told}
    if not rows:
        raise unexpected()
    show_box(title, rows)


def open_page(url: str, name: str) -> None:
    """Open a page, and show its URL: there may be no browser."""
    say(f"📡 Opening {name} in your browser...\n   URL: {url}")
    if not webbrowser.open(url):
        say("   There is no browser here: open the URL yourself.")


def run_command(client: Client, line: str) -> None:
    """Run a command. A unique beginning of its name is enough. Raises ChatError."""
    name, *arguments = line.strip().split(maxsplit=1)
    found = [name] if name in COMMANDS else [command for command in COMMANDS if command.startswith(name)]
    if len(found) != 1:
        near = found if len(name) > 1 and found else difflib.get_close_matches(name.lower(), COMMANDS, 1)
        hint = f"Did you mean {' or '.join(near)}?" if near else "/help lists them all."
        raise ChatError(f"Unknown command {name}. {hint} Type // to send text that begins with a slash.")
    name = found[0]
    if arguments and name != "/switch":
        raise ChatError(f"{name} takes no argument.")
    if not arguments and name == "/switch":
        raise ChatError("/switch needs the number or the id of a session. /sessions lists them.")
    try:
        getattr(client, "do_" + name[1:])(*arguments)
    except WRONG_SHAPE as error:  # of the server's JSON
        raise unexpected() from error


# ---- main --------------------------------------------------------------------------------------------------


def greet(client: Client, session_id: str | None) -> None:
    """Find the server and the session. Raises ChatError for a wrong token, for example."""
    say("📡 STREAMABLE HTTP CHAT CLIENT 📡", "1")
    try:
        model = one_line(client.api.stats().get("model"))
    except ChatError as error:
        if not error.retryable:
            raise
        say(f"⚠ No answer from {client.api.url}: {error}\n   Start it: python3 streamchat_server.py", "33")
        return
    say(f"🎉 Connected to {client.api.url} ({model})\n"
        "📡 HTTP chunked streaming enabled - responses will appear as they're generated!\n"
        "   /help lists the commands.")
    if session_id:
        try:
            client.enter(session_id)
        except ChatError as error:
            if error.code == "session_not_found":
                say(f"📋 Session {short(session_id)} begins with your first message.")
            else:
                say(f"❌ {explain(error)}", "31")
        except WRONG_SHAPE:
            say(f"❌ {unexpected()}", "31")


def converse(client: Client, keyboard: Keyboard) -> None:
    """Chat with a person, until they leave."""
    leaving = False
    while True:
        try:
            print()
            text = keyboard.read_message(client.prompt())
            leaving = False
            if text.startswith("/") and not text.startswith("//"):
                run_command(client, text)
            elif text.strip():
                client.send(text.removeprefix("/"))
        except ChatError as error:
            say(f"❌ {explain(error)}", "31")
        except KeyboardInterrupt:
            if leaving and not keyboard.line():
                return
            leaving = True
            print("\n(Ctrl-C again, or Ctrl-D, leaves.)")
        except EOFError:
            return


def interact(api: Api, session_id: str | None) -> int:
    """Chat at the terminal. Returns the exit status."""
    if os.name == "nt":
        os.system("")  # makes a Windows console read escape sequences
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # what is not UTF-8 shows as �
    keyboard = Keyboard()
    client = Client(api, session_id, show_screen, keyboard)
    try:
        greet(client, session_id)
        converse(client, keyboard)
        client.do_stats()
    except ChatError as error:
        complain(f"❌ {explain(error)}")
        return 1
    finally:
        keyboard.release()
    if client.known:
        say(f"To go on later: --session {one_line(client.session_id)}")
    print("👋 Goodbye!")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The arguments, with an Api. No `message` means a chat. Wrong arguments exit with 2."""
    parser = argparse.ArgumentParser(description="Chat over streamable HTTP, at a terminal or in a script.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (%(default)s)")
    parser.add_argument("--session", metavar="ID", help="go on with this session, or begin it")
    parser.add_argument("--token", metavar="T", help="the server's token (default: STREAMCHAT_TOKEN)")
    parser.add_argument("--json", action="store_true", help="print the lines of the stream")
    parser.add_argument("message", metavar="MESSAGE", nargs="?",
                        help="print the answer to MESSAGE and to what is piped, and exit")
    arguments = parser.parse_args()
    if arguments.session is not None and not ID.fullmatch(arguments.session):
        parser.error("--session must be 1 to 64 of A-Z, a-z, 0-9, _ and -, but not new")
    try:
        arguments.api = Api(arguments.url, arguments.token or os.environ.get("STREAMCHAT_TOKEN"))
    except ValueError as error:
        parser.error(f"--url or --token: {escape(error)}")
    argument, at_terminal = arguments.message, sys.stdin.isatty()
    if argument is None and not arguments.json and at_terminal and sys.stdout.isatty():
        return arguments
    if at_terminal and argument is None:
        complain("(Type the message. Ctrl-D on an empty line ends it.)")
    try:
        piped = "" if at_terminal and argument is not None else sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        parser.error("standard input is not UTF-8")
    arguments.message = "\n".join(filter(None, [argument, piped]))
    if not arguments.message.strip():
        parser.error("there is no message")
    return arguments


def prepare_streams() -> None:
    """Replace standard streams that are closed. Show what an encoding cannot show as escapes."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def main() -> int:
    """The exit status: 0; 1 without a whole answer; 130 after Ctrl-C in a script; 2 for wrong arguments."""
    prepare_streams()
    try:
        arguments = parse_arguments()
        if arguments.message is None:
            return interact(arguments.api, arguments.session)
        show = show_json if arguments.json else show_text
        answer = Client(arguments.api, arguments.session, show).send(arguments.message)
        if answer.ctrl_c.pressed:
            return 130
        return 0 if answer.status() == "SUCCESS" else 1
    except KeyboardInterrupt:
        os._exit(130)  # sys.exit() would wait until somebody reads standard output
    except OSError as error:  # of standard output: those of the network are ChatErrors
        if not isinstance(error, BrokenPipeError):  # `| head` does this
            complain(f"❌ {error.strerror or error}.")
        abandon(sys.stdout)
        return 1


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    sys.exit(status)
