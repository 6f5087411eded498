"""Check that other programs read exports as transformers does here: `make check-exports` prints the table.

A real vLLM, transformers 4.57 and lm-eval run in environments of their own; the judge asks a vLLM server.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from served_judge import INSTRUCTIONS, WORDS, train_judge, verdict  # noqa: E402
from tiny_runs import controlled, preference, quiet_trainer  # noqa: E402

from app.commands.export import export  # noqa: E402
from app.commands.generate import generate  # noqa: E402
from app.core.samples import read_samples  # noqa: E402
from app.judges.endpoint import SamplingServer  # noqa: E402
from datamodules.controlled_task import build_tokenizer, preference_pairs  # noqa: E402
from datamodules.sources.messages import prompt_messages  # noqa: E402
from lightning_modules.lora import Lora  # noqa: E402

NEW_TOKENS = 24
TOLERANCE = 1e-4  # nats: of one token, and of an answer's sum per token
STOPS = [2, 5, 7, 40]  # of the start model's generation config: a chat model has several
COMMON = {
    "vocab_size": len(build_tokenizer()),
    "hidden_size": 128,  # with four heads: vLLM has no kernels for heads of less than 32
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
TIED = {"tie_word_embeddings": True}
SLIDING = {"sliding_window": 16, "query_pre_attn_scalar": 32, "final_logit_softcapping": 30.0}
# name: family, its settings, adapters, whether they are exported alone
CASES: dict[str, tuple[str, dict[str, Any], Lora | None, bool]] = {
    "llama": ("llama", GROUPED, None, False),
    "llama, tied": ("llama", GROUPED | TIED, None, False),
    "gpt2": ("gpt2", TIED, None, False),
    "gpt_neox": ("gpt_neox", {}, None, False),
    "qwen3": ("qwen3", GROUPED, None, False),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}, None, False),
    "gemma2": ("gemma2", GROUPED | TIED | SLIDING, None, False),
    "llama, LoRA merged": ("llama", GROUPED, Lora(r=8), False),
    "tied, LoRA on embeddings": ("llama", GROUPED | TIED, Lora(target_modules=["embed_tokens", "q_proj"]), False),
    "llama, LoRA adapter": ("llama", GROUPED, Lora(r=8), True),
}  # fmt: skip


def main() -> int:
    readers = {name: os.environ[name] + "/bin/python" for name in ("VLLM_ENV", "TF4_ENV")}
    prompts = [str(pair.prompt) for pair in preference_pairs(6, seed=0)]
    wanted = os.environ.get("CASES") or "; ".join(CASES)
    cases = {name: CASES[name] for name in wanted.split("; ")}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [exported_case(folder / f"case-{index}", case, prompts) for index, case in enumerate(cases.values())]
        older = run(readers["TF4_ENV"], "transformers", jobs, folder)
        scored = run(readers["VLLM_ENV"], "lm_eval", [questions(folder, jobs[0])], folder)[0]
        print("| export | vLLM: equal answers | stops | log π apart | transformers 4.57: log π apart |")
        print("|---|---|---|---|---|")
        for case, job, old in zip(cases, jobs, older, strict=True):
            row = compared(job, run(readers["VLLM_ENV"], "vllm", [job], folder)[0], old)
            print("|", " | ".join([case, *(text for text, _ in row)]), "|", flush=True)
            problems += [f"{case}: {text}" for text, good in row if not good]
        for text, good in (lm_eval_agrees(jobs[0], scored), *server_agrees(readers["VLLM_ENV"], folder)):
            print(f"\n{text}")
            problems += [] if good else [text]
    if problems:
        print("\nDIFFERENT:", *problems, sep="\n", file=sys.stderr)
    return bool(problems)


def exported_case(folder: Path, case: tuple[str, dict[str, Any], Lora | None, bool], prompts: list[str]) -> dict:
    """Train two steps, export, and return what others are to read with what transformers makes of it here."""
    family, settings, lora, alone = case
    config = AutoConfig.for_model(family, **(COMMON | settings))
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in start.parameters():
        if weight.ndim > 1:
            weight.data *= 3  # every token is to sway what follows
    start.generation_config.eos_token_id = STOPS
    start.save_pretrained(folder / "start")
    build_tokenizer().save_pretrained(folder / "start")
    trainer = quiet_trainer(folder, max_steps=2)
    trainer.fit(preference(str(folder / "start"), lora=lora), controlled(20))
    trainer.save_checkpoint(folder / "run.ckpt")
    out = folder / "model"
    export(str(folder / "run.ckpt"), str(out), adapter=alone)

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "start" if alone else out, dtype=torch.float32)
    if alone:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    chats = [list(prompt_messages(prompt)) for prompt in prompts]
    sequences = torch.randint(3, COMMON["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(0)).tolist()
    templated = [tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] for turns in chats]
    plain = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return {
        "model": str(folder / "start" if alone else out),
        "adapter": str(out) if alone else None,
        "prompts": prompts,
        "chats": chats,
        "sequences": sequences,
        "new_tokens": NEW_TOKENS,
        "forced": model.generation_config.eos_token_id,
        "here": {
            "plain": [greedy(model.eval(), ids) for ids in plain],
            "chat": [greedy(model, ids) for ids in templated],
            "logps": [token_logps(model, ids) for ids in sequences],
        },
    }


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> dict[str, Any]:
    whole = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
    tokens = whole[len(prompt) :]
    return {"prompt": prompt, "tokens": tokens, "logp": sum(token_logps(model, whole)[len(prompt) - 1 :])}


@torch.no_grad()
def token_logps(model: Any, ids: list[int]) -> list[float]:
    logps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    return logps[:-1].gather(-1, torch.tensor(ids)[1:, None]).squeeze(-1).tolist()


def compared(job: dict[str, Any], vllm: dict[str, Any], older: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return the cells of a row, each with whether it is as it should be."""
    here = job["here"]
    pairs = [
        (ours, theirs) for kind in ("plain", "chat") for ours, theirs in zip(here[kind], vllm[kind], strict=True)
    ]
    same = sum(all(ours[name] == theirs[name] for name in ("prompt", "tokens")) for ours, theirs in pairs)
    stopped = sum(
        out["stopped"] and out["tokens"] == [end] for out, end in zip(vllm["forced"], job["forced"], strict=True)
    )
    apart = max(abs(ours["logp"] - theirs["logp"]) / NEW_TOKENS for ours, theirs in pairs)
    far = max(
        abs(one - other)
        for ours, theirs in zip(here["logps"], older["logps"], strict=True)
        for one, other in zip(ours, theirs, strict=True)
    )
    texts = all([ids["prompt"] for ids in here[kind]] == older[kind] for kind in ("plain", "chat"))
    return [
        (f"{same} of {len(pairs)}", same == len(pairs)),
        (f"{stopped} of {len(STOPS)}", stopped == len(STOPS) == len(job["forced"])),
        (f"{apart:.1e}", apart <= TOLERANCE),
        (f"{far:.1e}" + ("" if texts else ", other tokens"), far <= TOLERANCE and texts),
    ]


def questions(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Write lm-eval's task, and return its job."""
    rows = [
        {"prompt": pair.prompt, "choices": [pair.chosen, pair.rejected]} for pair in preference_pairs(20, seed=1)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task").mkdir()
    (folder / "task" / "controlled.yaml").write_bytes((HERE / "controlled.yaml").read_bytes())
    return {"model": job["model"], "task_folder": str(folder / "task")}


def lm_eval_agrees(job: dict[str, Any], scored: dict[str, Any]) -> tuple[str, bool]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    apart = 0.0
    for pair, found in zip(preference_pairs(20, seed=1), scored["logps"], strict=True):
        for response, theirs in zip((pair.chosen, str(pair.rejected)), found, strict=True):
            prompt = tokenizer(str(pair.prompt))["input_ids"]
            ids = prompt + tokenizer(response, add_special_tokens=False)["input_ids"]
            apart = max(
                apart, abs(sum(token_logps(model, ids)[len(prompt) - 1 :]) - theirs) / (len(ids) - len(prompt))
            )
    count = 2 * len(scored["logps"])
    return f"lm-eval: {count} responses, log π at most {apart:.1e} nats per token apart", apart <= TOLERANCE


def server_agrees(python: str, folder: Path) -> list[tuple[str, bool]]:
    """Let `beta-dpo judge` and `generate` ask a vLLM server whose model has learnt what to say of two words."""
    (folder / "judge").mkdir()
    train_judge(folder / "judge")
    (folder / "instructions.txt").write_text(INSTRUCTIONS)
    words = list(product(WORDS, WORDS))
    for side, name in enumerate(("ours", "theirs")):
        rows = [{"prompt_id": str(i), "prompt": "what", "response": pair[side]} for i, pair in enumerate(words)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served_by_vllm(python, folder / "judge", folder / "server.log") as url:
        line = [sys.executable, "-m", "app.main", "judge", "ours.jsonl", "theirs.jsonl", "--by", "endpoint"]
        line += ["--model", "judge", "--endpoint.url", url, "--endpoint.max_tokens", "8", "--verdicts", "v.jsonl"]
        line += ["--endpoint.instructions", "instructions.txt"]
        done = subprocess.run(line, cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE.parents[1])}, check=False)
        sampled = generate_agrees(url, folder)
    found = sorted(str(json.loads(text)["verdict"]) for text in (folder / "v.jsonl").read_text().splitlines())
    wanted = sorted(str(verdict(*pair)) for pair in words if pair[0] != pair[1])
    told = f"judge at a vLLM server: {len(found)} verdicts, status {done.returncode}"
    return [(told, done.returncode == 0 and found == wanted), sampled]


def generate_agrees(url: str, folder: Path) -> tuple[str, bool]:
    """Sample the likeliest answers here and through the server, to texts and to chats, whole and cut."""
    prompts, count, same = folder / "prompts.jsonl", 0, 0
    texts = [f"asked what first {ours} second {theirs}" for ours, theirs in product(WORDS, WORDS)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    for chat, limit in product((False, True), (1, 6)):
        settings: dict[str, Any] = {"prompts": str(prompts), "count": None, "temperature": 0.0}
        settings |= {"chat_template": chat, "max_new_tokens": limit}
        places = [str(folder / f"{name}-{chat}-{limit}.jsonl") for name in ("here", "there")]
        generate(str(folder / "judge"), places[0], **settings)
        generate("judge", places[1], endpoint=SamplingServer(url=url, token_ids=True), **settings)
        for here, there in zip(*map(read_samples, places), strict=True):
            names = ("prompt_ids", "response_ids", "tokens", "finished")
            alike = all(here[name] == there.get(name) for name in names)
            same += alike and here["response"].strip() == there["response"].strip()
            count += 1
    return f"generate through a vLLM server: {same} of {count} answers have the same tokens and end", same == count


@contextmanager
def served_by_vllm(python: str, model: Path, log: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [python, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model)]
    line += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    line += ["--enforce-eager", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
    with log.open("w") as file:
        server = subprocess.Popen(line, env=elsewhere(), stdout=file, stderr=file)
        try:
            for _ in range(600):
                if answers(f"http://127.0.0.1:{port}/health"):
                    break
                if server.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


def run(python: str, reader: str, jobs: list[dict[str, Any]], folder: Path) -> Any:
    """Return what `reader` of read_elsewhere.py makes of `jobs` under another Python."""
    path = folder / f"{reader}.json"
    path.write_text(json.dumps([{name: part for name, part in job.items() if name != "here"} for job in jobs]))
    line = [python, str(HERE / "read_elsewhere.py"), reader, str(path)]
    done = subprocess.run(line, cwd=folder, env=elsewhere(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{reader} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(Path(f"{path}.out").read_text())


def elsewhere() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


if __name__ == "__main__":
    sys.exit(main())
