"""A run for Hugging Face's transformers, and back:

    python -m tools.hf export out/NAME FOLDER      a folder that AutoModelForCausalLM and AutoTokenizer load, offline
    python -m tools.hf import FOLDER out/NAME      a Llama, Arcee or Apertus folder as a run, to sample or train further

Both need  pip install transformers.  --tokenizer=NAME tells export which tokenizer made the run's data, if its
meta.json does not. import takes --KEY=VALUE of train.py, such as --data; the folder says what the other keys
were in the exported run (but not where its data are). It writes out/NAME/config.py, with which training
continues: python train.py out/NAME/config.py --resume

A run with xIELU and qk_norm becomes an Apertus model, which other engines know too. Without qk_norm it
becomes an Arcee model, whose scalars transformers keeps in bf16, whatever dtype is asked for: three digits. The file
holds them in float32, and

    model = AutoModelForCausalLM.from_pretrained(FOLDER).float()
    model.load_state_dict(safetensors.torch.load_file(f"{FOLDER}/model.safetensors"), strict=False)

loads all digits (strict=False, because the file holds a tied output head only once).
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from textwrap import shorten

import torch

if not __package__:
    print("error: start it as  python -m tools.hf", file=sys.stderr)
    sys.exit(2)

from model import Llama, ModelConfig
from plumbing.command import Parser, UserError, program
from plumbing.files import write_json
from plumbing.run import save_checkpoint
from tools.sample import imported_tokenizer, load_run, own_encoding
from train import Config

# ---------------------------------------------------------------------------------------------------------------
# The config

XIELU = ("xielu", "xielu_reference", "xielu_inverted")  # one function
EVERYWHERE = "transformers, vLLM, SGLang, llama.cpp and mlx-lm"
NOT_QK_NORM = "transformers alone, its scalars in bf16 (see --help); trained with qk_norm, it would run in most engines"
NOT_RELU2 = "transformers alone: llama.cpp would silently compute ReLU² in its place"
NOT_SWIGLU = "transformers alone: llama.cpp and mlx-lm would silently compute SwiGLU in its place"

# What transformers has a class for, by its model_type and hidden_act: our activations that it computes, of which an
# import takes the first, and where such a model runs. Apertus has qk_norm, the others do not.
FAMILIES = {
    ("llama", "silu"): (("swiglu",), EVERYWHERE),
    ("llama", "gelu"): (("geglu",), NOT_SWIGLU),
    ("arcee", "xielu"): (XIELU, NOT_QK_NORM),
    ("arcee", "relu2"): (("relu2",), "transformers, vLLM and llama.cpp"),
    **{("arcee", name): ((name,), NOT_RELU2) for name in ("gelu", "silu", "relu")},
    ("apertus", "xielu"): (XIELU, EVERYWHERE),
}

# The same by our activation and qk_norm
CLASSES = {(name, kind[0] == "apertus"): kind for kind, (names, _) in FAMILIES.items() for name in names}

PLACE = ("out", "resume", "resume_from")  # keys that belong to a run's folder, and do not leave it

# Keys that differ only in their name: ours, and that of transformers
KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",  # of a gated MLP, theirs is 2/3 of ours
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}


def hf_config(config, end_of_text, tokenizer):
    """config.json of transformers, as a dict, for the Config of a run. end_of_text: the token that delimits documents.
    tokenizer: our name of the tokenizer, or None. What only `import` reads is under names of our own."""
    model_type, hidden_act = CLASSES[config.activation, config.qk_norm]
    return {
        **{theirs: getattr(config, ours) for ours, theirs in KEYS.items()},
        "intermediate_size": config.mlp_dim,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": hidden_act,
        # without the first in transformers 5, the second in 4, an Apertus model would get Llama 3's scaling
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        # mlx-lm refuses an Apertus model without these
        "qk_norm": config.qk_norm,
        **dict.fromkeys(("post_norm", "attention_bias", "mlp_bias"), False),
        "eos_token_id": end_of_text,
        # with ours it also begins documents; what a tokenizer of others begins with, its own files say
        **dict.fromkeys(("bos_token_id", "pad_token_id"), end_of_text if tokenizer else None),
        "dtype": "float32",
        "nanoxielu_tokenizer": tokenizer,
        "nanoxielu_config": {name: value for name, value in vars(config).items() if name not in (*PLACE, "data")},
    }


def our_config(folder):
    """({key: value}, our name of the tokenizer or None) of a folder that transformers has saved: the keys of the model,
    and those of the run if a run was exported. UserError if our code cannot be that model. (from_hf refuses biases and
    heads of another width, which show in the weights.)"""
    from transformers import AutoConfig, logging

    path = folder / "config.json"
    if not path.exists():  # transformers would look for it on the web
        raise UserError(f"{folder} has no config.json: give a folder that transformers has saved")
    logging.set_verbosity_error()  # our own lines say what is wrong
    try:
        hf = AutoConfig.from_pretrained(folder).to_dict()
        hf |= hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # where transformers 5 keeps rope_theta
        model_type, hidden_act = kind = hf["model_type"], str(hf.get("hidden_act"))
        if kind not in FAMILIES:
            known = ", ".join(" with ".join(pair) for pair in FAMILIES)
            raise UserError(f"no model of type {model_type} with {hidden_act}: there are {known}")
        if hf.get("rope_type", "default") != "default":
            raise UserError(f"rotary positions of type {hf['rope_type']} are not those of this code")
        model = ModelConfig.typed({ours: hf.get(theirs) for ours, theirs in KEYS.items()}, f"in {path}")
        model |= {"activation": FAMILIES[kind][0][0], "qk_norm": model_type == "apertus"}
        if model_type == "llama":
            if model["ffn_dim"] % 2:
                raise UserError("intermediate_size is odd, and a gated MLP of this code has an even width")
            model["ffn_dim"] = model["ffn_dim"] * 3 // 2
        ModelConfig(**model)
        run = Config.typed(dict(hf.get("nanoxielu_config") or {}), f"in {path}")
        return run | model, hf.get("nanoxielu_tokenizer")
    except Exception as error:  # transformers has many kinds
        raise UserError(f"{path} does not make a model: {error}") from None


# ---------------------------------------------------------------------------------------------------------------
# The weights

# Parts of the names of tensors that differ: ours, and that of transformers
NAMES = {".raw_alpha": ".alpha"}  # their alpha is the raw scalar
APERTUS_NAMES = {".input_layernorm": ".attention_layernorm", ".post_attention_layernorm": ".feedforward_layernorm"}


def to_hf(state, config):
    """Our state dict with transformers' names. Its xIELU reads two more tensors: without them it would compute with
    β = 0. With eps = 1e-6 its value and gradient for x ≤ 0 are ours, 0 included: min(x, eps) is x there, where
    min(x, 0) has a slope of ½ at 0."""
    model_type, hidden_act = CLASSES[config.activation, config.qk_norm]
    tensors = {}
    for name, tensor in state.items():
        for ours, theirs in (NAMES | (APERTUS_NAMES if model_type == "apertus" else {})).items():
            name = name.replace(ours, theirs)
        tensors[f"model.{name}"] = tensor
    head = tensors.pop("model.lm_head.weight")
    # a tied head too: llama.cpp refuses an Apertus model without one, and the others skip it
    if not config.tie_embeddings or model_type == "apertus":
        tensors["lm_head.weight"] = head.clone()  # safetensors refuses one tensor under two names
    if hidden_act == "xielu":
        for layer in range(config.n_layers):
            tensors[f"model.layers.{layer}.mlp.act_fn.beta"] = torch.tensor(0.5)
            tensors[f"model.layers.{layer}.mlp.act_fn.eps"] = torch.tensor(1e-6)
    return tensors


def read_tensors(folder):
    """{name: tensor} of all safetensors files in a folder; UserError if there is none or one is damaged."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except Exception as error:  # it has many kinds
            raise UserError(f"{file} is damaged ({error})") from None
    if not tensors:
        raise UserError(f"{folder} has no .safetensors file")
    return tensors


def from_hf(tensors, config):
    """Our state dict, in float32, of tensors with transformers' names; UserError if they are not the weights of this
    config's model, or their xIELU has another β."""
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("act_fn.beta") and (tensor != 0.5).any():
            raise UserError(f"{name} is {tensor.tolist()}, and this code's β is 0.5")
        if not name.endswith(("act_fn.beta", "act_fn.eps", "rotary_emb.inv_freq")):
            name = name.removeprefix("model.")
            for ours, theirs in (NAMES | APERTUS_NAMES).items():
                name = name.replace(theirs, ours)
            state[name] = tensor.float()
    if config.tie_embeddings and "embed_tokens.weight" in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    if len(layers) != config.n_layers:  # it may be so many that to build them would take long
        raise UserError(f"config.json has {config.n_layers} layers, and the weights have {len(layers)}")
    try:
        with torch.device("meta"):
            Llama(config).load_state_dict(state, assign=True)
    except RuntimeError as error:  # of load_state_dict, or of sizes that are too large to count
        reason = str(error).partition("Llama:")[2] or str(error)
        raise UserError(f"the weights do not fit config.json: {shorten(reason, 200)}") from None
    return state


# ---------------------------------------------------------------------------------------------------------------
# The tokenizer


def write_tokenizer(folder, encoding, seq_len):
    """Write a tiktoken.Encoding, with its ids, as the files of a tokenizer of transformers.

    tiktoken merges any two neighbours that make a token, the lowest rank first, so all ways to split a token in two
    are merges of its rank.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()  # GPT-2's alphabet, in which tokenizers writes bytes
    ranks = {"".join(letters[byte] for byte in token): rank for token, rank in encoding._mergeable_ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:place], token[place:]) for place in range(1, len(token))]
        merges += [(left, right) for left, right in splits if left in ranks and right in ranks]
    # ignore_merges: like tiktoken, take a word that is a token as it is, without merging
    tokenizer = Tokenizer(models.BPE(ranks | encoding._special_tokens, merges, ignore_merges=True))
    # the regex engine of tokenizers would read {1,3}+ as a repeated repetition, not as a possessive one
    split = pre_tokenizers.Split(Regex(encoding._pat_str.replace("{1,3}+", "{1,3}")), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(encoding._special_tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),  # tiktoken's eot_token
        "split_special_tokens": True,  # a special token in a text is plain text, as for prepare_data.py
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def copy_tokenizer(source, target):
    """Copy the files of a tokenizer of transformers, if a folder has them."""
    for file in source.glob("tokenizer*.json"):
        shutil.copy(file, target)


# ---------------------------------------------------------------------------------------------------------------
# Export and import


def export_run(out, folder, tokenizer=None):
    """Write a run's newest checkpoint as a folder for transformers. tokenizer: its name, if the run does not know."""
    from safetensors.torch import save_file

    model, config, known = load_run(out, "cpu", torch.float32)
    kind = CLASSES.get((config.activation, config.qk_norm))
    if not kind:
        fits = ", ".join(name for name, qk_norm in CLASSES if qk_norm == config.qk_norm)
        having = f"{config.activation} and qk_norm={config.qk_norm}"
        raise UserError(f"transformers has no class for a model with {having}: with this qk_norm it has {fits}")
    name = tokenizer or known
    encoding = own_encoding(name, config) if name else None
    end_of_text = encoding.eot_token if name else imported_tokenizer(out)[1]
    folder.mkdir(parents=True, exist_ok=True)
    if name:
        write_tokenizer(folder, encoding, config.seq_len)
    else:
        copy_tokenizer(out, folder)
    write_json(folder / "config.json", hf_config(config, end_of_text, name))
    save_file(to_hf(model.state_dict(), config), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file leaves it to its owner alone
    print(f"note: {' with '.join(kind)} runs in {FAMILIES[kind][1]}")


def import_folder(folder, out, options):
    """Make a run, at step 0, of a folder. options: {key: value} of train.py for its config; what they leave open is as
    in the run that was exported, if the folder says so."""
    values, tokenizer = our_config(folder)
    for name, value in options.items():
        # fewer positions are the same model; everything else that makes it is in the folder
        if name in (*ModelConfig.defaults(), *PLACE) and not (name == "seq_len" and value <= values[name]):
            raise UserError(f"--{name}={value} cannot be set: the model in {folder} has {values.get(name, 'its own')}")
    # a model of others gets a few sequences per step, whatever their length
    seq_len = options.get("seq_len", values["seq_len"])
    batch = {"micro_batch_size": 1, "tokens_per_step": seq_len * max(1, 16384 // seq_len)}
    values = batch | values | options | {"out": str(out)}
    config = Config(**values)
    config.check_batch(processes=1)
    checkpoint = {"step": 0, "seconds": 0.0, "loss_average": None, "optimizers": []}
    checkpoint |= {"model": from_hf(read_tensors(folder), config), "config": vars(config), "from_file": vars(config)}
    checkpoint["facts"] = {"tokenizer": tokenizer} if tokenizer else {}
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {value!r}\n" for name, value in values.items() if name != "out"]
    lines = ["from pathlib import Path\n\n", *lines, "out = str(Path(__file__).parent)\n"]  # so the folder may move
    (out / "config.py").write_text("".join(lines), "utf-8")
    copy_tokenizer(folder, out)
    save_checkpoint(out, checkpoint)


def convert(argv):
    """Do what a command line asks for."""
    parser = Parser("python -m tools.hf")
    parser.add_argument("command", choices=("export", "import"))
    parser.add_argument("source", metavar="FROM", type=Path)
    parser.add_argument("target", metavar="TO", type=Path)
    options, others = parser.parse_known_args(argv)
    for argument in others:
        if not argument.startswith("--") or not argument.partition("=")[2]:
            parser.error(f"give options as --KEY=VALUE, not {argument}")
    keys = dict(argument[2:].split("=", 1) for argument in others)
    if importlib.util.find_spec("transformers") is None:
        raise UserError("tools.hf needs an optional package: pip install transformers")
    if options.target.exists() and any(options.target.iterdir()):
        raise UserError(f"{options.target} is not empty: choose another folder")
    if options.command == "import":
        import_folder(options.source, options.target, Config.typed(keys, "on the command line"))
    elif keys.keys() <= {"tokenizer"}:
        export_run(options.source, options.target, **keys)
    else:
        parser.error("the only option of export is --tokenizer=NAME")
    print(f"written to {options.target}")


main = program(convert)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
