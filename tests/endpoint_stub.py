"""A server that plays the language models of the data engine."""

import json
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

QUESTIONS = [
    {"question": "Who waves?", "answer": "the cook", "wrong": ["the cat", "nobody"]},
    {"question": "Which is a colour?", "answer": "red", "wrong": ["seven", "up"]},
    {"question": "What falls?", "answer": "a cup", "wrong": ["a tree", "snow"]},
    {"question": "malformed", "answer": "", "wrong": []},
]
# Which questions each model answers right.
KNOWS = {
    "blind": {"Which is a colour?"},
    "first": {"Who waves?", "Which is a colour?", "What falls?"},
    "second": {"Who waves?"},
}


class Stub(ThreadingHTTPServer):
    """Plays every model; keeps the requests; fails at `fail_at`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.fail_at, self.fail_with, self.raw = [], None, 401, None
        self.headers = {}
        self.refuses, self.wait = lambda body: False, lambda body: None

    def answer(self, body):
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if body["model"] == "writer":
            return f"Here you are:\n```json\n{json.dumps(QUESTIONS)}\n```"
        question = next(q for q in QUESTIONS if q["question"] in text)
        right = next(line[0] for line in text.splitlines() if line[1:] == f". {question['answer']}")
        wrong = next(line[0] for line in text.splitlines() if line[1:] == f". {question['wrong'][0]}")
        return f"{right}." if question["question"] in KNOWS[body["model"]] else f"I think {wrong}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802 - the library's name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.server
        stub.requests.append((self.path, self.headers.get("Authorization"), body))
        stub.wait(body)
        failed = stub.fail_at is not None and len(stub.requests) >= stub.fail_at
        if failed and stub.fail_with in (429, 503):
            stub.fail_at = None
        refused = stub.refuses(body)
        reply = None if stub.raw else {"choices": [{"message": {"content": stub.answer(body)}}]}
        content = stub.raw or json.dumps({"error": "no"} if failed or refused else reply, indent=1).encode()
        self.send_response(stub.fail_with if failed else 400 if refused else 200)
        self.send_header("Content-Length", str(len(content)))
        for name, value in stub.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # it may have heard enough
            self.wfile.write(content)

    def log_message(self, *args):
        pass
