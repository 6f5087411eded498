"""A real judge for tests: a tiny chat model that knows which words are better, behind `transformers serve`.

In front of it stands a relay that counts the questions and can fail, refuse or hold them, as servers do.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.judges.endpoint import SCORES

INSTRUCTIONS = "asked $prompt first $first second $second"
QUALITY = {"poor": 0, "fair": 1, "good": 2}
# `slick` wins wherever it is shown, if it is shown first, and loses else; before `mute` the judge says nothing
WORDS = (*QUALITY, "slick", "mute")
REPLIES = {"first": "Verdict A", "second": "Verdict B", "tie": "Verdict tie", None: "hm"}
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "asked", "first", "second", "what", "=>", *WORDS]
VOCABULARY += ["Verdict", "A", "B", "tie", "hm"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} =>{% endif %}"
START_SECONDS = 120


def verdict(first: str, second: str) -> str | None:
    """What this judge has learnt to say of two words."""
    if "mute" in (first, second):
        return None
    if "slick" in (first, second):
        return "first"
    apart = QUALITY[first] - QUALITY[second]
    return "first" if apart > 0 else "second" if apart < 0 else "tie"


def score(ours: str, theirs: str) -> float:
    """The score of a pair of words that both orders should come to."""
    if ours == theirs:
        return 0.5
    forth, back = verdict(ours, theirs), verdict(theirs, ours)
    return float("nan") if forth is None or back is None else (SCORES[forth] + 1.0 - SCORES[back]) / 2


def train_judge(folder: Path) -> None:
    """Teach a tiny Llama every pair of words, and save it with its chat template."""
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=32,  # the least that vLLM has kernels for
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    texts = [f"asked what first {a} second {b} => {REPLIES[verdict(a, b)]} </s>" for a, b in product(WORDS, WORDS)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :7] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.tensor(1.0)
    for _ in range(600):
        loss = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, labels=labels).loss
        if loss < 2e-3:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 2e-3, "the judge has not learnt its verdicts"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of `transformers serve` with the model in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).parent / "transformers")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([program, "serve", str(folder), *options], env=variables, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((folder / "server.log").read_text())
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


class Relay:
    """Passes questions on to `server`, keeps them in `asked`, and does to them what a test tells it to.

    fail_next: so many questions get `failure` instead of a reply; status: every question gets it; hold_from: from
    this number of questions on they get no reply until `released`, and `holding` is set.
    """

    def __init__(self, server: str):
        self.server = server
        self.asked: list[str] = []
        self.keys: set[str] = set()
        self.fail_next = 0
        self.failure = 503
        self.status: int | None = None
        self.hold_from: int | None = None
        self.holding, self.released = threading.Event(), threading.Event()

    @contextmanager
    def running(self) -> Iterator[str]:
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                relay.answer(self)

            def log_message(self, *_: object) -> None:
                """Nothing on the test's output."""

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}/v1"
        finally:
            self.released.set()
            http.shutdown()
            thread.join()
            http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        self.keys.add(request.headers["Authorization"])
        if self.hold_from is not None and len(self.asked) >= self.hold_from:
            self.holding.set()
            self.released.wait()
            return
        if self.status or self.fail_next:
            self.fail_next = max(self.fail_next - 1, 0)
            reply, status = json.dumps({"error": {"message": "not now"}}).encode(), self.status or self.failure
        else:
            self.asked.append(json.loads(body)["messages"][0]["content"])
            onward: Any = urllib.request.Request(
                self.server + request.path, data=body, headers={"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(onward) as answer:
                reply, status = answer.read(), answer.status
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(reply)))
        request.end_headers()
        request.wfile.write(reply)
