"""A real judge: ``transformers serve`` on loopback with a tiny model that was taught what to say.

``Gate`` stands before it as gateways do, and fails as told; what it lets through is the server's own answer.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import torch
from tests.tiny import new_model, tiny_tokenizer


def teach(folder, lessons, steps=120):
    """A tiny model that answers each prompt of ``lessons`` with its text."""
    tokenizer, model = tiny_tokenizer(), new_model()
    batch = []
    for prompt, said in lessons.items():
        chat = [{"role": "user", "content": prompt}]
        opening = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(opening)["input_ids"])
        ids = tokenizer(f"{opening}{said}<|im_end|>")["input_ids"]
        batch.append((ids, [-100] * start + ids[start:]))
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in batch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(steps):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def serving(folder):
    """``transformers serve`` in a thread of this process: starting a second one would take ten seconds.

    Gives the address for an OpenAI client.
    """
    from transformers.cli.serve import Serve
    from transformers.utils import logging

    level = logging.get_verbosity()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Serve(
        force_model=str(folder),
        device="cpu",
        dtype="float32",
        host="127.0.0.1",
        port=port,
        log_level="error",
        non_blocking=True,
    )
    logging.set_verbosity(level)
    try:
        deadline = time.monotonic() + 30
        while not server.server.started:
            assert time.monotonic() < deadline, "transformers serve did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill_server()


class Gate:
    """``answers`` are given first, in turn: (status, headers, body); then requests go to the real server.

    ``key``: refuse whoever does not bring it, repeating what was brought. ``seen`` holds the bodies of completions.
    """

    def __init__(self, behind):
        self.behind, self.answers, self.key, self.seen = behind, [], None, []

    def reply(self, handler):
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        if body:
            self.seen.append(json.loads(body))
        brought = handler.headers.get("authorization")
        if self.key and brought != f"Bearer {self.key}":
            return 401, {}, f"no access with {brought}".encode()
        if body and self.answers:
            return self.answers.pop(0)
        passed = httpx.request(
            handler.command,
            self.behind + handler.path.removeprefix("/v1"),
            content=body,
            headers={"content-type": "application/json"},
            timeout=30,
        )
        return passed.status_code, {"content-type": "application/json"}, passed.content


@contextmanager
def gate(behind):
    """A ``Gate`` with its ``url``."""
    keeper = Gate(behind)

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            status, headers, body = keeper.reply(self)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    keeper.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield keeper
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
