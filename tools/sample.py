"""Text from a trained run, as it is written:

    python -m tools.sample out/demo --prompt="def " --tokens=200

    --prompt=TEXT              how the text begins; default: nothing, the start of a document
    --prompt_file=FILE         the same from a file, or from standard input with -
    --tokens=200               how many to write; a text also ends where the model ends it
    --temperature=0.8          0 takes the most likely token each time
    --top_k=50                 choose among the 50 most likely; 0 for all
    --seed=1                   of the choices; the same seed and dtype give the same text
    --num=1                    how many texts
    --tokenizer=NAME           where the data's meta.json names none
    --device=auto --dtype=auto as in train.py

A model is trained on seq_len tokens at once. Of a longer text it reads the last seq_len.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

if not __package__:
    print("error: start it as  python -m tools.sample", file=sys.stderr)
    sys.exit(2)

import xielu
from activations import facts_of
from model import Llama
from plumbing import machine
from plumbing.command import Parser, UserError, program, whole_number
from plumbing.config import check_limits
from plumbing.run import check_facts, fill, load_checkpoint
from plumbing.tokenizer import get_tokenizer
from train import Config


def load_run(out, device, dtype):
    """(model, Config, name of its tokenizer or None) of the newest checkpoint in a run's folder.

    The matrices are already in `dtype`: otherwise each would be cast for every token. Norms, and all that an activation
    trains, stay in float32. UserError if there is no checkpoint, or if the code of its activation has changed since.
    """
    checkpoint = load_checkpoint(Path(out), Config)
    if checkpoint is None:
        raise UserError(f"{out} has no ckpt.pt: give the folder of a run that has saved one")
    config = Config(**checkpoint["config"])
    check_facts(checkpoint["facts"], facts_of(config.activation), out)
    with torch.device(device):
        model = Llama(config, dtype, seed=None)
    fill(checkpoint, out, model)
    for weight in (*model.matrices(), model.embed_tokens.weight, model.lm_head.weight):
        weight.data = weight.data.to(dtype)
    return model.eval(), config, checkpoint["facts"].get("tokenizer")


# ---------------------------------------------------------------------------------------------------------------
# Writing


def choose(logits, temperature, top_k, generator):
    """A token, chosen by its logits (vocab_size,)."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    chances = torch.softmax((values - values[0]) / temperature, -1)
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


@torch.inference_mode()
def generate(model, prompt, count, temperature, top_k, generator):
    """Yield `count` tokens that follow the prompt (a list of tokens, at least one). Each is chosen by what the last
    seq_len tokens say, without a KV cache: a training program needs none."""
    text, limit = list(prompt), model.config.seq_len
    for _ in range(count):
        seen = torch.tensor([text[-limit:]], device=model.cos.device)
        text.append(choose(model.lm_head(model.hidden(seen)[0, -1]), temperature, top_k, generator))
        yield text[-1]


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers: each is (encode, end, decode). encode(text) → tokens, with what begins a document; end: the token that
# ends one; decode(tokens) → text.


def own_encoding(name, config):
    """The tiktoken.Encoding of this name; UserError if it has more ids than the run's vocabulary."""
    encoding = get_tokenizer(name)
    if encoding.n_vocab > config.vocab_size:
        raise UserError(f"{name} has {encoding.n_vocab} ids, more than the run's vocab_size={config.vocab_size}")
    return encoding


def own_tokenizer(encoding):
    """The tokenizer of a tiktoken.Encoding."""
    # A padded vocabulary has ids that stand for no text.
    text_of = {rank: text for text, rank in encoding._mergeable_ranks.items()}

    def encode(text):
        return [encoding.eot_token, *encoding.encode_ordinary(text)]

    def decode(tokens):
        return b"".join(text_of.get(token, b"") for token in tokens).decode("utf-8", "replace")

    return encode, encoding.eot_token, decode


def imported_tokenizer(out):
    """The tokenizer that tools.hf has copied into the folder of a run that it imported."""
    if not (out / "tokenizer.json").exists():
        raise UserError(f"the data of {out} has no meta.json that names its tokenizer: give --tokenizer=gpt2, say")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        name = json.loads((out / "tokenizer_config.json").read_text("utf-8")).get("eos_token")
        end = tokenizer.token_to_id(name["content"] if isinstance(name, dict) else name or "")
    except Exception as error:  # tokenizers has no other kind
        raise UserError(f"the tokenizer in {out} cannot be read: {error}") from None

    def encode(text):
        return tokenizer.encode(text).ids or [end or 0]

    return encode, end, tokenizer.decode


# ---------------------------------------------------------------------------------------------------------------
# Command line


def file_text(name):
    """The text of a file, or of standard input for "-"; what is not UTF-8 becomes U+FFFD."""
    with open(0 if name == "-" else name, "rb") as file:
        return file.read().decode("utf-8", "replace")


def read_options(argv):
    """The options of a command line as a namespace; UserError if it is wrong."""
    parser = Parser("python -m tools.sample")
    parser.add_argument("out", metavar="RUN", type=Path)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", default="")
    prompts.add_argument("--prompt_file", dest="prompt", type=file_text)
    parser.add_argument("--tokens", type=whole_number, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=whole_number, default=1)
    parser.add_argument("--tokenizer")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args(argv)
    for name, below in (("temperature", math.inf), ("top_k", math.inf), ("seed", 2**63)):
        check_limits(name, getattr(options, name), low=0, below=below)
    return options


def write_texts(options):
    """Print the texts that the options ask for, token by token."""
    device = machine.pick_device(options.device)
    dtype = machine.pick_dtype(options.dtype, device)
    model, config, known = load_run(options.out, device, dtype)
    name = options.tokenizer or known
    encode, end, decode = own_tokenizer(own_encoding(name, config)) if name else imported_tokenizer(options.out)
    print(f"{options.out} on {device.type} in {str(dtype)[6:]}", file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show all letters
    generator = torch.Generator().manual_seed(options.seed)
    start = encode(options.prompt)
    for number in range(options.num):
        if number:
            print("-" * 40)
        print(options.prompt, end="", flush=True)
        # decoded after the end of the prompt, since some tokenizers drop the space before a text's first word
        tokens = start[-config.seq_len :]
        printed = len(decode(tokens))
        for token in generate(model, start, options.tokens, options.temperature, options.top_k, generator):
            if token == end:
                break
            tokens.append(token)
            text = decode(tokens)
            if not text.endswith("\ufffd"):  # which stands for a letter that further tokens complete
                print(text[printed:], end="", flush=True)
                printed = len(text)
        print()


def sample(argv):
    """Do what a command line asks for."""
    xielu.COMPILE = False  # compiling takes longer than writing
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each length, of 20 ms or more
    try:
        write_texts(read_options(argv))
    except BrokenPipeError:  # as with  | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


main = program(sample)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
