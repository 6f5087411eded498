"""Read exports in an environment of its own, which has nothing of this project: started by check_exports.py.

`python read_elsewhere.py vllm|transformers|lm_eval JOB.json`: JOB says what to read; the answer is JOB.json.out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def vllm(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers to texts and to chats, and what happens after each token that is forced upon the model."""
    from vllm import LLM, SamplingParams

    adapter, options = None, {}
    if job["adapter"]:
        from vllm.lora.request import LoRARequest

        adapter, options = LoRARequest("adapter", 1, job["adapter"]), {"enable_lora": True}
    model = LLM(
        model=job["model"],
        tokenizer=job["adapter"] or job["model"],
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_model_len=128,
        kv_cache_memory_bytes=64 << 20,
        **options,
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"], logprobs=0)
    forced = [
        SamplingParams(temperature=0, max_tokens=4, logit_bias={int(token): 100.0}) for token in job["forced"]
    ]
    common = {"use_tqdm": False, "lora_request": adapter}
    return {
        "plain": [answer(out) for out in model.generate(job["prompts"], greedy, **common)],
        "chat": [answer(out) for out in model.chat(job["chats"], greedy, **common)],
        "forced": [answer(out) for out in model.generate([job["prompts"][0]] * len(forced), forced, **common)],
    }


def answer(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    return {
        "prompt": list(output.prompt_token_ids),
        "tokens": list(first.token_ids),
        "logp": first.cumulative_logprob,
        "stopped": first.finish_reason == "stop",
    }


def transformers(job: dict[str, Any]) -> dict[str, Any]:
    """log π of given sequences, and the tokens of texts and chats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the SDPA that 4.57 takes by itself leaves out the soft capping of Gemma 2's attention
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"], torch_dtype=torch.float32, attn_implementation="eager"
    )
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    tokenizer: Any = AutoTokenizer.from_pretrained(job["adapter"] or job["model"])
    ids = torch.tensor(job["sequences"])
    with torch.no_grad():
        logps = torch.log_softmax(model.eval()(input_ids=ids).logits, -1)[:, :-1]
    return {
        "logps": logps.gather(-1, ids[:, 1:, None]).squeeze(-1).tolist(),
        "plain": [tokenizer(text)["input_ids"] for text in job["prompts"]],
        "chat": [
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            for turns in job["chats"]
        ],
    }


def lm_eval(job: dict[str, Any]) -> dict[str, Any]:
    """log π of every choice of a multiple-choice task, question by question."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": job["model"], "dtype": "float32"},
        tasks=["controlled"],
        task_manager=TaskManager(include_path=job["task_folder"], include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["controlled"], key=lambda sample: sample["doc_id"])
    return {"logps": [[float(reply[0]) for reply in sample["filtered_resps"]] for sample in samples]}


if __name__ == "__main__":
    _, reader, path = sys.argv
    jobs = json.loads(Path(path).read_text(encoding="utf-8"))
    read = {"vllm": vllm, "transformers": transformers, "lm_eval": lm_eval}[reader]
    Path(f"{path}.out").write_text(json.dumps([read(job) for job in jobs]), encoding="utf-8")
