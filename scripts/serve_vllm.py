"""Runs vLLM on the workloads of `isobatch bench serve`, and keeps its times in a file for it to read.

A process of its own, because vLLM takes the GPU's memory and has its mode from the environment. It gets the
same token ids, random weights too, and each workload twice, of which the second run counts, as ours does.
Written for vLLM 0.25.1. With the files, `isobatch bench serve --beside FILE...` compares.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from isobatch.cli.parser import Parser
from isobatch.cli.workloads import MODEL, WORKLOADS, Workload
from isobatch.errors import IsobatchError, MissingDependencyError
from isobatch.models.config import ARCHITECTURES
from isobatch.models.presets import preset

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # FlashInfer is optional, and greedy decoding does without
}
"""Unless the caller's environment says otherwise."""
_MODES = {"default": "0", "batch-invariant": "1"}
"""VLLM_BATCH_INVARIANT."""
_SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "max_model_len": 8192,
    "max_num_seqs": 1024,
    "gpu_memory_utilization": 0.85,
    "disable_log_stats": True,
    "seed": 0,
}
"""What is not here is vLLM's own default: torch.compile, and CUDA graphs of up to 512 tokens."""


def huggingface_config(model: str) -> dict[str, Any]:
    """The config.json of a preset, as far as vLLM wants it."""
    config = preset(model).config()
    return {
        "architectures": [ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": "bfloat16",
    }


def measure(
    vllm: Any, workloads: Sequence[Workload], vocabulary: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Starts vLLM and runs every workload twice.

    Args:
        vllm: the module.
        workloads: which ones.
        vocabulary: of the model.
        say: told what is done.

    Returns:
        Seconds to start, and a point for each workload.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(huggingface_config(MODEL)))
        llm = vllm.LLM(model=folder, **_SETTINGS)
    startup = time.perf_counter() - started
    say(f"vLLM started in {startup:.0f} s")
    points = []
    for workload in workloads:
        asks = workload.asks(vocabulary)
        first_seconds, first = _serve(vllm, llm, asks)
        seconds, second = _serve(vllm, llm, asks)
        lengths = [params.max_tokens for _, params in asks]
        if list(map(len, second)) != lengths:
            raise RuntimeError(f"{workload.name}: vLLM gave replies of other lengths than it was asked for")
        rate = sum(lengths) / seconds
        points.append(
            {
                "workload": workload.name,
                "asks": workload.digest(vocabulary),
                "seconds": seconds,
                "first_seconds": first_seconds,
                "tokens_per_s": rate,
                "second_run_repeats_first": first == second,
            }
        )
        say(f"{workload.name}: {seconds:.2f} s (first run {first_seconds:.2f}), {rate:.0f} tokens/s")
    return {"startup_s": startup, "points": points}


def _serve(vllm: Any, llm: Any, asks: Sequence[tuple[list[int], Any]]) -> tuple[float, list[list[int]]]:
    """Seconds from handing over all requests to having all replies, and the replies."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asks]
    params = [
        vllm.SamplingParams(
            temperature=ours.temperature,
            max_tokens=ours.max_tokens,
            ignore_eos=ours.ignore_eos,
            detokenize=False,
        )
        for _, ours in asks
    ]
    started = time.perf_counter()
    replies = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started, [list(reply.outputs[0].token_ids) for reply in replies]


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", required=True, choices=list(_MODES))
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, help="all unless given")
    return parser.parse_args()


def main() -> None:
    """Measures, and writes the file."""
    arguments = _arguments()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_BATCH_INVARIANT"] = _MODES[arguments.mode]
    try:
        import vllm
    except ImportError as error:
        raise MissingDependencyError(
            f"vLLM cannot be imported: {error}", fix="pip install vllm==0.25.1"
        ) from error

    def say(line: str) -> None:
        print(f"vllm {arguments.mode}: {line}", flush=True)

    workloads = [workload for workload in WORKLOADS if workload.name in arguments.workloads]
    found = measure(vllm, workloads, preset(MODEL).vocabulary, say)
    # Only now: it loads our kernels, whose settings of threads shall not be vLLM's.
    from isobatch.cli import results

    environment = {name: os.environ[name] for name in (*_ENVIRONMENT, "VLLM_BATCH_INVARIANT")}
    report = {
        "engine": "vllm",
        "version": metadata.version("vllm"),
        "mode": arguments.mode,
        "model": MODEL,
        "settings": _SETTINGS,
        "environment": environment,
    }
    results.write(arguments.out, report | found)
    say(f"kept in {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except IsobatchError as error:
        sys.exit(str(error))
