"""A run for Hugging Face's transformers, and back:

    python -m tools.hf export out/NAME FOLDER      a folder that AutoModelForCausalLM and AutoTokenizer load, offline
    python -m tools.hf import FOLDER out/NAME      a Llama or Arcee folder as a run, to sample from or to go on with

Both need  pip install transformers.  --tokenizer=NAME tells export which tokenizer
made the run's data, where its meta.json does not. import takes --KEY=VALUE of train.py, such as --data, and writes
out/NAME/config.py, by which the run goes on: python train.py out/NAME/config.py --resume

transformers keeps the two scalars of xIELU in bf16, whatever dtype is asked for: three digits. The file holds them in
float32, and

    model = AutoModelForCausalLM.from_pretrained(FOLDER).float()
    model.load_state_dict(safetensors.torch.load_file(f"{FOLDER}/model.safetensors"), strict=False)

gets them all (strict=False, since a tied output head is in the file but once).
"""

import importlib.util
import json
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

import train
from data import UserError
from model import Llama, ModelConfig
from tools.command import run_command
from tools.sample import imported_tokenizer, load_run, own_encoding

# What transformers has a class for: our name → (class, model_type, its hidden_act)
CLASSES = {
    "swiglu": ("LlamaForCausalLM", "llama", "silu"),
    "geglu": ("LlamaForCausalLM", "llama", "gelu"),
    "xielu": ("ArceeForCausalLM", "arcee", "xielu"),
    "relu2": ("ArceeForCausalLM", "arcee", "relu2"),
    "gelu": ("ArceeForCausalLM", "arcee", "gelu"),
    "silu": ("ArceeForCausalLM", "arcee", "silu"),
    "relu": ("ArceeForCausalLM", "arcee", "relu"),
}

# ---------------------------------------------------------------------------------------------------------------
# Names and sizes


def hf_config(config, end_of_text):
    """config.json of a ModelConfig, for transformers."""
    name, model_type, hidden_act = CLASSES[config.activation]
    return {
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": hidden_act,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.seq_len,
        "rope_theta": config.rope_theta,  # transformers 4 looks here, 5 below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "dtype": "float32",
    }


def our_config(folder):
    """The ModelConfig of a folder of transformers'; UserError where ours cannot be that model."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json: give a folder that transformers has saved")
    try:
        hf = AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # it has many kinds
        raise UserError(f"{path} cannot be read: {error}") from None
    names = {(model_type, hidden_act): ours for ours, (_, model_type, hidden_act) in CLASSES.items()}
    activation = names.get((hf["model_type"], hf.get("hidden_act")))
    if activation is None:
        known = ", ".join(f"{model_type} with {hidden_act}" for model_type, hidden_act in names)
        raise UserError(f"no model of type {hf['model_type']} with {hf.get('hidden_act')}: there are {known}")
    if hf.get("attention_bias") or hf.get("mlp_bias"):
        raise UserError("this model has biases, which this code has not")
    try:
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise UserError(f"rotary positions of type {rope['rope_type']} are not those of this code")
        if hf.get("head_dim") not in (None, hf["hidden_size"] // hf["num_attention_heads"]):
            raise UserError(f"heads of width {hf['head_dim']}, other than hidden_size / num_attention_heads")
        width = hf["intermediate_size"]
        if hf["model_type"] == "llama" and width % 2:
            raise UserError(f"intermediate_size={width} is odd: it must be 2/3 of a whole ffn_dim")
        return ModelConfig(
            dim=hf["hidden_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"],
            n_kv_heads=hf["num_key_value_heads"],
            ffn_dim=width * 3 // 2 if hf["model_type"] == "llama" else width,
            vocab_size=hf["vocab_size"],
            activation=activation,
            seq_len=hf["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or hf["rope_theta"]),
            norm_eps=float(hf["rms_norm_eps"]),
            tie_embeddings=bool(hf["tie_word_embeddings"]),
            init_std=float(hf["initializer_range"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} does not make a model: {error!r}") from None


def to_hf(state, config):
    """Our state dict under transformers' names. Its xIELU has two buffers besides the scalars; without them in the file
    it would run with β = 0. With eps = 0 its value and gradient at 0 are ours."""
    tensors = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            if not config.tie_embeddings:
                tensors[name] = tensor.contiguous()
        else:
            tensors[f"model.{name}"] = tensor.contiguous()
    if config.activation == "xielu":
        for layer in range(config.n_layers):
            tensors[f"model.layers.{layer}.mlp.act_fn.beta"] = torch.tensor(0.5)
            tensors[f"model.layers.{layer}.mlp.act_fn.eps"] = torch.tensor(0.0)
    return tensors


def from_hf(tensors, config):
    """The way back."""
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("act_fn.beta") and tensor.float().item() != 0.5:
            raise UserError(f"{name} is {tensor.item()}, and this code's β is 0.5")
        if name.endswith(("act_fn.beta", "act_fn.eps", "rotary_emb.inv_freq")):
            continue
        state[name.removeprefix("model.")] = tensor.float()
    if config.tie_embeddings and "embed_tokens.weight" in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    return state


# ---------------------------------------------------------------------------------------------------------------
# The tokenizer


def byte_letters():
    """{byte: letter}: the alphabet in which GPT-2 and its heirs write bytes, printable ones as they are."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def merge_of(token, ranks):
    """The two parts from which a token was merged: what is left when it is put together from its bytes with the ranks
    below its own."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in zip(parts, parts[1:])]
        lowest = min(range(len(pairs)), key=pairs.__getitem__)
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts


def hf_tokenizer(encoding):
    """A tokenizers.Tokenizer with the ids of a tiktoken.Encoding; special tokens in a text are plain text, as they are
    for prepare_data.py."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    ranks = encoding._mergeable_ranks

    def written(token):
        return "".join(letters[byte] for byte in token)

    vocab = {written(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = [
        tuple(map(written, merge_of(token, ranks))) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    # the same in the words of another engine, for which {1,3}+ is no possessive but a repeated repetition
    pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in encoding._special_tokens]
    )
    return tokenizer


def tokenizer_config(encoding, name, seq_len):
    """tokenizer_config.json. A special token that is written out in a text is plain text, as for prepare_data.py."""
    end_of_text = encoding.decode([encoding.eot_token])
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "nanoxielu_tokenizer": name,  # by which `import` knows it
    }


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# ---------------------------------------------------------------------------------------------------------------
# Folders


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def export(out, folder, tokenizer=None):
    """Write a run's newest checkpoint as a folder for transformers; tokenizer: its name, where the run knows none."""
    from safetensors.torch import save_file

    model, config, known = load_run(out, "cpu", torch.float32)
    if config.activation not in CLASSES:
        raise UserError(f"transformers has no class for {config.activation}: it has {', '.join(CLASSES)}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder")
    name = tokenizer or known
    if name:
        encoding = own_encoding(name, config)
        end = encoding.eot_token
    else:
        _, end, _ = imported_tokenizer(out)
    folder.mkdir(parents=True, exist_ok=True)
    if name:
        hf_tokenizer(encoding).save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", tokenizer_config(encoding, name, config.seq_len))
    else:
        for file in TOKENIZER_FILES:
            shutil.copy(out / file, folder)
    write_json(folder / "config.json", hf_config(model.config, end))
    save_file(to_hf(model.state_dict(), model.config), folder / "model.safetensors", metadata={"format": "pt"})
    if config.activation == "xielu":
        print("note: transformers rounds the scalars of xIELU to bf16; how to get them all: python -m tools.hf --help")


def read_tensors(folder):
    """All tensors of a folder's safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors file")
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error})") from None
    return tensors


def folder_tokenizer(folder):
    """Our name of a folder's tokenizer, or None if it is another."""
    try:
        return json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("nanoxielu_tokenizer")
    except (OSError, ValueError, AttributeError):
        return None


def import_folder(folder, out, options):
    """Make a run, at step 0, of a folder; options are {key: value} of train.py for its config."""
    model_config = our_config(folder)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another folder")
    sizes = {item.name: getattr(model_config, item.name) for item in fields(ModelConfig)}
    for name, value in options.items():
        # fewer positions are the same model; all else that makes it is in the folder
        if name in (*sizes, "out", "resume") and not (name == "seq_len" and value <= sizes[name]):
            raise UserError(
                f"--{name}={value} cannot be asked for: the model in {folder} has {sizes.get(name, 'its own')}"
            )
    seq_len = options.get("seq_len", model_config.seq_len)
    # a few sequences a step, whatever their length, where nothing else is asked for
    batch = {"micro_batch_size": 1, "tokens_per_step": seq_len * max(1, 16384 // seq_len)}
    values = sizes | batch | options | {"out": str(out)}
    config = train.Config(**values)
    model_config = train.check(config, 1)

    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in Llama(model_config).state_dict().items()}
    state = from_hf(read_tensors(folder), model_config)
    found = {name: weight.shape for name, weight in state.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            has, wants = (str(list(shapes[name])) if name in shapes else "none" for shapes in (found, expected))
            raise UserError(f"{folder} does not fit its config.json: of {name} it has {has}, which should be {wants}")

    tokenizer = folder_tokenizer(folder)
    checkpoint = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "step": 0,
        "seconds": 0.0,
        "loss_average": None,
        "config": asdict(config),
        "from_file": asdict(config),
        "data": {"tokenizer": tokenizer} if tokenizer else {},
    }
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    (out / "config.py").write_text(lines, "utf-8")
    if tokenizer is None and all((folder / name).exists() for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            shutil.copy(folder / name, out)
    train.save_checkpoint(out, checkpoint, keep=1)


def convert(argv):
    """Do what a command line asks for."""
    places = [argument for argument in argv if not argument.startswith("--")]
    options = dict(argument[2:].partition("=")[::2] for argument in argv if argument.startswith("--"))
    if "" in options.values():
        raise UserError("give each option a value, --KEY=VALUE: see python -m tools.hf --help")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("tools.hf needs an optional package: pip install transformers")
    if len(places) == 3 and places[0] == "export" and set(options) <= {"tokenizer"}:
        export(Path(places[1]), Path(places[2]), options.get("tokenizer"))
    elif len(places) == 3 and places[0] == "import":
        import_folder(Path(places[1]), Path(places[2]), train.typed_keys(options, "on the command line"))
    else:
        raise UserError("say export RUN FOLDER, or import FOLDER RUN: see python -m tools.hf --help")
    print(f"written to {places[2]}")


def main(argv):
    return run_command(convert, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
