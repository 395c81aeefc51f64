"""Text from a trained run, as it is written:

    python -m tools.sample out/demo --prompt="def " --tokens=200

    --prompt=TEXT              what the text begins with; default: nothing, the start of a document
    --prompt_file=FILE         the same from a file, or from standard input with -
    --tokens=200               how many to write; a text also ends where the model ends it
    --temperature=0.8          0 takes the likeliest token each time
    --top_k=50                 choose among so many of the likeliest; 0 for all
    --seed=1                   of the choices; the same seed gives the same text
    --num=1                    how many texts
    --tokenizer=NAME           where the data's meta.json names none
    --device=auto --dtype=auto as in train.py

A model has seen seq_len tokens at once, no more: of a longer prompt it reads the last seq_len, and when a text reaches
that, the older half is forgotten and the newer half read again, as if the text began there.
"""

import codecs
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from data import UserError, get_tokenizer
from model import Linear, Llama
from prepare_data import Parser, count
from tools.command import run_command


def load_run(out, device, dtype):
    """(model, Config, name of the tokenizer or None) of the newest checkpoint in a run's folder; its matrices already
    in `dtype`, to which they would be cast for every token otherwise."""
    checkpoint = train.load_checkpoint(Path(out))
    if checkpoint is None:
        raise UserError(f"{out} has no ckpt.pt: give the folder of a run that has saved one")
    config = train.Config(**train.typed_keys(checkpoint["config"], f"in {out}/ckpt.pt"))
    model_config = train.check(config, 1)
    train.check_formula(checkpoint, config)
    with torch.device(device):
        model = Llama(model_config, dtype)
    model.to(device)  # the rotary table, which is made on the CPU
    model.load_state_dict(checkpoint["model"])
    for module in model.modules():
        if isinstance(module, Linear | torch.nn.Embedding):
            module.to(dtype)
    return model.eval(), config, checkpoint["data"].get("tokenizer")


class Cache:
    """The keys and values of the tokens that a model has read, (1, kv heads, tokens so far, D) for each layer, so that
    each further token costs one position."""

    def __init__(self, model):
        self.model = model
        self.clear()

    def clear(self):
        self.tokens = 0
        self.keys_values = [None] * len(self.model.layers)

    def read(self, tokens):
        """Logits (vocab_size,) after these further tokens, a list. Several at once only where nothing was read yet."""
        model, end = self.model, self.tokens + len(tokens)
        cos, sin = model.cos[self.tokens : end], model.sin[self.tokens : end]
        x = model.embed_tokens(torch.tensor([tokens], device=cos.device)).to(model.compute_dtype)
        for number, layer in enumerate(model.layers):
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
            if self.tokens:
                before = self.keys_values[number]
                k, v = torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)
            self.keys_values[number] = k, v
            grouped = q.shape[1] != k.shape[1]
            # one token sees all before it; several, at the start, those before each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.tokens == 0, enable_gqa=grouped)
            x = x + layer.self_attn.output(y)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.tokens = end
        return model.lm_head(model.norm(x[0, -1]))


def choose(logits, temperature, top_k, generator):
    """A token by its logits (vocab_size,)."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k, len(logits)) if top_k else len(logits))
    chances = torch.softmax((values - values[0]) / temperature, -1)
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


@torch.inference_mode()
def generate(model, prompt, count, temperature, top_k, generator):
    """Yield `count` tokens that follow the prompt (a list of tokens, at least one)."""
    limit = model.config.seq_len
    text, cache = list(prompt), Cache(model)
    unread = text[-limit:]
    for _ in range(count):
        if cache.tokens == limit:
            cache.clear()
            unread = text[-max(1, limit // 2) :]
        text.append(choose(cache.read(unread), temperature, top_k, generator))
        unread = text[-1:]
        yield text[-1]


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers: each is (function text → tokens, what begins a text included; the token that ends one; function that
# gives a decoder, which takes token after token and returns the text that each one completes)


def own_encoding(name, config):
    """The tiktoken.Encoding that prepare_data.py knows by this name; UserError if the run cannot have had it."""
    encoding = get_tokenizer(name)
    if encoding.n_vocab > config.vocab_size:
        raise UserError(f"{name} has {encoding.n_vocab} ids, more than the run's vocab_size={config.vocab_size}")
    return encoding


def own_tokenizer(encoding):
    """The one of a tiktoken.Encoding."""
    # the ids that stand for text; a padded vocabulary has some that do not
    text_of = {encoding.encode_single_token(text): text for text in encoding.token_byte_values()}

    def encode(text):
        return [encoding.eot_token, *encoding.encode_ordinary(text)]

    def start_decoding():
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may be several tokens
        return lambda token: decoder.decode(text_of.get(token, b""))

    return encode, encoding.eot_token, start_decoding


def imported_tokenizer(out):
    """The one that tools.hf has put into the folder of a run that it imported."""
    if not (out / "tokenizer.json").exists():
        raise UserError(f"the data of {out} has no meta.json that names its tokenizer: give --tokenizer=gpt2, say")
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    try:
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        name = json.loads((out / "tokenizer_config.json").read_text("utf-8")).get("eos_token")
        end = tokenizer.token_to_id(name["content"] if isinstance(name, dict) else name or "")
    except Exception as error:  # tokenizers has no other kind
        raise UserError(f"the tokenizer in {out} cannot be read: {error}") from None

    def encode(text):
        return tokenizer.encode(text).ids or [end or 0]

    def start_decoding():
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(tokenizer, token) or ""

    return encode, end, start_decoding


# ---------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """The options of a command line as a namespace; UserError where it is wrong."""
    parser = Parser(prog="python -m tools.sample", add_help=False)
    parser.add_argument("out", metavar="RUN")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", default="")
    prompts.add_argument("--prompt_file")
    parser.add_argument("--tokens", type=count, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=count, default=1)
    parser.add_argument("--tokenizer")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args(argv)
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"temperature must be at least 0, not {options.temperature}")
    if options.top_k < 0:
        raise UserError(f"top_k must be at least 0, not {options.top_k}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"seed must be at least 0 and below 2**63, not {options.seed}")
    return options


def read_prompt(options):
    """The prompt as text, from wherever it is."""
    if options.prompt_file is None:
        return options.prompt
    file = sys.stdin.buffer if options.prompt_file == "-" else open(options.prompt_file, "rb")
    with file:
        return file.read().decode("utf-8", "replace")


def write_texts(options):
    """Print the texts that the options ask for, token by token."""
    prompt = read_prompt(options)
    device = train.pick_device(options.device)
    dtype = train.pick_dtype(options.dtype, device)
    model, config, tokenizer = load_run(options.out, device, dtype)
    if options.tokenizer or tokenizer:
        encode, end, start_decoding = own_tokenizer(own_encoding(options.tokenizer or tokenizer, config))
    else:
        encode, end, start_decoding = imported_tokenizer(Path(options.out))
    tokens = encode(prompt)
    print(f"{options.out} on {device.type} in {str(dtype)[6:]}", file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # of a terminal that has not all letters
    generator = torch.Generator().manual_seed(options.seed)
    for number in range(options.num):
        if number:
            print("-" * 40)
        print(prompt, end="", flush=True)
        decode = start_decoding()
        for token in generate(model, tokens, options.tokens, options.temperature, options.top_k, generator):
            if token == end:
                break
            print(decode(token), end="", flush=True)
        print()


def sample(argv):
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling takes longer than writing
            write_texts(parse(argv))
    except BrokenPipeError:  # as with  | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv):
    return run_command(sample, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
